"""Predictions and labels -> how far they can be trusted: reliability diagrams, and every figure slice by slice.

    slices = ScoreSlices(num_slices=5, num_tasks=2)
    for batch in ...:
        slices.update(slice_B, logits_BT, labels_BT, weights_B)
    slices.bins(0, task=1, count=20)                    # what a reliability diagram shows
    slices.figures(3, task=1)                           # examples, rates, calibration, log loss, AUC of a slice

Letters of this file: G slices, K fine bins of the logit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from hmoe_rec.analysis.opening import OpenRun
from hmoe_rec.analysis.report import Plot, ReportTable, Section, new_figure
from hmoe_rec.analysis.row_counts import IdCounts, first_ids, id_counts
from hmoe_rec.metrics.auc import score_bins
from hmoe_rec.suggest import unknown
from hmoe_rec.training.learned import training_data
from hmoe_rec.types import ConfigError

FINE_BINS = 4096
SCORE_BINS = 20
COUNTS = (1, 2, 5, 10, 20, 50, 100, 1000, 10_000)  # first of every slice of a count but the first
FREQUENCY = "frequency_of_"
Z95 = 1.959964
POSITIVES, EXAMPLES, PREDICTED, NATS, SQUARED_WEIGHTS = range(5)


@dataclass(frozen=True)
class Figures:
    """Of one slice and task; weighted where the examples are.

    Attributes:
        examples: how many have the label, unweighted.
        label_mean, prediction_mean: observed and predicted rate.
        calibration: prediction_mean / label_mean; 1 is right, above 1 promises too much. NaN without a positive.
        error: half the width of the 95 % interval of label_mean (normal approximation, effective sample size).
        logloss: nats per example.
        auc: from `FINE_BINS` bins of the logit, ties within a bin counted half; NaN without both classes or with a NaN
            among the logits.
    """

    examples: float
    label_mean: float
    prediction_mean: float
    calibration: float
    error: float
    logloss: float
    auc: float


class ScoreSlices:
    """Sums per slice, task and fine bin of the logit; memory does not grow with the data, processes add up.

    Args:
        num_slices: G.
        num_tasks: T.
    """

    def __init__(self, num_slices: int, num_tasks: int) -> None:
        self.num_slices, self.num_tasks = num_slices, num_tasks
        self.sums_TGK5 = torch.zeros(num_tasks, num_slices, FINE_BINS, 5, dtype=torch.float64)
        self.counts_TG = torch.zeros(num_tasks, num_slices, dtype=torch.float64)

    def update(self, slice_B: Tensor, logits_BT: Tensor, labels_BT: Tensor, weights_B: Tensor) -> None:
        """slice_B: int64 in [0, G); examples of slice -1, of weight 0 or without a label do not count."""
        slice_B, weights_B = slice_B.cpu(), weights_B.double().cpu()
        for t in range(self.num_tasks):
            logits, labels = logits_BT[:, t].float().cpu(), labels_BT[:, t].double().cpu()
            known = ~labels.isnan() & (weights_B > 0) & (slice_B >= 0)
            logits, y, w, group = logits[known], labels[known], weights_B[known], slice_B[known]
            place = group * FINE_BINS + score_bins(logits, FINE_BINS)
            nats = binary_cross_entropy_with_logits(logits.double(), y, reduction="none")
            values_B5 = torch.stack([w * y, w, w * logits.double().sigmoid(), w * nats, w * w], 1)
            self.sums_TGK5[t].view(-1, 5).index_add_(0, place, values_B5)
            self.counts_TG[t].index_add_(0, group, torch.ones_like(w))

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Adds up the sums of all processes; a collective call."""
        self.sums_TGK5, self.counts_TG = total(self.sums_TGK5), total(self.counts_TG)

    def figures(self, group: int | None, task: int) -> Figures:
        """group: None = all slices together."""
        chosen = slice(None) if group is None else slice(group, group + 1)
        sums_K5 = self.sums_TGK5[task, chosen].sum(0)
        positives, weight, predicted, nats, squared = sums_K5.sum(0).tolist()
        examples = float(self.counts_TG[task, chosen].sum())
        if not weight:
            return Figures(examples, *(float("nan"),) * 6)
        rate = positives / weight
        return Figures(
            examples,
            rate,
            predicted / weight,
            predicted / positives if positives else float("nan"),
            _half_width(rate, weight**2 / squared),
            nats / weight,
            math.nan if math.isnan(nats) else _auc(sums_K5[:, POSITIVES], sums_K5[:, EXAMPLES] - sums_K5[:, POSITIVES]),
        )

    def bins(self, group: int | None, task: int, count: int = 20) -> list[Figures]:
        """`count` bins of about equal weight, from the lowest to the highest prediction; fewer where scores repeat."""
        chosen = slice(None) if group is None else slice(group, group + 1)
        sums_K5 = self.sums_TGK5[task, chosen].sum(0)
        weight_K = sums_K5[:, EXAMPLES]
        total = float(weight_K.sum())
        if not total:
            return []
        middle_K = (weight_K.cumsum(0) - weight_K / 2) / total
        bin_K = (middle_K * count).long().clamp(max=count - 1)
        merged = torch.zeros(count, 5, dtype=torch.float64).index_add_(0, bin_K, sums_K5)
        result = []
        for positives, weight, predicted, nats, squared in merged.tolist():
            if weight:
                rate = positives / weight
                ratio = predicted / positives if positives else float("nan")
                half = _half_width(rate, weight**2 / squared)
                result.append(Figures(weight, rate, predicted / weight, ratio, half, nats / weight, float("nan")))
        return result

    def expected_calibration_error(self, group: int | None, task: int, count: int = 20) -> float:
        """Mean over equally heavy bins of |predicted rate - observed rate|; it has a floor of sampling noise."""
        bins = self.bins(group, task, count)
        weight = sum(b.examples for b in bins)
        return sum(b.examples * abs(b.prediction_mean - b.label_mean) for b in bins) / weight if bins else float("nan")


