"""What a planner says of a plan before it runs, as plain data: memory and time per process and per table.

No torch in here, so that reports read it without loading it. Times are milliseconds of one training step, memory is
bytes; both are estimates of the planner.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Parts of a step, in the order in which they happen.
PARTS = (
    "input_all_to_all",
    "prefetch",
    "lookup_forward",
    "output_all_to_all",
    "gradient_all_to_all",
    "lookup_backward",
    "optimizer",
)
EXCHANGES = ("input_all_to_all", "output_all_to_all", "gradient_all_to_all")  # parts that send: ids, vectors, gradients
MEMORY = ("tables", "optimizer", "activations", "reserved")


@dataclass(frozen=True)
class Alternative:
    """A way to shard a table that was not chosen.

    Attributes:
        ms: time of the largest shard on its process; None where it cannot be.
        hbm_bytes: of that shard, in the memory where tables live (on CPU the machine's); None where it cannot be.
        impossible: why it cannot be, or None. With ms and hbm_bytes beside it: it could be, but is excluded by a
            constraint or by default.
        shards: processes that would each hold one; None where it cannot be.
    """

    sharding_type: str
    kernel: str
    ms: float | None
    hbm_bytes: int | None
    impossible: str | None = None
    shards: int | None = None


@dataclass(frozen=True)
class TablePrediction:
    """One table under the plan.

    Attributes:
        module: path of the collection that holds it.
        embedding_set, field: what the table is for.
        ranks: processes that hold a shard, in the shards' order.
        hbm_bytes, ddr_bytes: of all shards together, without activations' double counting: as the planner has it.
        ms: part -> milliseconds, summed over the shards.
        alternatives: other ways, the fastest first, the impossible ones last.
        slowest_ms: of the process that spends most time on it, all parts; None in files of an earlier version.
        sent: part of `EXCHANGES` -> bytes that all processes together send in a step. Whole buffers are counted, with
            what stays on its process, as bandwidths count them. Empty where there is one process.
    """

    module: str
    table: str
    embedding_set: str
    field: str
    rows: int
    dim: int
    data_type: str
    sharding_type: str
    kernel: str
    ranks: tuple[int, ...]
    hbm_bytes: int
    ddr_bytes: int
    ms: Mapping[str, float]
    alternatives: tuple[Alternative, ...] = ()
    slowest_ms: float | None = None
    sent: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class RankPrediction:
    """One process under the plan.

    Attributes:
        hbm, ddr: kind of memory (`MEMORY`) -> bytes.
        ms: part (`PARTS`) -> milliseconds.
    """

    rank: int
    hbm: Mapping[str, int]
    ddr: Mapping[str, int]
    ms: Mapping[str, float]

    @property
    def total_ms(self) -> float:
        return sum(self.ms.values())


@dataclass(frozen=True)
class PlanPrediction:
    """A whole plan.

    Attributes:
        topology: name, nodes, processes per node, capacities and bandwidths (`Cluster.to_dict`).
        batch_size: examples per process.
        planner: "hmoe_rec" or whoever estimated, and options that matter.
        seconds: the planner ran for.
        notes: what a person should know, one line each.
    """

    topology: Mapping[str, Any]
    batch_size: int
    ranks: tuple[RankPrediction, ...]
    tables: tuple[TablePrediction, ...]
    seconds: float = 0.0
    planner: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def critical_ms(self) -> float:
        """Time of the busiest process: the others wait for it."""
        return max((r.total_ms for r in self.ranks), default=0.0)

    @property
    def imbalance(self) -> float:
        """Time of the busiest process over the mean; 1 = all alike."""
        mean = sum(r.total_ms for r in self.ranks) / max(1, len(self.ranks))
        return self.critical_ms / mean if mean else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back to an equal prediction."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PlanPrediction":
        """Inverse of to_dict.

        Raises:
            KeyError, TypeError, ValueError: damaged content.
        """
        tables = [
            TablePrediction(
                **{
                    **table,
                    "ranks": tuple(table["ranks"]),
                    "alternatives": tuple(Alternative(**a) for a in table["alternatives"]),
                }
            )
            for table in content["tables"]
        ]
        ranks = tuple(RankPrediction(**rank) for rank in content["ranks"])
        return cls(**{**content, "ranks": ranks, "tables": tuple(tables), "notes": tuple(content["notes"])})
