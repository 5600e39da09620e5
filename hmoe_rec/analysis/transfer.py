"""Several runs on the same rows -> where learning tasks together helps and where it hurts.

Rows fall into subsets by how the feedback of two tasks compares for their item (or user) in the *training* data:
mostly A, comparable, mostly B. A shared table suffers where both tasks speak about as loudly (STEM's observation).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hmoe_rec.analysis.opening import OpenRun, data_of, join_names, load
from hmoe_rec.analysis.report import Plot, ReportTable, Section, new_figure
from hmoe_rec.analysis.row_counts import first_ids
from hmoe_rec.config import RunConfig
from hmoe_rec.progress import progress_bar
from hmoe_rec.sharding.process import Process
from hmoe_rec.suggest import unknown
from hmoe_rec.training.evaluate import evaluation_reader, read_run_config
from hmoe_rec.training.learned import training_data
from hmoe_rec.types import ConfigError

COLORS = ("#1a41e5", "#d0803c", "#6f6103", "#58389e", "#8b305a", "#989396")
FACTOR = 2.0  # feedback is comparable where neither task has twice the other's, relative to the tasks' overall rates


@dataclass(frozen=True)
class PairedAuc:
    """AUC of two scores on the same rows.

    Attributes:
        auc: of the first and the second score.
        difference: second - first.
        error: standard error of the difference (DeLong); it knows the noise of these rows, not of the training's seed.
    """

    auc: tuple[float, float]
    difference: float
    error: float


def delong(first: np.ndarray, second: np.ndarray, positive: np.ndarray) -> PairedAuc:
    """Compares two scores [rows] of the same rows; NaN where there are fewer than two of a class, and for a
    score with a NaN in it.

    Source: DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
    characteristic curves", Biometrics 1988, in the form with midranks (Sun and Xu, 2014).
    """
    m, n = int(positive.sum()), int((~positive).sum())
    if m < 2 or n < 2:
        return PairedAuc((math.nan, math.nan), math.nan, math.nan)
    of_positives, of_negatives, aucs = [], [], []
    for score in (first, second):
        together, among_positives = _midranks(score), _midranks(score[positive])
        among_negatives = _midranks(score[~positive])
        of_positives.append((together[positive] - among_positives) / n)
        of_negatives.append(1 - (together[~positive] - among_negatives) / m)
        aucs.append(math.nan if np.isnan(score).any() else float(of_positives[-1].mean()))
    difference = aucs[1] - aucs[0]
    if math.isnan(difference):
        return PairedAuc((aucs[0], aucs[1]), math.nan, math.nan)
    variance = np.var(of_positives[1] - of_positives[0], ddof=1) / m
    variance += np.var(of_negatives[1] - of_negatives[0], ddof=1) / n
    return PairedAuc((aucs[0], aucs[1]), difference, math.sqrt(variance))


def _midranks(scores: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal scores share the mean of theirs."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


@dataclass(frozen=True)
class Feedback:
    """Positives of tasks A and B per id in the training data.

    Attributes:
        ids: ascending.
        positives: [ids, 2].
        rates: overall rates of A and B among rows that have the label.
    """

    ids: np.ndarray
    positives: np.ndarray
    rates: tuple[float, float]

    def subset(self, ids: np.ndarray) -> np.ndarray:
        """0 = mostly A, 1 = comparable, 2 = mostly B, 3 = no positive of either in the training data."""
        if not len(self.ids):
            return np.full(len(ids), 3)
        place = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        there = self.ids[place] == ids
        a, b = (np.where(there, self.positives[place, k], 0) / max(self.rates[k], 1e-12) for k in (0, 1))
        result = np.where(a > FACTOR * b, 0, np.where(b > FACTOR * a, 2, 1))
        return np.where(a + b > 0, result, 3)


def count_feedback(
    config: RunConfig, process: Process, uris: Sequence[str], field: str, tasks: tuple[int, int]
) -> Feedback:
    """One pass over the training data; memory grows with the ids that have feedback."""
    reader = evaluation_reader(uris, config.schema_of_data, config, process)
    ids: list[np.ndarray] = []
    positives: list[np.ndarray] = []
    totals = np.zeros((2, 2))
    with progress_bar("feedback in the training data") as bar:
        for done, batch in enumerate(reader.epoch(0), 1):
            if len(batch):
                key, there = first_ids(batch.sparse[field], len(batch))
                labels = batch.labels[:, list(tasks)].numpy()
                totals += np.stack([np.nansum(labels, 0), (~np.isnan(labels)).sum(0)])
                labels = np.nan_to_num(labels)
                some = there & (labels.sum(1) > 0)
                ids.append(key[some])
                positives.append(labels[some])
            if process.rank == 0:
                bar(min(done * config.train.global_batch_size, reader.num_rows), reader.num_rows)
    ids, positives = [np.zeros(0, np.int64), *ids], [np.zeros((0, 2)), *positives]
    mine = (np.concatenate(ids), np.concatenate(positives), totals)
    shares = process.gather(mine)
    found, place = np.unique(np.concatenate([s[0] for s in shares]), return_inverse=True)
    both = np.concatenate([s[1] for s in shares])
    counts = np.stack([np.bincount(place, weights=both[:, k], minlength=len(found)) for k in (0, 1)], 1)
    sums = np.sum([s[2] for s in shares], axis=0)
    rate_a, rate_b = sums[0] / np.maximum(sums[1], 1)
    return Feedback(found, counts, (float(rate_a), float(rate_b)))


@dataclass(frozen=True)
class Scored:
    """What one run says of the rows: scores and labels [rows, T], ids of the field [rows] and whether there is one."""

    name: str
    tasks: tuple[str, ...]
    scores: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    has_id: np.ndarray


def score_rows(run: OpenRun, name: str, uris: Sequence[str], field: str, *, rows: int | None = None) -> Scored:
    """Predictions of a run, of all processes, on each, in the order of processes."""
    scores, labels, ids, has_id = [], [], [], []
    for batch in run.batches(uris, rows=rows):
        with torch.no_grad():
            _, output = run.task(batch)
        real = (batch.weights > 0).cpu().numpy()
        scores.append(output.logits_BT.float().cpu().numpy()[real])
        labels.append(batch.labels.cpu().numpy()[real])
        for found, values in zip((ids, has_id), first_ids(batch.sparse[field], len(batch)), strict=True):
            found.append(values[real])
    parts = [run.gather(np.concatenate(x)) for x in (scores, labels, ids, has_id)]
    return Scored(name, tuple(run.config.tasks), *parts)


# ----------------------------------------------------------------------------------------------------------- the report


def analyze_transfer(
    runs: Sequence[str],
    process: Process,
    *,
    tasks: tuple[str, str] | None = None,
    field: str | None = None,
    data: str | None = None,
    rows: int | None = None,
    checkpoint: str = "best",
) -> Section:
    """Runs on the same rows, which fall into subsets by the training data of the first run.

    Args:
        tasks, field: see `resolve_names`.

    Raises:
        ConfigError: one task only, unknown names, no data, or runs that read different rows.
    """
    config = read_run_config(runs[0])
    pair, chosen = resolve_names(config, tasks, field)
    for other in runs[1:]:
        if chosen not in (ids := [f.name for f in read_run_config(other).features.ids]):
            raise ConfigError(f"transfer: {other}: {unknown('id field', chosen, ids)}")
    uris = data_of(config, data)
    places = (config.tasks.index(pair[0]), config.tasks.index(pair[1]))
    feedback = count_feedback(config, process, training_data(config, runs[0]), chosen, places)
    names = zip(runs, join_names(runs), strict=True)
    scored = [score_rows(load(run, process, checkpoint), name, uris, chosen, rows=rows) for run, name in names]
    return transfer_section(scored, feedback, pair, chosen)


def transfer_section(scored: Sequence[Scored], feedback: Feedback, tasks: tuple[str, str], field: str) -> Section:
    """AUC of every run by subset and task, and its difference to the first run that has the task.

    Raises:
        ConfigError: the runs did not score the same rows.
    """
    for s in scored[1:]:
        if s.ids.shape != scored[0].ids.shape or not np.array_equal(s.ids, scored[0].ids):
            raise ConfigError(
                f"transfer: {s.name} and {scored[0].name} read different rows; compare runs on the same --data and "
                "global_batch_size"
            )
    names = (f"mostly {tasks[0]}", "comparable", f"mostly {tasks[1]}", "no feedback")
    subset = np.where(scored[0].has_id, feedback.subset(scored[0].ids), 3)
    counts = [int((subset == g).sum()) for g in range(4)]
    numbers: dict[str, Any] = {"field": field, "tasks": tasks, "rows": dict(zip(names, counts, strict=True)), "auc": {}}
    tables, summary = [], []
    for task in tasks:
        with_it = [s for s in scored if task in s.tasks]
        if not with_it:
            continue
        base = with_it[0]
        lines = []
        for s in with_it:
            cells = [s.name]
            for g in (None, *range(4)):
                chosen = np.ones(len(subset), bool) if g is None else subset == g
                found = _compare(base, s, task, chosen)
                where = "all" if g is None else names[g]
                numbers["auc"].setdefault(task, {}).setdefault(s.name, {})[where] = vars(found)
                cells.append(_cell(found, s is base))
            lines.append(cells)
        header = ["run", "all", *(f"{n} ({c:,})" for n, c in zip(names, counts, strict=True))]
        tables.append(ReportTable(f"AUC of {task}; difference to {base.name} ± its standard error", header, lines))
        if len(with_it) == 1:
            summary.append(f"{task}: only {base.name} has the task; give more runs to compare.")
        summary += _verdicts(numbers["auc"][task], base.name, task, names)
    plots = []
    if len(scored) > 1:
        caption = (
            f"AUC minus that of {scored[0].name}, by how the feedback of both tasks compares for the row's {field} in "
            "the training data. Bars: two standard errors."
        )
        plots.append(Plot("subsets", caption, _plot(numbers["auc"], names)))
    source = {"run": [s.name for s in scored], "rows": len(subset)}
    return Section("transfer", "Negative transfer", summary, tables, plots, numbers, source)


def resolve_names(config: RunConfig, tasks: tuple[str, str] | None, field: str | None) -> tuple[tuple[str, str], str]:
    """The two tasks (the first two where not given) and the field (the first that behaviors share, else the first).

    Raises:
        ConfigError: unknown names.
    """
    known, features = list(config.tasks), config.features
    if tasks is None:
        if len(known) < 2:
            raise ConfigError(f"transfer: needs two tasks, the first run has {known}; give a run with both first")
        tasks = (known[0], known[1])
    for task in tasks:
        if task not in known:
            raise ConfigError(f"transfer: {unknown('task', task, known)}")
    ids = [f.name for f in features.ids]
    if field is None:
        field = next(iter(features.targets.values()), ids[0])
    if field not in ids:
        raise ConfigError(f"transfer: {unknown('id field', field, ids)}")
    return tasks, field


def _compare(base: Scored, other: Scored, task: str, chosen: np.ndarray) -> PairedAuc:
    i, j = base.tasks.index(task), other.tasks.index(task)
    labels = base.labels[:, i]
    chosen = chosen & ~np.isnan(labels)
    return delong(base.scores[chosen, i], other.scores[chosen, j], labels[chosen] == 1)


def _cell(found: PairedAuc, is_base: bool) -> str:
    if math.isnan(found.auc[1]):
        return "-"
    return f"{found.auc[1]:.4f}" + ("" if is_base else f" ({found.difference:+.4f} ± {found.error:.4f})")


def _verdicts(found: Mapping[str, Any], base: str, task: str, names: Sequence[str]) -> list[str]:
    sentences = []
    for run, of in found.items():
        if run == base:
            continue
        worse = [n for n in names if of[n]["difference"] < -2 * of[n]["error"]]
        better = [n for n in names if of[n]["difference"] > 2 * of[n]["error"]]
        parts = [f"worse where {' and '.join(worse)}"] if worse else []
        parts += [f"better where {' and '.join(better)}"] if better else []
        beside = " and ".join(parts) if parts else "no difference beyond two standard errors in any subset"
        if all(math.isnan(of[n]["difference"]) for n in names):
            beside = "nothing to compare (a class is missing in every subset, or predictions are NaN)"
        sentences.append(f"{task}, {run} against {base}: {beside}.")
    return sentences


def _plot(found: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Any:
    tasks = list(found)
    figure, axes = new_figure(4.6 * len(tasks), 3.8, 1, len(tasks), squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=True):
        runs = list(found[task])[1:]
        for r, run in enumerate(runs):
            of = [found[task][run][n] for n in names]
            x = [g + 0.14 * (r - (len(runs) - 1) / 2) for g in range(len(names))]
            y, error = [f["difference"] for f in of], [2 * f["error"] for f in of]
            axis.errorbar(x, y, yerr=error, fmt="o", markersize=4, elinewidth=1, label=run, color=COLORS[r % 6])
        axis.axhline(0, color="#999", linewidth=1)
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axis.set(title=task, ylabel="AUC difference", xlim=(-0.5, len(names) - 0.5))
        axis.legend(fontsize=8)
    return figure