def _half_width(rate: float, effective: float) -> float:
    return Z95 * math.sqrt(max(rate * (1 - rate), 0.0) / effective)


def _auc(positives_K: Tensor, negatives_K: Tensor) -> float:
    below_K = negatives_K.cumsum(0) - negatives_K / 2
    pairs = float(positives_K.sum() * negatives_K.sum())
    return float((positives_K * below_K).sum()) / pairs if pairs else float("nan")


# ------------------------------------------------------------------------------------------------------------- slices


@dataclass(frozen=True)
class Slicing:
    """How examples fall into slices by a column: by value where there are few, by quantiles where there are many.

    Attributes:
        column: of the data.
        names: of the slices, in order; the last one holds missing values (and rare ones, of a column by value).
        edges: upper ends of all numeric slices but the last; None = by value.
        values: value -> slice, where slices are values.
        title: what people read; the column where it is not given.
    """

    column: str
    names: tuple[str, ...]
    edges: np.ndarray | None = None
    values: dict[Any, int] | None = None
    title: str = ""

    @property
    def shown(self) -> str:
        return self.title or self.column

    def of(self, column: Sequence[Any]) -> Tensor:
        """[rows] int64, the slice of each value (None = missing)."""
        last = len(self.names) - 1
        if self.values is not None:
            return torch.tensor([self.values.get(v, last) for v in column], dtype=torch.int64)
        assert self.edges is not None
        x = np.array([np.nan if v is None else float(v) for v in column], dtype=np.float64)
        found = np.searchsorted(self.edges, x, side="right")
        return torch.from_numpy(np.where(np.isnan(x), last, found).astype(np.int64))


