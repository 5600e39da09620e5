"""Arrow columns -> `Rows`: ids checked, hashed or reduced, labels checked, numbers transformed, ages computed.

Everything is done once for a whole chunk of rows, by numpy. A value that cannot be right is a DataError that says where
it stands, what was expected and what to do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hmoe_rec.data import fit
from hmoe_rec.data.hashing import hash_string, hash_strings
from hmoe_rec.data.rows import Jagged, Layout, Origin, Rows, offsets_of
from hmoe_rec.data.schema import IdColumn, NumberColumn, SequenceColumns, VectorColumn
from hmoe_rec.types import HASH_OF_MISSING, DataError

UNIT_SECONDS = {"s": 1.0, "ms": 1e-3}


@dataclass(frozen=True)
class Place:
    """Where a chunk of rows stands: the first one's number in the file, and the row group, both counted from 0.

    Attributes:
        chosen: the rows' numbers after the first one, where some were left out; None: one after another.
    """

    file: str
    row_group: int
    first_row: int
    chosen: np.ndarray | None = None

    def number(self, row: int) -> int:
        """The number in the file of row `row` of the chunk."""
        return self.first_row + (row if self.chosen is None else int(self.chosen[row]))

    def origins(self, n: int) -> tuple[Origin, ...]:
        """Where n rows came from."""
        return (Origin(self.file, self.number(0), self.number(n - 1) + 1),) if n else ()

    def fail(self, row: Any, column: str, got: Any, expected: str, remedy: str) -> NoReturn:
        """Raises the DataError for row `row` of the chunk."""
        got = got.as_py() if isinstance(got, pa.Scalar) else got.item() if isinstance(got, np.generic) else got
        where = f"{self.file}, row {self.number(int(row))} (row group {self.row_group}), column {column}"
        raise DataError(f"{where}: got {got!r}, expected {expected}; {remedy}")


@dataclass(frozen=True)
class _Lists:
    """A list column without nulls: the rows' lengths and all elements end to end."""

    column: str
    offsets: np.ndarray
    elements: pa.Array

    def row_of(self, element: int) -> int:
        return int(np.searchsorted(self.offsets, element, side="right")) - 1


def to_rows(
    table: pa.Table,
    layout: Layout,
    place: Place,
    *,
    with_labels: bool = True,
    exposures: str | None = None,
    carry: pa.Schema | None = None,
) -> Rows:
    """A table with the schema's columns -> rows.

    Args:
        exposures: column with the number of earlier exposures.
        carry: columns to take along, and the types they shall have.

    Raises:
        DataError: a value that the schema does not allow.
    """
    schema, n = layout.schema, table.num_rows

    def column(name: str) -> pa.Array:
        return _plain_array(table.column(name))

    single, present = _single_ids(column, layout, place, n)
    bags = [_bag(column(c.source), c, layout, place) for c in schema.ids if c.pooling is not None]
    sequences = [_sequence(column, s, layout, place) for s in schema.sequences]
    numbers = np.empty((n, len(schema.numbers)), np.float32)
    for i, number in enumerate(schema.numbers):
        numbers[:, i] = _number(column(number.source), number, place)
    vectors = [_vector(column(v.source), v, place) for v in schema.vectors]
    labels = np.full((n, len(schema.tasks)), np.nan, np.float32)
    weights, groups = np.ones(n, np.float32), np.zeros(n, np.int64)
    if with_labels:
        for i, task in enumerate(schema.tasks):
            labels[:, i] = _label(column(task.source), task.source, place)
        if schema.weight:
            weights = _weight(column(schema.weight), schema.weight, place)
        if schema.user_key:
            groups = _group(column(schema.user_key))
    return Rows(
        single,
        present,
        tuple(bags + sequences),
        numbers,
        np.concatenate(vectors, axis=1) if vectors else np.empty((n, 0), np.float32),
        labels,
        weights,
        groups,
        _row_ids(place, n),
        None if carry is None else table.select(carry.names).cast(carry),
        place.origins(n),
        place.chosen is None,
        exposures=None if exposures is None else _exposures(column(exposures), exposures, place),
    )


def _row_ids(place: Place, n: int) -> np.ndarray:
    """By the file's name without its folders, so that a log may be moved. Sums that wrap around do no harm."""
    rows = np.arange(n) if place.chosen is None else place.chosen
    return rows + place.first_row + hash_string(place.file.rpartition("/")[2])


def _single_ids(
    column: Callable[[str], pa.Array], layout: Layout, place: Place, n: int
) -> tuple[np.ndarray, np.ndarray | None]:
    single = np.empty((len(layout.single), n), layout.dtype)
    present = None
    for i, key in enumerate(layout.single):
        rule = layout.schema.ids[key]
        values, valid = _ids(column(rule.source), rule, rule.source, place, lambda row: row)
        np.copyto(single[i], values, casting="unsafe")
        if valid is not None:
            present = np.ones(single.shape, bool) if present is None else present
            present[i] = valid
    return single, present


