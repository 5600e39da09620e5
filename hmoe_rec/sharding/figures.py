"""What a planner predicts -> the figures that reports show: over ranks, per table, per embedding set.

A rank is a process with its device. Time is in milliseconds of one step.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hmoe_rec.sharding.prediction import (
    EXCHANGES,
    MEMORY,
    PARTS,
    Alternative,
    PlanPrediction,
    RankPrediction,
    TablePrediction,
)
from hmoe_rec.types import PlanError
from hmoe_rec.units import format_bytes

DEVICES = {"hbm": "HBM", "ddr": "DDR"}  # the device's own memory, and the host's
NO_SET = "(no set)"
SENT = dict(zip(EXCHANGES, ("ids", "vectors", "gradients"), strict=True))  # part of a step -> what travels in it


@dataclass(frozen=True)
class Spread:
    """A figure over the ranks."""

    least: float
    mean: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(min(values), sum(values) / len(values), max(values))


@dataclass(frozen=True)
class SetCost:
    """What the tables of one embedding set cost.

    Attributes:
        hbm_bytes, ddr_bytes: of all ranks together, as the planner counts it.
        ms: part -> mean over all ranks, so that sets and fixed costs add up to the mean time of a rank.
        sent: part of `EXCHANGES` -> bytes of all ranks together.
    """

    name: str
    tables: int
    rows: int
    parameters: int
    hbm_bytes: int
    ddr_bytes: int
    ms: Mapping[str, float]
    sent: Mapping[str, int]

    @property
    def total_ms(self) -> float:
        return sum(self.ms.values())

    @property
    def exchange_ms(self) -> float:
        """Time in which ranks wait for each other's data."""
        return sum(self.ms.get(part, 0.0) for part in EXCHANGES)


def check(prediction: PlanPrediction) -> None:
    """
    Raises:
        PlanError: a prediction without ranks or without tables says nothing.
    """
    for what, entries in (("ranks", prediction.ranks), ("tables", prediction.tables)):
        if not entries:
            raise PlanError(
                f"prediction of a sharding plan: it has no {what}, so there is nothing to report; expected at least "
                "one of each. Make it again from the run file (hmoe-rec plan CONFIG)"
            )


def used_memory(prediction: PlanPrediction) -> dict[str, dict[str, Spread]]:
    """Kind of device memory that any rank uses (`DEVICES`) -> kind of use (`MEMORY` and "total") -> over the ranks.

    Memory that is only reserved is left out: every rank with a GPU reserves some of the machine's.
    """
    result = {}
    for device in DEVICES:
        uses = [getattr(rank, device) for rank in prediction.ranks]
        if any(use.get(kind, 0) for use in uses for kind in MEMORY if kind != "reserved"):
            spreads = {kind: Spread.of(use.get(kind, 0) for use in uses) for kind in MEMORY}
            result[device] = spreads | {"total": Spread.of(sum(use.values()) for use in uses)}
    return result


def capacity(prediction: PlanPrediction, device: str) -> float | None:
    """Bytes of a rank, or None where the topology does not say."""
    return prediction.topology.get(f"{device}_bytes") or None


def mean_ms(prediction: PlanPrediction, part: str) -> float:
    return sum(rank.ms.get(part, 0.0) for rank in prediction.ranks) / len(prediction.ranks)


def busiest(prediction: PlanPrediction) -> RankPrediction:
    return max(prediction.ranks, key=lambda rank: rank.total_ms)


def fullest(prediction: PlanPrediction, device: str) -> RankPrediction:
    return max(prediction.ranks, key=lambda rank: sum(getattr(rank, device).values()))


def best_alternative(table: TablePrediction) -> Alternative | None:
    possible = [a for a in table.alternatives if a.impossible is None and a.ms is not None]
    return min(possible, key=lambda a: a.ms or 0.0, default=None)


def set_costs(prediction: PlanPrediction) -> list[SetCost]:
    """One per embedding set, in the order of the tables."""
    members: dict[str, list[TablePrediction]] = defaultdict(list)
    for table in prediction.tables:
        members[table.embedding_set].append(table)
    return [_cost(name or NO_SET, tables, len(prediction.ranks)) for name, tables in members.items()]


def whole_cost(prediction: PlanPrediction) -> SetCost:
    """All sets, and what they share."""
    cost = _cost("all", prediction.tables, len(prediction.ranks))
    return replace(cost, ms={part: mean_ms(prediction, part) for part in PARTS})


