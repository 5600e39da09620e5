"""Parquet files -> how many ids an example has in each key of `Batch.sparse`: what sharding plans want to know."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hmoe_rec.data.schema import Schema
from hmoe_rec.data.source import Chunk, ParquetSource, TableReader

SAMPLE_ROWS = 1 << 18
LEAST = 1e-4  # of a field that is empty in the whole sample: what is looked up takes time, if little

Progress = Callable[[int, int], None]


def mean_ids(
    uris: str | Sequence[str], schema: Schema, *, rows: int = SAMPLE_ROWS, progress: Progress | None = None
) -> dict[str, float]:
    """Mean ids of an example per id field and behavior column, after `max_length` and `missing` of the schema.

    Args:
        uris: files, directories or patterns, local or remote.
        rows: about so many are read, from row groups spread evenly over the files; the same ones every time.
        progress: is called with the rows done and all rows to do after every row group.

    Raises:
        DataError: no such file, a damaged one.
        SchemaError: a column that is missing or of a type that does not fit.
    """
    keys = list(_keys(schema))
    columns = list(dict.fromkeys(column for _, column, *_ in keys))
    source = ParquetSource(uris, schema, columns=columns)
    sample = _spread(source, rows)
    total, done = sum(chunk.num_rows for chunk in sample), 0
    counts = dict.fromkeys((key for key, *_ in keys), 0)
    with TableReader(source, columns) as tables:
        for chunk in sample:
            table = tables.plan(chunk, lane=0)()
            for key, column, is_list, max_length, null_counts in keys:
                counts[key] += _ids(table.column(column), is_list, max_length, null_counts)
            done += chunk.num_rows
            if progress:
                progress(done, total)
    return {key: max(LEAST, float(f"{count / total:.4g}")) for key, count in counts.items()}


def _keys(schema: Schema) -> Iterator[tuple[str, str, bool, int | None, bool]]:
    """(key, column, whether it is a list, ids kept of one, whether a null is an id of its own)"""
    for c in schema.ids:
        yield c.name, c.source, c.pooling is not None, c.max_length, c.pooling is None and c.missing == "own_row"
    for s in schema.sequences:
        for column in s.columns:
            yield column, column, True, s.max_length, False


def _spread(source: ParquetSource, rows: int) -> list[Chunk]:
    """The first chunks of row groups, as evenly as may be."""
    chunks = [source.chunks(group)[0] for group in source.row_groups]
    mean = sum(chunk.num_rows for chunk in chunks) / len(chunks)
    count = max(1, min(len(chunks), round(rows / mean)))
    return [chunks[i * len(chunks) // count] for i in range(count)]


def _ids(column: pa.ChunkedArray, is_list: bool, max_length: int | None, null_counts: bool) -> int:
    if not is_list:
        return len(column) if null_counts else len(column) - column.null_count
    if pa.types.is_null(column.type):
        return 0
    lengths = pc.call_function("list_value_length", [column]).fill_null(0).to_numpy()
    return int(lengths.sum() if max_length is None else np.minimum(lengths, max_length).sum())
