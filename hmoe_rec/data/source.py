"""URIs of Parquet files -> their row groups, checked against a schema; and the tables read from them.

What a reader reads at once is a *chunk*: a row group, or, where row groups are larger than MAX_GROUP_ROWS, a run of
CHUNK_ROWS rows of one, which is then streamed. Row groups of 50,000 to 250,000 rows suit this best.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hmoe_rec import io
from hmoe_rec.data import fit
from hmoe_rec.data.schema import Schema
from hmoe_rec.object_store import StorageError
from hmoe_rec.types import DataError, SchemaError

MAX_GROUP_ROWS = 1 << 18
CHUNK_ROWS = 1 << 16
OPEN_FILES = 16  # per thread, unless a reader asks for more


class Unreachable(DataError):
    """The source itself does not answer; nothing is wrong with its rows."""


@dataclass(frozen=True)
class RowGroup:
    """Attributes: file: index into the source's files. index: number in the file. first_row: its row in the file."""

    file: int
    index: int
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class Chunk:
    """Rows [offset, offset + num_rows) of a row group."""

    group: RowGroup
    offset: int
    num_rows: int

    @property
    def first_row(self) -> int:
        return self.group.first_row + self.offset

    @property
    def streamed(self) -> bool:
        return self.num_rows < self.group.num_rows


class ParquetSource:
    """Parquet files with one schema.

    Args:
        uri: a file, a directory (all *.parquet below it), a glob pattern, or a list of these; local or remote.
        columns: what must be there, such as `schema.read_columns(with_labels=False)` where there are no labels;
            all that the schema reads where not given.

    Raises:
        DataError: no such file, no Parquet file, a damaged file, no rows.
        SchemaError: with every missing column and every type that does not fit, of all files.
    """

    def __init__(self, uri: str | Sequence[str], schema: Schema, *, columns: Sequence[str] | None = None):
        self.schema = schema
        self.files = tuple(find_files(uri))
        with ThreadPoolExecutor(min(16, len(self.files))) as pool:
            footers = list(pool.map(read_footer, self.files))
        self.row_groups = tuple(group for i, footer in enumerate(footers) for group in _row_groups(i, footer))
        self.num_rows = sum(group.num_rows for group in self.row_groups)
        self._arrow_schemas = [footer.schema.to_arrow_schema() for footer in footers]
        self._all_null = {
            task.source for task in schema.tasks if self.num_rows and all(_all_null(f, task.source) for f in footers)
        }
        self.check(schema.read_columns() if columns is None else columns)
        if self.num_rows == 0:
            raise DataError(f"{', '.join(self.files[:3])}: 0 rows in {len(self.files)} file(s); expected at least one")

    def check(self, columns: Sequence[str]) -> None:
        """Raises a SchemaError unless every file has these columns in types that fit the schema."""
        problems: dict[str, list[str]] = {}
        for file, found in zip(self.files, self._arrow_schemas, strict=True):
            for problem in fit.misfits(found, self.schema, columns):
                problems.setdefault(problem, []).append(file)
        lines = [f"{_some(files)}: {problem}" for problem, files in problems.items()]
        lines += [
            f"{_some(self.files)}: column {c}: no row has a label; expected some 0 or 1; remove the task or fill it"
            for c in columns
            if c in self._all_null
        ]
        if lines:
            raise SchemaError("\n  ".join([f"the data does not fit the schema: {len(lines)} problem(s)", *lines]))

    def chunks(self, group: RowGroup) -> list[Chunk]:
        """The chunks of a row group, in order."""
        if group.num_rows <= MAX_GROUP_ROWS:
            return [Chunk(group, 0, group.num_rows)]
        starts = range(0, group.num_rows, CHUNK_ROWS)
        return [Chunk(group, start, min(CHUNK_ROWS, group.num_rows - start)) for start in starts]

    def arrow_schema(self, columns: Sequence[str]) -> pa.Schema:
        """The Arrow fields of some columns, wide enough for all files; dictionaries as what they stand for.

        Raises:
            SchemaError: a column whose types in two files have no common one.
        """
        found = self._arrow_schemas
        return pa.schema([(c, fit.common_type(c, [f.field(c).type for f in found])) for c in dict.fromkeys(columns)])

    def open(self, file: int) -> pq.ParquetFile:
        """The file, to read row groups from."""
        return open_file(self.files[file], self.text_columns(file))

    def text_columns(self, file: int) -> list[str]:
        """Leaf paths of string columns, which are read as dictionaries: each distinct value is hashed once."""
        found = self._arrow_schemas[file]
        hashed = [c.source for c in self.schema.ids if c.hashed]
        keys = [self.schema.user_key] if self.schema.user_key else []
        return [c for c in hashed + keys if c in found.names and fit.is_text(found.field(c).type)]


