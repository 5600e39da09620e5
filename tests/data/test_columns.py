import datetime

import numpy as np
import pyarrow as pa
import pytest

from hmoe_rec.data.columns import Place, to_rows
from hmoe_rec.data.hashing import hash_string
from hmoe_rec.data.rows import Layout
from hmoe_rec.data.schema import load_schema
from hmoe_rec.types import HASH_OF_MISSING, DataError

PLACE = Place("log.parquet", 0, 0)


def rows_of(columns: dict, **schema):
    """Rows of a table whose schema is {ids: [one field for y's sake], ...} with what is given."""
    n = len(next(iter(columns.values())))
    columns = {"y": pa.array([0] * n), **columns}
    given = {"ids": [{"name": "y", "num_embeddings": 2}], "tasks": [{"name": "label", "label": "y"}], **schema}
    return to_rows(pa.table(columns), Layout(load_schema(given)), PLACE)


def one_id(values: pa.Array, **options):
    rows = rows_of({"a": values}, ids=[{"name": "a", "num_embeddings": 9, **options}])
    return rows.single[0].tolist(), None if rows.present is None else rows.present[0].tolist()


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64()])
def test_any_integer_type_is_an_id(kind):
    assert one_id(pa.array([3, 8, 0], kind)) == ([3, 8, 0], None)
    assert one_id(pa.array([3, None, 0], kind)) == ([3, 0, 0], [True, False, True])
    assert one_id(pa.array([3, None, 0], kind), missing="own_row") == ([3, 9, 0], None)
    assert one_id(pa.array([3, 100, None], kind), mode="hash", missing="own_row") == ([3, 100, HASH_OF_MISSING], None)
    assert one_id(pa.array([3, 8, 3], kind).dictionary_encode()) == ([3, 8, 3], None)
    assert one_id(pa.array([3, 100, None], kind), mode="modulo", num_embeddings=10**6)[0] == [3, 100, 0]


def test_integers_beyond_int64_are_hashed_as_their_bits():
    assert one_id(pa.array([2**64 - 1, 5], pa.uint64()), mode="hash")[0] == [-1, 5]
    assert one_id(pa.array([-7], pa.int64()), mode="hash")[0] == [-7]
    assert one_id(pa.array([2**40 + 1]), mode="modulo")[0] == [(2**40 + 1) % 9]
    with pytest.raises(DataError, match="got 18446744073709551615, expected an id < 9"):
        one_id(pa.array([2**64 - 1], pa.uint64()))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_strings_are_hashed(kind):
    values = pa.array(["a", None, "ö"], kind)
    assert one_id(values, mode="hash") == ([hash_string("a"), 0, hash_string("ö")], [True, False, True])


def test_booleans_are_ids():
    assert one_id(pa.array([True, False, None])) == ([1, 0, 0], [True, True, False])


def test_a_null_in_a_dictionary_is_a_null():
    array = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(["a", None]))
    assert one_id(array, mode="hash") == ([hash_string("a"), 0, hash_string("a")], [True, False, True])


LISTS = [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint8(), 3)]


@pytest.mark.parametrize("kind", LISTS)
def test_any_list_type_is_a_bag(kind):
    ids = [{"name": "a", "num_embeddings": 9, "pooling": "sum"}]
    values = pa.array([[1, 2, 3], None, [4, 5, 6], [7, 8, 0]], kind)
    for array, expected in ((values, [[1, 2, 3], [], [4, 5, 6], [7, 8, 0]]), (values[1:3], [[], [4, 5, 6]])):
        (bag,) = rows_of({"a": array}, ids=ids).jagged
        assert bag.columns[0].dtype == np.int32
        assert [bag.columns[0][a:b].tolist() for a, b in zip(bag.offsets, bag.offsets[1:], strict=False)] == expected


def test_chunked_columns():
    chunks = pa.chunked_array([["a", "b"], [], ["b", None]])
    assert one_id(chunks, mode="hash")[0] == [hash_string("a"), hash_string("b"), hash_string("b"), 0]


def test_bags_keep_the_first_and_sequences_the_last():
    lists = pa.array([[1, 2, 3, 4], [5], []])
    ids = [{"name": "y", "num_embeddings": 9}, {"name": "a", "num_embeddings": 9, "pooling": "sum", "max_length": 2}]
    sequences = [{"name": "s", "columns": {"b": "y"}, "max_length": 2}]
    bag, sequence = rows_of({"a": lists, "b": lists}, ids=ids, sequences=sequences).jagged
    assert bag.columns[0].tolist() == [1, 2, 5] and bag.offsets.tolist() == [0, 2, 3, 3]
    assert sequence.columns[0].tolist() == [3, 4, 5] and sequence.offsets.tolist() == [0, 2, 3, 3]


