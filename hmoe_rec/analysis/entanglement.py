"""Pairs of opposite feedback and their vectors -> whether a set keeps the tasks' interests apart.

A user and an item that the user clicks and does not like should lie near each other for the one task and far apart for
the other. One shared table cannot do both: its distances in the two kinds of pairs overlap (entangled). Tables of the
tasks' own can (disentangled).

Distances are between the vectors that an expert of the set multiplies (`meetings.py`), not between whole ones where it
multiplies parts of them or turns them first. Ours: the papers do not say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from hmoe_rec.analysis.meetings import NOWHERE, UNNAMED, meetings_of
from hmoe_rec.analysis.opening import OpenRun
from hmoe_rec.analysis.report import Plot, ReportTable, Section, new_figure
from hmoe_rec.analysis.row_counts import first_ids
from hmoe_rec.suggest import unknown
from hmoe_rec.types import ConfigError

Rule = Literal["scores", "labels", "rates"]
FIRST, SECOND = "#1a41e5", "#d0803c"
MAX_POINTS = 1500


@dataclass(frozen=True)
class Conflicts:
    """Attributes: first: [rows] bool, pairs for task A and against B. second: the mirror."""

    first: np.ndarray
    second: np.ndarray


def conflicts_by_percentile(
    score_a: np.ndarray, score_b: np.ndarray, *, high: float = 0.6, low: float = 0.4
) -> Conflicts:
    """C1 = {A above its `high` quantile, B at or below its `low` quantile}, C2 the mirror set.

    Independent scores give 16 % each with .6 and .4, equal ones none.

    Raises:
        ValueError: 0 < low <= high < 1 does not hold.

    Source: the rule and .6, .4 are those of the official notebook (RecScope); what the score is it does not say. Ours:
    predictions, labels, or the items' rates.
    """
    if not 0 < low <= high < 1:
        raise ValueError(f"quantiles must be 0 < low <= high < 1, got low {low} and high {high}")
    above_a, above_b = score_a > np.quantile(score_a, high), score_b > np.quantile(score_b, high)
    below_a, below_b = score_a <= np.quantile(score_a, low), score_b <= np.quantile(score_b, low)
    return Conflicts(above_a & below_b, above_b & below_a)


def conflicts_by_label(label_a: np.ndarray, label_b: np.ndarray) -> Conflicts:
    """C1 = {A 1, B 0}, C2 = {A 0, B 1}; rows without one of the labels (NaN) are in neither."""
    return Conflicts((label_a == 1) & (label_b == 0), (label_a == 0) & (label_b == 1))


def smoothed_rates(ids: np.ndarray, labels: np.ndarray, *, prior_examples: float = 20.0) -> np.ndarray:
    """[rows] rate of a row's entity: (positives + m p) / (examples + m), p the overall rate. NaN = no label."""
    _, place = np.unique(ids, return_inverse=True)
    known = ~np.isnan(labels)
    overall = labels[known].mean() if known.any() else 0.0
    examples = np.bincount(place, weights=known)
    positives = np.bincount(place, weights=np.nan_to_num(labels))
    return ((positives + prior_examples * overall) / (examples + prior_examples))[place]


def kolmogorov_smirnov(x: np.ndarray, y: np.ndarray) -> float:
    """Largest distance of the two empirical distribution functions: 0 = alike, 1 = apart; NaN if one is empty or has a
    NaN."""
    if _is_undefined(x, y):
        return float("nan")
    both = np.concatenate([x, y])
    both.sort()
    below_x = np.searchsorted(np.sort(x), both, side="right") / len(x)
    below_y = np.searchsorted(np.sort(y), both, side="right") / len(y)
    return float(np.abs(below_x - below_y).max())


def nearer_probability(near: np.ndarray, far: np.ndarray) -> float:
    """P(a distance of `near` is below one of `far`) + half of ties: .5 = no difference, 1 = always; NaN if one is
    empty or has a NaN."""
    if _is_undefined(near, far):
        return float("nan")
    order = np.sort(near)
    below, through = np.searchsorted(order, far, side="left"), np.searchsorted(order, far, side="right")
    return float((below + through).sum() / 2 / len(near) / len(far))


def _is_undefined(x: np.ndarray, y: np.ndarray) -> bool:
    return not len(x) or not len(y) or bool(np.isnan(x).any() or np.isnan(y).any())