class TableReader:
    """Reads chunks; to be closed. One thread plans, any may read.

    Args:
        columns: columns of the tables.
        open_files: that a thread keeps open; fewer than the lanes read in turn would be opened again and again.
    """

    def __init__(self, source: ParquetSource, columns: Sequence[str], *, open_files: int = OPEN_FILES):
        self._source, self._columns, self._open_files = source, list(columns), open_files
        self._open: dict[int, OrderedDict[int, pq.ParquetFile]] = {}
        self._streams: dict[int, _Stream] = {}
        self._lock = threading.Lock()

    def plan(self, chunk: Chunk, lane: int) -> Callable[[], pa.Table]:
        """A function that reads a chunk; to be called once, by any thread.

        Chunks of a streamed row group are planned in order; each lane has a stream of its own.

        Raises:
            DataError: (the function) the file is damaged or gone.
        """
        if chunk.streamed:
            stream = self._stream(chunk, lane)
            stream.planned.add(chunk.offset)
            read = stream.read
        else:
            read = self._read_group

        def guarded() -> pa.Table:
            try:
                return read(chunk)
            except StorageError as refused:
                raise Unreachable(str(refused)) from refused
            except (pa.ArrowException, OSError) as bad:
                file = self._source.files[chunk.group.file]
                where = f"{file}, row group {chunk.group.index} (rows from {chunk.first_row})"
                raise DataError(f"{where}: cannot be read: {bad}; write the file again or remove it") from bad

        return guarded

    def _read_group(self, chunk: Chunk) -> pa.Table:
        handle = self._file(chunk.group.file)
        return handle.read_row_group(chunk.group.index, columns=self._columns, use_threads=False)

    def close(self) -> None:
        with self._lock:
            for handles in self._open.values():
                for handle in handles.values():
                    handle.close()
            self._open.clear()
            self._streams.clear()

    def __enter__(self) -> "TableReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, index: int) -> pq.ParquetFile:
        # A ParquetFile is not meant for two threads at once, so every thread has its own.
        with self._lock:
            handles = self._open.setdefault(threading.get_ident(), OrderedDict())
        if index not in handles:
            handles[index] = self._source.open(index)
            if len(handles) > self._open_files:
                handles.popitem(last=False)[1].close()
        handles.move_to_end(index)
        return handles[index]

    def _stream(self, chunk: Chunk, lane: int) -> "_Stream":
        stream = self._streams.get(lane)
        if stream is None or stream.group != chunk.group:
            open_it = partial(self._source.open, chunk.group.file)
            stream = self._streams[lane] = _Stream(open_it, chunk.group, self._columns)
        return stream


