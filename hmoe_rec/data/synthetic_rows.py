"""The world of the synthetic log -> its rows and their true probabilities as Arrow tables, and the rows' schema."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from hmoe_rec.data import synthetic_world as sw
from hmoe_rec.data.schema import Schema, load_schema
from hmoe_rec.data.true_score import TrueScore

BLOCK_ROWS = 16384  # rows that are drawn together; other sizes give other rows


def blocks(
    world: sw.World, intercepts: np.ndarray, split: str, scores: list[TrueScore]
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """(log, true probabilities) of one block after the other; every block has random numbers of its own."""
    a, rows = world.arguments, world.arguments.split_rows(split)
    first, last = (sw.START_SECONDS + day * sw.DAY_SECONDS for day in sw.SPLITS[split])
    for block, start in enumerate(range(0, rows, BLOCK_ROWS)):
        rng = sw.block_generator(a.seed, split, block)
        row_ids = np.arange(start, min(start + BLOCK_ROWS, rows))
        times = first + (row_ids * ((last - first) / rows)).astype(np.int64)
        exposures = sw.draw_exposures(world, rng, times, training=split == "train")
        logits = sw.true_logits(world, exposures, intercepts)
        unordered = sw.logits_without_order(world, exposures, logits)
        labels = rng.random(logits.shape) < sw.sigmoid(logits)
        known = np.ones(labels.shape, dtype=bool)
        known[:, sw.TASKS.index("buy")] = labels[:, sw.TASKS.index("click")]
        for t, score in enumerate(scores):
            k = known[:, t]
            score.update(logits[k, t], unordered[k, t], labels[k, t], exposures.weights[k])
        probabilities = sw.sigmoid(logits).astype(np.float32)
        yield (
            _table(world, exposures, row_ids, labels, known),
            pa.table({"row_id": row_ids} | {task: probabilities[:, t] for t, task in enumerate(sw.TASKS)}),
        )


def _table(world: sw.World, e: sw.Exposures, row_ids: np.ndarray, labels: np.ndarray, known: np.ndarray) -> pa.Table:
    a = world.arguments
    cities = pa.DictionaryArray.from_arrays(
        pa.array(world.city[e.users], pa.int32(), mask=~e.city_known), [f"city {i:02d}" for i in range(sw.NUM_CITIES)]
    )
    # The drawn matrices have the latest behavior first; the file has it last.
    exists = np.arange(a.max_history)[::-1] < e.lengths[:, None]
    hist_items = e.history_items[:, ::-1][exists]
    hist_times = (e.time_seconds[:, None] - e.ages_seconds[:, ::-1])[exists]
    tag_exists = np.arange(sw.MAX_TAGS) < world.tag_counts[e.items][:, None]
    columns = {
        "row_id": pa.array(row_ids),
        "time": pa.array(e.time_seconds),
        "user_id": _int32(e.users),
        "city": cities.cast(pa.string()),
        "age_bucket": pa.array(world.age_bucket[e.users], pa.int32(), mask=~e.age_known),
        "gender": _int32(world.gender[e.users]),
        "user_vector": _vectors(world.user_vectors[e.users]),
        "item_id": _int32(e.items),
        "category_id": _int32(world.category[e.items]),
        "author_id": _int32(world.author[e.items]),
        "tags": _lists(_int32(world.tags[e.items][tag_exists]), world.tag_counts[e.items]),
        "item_vector": _vectors(world.item_vectors[e.items]),
        "slot": _int32(e.slots),
        "price": pa.array(e.price, pa.int32(), mask=e.price < 0),
        "age_days": pa.array((e.time_seconds - world.published_seconds[e.items]) / sw.DAY_SECONDS, pa.float32()),
        "hist_item_id": _lists(_int32(hist_items), e.lengths),
        "hist_category_id": _lists(_int32(world.category[hist_items]), e.lengths),
        "hist_time": _lists(pa.array(hist_times), e.lengths),
        "weight": pa.array(e.weights, pa.float32()),
    }
    for t, task in enumerate(sw.TASKS):
        columns[task] = pa.array(labels[:, t], pa.int8(), mask=~known[:, t])
    return pa.table(columns)


def _int32(values: np.ndarray) -> pa.Array:
    return pa.array(values.astype(np.int32))


def _lists(values: pa.Array, lengths: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _vectors(values_BV: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values_BV.reshape(-1)), values_BV.shape[1])


def schema_of(a: sw.SyntheticArguments) -> Schema:
    """The schema of the log that these arguments make."""
    return load_schema(
        {
            "ids": [
                {"name": "user_id", "num_embeddings": a.num_users},
                {"name": "city", "num_embeddings": 4 * sw.NUM_CITIES, "mode": "hash", "missing": "own_row"},
                {"name": "age_bucket", "num_embeddings": sw.NUM_AGE_BUCKETS, "missing": "own_row"},
                {"name": "gender", "num_embeddings": sw.NUM_GENDERS},
                {"name": "item_id", "num_embeddings": a.num_items},
                {"name": "category_id", "num_embeddings": a.num_categories},
                {"name": "author_id", "num_embeddings": a.num_authors},
                {"name": "tags", "num_embeddings": sw.NUM_TAGS, "pooling": "mean"},
                {"name": "slot", "num_embeddings": sw.NUM_SLOTS},
            ],
            "sequences": [
                {
                    "name": "history",
                    "columns": {"hist_item_id": "item_id", "hist_category_id": "category_id"},
                    "times": "hist_time",
                    "exposure_time": "time",
                    "time_unit": "s",
                    "max_length": a.max_history,
                }
            ],
            "numbers": [
                {"name": "price", "transform": "log1p", "mean": 4.5, "std": 1.0},
                {"name": "age_days", "mean": 187.0, "std": 105.0},
            ],
            "vectors": [{"name": "user_vector", "dim": a.vector_dim}, {"name": "item_vector", "dim": a.vector_dim}],
            "tasks": [{"name": task} for task in sw.TASKS],
            "weight": "weight",
            "user_key": "user_id",
            "keys": ["row_id", "user_id", "item_id", "time"],
            "time": "time",
        },
        where="schema of the synthetic log",
    )
