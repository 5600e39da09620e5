"""Tables with a row cache: whatever is loaded, measured, published or saved between steps, as without one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from caching_tables import cache_rows
from small_run import make_log, run_file

from hmoe_rec.config import resolve_config
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.sharding.process import process_group
from hmoe_rec.training.build import build_sharded, in_table, load_state, state_of
from hmoe_rec.training.evaluate import evaluate_run
from hmoe_rec.training.online import follow
from hmoe_rec.training.trainer import train


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    make_log(folder)
    return folder


def run_of(log: Path, name: str, optimizer: str = "rowwise_adagrad", **options) -> dict:
    """Its best step is not the last: the tables learn too fast."""
    content = run_file(log, name, embedding_optimizer=optimizer, max_steps=18, evaluate_every=3)
    content["train"]["embedding_learning_rate"] = 3000.0 if optimizer == "sgd" else 0.7
    content["train"] |= {"monitor": {"collapse_every": 5}, "publish": {"to": str(log / f"of-{name}"), "every": 4}}
    content["train"] |= options
    return content


def tables_of(state: dict) -> list[torch.Tensor]:
    return [shard.tensor for key, x in state["model"].items() if in_table(key) for shard in x.local_shards()]


def report_of(log: Path, name: str) -> dict:
    return json.loads((log / name / "report.json").read_text())


def published(log: Path, name: str) -> list[dict[str, np.ndarray]]:
    files = sorted((log / f"of-{name}").rglob("*.npz"))
    return [dict(np.load(file).items()) for file in files]


def measured(log: Path, name: str) -> list[dict]:
    return [json.loads(line)["tables"] for line in (log / name / "collapse.jsonl").open()]


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("adagrad", "sgd")]


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", *SLOW])
def test_a_run_is_the_same_with_a_cache(log, monkeypatch, optimizer):
    """The best step is loaded into the trained model at the end."""
    plain, cached = f"plain-{optimizer}", f"cached-{optimizer}"
    train(resolve_config(run_of(log, plain, optimizer)))
    with monkeypatch.context() as patch:
        calls = cache_rows(patch)
        train(resolve_config(run_of(log, cached, optimizer)))
        assert {"flush", "reset"} <= set(calls)
    whole, found = report_of(log, plain), report_of(log, cached)
    assert found["best_step"] < found["steps"], "else nothing is loaded that differs"
    for part in ("validation", "test", "test_at_best_of_each_task"):
        assert found[part] == whole[part], part
    assert evaluate_run(str(log / cached))["metrics"] == found["test"]
    assert measured(log, cached) == measured(log, plain)
    pairs = list(zip(published(log, cached), published(log, plain), strict=True))
    assert len(pairs) > 4
    assert all(a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in pairs)


def test_a_resumed_run_is_the_same_with_a_cache(log, monkeypatch):
    whole = run_of(log, "resumed-whole", checkpoint_every=5)
    train(resolve_config(whole))
    cache_rows(monkeypatch)
    train(resolve_config(run_of(log, "resumed", checkpoint_every=5, max_steps=10)))
    train(resolve_config(run_of(log, "resumed", checkpoint_every=5, resume=True)))
    assert report_of(log, "resumed")["test"] == report_of(log, "resumed-whole")["test"]


def test_a_follower_that_begins_with_another_run_is_the_same_with_a_cache(log, monkeypatch):
    train(resolve_config(run_file(log, "begun", max_steps=5)))
    (log / "in").mkdir()
    shutil.copy(log / "validation.parquet", log / "in")
    reports = []
    for cached in (False, True):
        content = run_file(log, f"followed-{cached}", max_steps=4)
        del content["train"]["epochs"]
        content["data"] = {"schema": content["data"]["schema"]}
        content["online"] = {"follow": str(log / "in"), "until_idle": 0, "poll_seconds": 0.01}
        content["online"]["start_from"] = str(log / "begun")
        if cached:
            cache_rows(monkeypatch)
        reports.append(follow(resolve_config(content))["progressive"])
    assert reports[0] == reports[1] and reports[0]["click"]["examples"] == 300


def test_what_is_filled_is_what_is_looked_up(log, monkeypatch):
    """The order: state dict (writes the cache back), fill, forget, and only then a state dict again."""
    calls = cache_rows(monkeypatch)
    config = resolve_config(run_file(log, "filled"))
    reader = ParquetSource([str(log / "test.parquet")], config.schema_of_data)
    with process_group() as process:
        sharded = build_sharded(config, process)
        batch = next(iter(BatchReader(reader, global_batch_size=50, shuffle=False).epoch(0)))
        sharded.eval()
        before = sharded(batch)[1].logits_BT
        calls.clear()
        state = state_of(sharded)
        tables = tables_of(state)
        assert len(tables) > 5
        for table in tables:
            table.fill_(0.25)
        load_state(sharded, state)
        assert calls.index("flush") < calls.index("reset")
        after = sharded(batch)[1].logits_BT
        assert all((table == 0.25).all() for table in tables_of(state_of(sharded)))
        fresh = build_sharded(config, process)
        load_state(fresh, state_of(sharded))
        assert torch.equal(fresh.eval()(batch)[1].logits_BT, after) and not torch.equal(before, after)
