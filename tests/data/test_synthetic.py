import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hmoe_rec.data import synthetic
from hmoe_rec.data import synthetic_world as sw
from hmoe_rec.data.schema import load_schema
from hmoe_rec.data.synthetic import ensure_synthetic, open_synthetic, synthesize
from hmoe_rec.progress import progress_bar
from hmoe_rec.types import ConfigError, DataError

SMALL = {
    "rows": 300,
    "validation_rows": 70,
    "test_rows": 50,
    "num_users": 40,
    "num_items": 30,
    "num_categories": 5,
    "max_history": 7,
    "vector_dim": 3,
}
NO_EFFECTS = {task: dict.fromkeys(sizes, 0.0) for task, sizes in sw.EFFECTS.items()}


def only(**sizes):
    """Effects of click alone."""
    return {**NO_EFFECTS, "click": {**NO_EFFECTS["click"], **sizes}}


def small(directory, **arguments):
    return synthesize(directory, **{**SMALL, **arguments})


def tables(log):
    return [pq.read_table(path) for path in (log.train, log.validation, log.test)]


def column(table, name):
    return table[name].to_numpy(zero_copy_only=False)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Three blocks of training rows, enough for statistics."""
    rows = {"rows": 40_000, "validation_rows": 9_000, "test_rows": 10_000}
    sizes = {"num_users": 300, "num_items": 120, "num_categories": 6, "max_history": 9}
    return synthesize(tmp_path_factory.mktemp("log") / "log", **rows, **sizes)


# ------------------------------------------------------------------------------------------------------------- the rows


def test_the_reader_reads_every_row_with_its_schema(log):
    from hmoe_rec.data.parquet import BatchReader, ParquetSource

    schema = load_schema(log.schema)
    reader = BatchReader(ParquetSource(log.test, schema), global_batch_size=4096, shuffle=False)
    batches = list(reader.epoch(0))
    assert sum(map(len, batches)) == 10_000
    batch = batches[0]
    table = pq.read_table(log.test).slice(0, 4096)
    assert batch.labels[:, 0].tolist() == table["click"].to_pylist()
    assert [None if math.isnan(x) else x for x in batch.labels[:, 2].tolist()] == table["buy"].to_pylist()
    assert batch.sparse["hist_item_id"].lengths().tolist() == [len(x) for x in table["hist_item_id"].to_pylist()]
    assert batch.vectors.shape == (4096, 16) and batch.weights.tolist() == table["weight"].to_pylist()
    assert abs(float(batch.numbers.nan_to_num().mean(0).abs().max())) < 0.2, "the schema centers the numbers"


def test_labels_have_their_rates_and_buy_is_known_where_clicked(log):
    train, _, _ = tables(log)
    click, like, buy = (train[task].to_pylist() for task in sw.TASKS)
    assert set(click) == set(like) == {0, 1} and set(buy) == {0, 1, None}
    assert [b is not None for b in buy] == [c == 1 for c in click]
    bought = [b for b in buy if b is not None]
    assert [np.mean(x) for x in (click, like, bought)] == pytest.approx([0.35, 0.2, 0.3], abs=0.02)


def test_histories_are_oldest_first_and_of_any_length(log):
    rows = pq.read_table(log.test).slice(0, 2000).to_pylist()
    lengths = {len(row["hist_item_id"]) for row in rows}
    assert lengths == set(range(10))
    category_of = {row["item_id"]: row["category_id"] for row in pq.read_table(log.train).slice(0, 20_000).to_pylist()}
    for row in rows:
        assert len(row["hist_item_id"]) == len(row["hist_category_id"]) == len(row["hist_time"])
        assert row["hist_time"] == sorted(row["hist_time"]) and all(t <= row["time"] for t in row["hist_time"])
        assert all(
            category_of.get(i, c) == c for i, c in zip(row["hist_item_id"], row["hist_category_id"], strict=True)
        )


def test_splits_follow_one_another_in_time(log):
    times = np.concatenate([column(t, "time") for t in tables(log)])
    assert (np.diff(times) >= 0).all()
    train, validation, test = ((column(t, "time") - sw.START_SECONDS) // 86400 for t in tables(log))
    assert set(train) == set(range(8)) and set(validation) == {8} and set(test) == {9}


def test_ids_are_skewed_within_their_vocabulary_and_some_values_are_missing(log):
    train = pq.read_table(log.train)
    for name, size in (("user_id", 300), ("item_id", 120), ("category_id", 6)):
        counts = np.sort(np.bincount(column(train, name), minlength=size))[::-1]
        assert len(counts) == size and counts[-1] > 0
        assert counts[0] > (1.1 if name == "category_id" else 2) * counts[size // 2], name
    assert counts.sum() == 40_000
    for name in ("city", "age_bucket", "price"):
        assert train[name].null_count == pytest.approx(0.05 * 40_000, rel=0.1)
    assert {len(tags) for tags in train["tags"].to_pylist()} == set(range(5))


# ------------------------------------------------------------------------------------------------- seeds and blocks


def test_equal_arguments_give_equal_rows_and_another_seed_others(tmp_path):
    one, again, other = (small(tmp_path / d, seed=s) for d, s in (("a", 4), ("b", 4), ("c", 5)))
    for left, right, different in zip(tables(one), tables(again), tables(other), strict=True):
        assert left.equals(right) and not left.equals(different)
    assert one.truth["bayes"] == again.truth["bayes"]


@pytest.mark.parametrize("row_group_rows", [1000, 30_000])
def test_row_groups_do_not_change_the_rows(log, tmp_path, row_group_rows):
    arguments = {**log.truth["arguments"], "row_group_rows": row_group_rows}
    other = synthesize(tmp_path / "log", **arguments)
    sizes = [pq.ParquetFile(other.train).metadata.row_group(i).num_rows for i in range(2)]
    assert sizes == [row_group_rows, min(row_group_rows, 40_000 - row_group_rows)]
    assert all(a.equals(b) for a, b in zip(tables(log), tables(other), strict=True))
    probabilities = [pq.read_table(Path(x.directory) / "truth" / "train.parquet") for x in (log, other)]
    assert probabilities[0].equals(probabilities[1])
    assert log.truth["bayes"] == other.truth["bayes"]


def test_a_block_needs_no_other_block(log):
    world = sw.build_world(sw.SyntheticArguments(**log.truth["arguments"]))
    start, stop = 16384, 2 * 16384
    times = column(pq.read_table(log.train), "time")[start:stop]
    block = sw.draw_exposures(world, sw.block_generator(1, "train", 1), times, training=True)
    assert block.items.tolist() == column(pq.read_table(log.train), "item_id")[start:stop].tolist()


# ------------------------------------------------------------------------------------------------------ what is planted


@pytest.mark.parametrize("clock", ["position", "age"])
def test_true_probabilities_follow_the_formula(tmp_path, clock):
    log = small(tmp_path / "log", history_clock=clock, effects={"like": {"slot": 0.2}})
    world = np.load(Path(log.directory) / "truth" / "world.npz")
    rows = pq.read_table(log.test).to_pylist()
    truth = pq.read_table(Path(log.directory) / "truth" / "test.parquet").to_pylist()
    for row, probabilities in zip(rows, truth, strict=True):
        assert row["row_id"] == probabilities["row_id"]
        for t, task in enumerate(sw.TASKS):
            expected = naive_logit(log.truth, world, row, t, task)
            assert probabilities[task] == pytest.approx(1 / (1 + math.exp(-expected)), rel=1e-5)


def naive_logit(truth, world, row, t, task):
    size, u, i, target = truth["arguments"]["effects"][task], row["user_id"], row["item_id"], row["category_id"]
    affinity = sum(a * b for a, b in zip(world["preferences"][t, u], world["item_latent"][i], strict=True))
    price = 0.0
    if row["price"] is not None:
        price = math.sin(3 * math.pi * math.log(1 + row["price"]) / math.log(1024)) + (row["price"] >= 100)
    history = 0.0
    latest_first = zip(reversed(row["hist_category_id"]), reversed(row["hist_time"]), strict=True)
    for p, (category, seconds) in enumerate(latest_first):
        by_age = truth["arguments"]["history_clock"] == "age"
        k = math.log2(1 + (row["time"] - seconds) / 7200) if by_age else p
        kinship = (category == target) + 0.4 * (category == (target + 5 // 2) % 5)
        history += kinship * math.exp(-k / truth["history"]["decay_by_category"][target])
    return (
        truth["intercepts"][task]
        + size["affinity"] * affinity / math.sqrt(truth["arguments"]["latent_dim"])
        + size["user"] * world["user_bias"][u]
        + size["item"] * world["item_quality"][t, i]
        + size["price"] * price
        + size["history"] * history
        + size["slot"] * (1.0, 0.3, -0.3, -1.0)[row["slot"]]
    )


def test_labels_show_category_x_position(tmp_path):
    """A logistic regression on the rows of one target category finds the planted decay, position by position."""
    arguments = {"rows": 60_000, "num_categories": 4, "max_history": 5, "fastest_decay": 1, "slowest_decay": 4}
    log = synthesize(tmp_path / "log", **arguments, validation_rows=10, test_rows=10, effects=only(history=1.5))
    train = pq.read_table(log.train)
    target, click = column(train, "category_id"), column(train, "click")
    history = np.full((60_000, 5), -1)
    for n, categories in enumerate(train["hist_category_id"].to_pylist()):
        history[n, : len(categories)] = categories[::-1]
    decays = log.truth["history"]["decay_by_category"]
    found = {}
    for a in (int(np.argmin(decays)), int(np.argmax(decays))):
        own, related = history[target == a] == a, history[target == a] == log.truth["history"]["related_category"][a]
        weights = logistic_regression(np.hstack([own, related]).astype(float), click[target == a])
        planted = 1.5 * np.exp(-np.arange(5) / decays[a])
        assert weights == pytest.approx(np.concatenate([planted, 0.4 * planted]), abs=0.25)
        found[a] = weights[2] / weights[0]
    fast, slow = found.values()
    assert fast < 0.3 < 0.5 < slow, "categories differ in how fast they fade"


def logistic_regression(x, y):
    """Coefficients without the intercept, by Newton's method."""
    x = np.hstack([x, np.ones((len(x), 1))])
    w = np.zeros(x.shape[1])
    for _ in range(8):
        p = 1 / (1 + np.exp(-x @ w))
        w += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x, x.T @ (y - p))
    return w[:-1]


