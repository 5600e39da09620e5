"""A benchmark -> one HTML page that needs nothing but a browser: steps, predictions, parts per plan and per rank."""

from collections.abc import Mapping, Sequence
from html import escape

from hmoe_rec.benchmark.report import (
    busiest,
    measured_parts,
    percent,
    predicted_parts,
    shardings,
    spread,
    summary,
)
from hmoe_rec.benchmark.result import BenchmarkReport, PlanFigures
from hmoe_rec.benchmark.statistics import median
from hmoe_rec.sharding.figures import format_facts
from hmoe_rec.sharding.html_page import Stack, cards, chart, grid, page, section
from hmoe_rec.units import format_bytes, format_count, format_ms

NAMES = {
    "input": "input all-to-all",
    "lookup": "lookup forward",
    "vectors": "output all-to-all",
    "gradients": "gradient all-to-all",
    "backward": "lookup backward, optimizer",
}
# Numbers of the page's colors: those that the report of a plan gives the same parts.
COLORS = dict(zip(NAMES.values(), (0, 2, 3, 4, 5), strict=True))
STEP_COLORS = {"without tables": 1, "tables": 0}
KINDS = {"input": "ids", "output": "vectors", "gradient": "gradients"}


def benchmark_html(report: BenchmarkReport) -> str:
    """The page, to be written to a file."""
    title = f"Sharding plans of {report.config or 'a run'}, measured"
    host = report.host
    subtitle = (
        f"{report.world_size} x {host['device']} ({host['processor']}), {report.global_batch_size:,} examples a step, "
        f"{report.settings['rounds']} rounds of {report.settings['steps']} steps in turns"
    )
    sections = [_cards(report), _failed(report), _steps(report), _predictions(report), _parts(report)]
    sections += [_ranks(report), _exchanges(report), _memory(report), _facts(report)]
    return page(title, subtitle, sections)


def _cards(report: BenchmarkReport) -> str:
    best, worst = report.built[0], report.built[-1]
    boxes = [
        ("fastest plan", best.name, f"{format_ms(best.median_ms)} ms a step", False),
        ("slowest plan", worst.name, f"{report.ratio(worst):.2f} x the fastest", False),
        ("a step without tables", f"{format_ms(report.dense_ms)} ms", "the same under every plan", False),
    ]
    for name in report.topologies:
        lines = dict(summary(report.agreement(name)))
        error, order = lines["mean |error| of tables"], lines["rank correlation: Spearman"]
        boxes.append((f"predicted by {name}", f"order {order}", f"tables' time is {error} off", False))
    return cards(boxes)


def _failed(report: BenchmarkReport) -> str:
    lines = "".join(f"<li>{escape(plan.name)}: {escape(plan.error or '')}</li>" for plan in report.failed)
    return f'<section class="notes"><h2>Not built</h2><ul>{lines}</ul></section>' if lines else ""


def _steps(report: BenchmarkReport) -> str:
    dense = report.dense_ms
    stacks = [
        Stack(
            label=str(number),
            hint=f"{plan.name}: {format_ms(plan.median_ms)} ms, 95 % {spread(plan)}; p90 {format_ms(plan.p90_ms)}",
            parts=(min(dense, plan.median_ms), max(0.0, report.table_ms(plan))),
            notch=plan.p90_ms,
        )
        for number, plan in enumerate(report.built, start=1)
    ]
    header = ("", "plan", "tables", "median, ms", "95 %", "p90", "examples/s", "x fastest", "medians of the rounds")
    rows = [
        (
            str(number),
            escape(plan.name),
            escape(shardings(plan)),
            format_ms(plan.median_ms),
            spread(plan),
            format_ms(plan.p90_ms),
            format_count(report.examples_per_second(plan)),
            f"{report.ratio(plan):.2f}",
            ", ".join(format_ms(median(steps)) for steps in plan.rounds),
        )
        for number, plan in enumerate(report.built, start=1)
    ]
    about = (
        "Median of all steps, each that of its slowest process; the notch is the 90th percentile. Plans take turns, so "
        "that a machine that slows down slows all; x fastest compares round by round."
    )
    return section("Steps", about, _chart("Steps", stacks, STEP_COLORS, "plan", ""), grid(header, rows, left=3))


def _predictions(report: BenchmarkReport) -> str:
    found = {name: report.agreement(name) for name in report.topologies}
    header = ["plan", "tables, ms", "step, ms"]
    for name in report.topologies:
        header += [f"{escape(name)}: tables", "error", "step", "error"]
    rows = []
    for plan in report.built:
        row = [escape(plan.name), format_ms(report.table_ms(plan)), format_ms(plan.median_ms)]
        for name in report.topologies:
            predicted = plan.predictions[name].critical_ms
            row += [format_ms(predicted), percent(found[name].table_error[plan.name])]
            row += [format_ms(report.dense_ms + predicted), percent(found[name].step_error[plan.name])]
        rows.append(row)
    lines = [(escape(name), *(value for _, value in summary(agreement))) for name, agreement in found.items()]
    words = [what for what, _ in summary(next(iter(found.values())))]
    about = (
        "A planner predicts the time of the tables on the busiest process, not the dense part. Measured time of the "
        "tables: median step minus a step without tables. Correlations: predicted against measured order of the plans."
    )
    return section("Predictions", about, grid(header, rows), grid(("topology", *map(escape, words)), lines))


