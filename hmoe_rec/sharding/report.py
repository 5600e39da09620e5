"""What a planner predicts -> tables in a terminal: per rank, per table, per embedding set; how two plans differ.

A rank is a process with its device. Memory is in powers of two (1 GiB = 2^30 bytes), time in milliseconds of one step.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hmoe_rec.sharding.prediction import MEMORY, PARTS, Alternative, PlanPrediction, RankPrediction, TablePrediction
from hmoe_rec.types import PlanError
from hmoe_rec.units import format_bytes, format_count, format_ms

DEVICES = {"hbm": "HBM", "ddr": "DDR"}  # the device's own memory, and the host's
NO_SET = "(no set)"
_WIDE = 110  # characters; a narrower terminal gets fewer columns, since figures must not be cut
_GROUPS = 16  # rows of ranks that a terminal shows; of more only half of them


# ------------------------------------------------------------------------------------------------- figures, as numbers


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
    """

    name: str
    tables: int
    rows: int
    parameters: int
    hbm_bytes: int
    ddr_bytes: int
    ms: Mapping[str, float]

    @property
    def total_ms(self) -> float:
        return sum(self.ms.values())


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


def shard_ms(table: TablePrediction) -> float:
    """Mean time of its shards: what the time of an alternative's shard is compared with."""
    return sum(table.ms.values()) / max(1, len(table.ranks))


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
    shared = SetCost("fixed costs", 0, 0, 0, 0, 0, {part: x if x > 1e-9 else 0.0 for part, x in ms.items()})
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
    )


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


# --------------------------------------------------------------------------------------------------- figures, as text


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
    nodes = f", {_plural(topology['nodes'], 'node')}" if "nodes" in topology else ""
    ranks, tables = _plural(len(prediction.ranks), "rank"), _plural(len(prediction.tables), "table")
    name = topology.get("name") or "custom cluster"
    return f"{name}{nodes}: {ranks}, batch {prediction.batch_size:,} per rank, {tables}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def part_name(part: str) -> str:
    return part.replace("_", " ").replace("all to all", "all-to-all")


def share(part: float, whole: float | None) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


# ---------------------------------------------------------------------------------------------------- one plan


def plan_table(
    prediction: PlanPrediction,
    console: Console,
    max_tables: int = 30,
    *,
    moved_bytes: Mapping[str, float] | None = None,
) -> None:
    """Prints memory and time per rank, what was chosen for the costliest tables, what each embedding set costs, notes.

    Args:
        max_tables: rows of the table of tables, the most time first.
        moved_bytes: embedding set -> bytes that all ranks together send in a step, where that is known.

    Raises:
        PlanError: the prediction is empty.
    """
    check(prediction)
    planner = prediction.planner.get("name") or prediction.planner.get("planner") or "the planner"
    console.print(Text(cluster_line(prediction), style="bold"))
    console.print(Text(f"estimates of {planner}, made in {prediction.seconds:,.1f} s; 1 GiB = 2^30 bytes", style="dim"))
    for device, spreads in used_memory(prediction).items():
        console.print(_memory(prediction, device, spreads))
    console.print(_time(prediction))
    _print_ranks(prediction, console)
    console.print(_choices(prediction))
    _print_tables(prediction, console, max_tables)
    console.print(_sets(prediction, moved_bytes, console.width))
    for note in prediction.notes:
        console.print(Text(f"note: {note}"))


