"""Two predictions -> what changed: memory, time, bytes sent, embedding sets, tables; in a terminal or as a page."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rich.console import Console
from rich.text import Text

from hmoe_rec.sharding import html_page
from hmoe_rec.sharding.figures import (
    DEVICES,
    SENT,
    Spread,
    busiest,
    check,
    cluster_line,
    exchanges,
    format_ranks,
    part_name,
    plural,
    set_costs,
    total_ms,
    used_memory,
    whole_cost,
)
from hmoe_rec.sharding.html_page import grid, section
from hmoe_rec.sharding.prediction import MEMORY, PARTS, PlanPrediction, TablePrediction
from hmoe_rec.sharding.report import add_row, new_table
from hmoe_rec.units import format_bytes, format_count, format_ms

MAX_TABLES = 1000  # on a page
Pair = tuple[TablePrediction | None, TablePrediction | None]


@dataclass(frozen=True)
class Change:
    """A figure before and after, and how it is written."""

    name: str
    before: float
    after: float
    text: Callable[[float], str]

    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, before, after, difference, difference in percent."""
        ratio = f"{100 * (self.after / self.before - 1):+.1f}" if self.before else "-"
        difference = signed(self.after - self.before, self.text)
        return self.name, self.text(self.before), self.text(self.after), difference, ratio


def signed(change: float, text: Callable[[float], str]) -> str:
    return "same" if change == 0 else f"{'+' if change > 0 else '-'}{text(abs(change))}"


def changes(before: PlanPrediction, after: PlanPrediction) -> list[list[Change]]:
    """All figures of the whole plans, in groups: memory of a rank, time of a step, what all ranks send and hold."""
    worst, costs = (busiest(before), busiest(after)), (whole_cost(before), whole_cost(after))

    def change(name: str, values: Iterable[float], text: Callable[[float], str]) -> Change:
        old, new = values
        return Change(name, old, new, text)

    memory = [list(_memory(device, used_memory(before), used_memory(after))) for device in DEVICES]
    time = [change("ms, busiest rank", (before.critical_ms, after.critical_ms), format_ms)]
    time += [change(f"  {part_name(part)}", (r.ms.get(part, 0.0) for r in worst), format_ms) for part in PARTS]
    time.append(change("imbalance: busiest / mean", (before.imbalance, after.imbalance), lambda x: f"{x:.2f}"))
    whole = [change("tables", (c.tables for c in costs), format_count)]
    whole.append(change("memory of all tables", (c.hbm_bytes + c.ddr_bytes for c in costs), format_bytes))
    whole += [change(f"{what} sent", (c.sent.get(part, 0) for c in costs), format_bytes) for part, what in SENT.items()]
    whole.append(change("exchanges of ids", (exchanges(before), exchanges(after)), format_count))
    return [group for group in (*memory, time, whole) if group]


def _memory(device: str, *uses: dict[str, dict[str, Spread]]) -> Iterator[Change]:
    if any(device in use for use in uses):
        nothing = dict.fromkeys((*MEMORY, "total"), Spread(0, 0, 0))
        old, new = (use.get(device, nothing) for use in uses)
        for kind in nothing:
            yield Change(f"{DEVICES[device]} {kind}, most of a rank", old[kind].most, new[kind].most, format_bytes)
        yield Change(f"{DEVICES[device]} total, mean", old["total"].mean, new["total"].mean, format_bytes)


