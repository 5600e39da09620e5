"""Publications: a base and small deltas are the trainer's weights to the bit, and nothing damaged is taken."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from gloo import run_ranks
from managed_ids import managed_file
from small_run import make_log
from tiny_model import full

from hmoe_rec.config import resolve_config
from hmoe_rec.serving.published import PublishedWeights, save_npz
from hmoe_rec.training.build import build_model
from hmoe_rec.training.checkpoint import read_checkpoint, read_unsharded
from hmoe_rec.training.evaluate import read_run_config
from hmoe_rec.training.publication import DENSE, publications
from hmoe_rec.training.publish import Publisher
from hmoe_rec.training.trainer import train
from hmoe_rec.types import CheckpointError, TrainingError


def run_of(folder: Path, name: str, plan: str = "table_wise", **options) -> dict:
    publish = {"to": str(folder / name / "published"), "every": 2, "base_every": 3}
    content = managed_file(folder, name, **{"max_steps": 9, "global_batch_size": 24, "publish": publish} | options)
    content["sharding"] = {"plan": plan}
    return content


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    make_log(folder, rows=900 + 1700)
    return folder


def train_and_follow(rank: int, world_size: int, content: dict) -> list[dict]:
    """Trains; after every publication a follower's arrays must be the model's. -> what it applied."""
    seen: list[dict] = []
    follower = PublishedWeights(content["train"]["publish"]["to"])
    before: dict[str, np.ndarray] = {}
    dense: dict[str, np.ndarray] = {}

    def publish_and_follow(self, step, publish=Publisher.publish):
        nonlocal before, dense
        found = publish(self, step)
        whole = {key: full(x).numpy() for key, x in sorted(self._state().items())}
        applied = follower.update()
        assert [p.number for p in applied] == [found.number] and follower.current.step == step
        for key, x in follower.arrays.items():
            assert np.array_equal(x, whole.pop(key)), (step, key)
        assert all(".managed." in key and not key.endswith(".ids") for key in whole)
        tables = {key: x for key, x in follower.arrays.items() if "__" in key}
        changed = sum(int((x != before[key]).any(1).sum()) if before else len(x) for key, x in tables.items())
        sent = sum(block["count"] for block in found.content["blocks"] if "__" in block["array"])
        rest = {k: x.copy() for k, x in follower.arrays.items() if k not in tables and not k.endswith(".ids")}
        differ = {k for k, x in rest.items() if found.kind == "base" or not np.array_equal(x, dense[k])}
        with np.load(f"{found.uri}/{DENSE}") as arrays:
            assert set(arrays.files) == differ
        dense = rest
        seen.append(
            {
                "kind": found.kind,
                "changed": changed,
                "sent": sent,
                "bytes": found.bytes,
                "kept": len(rest) - len(differ),
            }
        )
        before = {key: x.copy() for key, x in tables.items()}
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Publisher, "publish", publish_and_follow)
        train(resolve_config(content))
    return seen


@pytest.fixture(scope="module")
def published(log) -> tuple[Path, list[dict]]:
    return log / "one", train_and_follow(0, 1, run_of(log, "one"))


def test_base_and_deltas_are_the_weights_of_the_trainer(published):
    run, seen = published
    assert [x["kind"] for x in seen] == ["base", "delta", "delta", "delta", "base"]  # steps 2, 4, 6, 8 and the end
    for x in seen[1:4]:
        assert 0 < x["changed"] <= x["sent"] < 0.9 * seen[0]["sent"]
    weights = PublishedWeights(str(run / "published"))
    (applied,) = weights.update()
    assert weights.update() == []
    (step,) = (run / "checkpoints").glob("step_*")
    saved = read_unsharded(read_checkpoint(str(step)), prefix="model.model.")
    assert applied.step == 9 and weights.arrays.keys() <= saved.keys()
    for key, x in weights.arrays.items():
        assert np.array_equal(x, saved[key].numpy()), key
    assert sum(key.endswith(".ids") for key in weights.arrays) == 3
    assert weights.arrays.keys() >= {k for k, _ in build_model(read_run_config(str(run))).named_parameters()}


def test_a_delta_holds_no_array_that_has_not_changed(log):
    base, delta = train_and_follow(0, 1, run_of(log, "still", learning_rate=1e-30, max_steps=4))
    assert base["kept"] == 0 and delta["kept"] > 3 and delta["sent"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["row_wise", "column_wise"])
def test_two_processes_publish_their_shards(log, plan):
    seen, other = run_ranks(2, train_and_follow, run_of(log, plan, plan, max_steps=4))
    assert [x["kind"] for x in seen] == ["base", "delta"] and seen == other
    assert all("rank-1.npz" in p.content["files"] for p in publications(str(log / plan / "published")))


@pytest.mark.parametrize("keys", [["user_id", "hist_item_id"], ["user_id", "item_id"]])
def test_rows_reset_in_a_set_that_does_not_look_them_up_are_published(log, keys):
    content = run_of(log, keys[1], max_steps=8, global_batch_size=1)
    content["train"]["publish"] |= {"every": 1, "base_every": 9}
    content["data"] = {key: x for key, x in content["data"].items() if key not in ("validation", "test")}
    content["model"] |= {"preset": "multi_embedding", "num_sets": 2, "combine": "concat"}
    content["model"]["sets"] = {"set2": {"fields": keys}}
    assert len(train_and_follow(0, 1, content)) == 8


def test_a_restart_publishes_a_base_that_followers_take(log):
    content = run_of(log, "again", max_steps=4)
    train(resolve_config(content))
    weights = PublishedWeights(content["train"]["publish"]["to"])
    assert [(p.number, p.kind) for p in weights.update()] == [(0, "base"), (1, "delta")]
    content["train"] |= {"max_steps": 10, "resume": True}
    content["train"]["publish"]["keep"] = 1
    train(resolve_config(content))
    applied = weights.update()
    assert [(p.number, p.kind, p.step) for p in applied] == [(2, "base", 6), (3, "delta", 8), (4, "delta", 10)]
    assert sorted(os.listdir(weights.uri)) == ["000002-base", "000003-delta", "000004-delta", "latest.json"]


def test_a_base_without_its_manifest_does_not_push_out_a_whole_one(log):
    """As a process leaves it that is killed while it writes to an object store."""
    content = run_of(log, "cut_short", max_steps=4)
    train(resolve_config(content))
    to = Path(content["train"]["publish"]["to"])
    (to / "000002-base").mkdir()
    content["train"] |= {"max_steps": 6, "resume": True}
    train(resolve_config(content))
    assert sorted(os.listdir(to)) == ["000000-base", "000001-delta", "000003-base", "latest.json"]


def test_what_was_saved_and_not_published_is_published_by_a_restart(log):
    """As if the process were killed between the last checkpoint and its publication."""

    def die(self, step):
        raise KeyboardInterrupt

    content = run_of(log, "killed", max_steps=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Publisher, "publish", die)
        train(resolve_config(content))
    content["train"]["resume"] = True
    for _ in range(2):  # the second time there is nothing to do
        train(resolve_config(content))
        assert [p.step for p in publications(content["train"]["publish"]["to"])] == [2]
    assert "000001-base" not in os.listdir(content["train"]["publish"]["to"])


def test_damage_is_told_and_nothing_of_it_is_taken(log, tmp_path):
    content = run_of(log, "damaged", max_steps=6)
    train(resolve_config(content))
    folder = tmp_path / "published"
    shutil.copytree(content["train"]["publish"]["to"], folder)
    file = folder / "000002-delta" / "rank-0.npz"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    weights = PublishedWeights(str(folder))
    with pytest.raises(CheckpointError, match="000002-delta/rank-0.npz: SHA-256 differs"):
        weights.update()
    assert weights.current.number == 1 and weights.current.step == 4
    shutil.rmtree(folder / "000002-delta")
    with pytest.raises(CheckpointError, match="000002-delta: missing"):
        weights.update()
    shutil.copytree(folder / "000001-delta", folder / "000002-delta")
    with pytest.raises(CheckpointError, match="damaged"):
        weights.update()
    (folder / "latest.json").unlink()
    with pytest.raises(CheckpointError, match="nothing was published here"):
        PublishedWeights(str(folder)).update()


@pytest.mark.parametrize("steps", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_directory_that_another_run_has_filled_is_taken_from_its_base(log, steps):
    to = str(log / f"refilled_{steps}")
    for seed, max_steps in ((1, 4), (2, steps)):
        content = run_of(log, f"filled_{steps}_{seed}", max_steps=max_steps, seed=seed)
        content["train"]["publish"]["to"] = to
        train(resolve_config(content))
        if seed == 1:
            weights = PublishedWeights(to)
            weights.update()
            shutil.rmtree(to)
    fresh = PublishedWeights(to)
    assert [p.number for p in weights.update()] == [p.number for p in fresh.update()] == [*range(steps // 2)]
    assert all(np.array_equal(weights.arrays[key], x) for key, x in fresh.arrays.items())


def test_a_publication_that_failed_is_followed_by_a_base(log, monkeypatch):
    written = Publisher._write

    def write(self, directory, *args):
        if self._number == 1:
            raise OSError("disk full")
        return written(self, directory, *args)

    publish = Publisher.publish
    kinds = []

    def go_on(self, step):
        try:
            kinds.append(publish(self, step).kind)
        except TrainingError as error:
            assert "cannot be published: disk full" in str(error)
            kinds.append("failed")

    monkeypatch.setattr(Publisher, "_write", write)
    monkeypatch.setattr(Publisher, "publish", go_on)
    content = run_of(log, "full", max_steps=8)
    train(resolve_config(content))
    assert kinds == ["base", "failed", "base", "delta"]
    to = content["train"]["publish"]["to"]
    assert [p.number for p in publications(to)] == [2, 3]
    assert sorted(os.listdir(to)) == ["000000-base", "000002-base", "000003-delta", "latest.json"]


def test_commands(published, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from hmoe_rec.cli import app

    uri = str(published[0] / "published")
    listed = CliRunner().invoke(app, ["publish", "list", uri])
    assert listed.exit_code == 0 and "4 base  step         9" in listed.output
    out = str(tmp_path / "weights.npz")
    applied = CliRunner().invoke(app, ["publish", "apply", uri, out])
    assert applied.exit_code == 0 and "step 9, 0 deltas" in applied.output
    weights = PublishedWeights(uri)
    weights.update()
    with np.load(out) as found:
        assert set(found) == set(weights.arrays)
        assert all(np.array_equal(found[key], x) for key, x in weights.arrays.items())
    with pytest.raises(ValueError, match="Object arrays"):
        save_npz(weights.arrays | {"last": np.array([{}])}, str(tmp_path / "half.npz"))
    assert os.listdir(tmp_path) == ["weights.npz"]
    again = CliRunner().invoke(app, ["publish", "apply", uri, out])
    assert "nothing is overwritten" in str(again.exception)