@dataclass(frozen=True)
class PairVectors:
    """Of every pair of a user and an item, read from a run.

    Attributes:
        users, items: set -> [rows, K], the vectors that meet (see `meetings.py`).
        labels, scores: [rows, T].
        item_ids: [rows].
        measured: set -> which vectors these are.
    """

    users: dict[str, np.ndarray]
    items: dict[str, np.ndarray]
    labels: np.ndarray
    scores: np.ndarray
    item_ids: np.ndarray
    measured: dict[str, str] = field(default_factory=dict)

    def distances(self, embedding_set: str) -> dict[str, np.ndarray]:
        """{"l2", "cosine" = 1 - cosine}: [rows]."""
        u, i = self.users[embedding_set].astype(np.float64), self.items[embedding_set].astype(np.float64)
        norms = np.maximum(np.linalg.norm(u, axis=1) * np.linalg.norm(i, axis=1), 1e-300)
        return {"l2": np.linalg.norm(u - i, axis=1), "cosine": 1 - (u * i).sum(1) / norms}


def read_pairs(run: OpenRun, uris: Sequence[str], user: str, item: str, *, rows: int | None = 100_000) -> PairVectors:
    """Vectors, labels and predictions of the data's rows that have a user and an item, of all processes, on each.

    Raises:
        ConfigError: no such field, or no set that embeds both.
    """
    for name in (user, item):
        known = run.model.features.sparse_keys
        if name not in known:
            raise ConfigError(f"entanglement: {unknown('field', name, known)}")
    meetings = meetings_of(run, user, item)
    if not meetings:
        raise ConfigError(f"entanglement: no embedding set has both {user!r} and {item!r}")
    found: dict[str, list[np.ndarray]] = {}
    for batch in run.batches(uris, rows=rows):
        with torch.no_grad():
            fields, h_EBH = run.model.represent(batch)
            logits_BT = run.model.classify(fields, h_EBH)
            vectors = {s: meeting.of(fields) for s, meeting in meetings.items()}
        (_, has_user), (item_ids, has_item) = (first_ids(batch.sparse[f], len(batch)) for f in (user, item))
        real = (batch.weights > 0).cpu() & torch.from_numpy(has_user & has_item)
        parts = {"labels": batch.labels, "scores": logits_BT.float().sigmoid(), "ids": torch.from_numpy(item_ids)}
        for s, (of_user, of_item) in vectors.items():
            parts |= {f"user {s}": of_user, f"item {s}": of_item}
        for name, value in parts.items():
            found.setdefault(name, []).append(value.cpu()[real].numpy())
    whole = {name: run.gather(np.concatenate(chunks)) for name, chunks in found.items()}
    return PairVectors(
        {s: whole[f"user {s}"] for s in meetings},
        {s: whole[f"item {s}"] for s in meetings},
        whole["labels"],
        whole["scores"],
        whole["ids"],
        {s: meeting.measured for s, meeting in meetings.items()},
    )


def find_conflicts(pairs: PairVectors, a: int, b: int, rule: Rule) -> Conflicts:
    if rule == "labels":
        return conflicts_by_label(pairs.labels[:, a], pairs.labels[:, b])
    if rule == "scores":
        return conflicts_by_percentile(pairs.scores[:, a], pairs.scores[:, b])
    rates = [smoothed_rates(pairs.item_ids, pairs.labels[:, t]) for t in (a, b)]
    return conflicts_by_percentile(*rates)


def measure(pairs: PairVectors, conflicts: Conflicts) -> dict[str, dict[str, dict[str, float]]]:
    """Set -> distance -> {ks, c1_nearer, mean_c1, mean_c2}: how the distances of C1 and C2 differ."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for s in pairs.users:
        for name, d in pairs.distances(s).items():
            one, two = d[conflicts.first], d[conflicts.second]
            result.setdefault(s, {})[name] = {
                "ks": kolmogorov_smirnov(one, two),
                "c1_nearer": nearer_probability(one, two),
                "mean_c1": float(one.mean()) if len(one) else float("nan"),
                "mean_c2": float(two.mean()) if len(two) else float("nan"),
            }
    return result


def by_task(pairs: PairVectors, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Set -> task -> P(a positive pair is nearer than a negative one), by cosine."""
    result: dict[str, dict[str, float]] = {}
    for s in pairs.users:
        d = pairs.distances(s)["cosine"]
        for t, task in enumerate(tasks):
            y = pairs.labels[:, t]
            result.setdefault(s, {})[task] = nearer_probability(d[y == 1], d[y == 0])
    return result


# ----------------------------------------------------------------------------------------------------------- the report


