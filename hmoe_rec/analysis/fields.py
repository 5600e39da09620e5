"""Fields and labels -> which fields matter for a task, which are redundant, and what is left of one given another.

Every field becomes one of `BINS` values per example: an id is one of the most frequent ones or "other", a number one of
equally heavy bins, a behavior sequence its latest behavior; missing is a value of its own.

Letters of this file: N fields, K values of a field.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmoe_rec.analysis.opening import total_over
from hmoe_rec.analysis.report import Plot, ReportTable, Section, new_figure
from hmoe_rec.batch import Batch
from hmoe_rec.config import RunConfig
from hmoe_rec.progress import progress_bar
from hmoe_rec.sharding.process import Process
from hmoe_rec.training.evaluate import evaluation_reader
from hmoe_rec.training.learned import training_data
from hmoe_rec.types import ConfigError

BINS = 48
MAX_FIELDS = 80  # pairs of fields are counted, so the work grows with its square
SAMPLE_BATCHES = 8


@dataclass(frozen=True)
class FieldBins:
    """How a field's values become 0 .. K-1: value 0 = missing, 1 = other (ids).

    Attributes:
        name: of the field, or of a behavior column.
        ids: ascending ids with a value of their own; None for a number.
        edges: upper ends of a number's bins but the last; None for ids.
    """

    name: str
    ids: np.ndarray | None = None
    edges: np.ndarray | None = None

    @property
    def size(self) -> int:
        return len(self.ids) + 2 if self.ids is not None else len(self.edges if self.edges is not None else ()) + 2

    def of(self, values: np.ndarray, there: np.ndarray) -> np.ndarray:
        """[B] int64."""
        if self.ids is not None:
            place = np.minimum(np.searchsorted(self.ids, values), max(len(self.ids) - 1, 0))
            known = len(self.ids) > 0 and self.ids[place] == values
            found = np.where(known, place + 2, 1)
        else:
            assert self.edges is not None
            found = np.searchsorted(self.edges, values, side="right") + 1
        return np.where(there, found, 0)


def columns_of(batch: Batch, config: RunConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Field -> its value per example (of several ids the last one, of behaviors the latest), and where it is there."""
    found = {}
    for key in config.features.sparse_keys:
        column = batch.sparse[key]
        values, offsets = column.values().cpu().numpy().astype(np.int64), column.offsets().cpu().numpy()
        there = np.diff(offsets) > 0
        last = np.zeros(len(there), np.int64)
        last[there] = values[offsets[1:][there] - 1]
        found[key] = (last, there)
    for i, number in enumerate(config.features.numbers):
        x = batch.numbers[:, i].cpu().numpy().astype(np.float64)
        found[number.name] = (np.nan_to_num(x), ~np.isnan(x))
    return found


def bins_of(samples: Sequence[dict[str, tuple[np.ndarray, np.ndarray]]], numbers: Sequence[str]) -> list[FieldBins]:
    """From the values of some batches."""
    result = []
    for name in samples[0]:
        values = np.concatenate([s[name][0][s[name][1]] for s in samples])
        if name in numbers:
            edges = np.unique(np.quantile(values, np.linspace(0, 1, BINS - 1)[1:-1])) if len(values) else np.zeros(0)
            result.append(FieldBins(name, edges=edges))
        else:
            counted = sorted(Counter(values.tolist()).items(), key=lambda x: (-x[1], x[0]))
            result.append(FieldBins(name, ids=np.sort(np.array([v for v, _ in counted[: BINS - 2]], np.int64))))
    return result


