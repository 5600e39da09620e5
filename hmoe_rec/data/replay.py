"""A log that is complete -> files that appear one after another, as a stream would bring them."""

import time
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from hmoe_rec import io
from hmoe_rec.data.file_stream import DONE
from hmoe_rec.data.source import find_files, open_file, read_footer
from hmoe_rec.progress import Progress
from hmoe_rec.types import DataError


def replay(
    uris: str | Sequence[str],
    out: str,
    *,
    rows_per_file: int,
    pause_seconds: float = 0.0,
    done: bool = False,
    progress: Progress | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Writes the rows again, in their order, as OUT/part-00000.parquet and so on; each file appears when it is whole.

    Args:
        uris: files, directories or patterns.
        rows_per_file: of every file but the last one.
        pause_seconds: before every file but the first one.
        done: whether OUT/_DONE is written at the end.
        sleep: waits.

    Returns:
        The files' names.

    Raises:
        DataError: no files, files whose columns differ, or OUT holds Parquet files or _DONE already.
    """
    if rows_per_file < 1 or pause_seconds < 0:
        raise DataError(
            f"rows_per_file must be at least 1 and pause_seconds at least 0: {rows_per_file}, {pause_seconds}"
        )
    files = list(find_files(uris))
    if io.isdir(out) and any(name.endswith(".parquet") for name in io.ls(out)):
        raise DataError(f"{out}: holds Parquet files already, which a follower may have read; name a new directory")
    if io.exists(io.join(out, DONE)):
        raise DataError(f"{out}: holds {DONE}, with which a follower ends; remove it, or name a new directory")
    io.mkdirs(out)
    total = sum(read_footer(file).num_rows for file in files)
    written, names = 0, []
    for table in _tables(files, rows_per_file):
        if names:
            sleep(pause_seconds)
        name = f"part-{len(names):05}.parquet"
        with io.replacing(io.join(out, name), "wb") as file:
            pq.write_table(table, file, compression="zstd")
        written, names = written + len(table), [*names, name]
        if progress is not None:
            progress(written, total)
    if done:
        io.write_text(io.join(out, DONE), "")
    return names


def _tables(files: Sequence[str], rows: int) -> Iterator[pa.Table]:
    """The files' rows, so many at a time."""
    kept: list[pa.RecordBatch] = []
    count = 0
    schema = open_file(files[0]).schema_arrow
    for name in files:
        opened = open_file(name)
        if not opened.schema_arrow.equals(schema):
            raise DataError(f"{name}: other columns than {files[0]}; replay files of one kind")
        for batch in opened.iter_batches(batch_size=min(rows, 1 << 16)):
            while count + len(batch) >= rows:
                part = rows - count
                yield pa.Table.from_batches([*kept, batch.slice(0, part)], schema)
                batch, kept, count = batch.slice(part), [], 0
            if len(batch):
                kept.append(batch)
                count += len(batch)
    if kept:
        yield pa.Table.from_batches(kept, schema)
