"""What the converters share: finding a source's files, codes, buckets, moments, and writing splits and schemas.

A column on its way is a numpy array: int64 where -1 means missing, float64 where NaN means missing, a `Windows` for
lists, or an Arrow array where strings are kept.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hmoe_rec.data.schema import load_schema
from hmoe_rec.types import DataError, HmoeError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ROW_GROUP_ROWS = 8192
MISSING = -1

console = Console(stderr=True)


@dataclass(frozen=True)
class Windows:
    """A list column: row i holds pool[starts[i]:stops[i]]. Rows may overlap, which is what histories do.

    Attributes:
        pool: the values all rows take from; -1 is a missing one.
        type: Arrow type of one value.
    """

    starts: Ints
    stops: Ints
    pool: NDArray[Any]
    type: pa.DataType

    @property
    def lengths(self) -> Ints:
        return self.stops - self.starts

    def rows(self, chosen: Ints) -> "Windows":
        return Windows(self.starts[chosen], self.stops[chosen], self.pool, self.type)

    def flat(self) -> tuple[Ints, NDArray[Any]]:
        """Row of every element, and its value, row by row."""
        lengths = self.lengths
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else np.zeros(0, np.int64)
        index = np.arange(len(row_of)) - first[row_of] + self.starts[row_of]
        return row_of, self.pool[index]

    def to_arrow(self) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        values = self.flat()[1]
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, self.type, mask=values == MISSING))


Column = NDArray[Any] | Windows | pa.Array


# ---------------------------------------------------------------------------------------------------- sources


def locate(source: Path, name: str, what: str) -> Path:
    """The file `name` (a glob may be given) in `source`, in its folder data/, or `source` itself.

    Raises:
        DataError: it is not there.
    """
    found = matching(source, name)
    if not found:
        raise DataError(
            f"{source}: no file {name} ({what}), neither there nor in {source / 'data'}; unpack the "
            "release and give the folder that holds it"
        )
    return found[0]


def matching(source: Path, name: str) -> list[Path]:
    """Files called `name` in `source`, or else in its folder data/, sorted."""
    if source.is_file():
        return [source] if source.match(name) else []
    return sorted(source.glob(name)) or sorted((source / "data").glob(name))


def require_columns(given: Iterable[str], needed: Sequence[str], path: Path) -> None:
    """Raises DataError that names every column that `path` lacks."""
    have = list(given)
    lacking = [c for c in needed if c not in have]
    if lacking:
        raise DataError(f"{path}: no column {', '.join(lacking)}; it has {', '.join(have)}. Is it another file?")


def read_parquet(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        have = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); copy it again") from error
    require_columns(have, columns, path)
    return pq.read_table(path, columns=list(columns))


def ints(column: pa.ChunkedArray | pa.Array, name: str = "", path: Path | str = "") -> Ints:
    """Whole numbers, -1 where missing.

    Raises:
        DataError: a value that is not a whole number.
    """
    try:
        return pc.fill_null(pc.cast(column, pa.int64()), MISSING).to_numpy().astype(np.int64)
    except pa.ArrowException as error:
        raise DataError(f"{path}: column {name} holds a value that is not a whole number: {error}") from error


def floats(column: pa.ChunkedArray | pa.Array) -> Floats:
    """Numbers, NaN where missing."""
    return pc.fill_null(pc.cast(column, pa.float64()), float("nan")).to_numpy().astype(np.float64)


# ---------------------------------------------------------------------------------------------------- encodings


def codes(values: pa.ChunkedArray | pa.Array, vocabulary: pa.Array) -> Ints:
    """Place of each value in `vocabulary`; -1 where it is missing or not in it."""
    return ints(pc.index_in(values, vocabulary))


def sorted_vocabulary(values: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Distinct values, ascending, without null."""
    distinct = pc.drop_null(pc.unique(values))
    return distinct.take(pc.sort_indices(distinct))


def quantile_edges(values: Floats, num_buckets: int) -> Floats:
    """Inner edges of at most `num_buckets` buckets of about equal counts; NaN is left out.

    A value so frequent that it fills a bucket, such as 0, counts for one, so that the others are still told apart.
    """
    distinct, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    if len(distinct) < 2:
        return np.zeros(0)
    frequent = counts > counts.sum() / num_buckets
    if frequent.all():
        return distinct[1:]
    one_bucket = counts[~frequent].sum() / max(1, num_buckets - frequent.sum())
    weights = np.where(frequent, one_bucket, counts)
    place = (np.cumsum(weights) - weights / 2) * num_buckets // weights.sum()
    return distinct[1:][np.diff(place) > 0]


