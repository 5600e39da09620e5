"""A benchmark, or a calibration -> tables in a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hmoe_rec.benchmark.result import Agreement, BenchmarkReport, PlanFigures
from hmoe_rec.units import format_bytes, format_count, format_ms

# Part shown -> parts of a step that was taken apart, and of a prediction. The kernels' backward part steps the tables'
# optimizer too; exchanges are shown with what is done around them.
SHOWN = {
    "input": (("input",), ("input_all_to_all",)),
    "lookup": (("forward",), ("prefetch", "lookup_forward")),
    "vectors": (("output", "join"), ("output_all_to_all",)),
    "gradients": (("split", "gradient"), ("gradient_all_to_all",)),
    "backward": (("backward",), ("lookup_backward", "optimizer")),
}


def print_benchmark(report: BenchmarkReport, console: Console) -> None:
    """Steps, predictions beside them, and parts."""
    s, host = report.settings, report.host
    source = f"ids drawn by Zipf {s['zipf']:g}" if s.get("zipf") is not None else "batches of the data"
    console.print(
        Text(
            f"{report.config}: {report.world_size} x {host['device']}, {report.global_batch_size:,} examples a step, "
            f"{source}; {s['rounds']} rounds of {s['steps']} steps in turns",
            style="bold",
        )
    )
    console.print(Text(f"a step without tables: {format_ms(report.dense_ms)} ms", style="dim"))
    console.print(_steps(report))
    for plan in report.failed:
        console.print(Text(f"{plan.name}: not built: {plan.error}", style="red"))
    console.print(_predictions(report))
    console.print(_parts(report))


def shardings(plan: PlanFigures) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in plan.shardings.items())


def spread(plan: PlanFigures) -> str:
    low, high = plan.spread_ms
    return f"{format_ms(low)}-{format_ms(high)}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.0f} %"


def correlation(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def summary(agreement: Agreement) -> list[tuple[str, str]]:
    """The figures of a topology in words."""
    tables, steps = agreement.mean_table_error, agreement.mean_step_error
    return [
        ("mean |error| of tables", "-" if tables is None else f"{100 * tables:.0f} %"),
        ("mean |error| of steps", "-" if steps is None else f"{100 * steps:.0f} %"),
        ("rank correlation: Spearman", correlation(agreement.spearman)),
        ("rank correlation: Kendall", correlation(agreement.kendall)),
    ]


def measured_parts(ms: Mapping[str, float]) -> dict[str, float]:
    """Of a process, in the parts shown."""
    return {part: sum(ms[name] for name in names) for part, (names, _) in SHOWN.items()}


def predicted_parts(ms: Mapping[str, float]) -> dict[str, float]:
    """Of a process's prediction, in the parts shown."""
    return {part: sum(ms.get(name, 0.0) for name in names) for part, (_, names) in SHOWN.items()}


def busiest(ranks: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    return max(ranks, key=lambda ms: sum(ms.values()))


def _grid(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(Text(column), justify="right", no_wrap=True)
    return table


def _steps(report: BenchmarkReport) -> Table:
    right = ("median, ms", "95 %", "p90", "examples/s", "x fastest", "sent a rank", "exchange, ms", "peak a rank")
    table = _grid("Steps, the fastest plan first; each step is the slowest process's", ("plan", "tables"), right)
    for plan in report.built:
        table.add_row(
            *map(Text, (plan.name, shardings(plan))),
            format_ms(plan.median_ms),
            spread(plan),
            format_ms(plan.p90_ms),
            format_count(report.examples_per_second(plan)),
            f"{report.ratio(plan):.2f}",
            format_bytes(plan.sent_bytes),
            format_ms(plan.exchange_ms),
            format_bytes(plan.most_memory("peak")),
        )
    return table


def _predictions(report: BenchmarkReport) -> Table:
    names = report.topologies
    columns = [c for name in names for c in (f"{name}: tables", "error", "step", "error")]
    table = _grid("Predicted, ms; tables: step - step without tables", ("plan",), ("tables", "step", *columns))
    found = {name: report.agreement(name) for name in names}
    for plan in report.built:
        cells = []
        for name in names:
            predicted = plan.predictions[name].critical_ms
            cells += [format_ms(predicted), percent(found[name].table_error[plan.name])]
            cells += [format_ms(report.dense_ms + predicted), percent(found[name].step_error[plan.name])]
        table.add_row(Text(plan.name), format_ms(report.table_ms(plan)), format_ms(plan.median_ms), *cells)
    table.add_section()
    summaries = [summary(found[name]) for name in names]
    for i, (what, _) in enumerate(summaries[0]):
        cells = []
        for lines in summaries:
            of_steps = i == 1
            cells += ["", "", "", lines[i][1]] if of_steps else ["", lines[i][1], "", ""]
        table.add_row(what, "", "", *cells)
    return table


def _parts(report: BenchmarkReport) -> Table:
    last = report.topologies[-1]
    title = f"Parts of the busiest process, ms: measured / predicted ({last})"
    table = _grid(title, ("plan",), (*SHOWN, "sum", "wait", "rest"))
    for plan in report.built:
        measured = busiest([measured_parts(rank.ms) for rank in plan.ranks])
        predicted = busiest([predicted_parts(rank.ms) for rank in plan.predictions[last].ranks])
        wait, rest = (max(rank.ms[part] for rank in plan.ranks) for part in ("wait", "rest"))
        pairs = [(measured[part], predicted[part]) for part in SHOWN]
        pairs.append((sum(measured.values()), sum(predicted.values())))
        cells = [f"{format_ms(a)} / {format_ms(b)}" for a, b in pairs]
        table.add_row(Text(plan.name), *cells, format_ms(wait), format_ms(rest))
    return table