def test_labels_show_the_ordinal_effect(tmp_path):
    log = synthesize(
        tmp_path / "log", rows=60_000, validation_rows=10, test_rows=10, missing=0.3, effects=only(price=1.5)
    )
    train = pq.read_table(log.train)
    price, click = column(train, "price"), column(train, "click")
    edges = [12, 24, 40, 65, 100, 150, 250, 420]
    rates, effects = [], []
    for low, high in zip(edges, edges[1:], strict=False):
        rows = (price >= low) & (price < high)
        rates.append(np.log(click[rows].mean() / (1 - click[rows].mean())))
        effects.append(sw.price_effect(price[rows].astype(int)).mean())
    assert np.corrcoef(rates, effects)[0, 1] > 0.98
    assert (np.diff(rates) > 0.3).any() and (np.diff(rates) < -0.3).any(), "it rises and falls"
    missing = np.isnan(price)
    intercept = log.truth["intercepts"]["click"]
    assert click[missing].mean() == pytest.approx(1 / (1 + math.exp(-intercept)), abs=0.02)


def test_training_does_not_show_some_prices(tmp_path):
    log = small(tmp_path / "log", rows=20_000, test_rows=20_000, unseen_price_share=0.5)
    train, _, test = ({int(p) for p in column(t, "price") if not np.isnan(p)} for t in tables(log))
    assert len({p for p in range(50, 150) if p not in train}) > 30
    assert set(range(50, 150)) <= test


