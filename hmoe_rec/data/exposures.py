"""How often a user was shown an item before: counted over a log in the order of time, in one pass, and from day to day.

::

    Parquet files in the order of time  --ExposureCounter-->  the same files with one more column, and a state
    tomorrow's files and the state      --------------------> go on counting

A *key* is what is counted: the values of some columns (user and item), as one 64-bit hash. Any two of n keys share a
hash with probability n^2 / 2^65: three in a hundred for a billion keys. What is kept of a key is its hash and its
number, 12 bytes (and about 45 for a moment, while two runs are merged); `SketchCounter` keeps a fixed number of bytes
instead, and may count too many.

The column says how many rows before a row, in the order of files and rows, have its key: 0 for the first exposure.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hmoe_rec import io
from hmoe_rec.data import fit
from hmoe_rec.data.columns import Place, _exposures, _label, _plain_array
from hmoe_rec.data.hashing import GOLDEN, hash_rows, hash_string, mix64
from hmoe_rec.data.schema import Schema
from hmoe_rec.data.source import ParquetSource, TableReader, find_files, open_file, read_footer
from hmoe_rec.object_store import StorageError
from hmoe_rec.progress import Progress
from hmoe_rec.types import ConfigError, DataError, SchemaError

STATE = "_exposures.parquet"  # a leading "_": nobody takes it for a part of the log
VERSION = 1
BLOCK_ROWS = 1 << 17
STRATA = 1 << 16  # strata of `exposure_counts` are hashed into so many


class Counter(Protocol):
    """Keys in the order of time -> how often each was there before."""

    def count(self, keys: np.ndarray) -> np.ndarray:
        """[n] uint64 -> [n] int64: earlier ones of the same key, of this call and all before. Adds them."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """The state as columns of equal length."""
        ...


class ExposureCounter:
    """Exact; 12 bytes a key.

    Keys and numbers lie in sorted runs, each at least twice as long as the next, so that a key is moved about log2(n)
    times over n keys and looked up in as many runs.
    """

    def __init__(self, keys: np.ndarray | None = None, counts: np.ndarray | None = None) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        if keys is not None and counts is not None and len(keys):
            self._runs.append((keys.astype(np.uint64), counts.astype(np.uint32)))

    @property
    def num_keys(self) -> int:
        """Distinct keys seen; merges the runs."""
        return len(self.arrays()["key"])

    def count(self, keys: np.ndarray) -> np.ndarray:
        distinct, inverse, times = np.unique(keys, return_inverse=True, return_counts=True)
        before = np.zeros(len(distinct), np.int64)
        for known, counts in self._runs:
            at = np.searchsorted(known, distinct)
            at[at == len(known)] = 0
            found = known[at] == distinct
            before[found] += counts[at[found]]
        self._add(distinct, times.astype(np.uint32))
        return before[inverse] + _earlier(inverse, times)

    def _add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        if len(keys):
            self._runs.append((keys, counts))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            self._runs.append(_merged(self._runs.pop(), self._runs.pop()))

    def arrays(self) -> dict[str, np.ndarray]:
        while len(self._runs) > 1:
            self._runs.append(_merged(self._runs.pop(), self._runs.pop()))
        keys, counts = self._runs[0] if self._runs else (np.empty(0, np.uint64), np.empty(0, np.uint32))
        return {"key": keys, "count": counts}


class SketchCounter:
    """A count-min sketch (Cormode and Muthukrishnan, 2005): `depth` x `width` numbers of 4 bytes, whatever the keys.

    Never counts too few. After n exposures a key is counted too high by more than 2 n / width with probability at most
    2^-depth.

    Args:
        width: numbers of a row, a power of 2.
        depth: rows.
    """

    def __init__(self, width: int, depth: int = 4, table: np.ndarray | None = None) -> None:
        if width < 2 or width & (width - 1) or depth < 1:
            raise ConfigError(f"a sketch has a width that is a power of 2 and depth >= 1, got {width} and {depth}")
        self.table = np.zeros((depth, width), np.uint32) if table is None else table.reshape(depth, width)

    def count(self, keys: np.ndarray) -> np.ndarray:
        distinct, inverse, times = np.unique(keys, return_inverse=True, return_counts=True)
        depth, width = self.table.shape
        before = np.full(len(distinct), np.iinfo(np.uint32).max, np.uint32)
        salts = np.arange(1, depth + 1, dtype=np.uint64) * GOLDEN
        for row in range(depth):
            slots = (mix64(distinct + salts[row]) & np.uint64(width - 1)).astype(np.int64)
            np.minimum(before, self.table[row][slots], out=before)
            np.add.at(self.table[row], slots, times.astype(np.uint32))
        return before.astype(np.int64)[inverse] + _earlier(inverse, times)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"count": self.table.reshape(-1)}


def _earlier(inverse: np.ndarray, times: np.ndarray) -> np.ndarray:
    """How many of each element's equals stand before it."""
    order = np.argsort(inverse, kind="stable")
    starts = np.cumsum(times) - times
    earlier = np.empty(len(inverse), np.int64)
    earlier[order] = np.arange(len(inverse)) - np.repeat(starts, times)
    return earlier


