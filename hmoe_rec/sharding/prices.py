"""What a machine was measured to take for the parts of a step: a price list that `hmoe-rec bench calibrate` writes.

Ours: where TorchRec's planner divides bytes by one bandwidth and takes a backward pass for two forward passes, a price
list has for each part::

    ms = call_ms + (id_ns ids + row_ns rows + vector_ns vectors + byte_ns bytes) / 1e6

    ids      looked up by the shards of a process        rows   different ones among them, at most: min(ids, rows)
    vectors  written by its kernels                      bytes  of ids, or of rows and vectors, as the part has it

call_ms is paid once per collection and sharding type. The rest is paid per shard by the process that holds it; of join
and split, per table by every process, since each puts the vectors of its own examples together. No torch in here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hmoe_rec.suggest import unknown


@dataclass(frozen=True)
class Price:
    """Of one part of a step; all at least 0. The module's docstring has the formula."""

    call_ms: float = 0.0
    id_ns: float = 0.0
    row_ns: float = 0.0
    vector_ns: float = 0.0
    byte_ns: float = 0.0

    def ms(self, *, ids: float = 0.0, rows: float = 0.0, vectors: float = 0.0, bytes: float = 0.0) -> float:
        """Without the call."""
        spent = self.id_ns * ids + self.row_ns * rows + self.vector_ns * vectors + self.byte_ns * bytes
        return spent / 1e6


@dataclass(frozen=True)
class Prices:
    """A machine's price list.

    Attributes:
        input, input_cut: ids permuted, exchanged and permuted again; for tables that are not and that are cut by rows,
            whose ids are put into buckets. bytes: ids and lengths that a process receives.
        forward, backward: lookup kernels of pooled tables; the backward one steps the tables' optimizer too. bytes: of
            the rows read, ids x width, and of the vectors written.
        forward_unpooled, backward_unpooled: the same of sequences.
        all_to_all, reduce_scatter, all_gather: exchange of vectors or gradients; the last two where pooled tables are
            cut by rows. bytes: a process's whole buffer, its own part included.
        join, join_cut, join_unpooled: what is done with vectors after their exchange: reordered, put side by side; of
            pooled tables that are not and that are cut by rows, and of sequences. vectors, bytes: of a process's own
            examples. split, split_cut, split_unpooled: the same with gradients, before their exchange.
        all_reduce, update: of replicated tables: their dense gradients summed over the processes; a gradient of zeros
            written, and the table stepped by it. bytes: of the table.
    """

    input: Price = field(default_factory=Price)
    input_cut: Price = field(default_factory=Price)
    forward: Price = field(default_factory=Price)
    backward: Price = field(default_factory=Price)
    forward_unpooled: Price = field(default_factory=Price)
    backward_unpooled: Price = field(default_factory=Price)
    all_to_all: Price = field(default_factory=Price)
    reduce_scatter: Price = field(default_factory=Price)
    all_gather: Price = field(default_factory=Price)
    join: Price = field(default_factory=Price)
    join_cut: Price = field(default_factory=Price)
    join_unpooled: Price = field(default_factory=Price)
    split: Price = field(default_factory=Price)
    split_cut: Price = field(default_factory=Price)
    split_unpooled: Price = field(default_factory=Price)
    all_reduce: Price = field(default_factory=Price)
    update: Price = field(default_factory=Price)

    def exchange(self, part: str, *, cut: bool, pooled: bool) -> Price:
        """part: "output_all_to_all" or "gradient_all_to_all"."""
        if cut and pooled:
            return self.reduce_scatter if part == "output_all_to_all" else self.all_gather
        return self.all_to_all

    def lookup(self, part: str, *, pooled: bool) -> Price:
        """part: "forward" or "backward"."""
        return getattr(self, part if pooled else f"{part}_unpooled")

    def around(self, part: str, *, cut: bool, pooled: bool) -> Price:
        """part: "join" or "split"."""
        return getattr(self, f"{part}{'_unpooled' if not pooled else '_cut' if cut else ''}")


PARTS_PRICED = tuple(f.name for f in fields(Prices))
TERMS = tuple(f.name for f in fields(Price))


def prices_of(given: Any, problems: list[str]) -> Prices | None:
    """{part: {term: number}} -> the list; what is wrong is added to `problems`."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        problems.append(f"prices: expected a mapping ({', '.join(PARTS_PRICED)}), got {given!r}")
        return None
    found: dict[str, Price] = {}
    for part, terms in given.items():
        if part not in PARTS_PRICED:
            problems.append(f"prices.{part}: {unknown('part', str(part), PARTS_PRICED)}")
        elif not isinstance(terms, Mapping):
            problems.append(f"prices.{part}: expected a mapping ({', '.join(TERMS)}), got {terms!r}")
        else:
            wrong = [term for term in terms if term not in TERMS]
            problems += [f"prices.{part}.{term}: {unknown('term', str(term), TERMS)}" for term in wrong]
            values = {term: _number(f"prices.{part}.{term}", v, problems) for term, v in terms.items() if term in TERMS}
            found[part] = Price(**values)
    missing = [part for part in PARTS_PRICED if part not in given]
    problems += [f"prices: missing: {', '.join(missing)} (hmoe-rec bench calibrate measures all)"] if missing else []
    return Prices(**found)


def _number(where: str, value: Any, problems: list[str]) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number < float("inf"):
        problems.append(f"{where}: expected a number of at least 0, got {value!r}")
        return 0.0
    return number