def slicing_of(column: str, sample: Sequence[Any], count: int = 8) -> Slicing:
    """Slices that suit a sample of a column: at most `count` and one for what is missing or rare.

    Up to twice as many values are slices by themselves, the most frequent ones; more of them are cut at quantiles.

    Raises:
        ConfigError: the column holds lists, or no value at all.
    """
    known = [v for v in sample if v is not None and v == v]
    if not known:
        raise ConfigError(f"--by {column}: the first rows have no value in it; choose another column")
    if isinstance(known[0], list | dict):
        raise ConfigError(f"--by {column}: holds lists; choose a column with one value per row")
    distinct, counts = np.unique(
        np.array(known, dtype=object if isinstance(known[0], str) else None), return_counts=True
    )
    if len(distinct) <= 2 * count or isinstance(known[0], str | bytes | bool):
        chosen = sorted(distinct[np.argsort(-counts, kind="stable")][:count].tolist())
        names = (*(str(v) for v in chosen), "other or missing")
        return Slicing(column, names, values={v: i for i, v in enumerate(chosen)})
    try:
        values = np.array(known, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"--by {column}: {type(known[0]).__name__} can be neither counted nor ordered") from None
    edges = np.unique(np.quantile(values, np.linspace(0, 1, count + 1)[1:-1]))
    ends = _in_digits(edges, values.min(), values.max())
    between = [f"[{a}, {b})" for a, b in pairwise(ends)]
    return Slicing(column, (f"below {ends[0]}", *between, f"{ends[-1]} and more", "missing"), edges=edges)


def _in_digits(edges: np.ndarray, low: float, high: float) -> list[str]:
    """Edges of values from low to high, with six digits, or as many as tell them apart: a day may be 20220408."""
    gap = np.diff(np.unique([low, *edges, high])).min()
    digits = next((d for d in range(6, 17) if all(abs(float(f"{e:.{d}g}") - e) <= gap / 100 for e in edges)), 17)
    return [f"{e:.{digits}g}" for e in edges]


def slicing_of_counts(column: str, title: str = "") -> Slicing:
    """0, 1, 2 to 4, 5 to 9, ...: the same for every log, finest where a model has seen least."""
    ends = [*COUNTS, math.inf]
    names = ["0"]
    for a, b in zip(ends[:-1], ends[1:], strict=True):
        names.append(f"{a:,}" if b == a + 1 else f"{a:,} to {b - 1:,}" if b < math.inf else f"{a:,} and more")
    return Slicing(column, (*names, "missing"), edges=np.array(COUNTS, dtype=np.float64), title=title)


# ----------------------------------------------------------------------------------------------------------- the report


def analyze_calibration(
    run: OpenRun,
    uris: Sequence[str],
    *,
    by: Sequence[str] = (),
    counts: Sequence[str] = (),
    frequency: Sequence[str] = (),
    rows: int | None = None,
    max_slices: int = 8,
) -> Section:
    """Reliability of every task, and all figures sliced by columns of the data.

    Args:
        by: columns of the files (of the schema or not): a tenant, a day ...
        counts: columns that count something, such as the earlier exposures that `hmoe-rec data exposures` wrote.
        frequency: id fields, by how many rows of the run's training data have the row's id: 0 is a cold start.
        rows: read about so many; None = all.
        max_slices: of a column.

    Raises:
        ConfigError, DataError, SchemaError: the data does not fit, an unknown field, or a column that cannot be sliced.
    """
    tasks, sliced, columns = run.config.tasks, {}, tuple(dict.fromkeys((*by, *counts)))
    everything = ScoreSlices(1, len(tasks))
    seen = _seen_in_training(run, frequency)
    slicings = {c: slicing_of_counts(c) for c in counts}
    slicings |= {FREQUENCY + f: slicing_of_counts(FREQUENCY + f, f"rows of its {f} in training") for f in frequency}
    for batch, carried in _scored(run, uris, columns, rows):
        with torch.no_grad():
            _, output = run.task(batch)
        known = (output.logits_BT, output.labels_BT, output.weights_B)
        everything.update(torch.zeros(len(batch), dtype=torch.int64), *known)
        values = {c: carried.column(c).to_pylist() for c in columns}
        for f in frequency:
            ids, there = first_ids(batch.sparse[f], len(batch))
            values[FREQUENCY + f] = np.where(there, seen[f].of(ids), np.nan).tolist()
        for name, of in values.items():
            if name not in slicings:
                slicings[name] = agreed_slicing(run, name, of, max_slices)
            if name not in sliced:
                sliced[name] = ScoreSlices(len(slicings[name].names), len(tasks))
            sliced[name].update(slices_of(slicings[name], of, len(batch)), *known)
    for found in (everything, *sliced.values()):
        found.merge(run.total)
    return _section(run, uris, everything, sliced, slicings)