class FieldCounts:
    """Joint counts of every two fields and a task's label; processes add up.

    Args:
        sizes: K of each field.
        num_tasks: T.
    """

    def __init__(self, sizes: Sequence[int], num_tasks: int) -> None:
        self.sizes, self.num_tasks = list(sizes), num_tasks
        self.pairs = [(i, j) for i in range(len(sizes)) for j in range(i, len(sizes))]
        # Per pair [K_i, K_j, T, 2]; (i, i) is the field alone.
        self.counts = [torch.zeros(sizes[i], sizes[j], num_tasks, 2, dtype=torch.float64) for i, j in self.pairs]

    def update(self, bins_BN: np.ndarray, labels_BT: np.ndarray) -> None:
        """Examples without a task's label do not count for that task."""
        for t in range(self.num_tasks):
            known = ~np.isnan(labels_BT[:, t])
            y, bins = labels_BT[known, t].astype(np.int64), bins_BN[known]
            for (i, j), counts in zip(self.pairs, self.counts, strict=True):
                size = self.sizes[i] * self.sizes[j] * 2
                key = (bins[:, i] * self.sizes[j] + bins[:, j]) * 2 + y
                counts[:, :, t] += torch.from_numpy(np.bincount(key, minlength=size)).view(*counts.shape[:2], 2)

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Adds up the counts of all processes; a collective call."""
        self.counts = [total(c) for c in self.counts]

    def of(self, i: int, j: int, task: int) -> Tensor:
        """[K_i, K_j, 2]"""
        if i > j:
            return self.of(j, i, task).transpose(0, 1)
        return self.counts[self.pairs.index((i, j))][:, :, task]


def information(joint_XY: Tensor) -> float:
    """Bits between two variables from their joint counts, less Miller and Madow's first-order bias.

    Below 0 where less is seen than chance shows on average: raised to 0, a mean over fields that say nothing would be
    above 0. 0 without examples.
    """
    total = float(joint_XY.sum())
    if not total:
        return 0.0
    occupied = [int((c > 0).sum()) for c in (joint_XY, joint_XY.sum(1), joint_XY.sum(0))]
    plain = entropy(joint_XY.sum(1)) + entropy(joint_XY.sum(0)) - entropy(joint_XY)
    bias = (occupied[0] - occupied[1] - occupied[2] + 1) / (2 * total * np.log(2))
    return plain - bias


def conditional_information(joint_XZY: Tensor) -> float:
    """I(X; Y | Z) in bits from counts [X, Z, Y], less the same bias within every value of Z; may be below 0."""
    total = float(joint_XZY.sum())
    if not total:
        return 0.0
    found = 0.0
    for z in range(joint_XZY.shape[1]):
        joint_XY = joint_XZY[:, z]
        weight = float(joint_XY.sum()) / total
        if weight:
            occupied = [int((c > 0).sum()) for c in (joint_XY, joint_XY.sum(1), joint_XY.sum(0))]
            plain = entropy(joint_XY.sum(1)) + entropy(joint_XY.sum(0)) - entropy(joint_XY)
            bias = (occupied[0] - occupied[1] - occupied[2] + 1) / (2 * float(joint_XY.sum()) * np.log(2))
            found += weight * (plain - bias)
    return found


def entropy(counts: Tensor) -> float:
    """Bits; 0 without examples."""
    p = counts.flatten() / counts.sum().clamp(min=torch.finfo(counts.dtype).tiny)
    return float(torch.special.entr(p).sum() / np.log(2))


def count_fields(
    config: RunConfig, process: Process, uris: Sequence[str], *, rows: int | None = None
) -> tuple[list[FieldBins], FieldCounts]:
    """One pass over the data, after a look at its first batches for the bins.

    Raises:
        ConfigError: more fields than can be paired.
    """
    reader = evaluation_reader(uris, config.schema_of_data, config, process)
    names = [*config.features.sparse_keys, *(n.name for n in config.features.numbers)]
    if len(names) > MAX_FIELDS:
        raise ConfigError(
            f"fields: {len(names)} fields are {len(names) * (len(names) - 1) // 2:,} pairs; leave some out with "
            f"data.leave_out, at most {MAX_FIELDS} can be compared"
        )
    samples = []
    for batch, _ in zip(reader.epoch(0), range(SAMPLE_BATCHES), strict=False):
        samples.append(columns_of(batch, config))
    samples = [s for share in process.gather(samples) for s in share]
    bins = bins_of(samples, [n.name for n in config.features.numbers])
    counts = FieldCounts([b.size for b in bins], len(config.tasks))
    done = 0
    with progress_bar("fields and labels") as bar:
        for batch in reader.epoch(0):
            if len(batch):
                columns = columns_of(batch, config)
                counts.update(np.stack([b.of(*columns[b.name]) for b in bins], 1), batch.labels.numpy())
            done += config.train.global_batch_size
            if process.rank == 0:
                bar(min(done, reader.num_rows), reader.num_rows)
            if rows is not None and done >= rows:
                break
    counts.merge(total_over(process))
    return bins, counts


# ----------------------------------------------------------------------------------------------------------- the report


def analyze_fields(
    config: RunConfig, process: Process, *, data: str | None = None, rows: int | None = 500_000
) -> Section:
    """
    Args:
        data: None = the training data.

    Raises:
        ConfigError: more fields than can be paired, or no data.
    """
    uris = [data] if data else training_data(config)
    return fields_section(*count_fields(config, process, uris, rows=rows), config.tasks, {"data": uris})


def fields_section(
    bins: Sequence[FieldBins], counts: FieldCounts, tasks: Sequence[str], source: dict[str, Any]
) -> Section:
    """What every field says of every task, alone and beside the field that makes it most redundant."""
    names, n = [b.name for b in bins], len(bins)
    alone = np.array([[information(_label(counts, i, t)) for i in range(n)] for t in range(len(tasks))])
    shared = np.zeros((n, n))
    entropies = [entropy(_marginal(counts, i)) for i in range(n)]
    for i in range(n):
        for j in range(i + 1, n):
            least = min(entropies[i], entropies[j])
            joint = counts.of(i, j, 0).sum(2)  # over the rows that have the first task's label
            shared[i, j] = shared[j, i] = information(joint) / least if least > 1e-9 else 0.0
    summary, tables, numbers = [], [], {"fields": names, "redundancy": shared.tolist(), "tasks": {}}
    for t, task in enumerate(tasks):
        labels = torch.stack([_label(counts, 0, t).sum(0)])
        uncertainty = entropy(labels)
        rest = [_given_best(counts, shared, i, t) for i in range(n)]
        order = np.argsort(-alone[t])
        rows = [
            [
                names[i],
                f"{alone[t, i]:.5f}",
                f"{alone[t, i] / uncertainty:.2%}" if uncertainty else "-",
                names[rest[i][0]] if rest[i][0] != i else "-",
                f"{shared[i, rest[i][0]]:.2f}" if rest[i][0] != i else "-",
                f"{rest[i][1]:.5f}",
            ]
            for i in order
        ]
        header = ["field", "bits", "of the label's", "most alike", "share alike", "bits left beside it"]
        tables.append(ReportTable(f"What fields say of {task}", header, rows))
        best = [f"{names[i]} {alone[t, i]:.4f}" for i in order[:3]]
        summary.append(f"{task} ({uncertainty:.3f} bits to explain): most is said by {', '.join(best)} bits.")
        useless = [names[i] for i in range(n) if alone[t, i] <= 0]
        if useless:
            summary.append(f"{task}: nothing beyond chance is said by {', '.join(useless[:8])}.")
        numbers["tasks"][task] = {
            names[i]: {"bits": float(alone[t, i]), "beside": names[rest[i][0]], "bits_left": rest[i][1]}
            for i in range(n)
        }
    pairs = sorted(((shared[i, j], names[i], names[j]) for i in range(n) for j in range(i + 1, n)), reverse=True)
    for share, one, other in pairs[:3]:
        if share > 0.8:
            summary.append(f"{one} and {other} say nearly the same ({share:.0%} of the smaller one's entropy).")
    caption = "Mutual information of every two fields over the smaller entropy: 1 = one follows from the other."
    plots = [Plot("redundancy", caption, _heat_map(shared, names))]
    warning = (
        f"An id field counts as its {BINS - 2} most frequent ids and 'other': of fields with more ids, the bits are a "
        "lower bound. Bits are less what chance shows on average, so that they may be below 0."
    )
    return Section("fields", "Fields and labels", summary, tables, plots, numbers, source, [warning])


def _label(counts: FieldCounts, i: int, task: int) -> Tensor:
    """[K_i, 2]"""
    return counts.of(i, i, task).sum(1)


def _marginal(counts: FieldCounts, i: int) -> Tensor:
    return _label(counts, i, 0).sum(1)


def _given_best(counts: FieldCounts, shared: np.ndarray, i: int, task: int) -> tuple[int, float]:
    """The field that is most alike, and what i still says beside it."""
    if len(shared) == 1:
        return i, information(_label(counts, i, task))
    others = shared[i].copy()
    others[i] = -1
    j = int(others.argmax())
    return j, conditional_information(counts.of(i, j, task))


def _heat_map(values: np.ndarray, names: Sequence[str]) -> Any:
    size = 2.2 + 0.22 * len(names)
    figure, axis = new_figure(size + 1, size)
    image = axis.imshow(values, cmap="viridis", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(image, ax=axis)
    return figure