def _grid(title: str, *left: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(Text(column, overflow="fold"), justify="right", no_wrap=True)
    return table


def _row(table: Table, *cells: str, style: str | None = None) -> None:
    table.add_row(*map(Text, cells), style=style)  # Text: names may hold what rich reads as markup


def _memory(prediction: PlanPrediction, device: str, spreads: Mapping[str, Spread]) -> Table:
    room = capacity(prediction, device)
    of_room = f", {format_bytes(room)} each" if room else ""
    table = _grid(f"{DEVICES[device]} per rank{of_room}", "use", right=("least", "mean", "most", "most / capacity"))
    for kind, s in spreads.items():
        if kind == "total":
            table.add_section()
        _row(table, kind, *(format_bytes(x) for x in (s.least, s.mean, s.most)), share(s.most, room))
    if room:
        most = spreads["total"].most
        over = most > room
        word, style = ("missing", "bold red") if over else ("free", None)
        _row(table, f"{word} on rank {fullest(prediction, device).rank}", "", "", format_bytes(abs(room - most)), "")
        table.rows[-1].style = style
    return table


def _time(prediction: PlanPrediction) -> Table:
    worst = busiest(prediction)
    table = _grid("Time of a step, ms", "part", right=("mean", f"busiest: rank {worst.rank}", "share of busiest"))
    for part in PARTS:
        mean, most = mean_ms(prediction, part), worst.ms.get(part, 0.0)
        _row(table, part_name(part), format_ms(mean), format_ms(most), share(most, worst.total_ms))
    table.add_section()
    mean = sum(mean_ms(prediction, part) for part in PARTS)
    _row(table, "all", format_ms(mean), format_ms(prediction.critical_ms), "")
    _row(table, "imbalance: busiest / mean", "", f"{prediction.imbalance:.2f}", "")
    return table


def _print_ranks(prediction: PlanPrediction, console: Console) -> None:
    """Ranks whose figures read the same share a row; of many rows, the ones with the most time."""
    devices = list(used_memory(prediction))
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank in sorted(prediction.ranks, key=lambda r: (-r.total_ms, r.rank)):
        memory = [sum(getattr(rank, device).values()) for device in devices]
        full = [share(used, capacity(prediction, d)) for used, d in zip(memory, devices, strict=True)]
        cells = [cell for pair in zip(map(format_bytes, memory), full, strict=True) for cell in pair]
        groups[(*cells, format_ms(rank.total_ms))].append(rank.rank)
    columns = [column for device in devices for column in (DEVICES[device], "full")]
    table = _grid("Ranks, the most time first", "ranks", right=("count", *columns, "ms"))
    shown = len(groups) if len(groups) <= _GROUPS else _GROUPS // 2
    for cells, ranks in list(groups.items())[:shown]:
        _row(table, format_ranks(ranks), f"{len(ranks):,}", *cells)
    console.print(table)
    if left := sum(len(ranks) for ranks in list(groups.values())[shown:]):
        console.print(Text(f"and {left:,} other ranks with less time", style="dim"))


def _choices(prediction: PlanPrediction) -> Table:
    table = _grid(
        "Chosen; share: of all tables' time", "sharding", "kernel", right=("tables", "rows", "memory", "share")
    )
    whole = total_ms(prediction.tables)
    for sharding_type, kernel, tables in choices(prediction):
        memory = sum(t.hbm_bytes + t.ddr_bytes for t in tables)
        rows = format_count(sum(t.rows for t in tables))
        cells = (f"{len(tables):,}", rows, format_bytes(memory), share(total_ms(tables), whole))
        _row(table, sharding_type, kernel, *cells)
    return table


def _print_tables(prediction: PlanPrediction, console: Console, max_tables: int) -> None:
    title = "Tables, the most time first; ms: mean of its shards; share: of all tables' time"
    table = _grid(title, "table", "set", "rows x width", "chosen", "ranks", right=("memory", "ms", "share"))
    table.add_column("fastest alternative, a shard", overflow="fold")
    whole = total_ms(prediction.tables)
    for t in costliest_first(prediction.tables)[:max_tables]:
        size = f"{format_count(t.rows)} x {t.dim} {t.data_type}"
        memory, ms = format_bytes(t.hbm_bytes + t.ddr_bytes), sum(t.ms.values())
        chosen = f"{t.sharding_type} {t.kernel}"
        cells = (t.table, t.embedding_set or NO_SET, size, chosen, format_ranks(t.ranks, 2), memory)
        _row(table, *cells, format_ms(shard_ms(t)), share(ms, whole), _alternative(t))
    console.print(table)
    left = len(prediction.tables) - max_tables
    others = f"and {left:,} other tables with less time; " if left > 0 else ""
    console.print(Text(f"{others}a shard of a finer cut takes less time, but on more ranks", style="dim"))


def _alternative(table: TablePrediction) -> str:
    best = best_alternative(table)
    if best is not None:
        memory = "" if best.hbm_bytes is None else f", {format_bytes(best.hbm_bytes)}"
        return f"{best.sharding_type} {best.kernel}: {format_ms(best.ms)} ms{memory}"
    reasons = [a.impossible for a in table.alternatives if a.impossible]
    return f"none: {Counter(reasons).most_common(1)[0][0]}" if reasons else "none tried"


def _sets(prediction: PlanPrediction, moved_bytes: Mapping[str, float] | None, width: int) -> Table:
    left_out = {"sent"} if moved_bytes is None else set()
    left_out |= {"tables", "rows", "other"} if width < _WIDE else set()
    names = ("tables", "rows", "parameters", "memory", "sent", "all-to-all", "other", "ms", "share")
    columns = [name for name in names if name not in left_out]
    table = _grid("Embedding sets; ms of all-to-alls, other parts and both: mean over all ranks", "set", right=columns)
    whole = whole_cost(prediction)
    sent = {**(moved_bytes or {}), whole.name: sum((moved_bytes or {}).values())}
    for cost in (*set_costs(prediction), fixed_cost(prediction), whole):
        if cost is whole:
            table.add_section()
        if cost is not None:
            cells = _cells_of(cost, sent.get(cost.name), whole.total_ms)
            _row(table, cost.name, *(cells[name] for name in columns))
    return table


def _cells_of(cost: SetCost, sent: float | None, whole_ms: float) -> dict[str, str]:
    sizes = {
        "tables": f"{cost.tables:,}",
        "rows": format_count(cost.rows),
        "parameters": format_count(cost.parameters),
        "memory": format_bytes(cost.hbm_bytes + cost.ddr_bytes),
        "sent": format_bytes(sent),
    }
    exchange, ms = exchange_ms(cost), cost.total_ms
    times = {"all-to-all": exchange, "other": ms - exchange, "ms": ms}
    return {
        **(sizes if cost.tables else dict.fromkeys(sizes, "")),  # fixed costs have no size
        **{name: format_ms(x) for name, x in times.items()},
        "share": share(ms, whole_ms),
    }


def exchange_ms(cost: SetCost) -> float:
    """Time in which ranks wait for each other's data."""
    return sum(ms for part, ms in cost.ms.items() if part.endswith("all_to_all"))


# ---------------------------------------------------------------------------------------------------- two plans


def diff_table(before: PlanPrediction, after: PlanPrediction, console: Console, max_tables: int = 30) -> None:
    """Prints what changed from one prediction to the other: per table, memory, time.

    Args:
        max_tables: rows of the table of changed tables, the largest change of time first.

    Raises:
        PlanError: one of the predictions is empty.
    """
    check(before)
    check(after)
    for name, prediction in (("before", before), ("after", after)):
        console.print(Text(f"{name}: {cluster_line(prediction)}", style="bold"))
    console.print(_diff_figures(before, after))
    _print_changed(before, after, console, max_tables)


def _diff_figures(before: PlanPrediction, after: PlanPrediction) -> Table:
    table = _grid("Memory and time", "figure", right=("before", "after", "change", "change, %"))

    def add(name: str, old: float, new: float, text: Callable[[float], str]) -> None:
        ratio = f"{100 * (new / old - 1):+.1f}" if old else "-"
        _row(table, name, text(old), text(new), signed(new - old, text), ratio)

    uses = used_memory(before), used_memory(after)
    nothing = dict.fromkeys((*MEMORY, "total"), Spread(0, 0, 0))
    for device in DEVICES:
        old, new = (use.get(device, nothing) for use in uses)
        if any(device in use for use in uses):
            for kind in nothing:
                add(f"{DEVICES[device]} {kind}, most of a rank", old[kind].most, new[kind].most, format_bytes)
            add(f"{DEVICES[device]} total, mean", old["total"].mean, new["total"].mean, format_bytes)
            table.add_section()
    add("ms, busiest rank", before.critical_ms, after.critical_ms, format_ms)
    for part in PARTS:
        old, new = (busiest(p).ms.get(part, 0.0) for p in (before, after))
        add(f"  {part_name(part)}", old, new, format_ms)
    add("imbalance: busiest / mean", before.imbalance, after.imbalance, lambda x: f"{x:.2f}")
    return table


def signed(change: float, text: Callable[[float], str]) -> str:
    return "same" if change == 0 else f"{'+' if change > 0 else '-'}{text(abs(change))}"


def _print_changed(before: PlanPrediction, after: PlanPrediction, console: Console, max_tables: int) -> None:
    old, new = ({(t.module, t.table): t for t in p.tables} for p in (before, after))

    def weight(key: tuple[str, str]) -> float:
        before_ms, after_ms = (total_ms([side[key]] if key in side else []) for side in (old, new))
        return abs(after_ms - before_ms)

    changed = [k for k in dict.fromkeys([*old, *new]) if k not in old or k not in new or _how(old[k]) != _how(new[k])]
    changed.sort(key=lambda key: (-weight(key), key))
    same = len(old.keys() | new.keys()) - len(changed)
    if not changed:
        console.print(Text(f"the same for all {_plural(same, 'table')}: sharding, kernel, ranks, size"))
        return
    right = ("memory", "after", "ms", "after")
    title = "Tables that changed, the largest change of time first; memory and ms of a shard: before, after"
    table = _grid(title, "table", "before", "after", right=right)
    for key in changed[:max_tables]:
        pair = [side.get(key) for side in (old, new)]
        memory = [format_bytes(t and t.hbm_bytes + t.ddr_bytes) for t in pair]
        ms = [format_ms(t and shard_ms(t)) for t in pair]
        _row(table, key[1], *_ways(*pair), *memory, *ms)
    console.print(table)
    left = len(changed) - max_tables
    more = f"and {left:,} other changed tables; " if left > 0 else ""
    console.print(Text(f"{more}changed: {_plural(len(changed), 'table')}, the same: {same:,}", style="dim"))


def _how(table: TablePrediction) -> tuple[Any, ...]:
    size = (table.rows, table.dim, table.data_type, table.embedding_set)
    return (table.sharding_type, table.kernel, tuple(table.ranks), *size)


def _ways(before: TablePrediction | None, after: TablePrediction | None) -> list[str]:
    """How each is sharded; its size only where it is another."""
    resized = before and after and _how(before)[3:] != _how(after)[3:]

    def way(t: TablePrediction | None) -> str:
        if t is None:
            return "not there"
        size = f", {t.rows:,} x {t.dim} {t.data_type} of {t.embedding_set}" if resized else ""
        return f"{t.sharding_type} {t.kernel} on {format_ranks(t.ranks, 2)}{size}"

    return [way(before), way(after)]