def _ids(
    array: pa.Array, rule: IdColumn, column: str, place: Place, row_of: Callable[[int], int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids as the model takes them, and where there is one (None: everywhere)."""
    null = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
    if fit.is_text(fit.plain(array.type)):
        values = hash_strings(array)
    else:
        values = _integers(array)
        if not rule.hashed:
            _check_range(values, null, rule, column, place, row_of)
        if rule.mode == "modulo":
            wide = values if values.itemsize >= 4 else values.astype(np.int32)  # holds any num_embeddings
            values = wide % rule.num_embeddings
    values = values.astype(np.int64 if rule.hashed else np.int32, copy=False)
    if null is None:
        return values, None
    if rule.missing == "zero":
        return values, ~null
    values = values.copy()
    values[null] = HASH_OF_MISSING if rule.hashed else rule.num_embeddings
    return values, None


def _integers(array: pa.Array) -> np.ndarray:
    """Integers as numpy, 0 where null."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_boolean(array.type) or pa.types.is_null(array.type):
        array = array.cast(pa.int8())
    return (array.fill_null(0) if array.null_count else array).to_numpy(zero_copy_only=False)


def _check_range(
    values: np.ndarray, null: np.ndarray | None, rule: IdColumn, column: str, place: Place, row_of: Callable[[int], int]
) -> None:
    if not values.size or (values.min() >= 0 and (rule.mode == "modulo" or values.max() < rule.num_embeddings)):
        return
    bad = values < 0 if rule.mode == "modulo" else (values < 0) | (values >= rule.num_embeddings)
    at = int(np.argmax(bad))
    if values[at] < 0:
        expected, remedy = "an id >= 0", "write null where there is no id, or use mode: hash"
    else:
        expected = f"an id < {rule.num_embeddings} (num_embeddings of {rule.name}, mode: vocabulary)"
        remedy = f"raise num_embeddings above {values.max()}, or use mode: modulo or hash"
    place.fail(row_of(at), column, values[at], expected, remedy)


def _lists(array: pa.Array, column: str) -> _Lists:
    if pa.types.is_null(array.type):
        array = array.cast(pa.list_(pa.null()))
    lengths = pc.call_function("list_value_length", [array]).fill_null(0).to_numpy(zero_copy_only=False)
    return _Lists(column, offsets_of(lengths), _plain_array(array.flatten()))


def _capped(lists: _Lists, max_length: int | None, keep_last: bool) -> _Lists:
    """At most `max_length` elements a row."""
    lengths = np.diff(lists.offsets)
    if max_length is None or not lengths.size or lengths.max() <= max_length:
        return lists
    kept = np.minimum(lengths, max_length)
    starts = lists.offsets[1:] - kept if keep_last else lists.offsets[:-1]
    offsets = offsets_of(kept)
    picked = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], kept)
    return _Lists(lists.column, offsets, lists.elements.take(pa.array(picked)))


def _list_ids(lists: _Lists, rule: IdColumn, layout: Layout, place: Place) -> np.ndarray:
    values, valid = _ids(lists.elements, rule, lists.column, place, lists.row_of)
    if valid is not None:
        row = lists.row_of(int(np.argmin(valid)))
        place.fail(row, lists.column, None, "an id", "leave it out of the list, or set missing: own_row for its table")
    return values.astype(layout.dtype, copy=False)


def _bag(array: pa.Array, rule: IdColumn, layout: Layout, place: Place) -> Jagged:
    lists = _capped(_lists(array, rule.source), rule.max_length, keep_last=False)
    return Jagged(lists.offsets, (_list_ids(lists, rule, layout, place),))


def _sequence(column: Callable[[str], pa.Array], rule: SequenceColumns, layout: Layout, place: Place) -> Jagged:
    names = [*rule.columns, *([rule.times] if rule.times else [])]
    lists = [_lists(column(name), name) for name in names]
    for other in lists[1:]:
        if not np.array_equal(other.offsets, lists[0].offsets):
            lengths, first = np.diff(other.offsets), np.diff(lists[0].offsets)
            row = int(np.argmax(lengths != first))
            expected = f"{first[row]} as in {names[0]}"
            remedy = f"write the columns of sequence {rule.name} with one element per behavior each"
            place.fail(row, other.column, f"{lengths[row]} elements", expected, remedy)
    lists = [_capped(one, rule.max_length, keep_last=True) for one in lists]
    ids = tuple(
        _list_ids(one, layout.schema.id_column(target), layout, place)
        for one, target in zip(lists, rule.columns.values(), strict=False)
    )
    ages = None
    if rule.times and rule.exposure_time:
        ages = _ages(lists[-1], column(rule.exposure_time), rule, place)
    return Jagged(lists[0].offsets, ids, ages)