class _Stream:
    """One row group, CHUNK_ROWS rows at a time. It is closed when nobody refers to it.

    Attributes:
        planned: offsets of the chunks that will be read, in order; other chunks are passed over.
    """

    def __init__(self, open_it: Callable[[], pq.ParquetFile], group: RowGroup, columns: list[str]):
        self.group, self.planned = group, set[int]()
        self._open, self._columns = open_it, columns
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._position = 0
        self._waiting: dict[int, pa.Table] = {}  # chunks that a thread ran past, for another one
        self._rest: pa.Table | None = None
        self._lock = threading.Lock()

    def read(self, chunk: Chunk) -> pa.Table:
        with self._lock:
            assert chunk.offset in self._waiting or chunk.offset >= self._position, (chunk, self._position)
            while chunk.offset not in self._waiting:
                offset, table = self._position, self._next(CHUNK_ROWS)
                self._position += CHUNK_ROWS
                if offset in self.planned:
                    self._waiting[offset] = table
            return self._waiting.pop(chunk.offset)

    def _next(self, rows: int) -> pa.Table:
        """The next `rows` rows; fewer only at the end."""
        batches = self._batches
        if batches is None:
            options: dict[str, Any] = {"columns": self._columns, "use_threads": False}
            batches = self._open().iter_batches(CHUNK_ROWS, row_groups=[self.group.index], **options)
            self._batches = batches
        parts = [] if self._rest is None else [self._rest]
        while sum(len(part) for part in parts) < rows:
            batch = next(batches, None)
            if batch is None:
                break
            parts.append(pa.Table.from_batches([batch]))
        if not parts:
            raise OSError(f"it ends before its {self.group.num_rows} rows")
        table = pa.concat_tables(parts)
        self._rest = table.slice(rows) if len(table) > rows else None
        return table.slice(0, rows)


def open_file(uri: str, text_columns: Sequence[str] = ()) -> pq.ParquetFile:
    """Opens one Parquet file; remote ones are fetched in large pieces."""
    options: dict[str, Any] = {"read_dictionary": list(text_columns), "page_checksum_verification": True}
    if io.is_local(uri):
        # Not mapped into memory, though that is a little faster: a file that shrinks would then kill the process.
        return pq.ParquetFile(io.local_path(uri), **options)
    return pq.ParquetFile(io.open(uri, "rb"), pre_buffer=True, **options)


def find_files(uri: str | Sequence[str]) -> Iterator[str]:
    """The Parquet files of a file, directory, glob pattern or list of these, sorted within each.

    Raises:
        DataError: there are none.
    """
    uris = [uri] if isinstance(uri, str) else [str(u) for u in uri]
    if not uris:
        raise DataError("an empty list of files; expected at least one Parquet file, directory or pattern")
    for one in uris:
        matches = [one] if io.exists(one) else io.glob(one) if any(c in one for c in "*?[") else []
        # Each once: a pattern with ** matches a directory and what is in it.
        found = dict.fromkeys(file for match in matches for file in ([match] if io.isfile(match) else _below(match)))
        if not found:
            what = "no *.parquet file in there" if matches else "no such file or directory"
            raise DataError(f"{one}: {what}; expected a Parquet file, a directory of them or a pattern (x/*.parquet)")
        yield from found


def _below(folder: str) -> list[str]:
    """The *.parquet files below a directory; names with a leading "_" or "." are other programs' business."""
    depth = len(io.filesystem(folder)[1].strip("/").split("/"))
    inside = [(file, io.filesystem(file)[1].strip("/").split("/")[depth:]) for file in io.find(folder)]
    return [f for f, names in inside if f.endswith(".parquet") and not any(n.startswith(("_", ".")) for n in names)]


def read_footer(file: str) -> pq.FileMetaData:
    try:
        with open_file(file) as handle:
            return handle.metadata
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except StorageError as refused:
        raise Unreachable(str(refused)) from refused
    except (pa.ArrowException, OSError) as bad:
        reason = str(bad).split("\n")[0]
        raise DataError(f"{file}: not a Parquet file, or damaged: {reason}; write it again or remove it") from bad


def _row_groups(file: int, footer: pq.FileMetaData) -> Iterator[RowGroup]:
    first = 0
    for i in range(footer.num_row_groups):
        rows = footer.row_group(i).num_rows
        if rows:
            yield RowGroup(file, i, first, rows)
        first += rows


def _all_null(footer: pq.FileMetaData, column: str) -> bool:
    """The statistics say that no row has a value; False where there are no statistics."""
    for g in range(footer.num_row_groups):
        group = footer.row_group(g)
        of_column = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column]
        statistics = of_column[0].statistics if of_column else None
        if statistics is None or not statistics.has_null_count or statistics.null_count < group.num_rows:
            return False
    return footer.num_rows > 0


def _some(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more file(s)"