def analyze_entanglement(
    run: OpenRun,
    uris: Sequence[str],
    *,
    tasks: tuple[str, str] | None = None,
    user: str | None = None,
    item: str | None = None,
    rule: Rule = "scores",
    rows: int | None = 100_000,
) -> Section:
    """Distances of user and item in pairs of opposite feedback, per embedding set.

    Args:
        tasks: A and B; None = the first two.
        user, item: fields; None = the schema's user_key, and the first id field that a behavior sequence shares.
        rule: pairs by "scores" (predictions above and below their percentiles), "labels" (exactly 1 and 0), or
            "rates" (the item's observed rates, above and below their percentiles).

    Raises:
        ConfigError: one task only, unknown names, or nothing to guess user and item from.
    """
    a, b = _two_tasks(run.config.tasks, tasks)
    user, item = _fields(run, user, item)
    pairs = read_pairs(run, uris, user, item, rows=rows)
    names = (run.config.tasks[a], run.config.tasks[b])
    conflicts = find_conflicts(pairs, a, b, rule)
    found, nearer = measure(pairs, conflicts), by_task(pairs, run.config.tasks)
    counts = (int(conflicts.first.sum()), int(conflicts.second.sum()))
    first, second = f"{names[0]} not {names[1]}", f"{names[1]} not {names[0]}"
    summary = [
        f"{counts[0]:,} pairs {first} (C1) and {counts[1]:,} pairs {second} (C2) of {len(pairs.labels):,}, by {rule}.",
        *_verdicts(found, nearer, first),
        *(f"{s} is measured between {what}." for s, what in pairs.measured.items() if what not in UNNAMED),
    ]
    warnings = [] if min(counts) >= 100 else ["Fewer than 100 pairs on one side: the figures below are noise."]
    warnings += _caveat(pairs.measured)
    numbers = {
        "tasks": names,
        "user": user,
        "item": item,
        "rule": rule,
        "pairs": {"c1": counts[0], "c2": counts[1], "all": len(pairs.labels)},
        "sets": found,
        "positives_nearer": nearer,
        "measured": pairs.measured,
    }
    tables = [_distances_table(found), _nearer_table(nearer, run.config.tasks)]
    plots = []
    shown = [s for s in pairs.users if not np.isnan(found[s]["cosine"]["ks"])]
    if shown:
        caption = f"Cosine distance of {user} and {item}. Apart is disentangled, one upon the other is entangled."
        plots.append(Plot("distances", caption, _histograms(pairs, shown, conflicts, found, first, second)))
        caption = (
            "Difference of the two vectors, on its two largest principal components; at most 1,500 pairs of each kind."
        )
        plots.append(Plot("plane", caption, _plane(pairs, shown, conflicts, first, second)))
    return Section("entanglement", "Interest entanglement", summary, tables, plots, numbers, run.source(uris), warnings)


def _two_tasks(known: Sequence[str], given: tuple[str, str] | None) -> tuple[int, int]:
    if len(known) < 2:
        raise ConfigError(f"entanglement: needs two tasks, the run has {list(known)}")
    for task in given or ():
        if task not in known:
            raise ConfigError(f"entanglement: {unknown('task', task, known)}")
    if given is not None and given[0] == given[1]:
        raise ConfigError(f"entanglement: two different tasks are needed, got {given[0]!r} twice")
    return (0, 1) if given is None else (list(known).index(given[0]), list(known).index(given[1]))


def _fields(run: OpenRun, user: str | None, item: str | None) -> tuple[str, str]:
    schema, features = run.config.schema_of_data, run.model.features
    ids = [f.name for f in features.ids]
    if user is None:
        user = next((f.name for f in schema.ids if f.source == schema.user_key), None)
    if item is None:
        item = next((t for t in features.targets.values() if t != user), None)
    for name, what in ((user, "user"), (item, "item")):
        if name is None:
            raise ConfigError(f"entanglement: which field is the {what}? Give --{what}; id fields: {', '.join(ids)}")
    assert user is not None and item is not None
    return user, item


def _caveat(measured: Mapping[str, str]) -> list[str]:
    without = [s for s, what in measured.items() if what == NOWHERE]
    if not without:
        return []
    return [
        f"{', '.join(without)}: no expert there takes inner products, so a distance of user and item has no meaning by "
        "itself; read the figures beside those of a run with gwpfm, fm or ipnn on that set."
    ]