@pytest.mark.parametrize("conflict", [-1.0, -0.6, 0.5])
def test_preferences_of_click_and_like_conflict(conflict):
    world = sw.build_world(sw.SyntheticArguments(num_users=3000, num_items=900, conflict=conflict))
    click, like = (world.preferences[t] @ world.item_latent.T for t in (0, 1))
    assert np.corrcoef(click.ravel(), like.ravel())[0, 1] == pytest.approx(conflict, abs=0.06)
    assert np.corrcoef(world.item_quality[:2])[0, 1] == pytest.approx(conflict, abs=0.1)
    told = world.user_vectors @ world.item_vectors.T
    assert np.corrcoef(click.ravel(), told.ravel())[0, 1] > 0.6, "the pre-trained vectors tell of the click"


def test_true_logits_of_click_and_like_conflict(log):
    truth = pq.read_table(Path(log.directory) / "truth" / "train.parquet")
    click, like = (np.log(p / (1 - p)) for p in (column(truth, "click"), column(truth, "like")))
    assert np.corrcoef(click, like)[0, 1] < -0.4


# ------------------------------------------------------------------------------------------------ the best that can be


@pytest.mark.parametrize("split", list(sw.SPLITS))
def test_figures_of_the_true_probabilities(log, split):
    table = pq.read_table(getattr(log, split))
    truth = pq.read_table(Path(log.directory) / "truth" / f"{split}.parquet")
    for task in sw.TASKS:
        figures = log.truth["bayes"][split][task]
        labels, p = column(table, task).astype(float), column(truth, task).astype(float)
        known = ~np.isnan(labels)
        labels, p, weights = labels[known], p[known], column(table, "weight")[known].astype(float)
        assert (figures["examples"], figures["positives"]) == (known.sum(), labels.sum())
        assert figures["auc_error_bound"] < 1e-4
        for w, found in ((weights, figures), (np.ones_like(weights), figures["unweighted"])):
            rate = np.average(labels, weights=w)
            logloss = np.average(-np.log(np.where(labels == 1, p, 1 - p)), weights=w)
            entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
            assert found["auc"] == pytest.approx(naive_auc(p, labels, w), abs=found["auc_error_bound"] + 1e-7)
            assert found["logloss"] == pytest.approx(logloss, rel=1e-5)
            assert found["ne"] == pytest.approx(logloss / entropy, rel=1e-5)
            assert found["label_mean"] == pytest.approx(rate)
    assert log.bayes_auc(split)["click"] == log.truth["bayes"][split]["click"]["auc"]


