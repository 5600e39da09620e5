"""A model that does not fit -> what is missing, which tables are responsible, and remedies that were tried."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hmoe_rec.sharding.constraints import CACHING, FUSED, SEPARATOR, Rule
from hmoe_rec.sharding.options import AUTO_TYPES, COLUMN_CUT, ROW_CUT, TOO_BIG, Table, Workload, usable_bytes
from hmoe_rec.sharding.search import Failure, Found, Progress, Space, make_space, search
from hmoe_rec.sharding.topology import Cluster
from hmoe_rec.suggest import listing
from hmoe_rec.types import PlanError
from hmoe_rec.units import format_bytes

MOST_RANKS = 16384
SHOWN = 5


@dataclass(frozen=True)
class Suggestion:
    """A remedy and what the planner made of it.

    Attributes:
        what: the change, as one would say it.
        fits: whether a plan was found with it.
        ms: predicted time of the busiest process with it; None if it does not fit.
    """

    what: str
    fits: bool
    ms: float | None = None

    def __str__(self) -> str:
        return f"{self.what}: {f'fits, {self.ms:.3g} ms a step' if self.fits else 'still does not fit'}"


class DoesNotFitError(PlanError):
    """No plan: too little memory. The message says it all; the attributes are the same as data.

    Attributes:
        missing_bytes: over all processes; 0 where the sum would fit but a shard finds no room.
        largest: (table, bytes) of the largest tables.
        suggestions: those that fit first.
    """

    missing_bytes: int = 0
    largest: tuple[tuple[str, int], ...] = ()
    suggestions: tuple[Suggestion, ...] = ()


def no_plan(
    space: Space,
    rules: Mapping[str, Rule],
    cluster: Cluster,
    work: Workload,
    failure: Failure,
    *,
    seconds: float = 60.0,
    progress: Progress | None = None,
) -> PlanError:
    """The error to raise where `search` failed.

    Args:
        seconds: for trying remedies; no new one is started afterwards.
    """
    room, usable_room = (format_bytes(cluster.memory_bytes * share) for share in (1, 1 - work.reserved))
    head = (
        f"no sharding plan for {cluster.world_size} processes ({cluster.nodes} x {cluster.ranks_per_node}, {room} of "
        f"{cluster.memory_kind} each, {usable_room} of it usable)"
    )
    forbidden = [i for i in failure.impossible if not _too_big(space, i)]
    if forbidden:
        lines = [line for i in forbidden[:SHOWN] for line in _forbidden(space, i)]
        more = [f"and {len(forbidden) - SHOWN} tables more"] if len(forbidden) > SHOWN else []
        return PlanError("\n  ".join([f"{head}: no sharding type is allowed", *lines, *more]))
    need = _least_bytes(space, cluster)
    usable = float(usable_bytes(cluster, work)[0 if cluster.device == "cuda" else 1]) * cluster.world_size
    missing = max(0.0, need - usable)
    largest = sorted(space.tables, key=lambda t: -t.table_bytes)[:SHOWN]
    suggestions = tuple(sorted(_tried(space, rules, cluster, work, need / usable, seconds, progress), key=_rank))
    lines = [f"{head}: it does not fit"]
    if missing:
        lines.append(
            f"tables, optimizer state and activations need {format_bytes(need)} at least, {format_bytes(usable)} are "
            f"usable: {format_bytes(missing)} too little, {format_bytes(missing / cluster.world_size)} per process"
        )
    lines += _blocked(space, failure)
    lines.append("largest tables: " + ", ".join(f"{t.name} {format_bytes(t.table_bytes)}" for t in largest))
    if any(s.fits for s in suggestions):
        lines.append("what makes it fit, each tried by the planner:")
        lines += [f"  {n}. {s}" for n, s in enumerate((s for s in suggestions if s.fits), 1)]
    if not all(s.fits for s in suggestions):
        lines.append("tried in vain: " + "; ".join(s.what for s in suggestions if not s.fits))
    error = DoesNotFitError("\n  ".join(lines))
    error.missing_bytes = int(missing)
    error.largest = tuple((t.name, t.table_bytes) for t in largest)
    error.suggestions = suggestions
    return error


def _too_big(space: Space, i: int) -> bool:
    return any((a.impossible or "").startswith(TOO_BIG) for a in space.impossible[i])


def _forbidden(space: Space, i: int) -> list[str]:
    table = space.tables[i]
    possible = ", ".join(dict.fromkeys(o.sharding_type for o in space.excluded[i]))
    reasons = [f"    {a.sharding_type}: {a.impossible}" for a in space.impossible[i]]
    reasons += [
        f"    {o.sharding_type}: {o.excluded}" for o in {o.sharding_type: o for o in space.excluded[i]}.values()
    ]
    remedy = f"; allow one of {possible}" if possible else ""
    return [f"table {table.name!r} ({table.rows} rows x {table.dim}){remedy}:", *reasons]


def _blocked(space: Space, failure: Failure) -> list[str]:
    lines = []
    for i in failure.impossible[:SHOWN]:
        table = space.tables[i]
        lines.append(f"table {table.name!r} ({format_bytes(table.table_bytes)}) has no way to be sharded:")
        lines += [f"  {a.sharding_type}: {a.impossible}" for a in space.impossible[i]]
        lines += [f"  {o.sharding_type}: {o.excluded}" for o in space.excluded[i][:SHOWN]]
    if not lines and failure.table is not None and failure.option is not None:
        shard = max(sum(failure.option.cost.hbm), sum(failure.option.cost.ddr))
        lines.append(
            f"table {failure.table.name!r} found no room as {failure.option.sharding_type}: a shard takes "
            f"{format_bytes(shard)} with its activations, {format_bytes(failure.free)} are left on the process with "
            "most room"
        )
    return lines


def _least_bytes(space: Space, cluster: Cluster) -> float:
    """Bytes of all tables in their thriftiest ways, in the memory where tables live."""
    total = 0
    for i, table in enumerate(space.tables):
        options = space.options[i] or space.excluded[i]
        held = [o.num_shards * sum(o.cost.hbm if cluster.device == "cuda" else o.cost.ddr) for o in options]
        total += min(held, default=table.table_bytes + table.rows * table.state_bytes(table.dim))
    return float(total)


# --------------------------------------------------------------------------------------------------------------- trials


def _tried(
    space: Space,
    rules: Mapping[str, Rule],
    cluster: Cluster,
    work: Workload,
    excess: float,
    seconds: float,
    progress: Progress | None,
) -> Iterable[Suggestion]:
    end = time.perf_counter() + seconds
    tables = space.tables

    def trial(
        what: str, tables: list[Table] = tables, rules: Mapping[str, Rule] = rules, work: Workload = work
    ) -> list[Suggestion]:
        if time.perf_counter() > end:
            return []
        if progress is not None:
            progress(f"does not fit; trying: {what}", 1.0)
        found = search(make_space(tables, rules, cluster, work), cluster, work, seconds=seconds / 8)
        if not isinstance(found, Found):
            return [Suggestion(what, False)]
        count = sum(o.kernel == CACHING for o in found.options)
        if CACHING in what:
            what += f" ({count} of {len(tables)} tables use it)" if count else ""
        return [Suggestion(what, True, found.ms)]

    def of_types(names: set[str], types: tuple[str, ...]) -> dict[str, Rule]:
        return {n: replace(r, types=types) if n in names else r for n, r in rules.items()}

    result: list[Suggestion] = []
    strict = {t.name for t in tables if rules[t.name].types and not set(rules[t.name].types) & set(ROW_CUT)}
    if strict:
        result += trial(
            f"types: allow row_wise and table_row_wise for {_few(tables, strict)}", rules=of_types(strict, ())
        )
    free = {t.name for t in tables if not rules[t.name].types and t.pooled}
    blocked = {space.tables[i].name for i in range(len(tables)) if not _whole(space, i)} & free
    cut = blocked or {t.name for t in sorted(tables, key=lambda t: -t.table_bytes)[:SHOWN] if t.name in free}
    if cut:
        what = f"types: allow column_wise and grid_shard for {_few(tables, cut)} (changes row-wise Adagrad)"
        result += trial(what, rules=of_types(cut, (*AUTO_TYPES, *COLUMN_CUT)))
    cached = {
        n: replace(r, kernels=tuple(dict.fromkeys((*(r.kernels or (FUSED,)), CACHING)))) for n, r in rules.items()
    }
    halved = [replace(t, value_bytes=2, data_type="fp16") if t.value_bytes == 4 else t for t in tables]
    if cluster.device == "cuda":
        result += trial("kernels: [fused, fused_uvm_caching] for all tables, to use the machines' memory", rules=cached)
    result += _more_nodes(tables, rules, cluster, work, excess, end, seconds, progress)
    if work.batch_size > 1:
        smaller = replace(work, batch_size=work.batch_size // 2)
        result += trial(f"batches of {smaller.batch_size} instead of {work.batch_size} per process", work=smaller)
    if halved != tables:
        half = trial("fp16 tables", halved)
        result += half
        if cluster.device == "cuda" and not any(s.fits for s in half):
            result += trial("fp16 tables and fused_uvm_caching", halved, cached)
    result += [s for what, narrow in _narrower(tables) for s in trial(what, narrow)]
    return result


def _few(tables: Iterable[Table], names: set[str]) -> str:
    """The largest first."""
    return listing(t.name for t in sorted(tables, key=lambda t: -t.table_bytes) if t.name in names)


def _whole(space: Space, i: int) -> bool:
    """Whether one process or one machine can hold the table."""
    return any(o.sharding_type != "row_wise" for o in space.options[i])


def _narrower(tables: list[Table]) -> list[tuple[str, list[Table]]]:
    """The set with the most bytes at half its width, and all sets so."""
    size: dict[str, int] = {}
    for t in tables:
        size[t.name.partition(SEPARATOR)[0]] = size.get(t.name.partition(SEPARATOR)[0], 0) + t.table_bytes

    def halved(names: Iterable[str]) -> list[Table]:
        chosen = set(names)
        return [
            replace(t, dim=t.dim // 2) if t.name.partition(SEPARATOR)[0] in chosen and t.dim % 8 == 0 else t
            for t in tables
        ]

    largest = max(size, key=size.__getitem__)
    result = [(f"set {largest!r} half as wide", halved([largest]))]
    result += [("all sets half as wide", halved(size))] if len(size) > 1 else []
    return [(what, narrow) for what, narrow in result if narrow != tables]


def _more_nodes(
    tables: list[Table],
    rules: Mapping[str, Rule],
    cluster: Cluster,
    work: Workload,
    excess: float,
    end: float,
    seconds: float,
    progress: Progress | None,
) -> list[Suggestion]:
    """The smallest number of nodes that fits: doubled until it does, then halved in between."""
    most = MOST_RANKS // cluster.ranks_per_node
    spaces: dict[int, Space] = {}

    def fits(nodes: int) -> bool:
        if progress is not None:
            progress(f"does not fit; trying: {nodes} nodes", 1.0)
        spaces[nodes] = make_space(tables, rules, cluster.with_nodes(nodes), work)
        return isinstance(search(spaces[nodes], cluster.with_nodes(nodes), work, first=True), Found)

    low, high = cluster.nodes, max(cluster.nodes + 1, math.ceil(cluster.nodes * excess))
    while high <= most and time.perf_counter() < end and not fits(high):
        low, high = high, 2 * high
    if high > most or time.perf_counter() > end:
        return [Suggestion(f"up to {low} nodes instead of {cluster.nodes}", False)] if low > cluster.nodes else []
    while high - low > 1 and time.perf_counter() < end:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    found = search(spaces[high], cluster.with_nodes(high), work, seconds=seconds / 8)
    assert isinstance(found, Found), f"{high} nodes fitted a moment ago"
    return [
        Suggestion(
            f"{high} nodes instead of {cluster.nodes} ({high * cluster.ranks_per_node} processes)", True, found.ms
        )
    ]


def _rank(suggestion: Suggestion) -> tuple[bool, bool, float]:
    """First what fits; of that, first what leaves the trained numbers alone; then the fastest."""
    changes = any(w in suggestion.what for w in ("fp16", "half as wide", "batches of", "row-wise Adagrad"))
    return not suggestion.fits, changes, suggestion.ms or 0.0