def _merged(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Two sorted runs as one; uses up the longer one."""
    (few, few_counts), (keys, counts) = sorted([one, other], key=lambda run: len(run[0]))
    at = np.searchsorted(keys, few)
    known = keys[np.minimum(at, len(keys) - 1)] == few
    counts[at[known]] += few_counts[known]
    return np.insert(keys, at[~known], few[~known]), np.insert(counts, at[~known], few_counts[~known])


# ------------------------------------------------------------------------------------------------------------ the tool


@dataclass
class CountState:
    """What is known after some files.

    Attributes:
        keys: the columns that make a key.
        files: name -> fingerprint of the files that were counted, in their order.
        last_time: the largest time so far; None = no time column, or no row yet.
    """

    keys: tuple[str, ...]
    counter: Counter
    files: dict[str, str] = field(default_factory=dict)
    last_time: int | None = None


@dataclass(frozen=True)
class Counted:
    """Attributes: files: what was written. rows: in them. skipped: files that were counted before. state: its URI."""

    files: tuple[str, ...]
    rows: int
    skipped: int
    state: str


def count_exposures(
    uris: str | Sequence[str],
    keys: Sequence[str],
    out: str,
    *,
    column: str = "shown_before",
    time: str | None = None,
    state: str | None = None,
    sketch_width: int | None = None,
    save_rows: int = 20_000_000,
    progress: Progress | None = None,
) -> Counted:
    """Writes every file again under `out`, with one more column: how often the row's key was there before.

    A file has its name only when it is complete. The state is saved, in one atomic step, after every `save_rows` rows
    and at the end; a call that is cut short is simply made again: files that the saved state does not know are counted
    from it anew, with the same result. Later calls go on with the files that are new; those that were counted may be
    named again, before the new ones, and are skipped.

    Args:
        uris: files, directories or patterns, in the order of time; inside a directory or pattern in that of the names.
        keys: columns that make a key, such as user_id and item_id; nulls are a value.
        out: a directory; files lie in it as below the directory or pattern that was given.
        time: column to check the order by: integers, timestamps or dates that never fall from row to row.
        state: URI of the state; `out`/_exposures.parquet where not given.
        sketch_width: count in a `SketchCounter` of this width; None = exactly.

    Raises:
        DataError: rows that are not in the order of time, a late file, a changed one, or no file.
        SchemaError: a column that is missing or cannot be a key.
    """
    names = _names([uris] if isinstance(uris, str) else uris)
    state = state or io.join(out, STATE)
    known = read_state(state, keys, sketch_width)
    new = _new_files(names, known)
    total = sum(read_footer(file).num_rows for file in new)
    done = unsaved = 0
    written, is_saved = [], True
    for file in new:
        target = io.join(out, names[file])
        _check_target(file, target)
        for rows in _write(file, target, column, time, known):
            done, unsaved = done + rows, unsaved + rows
            if progress:
                progress(done, total)
        written.append(target)
        known.files[names[file]] = _print_of(file)
        is_saved = unsaved >= save_rows
        if is_saved:
            write_state(state, known)
            unsaved = 0
    if not is_saved:
        write_state(state, known)
    return Counted(tuple(written), done, len(names) - len(new), state)


def _names(uris: Sequence[str]) -> dict[str, str]:
    """File -> its path below the directory that was given, or below the fixed part of a pattern.

    Raises:
        DataError: two files of one name, or no file.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for uri in uris:
        parts = uri.split("/")
        fixed = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts))
        root = uri if fixed == len(parts) and not io.isfile(uri) else "/".join(parts[: min(fixed, len(parts) - 1)])
        depth = len([p for p in io.filesystem(root or ".")[1].split("/") if p])
        for file in find_files(uri):
            name = "/".join([p for p in io.filesystem(file)[1].split("/") if p][depth:])
            if name in taken:
                raise DataError(f"{file}: there is another file {name}; give the directory that holds both")
            names[file] = name
            taken.add(name)
    return names


