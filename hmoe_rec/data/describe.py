"""Parquet files of which one knows nothing -> what each column holds, and a first schema to edit.

`str(describe(uri))` is a schema file whose comments say what was found. Types, rows and (where the files have them) the
least and greatest values are those of all files; cardinalities, missing rates, label rates, medians and list lengths
are counted on up to SAMPLE_ROWS rows from row groups spread over the files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hmoe_rec.data import fit
from hmoe_rec.data.source import find_files, open_file, read_footer
from hmoe_rec.types import DataError

if TYPE_CHECKING:
    from rich.table import Table

SAMPLE_ROWS = 1 << 20
GROUP_ROWS = 1 << 18  # rows looked at in one row group


@dataclass(frozen=True)
class ColumnFacts:
    """What a column holds.

    Attributes:
        missing: share of nulls among the rows.
        distinct: distinct values of the sample; of list columns, distinct elements.
        low, high: least and greatest value; of list columns, of their elements; None where there is no order.
        lengths: of list columns, the length of each row's list in the sample.
        values: numeric values of the sample (elements of lists) without nulls, float64; empty where not numeric.
    """

    name: str
    type: pa.DataType
    missing: float
    distinct: int
    low: Any = None
    high: Any = None
    lengths: np.ndarray | None = field(default=None, repr=False)
    values: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)

    @property
    def element(self) -> pa.DataType:
        """The type of a value; of list columns, of an element."""
        kind = fit.plain(self.type)
        return fit.plain(kind.value_type) if fit.is_list(kind) else kind

    @property
    def kind(self) -> str:
        """The type in short."""
        return f"{fit.plain(self.type)} by dictionary" if pa.types.is_dictionary(self.type) else str(self.type)

    @property
    def is_list(self) -> bool:
        return self.lengths is not None

    @cached_property
    def median(self) -> float | None:
        found = self.values[np.isfinite(self.values)]
        return float(np.median(found)) if found.size else None

    @property
    def is_binary(self) -> bool:
        """Every value is 0 or 1, and at least one is there."""
        return not self.is_list and self.values.size > 0 and bool(np.isin(self.values, (0, 1)).all())

    def summary(self) -> str:
        """One line for people."""
        parts = [self.kind, f"{self.distinct:,} distinct"]
        if self.missing:
            parts.append(f"{self.missing:.1%} missing")
        if self.is_binary:
            parts.append(f"{self.values.mean():.2%} ones")
        elif self.values.size:
            parts.append(f"{_short(self.low)}..{_short(self.high)}, median {_short(self.median)}")
        if self.lengths is not None and self.lengths.size:
            parts.append(f"{self.lengths.mean():.1f} elements a row, at most {self.lengths.max()}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Report:
    """What `describe` found.

    Attributes:
        sampled_rows: rows that the figures are counted on.
    """

    uri: str
    num_files: int
    num_row_groups: int
    num_rows: int
    sampled_rows: int
    columns: tuple[ColumnFacts, ...]

    def schema(self) -> dict[str, Any]:
        """A first schema for `load_schema`; see propose.py for the rules."""
        from hmoe_rec.data.propose import propose

        return propose(self.columns).schema

    def schema_yaml(self) -> str:
        """The same as a YAML text, with the facts as comments."""
        from hmoe_rec.data.propose import propose, to_yaml

        return to_yaml(propose(self.columns), self.columns, self.headline())

    def headline(self) -> str:
        seen = "all rows" if self.sampled_rows == self.num_rows else f"a sample of {self.sampled_rows:,} rows"
        groups = f"{self.num_row_groups:,} row group(s) in {self.num_files:,} file(s)"
        return f"{self.uri}: {self.num_rows:,} rows, {groups}; figures from {seen}"

    def table(self) -> "Table":
        """For `rich.print`."""
        from rich.table import Table

        table = Table(title=self.headline())
        for heading in ("column", "type", "missing", "distinct", "least", "median", "greatest", "elements a row"):
            table.add_column(heading, justify="left" if heading in ("column", "type") else "right")
        for c in self.columns:
            lengths = ""
            if c.lengths is not None and c.lengths.size:
                lengths = f"{c.lengths.mean():.1f} (max {c.lengths.max()})"
            figures = f"{c.missing:.1%}", f"{c.distinct:,}", _short(c.low), _short(c.median), _short(c.high)
            table.add_row(c.name, c.kind, *figures, lengths)
        return table

    def __str__(self) -> str:
        return self.schema_yaml()


def describe(uri: str | Sequence[str]) -> Report:
    """Looks at a file, a directory, a glob pattern or a list of these.

    Raises:
        DataError: no such file, a damaged one, files with different columns, no rows.
        SchemaError: a column whose types in two files have no common one.
    """
    files = list(find_files(uri))
    footers = [read_footer(file) for file in files]
    num_rows = sum(footer.num_rows for footer in footers)
    if num_rows == 0:
        raise DataError(f"{files[0]}: 0 rows in {len(files)} file(s); nothing to describe")
    first = footers[0].schema.to_arrow_schema()
    for file, footer in zip(files, footers, strict=True):
        other = footer.schema.to_arrow_schema().names
        if set(other) != set(first.names):
            differing = sorted(set(other) ^ set(first.names))
            raise DataError(f"{file}: columns differ from {files[0]}: {', '.join(differing)}; describe them apart")
    groups = [(f, g) for f, footer in enumerate(footers) for g in range(footer.num_row_groups)]
    groups = _spread([(f, g) for f, g in groups if footers[f].row_group(g).num_rows], footers)
    columns = []
    sampled = 0
    for name in first.names:
        sample = _sample(files, groups, name)
        sampled = len(sample)
        columns.append(_facts(name, sample, _extremes(footers, name)))
    shown = uri if isinstance(uri, str) else ", ".join(uri)
    total = sum(footer.num_row_groups for footer in footers)
    return Report(shown, len(files), total, num_rows, sampled, tuple(columns))


def _spread(groups: list[tuple[int, int]], footers: Sequence[pq.FileMetaData]) -> list[tuple[int, int]]:
    """Row groups over all files, as evenly as may be, with about SAMPLE_ROWS rows."""
    rows = sum(min(footers[f].row_group(g).num_rows, GROUP_ROWS) for f, g in groups)
    count = max(1, min(len(groups), round(len(groups) * SAMPLE_ROWS / rows)))
    return [groups[i * len(groups) // count] for i in range(count)]


def _sample(files: Sequence[str], groups: Sequence[tuple[int, int]], name: str) -> pa.ChunkedArray:
    parts = []
    for f, g in groups:
        with open_file(files[f]) as handle:
            parts.append(next(handle.iter_batches(GROUP_ROWS, row_groups=[g], columns=[name])).column(0))
    if len({part.type for part in parts}) > 1:
        kind = fit.common_type(name, [part.type for part in parts])
        parts = [part.cast(kind) for part in parts]
    return pa.chunked_array(parts)


def _facts(name: str, sample: pa.ChunkedArray, extremes: tuple[Any, Any] | None) -> ColumnFacts:
    array = sample.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    missing = array.null_count / max(1, len(array))
    kind, lengths = sample.type, None
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    if fit.is_list(array.type):
        lengths = pc.call_function("list_value_length", [array.drop_null()]).to_numpy(zero_copy_only=False)
        array = array.flatten()
    array = array.drop_null()
    values = np.empty(0)
    if pa.types.is_floating(array.type) or pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        values = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    try:
        distinct = pc.call_function("count_distinct", [array]).as_py()
    except pa.ArrowNotImplementedError:
        distinct = 0  # structs and the like, for which there is no role either
    low, high = extremes or ((values.min(), values.max()) if values.size else (None, None))
    return ColumnFacts(name, kind, missing, distinct, low, high, lengths, values)


def _extremes(footers: Sequence[pq.FileMetaData], name: str) -> tuple[Any, Any] | None:
    """Least and greatest value (of lists: element) over all files, if every row group's statistics say so."""

    def is_it(path: str) -> bool:
        return path == name or path.startswith(f"{name}.list.")

    lows, highs = [], []
    for footer in footers:
        for g in range(footer.num_row_groups):
            group = footer.row_group(g)
            found = [group.column(i) for i in range(group.num_columns) if is_it(group.column(i).path_in_schema)]
            statistics = found[0].statistics if found else None
            if statistics is None or not (statistics.has_min_max or statistics.num_values == 0):
                return None
            if statistics.has_min_max:
                lows.append(statistics.min)
                highs.append(statistics.max)
    return (min(lows), max(highs)) if lows else None


def _short(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int | np.integer):
        return f"{value}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:20]
