"""The whole life of a run in a store of objects: as on a disk, also where the store refuses, fails, or is slow."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from gloo import RankError, run_ranks
from small_run import make_log, run_file

from hmoe_rec import cli, commit, io, object_store
from hmoe_rec.config import resolve_config
from hmoe_rec.data.file_stream import FileStream
from hmoe_rec.data.parquet import ParquetSource
from hmoe_rec.data.source import Unreachable
from hmoe_rec.data.stream import Clock, WindowRule
from hmoe_rec.line_log import read_lines
from hmoe_rec.training.checkpoint import CheckpointManager, read_unsharded
from hmoe_rec.training.online import follow
from hmoe_rec.training.trainer import train
from hmoe_rec.types import CheckpointError

STEPS = 13  # an epoch of the log


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    make_log(folder)
    return folder


@pytest.fixture(params=["memory", "s3"])
def store(request, tmp_path) -> str:
    return request.getfixturevalue("bucket").uri if request.param == "s3" else f"memory://{tmp_path}"


def content_of(log: Path, run: str, **options) -> dict:
    content = run_file(log, epochs=1, **options)
    content["train"]["run_dir"] = run
    return content


def state(run: str) -> dict[str, torch.Tensor]:
    found = CheckpointManager(f"{run}/checkpoints").latest()
    return {k: x for k, x in read_unsharded(found).items() if not k.startswith("per_rank")}


def assert_same(run: str, other: str) -> None:
    mine, theirs = state(run), state(other)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0.0, atol=0.0, msg=key)


@pytest.fixture(scope="module")
def on_disk(log) -> str:
    train(resolve_config(content_of(log, str(log / "on_disk"), checkpoint_every=4)))
    return str(log / "on_disk")


def command(*arguments: object) -> None:
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as end:
        assert not end.code, f"{arguments}: {end.code}"


def test_a_run_and_all_that_is_done_with_it(log, on_disk, store, tmp_path, capsys):
    run = f"{store}/runs/a"
    for split in ("train", "validation", "test"):
        io.write_bytes(f"{store}/data/{split}.parquet", (log / f"{split}.parquet").read_bytes())
    content = content_of(log, run, checkpoint_every=4, publish={"to": f"{store}/public", "every": 5})
    content["data"] |= {split: f"{store}/data/{split}.parquet" for split in ("train", "validation", "test")}
    train(resolve_config(content))
    assert_same(run, on_disk)
    assert sorted(io.ls(run)) == [
        "checkpoints", "config.yaml", "evaluations.jsonl", "metrics.jsonl", "report.json", "tensorboard"
    ]  # fmt: skip
    names = ["best.json", "best_click.json", "best_like.json", "step_000000008", "step_000000012", "step_000000013"]
    assert io.ls(f"{run}/checkpoints") == names
    assert [json.loads(line)["step"] for line in read_lines(f"{run}/metrics.jsonl")] == list(range(1, STEPS + 1))

    command("evaluate", run)
    command("predict", run, "--data", f"{store}/data/test.parquet", "--out", f"{store}/p.parquet")
    command("predict", run, "--data", f"{store}/data/test.parquet", "--out", f"{store}/parts")
    assert io.ls(f"{store}/parts") == ["part-00000-of-00001.parquet"]
    command("predict", on_disk, "--data", log / "test.parquet", "--out", tmp_path / "p.parquet")
    with io.open(f"{store}/p.parquet", "rb") as file:
        assert pq.read_table(file).equals(pq.read_table(tmp_path / "p.parquet"))
    command("publish", "list", f"{store}/public")
    command("publish", "apply", f"{store}/public", f"{store}/weights.npz")
    with io.open(f"{store}/weights.npz", "rb") as file, np.load(file) as arrays:
        weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    trained = {k.rpartition("model.")[2]: x for k, x in state(run).items() if k.startswith("model.")}
    for name, values in weights.items():
        torch.testing.assert_close(values, trained[name], rtol=0.0, atol=0.0, msg=name)
    command("checkpoint", "inspect", run, "--verify")
    command("checkpoint", "reshard", run, f"{store}/runs/b/checkpoints", "--world-size", 2)
    assert_same(f"{store}/runs/b", on_disk)
    command("checkpoint", "export", run, f"{store}/tables")
    assert "export.json" in io.ls(f"{store}/tables") and ".begun" not in io.ls(f"{store}/tables")
    command("uncertainty", "fit", run, "--kind", "laplace")
    command("analyze", "collapse", run)
    assert "report.html" in io.ls(f"{run}/analysis")
    capsys.readouterr()


def test_other_commands_read_and_write_there(log, tmp_path, capsys):
    store = f"memory://{tmp_path}"
    for split in ("train", "validation", "test"):
        io.write_bytes(f"{store}/data/{split}.parquet", (log / f"{split}.parquet").read_bytes())
    content = content_of(log, f"{store}/run")
    content["data"] |= {split: f"{store}/data/{split}.parquet" for split in ("train", "validation", "test")}
    run_yaml, data = f"{store}/run.yaml", f"{store}/data/train.parquet"
    io.write_text(run_yaml, yaml.safe_dump(content))
    plan = ("--out", f"{store}/plan.json", "--html", f"{store}/plan.html")
    command("plan", "make", run_yaml, "--topology", "cpu", *plan)
    command("data", "fit", run_yaml, "--out", f"{store}/statistics.yaml")
    command("data", "pooling", run_yaml, "--out", f"{store}/pooling.yaml")
    command("data", "replay", data, "--out", f"{store}/stream", "--rows-per-file", 500, "--done")
    command("data", "exposures", data, "--key", "user_id", "--out", f"{store}/counted")
    written = ["counted", "data", "plan.html", "plan.json", "pooling.yaml", "run.yaml", "statistics.yaml", "stream"]
    assert io.ls(store) == written
    assert io.ls(f"{store}/stream") == ["_DONE", *(f"part-0000{i}.parquet" for i in range(4))]
    assert "wrote" in capsys.readouterr().out


def train_with(rank: int, world_size: int, content: dict, environment: dict[str, str], pid_file: str | None = None):
    os.environ.update(environment)
    if pid_file is not None:
        Path(pid_file).write_text(str(os.getpid()))
    train(resolve_config(content))


def assert_whole(run: str, other: str) -> None:
    """As if nothing had happened."""
    assert_same(run, other)
    assert [json.loads(line)["step"] for line in read_lines(f"{run}/metrics.jsonl")] == list(range(1, STEPS + 1))
    for name in io.ls(f"{run}/checkpoints"):
        assert name.endswith(".json") or "manifest.json" in io.ls(f"{run}/checkpoints/{name}"), name
    assert ".lock" not in io.ls(run)


MOMENTS = [  # of the requests that match, this one is never answered
    ("PUT", r"checkpoints/step_000000008/manifest.json", 0),
    ("PUT", r"\.lock", 0),
    ("PUT", r"config.yaml", 0),
    ("PUT", r"checkpoints/step_000000008/.begun", 0),
    ("PUT", r"checkpoints/step_000000008/__0_0.distcp", 0),
    ("PUT", r"checkpoints/step_000000008/tensors.json", 0),
    ("PUT", r"checkpoints/step_000000013/manifest.json", 0),
    ("PUT", r"checkpoints/best.json", 0),
    ("PUT", r"metrics.jsonl/part-", 1),
    *(("POST", r"\?delete", skip) for skip in range(7)),  # markers, and what is no longer kept
    ("PUT", r"report.json", 0),
]


@pytest.mark.parametrize(
    "moments",
    [MOMENTS[:1], pytest.param(MOMENTS[1:], marks=pytest.mark.slow)],
    ids=["before the manifest", "everywhere else"],
)
def test_a_run_that_is_killed_goes_on_at_once_as_if_nothing_had_happened(log, on_disk, bucket, tmp_path, moments):
    for number, (method, pattern, skip) in enumerate(moments):
        run = f"{bucket.uri}/run-{number}"
        content = content_of(log, run, checkpoint_every=4, keep_checkpoints=2, resume=True)
        bucket.spoil(method, pattern, lambda: os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL), skip=skip)
        with pytest.raises(RankError, match="died with exit code -9"):
            run_ranks(1, train_with, content, bucket.environment, str(tmp_path / "pid"))
        bucket.heal()
        run_ranks(1, train_with, content, bucket.environment)
        assert_whole(run, on_disk)


@pytest.mark.slow
def test_ranks_write_one_checkpoint_and_other_numbers_of_ranks_go_on(log, bucket):
    run, environment = f"{bucket.uri}/run", bucket.environment
    content = content_of(log, run, checkpoint_every=4, max_steps=4)
    run_ranks(2, train_with, content, environment)
    assert {"__0_0.distcp", "__1_0.distcp", "manifest.json"} <= set(io.ls(f"{run}/checkpoints/step_000000004"))
    content["train"] |= {"max_steps": 8, "resume": True}
    run_ranks(1, train_with, content, environment)
    content["train"]["max_steps"] = STEPS
    run_ranks(2, train_with, content, environment)
    assert CheckpointManager(f"{run}/checkpoints").latest().step == STEPS
    command("checkpoint", "reshard", run, f"{bucket.uri}/one/checkpoints", "--world-size", 1)
    assert_same(run, f"{bucket.uri}/one")


def test_who_was_taken_for_dead_in_the_middle_of_a_save_does_not_write_into_the_next_ones_checkpoint(store):
    uri, state = f"{store}/checkpoints", {"model": {"x": torch.arange(5.0)}}
    begun = commit.begin(f"{uri}/step_000000005")  # and nothing of it is there yet
    manager = CheckpointManager(uri)
    saved = manager.save(5, state)
    io.write_bytes(f"{begun}/__0_0.distcp", b"late")
    assert saved.uri != begun and manager.latest() == saved
    torch.testing.assert_close(read_unsharded(saved), {"model.x": torch.arange(5.0)})
    manager.save(6, state)
    assert io.ls(uri) == ["step_000000005.1", "step_000000006"]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(object_store, "WAITS", (0.0, 0.0))


def test_a_refused_save_says_why_and_loses_nothing(log, on_disk, bucket, impatient):
    content = content_of(log, f"{bucket.uri}/run", checkpoint_every=4)
    bucket.spoil("PUT", r"step_000000008/manifest.json", 403, times=9)
    with pytest.raises(CheckpointError, match=r"refused PutObject \(403 .*s3:PutObject"):
        train(resolve_config(content))
    assert CheckpointManager(f"{bucket.uri}/run/checkpoints").latest().step == 4
    bucket.heal()
    content["train"]["resume"] = True
    train(resolve_config(content))
    assert_whole(f"{bucket.uri}/run", on_disk)


def test_what_cannot_be_read_is_not_taken_for_missing(log, bucket, impatient):
    """A store that refuses for a moment must not make a run begin anew, or go on from an older step."""
    content = content_of(log, f"{bucket.uri}/run", checkpoint_every=4, max_steps=8)
    train(resolve_config(content))
    content["train"] |= {"resume": True, "max_steps": STEPS}
    for pattern in (r"step_000000008/manifest.json", r"prefix=run%2Fcheckpoints|prefix=run/checkpoints"):
        bucket.spoil("GET", pattern, 403, times=99)
        with pytest.raises(CheckpointError, match="refused"):
            train(resolve_config(content))
        bucket.heal()


def test_files_that_a_store_does_not_give_are_not_taken_for_damaged(log, bucket, impatient):
    """A follower would pass over them after a while, a person would write them again."""
    data = (log / "train.parquet").read_bytes()
    io.write_bytes(f"{bucket.uri}/in/a.parquet", data)
    schema = resolve_config(content_of(log, "unused")).schema_of_data
    stream = FileStream(f"{bucket.uri}/in", schema, rule=WindowRule(100), patience_seconds=0.0, clock=Clock())
    stream.poll()
    bucket.spoil("GET", r"in/a.parquet", 403, times=99)
    for _ in range(3):
        with pytest.raises(Unreachable, match="refused GetObject"):
            stream.take(flush=True)
    with pytest.raises(Unreachable, match=r"^s3://.*refused GetObject"):
        ParquetSource(f"{bucket.uri}/in", schema)
    bucket.heal()
    assert stream.take(flush=True).slices[0].unit == "a.parquet"


@pytest.mark.slow
@pytest.mark.parametrize("how", [500, 503, "slow", "cut"])
def test_a_store_that_is_not_well_slows_a_run_and_changes_nothing(log, on_disk, bucket, impatient, how):
    methods = ("GET",) if how == "cut" else ("GET", "PUT", "HEAD", "POST")
    for skip in range(3, 200, 11):
        for method in methods:
            bucket.spoil(method, "", how, skip=skip, seconds=0.2)
    train(resolve_config(content_of(log, f"{bucket.uri}/run", checkpoint_every=4)))
    bucket.heal()
    assert_whole(f"{bucket.uri}/run", on_disk)


def followed(log: Path, run: str, source: str, **options) -> dict:
    content = content_of(log, run, **options)
    del content["train"]["epochs"]
    content["data"] = {"schema": content["data"]["schema"]}
    content["model"]["preset"] = "shared_bottom"
    content["online"] = {"follow": source, "until_idle": 0, "poll_seconds": 0.01, "checkpoint_windows": 1}
    return follow(resolve_config(content))


@pytest.mark.parametrize("store", ["memory", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_a_stream_in_a_store_is_followed_into_a_store(log, store, tmp_path):
    table = pq.read_table(log / "train.parquet")
    (tmp_path / "in").mkdir()
    for part in range(2):
        for number in (2 * part, 2 * part + 1):
            pq.write_table(table.slice(240 * number, 240), tmp_path / "in" / f"part-{number}.parquet")
            data = (tmp_path / "in" / f"part-{number}.parquet").read_bytes()
            io.write_bytes(f"{store}/in/part-{number}.parquet", data)
        followed(log, str(tmp_path / "run"), str(tmp_path / "in"), resume=part > 0)
        followed(log, f"{store}/run", f"{store}/in", resume=part > 0)
    assert_same(f"{store}/run", str(tmp_path / "run"))
    windows = [json.loads(line)["slices"] for line in read_lines(f"{store}/run/metrics.jsonl")]
    assert windows == [json.loads(line)["slices"] for line in read_lines(f"{tmp_path}/run/metrics.jsonl")]


def test_tensorboard_is_copied_in_files_that_end(store, monkeypatch):
    from hmoe_rec.training import board

    monkeypatch.setattr(board, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(board, "FILE_BYTES", 300)
    writer = board.Board(f"{store}/tensorboard", None)
    for step in range(9):
        writer.add({"loss": 1.0 / (step + 1), "other": 2.0}, step)
    writer.close()
    sizes = io.sizes(f"{store}/tensorboard")
    assert len(sizes) > 1 and max(sizes.values()) < 600
    assert read_steps(f"{store}/tensorboard", list(sizes)) == list(range(9))


def read_steps(folder: str, names: list[str]) -> list[int]:
    """Of the events of one tag, by TensorBoard's own reader."""
    import tempfile

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as local:
        for name in names:
            with io.open(f"{folder}/{name}", "rb") as file:
                Path(local, name).write_bytes(file.read())
        events = EventAccumulator(local)
        events.Reload()
        return [event.step for event in events.Scalars("loss")]