def _seen_in_training(run: OpenRun, fields: Sequence[str]) -> dict[str, IdCounts]:
    ids = {f.name: f for f in run.config.features.ids}
    for f in fields:
        if f not in ids:
            raise ConfigError(f"--frequency {f}: {unknown('id field', f, ids)}")
        if ids[f].multi_valued:
            raise ConfigError(f"--frequency {f}: has several ids per row; choose a field with one")
    if not fields:
        return {}
    uris = training_data(run.config, run.run_dir, run.checkpoint.step)
    return id_counts(run.config, run.process, uris, fields)


def slices_of(slicing: Slicing, values: Sequence[Any], size: int) -> Tensor:
    """Slice of each of `size` examples, of which the last ones, that only fill a share, have no value.

    Raises:
        ConfigError: a column of counts with something else.
    """
    try:
        return slicing.of([*values, *[None] * (size - len(values))])
    except (TypeError, ValueError):
        found = next(v for v in values if v is not None and not isinstance(v, int | float))
        raise ConfigError(f"--counts {slicing.column}: {found!r} is no number; expected a column of counts") from None


def _scored(run: OpenRun, uris: Sequence[str], by: Sequence[str], rows: int | None) -> Iterator[tuple[Any, Any]]:
    for item in run.batches(uris, rows=rows, carry=tuple(by)):
        yield item if by else (item, None)


def agreed_slicing(run: OpenRun, column: str, values: Sequence[Any], count: int) -> Slicing:
    """The slices that the first batch of all processes suggests; the same whatever their number."""
    return slicing_of(column, [value for share in run.process.gather(values) for value in share], count)


def _section(
    run: OpenRun,
    uris: Sequence[str],
    everything: ScoreSlices,
    sliced: dict[str, ScoreSlices],
    slicings: dict[str, Slicing],
) -> Section:
    tasks = run.config.tasks
    overall = {task: everything.figures(None, t) for t, task in enumerate(tasks)}
    errors = {task: everything.expected_calibration_error(None, t) for t, task in enumerate(tasks)}
    summary = [
        f"{task}: predicted {f.prediction_mean:.4f}, observed {f.label_mean:.4f} ± {f.error:.4f}: {_verdict(f)}; "
        f"expected calibration error {errors[task]:.4f}."
        for task, f in overall.items()
    ]
    tables = [_table("All rows", [(task, f) for task, f in overall.items()], "task")]
    plots = [Plot("reliability", "Observed against predicted rate in bins of equal weight; bars: 95 % intervals. "
                  "Below the diagonal the model promises too much.", _reliability(everything, tasks))]  # fmt: skip
    for t, task in enumerate(tasks):
        tables.append(_scores_table(task, everything.bins(None, t, SCORE_BINS)))
    numbers: dict[str, Any] = {
        "tasks": {
            task: {
                **vars(overall[task]),
                "expected_calibration_error": errors[task],
                "bins": [vars(b) for b in everything.bins(None, t, SCORE_BINS)],
            }
            for t, task in enumerate(tasks)
        },
        "slices": {},
    }
    for column, found in sliced.items():
        names, shown = slicings[column].names, slicings[column].shown
        for t, task in enumerate(tasks):
            rows = [(name, found.figures(g, t)) for g, name in enumerate(names)]
            rows = [(name, f) for name, f in rows if f.examples]
            numbers["slices"].setdefault(column, {})[task] = {name: vars(f) for name, f in rows}
            tables.append(_table(f"{task} by {shown}", rows, shown))
            worst = [(name, f) for name, f in rows if abs(f.prediction_mean - f.label_mean) > f.error and _is_sure(f)]
            if worst:
                name, f = max(worst, key=lambda x: abs(math.log(x[1].calibration or math.inf)))
                summary.append(
                    f"{task} by {shown}: worst in {name!r}, predicted {f.prediction_mean:.4f} where "
                    f"{f.label_mean:.4f} ± {f.error:.4f} is observed ({f.examples:,.0f} examples)."
                )
        plots.append(
            Plot(
                f"by_{column}",
                f"Predicted over observed rate by {shown}; 1 is right. Bars: 95 % intervals of the observed rate.",
                _by_slice(found, names, tasks, shown),
            )
        )
    return Section("calibration", "Calibration", summary, tables, plots, numbers, run.source(uris))


