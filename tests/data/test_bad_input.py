"""What a user gets to read when files do not fit: place, value, expectation, remedy."""

import math
import re

import numpy as np
import pyarrow as pa
import pytest

from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.data.schema import load_schema
from hmoe_rec.types import DataError, SchemaError


def replaced(table, name, values, kind=None):
    return table.set_column(table.column_names.index(name), name, pa.array(values, kind))


def with_value(table, name, row, value, kind=None):
    values = table[name].to_pylist()
    values[row] = value
    return replaced(table, name, values, kind or table.schema.field(name).type)


def message(path, schema, **options):
    with pytest.raises((DataError, SchemaError)) as error:
        reader = BatchReader(ParquetSource(path, schema), global_batch_size=5, shuffle=False, **options)
        for _ in reader.epoch(0):
            pass
    return str(error.value)


VALUES = [
    # column, row, value, Arrow type if another one is needed, what the message says
    (
        "user",
        13,
        -1,
        None,
        "column user: got -1, expected an id >= 0; write null where there is no id, or use mode: hash",
    ),
    (
        "user",
        13,
        50,
        None,
        "got 50, expected an id < 50 (num_embeddings of user, mode: vocabulary); raise num_embeddings",
    ),
    ("device", 13, -3, pa.int64(), "column device: got -3, expected an id >= 0"),
    ("tags", 13, [1, 11], None, "column tags: got 11, expected an id < 11"),
    ("tags", 13, [1, -1, 3], None, "column tags: got -1, expected an id >= 0"),
    (
        "tags",
        13,
        [1, None],
        None,
        "column tags: got None, expected an id; leave it out of the list, or set missing: own",
    ),
    (
        "liked",
        13,
        [3, 77],
        None,
        "column liked: got 77, expected an id < 50 (num_embeddings of user, mode: vocabulary)",
    ),
    ("hist_time", 13, [1] * 9, None, "column hist_time: got '9 elements', expected"),
    (
        "hist_item",
        13,
        [1] * 8,
        None,
        "expected 8 as in hist_item; write the columns of sequence history with one element",
    ),
    ("price", 13, math.nan, None, "column price: got nan, expected a finite number of float32's range (number price);"),
    ("price", 13, math.inf, None, "column price: got inf, expected a finite number"),
    ("price", 13, -2.0, None, "got -2.0, expected more than -1 (number price, transform: log1p); use transform: slog"),
    (
        "emb",
        13,
        [1.0, math.nan, 0.0],
        None,
        "column emb: got nan, expected finite values of float32's range; write a null",
    ),
    ("emb2", 13, [1.0, math.inf], None, "column emb2: got inf, expected finite values"),
    (
        "emb2",
        13,
        [1.0, 2.0, 3.0],
        None,
        "column emb2: got '3 values', expected 2 (dim of vector emb2); write vectors of",
    ),
    ("emb2", 13, [], None, "column emb2: got '0 values', expected 2"),
    ("emb2", 13, [None, 1.0], None, "column emb2: got None, expected finite values"),
    (
        "click",
        13,
        2,
        pa.int8(),
        "column click: got 2, expected label 0 or 1, or null; write null where the label is not",
    ),
    ("is_buy", 13, 0.5, None, "column is_buy: got 0.5, expected label 0 or 1"),
    ("is_buy", 13, math.nan, None, "column is_buy: got nan, expected label 0 or 1, or null"),
    (
        "w",
        13,
        -1.0,
        None,
        "column w: got -1.0, expected a finite weight >= 0; write 0 for an example that shall not count",
    ),
    ("w", 13, None, None, "column w: got None, expected a finite weight"),
    ("w", 13, math.inf, None, "column w: got inf, expected a finite weight"),
    ("time", 13, None, None, "column time: got None, expected a time; write when the example was shown"),
]


@pytest.mark.parametrize(("name", "row", "value", "kind", "says"), VALUES, ids=[f"{v[0]}-{v[2]}" for v in VALUES])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_wrong_value_is_shown_with_its_place(write, table, schema, name, row, value, kind, says, num_workers):
    log = table(20)
    if kind and pa.types.is_integer(kind):
        log = replaced(log, name, [None if v is None else int(v) % 2 for v in log[name].to_pylist()], kind)
    path = write(with_value(log, name, row, value, kind), row_group_size=8)
    found = message(path, schema, num_workers=num_workers)
    assert found.startswith(f"{path}, row 13 (row group 1), column ")
    assert says in found, found


def test_a_null_behavior_or_time_is_shown(write, table, schema, schema_dict):
    for name, says in (("hist_item", "own_row"), ("hist_time", "expected a time")):
        log = table(20)
        row = next(i for i, v in enumerate(log[name].to_pylist()) if i > 8 and v)
        values = log[name].to_pylist()[row]
        path = write(with_value(log, name, row, [*values[1:], None]))
        if name == "hist_item":  # its target has a row for missing values
            assert sum(len(b) for b in BatchReader(ParquetSource(path, schema), global_batch_size=9).epoch(0)) == 20
            schema_dict["ids"][4].pop("missing")
        found = message(path, load_schema(schema_dict))
        assert f"row {row} (row group 0), column {name}: got None" in found and says in found