def naive_auc(scores, labels, weights):
    order = np.argsort(scores)
    positives, negatives = (weights * labels)[order], (weights * (1 - labels))[order]
    return (positives * (np.cumsum(negatives) - negatives)).sum() / (positives.sum() * negatives.sum())


def test_order_matters(log):
    click = log.truth["bayes"]["test"]["click"]
    assert 0.75 < click["auc"] < 0.9 and click["auc_without_order"] < click["auc"] - 0.01


def test_one_class_has_no_auc(tmp_path):
    figures = small(tmp_path / "log", test_rows=1).truth["bayes"]["test"]["click"]
    assert figures["auc"] is None and figures["ne"] is None and figures["examples"] == 1


# ---------------------------------------------------------------------------------------------- complete or not at all


def test_progress_counts_the_rows(tmp_path):
    seen = []
    with progress_bar("rows") as bar:

        def progress(done, total):
            bar(done, total)
            seen.append((done, total))

        small(tmp_path / "log", rows=20_000, progress=progress)
    assert seen == [(16384, 20120), (20000, 20120), (20070, 20120), (20120, 20120)]


def test_a_log_is_made_once_for_its_arguments(tmp_path):
    first = ensure_synthetic(tmp_path / "log", **SMALL)
    inode = os.stat(first.train).st_ino
    again = ensure_synthetic(tmp_path / "log", **SMALL, effects={"click": {"price": 0.6}}, row_group_rows=10)
    assert again == first and os.stat(first.train).st_ino == inode, "the default spelled out is the same log"
    other = ensure_synthetic(tmp_path / "log", **{**SMALL, "rows": 310})
    assert pq.read_metadata(other.train).num_rows == 310
    os.remove(other.test)
    assert open_synthetic(tmp_path / "log") is None
    assert pq.read_metadata(ensure_synthetic(tmp_path / "log", **{**SMALL, "rows": 310}).test).num_rows == 50
    assert sorted(p.name for p in tmp_path.iterdir()) == [".log.lock", "log"]