def _is_sure(f: Figures) -> bool:
    """Enough of both classes for the normal approximation of the interval."""
    return min(f.label_mean, 1 - f.label_mean) * f.examples >= 5


def _verdict(f: Figures) -> str:
    if not f.examples:
        return "no label"
    if not f.label_mean:
        return "no positive"
    if abs(f.prediction_mean - f.label_mean) <= f.error:
        return "calibrated within the error"
    return f"{abs(f.calibration - 1):.1%} too {'high' if f.calibration > 1 else 'low'}"


def _table(caption: str, rows: Sequence[tuple[str, Figures]], first: str) -> ReportTable:
    header = [first, "examples", "observed", "± 95 %", "predicted", "predicted / observed", "log loss", "AUC"]
    cells = [
        [
            name,
            f"{f.examples:,.0f}",
            *(f"{x:.4f}" for x in (f.label_mean, f.error, f.prediction_mean)),
            f"{f.calibration:.3f}",
            *(f"{x:.4f}" for x in (f.logloss, f.auc)),
        ]
        for name, f in rows
    ]
    return ReportTable(caption, header, cells)


def _scores_table(task: str, bins: Sequence[Figures]) -> ReportTable:
    header = ["predicted", "observed", "± 95 %", "predicted / observed", "weight"]
    rows = [
        [
            f"{b.prediction_mean:.4f}",
            f"{b.label_mean:.4f}",
            f"{b.error:.4f}",
            f"{b.calibration:.3f}",
            f"{b.examples:,.0f}",
        ]
        for b in bins
    ]
    return ReportTable(f"{task} by predicted rate", header, rows)


def _reliability(everything: ScoreSlices, tasks: Sequence[str]) -> Any:
    figure, axes = new_figure(4.2 * min(3, len(tasks)), 4.2 * -(-len(tasks) // 3), -(-len(tasks) // 3),
                              min(3, len(tasks)), squeeze=False)  # fmt: skip
    for t, axis in enumerate(axes.flat):
        if t >= len(tasks):
            axis.set_visible(False)
            continue
        bins = everything.bins(None, t)
        x, y = [b.prediction_mean for b in bins], [b.label_mean for b in bins]
        top = 1.05 * max([*x, *y, 1e-6])
        axis.plot([0, top], [0, top], color="#999", linewidth=1)
        axis.errorbar(x, y, yerr=[b.error for b in bins], fmt="o", markersize=4, color="#1a41e5", elinewidth=1)
        axis.set(title=tasks[t], xlabel="predicted rate", ylabel="observed rate", xlim=(0, top), ylim=(0, top))
    return figure


def _by_slice(found: ScoreSlices, names: Sequence[str], tasks: Sequence[str], column: str) -> Any:
    all_tasks = range(len(tasks))
    there = [g for g in range(len(names)) if any(found.figures(g, t).examples for t in all_tasks)]
    figure, axis = new_figure(max(6.0, 1.0 * len(there)), 4.2)
    colors = ("#1a41e5", "#d0803c", "#6f6103", "#58389e", "#8b305a", "#989396")
    for t, task in enumerate(tasks):
        rows = [(x, found.figures(g, t)) for x, g in enumerate(there)]
        rows = [(x, f) for x, f in rows if f.examples and f.label_mean]
        x = [place + 0.12 * (t - (len(tasks) - 1) / 2) for place, _ in rows]
        ratio = [f.calibration for _, f in rows]
        errors = [f.calibration * f.error / f.label_mean for _, f in rows]
        axis.errorbar(x, ratio, yerr=errors, fmt="o", markersize=4, elinewidth=1, label=task, color=colors[t % 6])
    axis.axhline(1, color="#999", linewidth=1)
    axis.set_xticks(range(len(there)), [names[g] for g in there], rotation=30, ha="right")
    axis.set(xlabel=column, ylabel="predicted / observed", xlim=(-0.5, len(there) - 0.5))
    axis.set_ylim(bottom=max(0.0, axis.get_ylim()[0]))
    axis.legend()
    return figure