def ages(times, exposure, unit="s"):
    sequence = {"name": "s", "columns": {"b": "y"}, "times": "t", "exposure_time": "now", "time_unit": unit}
    columns = {"b": pa.array([[0] * len(row) for row in times.to_pylist()], pa.list_(pa.int8())), "t": times}
    (jagged,) = rows_of({**columns, "now": exposure}, sequences=[sequence]).jagged
    assert jagged.ages is not None and jagged.ages.dtype == np.float32
    return jagged.ages.tolist()


def test_ages_are_seconds_and_not_negative():
    assert ages(pa.array([[10, 25], [], [7]]), pa.array([30, 40, 5])) == [20, 5, 0]
    assert ages(pa.array([[1650000000123, 1650000001000]]), pa.array([1650000002123]), "ms") == pytest.approx(
        [2, 1.123]
    )
    assert ages(pa.array([[0.25]]), pa.array([1.0], pa.float32())) == [0.75]


@pytest.mark.parametrize("resolution", ["s", "ms", "us", "ns"])
def test_ages_of_timestamps_and_dates(resolution):
    noon = datetime.datetime(2024, 5, 1, 12)
    times = pa.array([[noon, noon + datetime.timedelta(hours=1)]], pa.list_(pa.timestamp(resolution)))
    assert ages(times, pa.array([noon + datetime.timedelta(hours=3)], pa.timestamp("ms"))) == [10800, 7200]
    assert ages(times, pa.array([int(noon.replace(tzinfo=datetime.UTC).timestamp()) + 3600])) == [3600, 0]
    assert ages(pa.array([[noon.date()]]), pa.array([noon])) == [43200]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.0, 3.0, -2.5, np.nan]),
        ({"mean": 1, "std": 2}, [-0.5, 1.0, -1.75, np.nan]),
        ({"transform": "slog"}, [0.0, np.log(4), -np.log(3.5), np.nan]),
        ({"transform": "slog", "mean": 1, "std": 0.5}, [-2, (np.log(4) - 1) * 2, (-np.log(3.5) - 1) * 2, np.nan]),
    ],
)
def test_numbers_are_transformed_then_standardized(options, expected):
    columns = {"x": pa.array([0.0, 3.0, -2.5, None], pa.float32())}
    found = rows_of(columns, numbers=[{"name": "x", **options}]).numbers
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(), pa.null()])
def test_any_number_type(kind):
    one = {pa.null(): None, pa.float16(): np.float16(1), pa.bool_(): True}.get(kind, 1)
    values = [one, None]
    found = rows_of({"x": pa.array(values, kind)}, numbers=[{"name": "x"}]).numbers[:, 0]
    np.testing.assert_array_equal(found, [np.nan if kind == pa.null() else 1, np.nan])


def test_large_numbers_keep_their_digits_until_they_are_standardized():
    columns = {"x": pa.array([1_650_000_001, 1_650_000_003])}
    found = rows_of(columns, numbers=[{"name": "x", "mean": 1_650_000_000, "std": 2}]).numbers
    assert found[:, 0].tolist() == [0.5, 1.5]


def test_extension_types_are_read_as_what_they_store():
    tensor = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.float32(), [2]), pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2))
    )
    found = rows_of({"v": tensor}, vectors=[{"name": "v", "dim": 2}]).vectors
    assert found.tolist() == [[1, 2], [3, 4]]


def test_user_keys_group_by_integer_or_string():
    assert rows_of({"u": pa.array([5, 7, None])}, user_key="u").groups.tolist() == [5, 7, HASH_OF_MISSING]
    found = rows_of({"u": pa.array(["a", None, "a"])}, user_key="u").groups.tolist()
    assert found == [hash_string("a"), HASH_OF_MISSING, hash_string("a")]


def test_the_schema_decides_the_type_of_ids():
    both = [{"name": "y", "num_embeddings": 9}, {"name": "h", "num_embeddings": 9, "mode": "hash"}]
    assert rows_of({"h": pa.array([1])}, ids=both).single.dtype == np.int64
    assert rows_of({"h": pa.array([1])}).single.dtype == np.int32