def _print_of(file: str) -> str:
    """A hash of the footer: other rows, other statistics and places."""
    return f"{hash_string(json.dumps(read_footer(file).to_dict(), default=str)) & (2**64 - 1):016x}"


def _new_files(names: dict[str, str], known: CountState) -> list[str]:
    new: list[str] = []
    for file, name in names.items():
        if name not in known.files:
            new.append(file)
        elif known.files[name] != _print_of(file):
            raise DataError(
                f"{file}: is not the {name} that was counted; give another one another name, or count anew with "
                "another state"
            )
        elif new:
            raise DataError(
                f"{new[0]}: comes before {name}, which was counted already; exposures are counted in the order of "
                "time: name it so that it comes later, or count anew with another state"
            )
    return new


def _check_target(file: str, target: str) -> None:
    if io.filesystem(file) == io.filesystem(target):
        raise DataError(f"--out: {target} is the file that is read; give another directory")


def _write(file: str, target: str, column: str, time: str | None, known: CountState) -> Iterator[int]:
    """Writes one file, row group by row group; yields the rows of each. A failure leaves nothing under its name."""
    io.mkdirs(target.rpartition("/")[0] or ".")
    with open_file(file) as source:
        _check_columns(file, source.schema_arrow, (*known.keys, *([time] if time else [])), column)
        schema = source.schema_arrow.append(pa.field(column, pa.int32()))
        try:
            with (
                io.replacing(target, "wb") as stream,
                pq.ParquetWriter(stream, schema, compression="zstd") as writer,
            ):
                first = 0
                for group in range(source.metadata.num_row_groups):
                    for batch in source.iter_batches(BLOCK_ROWS, row_groups=[group], use_threads=False):
                        table = pa.Table.from_batches([batch])
                        if time:
                            known.last_time = _checked_time(table.column(time), known.last_time, file, first, time)
                        counts = known.counter.count(hash_rows(table, known.keys))
                        counts = np.minimum(counts, np.iinfo(np.int32).max).astype(np.int32)
                        writer.write_table(table.append_column(column, pa.array(counts)))
                        first += table.num_rows
                        yield table.num_rows
        except OSError as error:
            raise DataError(f"{target}: cannot be written ({error.strerror or error})") from error


def _check_columns(file: str, found: pa.Schema, needed: Sequence[str], column: str) -> None:
    missing = [c for c in needed if c not in found.names]
    if missing:
        raise SchemaError(f"{file}: column {missing[0]}: missing; there are: {', '.join(found.names)}")
    if column in found.names:
        raise SchemaError(f"{file}: column {column} is there already; name another one with --column")


def _checked_time(times: pa.ChunkedArray, last: int | None, file: str, first: int, name: str) -> int | None:
    kind = fit.plain(times.type)
    is_time = pa.types.is_timestamp(kind) or pa.types.is_date(kind)
    if not (is_time or pa.types.is_integer(kind)):
        raise SchemaError(f"{file}: column {name}: is {times.type}; expected integers, timestamps or dates")
    if is_time:
        times = times.cast(pa.timestamp("us"), safe=False)
    values = _plain_array(times.cast(pa.int64()))
    if values.null_count:
        raise DataError(f"{file}, column {name}: a row without a time; exposures are counted in the order of time")
    numbers = values.to_numpy(zero_copy_only=False)
    if not len(numbers):
        return last
    before = np.concatenate([[numbers[0] if last is None else last], numbers[:-1]])
    falls = numbers < before
    if falls.any():
        at = int(np.argmax(falls))
        raise DataError(
            f"{file}, row {first + at}, column {name}: {numbers[at]} after {before[at]}; expected rows in the order of "
            "time: sort them, or give the files in order"
        )
    return int(numbers[-1])


