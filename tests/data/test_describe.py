import numpy as np
import pyarrow as pa
import pytest
import yaml

from hmoe_rec.data import describe as describe_module
from hmoe_rec.data.describe import describe
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.data.schema import load_schema
from hmoe_rec.types import DataError, SchemaError


def log(n=400, seed=0) -> pa.Table:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 6, n)
    lists = [rng.integers(0, 30, k).tolist() for k in lengths]
    lists[0], lengths[0] = [29], 1
    return pa.table(
        {
            "row": range(n),
            "user_id": rng.permutation(n) % 90,
            "item_id": np.arange(n) * 7 % 30,
            "city": rng.choice(["Rom", "Wien", "Bonn"], n),
            "session_key": rng.integers(0, 2**60, n),
            "tags": [rng.integers(0, 12, rng.integers(0, 4)).tolist() for _ in range(n)],
            "hist_item_id": lists,
            "hist_time_ms": [(1.6e12 + np.arange(k)).astype(int).tolist() for k in lengths],
            "time_ms": 1_650_000_000_000 + rng.integers(0, 10**8, n),
            "price": [None if x > 300 else x for x in rng.lognormal(1, 2, n).tolist()],
            "num_friends": rng.integers(0, 1000, n),
            "balance": rng.standard_t(2, n) * 100,
            "graph": pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=4 * n), pa.float32()), 4),
            "is_click": rng.random(n) < 0.3,
            "long_view": [None if i % 7 == 0 else int(i % 3 == 0) for i in range(n)],
            "is_adult": (np.arange(n) % 2).astype(np.int8),
            "weight": rng.random(n),
            "constant": ["x"] * n,
            "nothing": pa.nulls(n, pa.int32()),
            "point": [{"x": 1.0}] * n,
        }
    )


def test_proposes_a_schema_that_reads_the_file(write):
    path = write(log(), row_group_size=150)
    report = describe(path)
    text = str(report)
    assert text == report.schema_yaml() and yaml.safe_load(text) == report.schema()
    schema = load_schema(yaml.safe_load(text))
    ids = {c.name: c for c in schema.ids}
    assert list(ids) == ["user_id", "item_id", "city", "session_key", "is_adult", "tags"]
    assert ids["user_id"].num_embeddings == 90 and ids["user_id"].mode == "vocabulary"
    assert ids["city"].mode == ids["session_key"].mode == "hash"
    assert ids["session_key"].num_embeddings >= 2 * 400
    assert ids["tags"].pooling == "mean" and ids["tags"].num_embeddings == 12
    (sequence,) = schema.sequences
    assert sequence.columns == {"hist_item_id": "item_id"} and sequence.max_length == 5
    assert (sequence.times, sequence.exposure_time, sequence.time_unit) == ("hist_time_ms", "time_ms", "ms")
    numbers = {c.name: c.transform for c in schema.numbers}
    assert numbers == {"price": "log1p", "num_friends": "none", "balance": "slog"}
    assert [(v.name, v.dim) for v in schema.vectors] == [("graph", 4)]
    assert schema.task_names == ("is_click", "long_view")
    assert (schema.weight, schema.user_key, schema.time) == ("weight", "user_id", "time_ms")
    batches = list(BatchReader(ParquetSource(path, schema), global_batch_size=64).epoch(0))
    assert sum(len(b) for b in batches) == 400
    numbers = np.concatenate([b.numbers.numpy() for b in batches])
    np.testing.assert_allclose(np.nanmean(numbers, axis=0), 0, atol=1e-2)
    np.testing.assert_allclose(np.nanstd(numbers, axis=0), 1, atol=1e-2)


def test_facts_are_counted(write):
    table = log()
    facts = {c.name: c for c in describe(write(table, row_group_size=150)).columns}
    assert list(facts) == table.column_names
    assert facts["price"].missing == pytest.approx(table["price"].null_count / 400)
    assert facts["city"].distinct == 3 and facts["user_id"].distinct == 90
    assert (facts["user_id"].low, facts["user_id"].high) == (0, 89)
    assert facts["tags"].lengths.tolist() == [len(x) for x in table["tags"].to_pylist()]
    assert facts["long_view"].is_binary and facts["long_view"].values.mean() == pytest.approx(114 / 342, abs=0.01)
    assert "3 distinct" in facts["city"].summary() and "% ones" in facts["is_click"].summary()
    assert facts["price"].median == pytest.approx(np.nanmedian(table["price"].to_numpy(zero_copy_only=False)))


