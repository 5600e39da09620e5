"""Which rows of a log are learned from: fewer negatives, or rows by a probability; and what keeps a model calibrated.

Every row has a number u, uniform in [0, 1), that depends on a seed and on the row alone: a hash of its file's name and
its number there, or of key columns. So the same rows are kept by any number of processes, in any order, and after a
restart. With r(t) the rate of task t's negatives (in the row's slice) and s the row's own probability (else 1)::

    pi(t)  = 1 if y(t) = 1,   r(t) if y(t) = 0,   0 if y(t) is missing
    a row is kept  iff  u < s max over tasks of pi(t)

Two corrections leave the probabilities that a model learns as they are without sampling [ours; the identities are those
of case-control studies, such as Prentice and Pyke, Biometrika 66 (1979)]:

weights   A kept row weighs 1 / (s max pi(t)): sums over kept rows estimate those over all rows without bias (Horvitz
          and Thompson, 1952), whatever the rule, for every task at once.
logit     A negative label of a kept row counts only if u < r(t) (else it is taken for missing), so that what is kept of
          task t depends on its own label alone. Then logit P(y = 1 | x, kept) = logit P(y = 1 | x) - ln r(t), and
          -ln r(t) is added to the logit *in the loss*: the model's own logits are those of the whole log. Nothing has
          to be applied when the model is served, so nothing can be forgotten. Exact where r depends on the task and on
          what the model sees: a slice must be an input of the model, and s must be 1.

Both keep the same rows. The second has no large weights, but learns nothing from the negative labels it leaves out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hmoe_rec.data.columns import Place, _floats, _label, _plain_array
from hmoe_rec.data.hashing import GOLDEN, hash_rows, hash_string, mix64
from hmoe_rec.data.rows import Rows
from hmoe_rec.data.schema import Schema
from hmoe_rec.data.source import Chunk, ParquetSource, TableReader
from hmoe_rec.progress import Progress
from hmoe_rec.types import ConfigError, DataError

Correction = Literal["weights", "logit"]


@dataclass(frozen=True)
class Decision:
    """What becomes of n rows.

    Attributes:
        kept: [n] bool.
        slices: [n], index of each row's slice.
        labels: [n, T] float32, as they stand in the log.
        factors: [n], what the weight of a kept row is multiplied by; None: 1.
        counts: [n, T] bool, the labels of kept rows that count; None: all.
    """

    kept: np.ndarray
    slices: np.ndarray
    labels: np.ndarray
    factors: np.ndarray | None = None
    counts: np.ndarray | None = None


class RowSampler:
    """The rule above for one schema.

    Args:
        rates: task -> share of its negatives that is kept, in (0, 1].
        slice_column: column whose value decides on the rates.
        slice_rates: value -> task -> rate; other values, and nulls, have `rates`.
        probability: column with the rows' own probabilities s = min(1, scale * value).
        scale: > 0.
        correction: "weights" or "logit".
        key: columns whose values name a row: rows of one key are kept or left out alike, whatever file they stand in;
            () = file name and row number.
        seed: of the hash.

    Raises:
        ConfigError: rates out of (0, 1] or of other tasks, or `probability` with "logit".
    """

    def __init__(
        self,
        schema: Schema,
        *,
        rates: Mapping[str, float],
        slice_column: str | None = None,
        slice_rates: Mapping[str, Mapping[str, float]] | None = None,
        probability: str | None = None,
        scale: float = 1.0,
        correction: Correction = "weights",
        key: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.schema, self.tasks, self.correction, self.key, self.seed = schema, schema.task_names, correction, key, seed
        self.probability, self.scale = probability, scale
        self.slice_column, self.slice_names = slice_column, tuple(slice_rates or ())
        self.rates_ST = np.array([[self._rate(r, t) for t in self.tasks] for r in ((slice_rates or {}).values())])
        self.rates_ST = np.vstack(
            [self.rates_ST.reshape(-1, len(self.tasks)), [self._rate(rates, t) for t in self.tasks]]
        )
        if probability is not None and correction == "logit":
            raise ConfigError(
                f"sampling: rows kept by column {probability} need correction: weights, since no shift of the logit "
                "makes up for a probability that the model does not see"
            )

    def _rate(self, rates: Mapping[str, float], task: str) -> float:
        rate = rates.get(task)
        if rate is None or not 0 < rate <= 1:
            raise ConfigError(f"sampling: the rate of task {task}'s negatives must be in (0, 1], got {rate}")
        return rate

    @property
    def columns(self) -> tuple[str, ...]:
        """What decides on a row, each column once."""
        others = [c for c in (self.slice_column, self.probability) if c is not None]
        return tuple(dict.fromkeys([*(t.source for t in self.schema.tasks), *others, *self.key]))

    @property
    def offsets_ST(self) -> np.ndarray:
        """What the loss adds to the logits of each slice (the last one: all other rows) and task."""
        return -np.log(self.rates_ST) if self.correction == "logit" else np.zeros_like(self.rates_ST)

    def decide(self, table: pa.Table, place: Place, stream: int) -> Decision:
        """
        Args:
            table: consecutive rows of a file, with `columns`.
            stream: a number of the file (`streams_of`).

        Raises:
            DataError: a label that is not 0, 1 or null; a probability that is none.
        """
        sources = [task.source for task in self.schema.tasks]
        labels_nT = np.stack([_label(_plain_array(table.column(c)), c, place) for c in sources], 1)
        slices = self._slices(table, place)
        pi_nT = np.where(labels_nT == 1, 1.0, np.where(labels_nT == 0, self.rates_ST[slices], 0.0))
        pi = pi_nT.max(1)
        if self.probability is not None:
            pi = pi * self._own(_plain_array(table.column(self.probability)), place)
        u = self._uniform(table, place.first_row, stream)
        kept = u < pi
        if self.correction == "weights":
            return Decision(kept, slices, labels_nT, factors=1.0 / np.where(kept, pi, 1.0))
        return Decision(kept, slices, labels_nT, counts=u[:, None] < pi_nT)

    def _uniform(self, table: pa.Table, first_row: int, stream: int) -> np.ndarray:
        start = mix64(np.array([self.seed], np.uint64) + GOLDEN)
        if self.key:
            names = hash_rows(table, self.key)
        else:
            names = np.arange(first_row, first_row + table.num_rows, dtype=np.uint64) * GOLDEN
            names = mix64(names ^ mix64(np.array([stream], np.uint64)))
        return (mix64(names + start) >> np.uint64(11)) * 2.0**-53

    def _slices(self, table: pa.Table, place: Place) -> np.ndarray:
        """The index of each row's slice; the last one stands for all values without rates of their own."""
        others = len(self.slice_names)
        if self.slice_column is None:
            return np.zeros(table.num_rows, np.int64)
        column = _plain_array(table.column(self.slice_column))
        column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        try:
            values = pa.array(self.slice_names, pa.string()).cast(column.type)
        except pa.ArrowException as error:
            raise DataError(
                f"{place.file}: column {self.slice_column} is {column.type}, and the slices of data.sampling are "
                f"{', '.join(self.slice_names)} ({error}); write them as values of the column"
            ) from None
        return (
            pc.call_function("index_in", [column], pc.SetLookupOptions(values))
            .fill_null(others)
            .to_numpy(zero_copy_only=False)
            .astype(np.int64)
        )

    def _own(self, column: pa.Array, place: Place) -> np.ndarray:
        values = _floats(column)
        right = (values >= 0) & (values < np.inf)
        if not right.all():
            at = int(np.argmin(right))
            remedy = "write the probability with which the row shall be kept (times data.sampling.probability.scale)"
            place.fail(at, str(self.probability), column[at], "a finite number >= 0", remedy)
        return np.minimum(1.0, self.scale * values)

    def apply(self, rows: Rows, decision: Decision) -> Rows:
        """The kept rows with their weights, or with their offsets and the labels that count."""
        if decision.factors is not None:
            return replace(rows, weights=rows.weights * decision.factors[decision.kept].astype(np.float32))
        assert decision.counts is not None, decision
        labels = np.where(decision.counts[decision.kept], rows.labels, np.float32(np.nan))
        return replace(rows, labels=labels, offsets=self.offsets_ST.astype(np.float32)[decision.slices[decision.kept]])


