"""Ids per example are those that batches hold."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hmoe_rec.data import source as source_module
from hmoe_rec.data.parquet import BatchReader
from hmoe_rec.data.pooling import LEAST, mean_ids
from hmoe_rec.data.rows import Layout
from hmoe_rec.data.schema import load_schema
from hmoe_rec.data.source import ParquetSource
from hmoe_rec.types import SchemaError

SCHEMA = load_schema(
    {
        "ids": [
            {"name": "user", "num_embeddings": 9},
            {"name": "city", "column": "town", "num_embeddings": 9, "mode": "hash", "missing": "own_row"},
            {"name": "item", "num_embeddings": 9},
            {"name": "tags", "num_embeddings": 9, "pooling": "mean", "max_length": 3},
            {"name": "never", "num_embeddings": 9, "pooling": "sum"},
        ],
        "sequences": [{"name": "history", "columns": {"hist_item": "item"}, "max_length": 4}],
        "tasks": [{"name": "click"}],
    }
)


def write_log(path, rows: int = 900, seed: int = 3, **options) -> None:
    rng = np.random.default_rng(seed)

    def ids(missing: float) -> pa.Array:
        return pa.array(rng.integers(0, 9, rows), mask=rng.random(rows) < missing)

    def lists(most: int, missing: float) -> pa.Array:
        made = [rng.integers(0, 9, rng.integers(0, most + 1)).tolist() for _ in range(rows)]
        return pa.array([None if rng.random() < missing else row for row in made], pa.list_(pa.int64()))

    town = ids(0.2).cast(pa.string()).dictionary_encode()
    columns = {"user": ids(0.3), "town": town, "item": ids(0.0), "tags": lists(8, 0.25), "hist_item": lists(9, 0.1)}
    columns |= {"never": pa.nulls(rows), "click": pa.array(rng.integers(0, 2, rows))}
    pq.write_table(pa.table(columns), path, **options)


def test_they_are_those_of_the_batches(tmp_path):
    write_log(tmp_path / "a.parquet", row_group_size=170)
    reader = BatchReader(ParquetSource(str(tmp_path), SCHEMA), global_batch_size=300, shuffle=False)
    lengths = sum(batch.sparse.lengths().view(len(Layout(SCHEMA).keys), -1).sum(1) for batch in reader.epoch(0))
    expected = dict(zip(Layout(SCHEMA).keys, (lengths / 900).tolist(), strict=True))
    seen: list[tuple[int, int]] = []
    measured = mean_ids(str(tmp_path), SCHEMA, progress=lambda *done: seen.append(done))
    assert measured.pop("never") == LEAST and expected.pop("never") == 0
    assert measured == pytest.approx(expected, rel=1e-3)
    assert measured["city"] == measured["item"] == 1 and 0.6 < measured["user"] < 0.8 and measured["hist_item"] < 4
    assert seen[-1] == (900, 900) and len(seen) == 6


def test_a_sample_is_spread_over_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "MAX_GROUP_ROWS", 100)
    monkeypatch.setattr(source_module, "CHUNK_ROWS", 50)
    for i in range(4):
        write_log(tmp_path / f"{i}.parquet", rows=600, seed=i, row_group_size=200)
    seen: list[tuple[int, int]] = []
    sampled = mean_ids(str(tmp_path), SCHEMA, rows=300, progress=lambda *done: seen.append(done))
    assert seen[-1] == (300, 300) and len(seen) == 6  # the first 50 rows of every second row group
    assert sampled == mean_ids(str(tmp_path), SCHEMA, rows=300)
    assert sampled["tags"] == pytest.approx(mean_ids(str(tmp_path), SCHEMA)["tags"], rel=0.25)


def test_a_column_that_is_missing_is_told(tmp_path):
    pq.write_table(pa.table({"user": [1]}), tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match="column hist_item: missing"):
        mean_ids(str(tmp_path), SCHEMA)
