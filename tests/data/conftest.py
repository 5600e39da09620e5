"""A log with every kind of column, its schema, and a slow reader of it, row by row, to compare with."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hmoe_rec.data.hashing import hash_string
from hmoe_rec.data.schema import Schema, load_schema
from hmoe_rec.types import HASH_OF_MISSING

PYARROW = int(pa.__version__.split(".")[0])
SCHEMA = {
    "ids": [
        {"name": "user", "num_embeddings": 50},
        {"name": "city", "column": "city_name", "num_embeddings": 9, "mode": "hash", "missing": "own_row"},
        {"name": "device", "num_embeddings": 7, "mode": "modulo"},
        {"name": "tags", "num_embeddings": 11, "pooling": "mean", "max_length": 3},
        {"name": "item", "num_embeddings": 40, "missing": "own_row"},
        {"name": "words", "num_embeddings": 13, "pooling": "sum", "mode": "hash"},
    ],
    "sequences": [
        {
            "name": "history",
            "columns": {"hist_item": "item", "hist_city": "city"},
            "times": "hist_time",
            "exposure_time": "time",
            "max_length": 4,
        },
        {"name": "likes", "columns": {"liked": "user"}},
    ],
    "numbers": [
        {"name": "price", "transform": "log1p", "mean": 0.5, "std": 2.0},
        {"name": "delta", "column": "delta_cents", "transform": "slog"},
    ],
    "vectors": [{"name": "emb", "dim": 3}, {"name": "emb2", "dim": 2}],
    "tasks": [{"name": "click"}, {"name": "buy", "label": "is_buy"}],
    "weight": "w",
    "user_key": "user",
    "keys": ["row"],
}


def make_table(n: int, seed: int = 0) -> pa.Table:
    """n rows for SCHEMA, with nulls wherever they may be."""
    rng = np.random.default_rng(seed)

    def some(values, rate=0.2):
        return [None if rng.random() < rate else v for v in values]

    def lists(make, longest):
        return [[make() for _ in range(rng.integers(0, longest + 1))] for _ in range(n)]

    lengths = rng.integers(0, 7, n)
    hist_item = [rng.integers(0, 40, k).tolist() for k in lengths]
    columns = {
        "row": pa.array(range(n), pa.int64()),
        "user": pa.array(some(rng.integers(0, 50, n).tolist()), pa.int32()),
        "city_name": pa.array(some(rng.choice(["Rom", "Wien", "", "Köln"], n).tolist())).dictionary_encode(),
        "device": pa.array(some(rng.integers(0, 10**12, n).tolist()), pa.uint64()),
        "tags": pa.array(some(lists(lambda: int(rng.integers(11)), 5)), pa.list_(pa.int8())),
        "item": pa.array(some(rng.integers(0, 40, n).tolist()), pa.int16()),
        "words": pa.array(some(lists(lambda: str(rng.choice(["a", "bc", "déf"])), 4)), pa.large_list(pa.string())),
        "hist_item": pa.array(hist_item, pa.list_(pa.int64())),
        "hist_city": pa.array([rng.choice(["Rom", "Bonn"], k).tolist() for k in lengths], pa.list_(pa.string())),
        "hist_time": pa.array([rng.integers(1000, 9000, k).tolist() for k in lengths], pa.list_(pa.int64())),
        "time": pa.array(rng.integers(6000, 10000, n), pa.int32()),
        "liked": pa.array(some(lists(lambda: int(rng.integers(50)), 2)), pa.list_(pa.uint16())),
        "price": pa.array(some(rng.exponential(9.0, n).tolist()), pa.float32()),
        "delta_cents": pa.array(some(rng.integers(-500, 500, n).tolist()), pa.int32()),
        "emb": pa.array(some(rng.normal(size=(n, 3)).tolist()), pa.list_(pa.float32(), 3)),
        "emb2": pa.array(some(rng.normal(size=(n, 2)).tolist()), pa.list_(pa.float64())),
        "click": pa.array(rng.random(n) < 0.4),
        "is_buy": pa.array(some([float(x) for x in rng.random(n) < 0.3]), pa.float64()),
        "w": pa.array(rng.random(n), pa.float32()),
    }
    return pa.table(columns)


def naive_row(row: dict) -> dict:
    """What one row of `make_table` is in a Batch."""

    def ids(values, rows):
        return [rows if v is None else v for v in values]

    def slog(x):
        return math.copysign(math.log1p(abs(x)), x)

    nan, time = math.nan, row["time"]
    return {
        "user": [] if row["user"] is None else [row["user"]],
        "city": [HASH_OF_MISSING if row["city_name"] is None else hash_string(row["city_name"])],
        "device": [] if row["device"] is None else [row["device"] % 7],
        "tags": (row["tags"] or [])[:3],
        "item": ids([row["item"]], 40),
        "words": [hash_string(w) for w in row["words"] or []],
        "hist_item": row["hist_item"][-4:],
        "hist_city": [hash_string(c) for c in row["hist_city"][-4:]],
        "liked": row["liked"] or [],
        "ages": [max(0, time - t) for t in row["hist_time"][-4:]],
        "numbers": [
            nan if row["price"] is None else (math.log1p(row["price"]) - 0.5) / 2.0,
            nan if row["delta_cents"] is None else slog(row["delta_cents"]),
        ],
        "vectors": (row["emb"] or [0.0] * 3) + (row["emb2"] or [0.0] * 2),
        "labels": [float(row["click"]), nan if row["is_buy"] is None else row["is_buy"]],
        "weights": row["w"],
        "groups": HASH_OF_MISSING if row["user"] is None else row["user"],
    }


def rows_of(batch) -> list[dict]:
    """A Batch as rows like those of `naive_row`."""
    sparse = {key: [x.tolist() for x in batch.sparse[key].to_dense()] for key in batch.sparse.keys()}
    ages = [x.tolist() for x in batch.ages["history"].to_dense()] if batch.ages is not None else None
    return [
        {
            **{key: values[i] for key, values in sparse.items()},
            **({"ages": ages[i]} if ages is not None else {}),
            "numbers": batch.numbers[i].tolist(),
            "vectors": batch.vectors[i].tolist(),
            "labels": batch.labels[i].tolist(),
            "weights": batch.weights[i].item(),
            "groups": batch.groups[i].item(),
        }
        for i in range(len(batch))
    ]


@pytest.fixture
def schema() -> Schema:
    return load_schema(SCHEMA)


def _writable(table: pa.Table) -> pa.Table:
    """pyarrow before 26 writes or reads no missing vector of a fixed size: these become lists of any size."""
    for i, field in enumerate(table.schema):
        if pa.types.is_fixed_size_list(field.type) and table.column(i).null_count and PYARROW < 26:
            table = table.set_column(
                i, field.name, pa.array(table.column(i).to_pylist(), pa.list_(field.type.value_type))
            )
    return table


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a table (or columns) as a Parquet file and gives its path."""

    def to(table: pa.Table | dict, name: str = "log.parquet", **options) -> str:
        table = table if isinstance(table, pa.Table) else pa.table(table)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_writable(table), tmp_path / name, **options)
        return str(tmp_path / name)

    return to


@pytest.fixture
def table() -> Callable[..., pa.Table]:
    return make_table


@pytest.fixture
def expected() -> Callable[[pa.Table], list[dict]]:
    return lambda table: [naive_row(row) for row in table.to_pylist()]


@pytest.fixture
def as_rows() -> Callable[..., list[dict]]:
    return rows_of


@pytest.fixture
def schema_dict() -> dict:
    import copy

    return copy.deepcopy(SCHEMA)