def streams_of(source: ParquetSource) -> list[int]:
    """A number per file: a hash of its name without folders, so that a log may be moved; equal ones are told apart."""
    seen: dict[str, int] = {}
    found = []
    for file in source.files:
        name = file.rsplit("/", 1)[-1]
        seen[name] = seen.get(name, 0) + 1
        found.append(hash_string(f"{name} {seen[name]}") & (2**64 - 1))
    return found


@dataclass(frozen=True)
class KeptRows:
    """What a sampler keeps of a source.

    Attributes:
        per_chunk: rows of each chunk, in the order of the files.
        labels: [S, T, 2, 2] number of labels by slice (the last one: all other rows), task, label (0, 1), and (in the
            log, that count in the loss).
    """

    per_chunk: np.ndarray
    labels: np.ndarray

    @property
    def total(self) -> int:
        return int(self.per_chunk.sum())

    def mean_offsets(self, sampler: RowSampler) -> np.ndarray:
        """[T], over the labels that count."""
        counted_ST = self.labels[..., 1].sum(2)
        return (sampler.offsets_ST * counted_ST).sum(0) / np.maximum(1, counted_ST.sum(0))


def chunks_of(source: ParquetSource) -> list[Chunk]:
    """All chunks in the order of the files."""
    return [chunk for group in source.row_groups for chunk in source.chunks(group)]


