"""Parquet files -> batches, in an order that is the same for any number of processes and can be entered at any step.

::

    row groups --sample, decode own rows--> chunks (Rows) --cut, permute--> blocks (Rows) --put together--> Batch

`order.py` decides which rows; the work is done ahead by threads, on whichever the order does not depend. With a sampler
the order is one of the rows that it keeps, which are counted beforehand; what it leaves out is never decoded.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from hmoe_rec.data.columns import Place, to_rows
from hmoe_rec.data.order import MAX_LANES, FileOrder, LaneOrder, Pieces, Take, default_lanes, group_order
from hmoe_rec.data.rows import Layout, Rows, join, offsets_of
from hmoe_rec.data.sampling import KeptRows, RowSampler, chunks_of, count_kept, streams_of
from hmoe_rec.data.source import OPEN_FILES, Chunk, ParquetSource, TableReader
from hmoe_rec.types import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from hmoe_rec.batch import Batch

__all__ = ["BatchReader", "ParquetSource"]

BATCHES_AHEAD = 2
T = TypeVar("T")


class BatchReader:
    """This rank's part of every global batch.

    The position in the data is (epoch, step) and nothing else: `reader.epoch(epoch, start_step)` goes on exactly where
    a run stopped, on any number of processes. Their parts of a batch differ by one row at most.

    Args:
        global_batch_size: B over all ranks; the last batch of an epoch may be smaller, a rank's part of it empty:
            `Batch.filled` makes the parts equal.
        shuffle: row groups in a random order, distant rows side by side, permuted in blocks (LaneOrder); False: rows in
            the order of the files.
        seed: of the shuffle; with the same seed an epoch has the same order everywhere.
        lanes: distant places a batch draws from, on which the order depends; `default_lanes` where not given. Memory
            holds about one chunk per lane that the rank has rows of.
        shuffle_rows: rows, over all lanes, that are permuted together.
        num_workers: threads that decode ahead; 0 = none, all is done when a batch is asked for.
        drop_last: no last batch smaller than B.
        with_labels: False: labels are NaN, weights 1, groups 0, and their columns need not exist.
        carry: columns that come along as an Arrow table; `epoch` then gives pairs (Batch, table).
        sampler: which rows of the source are read; None = all.
        kept: what the sampler keeps of the source; counted here where not given.
        exposures: column with the number of earlier exposures, for `Batch.exposures`.

    Raises:
        ConfigError: a number out of its range.
        DataError: the sampler keeps no row.
        SchemaError: a column that is needed is missing, or of a type that does not fit.
    """

    def __init__(
        self,
        source: ParquetSource,
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        lanes: int | None = None,
        shuffle_rows: int = 65536,
        num_workers: int = 1,
        drop_last: bool = False,
        with_labels: bool = True,
        carry: Sequence[str] = (),
        sampler: RowSampler | None = None,
        kept: KeptRows | None = None,
        exposures: str | None = None,
    ):
        _check_at_least(1, global_batch_size=global_batch_size, world_size=world_size, shuffle_rows=shuffle_rows)
        lanes = default_lanes(global_batch_size) if lanes is None else lanes
        _check_at_least(1, lanes=lanes)
        _check_at_least(0, rank=rank, num_workers=num_workers)
        if rank >= world_size:
            raise ConfigError(f"rank: expected less than world_size ({world_size}), got {rank}")
        counted = () if exposures is None else (exposures,)
        columns: dict[str, None] = dict.fromkeys((*source.schema.read_columns(with_labels), *carry, *counted))
        source.check(tuple(columns))
        self.sampler, self.exposures, self._streams = sampler, exposures, streams_of(source)
        self.kept = None if sampler is None else kept or count_kept(source, sampler)
        self._rows: dict[tuple[int, int, int], int] = {}
        if sampler is not None and self.kept is not None:
            if not self.kept.total:
                raise DataError(f"{source.files[0]}, ...: data.sampling keeps none of {source.num_rows} rows")
            self._rows = dict(zip(map(_name, chunks_of(source)), self.kept.per_chunk.tolist(), strict=True))
            columns |= dict.fromkeys(sampler.columns)
        self.source, self.layout = source, Layout(source.schema)
        self.num_workers, self.with_labels = num_workers, with_labels
        self.carry = source.arrow_schema(tuple(carry)) if carry else None
        self._columns, self._shuffle, self._seed = tuple(columns), shuffle, seed
        self._split: dict[str, Any] = dict(rank=rank, world_size=world_size, drop_last=drop_last)
        self._batch_size, self._lanes, self._shuffle_rows = global_batch_size, lanes, shuffle_rows

    @property
    def num_rows(self) -> int:
        """Rows of an epoch over all ranks."""
        return self.source.num_rows if self.kept is None else self.kept.total

    @property
    def lanes(self) -> int | None:
        """Lanes of the order; None where rows come in the order of the files."""
        return self._lanes if self._shuffle else None

    def use_lanes(self, lanes: int) -> None:
        """Takes the order of a run that was begun with so many lanes."""
        _check_at_least(1, lanes=lanes)
        self._lanes = lanes

    def rows_of(self, chunk: Chunk) -> int:
        """Rows of a chunk that are read."""
        return chunk.num_rows if self.kept is None else self._rows[_name(chunk)]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return self._order(0).num_steps

    def rows_until(self, step: int) -> int:
        """Rows over all ranks of the first `step` steps, over the ends of epochs."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        per_epoch = min(self.steps_per_epoch * self._batch_size, self.num_rows)
        return epochs * per_epoch + min(rest * self._batch_size, self.num_rows)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Any]:
        """The batches of an epoch from a step on; with `carry`, pairs (Batch, pyarrow.Table).

        Close the iterator to end its threads before its end.

        Raises:
            DataError: at the step whose rows hold the value that cannot be right.
        """
        from hmoe_rec.data.batching import make_batch

        order = self._order(epoch)
        with ExitStack() as stack:
            open_files = max(OPEN_FILES, min(MAX_LANES, self.lanes or 1))
            tables = stack.enter_context(TableReader(self.source, self._columns, open_files=open_files))
            submit = _start_workers(stack, self.num_workers)
            blocks = _Blocks(self, order, epoch, tables, submit)
            batches: dict[int, _Lazy[tuple[Batch, Any]]] = {}

            def plan(step: int) -> "_Lazy[tuple[Batch, Any]]":
                parts = [(blocks.of(take), take) for take in order.takes(step)]
                make = partial(make_batch, layout=self.layout, share=order.largest_share(step))
                return _Lazy(lambda: self._assemble([b.get().cut(t.start, t.stop) for b, t in parts], make))

            ahead = BATCHES_AHEAD if self.num_workers else 0
            for step in range(start_step, order.num_steps):
                for later in range(step, min(step + ahead + 1, order.num_steps)):
                    if later not in batches:
                        batches[later] = plan(later)
                        submit(batches[later].get)
                blocks.prefetch(step + ahead + 1)
                batch, table = batches.pop(step).get()
                yield batch if self.carry is None else (batch, table)

    def _assemble(self, parts: list[Rows], make: Callable[[list[Rows]], "Batch"]) -> "tuple[Batch, Any]":
        batch = make(parts)
        if self.carry is None:
            return batch, None
        import pyarrow as pa

        tables = [p.carry for p in parts if p.carry is not None]
        return batch, pa.concat_tables(tables) if tables else self.carry.empty_table()

    def _order(self, epoch: int) -> FileOrder | LaneOrder:
        if not self._shuffle:
            return FileOrder(self.num_rows, self._batch_size, **self._split)
        block_rows = max(1, self._shuffle_rows // self._lanes)
        shuffled = dict(lanes=self._lanes, block_rows=block_rows, seed=self._seed, epoch=epoch)
        return LaneOrder(self.num_rows, self._batch_size, **shuffled, **self._split)

    def _chunks(self, epoch: int) -> list[Chunk]:
        groups = self.source.row_groups
        order = group_order(len(groups), seed=self._seed, epoch=epoch, shuffle=self._shuffle)
        return [chunk for i in order for chunk in self.source.chunks(groups[i])]


class _Blocks:
    """The blocks of an epoch, each made once, by whichever thread needs it first, and forgotten after its last row.

    A lane holds on to the chunk that its next block begins in; lanes in the same chunk share it.
    """

    def __init__(
        self,
        reader: BatchReader,
        order: FileOrder | LaneOrder,
        epoch: int,
        tables: TableReader,
        submit: Callable[[Callable[[], Any]], None],
    ):
        self._reader, self._order, self._tables, self._submit = reader, order, tables, submit
        self._chunk_list = reader._chunks(epoch)
        self._pieces = Pieces([reader.rows_of(chunk) for chunk in self._chunk_list])
        self._blocks: dict[tuple[int, int], _Lazy[Rows]] = {}
        self._chunks: WeakValueDictionary[int, _Lazy[_OwnRows]] = WeakValueDictionary()
        self._held: dict[int, dict[int, _Lazy[_OwnRows]]] = {}
        self._planned_to = 0

    def of(self, take: Take) -> "_Lazy[Rows]":
        """The block of a take, which is forgotten with its last row."""
        key = take.lane, take.block
        block = self._blocks.get(key) or self._plan(*key)
        if take.stop == take.size:
            del self._blocks[key]
        return block

    def prefetch(self, step: int) -> None:
        """Starts the blocks of the steps from `step` on, as many as the order says."""
        if not self._reader.num_workers:
            return
        end = min(step + self._order.steps_ahead, self._order.num_steps)
        for later in range(max(step, self._planned_to), end):
            for take in self._order.takes(later):
                if (take.lane, take.block) not in self._blocks:
                    self._plan(take.lane, take.block)
        self._planned_to = max(self._planned_to, end)

    def _plan(self, lane: int, number: int) -> "_Lazy[Rows]":
        start, stop = self._order.span(lane, number)
        pieces = self._pieces.of(start, stop)
        held = self._held.get(lane, {})
        chunks = {i: held.get(i) or self._chunk(i, lane) for i, _, _ in pieces}
        self._held[lane] = {i: chunk for i, chunk in chunks.items() if self._pieces.end(i) > stop}

        def make() -> Rows:
            rows = join([chunks[i].get().cut(first, end) for i, first, end in pieces])
            picks = self._order.picks(lane, number)
            return rows if picks is None else rows.take(picks if len(picks) == stop - start else _ranks(picks))

        block = self._blocks[lane, number] = _Lazy(make)
        self._submit(block.get)
        return block

    def _chunk(self, index: int, lane: int) -> "_Lazy[_OwnRows]":
        found = self._chunks.get(index)
        if found is None:
            chunk = self._chunk_list[index]
            read = self._tables.plan(chunk, lane)
            start, stop = self._pieces.starts[index], self._pieces.end(index)

            def make() -> _OwnRows:
                wanted = self._order.wanted(start, stop)
                wanted = None if wanted is None or wanted.all() else wanted
                rows = self._decode(chunk, read(), None if wanted is None else np.flatnonzero(wanted))
                return _OwnRows(rows, None if wanted is None else offsets_of(wanted))

            found = self._chunks[index] = _Lazy(make)
        return found

    def _decode(self, chunk: Chunk, table: "pa.Table", wanted: np.ndarray | None) -> Rows:
        """wanted: of the chunk's rows that are read; None: all."""
        reader = self._reader
        place = Place(reader.source.files[chunk.group.file], chunk.group.index, chunk.first_row)
        options: dict[str, Any] = dict(with_labels=reader.with_labels, exposures=reader.exposures, carry=reader.carry)
        if reader.sampler is None:
            if wanted is None:
                return to_rows(table, reader.layout, place, **options)
            return to_rows(table.take(wanted), reader.layout, replace(place, chosen=wanted), **options)
        decision = reader.sampler.decide(table, place, reader._streams[chunk.group.file])
        chosen = np.flatnonzero(decision.kept)
        if len(chosen) != reader.rows_of(chunk):
            raise DataError(
                f"{place.file}, row group {place.row_group}: changed since its rows were counted; start again"
            )
        rows = to_rows(table.take(chosen), reader.layout, replace(place, chosen=chosen), **options)
        rows = reader.sampler.apply(rows, decision)
        return rows if wanted is None else rows.take(wanted)


class _OwnRows:
    """The rows of a chunk that this rank takes, found by the numbers that they have among all of it.

    Args:
        before: [rows of the chunk + 1] how many of the rank's come before each; None: all are the rank's.
    """

    def __init__(self, rows: Rows, before: np.ndarray | None) -> None:
        self.rows, self.before = rows, before

    def cut(self, start: int, stop: int) -> Rows:
        """Of rows [start, stop) of the chunk those of this rank."""
        return self.rows.cut(*((start, stop) if self.before is None else self.before[[start, stop]].tolist()))


class _Lazy(Generic[T]):
    """A value that is made once, by whichever thread asks first. What goes wrong is raised to everyone who asks."""

    def __init__(self, make: Callable[[], T]):
        self._make: Callable[[], T] | None = make
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def get(self) -> T:
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._make is not None:
                try:
                    self._value = self._make()
                except Exception as error:
                    self._error = error
                    raise
                self._make = None  # lets go of what the value was made from
            return self._value


def _start_workers(stack: ExitStack, num_workers: int) -> Callable[[Callable[[], Any]], None]:
    """A function that has others done by the workers, in order; their errors come up where the value is asked for."""
    if not num_workers:
        return lambda work: None
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="hmoe-data")
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)

    def submit(work: Callable[[], Any]) -> None:
        pool.submit(work)

    return submit


def _ranks(numbers: np.ndarray) -> np.ndarray:
    """Distinct numbers -> the place of each among them in ascending order."""
    places = np.empty_like(numbers)
    places[np.argsort(numbers)] = np.arange(len(numbers))
    return places


def _name(chunk: Chunk) -> tuple[int, int, int]:
    return chunk.group.file, chunk.group.index, chunk.offset


def _check_at_least(low: int, **given: int) -> None:
    for name, value in given.items():
        if value < low:
            raise ConfigError(f"{name}: expected at least {low}, got {value}")