def fixed_cost(prediction: PlanPrediction) -> SetCost | None:
    """What ranks spend beyond the tables: latencies of collectives, launches of kernels. None where it is nothing."""
    sets = set_costs(prediction)
    ms = {part: mean_ms(prediction, part) - sum(cost.ms[part] for cost in sets) for part in PARTS}
    ms = {part: x if x > 1e-9 else 0.0 for part, x in ms.items()}
    shared = SetCost("fixed costs", tables=0, rows=0, parameters=0, hbm_bytes=0, ddr_bytes=0, ms=ms, sent={})
    return shared if shared.total_ms > 0 else None


def _cost(name: str, tables: Sequence[TablePrediction], num_ranks: int) -> SetCost:
    return SetCost(
        name,
        tables=len(tables),
        rows=sum(t.rows for t in tables),
        parameters=sum(t.rows * t.dim for t in tables),
        hbm_bytes=sum(t.hbm_bytes for t in tables),
        ddr_bytes=sum(t.ddr_bytes for t in tables),
        ms={part: sum(t.ms.get(part, 0.0) for t in tables) / num_ranks for part in PARTS},
        sent={part: sum(t.sent.get(part, 0) for t in tables) for part in EXCHANGES},
    )


def exchanges(prediction: PlanPrediction) -> int:
    """All-to-alls of ids in a step: one for each sharding type in each collection, whatever the number of sets."""
    return len({(t.module, t.sharding_type) for t in prediction.tables}) if len(prediction.ranks) > 1 else 0


def choices(prediction: PlanPrediction) -> list[tuple[str, str, list[TablePrediction]]]:
    """(sharding type, kernel, tables), the most time first."""
    chosen: dict[tuple[str, str], list[TablePrediction]] = defaultdict(list)
    for table in prediction.tables:
        chosen[table.sharding_type, table.kernel].append(table)
    by_time = sorted(chosen.items(), key=lambda x: -total_ms(x[1]))
    return [(*key, tables) for key, tables in by_time]


def total_ms(tables: Iterable[TablePrediction]) -> float:
    return sum(sum(t.ms.values()) for t in tables)


def costliest_first(tables: Iterable[TablePrediction]) -> list[TablePrediction]:
    return sorted(tables, key=lambda t: (-sum(t.ms.values()), -t.hbm_bytes - t.ddr_bytes, t.module, t.table))


# ----------------------------------------------------------------------------------------------------------- in words


def format_ranks(ranks: Sequence[int], longest: int = 4) -> str:
    """0, 4-7, 12; after `longest` runs only how many there are."""
    distinct = sorted(set(ranks))
    if not distinct:
        return "-"
    if distinct[-1] - distinct[0] + 1 == len(distinct):
        runs = [(distinct[0], distinct[-1])]
    else:
        starts = [r for last, r in zip([-2, *distinct], distinct, strict=False) if r != last + 1]
        ends = [r for r, after in zip(distinct, [*distinct[1:], -2], strict=True) if after != r + 1]
        runs = list(zip(starts, ends, strict=True))
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:longest])
    return shown if len(runs) <= longest else f"{shown}, ... ({len(distinct):,} ranks)"


def format_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value with its unit) of a topology's or planner's entries; units are the ends of the keys."""
    result = []
    for key, value in facts.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            result += [(f"{name}: {inner}", text) for inner, text in format_facts(value)]
        elif isinstance(value, bool) or not isinstance(value, int | float):
            listed = isinstance(value, list | tuple)
            result.append((name, ", ".join(map(str, value)) if listed else "-" if value is None else str(value)))
        elif key.endswith(("bandwidth", "_bw")):
            result.append((name, f"{value / 1e9:,.1f} GB/s (10^9 bytes)"))
        elif key.endswith("_bytes"):
            result.append((name.removesuffix(" bytes"), format_bytes(value)))
        else:
            result.append((name, f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"))
    return result


def cluster_line(prediction: PlanPrediction) -> str:
    topology = prediction.topology
    nodes = f", {plural(topology['nodes'], 'node')}" if "nodes" in topology else ""
    ranks, tables = plural(len(prediction.ranks), "rank"), plural(len(prediction.tables), "table")
    name = topology.get("name") or "custom cluster"
    return f"{name}{nodes}: {ranks}, batch {prediction.batch_size:,} per rank, {tables}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def part_name(part: str) -> str:
    return part.replace("_", " ").replace("all to all", "all-to-all")


def share(part: float, whole: float | None) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
