"""Runs and data -> heat maps of behavior-target correlation: what the data says beside what each model has learned."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.analysis.correlation import (
    BehaviorCounts,
    Examples,
    learned_correlation,
    pearson,
    positions_of,
    scaled,
)
from hmoe_rec.analysis.opening import OpenRun, join_names, load
from hmoe_rec.analysis.report import Plot, ReportTable, Section, new_figure
from hmoe_rec.batch import Batch
from hmoe_rec.config import RunConfig
from hmoe_rec.encoding.fields import FieldEncoder, SequencePooler
from hmoe_rec.encoding.pooling import Pooling
from hmoe_rec.encoding.temporal_interest import time_buckets
from hmoe_rec.sharding.process import Process
from hmoe_rec.suggest import unknown
from hmoe_rec.training.evaluate import read_run_config
from hmoe_rec.types import ConfigError

Slots = Literal["position", "age"]
AGE_BUCKETS, BUCKET_SECONDS = 14, 60.0
SAMPLE_ROWS = 50_000
SHOWN_TARGETS = 4
MAPS_BESIDE = 6  # heat maps in a line of a figure


@dataclass(frozen=True)
class Question:
    """What is correlated: behaviors of `column`, whose ids are those of the field `target`, with the response `task`.

    Attributes:
        sequence: that the column belongs to.
        slots: by "position" or by "age" bucket; num_slots of them.
    """

    sequence: str
    column: str
    target: str
    task: str
    slots: Slots
    num_slots: int


def question_of(
    config: RunConfig,
    *,
    column: str | None = None,
    task: str | None = None,
    slots: Slots = "position",
    num_slots: int = 10,
) -> Question:
    """
    Args:
        column: None = the behavior column whose target has the fewest ids: most likely a category.
        task: None = the first one.
        num_slots: at most the length of the sequence.

    Raises:
        ConfigError: no behavior sequence, unknown names, or ages of a sequence without times.
    """
    features = config.features
    if not features.sequences:
        raise ConfigError(
            "correlation: the run has no behavior sequence (schema: sequences), so there is none to look at"
        )
    targets = features.targets
    column = column or min(targets, key=lambda c: features.id_field(targets[c]).num_embeddings)
    if column not in targets:
        raise ConfigError(f"correlation: {unknown('behavior column', column, targets)}")
    task = task or config.tasks[0]
    if task not in config.tasks:
        raise ConfigError(f"correlation: {unknown('task', task, config.tasks)}")
    sequence = next(s for s in features.sequences if column in dict(s.columns))
    if slots == "age" and not sequence.has_ages:
        raise ConfigError(f"correlation: sequence {sequence.name!r} has no times; give --slots position")
    count = min(num_slots, sequence.max_length) if slots == "position" else AGE_BUCKETS
    return Question(sequence.name, column, targets[column], task, slots, count)


@dataclass(frozen=True)
class Correlation:
    """Attributes:
    maps: name -> [A, C, P] in [0, 1] per target; the truth is named "data".
    bits: of the truth.
    titles: map's name -> what it is, where that is not what its name says: SASRec, which does not read the target, has
        no attention to it.
    """

    targets: list[int]
    categories: list[int]
    bits: Tensor
    p_values: Tensor | None
    maps: dict[str, Tensor]
    examples: Tensor
    titles: dict[str, str] = field(default_factory=dict)


def choose_categories(run: OpenRun, question: Question, uris: Sequence[str], count: int) -> tuple[list[int], list[int]]:
    """The most frequent target categories and the most frequent behavior categories of the first rows."""
    of_targets: Counter[int] = Counter()
    of_behaviors: Counter[int] = Counter()
    for batch in run.batches(uris, rows=SAMPLE_ROWS):
        of_targets.update(batch.sparse[question.target].values().tolist())
        of_behaviors.update(batch.sparse[question.column].values().tolist())
    shares = run.process.gather((of_targets, of_behaviors))
    of_targets = sum((s[0] for s in shares), Counter())
    of_behaviors = sum((s[1] for s in shares), Counter())
    if not of_targets or not of_behaviors:
        raise ConfigError(
            f"correlation: the first {SAMPLE_ROWS:,} rows have no {question.target} or no {question.column}"
        )

    def most(counter: Counter[int], number: int) -> list[int]:
        return [i for i, _ in sorted(counter.items(), key=lambda x: (-x[1], x[0]))[:number]]

    targets = most(of_targets, SHOWN_TARGETS)
    # Targets are among the behaviors that are shown: that is where the correlation is.
    others = [c for c in most(of_behaviors, count) if c not in targets]
    return targets, sorted([*targets, *others[: max(0, count - len(targets))]])


def correlate(
    run: OpenRun,
    name: str,
    question: Question,
    uris: Sequence[str],
    targets: Sequence[int],
    categories: Sequence[int],
    *,
    rows: int | None = None,
    unbiased: bool = False,
    permutations: int = 0,
) -> Correlation:
    """One pass over the data with a run: the truth by labels, what the run implies by its predictions in their place,
    and the attention of its poolings, or what a pooling has in its place."""
    truth, implied = (BehaviorCounts(torch.tensor(targets), torch.tensor(categories), question.num_slots) for _ in "ab")
    ages = torch.zeros(2, question.num_slots, dtype=torch.float64)
    t = run.config.tasks.index(question.task)
    dtype = None
    for batch in run.batches(uris, rows=rows):
        with torch.no_grad():
            _, output = run.task(batch)
        dtype = batch.sparse.values().dtype
        lengths_B = batch.sparse[question.column].lengths().cpu()
        values = batch.sparse[question.column].values().cpu().long()
        slot, age = _slots(batch, question, lengths_B)
        if age is not None:
            inside = (slot >= 0) & (slot < question.num_slots)
            ages[0].index_add_(0, slot[inside], age[inside].double())
            ages[1].index_add_(0, slot[inside], torch.ones(int(inside.sum()), dtype=torch.float64))
        known_B = (batch.weights > 0).cpu()
        target_B = _first(batch.sparse[question.target])
        labels_B = batch.labels[:, t].cpu()
        labels_B[~known_B] = float("nan")
        predicted_B = torch.where(labels_B.isnan(), labels_B, output.logits_BT[:, t].float().sigmoid().cpu())
        for counts, response_B in ((truth, labels_B), (implied, predicted_B)):
            counts.update(Examples(target_B, values, lengths_B, slot, response_B))
    for counts in (truth, implied):
        counts.merge(run.total)
    ages = run.total(ages)
    bits = truth.information(unbiased=unbiased)
    maps = {"data": _scaled_per_target(bits), f"{name}: predictions": _scaled_per_target(implied.information())}
    seconds, titles = _seconds_of_slots(question, ages), {}
    for s, pooling, dims, width in _poolings(run, question):
        vectors = _vectors(run, s, question.target, [*categories, *targets], dims, width, dtype)
        shown = [
            learned_correlation(
                pooling,
                vectors[: len(categories)],
                vectors[len(categories) + a],
                slots=question.num_slots,
                dims=slice(None) if _mixes_columns(pooling) else dims,
                ages_P=seconds.to(vectors) if question_has_ages(run, question) else None,
            )
            for a in range(len(targets))
        ]
        key = f"{name}: attention of {s}"  # of all poolings, as in the JSON of earlier versions
        maps[key], titles[key] = torch.stack(shown), f"{name}: {pooling.attention_is} of {s}"
    p_values = truth.p_values(draws=permutations) if permutations else None
    return Correlation(list(targets), list(categories), bits, p_values, maps, truth.all_A2, titles)


def question_has_ages(run: OpenRun, question: Question) -> bool:
    return next(s for s in run.model.features.sequences if s.name == question.sequence).has_ages


def _mixes_columns(pooling: Pooling) -> bool:
    """Its projections mix the columns of the width, so that none can be left out."""
    return bool(getattr(pooling, "projects", False))


def _scaled_per_target(values_ACP: Tensor) -> Tensor:
    return torch.stack([scaled(v) for v in values_ACP])


def _first(column: Any) -> Tensor:
    """The first id of each example; -1 where there is none."""
    values, offsets = column.values().cpu().long(), column.offsets().cpu()
    there = offsets[1:] > offsets[:-1]
    result = torch.full((len(offsets) - 1,), -1, dtype=torch.int64)
    result[there] = values[offsets[:-1][there]]
    return result


def _slots(batch: Batch, question: Question, lengths_B: Tensor) -> tuple[Tensor, Tensor | None]:
    """Slot of each behavior, and its age in seconds where the sequence has times."""
    has_ages = batch.ages is not None and question.sequence in batch.ages.keys()
    age = batch.ages[question.sequence].values().cpu() if batch.ages is not None and has_ages else None
    if question.slots == "position":
        return positions_of(lengths_B), age
    assert age is not None, "question_of checked it"
    return time_buckets(age, AGE_BUCKETS, BUCKET_SECONDS) - 1, age


def _seconds_of_slots(question: Question, sums: Tensor) -> Tensor:
    """Mean age of the behaviors in each slot; the lower end of an empty bucket, the last known age of a position."""
    result = []
    for p in range(question.num_slots):
        if sums[1, p] > 0:
            result.append(float(sums[0, p] / sums[1, p]))
        else:
            result.append((2.0**p - 1) * BUCKET_SECONDS if question.slots == "age" else (result[-1] if result else 0.0))
    return torch.tensor(result)


def _poolings(run: OpenRun, question: Question) -> list[tuple[str, Pooling, slice, int]]:
    """(set, pooling, the column's part of the width, the whole width) of every set that pools the sequence."""
    found = []
    for s, encoder in run.model.encoders.items():
        assert isinstance(encoder, FieldEncoder)
        if question.sequence in encoder.sequences:
            pooler = encoder.sequences[question.sequence]
            assert isinstance(pooler, SequencePooler)
            columns = [c for c, _ in pooler.columns]
            if question.column in columns:
                k = columns.index(question.column)
                dims = slice(k * pooler.dim, (k + 1) * pooler.dim)
                found.append((s, pooler.pooling, dims, len(columns) * pooler.dim))
    return found


@torch.no_grad()
def _vectors(
    run: OpenRun, embedding_set: str, field: str, ids: Sequence[int], dims: slice, width: int, dtype: Any
) -> Tensor:
    """[ids, width] the ids' vectors of a set in the columns `dims`, zeros elsewhere; a collective call."""
    keys, device = run.model.features.sparse_keys, run.process.device
    lengths = torch.zeros(len(keys), len(ids), dtype=torch.int32)
    lengths[keys.index(field)] = 1
    sparse = KeyedJaggedTensor(
        keys=list(keys),
        values=torch.tensor(ids, dtype=dtype),
        lengths=lengths.flatten(),
        length_per_key=[len(ids) if k == field else 0 for k in keys],
        stride=len(ids),
    ).to(device)
    own = run.model.embedding(sparse)[embedding_set].targets[field].float()
    result = own.new_zeros(len(ids), width)
    result[:, dims] = own
    return result


# ----------------------------------------------------------------------------------------------------------- the report


def analyze_correlation(
    runs: Sequence[str],
    process: Process,
    *,
    column: str | None = None,
    task: str | None = None,
    slots: Slots = "position",
    num_slots: int = 10,
    num_categories: int = 10,
    data: str | None = None,
    rows: int | None = None,
    checkpoint: str = "best",
    unbiased: bool = False,
    permutations: int = 0,
) -> Section:
    """The data, and what one run or several have learned of it, over the categories that the first run's data suggests.

    Raises:
        ConfigError: see `question_of`.
    """
    question = question_of(read_run_config(runs[0]), column=column, task=task, slots=slots, num_slots=num_slots)
    for other in runs[1:]:
        question_of(read_run_config(other), column=question.column, task=question.task, slots=slots)
    found: list[Correlation] = []
    for run_dir, name in zip(runs, join_names(runs), strict=True):
        run = load(run_dir, process, checkpoint)
        if not found:
            uris = run.uris(data)
            chosen = choose_categories(run, question, uris, num_categories)
            source = {**run.source(uris), "run": list(runs)}
        draws = 0 if found else permutations
        found.append(correlate(run, name, question, uris, *chosen, rows=rows, unbiased=unbiased, permutations=draws))
    return correlation_section(found, question, source)


def correlation_section(found: Sequence[Correlation], question: Question, source: dict[str, Any]) -> Section:
    """The maps of several runs over the same categories; the truth is that of the first."""
    truth = found[0]
    maps = {name: m for f in found for name, m in f.maps.items() if f is truth or name != "data"}
    scores = {name: _scores(truth, m) for name, m in maps.items() if name != "data"}
    titles = {name: name for name in maps} | {k: t for f in found for k, t in f.titles.items()}
    strongest = truth.bits.flatten(1).argmax(1)
    summary = []
    for a, target in enumerate(truth.targets):
        c, p = divmod(int(strongest[a]), question.num_slots)
        summary.append(
            f"Target {target}: the most informative behavior is category {truth.categories[c]} at "
            f"{_slot_name(question, p)}, {float(truth.bits[a].max()):.4f} bits of {question.task} "
            f"({float(truth.examples[a].sum()):,.0f} examples)."
        )
    for name, s in scores.items():
        summary.append(
            f"{titles[name]}: Pearson {s['pearson']:.2f} with the data over the whole map, {s['pearson_own']:.2f} over "
            f"the row of the target's own category; mean absolute error {s['mae']:.3f}."
        )
    header = ["map", "Pearson", "own row", "MAE"]
    rows = [[titles[n], f"{s['pearson']:.3f}", f"{s['pearson_own']:.3f}", f"{s['mae']:.3f}"] for n, s in scores.items()]
    tables = [ReportTable("Agreement with the data, mean over the targets (every map scaled to [0, 1])", header, rows)]
    by = "position, 1 = the latest" if question.slots == "position" else "age bucket"
    caption = (
        f"Rows: category of the behavior ({question.column}); columns: {by}. Data: mutual information with "
        f"{question.task}; predictions: the same with the model's probabilities in place of labels; attention: logits "
        "and value lengths; of a pooling without attention to the target, what its title says. Every map scaled to "
        "[0, 1]."
    )
    shown = {titles[name]: m for name, m in maps.items()}
    plots = [Plot("maps", caption, _heat_maps(truth, shown, question))]
    plots.append(Plot("own", "The row of the target's own category.", _own_rows(truth, shown, question)))
    numbers = {
        "question": vars(question),
        "targets": truth.targets,
        "categories": truth.categories,
        "bits": truth.bits.tolist(),
        "p_values": None if truth.p_values is None else truth.p_values.tolist(),
        "maps": {name: m.tolist() for name, m in maps.items()},
        "titles": titles,
        "agreement": scores,
    }
    return Section("correlation", "Behavior-target correlation", summary, tables, plots, numbers, source)


def _scores(truth: Correlation, learned: Tensor) -> dict[str, float]:
    data = truth.maps["data"]
    own = [truth.categories.index(a) if a in truth.categories else None for a in truth.targets]
    rows = [pearson(learned[a, c], data[a, c]) for a, c in enumerate(own) if c is not None]
    whole = [pearson(learned[a], data[a]) for a in range(len(truth.targets))]
    return {
        "pearson": float(np.mean(whole)),
        "pearson_own": float(np.mean(rows)) if rows else float("nan"),
        "mae": float((learned - data).abs().mean()),
    }


def _slot_name(question: Question, p: int) -> str:
    if question.slots == "position":
        return f"position {p + 1}"
    return f"an age of {(2.0**p - 1) * BUCKET_SECONDS:,.0f} s and more"


def _heat_maps(truth: Correlation, maps: dict[str, Tensor], question: Question) -> Any:
    """A line per target; of many maps a line per map, since a page is higher than wide."""
    tall = len(maps) > MAPS_BESIDE
    lines, columns = (len(maps), len(truth.targets)) if tall else (len(truth.targets), len(maps))
    height = 0.17 if tall else 0.22
    height = (height * len(truth.categories) + (0.3 if tall else 1.2)) * lines + 0.5
    figure, axes = new_figure(2.6 * columns + 1, height, lines, columns, squeeze=False)
    for a, target in enumerate(truth.targets):
        for m, (name, values) in enumerate(maps.items()):
            i, j = (m, a) if tall else (a, m)
            axis = axes[i, j]
            axis.imshow(values[a].numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
            last = not tall or i == lines - 1
            axis.set_xticks(range(question.num_slots), range(1, question.num_slots + 1) if last else [], fontsize=6)
            axis.set_yticks(range(len(truth.categories)), truth.categories if j == 0 else [], fontsize=6)
            of_map, of_target = name.replace(": ", "\n"), f"target {target}"
            if i == 0:
                axis.set_title(of_target if tall else of_map, fontsize=8)
            if j == 0:
                axis.set_ylabel(of_map if tall else of_target, fontsize=8)
    return figure


def _own_rows(truth: Correlation, maps: dict[str, Tensor], question: Question) -> Any:
    shown = [(a, truth.categories.index(t)) for a, t in enumerate(truth.targets) if t in truth.categories]
    columns = max(1, len(shown))
    figure, axes = new_figure(3.2 * columns, 3.4 + 0.2 * -(-len(maps) // columns), 1, columns, squeeze=False)
    colors = ("#16191d", "#1a41e5", "#d0803c", "#6f6103", "#58389e", "#8b305a", "#989396")
    for axis, (a, c) in zip(axes.flat, shown, strict=False):
        for k, (name, values) in enumerate(maps.items()):
            style = {"linewidth": 1.1 if k else 2.2, "linestyle": ("-", "--", ":", "-.")[k // 7 % 4]}
            axis.plot(range(1, question.num_slots + 1), values[a, c].numpy(), color=colors[k % 7], label=name, **style)
        axis.set(title=f"category and target {truth.targets[a]}", xlabel=question.slots, ylim=(-0.03, 1.05))
    if len(maps) > MAPS_BESIDE:
        figure.set_figheight(3.2 + 0.16 * (-(-len(maps) // columns)))
        figure.legend(*axes.flat[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=columns)
    else:
        axes.flat[0].legend(fontsize=7)
    return figure