def _parts(report: BenchmarkReport) -> str:
    """For each plan what was measured, and what each topology predicted, of the busiest process."""
    stacks, rows = [], []
    for number, plan in enumerate(report.built, start=1):
        for i, (name, ms) in enumerate(_of_busiest(report, plan)):
            stacks.append(_stack("" if i else str(number), name, ms))
            rows.append(_row(f"{number} {name}", ms))
    about = (
        f"Of the busiest process; of each plan first what was measured, then what {', '.join(report.topologies)} "
        "predicted. Measured: steps taken apart, with a barrier before every exchange, so that nothing "
        "overlaps and waiting for others is left out. Exchanges: with what is done around them."
    )
    return section("Parts", about, _chart("Parts", stacks, COLORS, "plan", _figures("plan", rows)))


def _of_busiest(report: BenchmarkReport, plan: PlanFigures) -> list[tuple[str, Mapping[str, float]]]:
    found = [(f"{plan.name}: measured", busiest([measured_parts(rank.ms) for rank in plan.ranks]))]
    for name in report.topologies:
        ranks = [predicted_parts(rank.ms) for rank in plan.predictions[name].ranks]
        found.append((f"{plan.name}: {name}", busiest(ranks)))
    return found


def _ranks(report: BenchmarkReport) -> str:
    """Measured and predicted of every process, plan by plan, by the last topology."""
    last, body = report.topologies[-1], []
    for plan in report.built:
        stacks, rows = [], []
        for i, (rank, predicted) in enumerate(zip(plan.ranks, plan.predictions[last].ranks, strict=True)):
            pair = (
                (f"rank {i}: measured", measured_parts(rank.ms)),
                (f"rank {i}: {last}", predicted_parts(predicted.ms)),
            )
            for j, (name, ms) in enumerate(pair):
                stacks.append(_stack("" if j else str(i), name, ms))
                rows.append(_row(name, ms))
        shown = _chart(plan.name, stacks, COLORS, "process", _figures("process", rows))
        body.append(f"<details><summary>{escape(plan.name)}</summary>{shown}</details>")
    return section("Parts per process", f"Beside what {last} predicted; press a plan.", *body)


def _exchanges(report: BenchmarkReport) -> str:
    rows = []
    for plan in report.built:
        most = max(plan.ranks, key=lambda rank: sum(rank.sent.values()))
        times = [format_ms(max(rank.ms[part] for rank in plan.ranks)) for part in KINDS]
        rows.append((escape(plan.name), *(format_bytes(most.sent[kind]) for kind in KINDS), *times))
    header = ("plan", *(f"{name} sent" for name in KINDS.values()), *(f"{name}, ms" for name in KINDS.values()))
    about = "Bytes that a process sends to others in a step (the one that sends most), and its time in exchanges."
    return section("Exchanges", about, grid(header, rows))


def _memory(report: BenchmarkReport) -> str:
    kinds = ("tables", "optimizer", "peak")
    rows = [(escape(p.name), *(format_bytes(p.most_memory(kind)) for kind in kinds)) for p in report.built]
    about = (
        "Of the fullest process. Peak: on a GPU the most allocated in timed steps; on a CPU the growth of the resident "
        "set while the plan was built and first run, which memory left by an earlier plan makes too small."
    )
    return section("Memory", about, grid(("plan", *kinds), rows))


def _facts(report: BenchmarkReport) -> str:
    plain = {key: value for key, value in report.settings.items() if not isinstance(value, Mapping)}
    pairs = [("Machine", format_facts(report.host)), ("Settings", format_facts(plain))]
    shown = (
        f"<div><h3>{title}</h3>{grid(('', ''), [(escape(a), escape(b)) for a, b in facts], left=2)}</div>"
        for title, facts in pairs
    )
    return section("How it was measured", "", f'<div class="pair">{"".join(shown)}</div>')


def _chart(title: str, stacks: Sequence[Stack], colors: Mapping[str, int], axis: str, figures: str) -> str:
    return chart(title, stacks, colors, lambda x: f"{format_ms(x)} ms", axis=axis, figures=figures)


def _stack(label: str, name: str, ms: Mapping[str, float]) -> Stack:
    parts = tuple(ms[part] for part in NAMES)
    what = ", ".join(f"{part} {format_ms(x)}" for part, x in zip(NAMES.values(), parts, strict=True))
    return Stack(label=label, hint=f"{name}: {format_ms(sum(parts))} ms ({what})", parts=parts)


def _row(label: str, ms: Mapping[str, float]) -> tuple[str, ...]:
    return (escape(label), *(format_ms(ms[part]) for part in NAMES), format_ms(sum(ms[part] for part in NAMES)))


def _figures(axis: str, rows: Sequence[Sequence[str]]) -> str:
    return grid((axis, *NAMES.values(), "sum"), rows)