def _ages(times: _Lists, exposure: pa.Array, rule: SequenceColumns, place: Place) -> np.ndarray:
    then = _seconds(times.elements, rule.time_unit)
    if not np.isfinite(then).all():
        at = int(np.argmin(np.isfinite(then)))
        remedy = "write the time of every behavior, or leave that behavior out of all columns"
        place.fail(times.row_of(at), times.column, times.elements[at], "a time", remedy)
    now = _seconds(exposure, rule.time_unit)
    if not np.isfinite(now).all():
        at = int(np.argmin(np.isfinite(now)))
        place.fail(at, str(rule.exposure_time), exposure[at], "a time", "write when the example was shown")
    ages = np.repeat(now, np.diff(times.offsets)) - then
    return np.maximum(ages, 0.0).astype(np.float32)


def _seconds(array: pa.Array, unit: str) -> np.ndarray:
    """Times as float64 seconds, NaN where null: exact to a microsecond for dates of this millennium."""
    if pa.types.is_temporal(array.type):
        return _floats(array.cast(pa.timestamp("us"), safe=False).cast(pa.int64())) * 1e-6
    return _floats(array) * UNIT_SECONDS[unit]


def _number(array: pa.Array, rule: NumberColumn, place: Place) -> np.ndarray:
    x = _floats(array)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if rule.transform == "log1p":
            x = np.log1p(x)
        elif rule.transform == "slog":
            x = np.sign(x) * np.log1p(np.abs(x))
        if rule.mean != 0.0 or rule.std != 1.0:
            x = (x - rule.mean) / rule.std
        x = x.astype(np.float32)
    wrong = ~np.isfinite(x)
    if wrong.any():
        wrong &= array.is_valid().to_numpy(zero_copy_only=False)
        if wrong.any():
            _fail_number(array, int(np.argmax(wrong)), rule, place)
    return x


def _fail_number(array: pa.Array, at: int, rule: NumberColumn, place: Place) -> NoReturn:
    if rule.transform == "log1p" and np.isfinite(array[at].as_py()):
        expected, remedy = f"more than -1 (number {rule.name}, transform: log1p)", "use transform: slog"
    else:
        expected = f"a finite number of float32's range (number {rule.name})"
        remedy = "write null where the number is not known"
    place.fail(at, rule.source, array[at], expected, remedy)


def _floats(array: pa.Array) -> np.ndarray:
    """float64, NaN where null."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not pa.types.is_floating(array.type):
        array = array.cast(pa.float64(), safe=False)
    return array.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)


def _vector(array: pa.Array, rule: VectorColumn, place: Place) -> np.ndarray:
    """[n, dim] float32; zeros where null."""
    lists = _lists(array, rule.source)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    lengths = np.diff(lists.offsets)
    wrong = (lengths != rule.dim) & valid
    if wrong.any():
        at = int(np.argmax(wrong))
        expected = f"{rule.dim} (dim of vector {rule.name})"
        place.fail(at, rule.source, f"{lengths[at]} values", expected, "write vectors of one width, or null")
    values = _floats(lists.elements).astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        at = int(np.argmin(finite))
        remedy = "write a null row where the vector is not known"
        place.fail(lists.row_of(at), rule.source, lists.elements[at], "finite values of float32's range", remedy)
    vectors = np.zeros((len(array), rule.dim), np.float32)
    vectors[valid] = values.reshape(-1, rule.dim)
    return vectors


def _label(array: pa.Array, column: str, place: Place) -> np.ndarray:
    """0, 1 or, where null, NaN."""
    labels = _floats(array)
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        wrong &= array.is_valid().to_numpy(zero_copy_only=False)
        if wrong.any():
            at = int(np.argmax(wrong))
            place.fail(at, column, array[at], "label 0 or 1, or null", "write null where the label is not known")
    return labels.astype(np.float32)


def _weight(array: pa.Array, column: str, place: Place) -> np.ndarray:
    weights = _floats(array).astype(np.float32)
    right = (weights >= 0) & (weights < np.inf)
    if not right.all():
        at = int(np.argmin(right))
        remedy = "write 0 for an example that shall not count, 1 for an ordinary one"
        place.fail(at, column, array[at], "a finite weight >= 0", remedy)
    return weights


def _exposures(array: pa.Array, column: str, place: Place) -> np.ndarray:
    counts = _floats(array)
    right = (counts >= 0) & (counts < 2**31) & (counts == np.floor(counts))
    if not right.all():
        remedy = "count the exposures with hmoe-rec data exposures"
        place.fail(int(np.argmin(right)), column, array[int(np.argmin(right))], "a whole number >= 0", remedy)
    return counts.astype(np.int32)


def _group(array: pa.Array) -> np.ndarray:
    """One int64 per user, HASH_OF_MISSING where null."""
    groups = hash_strings(array) if fit.is_text(fit.plain(array.type)) else _integers(array).astype(np.int64)
    if array.null_count:
        groups = groups.copy()
        groups[array.is_null().to_numpy(zero_copy_only=False)] = HASH_OF_MISSING
    return groups


def _plain_array(array: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One contiguous array without extension type."""
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks == 1 else array.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # a dictionary or string column too large for one array
        array = pa.concat_arrays(array.chunks)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if isinstance(array, pa.DictionaryArray) and array.dictionary.null_count:
        return array.dictionary_decode()
    return array
