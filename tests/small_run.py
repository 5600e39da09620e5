"""A small log on disk and a run file for it: what a test of a whole run needs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 2600


def make_log(folder: Path, *, rows: int = ROWS, seed: int = 5) -> None:
    """Two conflicting tasks over users, items, a history with times, a hashed string, a number and a vector."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 37, rows), rng.integers(0, 23, rows)
    logit = rng.normal(0, 1.5, 37)[users] + rng.normal(0, 1.5, 23)[items]
    lengths = rng.integers(0, 6, rows)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    behaviors = pa.ListArray.from_arrays(offsets, pa.array(rng.integers(0, 23, lengths.sum())))
    times = pa.ListArray.from_arrays(offsets, pa.array(np.sort(rng.integers(0, 900, lengths.sum()))))
    like = (rng.random(rows) < 1 / (1 + np.exp(logit))).astype(float)
    table = pa.table(
        {
            "user_id": users,
            "item_id": items,
            "city": [f"city {i}" for i in rng.integers(0, 90, rows)],
            "hist_item_id": behaviors,
            "hist_time": times,
            "time": np.full(rows, 1000),
            "price": pa.array(rng.normal(0, 1, rows), mask=rng.random(rows) < 0.1),
            "graph": pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(0, 1, 3 * rows).astype("f4")), 3),
            "click": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype("i1"),
            "like": pa.array(like, mask=rng.random(rows) < 0.2),
            "weight": rng.random(rows) + 0.5,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, start, stop in (("train", 0, 2000), ("validation", 2000, 2300), ("test", 2300, rows)):
        pq.write_table(table.slice(start, stop - start), folder / f"{name}.parquet", row_group_size=170)


SCHEMA = {
    "ids": [
        {"name": "user_id", "num_embeddings": 37},
        {"name": "item_id", "num_embeddings": 23},
        {"name": "city", "num_embeddings": 41, "mode": "hash"},
    ],
    "sequences": [
        {
            "name": "history",
            "columns": {"hist_item_id": "item_id"},
            "times": "hist_time",
            "exposure_time": "time",
            "max_length": 4,
        }
    ],
    "numbers": [{"name": "price"}],
    "vectors": [{"name": "graph", "dim": 3}],
    "tasks": [{"name": "click"}, {"name": "like"}],
    "weight": "weight",
    "user_key": "user_id",
    "keys": ["user_id", "time"],
}


def run_file(folder: Path, run: str = "run", **train_options) -> dict:
    return {
        "data": {split: str(folder / f"{split}.parquet") for split in ("train", "validation", "test")}
        | {"schema": SCHEMA, "shuffle_rows": 512},
        "model": {
            "preset": "stem",
            "embedding_dim": 8,
            "expert_dim": 12,
            "expert": {"kind": "flat_dnn", "hidden": [16]},
            "tower": {"hidden": [10]},
            "dropout": 0.1,
        },
        "train": {"run_dir": str(folder / run), "epochs": 2, "global_batch_size": 160, "log_every": 1} | train_options,
        "sharding": {},
    }