def test_of_many_who_ask_one_makes_it(tmp_path, monkeypatch):
    made, make = [], synthetic._make
    monkeypatch.setattr(synthetic, "_make", lambda *given: (made.append(1), make(*given))[1])
    with ThreadPoolExecutor(4) as pool:
        logs = list(pool.map(lambda _: ensure_synthetic(tmp_path / "log", **SMALL), range(4)))
    assert len(made) == 1 and all(log == logs[0] for log in logs)


class Interrupted(BaseException):
    pass


def test_an_interrupted_log_leaves_nothing_and_the_old_one_stays(tmp_path):
    def interrupt(done, total):
        raise Interrupted

    with pytest.raises(Interrupted):
        small(tmp_path / "log", progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == [".log.lock"]
    first = small(tmp_path / "log")
    with pytest.raises(Interrupted):
        small(tmp_path / "log", seed=2, progress=interrupt)
    assert open_synthetic(tmp_path / "log") == first


def test_a_killed_process_leaves_nothing_that_looks_complete(tmp_path):
    code = f"""
import os, signal
from hmoe_rec.data.synthetic import synthesize
synthesize({str(tmp_path / "log")!r}, **{SMALL!r}, progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "log").exists() and open_synthetic(tmp_path / "log") is None
    ensure_synthetic(tmp_path / "log", **SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".log.lock", "log"], "its leftovers are gone"


def test_what_is_not_ours_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    small(tmp_path / "mine")  # an empty directory is welcome
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "truth.json").write_text(json.dumps({"generator": "somebody"}))
    (tmp_path / "file").write_text("x")
    for name in ("theirs", "file"):
        with pytest.raises(DataError, match="is no synthetic log; remove it or give another directory"):
            small(tmp_path / name)
    with pytest.raises(DataError, match=f"file{os.sep}log: cannot write a synthetic log here"):
        small(tmp_path / "file" / "log")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows of the synthetic log must be >= 1, got 0"),
        ({"seed": -1}, "seed .* >= 0, got -1"),
        ({"num_categories": 1}, "num_categories .* >= 2, got 1"),
        ({"num_items": 4}, r"num_items .* >= num_categories \(5\), got 4"),
        ({"vector_dim": 1}, r"vector_dim .* >= latent_dim \(2\), got 1"),
        ({"conflict": -1.5}, r"conflict .* in \[-1, 1\], got -1.5"),
        ({"like_rate": 1.0}, r"like_rate .* in \(0, 1\), got 1.0"),
        ({"skew": 1.0}, r"skew .* in \[0, 1\), got 1.0"),
        ({"history_clock": "time"}, "history_clock .* 'position' or 'age', got 'time'"),
        ({"slowest_decay": 0.5}, r"slowest_decay .* >= fastest_decay \(1.0\), got 0.5"),
        ({"row_group_rows": 0}, "row_group_rows .* >= 1, got 0"),
        ({"effects": {"clik": {}}}, "effects: unknown task 'clik'.*did you mean 'click'?"),
        ({"effects": {"buy": {"prise": 1}}}, "effects.buy: unknown effect 'prise'.*did you mean 'price'?"),
    ],
)
def test_arguments_out_of_range(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        small(tmp_path / "log", **arguments)
    assert open_synthetic(tmp_path / "log") is None


def test_a_remote_directory_is_refused():
    with pytest.raises(ConfigError, match="s3://bucket/log: a synthetic log is written to a local directory"):
        small("s3://bucket/log")