def _verdicts(
    found: Mapping[str, Mapping[str, Mapping[str, float]]], nearer: Mapping[str, Mapping[str, float]], first: str
) -> list[str]:
    """An MLP behind the products may take either sign, so that positives are the farther ones in some sets; sets are
    compared after turning those."""
    sentences, values = [], []
    for s, distances in found.items():
        d = distances["cosine"]
        if np.isnan(d["ks"]):
            continue
        where = f"{s}: KS {d['ks']:.2f}; pairs {first} are the nearer ones with probability {d['c1_nearer']:.2f}"
        apart = abs(d["c1_nearer"] - 0.5)
        turned = _positives_are_farther(nearer[s])
        values.append(1 - d["c1_nearer"] if turned else d["c1_nearer"])
        sentences.append(
            f"{where}: {'apart' if apart > 0.15 else 'somewhat apart' if apart > 0.05 else 'overlap'}"
            + (" (positives are the farther ones in this set)." if turned else ".")
        )
    if len(values) > 1:
        spread = max(values) - min(values)
        sentences.append(
            f"Between the sets that probability, turned where positives are farther, differs by up to {spread:.2f}: "
            + ("the sets keep the interests apart." if spread > 0.15 else "the sets say much the same.")
        )
    return sentences


def _positives_are_farther(nearer: Mapping[str, float]) -> bool:
    """By the task that the set's distances say most of; .45 to .5 is noise."""
    known = [p for p in nearer.values() if not np.isnan(p)]
    return bool(known) and max(known, key=lambda p: abs(p - 0.5)) < 0.45


def _distances_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> ReportTable:
    rows = [
        [s, name, f"{d['mean_c1']:.3f}", f"{d['mean_c2']:.3f}", f"{d['ks']:.3f}", f"{d['c1_nearer']:.3f}"]
        for s, distances in found.items()
        for name, d in distances.items()
    ]
    return ReportTable(
        "Distances in pairs of opposite feedback (.5 in the last column: no difference)",
        ["set", "distance", "mean in C1", "mean in C2", "KS", "P(C1 nearer)"],
        rows,
        left=2,
    )


def _nearer_table(nearer: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> ReportTable:
    rows = [[s, *(f"{of[task]:.3f}" for task in tasks)] for s, of in nearer.items()]
    return ReportTable("P(a positive pair is nearer than a negative one), by cosine", ["set", *tasks], rows)


def _histograms(
    pairs: PairVectors, sets: Sequence[str], conflicts: Conflicts, found: Mapping[str, Any], first: str, second: str
) -> Any:
    columns = min(3, len(sets))
    lines = -(-len(sets) // columns)
    figure, axes = new_figure(4 * columns, 3.2 * lines, lines, columns, squeeze=False)
    for k, axis in enumerate(axes.flat):
        if k >= len(sets):
            axis.set_visible(False)
            continue
        d = pairs.distances(sets[k])["cosine"]
        one, two = d[conflicts.first], d[conflicts.second]
        low, high = np.quantile(np.concatenate([one, two]), [0.002, 0.998])
        bins = np.linspace(low, high, 40).tolist()
        axis.hist(one, bins, density=True, histtype="stepfilled", alpha=0.45, color=FIRST, label=first)
        axis.hist(two, bins, density=True, histtype="step", linewidth=1.6, color=SECOND, label=second)
        figures = found[sets[k]]["cosine"]
        axis.set(title=f"{sets[k]}: KS {figures['ks']:.2f}", xlabel="1 - cosine", yticks=[])
    axes.flat[0].legend(fontsize=8)
    return figure


def _plane(pairs: PairVectors, sets: Sequence[str], conflicts: Conflicts, first: str, second: str) -> Any:
    columns = min(3, len(sets))
    lines = -(-len(sets) // columns)
    figure, axes = new_figure(4 * columns, 3.6 * lines, lines, columns, squeeze=False)
    for k, axis in enumerate(axes.flat):
        if k >= len(sets):
            axis.set_visible(False)
            continue
        u, i = pairs.users[sets[k]], pairs.items[sets[k]]
        chosen = [np.flatnonzero(c)[:MAX_POINTS] for c in (conflicts.first, conflicts.second)]
        difference = (u - i)[np.concatenate(chosen)].astype(np.float64)
        difference -= difference.mean(0)
        _, _, directions = np.linalg.svd(difference, full_matrices=False)
        plane = difference @ directions[:2].T
        if plane.shape[1] < 2:
            plane = np.pad(plane, ((0, 0), (0, 1)))
        split = len(chosen[0])
        axis.scatter(*plane[:split].T, s=5, color=FIRST, alpha=0.4, linewidths=0, label=first)
        axis.scatter(*plane[split:].T, s=5, color=SECOND, alpha=0.4, linewidths=0, label=second)
        axis.set(title=sets[k], xticks=[], yticks=[])
    axes.flat[0].legend(fontsize=8, markerscale=3)
    return figure