def changed_tables(before: PlanPrediction, after: PlanPrediction) -> tuple[list[Pair], int]:
    """Tables that are sharded, sized or placed another way, the largest change of time first; how many are the same."""
    old, new = ({(t.module, t.table): t for t in p.tables} for p in (before, after))
    pairs = [(old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]
    changed = [(a, b) for a, b in pairs if a is None or b is None or _how(a) != _how(b)]

    def weight(pair: Pair) -> float:
        before_ms, after_ms = (total_ms([t] if t else []) for t in pair)
        return abs(after_ms - before_ms)

    return sorted(changed, key=lambda pair: (-weight(pair), _name(pair))), len(pairs) - len(changed)


def diff_table(before: PlanPrediction, after: PlanPrediction, console: Console, max_tables: int = 30) -> None:
    """Prints what changed from one prediction to the other: memory, time, sets, tables.

    Args:
        max_tables: rows of the table of changed tables, the largest change of time first.

    Raises:
        PlanError: one of the predictions is empty.
    """
    for name, prediction in (("before", before), ("after", after)):
        check(prediction)
        console.print(Text(f"{name}: {cluster_line(prediction)}", style="bold"))
    table = new_table("Memory, time, bytes sent in a step", "figure", right=("before", "after", "change", "change, %"))
    for group in changes(before, after):
        for change in group:
            add_row(table, *change.cells())
        table.add_section()
    console.print(table)
    table = new_table(
        "Embedding sets; sent: in a step by all ranks; ms: mean over all ranks", "set", right=_SET_COLUMNS
    )
    for cells in _set_rows(before, after):
        add_row(table, *cells)
    console.print(table)
    changed, same = changed_tables(before, after)
    if not changed:
        console.print(Text(f"the same for all {plural(same, 'table')}: sharding, kernel, ranks, size"))
        return
    title = "Tables that changed, the largest change of time first; ms: of the slowest rank's part of it"
    table = new_table(title, "table", "before", "after", right=_TABLE_COLUMNS)
    for pair in changed[:max_tables]:
        add_row(table, *_table_cells(pair))
    console.print(table)
    console.print(Text(_rest(len(changed), same, max_tables), style="dim"))


def diff_html(before: PlanPrediction, after: PlanPrediction, title: str, remarks: Sequence[str] = ()) -> str:
    """The same as a page, to be written to a file.

    Args:
        remarks: what else differs, one line each.

    Raises:
        PlanError: one of the predictions is empty.
    """
    check(before)
    check(after)
    changed, same = changed_tables(before, after)
    cards = [
        (name, f"{change[1]} → {change[2]}", f"{change[3]}{'' if change[4] == '-' else f' ({change[4]} %)'}", False)
        for name, change in _cards(before, after)
    ]
    lines = "".join(f"<li>{escape(line)}</li>" for line in remarks)
    figures = [tuple(map(escape, change.cells())) for group in changes(before, after) for change in group]
    sets = [tuple(map(escape, cells)) for cells in _set_rows(before, after)]
    tables = [tuple(map(escape, _table_cells(pair))) for pair in changed[:MAX_TABLES]]
    body = grid(("table", "before", "after", *_TABLE_COLUMNS), tables, left=3) if tables else ""
    sections = [
        html_page.cards(cards),
        f'<section class="notes"><ul>{lines}</ul></section>' if lines else "",
        section("The whole plans", "", grid(("figure", "before", "after", "change", "change, %"), figures)),
        section("Embedding sets", "Sent: in a step by all ranks. Time: mean over all ranks.", grid(_SETS, sets)),
        section("Tables that changed", _rest(len(changed), same, MAX_TABLES), body),
    ]
    return html_page.page(title, f"before: {cluster_line(before)} — after: {cluster_line(after)}", sections)


def _cards(before: PlanPrediction, after: PlanPrediction) -> Iterator[tuple[str, tuple[str, ...]]]:
    shown = {
        "ms, busiest rank": "time of a step, ms",
        "HBM total, most of a rank": "fullest HBM",
        "DDR total, most of a rank": "fullest DDR",
        "memory of all tables": "memory of all tables",
        "vectors sent": "vectors sent in a step",
    }
    found = {change.name: change.cells() for group in changes(before, after) for change in group}
    return ((title, found[name]) for name, title in shown.items() if name in found)


_SET_COLUMNS = ("memory", "after", "sent", "after", "ms", "after")
_SETS = ("set", *_SET_COLUMNS)
_TABLE_COLUMNS = ("memory", "after", "ms", "after")


def _set_rows(before: PlanPrediction, after: PlanPrediction) -> Iterable[Sequence[str]]:
    old, new = ({cost.name: cost for cost in (*set_costs(p), whole_cost(p))} for p in (before, after))
    names = [name for name in dict.fromkeys([*old, *new]) if name != "all"]
    for name in (*names, "all"):
        pair = old.get(name), new.get(name)
        yield (
            name,
            *(format_bytes(c and c.hbm_bytes + c.ddr_bytes) for c in pair),
            *(format_bytes(c and sum(c.sent.values())) for c in pair),
            *(format_ms(c and c.total_ms) for c in pair),
        )


def _table_cells(pair: Pair) -> tuple[str, ...]:
    memory = [format_bytes(t and t.hbm_bytes + t.ddr_bytes) for t in pair]
    return (_name(pair), *_ways(*pair), *memory, *(format_ms(t and t.slowest_ms) for t in pair))


def _rest(changed: int, same: int, shown: int) -> str:
    more = f"and {changed - shown:,} other changed tables; " if changed > shown else ""
    return f"{more}changed: {plural(changed, 'table')}, the same: {same:,}"


def _name(pair: Pair) -> str:
    return next(t.table for t in pair if t is not None)


def _how(table: TablePrediction) -> tuple[object, ...]:
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