def bucket(values: Floats, edges: Floats) -> Ints:
    """Bucket i holds edges[i-1] <= value < edges[i]; -1 where the value is NaN."""
    return np.where(np.isnan(values), MISSING, np.searchsorted(edges, values, side="right")).astype(np.int64)


TRANSFORMS: Mapping[str, Callable[[Floats], Floats]] = {
    "none": lambda x: x,
    "log1p": np.log1p,
    "slog": lambda x: np.sign(x) * np.log1p(np.abs(x)),
}


def number_entry(name: str, train_values: Floats, transform: str = "none") -> dict[str, Any]:
    """A schema entry for a number, with mean and standard deviation of the transformed values it has in training."""
    known = TRANSFORMS[transform](train_values[~np.isnan(train_values)])
    mean, std = (float(known.mean()), float(known.std())) if len(known) else (0.0, 1.0)
    return {"name": name, "transform": transform, "mean": float(f"{mean:.6g}"), "std": float(f"{std or 1.0:.6g}")}


# ---------------------------------------------------------------------------------------------------- output


def to_arrow(column: Column, chosen: Ints) -> pa.Array:
    if isinstance(column, Windows):
        return column.rows(chosen).to_arrow()
    if isinstance(column, (pa.Array, pa.ChunkedArray)):
        return column.take(pa.array(chosen))
    values = column[chosen]
    if values.dtype.kind == "f":
        return pa.array(values.astype(np.float32), from_pandas=True)
    return pa.array(values, mask=values == MISSING)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary neighbour of `path` to write to, and puts it in place only when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def split_writer(path: Path, row_group_rows: int = ROW_GROUP_ROWS) -> Iterator[Callable[[pa.Table], None]]:
    """Gives a function that appends a table to `path` (zstd, row groups of equal size); the file appears at the end.

    Raises:
        DataError: nothing was written.
    """
    waiting: list[pa.Table] = []
    with replacing(path) as temporary, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None

        def flush(least: int) -> None:
            nonlocal waiting, writer
            if sum(t.num_rows for t in waiting) < max(1, least):
                return
            joined = pa.concat_tables(waiting)
            target = writer or stack.enter_context(pq.ParquetWriter(temporary, joined.schema, compression="zstd"))
            writer = target
            stop = joined.num_rows // least * least if least else joined.num_rows
            target.write_table(joined.slice(0, stop), row_group_size=row_group_rows)
            waiting = [joined.slice(stop)] if stop < joined.num_rows else []

        def write(table: pa.Table) -> None:
            waiting.append(table)
            flush(row_group_rows)

        yield write
        flush(0)
        if writer is None:
            raise DataError(f"{path}: no rows to write; is the source empty, or are the asked days outside of it?")
        stack.close()


def write_rows(path: Path, columns: Mapping[str, Column], rows: Ints, row_group_rows: int = ROW_GROUP_ROWS) -> None:
    """Writes the chosen rows of the columns, gathering lists one row group at a time."""
    with split_writer(path, row_group_rows) as write, progress(path.name, len(rows)) as advance:
        for start in range(0, len(rows), row_group_rows):
            chosen = rows[start : start + row_group_rows]
            write(pa.table({name: to_arrow(column, chosen) for name, column in columns.items()}))
            advance(len(chosen))


def write_schema(path: Path, schema: Mapping[str, Any], comment: str) -> None:
    """Writes the schema as YAML, `comment` on its first lines, after the package has checked it."""
    text = load_schema(schema, where=str(path)).to_yaml()
    with replacing(path) as temporary:
        temporary.write_text("".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines()) + text)


def write_vocabularies(path: Path, vocabularies: Mapping[str, pa.Array]) -> None:
    """Writes, as JSON, the original value of every code: {"field": ["value of id 0", ...]}."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({name: v.to_pylist() for name, v in vocabularies.items()}, ensure_ascii=False))


# ---------------------------------------------------------------------------------------------------- console


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    bar = Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TextColumn("{task.completed:>9,.0f} rows"),
        TimeElapsedColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda rows: bar.advance(task, rows)


def say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Prints a user's mistake without a traceback and ends the program with code 2."""
    try:
        yield
    except (HmoeError, OSError) as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


def label_rates(labels: Mapping[str, NDArray[Any]], rows: Ints) -> str:
    return ", ".join(f"{name} {float(np.mean(values[rows])):.4f}" for name, values in labels.items())
