"""What a planner predicts -> one HTML page: bars per rank, costs per set, every table."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from hmoe_rec.sharding import html_page
from hmoe_rec.sharding.figures import (
    DEVICES,
    SENT,
    Spread,
    busiest,
    capacity,
    check,
    choices,
    cluster_line,
    fixed_cost,
    format_facts,
    format_ranks,
    fullest,
    mean_ms,
    part_name,
    set_costs,
    share,
    total_ms,
    used_memory,
    whole_cost,
)
from hmoe_rec.sharding.html_page import Stack, grid, section, swatch
from hmoe_rec.sharding.prediction import MEMORY, PARTS, PlanPrediction, RankPrediction
from hmoe_rec.sharding.report import cells_of, exchange_line
from hmoe_rec.sharding.report_tables import SCRIPT, TABLES, table_data
from hmoe_rec.units import format_bytes, format_count, format_ms

MAX_BARS = 64
# Numbers of the page's colors. Neighbors in a stack can be told apart with any kind of color vision.
PART_COLORS = {part_name(part): i for i, part in enumerate(PARTS)}
MEMORY_COLORS: dict[str, int] = dict(zip(MEMORY, (0, 5, 2, 1), strict=True))
KILO = 1024.0


def plan_html(prediction: PlanPrediction, title: str) -> str:
    """The page, to be written to a file.

    Raises:
        PlanError: the prediction is empty.
    """
    check(prediction)
    memory = [_memory(prediction, device, spreads) for device, spreads in used_memory(prediction).items()]
    sections = [
        _cards(prediction),
        _notes(prediction),
        _time(prediction),
        *memory,
        _sets(prediction),
        _choices(prediction),
        TABLES,
        _facts(prediction),
    ]
    return html_page.page(title, cluster_line(prediction), sections, data=table_data(prediction), script=SCRIPT)


# ------------------------------------------------------------------------------------------------------- bars per rank


@dataclass(frozen=True)
class Bar:
    """Consecutive ranks, drawn as the one of them with the highest total."""

    ranks: tuple[int, ...]
    worst: RankPrediction
    parts: tuple[float, ...]
    least: float

    @property
    def total(self) -> float:
        return sum(self.parts)


def bars(
    prediction: PlanPrediction, figures: Callable[[RankPrediction], Mapping[str, float]], kinds: Sequence[str]
) -> list[Bar]:
    """At most `MAX_BARS`, each of equally many ranks (the last may have fewer), of whole nodes where possible."""
    ranks = sorted(prediction.ranks, key=lambda r: r.rank)
    size = -(-len(ranks) // MAX_BARS)
    per_node = prediction.topology.get("ranks_per_node") or 1
    if size > 1:
        size = -(-size // per_node) * per_node

    def total(rank: RankPrediction) -> float:
        return sum(figures(rank).get(kind, 0) for kind in kinds)

    result = []
    for start in range(0, len(ranks), size):
        members = ranks[start : start + size]
        worst = max(members, key=total)
        parts = tuple(figures(worst).get(kind, 0) for kind in kinds)
        result.append(Bar(tuple(r.rank for r in members), worst, parts, min(map(total, members))))
    return result


def _chart(
    title: str,
    shown: Sequence[Bar],
    colors: Mapping[str, int],
    text: Callable[[float], str],
    line: tuple[str, float] | None,
    unit: float,
) -> str:
    """Bars of ranks with a dashed line at `line`, and their figures in a table to unfold."""
    grouped = any(len(bar.ranks) > 1 for bar in shown)
    every = -(-len(shown) // 8)
    stacks = []
    for i, bar in enumerate(shown):
        what = ", ".join(f"{name} {text(x)}" for name, x in zip(colors, bar.parts, strict=True) if x > 0)
        ranks = f"ranks {format_ranks(bar.ranks)}, the highest is rank {bar.worst.rank}"
        hint = f"{ranks if grouped else f'rank {bar.ranks[0]}'}: {text(bar.total)} ({what})"
        notch = bar.least if grouped and bar.least < bar.total else None
        stacks.append(Stack(str(bar.ranks[0]) if i % every == 0 else "", hint, bar.parts, notch))
    remark = f"A bar is the highest of {len(shown[0].ranks):,} ranks; its notch is the total of the lowest."
    return html_page.chart(
        title,
        stacks,
        colors,
        text,
        axis="rank",
        figures=_figures(shown, colors, text, grouped),
        line=line,
        unit=unit,
        remark=remark if grouped else "",
    )


def _figures(shown: Sequence[Bar], kinds: Iterable[str], text: Callable[[float], str], grouped: bool) -> str:
    header = ["ranks", *(["highest", "lowest total"] if grouped else []), *kinds, "total"]

    def cells(bar: Bar) -> list[str]:
        extra = [f"rank {bar.worst.rank}", escape(text(bar.least))] if grouped else []
        return [format_ranks(bar.ranks), *extra, *(escape(text(x)) for x in (*bar.parts, bar.total))]

    return grid(header, map(cells, shown))


# ------------------------------------------------------------------------------------------------------------ sections


def _cards(prediction: PlanPrediction) -> str:
    worst = busiest(prediction)
    cards = [
        ("time of a step", f"{format_ms(prediction.critical_ms)} ms", f"busiest: rank {worst.rank}", False),
        ("imbalance", f"{prediction.imbalance:.2f}", "busiest rank / mean; 1 = all alike", False),
    ]
    for device, spreads in used_memory(prediction).items():
        room, most = capacity(prediction, device), spreads["total"].most
        of_room = f"{share(most, room)} of {format_bytes(room)}, " if room else ""
        over = bool(room and most > room)
        detail = f"{of_room}rank {fullest(prediction, device).rank}{' — does not fit' if over else ''}"
        cards.append((f"fullest {DEVICES[device]}", format_bytes(most), detail, over))
    held = sum(t.hbm_bytes + t.ddr_bytes for t in prediction.tables)
    sets = len({t.embedding_set for t in prediction.tables})
    parameters = format_count(sum(t.rows * t.dim for t in prediction.tables))
    detail = f"{len(prediction.tables):,} tables, {sets} sets, {parameters} parameters"
    cards.append(("memory of all tables", format_bytes(held), detail, False))
    return html_page.cards(cards)


def _notes(prediction: PlanPrediction) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in prediction.notes)
    return f'<section class="notes"><h2>Notes</h2><ul>{notes}</ul></section>' if notes else ""


def _time(prediction: PlanPrediction) -> str:
    mean = sum(mean_ms(prediction, part) for part in PARTS)
    worst = busiest(prediction)
    shown = bars(prediction, lambda rank: rank.ms, PARTS)
    title = "Time per rank"
    chart = _chart(title, shown, PART_COLORS, lambda x: f"{format_ms(x)} ms", (f"mean {format_ms(mean)} ms", mean), 1.0)
    rows = [
        (
            swatch(i, part_name(part)),
            format_ms(mean_ms(prediction, part)),
            format_ms(most),
            share(most, worst.total_ms),
        )
        for i, part in enumerate(PARTS)
        for most in [worst.ms.get(part, 0.0)]
    ]
    rows.append(("all", format_ms(mean), format_ms(worst.total_ms), ""))
    about = "Of one training step, in milliseconds, in the order of the parts. All ranks wait for the busiest."
    header = ("part, ms", "mean", f"busiest: rank {worst.rank}", "share of busiest")
    return section(title, about, chart, grid(header, rows))


def _memory(prediction: PlanPrediction, device: str, spreads: Mapping[str, Spread]) -> str:
    room = capacity(prediction, device)
    shown = bars(prediction, lambda rank: getattr(rank, device), MEMORY)
    unit = KILO ** math.floor(math.log(max(bar.total for bar in shown) or 1, KILO))
    title = f"{DEVICES[device]} per rank"
    line = (f"capacity {format_bytes(room)}", room) if room else None
    chart = _chart(title, shown, MEMORY_COLORS, format_bytes, line, unit)
    rows = [
        (
            swatch(MEMORY_COLORS[kind], kind) if kind in MEMORY else kind,
            *(format_bytes(x) for x in (s.least, s.mean, s.most)),
            share(s.most, room),
        )
        for kind, s in spreads.items()
    ]
    about = {
        "hbm": "The device's own memory. 1 GiB = 2^30 bytes.",
        "ddr": "The host's memory: tables that stay there, and everything of ranks without a GPU. 1 GiB = 2^30 bytes.",
    }[device]
    return section(title, about, chart, grid(("use", "least", "mean", "most", "most / capacity"), rows))


def _sets(prediction: PlanPrediction) -> str:
    costs, whole = set_costs(prediction), whole_cost(prediction)
    fixed = fixed_cost(prediction)
    most = max(cost.total_ms for cost in costs) or 1.0
    columns = ("tables", "rows", "parameters", "memory", *SENT.values(), "all-to-all", "other", "ms", "share")
    rows = []
    for cost in (*costs, *([fixed] if fixed else []), whole):
        cells = cells_of(cost, whole.total_ms)
        rows.append([escape(cost.name), "" if cost is whole else _stack(cost.ms, most), *(cells[c] for c in columns)])
    header = [f"{c}, ms" if c in ("all-to-all", "other") else c for c in columns]
    about = (
        "Memory and what is sent in a step: of all ranks together. Time: mean over all ranks; the fixed costs of "
        "collectives and kernels, which all sets share, are a row of their own, so that the rows add up to the mean of "
        f"a rank. {exchange_line(prediction).capitalize()}."
    )
    table = grid(("set", "time by part", *header), rows, left=2)
    return section("Embedding sets", about, html_page.legend(PART_COLORS), table)


def _stack(ms: Mapping[str, float], most: float) -> str:
    pieces = (
        f'<i class="c{i}" style="width:{100 * ms.get(part, 0.0) / most:.2f}%" title="{part_name(part)} '
        f'{format_ms(ms[part])} ms"></i>'
        for i, part in enumerate(PARTS)
        if ms.get(part, 0.0) > 0
    )
    return f'<div class="stack">{"".join(pieces)}</div>'


def _choices(prediction: PlanPrediction) -> str:
    whole = total_ms(prediction.tables)
    rows = [
        (
            escape(sharding_type),
            escape(kernel),
            f"{len(tables):,}",
            format_count(sum(t.rows for t in tables)),
            format_bytes(sum(t.hbm_bytes + t.ddr_bytes for t in tables)),
            share(total_ms(tables), whole),
        )
        for sharding_type, kernel, tables in choices(prediction)
    ]
    return section("Chosen", "", grid(("sharding", "kernel", "tables", "rows", "memory", "share of time"), rows, 2))


def _facts(prediction: PlanPrediction) -> str:
    cluster = [(escape(name), escape(text)) for name, text in format_facts(prediction.topology)]
    facts = {"batch_size": prediction.batch_size, **prediction.planner, "seconds": prediction.seconds}
    planner = [(escape(name), escape(text)) for name, text in format_facts(facts)]
    pair = "".join(
        f"<div><h3>{name}</h3>{grid(('', ''), rows, left=2)}</div>"
        for name, rows in (("Cluster, per rank", cluster), ("Planner", planner))
    )
    return section("Where the figures come from", "Estimates, not measurements.", f'<div class="pair">{pair}</div>')