def count_kept(
    source: ParquetSource,
    sampler: RowSampler,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> KeptRows:
    """One pass over the columns that decide. Of several processes each counts its share of the row groups and leaves
    zeros for the others: the sum over all processes is the whole.

    Raises:
        DataError: a value that cannot be right, or a damaged file.
        SchemaError: a column that is missing.
    """
    source.check(sampler.columns)
    groups = len(source.row_groups)
    mine = {id(g) for g in source.row_groups[groups * rank // world_size : groups * (rank + 1) // world_size]}
    chunks, streams = chunks_of(source), streams_of(source)
    per_chunk = np.zeros(len(chunks), np.int64)
    labels = np.zeros((*sampler.rates_ST.shape, 2, 2), np.int64)
    done, all_rows = 0, sum(c.num_rows for c in chunks if id(c.group) in mine)
    with TableReader(source, sampler.columns) as tables:
        for i, chunk in enumerate(chunks):
            if id(chunk.group) not in mine:
                continue
            table = tables.plan(chunk, lane=0)()
            place = Place(source.files[chunk.group.file], chunk.group.index, chunk.first_row)
            decision = sampler.decide(table, place, streams[chunk.group.file])
            per_chunk[i] = decision.kept.sum()
            _tally(labels, decision)
            done += chunk.num_rows
            if progress:
                progress(done, all_rows)
    return KeptRows(per_chunk, labels)


def _tally(labels: np.ndarray, decision: Decision) -> None:
    """Adds the rows of a decision to `KeptRows.labels`."""
    counts_nT = np.broadcast_to(decision.kept[:, None], decision.labels.shape)
    counts_nT = counts_nT if decision.counts is None else counts_nT & decision.counts
    for t in range(labels.shape[1]):
        for label in (0, 1):
            chosen = decision.labels[:, t] == label
            labels[:, t, label, 0] += np.bincount(decision.slices[chosen], minlength=len(labels))
            chosen &= counts_nT[:, t]
            labels[:, t, label, 1] += np.bincount(decision.slices[chosen], minlength=len(labels))
