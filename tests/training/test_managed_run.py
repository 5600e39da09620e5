"""A run whose ids are managed: it resumes to the bit, says what its ids do, and refuses what would move them."""

import json
from pathlib import Path

import pytest
from managed_ids import managed_file
from small_run import make_log

from hmoe_rec.config import resolve_config
from hmoe_rec.training.evaluate import evaluate_run
from hmoe_rec.training.trainer import Trainer, train
from hmoe_rec.types import CheckpointError, ConfigError


def lines(run_dir: Path) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if key != "examples_per_second"} for line in found]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    make_log(folder)
    return folder


def save_and_die(self, tags, save=Trainer._save):
    save(self, tags)
    raise KeyboardInterrupt


def test_resumes_to_the_bit_and_refuses_ids_that_mean_other_rows(log):
    options = {"max_steps": 11, "log_every": 4, "checkpoint_every": 6}
    report = train(resolve_config(managed_file(log, "whole", **options)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_save", save_and_die)  # as if killed, in the middle of a window of the log
        train(resolve_config(managed_file(log, "parts", **options)))
    train(resolve_config(managed_file(log, "parts", **options, resume=True)))
    whole, parts = lines(log / "whole"), lines(log / "parts")
    assert [line["step"] for line in whole] == [4, 8, 11]
    assert parts == whole
    figures = whole[-1]
    assert figures["id_occupancy"] == {"user_id": 1.0, "item_id": 1.0, "city": 1.0}
    assert figures["id_evicted_per_step"]["city"] > 0 and figures["id_shared_rate"]["user_id"] > 0
    assert evaluate_run(str(log / "whole"))["metrics"] == report["test"]
    changed = managed_file(log, "parts", "lfu", **options, resume=True)
    with pytest.raises(CheckpointError, match="ids of user_id would get other rows .* managed was .*'lru'"):
        train(resolve_config(changed))


def test_a_pipeline_that_looks_ahead_is_refused(log):
    with pytest.raises(ConfigError, match="sparse_dist looks up ids ahead"):
        train(resolve_config(managed_file(log, "ahead", pipeline="sparse_dist", max_steps=2)))
