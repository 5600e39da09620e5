"""What a planner predicts -> tables in a terminal: per rank, per table, per embedding set."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hmoe_rec.sharding.figures import (
    DEVICES,
    NO_SET,
    SENT,
    SetCost,
    Spread,
    best_alternative,
    busiest,
    capacity,
    check,
    choices,
    cluster_line,
    costliest_first,
    exchanges,
    fixed_cost,
    format_ranks,
    fullest,
    mean_ms,
    part_name,
    plural,
    set_costs,
    share,
    total_ms,
    used_memory,
    whole_cost,
)
from hmoe_rec.sharding.prediction import PARTS, Alternative, PlanPrediction, TablePrediction
from hmoe_rec.units import format_bytes, format_count, format_ms

_WIDE = 110  # characters; a narrower terminal gets fewer columns, since figures must not be cut
_GROUPS = 16  # rows of ranks that a terminal shows; of more only half of them


def plan_table(prediction: PlanPrediction, console: Console, max_tables: int = 30) -> None:
    """Prints memory and time per rank, what was chosen for the costliest tables, what each embedding set costs, notes.

    Args:
        max_tables: rows of the table of tables, the most time first.

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
    console.print(_sets(prediction, console.width))
    console.print(Text(exchange_line(prediction), style="dim"))
    for note in prediction.notes:
        console.print(Text(f"note: {note}"))