TYPES = [
    # column, values, what the message says
    ("user", ["a", "b"], "column user (id field user): is string; expected integers, since user has mode: vocabulary;"),
    (
        "user",
        [0.5, 1.0],
        "column user (id field user): is double; expected integers (in pandas: Int64, which holds nulls)",
    ),
    ("user", [[1], [2]], "is list<item: int64>; expected one id per row; a list column needs pooling: sum or mean"),
    ("tags", [1, 2], "is int64; expected a list per row, since pooling is given; remove pooling for one id per row"),
    (
        "tags",
        [["a"], ["b"]],
        "column tags (id field tags): is list<item: string>; expected integers, since tags has mode",
    ),
    (
        "hist_item",
        [1, 2],
        "column hist_item (sequence history, shares the table of item): is int64; expected a list per",
    ),
    (
        "hist_time",
        [["a"], ["b"]],
        "column hist_time (times of history): is list<item: string>; expected a list of numbers",
    ),
    ("time", ["a", "b"], "column time (exposure time of history): is string; expected numbers, timestamps or dates"),
    ("price", ["9", "8"], "column price (number price): is string; expected integers, floats or booleans"),
    ("emb", [1.0, 2.0], "column emb (vector emb): is double; expected a list of 3 floats per row"),
    ("click", ["yes", "no"], "column click (label of click): is string; expected 0, 1 or null as numbers"),
    ("w", ["1", "2"], "column w (weight): is string; expected numbers"),
]


@pytest.mark.parametrize(("name", "values", "says"), TYPES, ids=[f"{t[0]}-{t[1][0]}" for t in TYPES])
def test_a_wrong_type_is_named(write, table, schema, name, values, says):
    path = write(replaced(table(2), name, values))
    with pytest.raises(SchemaError) as error:
        ParquetSource(path, schema)
    assert f"{path}: " in str(error.value) and says in str(error.value).replace("element:", "item:")


def test_wrong_width_of_a_fixed_size_vector(write, table, schema):
    path = write(replaced(table(2), "emb", [[1.0] * 4] * 2, pa.list_(pa.float32(), 4)))
    with pytest.raises(SchemaError, match="expected 3 floats per row; set dim: 4 in the schema"):
        ParquetSource(path, schema)


def test_all_misfits_come_at_once_and_name_their_files(write, table, schema):
    good, bad = write(table(3), "a.parquet"), table(3).rename_columns({"city_name": "city_names", "user": "usr"})
    paths = [good, write(replaced(bad, "click", ["a"] * 3), "b.parquet"), write(bad, "c.parquet")]
    with pytest.raises(SchemaError) as error:
        ParquetSource(paths, schema)
    assert str(error.value).split("\n  ") == [
        "the data does not fit the schema: 3 problem(s)",
        f"{paths[1]} and 1 more file(s): column user: missing; did you mean 'usr'?",
        f"{paths[1]} and 1 more file(s): column city_name: missing; did you mean 'city_names'?",
        f"{paths[1]}: column click (label of click): is string; expected 0, 1 or null as numbers",
    ]


def test_a_label_without_any_value_is_refused(write, table, schema):
    path = write(replaced(table(30), "is_buy", [None] * 30, pa.int8()), row_group_size=7)
    with pytest.raises(SchemaError, match="column is_buy: no row has a label; expected some 0 or 1"):
        ParquetSource(path, schema)
    ParquetSource(path, schema, columns=schema.read_columns(with_labels=False))


def test_files_that_are_not_there_or_not_parquet(tmp_path, write, table, schema):
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "text.parquet").write_text("user,item\n1,2\n" * 50)
    whole = tmp_path / "cut.parquet"
    write(table(40), "cut.parquet")
    whole.write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "nothing").mkdir()
    for name, says in [
        ("empty.parquet", "not a Parquet file, or damaged"),
        ("text.parquet", "not a Parquet file, or damaged"),
        ("cut.parquet", "not a Parquet file, or damaged"),
        ("none.parquet", "no such file or directory; expected a Parquet file, a directory of them or a pattern"),
        ("nothing", "no \\*.parquet file in there"),
        ("x*.parquet", "no such file or directory"),
    ]:
        with pytest.raises(DataError, match=f"{re.escape(name)}: {says}"):
            ParquetSource(str(tmp_path / name), schema)
    with pytest.raises(DataError, match="an empty list of files"):
        ParquetSource([], schema)


def test_zero_rows(write, table, schema):
    with pytest.raises(DataError, match="0 rows in 1 file"):
        ParquetSource(write(table(0)), schema)


def test_a_damaged_page_names_file_and_row_group(tmp_path, write, table, schema):
    path = write(table(4000), row_group_size=1000, compression="zstd")
    content = bytearray((tmp_path / "log.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    (tmp_path / "log.parquet").write_bytes(content)
    found = message(path, schema)
    assert re.match(rf"{re.escape(path)}, row group \d \(rows from \d+\): cannot be read: ", found), found


def test_a_column_twice(write, table, schema):
    log = table(3)
    path = write(log.append_column("user", log["user"]))
    with pytest.raises(SchemaError, match="column user: there are 2 columns of this name; rename one"):
        ParquetSource(path, schema)


def test_a_file_that_vanishes_while_reading(tmp_path, write, table, schema):
    source = ParquetSource(write(table(10)), schema)
    (tmp_path / "log.parquet").unlink()
    with pytest.raises(DataError, match="log.parquet, row group 0 .*: cannot be read"):
        next(BatchReader(source, global_batch_size=4).epoch(0))


def test_empty_sequences_in_a_whole_batch_are_fine(write, table, schema):
    log = table(6)
    for name in ("hist_item", "hist_city", "hist_time", "liked", "tags", "words"):
        log = replaced(log, name, [[]] * 6, log.schema.field(name).type)
    (batch,) = BatchReader(ParquetSource(write(log), schema), global_batch_size=6).epoch(0)
    assert batch.sparse["hist_item"].lengths().tolist() == [0] * 6 and batch.ages.values().numel() == 0
    assert np.isfinite(batch.weights.numpy()).all()
