"""Which rows are kept, that they are the same however they are read, and that models stay calibrated."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from hmoe_rec.data import source as source_module
from hmoe_rec.data.columns import Place
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.data.sampling import RowSampler, count_kept, streams_of
from hmoe_rec.data.schema import load_schema
from hmoe_rec.losses.bce import bce
from hmoe_rec.types import ConfigError, DataError, SchemaError

SCHEMA = load_schema(
    {
        "ids": [{"name": "cell", "num_embeddings": 60}, {"name": "slot", "num_embeddings": 3}],
        "tasks": [{"name": "click"}, {"name": "like"}],
        "weight": "w",
        "keys": ["row"],
    }
)
RULE = {"rates": {"click": 0.2, "like": 0.4}, "slice_column": "slot"}
RULE["slice_rates"] = {"1": {"click": 0.5, "like": 0.1}, "2": {"click": 1.0, "like": 0.3}}


def log(rows: int, seed: int = 1) -> pa.Table:
    """Random labels, some of them null, in three slots."""
    rng = np.random.default_rng(seed)
    labels = {
        t: pa.array((rng.random(rows) < 0.3).astype("i1"), mask=rng.random(rows) < 0.2) for t in SCHEMA.task_names
    }
    columns = {"row": np.arange(rows), "cell": rng.integers(0, 60, rows), "slot": rng.integers(0, 3, rows)}
    return pa.table({**columns, **labels, "w": rng.random(rows), "own": rng.random(rows)})


def read(path: str, sampler: RowSampler, **options) -> list:
    """(Batch, rows' numbers) of an epoch."""
    reader = BatchReader(
        ParquetSource(path, SCHEMA), **{"global_batch_size": 64, "carry": ["row"], **options}, sampler=sampler
    )
    return [(batch, carried["row"].to_pylist()) for batch, carried in reader.epoch(0)]


def by_row(batches: list) -> dict[int, tuple]:
    """Row -> its labels, weight and offsets, whatever the order."""
    found = {}
    for batch, rows in batches:
        offsets = torch.zeros(len(rows), 2) if batch.offsets is None else batch.offsets
        values = zip(batch.labels.nan_to_num(-1).tolist(), batch.weights.tolist(), offsets.tolist(), strict=True)
        found |= dict(zip(rows, ((tuple(y), w, tuple(o)) for y, w, o in values), strict=True))
    return found


@pytest.mark.parametrize("correction", ["weights", "logit"])
def test_equals_the_rule_row_by_row(write, correction):
    table = log(400)
    path = write(table, row_group_size=70)
    sampler = RowSampler(SCHEMA, **RULE, correction=correction, seed=3)
    found = by_row(read(path, sampler))
    u = sampler._uniform(table, 0, streams_of(ParquetSource(path, SCHEMA))[0])
    kept = 0
    for i, row in enumerate(table.to_pylist()):
        rates = RULE["slice_rates"].get(str(row["slot"]), RULE["rates"])
        pi = {t: {None: 0.0, 0: rates[t], 1: 1.0}[row[t]] for t in ("click", "like")}
        if u[i] >= max(pi.values()):
            assert i not in found
            continue
        kept += 1
        labels = tuple(-1.0 if row[t] is None else float(row[t]) for t in pi)
        if correction == "weights":
            expected = (labels, row["w"] / max(pi.values()), (0.0, 0.0))
        else:
            labels = tuple(y if u[i] < p else -1.0 for y, p in zip(labels, pi.values(), strict=True))
            expected = (labels, row["w"], tuple(-np.log(rates[t]) for t in pi))
        for a, b in zip(found[i], expected, strict=True):
            assert a == pytest.approx(b, rel=1e-6)
    assert len(found) == kept and 150 < kept < 350


def test_counted_before_is_what_is_read_and_what_the_log_has(write):
    table = log(500)
    source = ParquetSource(write(table, row_group_size=70), SCHEMA)
    sampler = RowSampler(SCHEMA, **RULE, correction="logit")
    kept = count_kept(source, sampler)
    reader = BatchReader(source, global_batch_size=64, sampler=sampler, kept=kept)
    batches = list(reader.epoch(0))
    assert reader.num_rows == kept.total == sum(map(len, batches)) and reader.steps_per_epoch == len(batches)
    labels = torch.cat([b.labels for b in batches])
    for t, task in enumerate(SCHEMA.task_names):
        for label in (0, 1):
            in_log = sum(y == label for y in table[task].to_pylist())
            assert kept.labels[:, t, label].sum(0).tolist() == [in_log, int((labels[:, t] == label).sum())]
    assert (kept.labels[:, :, 1, 0] == kept.labels[:, :, 1, 1]).all(), "every positive counts"
    parts = [count_kept(source, sampler, rank=r, world_size=3) for r in range(3)]
    assert (sum(p.per_chunk for p in parts) == kept.per_chunk).all() and (
        sum(p.labels for p in parts) == kept.labels
    ).all()


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_same_rows_for_any_processes_lanes_workers_and_steps(write, shuffle):
    path = write(log(700), row_group_size=50)
    sampler = RowSampler(SCHEMA, **RULE, correction="logit", seed=2)
    options = dict(shuffle=shuffle, lanes=8, shuffle_rows=160, seed=5)
    alone = read(path, sampler, **options)
    for world_size in (2, 3, 7):
        ranks = [
            read(path, sampler, **options, rank=r, world_size=world_size, num_workers=0) for r in range(world_size)
        ]
        for step, (_, rows) in enumerate(alone):
            assert [row for rank in ranks for row in rank[step][1]] == rows
    reader = BatchReader(
        ParquetSource(path, SCHEMA), global_batch_size=64, carry=["row"], sampler=sampler, num_workers=2, **options
    )
    rest = [carried["row"].to_pylist() for _, carried in reader.epoch(0, start_step=2)]
    assert rest == [rows for _, rows in alone[2:]]
    other_lanes = read(path, sampler, shuffle=shuffle, lanes=5, seed=9)
    assert by_row(other_lanes) == by_row(alone)


def test_rows_keep_the_numbers_that_they_have_in_the_log(write):
    source = ParquetSource(write(log(300), row_group_size=50), SCHEMA)
    sampler = RowSampler(SCHEMA, **RULE)
    numbers = []
    for options in ({}, {"sampler": sampler}, {"sampler": sampler, "rank": 1, "world_size": 3}):
        pairs = BatchReader(source, global_batch_size=64, carry=["row"], **options).epoch(0)
        numbers.append(
            {row: n for b, t in pairs for row, n in zip(t["row"].to_pylist(), b.row_ids.tolist(), strict=True)}
        )
    assert len(numbers[0]) == 300 > len(numbers[1]) > len(numbers[2]) > 20
    for found in numbers[1:]:
        assert found == {row: numbers[0][row] for row in found}


def test_large_row_groups_are_streamed_and_sampled(write, monkeypatch):
    path = write(log(300), row_group_size=300)
    whole = by_row(read(path, RowSampler(SCHEMA, **RULE)))
    monkeypatch.setattr(source_module, "MAX_GROUP_ROWS", 100)
    monkeypatch.setattr(source_module, "CHUNK_ROWS", 37)
    assert by_row(read(path, RowSampler(SCHEMA, **RULE))) == whole
    few = RowSampler(SCHEMA, rates={"click": 1e-9, "like": 1e-9})
    rare = log(300).to_pylist()
    rare = pa.Table.from_pylist([{**row, "click": int(i in (40, 200)), "like": 0} for i, row in enumerate(rare)])
    assert sorted(by_row(read(write(rare, row_group_size=300), few))) == [40, 200], (
        "chunks without a row are passed over"
    )


def test_a_log_may_be_moved_and_another_seed_or_file_keeps_other_rows(write, tmp_path):
    path = write(log(300), "day=1/part-0.parquet")
    write(log(300), "day=2/part-0.parquet")
    (tmp_path / "moved").mkdir()
    shutil.copy(path, tmp_path / "moved" / "part-0.parquet")
    sampler = RowSampler(SCHEMA, **RULE)
    here, moved = (by_row(read(p, sampler)) for p in (path, str(tmp_path / "moved" / "part-0.parquet")))
    assert here == moved
    assert here.keys() != by_row(read(path, RowSampler(SCHEMA, **RULE, seed=1))).keys()
    both = [row for _, rows in read(str(tmp_path / "day=*"), sampler, shuffle=False) for row in rows]
    first, second = both[: len(here)], both[len(here) :]
    assert first == sorted(here) and second != first, "files of one name are told apart"


def test_rows_of_one_key_are_kept_alike(write):
    table = log(2000)
    sampler = RowSampler(SCHEMA, rates={"click": 0.4, "like": 0.4}, key=["cell"])
    negative = np.all([table[t].fill_null(0).to_numpy() == 0 for t in SCHEMA.task_names], axis=0)
    negative &= ~np.all([table[t].is_null().to_numpy() for t in SCHEMA.task_names], axis=0)
    found = set(by_row(read(write(table), sampler)))
    cells = table["cell"].to_numpy()
    kept = {cell: {row in found for row in np.flatnonzero(negative & (cells == cell)).tolist()} for cell in range(60)}
    assert all(len(answers) == 1 for answers in kept.values()) and 10 < sum(True in a for a in kept.values()) < 40


def test_rows_by_a_column(write):
    """Sums over kept rows with their weights estimate those over all rows."""
    table = log(20_000)
    sampler = RowSampler(SCHEMA, rates={"click": 1.0, "like": 1.0}, probability="own", scale=0.5)
    found = by_row(read(write(table), sampler))
    known = ~np.all([table[t].is_null().to_numpy() for t in SCHEMA.task_names], axis=0)
    own, w = table["own"].to_numpy(), table["w"].to_numpy()
    assert len(found) == pytest.approx(0.5 * own[known].sum(), rel=0.05)
    for i, (_, weight, _) in list(found.items())[:50]:
        assert weight == pytest.approx(w[i] / min(1, 0.5 * own[i]), rel=1e-5)
    assert sum(w for _, w, _ in found.values()) == pytest.approx(w[known].sum(), rel=0.05)


def test_what_is_left_out_is_not_decoded_and_errors_say_the_row(write):
    table = log(200)
    sampler = RowSampler(SCHEMA, **RULE)
    kept = sorted(by_row(read(write(table), sampler)))
    out = next(i for i in range(200) if i not in kept)
    for row, fails in ((out, False), (kept[5], True)):
        cells = table["cell"].to_numpy().copy()
        cells[row] = 77
        path = write(table.set_column(1, "cell", pa.array(cells)))
        if fails:
            with pytest.raises(DataError, match=rf"row {row} \(row group 0\), column cell: got 77"):
                read(path, sampler, shuffle=False)
        else:
            assert len(by_row(read(path, sampler))) == len(kept)


def test_mistakes_are_told(write):
    with pytest.raises(SchemaError, match="column slot: missing"):
        read(write(log(10).drop_columns(["slot"])), RowSampler(SCHEMA, **RULE))
    for rates in ({"click": 0.2}, {"click": 0.2, "like": 0.0}, {"click": 0.2, "like": 1.1}):
        with pytest.raises(ConfigError, match="like"):
            RowSampler(SCHEMA, rates=rates)
    with pytest.raises(ConfigError, match="column own need correction: weights"):
        RowSampler(SCHEMA, rates=RULE["rates"], probability="own", correction="logit")
    path = write(log(50))
    with pytest.raises(DataError, match="slot is int64, and the slices of data.sampling are Rome"):
        read(path, RowSampler(SCHEMA, rates=RULE["rates"], slice_column="slot", slice_rates={"Rome": RULE["rates"]}))
    nothing = log(50).set_column(3, "click", pa.array([0] * 50)).set_column(4, "like", pa.array([0] * 50))
    with pytest.raises(DataError, match="keeps none of 50 rows"):
        read(write(nothing), RowSampler(SCHEMA, rates={"click": 1e-9, "like": 1e-9}))


def test_slices_of_strings_and_dictionaries():
    table = pa.table({"click": [0] * 4, "like": [0] * 4, "city": pa.array(["a", "b", None, "c"])})
    sampler = RowSampler(
        SCHEMA, rates=RULE["rates"], slice_column="city", slice_rates={"b": RULE["rates"], "a": RULE["rates"]}
    )
    for column in (table["city"], table["city"].combine_chunks().dictionary_encode()):
        found = sampler.decide(table.set_column(2, "city", column), Place("x", 0, 0), 0).slices
        assert found.tolist() == [1, 0, 2, 2]


# ---------------------------------------------------------------------------------------------------------- calibration


def planted(rows_per_cell: int) -> tuple[pa.Table, np.ndarray]:
    """20 cells in each of 3 slots -> rows, and true probabilities [60, 2] of two tasks that depend on one another.

    Every cell has as many rows of each kind as are expected, so that only sampling adds noise.
    """
    rng = np.random.default_rng(0)
    p_click = 1 / (1 + np.exp(-rng.normal(-1.5, 0.7, 60)))
    p_like_C2 = np.stack([0.1 + 0.1 * rng.random(60), 0.3 + 0.2 * rng.random(60)], 1)  # without and with a click
    joint_C4 = np.stack([(1 - p_click) * (1 - p_like_C2[:, 0]), (1 - p_click) * p_like_C2[:, 0],
                         p_click * (1 - p_like_C2[:, 1]), p_click * p_like_C2[:, 1]], 1)  # fmt: skip
    bounds_C4 = np.round(joint_C4.cumsum(1) * rows_per_cell)
    kind = (np.arange(rows_per_cell)[None, :, None] >= bounds_C4[:, None, :]).sum(2).reshape(-1)
    cells = np.repeat(np.arange(60), rows_per_cell)
    order = rng.permutation(len(cells))
    cells, kind = cells[order], kind[order]
    columns = {"row": np.arange(len(cells)), "cell": cells, "slot": cells % 3, "w": np.ones(len(cells))}
    table = pa.table({**columns, "click": (kind // 2).astype("i1"), "like": (kind % 2).astype("i1")})
    return table, np.stack([p_click, joint_C4[:, 1] + joint_C4[:, 3]], 1)


def fitted(path: str, sampler: RowSampler, drop: bool = False) -> np.ndarray:
    """Probabilities [60, 2] of the model with one logit per cell and task that is best on what is read: Newton's method
    on the loss of training."""
    (batch,) = BatchReader(ParquetSource(path, SCHEMA), global_batch_size=10**7, sampler=sampler).epoch(0)
    cells = batch.sparse["cell"].values().long()
    offsets = torch.zeros_like(batch.labels) if batch.offsets is None or drop else batch.offsets
    weights = torch.ones_like(batch.weights) if drop else batch.weights
    z_C2 = torch.zeros(60, 2, dtype=torch.float64, requires_grad=True)
    for _ in range(8):
        logits = z_C2[cells] + offsets
        # bce computes in float32; a gradient of single precision is enough for Newton's steps to end at 1e-4.
        (gradient,) = torch.autograd.grad(bce(logits, batch.labels, weights).sum(), z_C2)
        known = ~batch.labels.isnan() * weights[:, None]
        p = logits.detach().sigmoid()
        curvature = torch.zeros(60, 2, dtype=torch.float64).index_add_(0, cells, p * (1 - p) * known) / known.sum(0)
        z_C2 = (z_C2 - gradient / curvature).detach().requires_grad_()
    return z_C2.detach().sigmoid().numpy()


def errors(found_C2: np.ndarray, true_C2: np.ndarray) -> tuple[float, float]:
    """Largest over tasks and slots: |mean prediction / mean truth - 1|; expected calibration error (10 bins)."""
    ratio = ece = 0.0
    for t in range(2):
        for cells in [np.arange(60), *(np.arange(s, 60, 3) for s in range(3))]:
            p, truth = found_C2[cells, t], true_C2[cells, t]
            ratio = max(ratio, abs(p.mean() / truth.mean() - 1))
            bins = np.array_split(np.argsort(p), 10)
            ece = max(ece, sum(abs(p[b].sum() - truth[b].sum()) for b in bins) / len(cells))
    return ratio, ece


@pytest.mark.parametrize("correction", ["weights", "logit"])
def test_predictions_are_calibrated_within_one_percent_by_task_and_slice(write, correction):
    table, true_C2 = planted(4000)
    path = write(table, row_group_size=40_000)
    sampler = RowSampler(SCHEMA, **RULE, correction=correction)
    ratio, ece = errors(fitted(path, sampler), true_C2)
    assert ratio < 0.01 and ece < 0.01, (ratio, ece)
    ratio, ece = errors(fitted(path, sampler, drop=True), true_C2)
    assert ratio > 0.5 and ece > 0.1, "without the correction"


def test_an_offset_for_rows_negative_in_all_tasks_would_not_be_exact(write):
    """Why labels are left out under `logit`: with all labels of kept rows, tasks that depend on others are biased."""
    table, true_C2 = planted(4000)
    path = write(table)
    sampler = RowSampler(SCHEMA, rates={"click": 0.3, "like": 0.3}, correction="logit")
    assert errors(fitted(path, sampler), true_C2)[0] < 0.015
    with_all_labels = AllLabels(SCHEMA, rates={"click": 0.3, "like": 0.3}, correction="logit")
    assert errors(fitted(path, with_all_labels), true_C2)[0] > 0.1


class AllLabels(RowSampler):
    def apply(self, rows, decision):
        return super().apply(rows, replace(decision, counts=decision.counts | True))