def read_state(uri: str, keys: Sequence[str], sketch_width: int | None = None) -> CountState:
    """The state at `uri`, or a new one.

    Raises:
        DataError: it was made with other keys or another counter, or is no state.
    """
    if not io.exists(uri):
        counter = ExposureCounter() if sketch_width is None else SketchCounter(sketch_width)
        return CountState(tuple(keys), counter)
    try:
        with io.open(uri, "rb") as file:
            table = pq.read_table(file)
        meta = json.loads((table.schema.metadata or {})[b"hmoe_rec.exposures"])
    except StorageError as refused:
        raise DataError(str(refused)) from refused
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(f"{uri}: not a state of counted exposures ({error}); remove it, or name another") from error
    wanted = {"version": VERSION, "keys": list(keys), "sketch_width": sketch_width}
    differing = [
        f"{name} was {meta.get(name)} and is {value}" for name, value in wanted.items() if meta.get(name) != value
    ]
    if differing:
        raise DataError(f"{uri}: {'; '.join(differing)}; count anew with another state")
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    if sketch_width is None:
        counter: Counter = ExposureCounter(columns["key"], columns["count"])
    else:
        counter = SketchCounter(sketch_width, meta["depth"], columns["count"].copy())
    return CountState(tuple(keys), counter, meta["files"], meta["last_time"])


def write_state(uri: str, state: CountState) -> None:
    """In one atomic step."""
    counter = state.counter
    meta: dict[str, Any] = {"version": VERSION, "keys": list(state.keys), "files": state.files}
    meta |= {"last_time": state.last_time, "sketch_width": None}
    if isinstance(counter, SketchCounter):
        meta |= {"sketch_width": counter.table.shape[1], "depth": counter.table.shape[0]}
    table = pa.table({name: pa.array(values) for name, values in counter.arrays().items()})
    table = table.replace_schema_metadata({"hmoe_rec.exposures": json.dumps(meta)})
    io.mkdirs(uri.rpartition("/")[0] or ".")
    with io.replacing(uri, "wb") as stream:
        pq.write_table(table, stream, compression="zstd")


# ---------------------------------------------------------------------------------------------- what a log says of them


def exposure_counts(
    source: ParquetSource,
    schema: Schema,
    column: str,
    *,
    strata: Sequence[str] = (),
    max_exposures: int = 20,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> np.ndarray:
    """Labelled and positive rows by stratum, task and exposure: [2, T, S, K], K = max_exposures (the last: and more).

    One pass over the columns that are needed. Of several processes each reads its share of the row groups: the sum over
    all is the whole. Strata are hashed into at most 65,536.

    Raises:
        DataError: a number of exposures that is none, or a damaged file.
        SchemaError: a column that is missing, or cannot be a stratum.
    """
    columns = tuple(dict.fromkeys([*(t.source for t in schema.tasks), column, *strata]))
    source.check(columns)
    groups = len(source.row_groups)
    mine = source.row_groups[groups * rank // world_size : groups * (rank + 1) // world_size]
    num_strata, num_tasks = STRATA if strata else 1, len(schema.tasks)
    counts = np.zeros((2, num_tasks, num_strata * max_exposures), np.int64)
    done, total = 0, sum(group.num_rows for group in mine)
    with TableReader(source, columns) as tables:
        for chunk in (chunk for group in mine for chunk in source.chunks(group)):
            table = tables.plan(chunk, lane=0)()
            place = Place(source.files[chunk.group.file], chunk.group.index, chunk.first_row)
            earlier = _exposures(_plain_array(table.column(column)), column, place)
            cells = np.minimum(earlier, max_exposures - 1).astype(np.int64)
            if strata:
                cells += (hash_rows(table, strata) % np.uint64(num_strata)).astype(np.int64) * max_exposures
            for t, task in enumerate(schema.tasks):
                labels = _label(_plain_array(table.column(task.source)), task.source, place)
                counts[0, t] += np.bincount(cells[~np.isnan(labels)], minlength=counts.shape[2])
                counts[1, t] += np.bincount(cells[labels == 1], minlength=counts.shape[2])
            done += chunk.num_rows
            if progress:
                progress(done, total)
    return counts.reshape(2, num_tasks, num_strata, max_exposures)