def test_what_is_left_out_says_why(write):
    text = str(describe(write(log())))
    for line in ("row (a row number)", "constant (always the same)", "nothing (no values)", "point (no role takes"):
        assert f"#   {line}" in text
    assert "400 rows, 1 row group(s) in 1 file(s); figures from all rows" in text


def test_large_files_are_sampled_but_extremes_are_not(write, monkeypatch):
    monkeypatch.setattr(describe_module, "SAMPLE_ROWS", 100)
    monkeypatch.setattr(describe_module, "GROUP_ROWS", 30)
    values = np.arange(1000)[::-1] % 700
    report = describe(write({"a_id": values, "click": values % 2}, row_group_size=50))
    assert report.num_rows == 1000 and report.sampled_rows <= 150
    assert "figures from a sample of" in str(report)
    assert (report.columns[0].low, report.columns[0].high) == (0, 699)
    assert report.columns[0].distinct == report.sampled_rows


def test_a_row_group_without_values_leaves_the_extremes_of_the_others(write, monkeypatch):
    monkeypatch.setattr(describe_module, "SAMPLE_ROWS", 4)
    values = pa.array([5, 3, None, None, 9, 8])
    report = describe(write({"a_id": values, "click": [0, 1] * 3}, row_group_size=2))
    assert report.sampled_rows == 4 and (report.columns[0].low, report.columns[0].high) == (3, 9)


def test_types_may_differ_from_file_to_file(write):
    whole = write({"a_id": pa.nulls(2), "x": [1, 2], "click": [0, 1]}, "1.parquet")
    other = write({"a_id": [1, 2], "x": [0.5, None], "click": [1, 0]}, "2.parquet")
    found = {c.name: c for c in describe([whole, other]).columns}
    assert (found["a_id"].type, found["x"].type) == (pa.int64(), pa.float64())
    assert found["x"].median == 1 and found["a_id"].missing == 0.5
    text = write({"a_id": ["a", "b"], "x": [1, 2], "click": [1, 0]}, "3.parquet")
    with pytest.raises(SchemaError, match="column a_id: is int64, string in different files"):
        describe([other, text])


def test_lists_that_are_all_empty_are_left_out(write):
    empty = pa.array([[], []], pa.list_(pa.int64()))
    assert "#   tags (no values)" in str(describe(write({"a_id": [1, 2], "tags": empty, "click": [0, 1]})))


def test_the_table_prints(write, capsys):
    import rich

    rich.print(describe(write(log())).table())
    shown = " ".join(capsys.readouterr().out.split())  # lines break where the path is long
    assert "400 rows" in shown and "item" in shown


def test_without_any_label_the_schema_says_so(write):
    text = str(describe(write({"a_id": [0, 1, 2, 1], "price": [0.5, 1.5, 2.5, 2.5]})))
    assert "tasks: []  # none found: write at least one" in text


def test_zero_one_columns_are_labels_if_no_name_tells(write):
    report = describe(write({"a_id": [0, 1, 2, 1], "outcome": [0, 1, 1, 0]}))
    assert report.schema()["tasks"] == [{"name": "outcome"}]


def test_bad_files(write, tmp_path):
    with pytest.raises(DataError, match="0 rows"):
        describe(write({"a": pa.array([], pa.int64())}))
    with pytest.raises(DataError, match="columns differ from .*: b"):
        describe([write({"a": [1]}, "1.parquet"), write({"a": [1], "b": [2]}, "2.parquet")])
    with pytest.raises(DataError, match="no such file"):
        describe(str(tmp_path / "none.parquet"))


@pytest.mark.data
def test_kuairand_log(data_dir):
    schema = load_schema(describe(str(data_dir / "kuairand_pure" / "interactions_20220425_20220504.parquet")).schema())
    assert {"is_click", "long_view", "is_like", "is_profile_enter"} <= set(schema.task_names)
    assert {"user_id", "video_id", "tab"} <= {c.name for c in schema.ids}
    assert "duration_ms" in {n.name for n in schema.numbers}
    assert schema.user_key == "user_id" and schema.time == "time_ms"