def new_table(title: str, *left: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(Text(column, overflow="fold"), justify="right", no_wrap=True)
    return table


def add_row(table: Table, *cells: str, style: str | None = None) -> None:
    table.add_row(*map(Text, cells), style=style)  # Text: names may hold what rich reads as markup


def _memory(prediction: PlanPrediction, device: str, spreads: Mapping[str, Spread]) -> Table:
    room = capacity(prediction, device)
    of_room = f", {format_bytes(room)} each" if room else ""
    table = new_table(f"{DEVICES[device]} per rank{of_room}", "use", right=("least", "mean", "most", "most / capacity"))
    for kind, s in spreads.items():
        if kind == "total":
            table.add_section()
        add_row(table, kind, *(format_bytes(x) for x in (s.least, s.mean, s.most)), share(s.most, room))
    if room:
        most = spreads["total"].most
        over = most > room
        word, style = ("missing", "bold red") if over else ("free", None)
        add_row(table, f"{word} on rank {fullest(prediction, device).rank}", "", "", format_bytes(abs(room - most)), "")
        table.rows[-1].style = style
    return table


def _time(prediction: PlanPrediction) -> Table:
    worst = busiest(prediction)
    table = new_table("Time of a step, ms", "part", right=("mean", f"busiest: rank {worst.rank}", "share of busiest"))
    for part in PARTS:
        mean, most = mean_ms(prediction, part), worst.ms.get(part, 0.0)
        add_row(table, part_name(part), format_ms(mean), format_ms(most), share(most, worst.total_ms))
    table.add_section()
    mean = sum(mean_ms(prediction, part) for part in PARTS)
    add_row(table, "all", format_ms(mean), format_ms(prediction.critical_ms), "")
    add_row(table, "imbalance: busiest / mean", "", f"{prediction.imbalance:.2f}", "")
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
    table = new_table("Ranks, the most time first", "ranks", right=("count", *columns, "ms"))
    shown = len(groups) if len(groups) <= _GROUPS else _GROUPS // 2
    for cells, ranks in list(groups.items())[:shown]:
        add_row(table, format_ranks(ranks), f"{len(ranks):,}", *cells)
    console.print(table)
    if left := sum(len(ranks) for ranks in list(groups.values())[shown:]):
        console.print(Text(f"and {left:,} other ranks with less time", style="dim"))


def _choices(prediction: PlanPrediction) -> Table:
    table = new_table(
        "Chosen; share: of all tables' time", "sharding", "kernel", right=("tables", "rows", "memory", "share")
    )
    whole = total_ms(prediction.tables)
    for sharding_type, kernel, tables in choices(prediction):
        memory = sum(t.hbm_bytes + t.ddr_bytes for t in tables)
        rows = format_count(sum(t.rows for t in tables))
        cells = (f"{len(tables):,}", rows, format_bytes(memory), share(total_ms(tables), whole))
        add_row(table, sharding_type, kernel, *cells)
    return table


def _print_tables(prediction: PlanPrediction, console: Console, max_tables: int) -> None:
    """Tables of several sets whose figures read the same share a row."""
    alike: dict[tuple[str, ...], list[TablePrediction]] = defaultdict(list)
    for t in costliest_first(prediction.tables):
        size = f"{format_count(t.rows)} x {t.dim} {t.data_type}"
        figures = (format_bytes(t.hbm_bytes + t.ddr_bytes), format_ms(t.slowest_ms))
        alike[(t.field, size, f"{t.sharding_type} {t.kernel}", *figures, _alternative(t))].append(t)
    title = (
        "Tables, the most time first; memory, and ms of the slowest rank's part: of each; share: of all tables' time"
    )
    table = new_table(title, "field", "sets", "rows x width", "chosen", "ranks", right=("memory", "ms", "share"))
    table.add_column("fastest alternative", overflow="fold")
    whole = total_ms(prediction.tables)
    groups = sorted(alike.items(), key=lambda group: -total_ms(group[1]))
    for (field, size, chosen, memory, ms, alternative), tables in groups[:max_tables]:
        sets = ", ".join(t.embedding_set or NO_SET for t in tables)
        ranks = format_ranks([rank for t in tables for rank in t.ranks], 2)
        add_row(table, field, sets, size, chosen, ranks, memory, ms, share(total_ms(tables), whole), alternative)
    console.print(table)
    if left := sum(len(tables) for _, tables in groups[max_tables:]):
        console.print(Text(f"and {left:,} other tables with less time", style="dim"))


def _alternative(table: TablePrediction) -> str:
    best = best_alternative(table)
    if best is not None:
        kernel = "" if best.kernel == table.kernel else f" {best.kernel}"
        return f"{best.sharding_type}{kernel}: {cost_of(best)}"
    reasons = [a.impossible for a in table.alternatives if a.impossible]
    return f"none: {Counter(reasons).most_common(1)[0][0]}" if reasons else "none tried"


def cost_of(way: Alternative) -> str:
    """Time and memory of a rank that would hold a part of the table, and how many would."""
    memory = "" if way.hbm_bytes is None else f", {format_bytes(way.hbm_bytes)}"
    where = "" if way.shards is None else " on 1 rank" if way.shards == 1 else f" on each of {way.shards:,}"
    return f"{format_ms(way.ms)} ms{memory}{where}"


def _sets(prediction: PlanPrediction, width: int) -> Table:
    narrow = ("parameters", "memory", "sent", "all-to-all", "ms", "share")
    names = ("tables", "rows", "parameters", "memory", *SENT.values(), "all-to-all", "other", "ms", "share")
    columns = names if width >= _WIDE else narrow
    title = "Embedding sets; ids, vectors, gradients: sent in a step by all ranks; ms: mean over all ranks"
    table = new_table(title, "set", right=columns)
    whole = whole_cost(prediction)
    for cost in (*set_costs(prediction), fixed_cost(prediction), whole):
        if cost is whole:
            table.add_section()
        if cost is not None:
            cells = cells_of(cost, whole.total_ms)
            add_row(table, cost.name, *(cells[name] for name in columns))
    return table


def exchange_line(prediction: PlanPrediction) -> str:
    """How often ranks exchange ids in a step: what a further set does not change."""
    count = exchanges(prediction)
    if not count:
        return "one rank: nothing is sent"
    sets = plural(len(set_costs(prediction)), "set")
    exchanged = plural(count, "exchange")
    return f"{sets}, {exchanged} of ids in a step: one for each sharding type of each collection of tables"


def cells_of(cost: SetCost, whole_ms: float) -> dict[str, str]:
    """Column -> what stands there; fixed costs have no size."""
    sizes = {
        "tables": f"{cost.tables:,}",
        "rows": format_count(cost.rows),
        "parameters": format_count(cost.parameters),
        "memory": format_bytes(cost.hbm_bytes + cost.ddr_bytes),
        "sent": format_bytes(sum(cost.sent.values())),
        **{what: format_bytes(cost.sent.get(part, 0)) for part, what in SENT.items()},
    }
    times = {"all-to-all": cost.exchange_ms, "other": cost.total_ms - cost.exchange_ms, "ms": cost.total_ms}
    return {
        **(sizes if cost.tables else dict.fromkeys(sizes, "")),
        **{name: format_ms(x) for name, x in times.items()},
        "share": share(cost.total_ms, whole_ms),
    }
