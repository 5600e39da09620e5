"""Online learning: tested before trained, as the naive loop does it; stopped and killed without a trace."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from broker import redis_server
from following import assert_same_state, final_state, followed, lines, online_file
from gloo import RankError, run_ranks
from small_run import make_log, run_file

from hmoe_rec import cli, io
from hmoe_rec.config import prepare_data, resolve_config
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.data.stream import Clock
from hmoe_rec.metrics import TaskMetrics
from hmoe_rec.sharding.process import process_group
from hmoe_rec.training.build import build_optimizers, build_sharded
from hmoe_rec.training.checkpoint import CheckpointManager
from hmoe_rec.training.evaluate import read_run_config
from hmoe_rec.training.feed import WindowFeed
from hmoe_rec.training.online import WINDOW_BINS, Follower
from hmoe_rec.training.publication import publications
from hmoe_rec.training.run_log import RunLog
from hmoe_rec.training.trainer import train
from hmoe_rec.types import CheckpointError, ConfigError, DataError, TrainingError

FILES, FILE_ROWS, BATCH = 5, 240, 160  # two steps a file, the second one of 80 rows; row groups of 100, 100, 40


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """The small log, rows of its training data in files."""
    folder = tmp_path_factory.mktemp("log")
    make_log(folder)
    table = pq.read_table(folder / "train.parquet")
    (folder / "in").mkdir()
    for i in range(FILES):
        part = table.slice(i * FILE_ROWS, FILE_ROWS)
        pq.write_table(part, folder / "in" / f"part-{i}.parquet", row_group_size=100)
    return folder


def assert_same_log(a: Path, b: Path) -> None:
    for mine, theirs in zip(lines(a), lines(b), strict=True):
        assert mine["slices"] == theirs["slices"]
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-12)


def numbers(line: dict, prefix: str = "") -> dict[str, float]:
    """Without those that depend on the clock."""
    found = {}
    for key, value in line.items():
        if isinstance(value, dict) and key != "lag":
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and key not in ("examples_per_second", "seconds_waited"):
            found[f"{prefix}{key}"] = value
    return found


@pytest.fixture(scope="module")
def undisturbed(log) -> Path:
    followed(online_file(log, "undisturbed"))
    return log / "undisturbed"


# ----------------------------------------------------------------------------------------------------- test, then train


def naive(content: dict) -> tuple[list[dict], dict, dict]:
    """Window by window with a snapshot's predictions, then batch by batch. -> metrics, all together, model."""
    config = resolve_config(content)
    results, everything = [], TaskMetrics(config.tasks, num_bins=WINDOW_BINS, gauc=False)
    with process_group() as process:
        model = build_sharded(config, process)
        optimizers = build_optimizers(config, model, 1)
        step = 0
        for i in range(FILES):
            source = ParquetSource(f"{config.online.follow}/part-{i}.parquet", prepare_data(config).schema)
            batches = list(BatchReader(source, global_batch_size=BATCH, shuffle=False, num_workers=0).epoch(0))
            window = TaskMetrics(config.tasks, num_bins=WINDOW_BINS, gauc=False)
            model.eval()
            with torch.no_grad():
                for batch in batches:
                    _, output = model(batch)
                    for metrics in (window, everything):
                        metrics.update(output.logits_BT, batch.labels, batch.weights)
            results.append(window.compute())
            model.train()
            for batch in batches:
                optimizers.set_learning_rates(step)
                optimizers.combined.zero_grad()
                loss, _ = model(batch)
                loss.backward()
                optimizers.combined.step()
                step += 1
        weights = {k: x.clone() for k, x in model.state_dict().items() if isinstance(x, torch.Tensor)}
        return results, everything.compute(), weights


@pytest.mark.parametrize(
    "pipeline", ["base", *(pytest.param(p, marks=pytest.mark.slow) for p in ("plain", "sparse_dist"))]
)
def test_it_equals_the_naive_loop(log, pipeline):
    content = online_file(log, f"naive_{pipeline}")
    content["train"]["pipeline"] = pipeline
    report = followed(content)
    results, everything, weights = naive(content)
    run = log / f"naive_{pipeline}"
    for line, window in zip(lines(run), results, strict=True):
        for task, expected in window.items():
            for name, value in line["test"][task].items():
                assert value == pytest.approx(expected[name], rel=1e-12), name
    for task, expected in everything.items():
        for name, value in report["progressive"][task].items():
            assert value == pytest.approx(expected[name], rel=1e-12), name
    state = final_state(run)
    dense = [name for name in weights if f"model.{name}" in state and "embedding" not in name]
    assert dense and all(torch.equal(state[f"model.{name}"], weights[name]) for name in dense)
    assert (report["windows"], report["rows"], report["steps"]) == (FILES, FILES * FILE_ROWS, 2 * FILES)


def test_every_row_is_learned_once(log, undisturbed):
    found = Counter(
        (unit, g) for line in lines(undisturbed) for unit, a, b, _ in line["slices"] for g in range(a, b + 1)
    )
    assert found == {(f"part-{i}.parquet", g): 1 for i in range(FILES) for g in range(3)}
    assert lines(undisturbed)[-1]["sliding"]["click"]["examples"] == FILES * FILE_ROWS
    assert lines(undisturbed)[0]["unseen"] == {"user_id": 1.0, "item_id": 1.0, "city": 1.0}
    assert lines(undisturbed)[-1]["lag"] == {"units": 1, "rows": FILE_ROWS, "seconds": pytest.approx(0, abs=1000)}


class Producer(Clock):
    """Every time the trainer waits, the next file appears: first half of it, then all."""

    def __init__(self, source: Path, target: str, last: str | None = "_DONE") -> None:
        self.files = sorted(source.glob("*.parquet"))
        self.target, self.last, self.waits = target, last, 0
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        number, second_half = divmod(self.waits, 2)
        self.waits += 1
        assert self.waits < 100
        if number < len(self.files):
            content = self.files[number].read_bytes()
            name, content = self.files[number].name, content if second_half else content[: len(content) // 2]
        else:
            name, content = self.last, b""
        with io.open(io.join(self.target, name), "wb") as file:
            file.write(content)


@pytest.mark.parametrize("place", ["", pytest.param("memory://growing", marks=pytest.mark.slow)])
def test_files_that_appear_while_it_runs(log, undisturbed, tmp_path, place):
    place = place or str(tmp_path)
    name = "growing_local" if place == str(tmp_path) else "growing_memory"
    content = online_file(log, name, place, until_idle=None)
    content["train"]["publish"] = {"to": str(log / f"{name}_served"), "every": 3}
    report = followed(content, Producer(log / "in", place))
    assert report["windows"] == FILES
    published = [(p.kind, p.step) for p in publications(str(log / f"{name}_served"))]
    assert published == [("base", 4), ("delta", 6), ("delta", 10)]  # after the windows that cross 3, 6 and 9 steps
    assert_same_state(log / name, undisturbed)


@pytest.mark.slow
def test_small_windows_and_small_files_are_the_same_stream(log):
    """Windows at row groups, and windows of several files: another test, and other batches; each row once."""
    for name, options in (("cut", {"window_rows": 90}), ("joined", {"window_files": None, "window_rows": 400})):
        report = followed(online_file(log, name, window_seconds=0, **options))
        assert report["rows"] == report["progressive"]["click"]["examples"] == FILES * FILE_ROWS
    assert [line["rows"] for line in lines(log / "cut")] == [100, 100, 40] * FILES
    assert [line["rows"] for line in lines(log / "joined")] == [440, 480, 280]


# --------------------------------------------------------------------------------------------------- stopped and killed


def on_call(number: int, before):
    """A function that runs `before` at its call `number`, and then what it replaces."""

    def replace(patch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        original, calls = getattr(owner, name), iter(range(1, 10**6))

        def wrapped(*args, **kwargs):
            if next(calls) == number:
                before()
            return original(*args, **kwargs)

        patch.setattr(owner, name, wrapped)

    return replace


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_at_the_windows_end(log, undisturbed, number, status, tmp_path, capfd):
    name = f"signal_{status}"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        on_call(2, lambda: os.kill(os.getpid(), number))(patch, Follower, "_fit")
        followed(online_file(log, name))
    assert end.value.code == status
    assert CheckpointManager(str(log / name / "checkpoints")).latest().step == 4
    moved = shutil.copytree(log / "in", tmp_path / "moved")
    followed(online_file(log, name, moved, resume=True))
    assert f"{moved}; the position of this run was saved in {log / 'in'}" in " ".join(capfd.readouterr().err.split())
    assert_same_state(log / name, undisturbed)
    assert_same_log(log / name, undisturbed)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


MOMENTS = {
    "in a step": lambda patch: on_call(2, die)(patch, Follower, "_check_finite"),
    "between training and moving on": lambda patch: on_call(2, die)(patch, Follower, "_move_on"),
    "in a save": lambda patch: on_call(2, die)(patch, io, "rename"),
    "after a save": lambda patch: on_call(2, die)(patch, CheckpointManager, "_prune"),
    "while reading": lambda patch: on_call(2, die)(patch, WindowFeed, "_read"),
}


def follow_rank(rank: int, world_size: int, content: dict, moment: str = "") -> dict:
    torch.set_num_threads(1)
    RunLog._scalars = lambda *_: None  # importing TensorBoard takes a process longer than all the rest
    if moment and rank == world_size - 1:
        MOMENTS[moment](pytest.MonkeyPatch())
    return followed(content)


def killed_again_and_again(log: Path, name: str, world_size: int, moments: list[str]) -> None:
    for i, moment in enumerate(moments):
        with pytest.raises(RankError):
            run_ranks(world_size, follow_rank, online_file(log, name, resume=i > 0, checkpoint_windows=1), moment)
    content = online_file(log, name, resume=True, checkpoint_windows=1)
    followed(content) if world_size == 1 else run_ranks(world_size, follow_rank, content)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moments", [["in a step", "in a save"], ["after a save", "between training and moving on", "while reading"]]
)
def test_kill_leaves_no_trace(log, undisturbed, moments):
    name = f"killed_{len(moments)}"
    killed_again_and_again(log, name, 1, moments)
    assert_same_state(log / name, undisturbed)
    assert_same_log(log / name, undisturbed)


@pytest.mark.slow
def test_kill_of_one_of_two_processes_leaves_no_trace(log):
    run_ranks(2, follow_rank, online_file(log, "undisturbed_2"))
    killed_again_and_again(log, "killed_of_2", 2, ["in a step", "while reading"])
    assert_same_state(log / "killed_of_2", log / "undisturbed_2")
    assert_same_log(log / "killed_of_2", log / "undisturbed_2")


def test_two_processes_learn_what_one_does(log):
    contents = [online_file(log, name) for name in ("one", "two")]
    for content in contents:
        content["model"]["dropout"] = 0.0
        content["sharding"] = {"plan": "row_wise"}
    followed(contents[0])
    run_ranks(2, follow_rank, contents[1])
    for a, b in zip(lines(log / "one"), lines(log / "two"), strict=True):
        assert a["slices"] == b["slices"] and a["unseen"] == b["unseen"]
        for task in ("click", "like"):
            assert a["test"][task] == pytest.approx(b["test"][task], abs=2e-3)
            assert a["test"][task]["logloss"] == pytest.approx(b["test"][task]["logloss"], abs=1e-5)
    moved = online_file(log, "two", resume=True)  # and one process goes on where two stopped
    assert followed(moved)["windows"] == FILES


def test_a_run_of_another_kind_is_not_gone_on_with(log, undisturbed):

    with pytest.raises(CheckpointError, match="online.order was 'name' and is 'time'"):
        content = online_file(log, "undisturbed", resume=True, order="time")
        content["data"]["schema"] = content["data"]["schema"] | {"time": "time"}
        followed(content)


# ------------------------------------------------------------------------------------------------------------- bad data


@pytest.fixture
def spoiled(log, tmp_path) -> Path:
    """The second row group of part 1 holds a label 2, part 3 is cut off in its data with the footer whole."""
    for file in (log / "in").glob("*.parquet"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    table = pq.read_table(tmp_path / "part-1.parquet")
    labels = table["click"].to_pylist()
    labels[150] = 2
    spoiled = table.set_column(table.schema.get_field_index("click"), "click", pa.array(labels, pa.int8()))
    pq.write_table(spoiled, tmp_path / "part-1.parquet", row_group_size=100)
    content = bytearray((tmp_path / "part-3.parquet").read_bytes())
    content[100:3000] = bytes(2900)
    (tmp_path / "part-3.parquet").write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_row_groups_that_cannot_be_read_are_passed_over(log, spoiled, world_size):
    name = f"spoiled_{world_size}"
    content = online_file(log, name, spoiled, patience_seconds=0)
    report = followed(content) if world_size == 1 else run_ranks(2, follow_rank, content)[0]
    assert report["rows"] == FILES * FILE_ROWS - 100 - 100 and report["notes"] == {"wrong": 2}
    slices = [s for line in lines(log / name) for s in line["slices"]]
    assert ["part-1.parquet", 0, 0, 100] in slices and ["part-1.parquet", 2, 2, 40] in slices
    events = lines(log / name, "events.jsonl")
    assert [(e["kind"], e["text"].split(":")[0]) for e in events] == [
        ("wrong", "part-1.parquet 1..1"),
        ("wrong", "part-3.parquet 0..0"),
    ]
    assert "label 0 or 1" in events[0]["text"] and "cannot be read" in events[1]["text"]
    letters = lines(log / name, "dead_letters.jsonl")
    assert [(x["id"], x["kind"], x["body"]) for x in letters] == [
        ("part-1.parquet 1..1", "wrong", None),
        ("part-3.parquet 0..0", "wrong", None),
    ]
    assert "label 0 or 1" in letters[0]["reason"] and report["bad"] == 2


def test_files_that_are_no_parquet_or_lack_a_column_are_put_aside(log, tmp_path):
    for file in (log / "in").glob("*.parquet"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "part-0b.parquet").write_bytes(b"PAR1 no more")
    pq.write_table(pq.read_table(tmp_path / "part-2.parquet").drop_columns(["city"]), tmp_path / "part-2b.parquet")
    report = followed(online_file(log, "aside", tmp_path, patience_seconds=0))
    assert (report["rows"], report["bad"]) == (FILES * FILE_ROWS, 2)
    letters = lines(log / "aside", "dead_letters.jsonl")
    kinds = [(x["id"], x["kind"]) for x in letters]
    assert kinds == [("part-0b.parquet", "unreadable"), ("part-2b.parquet", "misfit")]
    assert "city" in letters[1]["reason"]


@pytest.mark.slow
def test_what_the_network_spoils_is_read_again(log, undisturbed):
    """Reading fails twice, then it works: nothing is passed over."""
    failures = iter([OSError("reset by peer")] * 2)
    read = WindowFeed._read

    def flaky(self, slices):
        if (failure := next(failures, None)) is not None:
            raise DataError("part-0.parquet: cannot be read") from failure
        return read(self, slices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowFeed, "_read", flaky)
        patch.setattr("hmoe_rec.training.feed.RETRY_SECONDS", 0.01)
        followed(online_file(log, "flaky"))
    assert_same_state(log / "flaky", undisturbed)


def test_a_source_that_does_not_answer_ends_the_run(log):
    pytest.importorskip("redis")
    with pytest.raises(DataError, match="does not answer"):
        followed(online_file(log, "away", "redis://127.0.0.1:1/0/events", patience_seconds=0))


# --------------------------------------------------------------------------------------------------------------- alarms


def test_a_window_that_spoils_the_model_is_not_saved_where_losses_are_seldom_read(log, monkeypatch):
    init = Follower.__init__

    def as_on_a_gpu(self, *args):
        init(self, *args)
        self.reads_every_loss = False

    monkeypatch.setattr(Follower, "__init__", as_on_a_gpu)
    content = online_file(log, "spoils", checkpoint_windows=1)
    content["train"] |= {"learning_rate": 1e30, "log_every": 1000}
    with pytest.raises(TrainingError, match="step 2: the loss of task .* not finite"):
        followed(content)
    assert not (log / "spoils" / "checkpoints").exists()


def test_an_alarm_may_end_the_run_before_the_window_is_learned(log, tmp_path):
    """In part 3 all labels are 1 and the users are new: everything rings, and what was learned before is saved."""
    for file in (log / "in").glob("*.parquet"):
        table = pq.read_table(file)
        if file.name == "part-3.parquet":
            ones = pa.array([1] * len(table), pa.int8())
            table = table.set_column(table.schema.get_field_index("click"), "click", ones)
            names = pa.array([f"town {i}" for i in range(len(table))])
            table = table.set_column(table.schema.get_field_index("city"), "city", names)
        pq.write_table(table, tmp_path / file.name)
    rule = {"grace_windows": 2, "min_positives": 50, "calibration": 1.8, "label_rate": 2.0, "unseen_ids": 0.6}
    report = followed(online_file(log, "rings", tmp_path, alarms=rule))
    assert report["alarms"] == {"calibration": 1, "label_rate": 1, "unseen_ids": 1}
    assert [len(line["alarms"]) for line in lines(log / "rings")] == [0, 0, 0, 3, 0]
    texts = [event["text"] for event in lines(log / "rings", "events.jsonl")]
    assert [text.split(":")[1] for text in texts] == [
        " calibration of click",
        " label_rate of click",
        " unseen_ids of city",
    ]
    content = online_file(log, "stops", tmp_path, alarms=rule | {"stop_after": 1})
    with pytest.raises(TrainingError, match="1 window.s. in a row with an alarm, the last one before training on it"):
        followed(content)
    assert CheckpointManager(str(log / "stops" / "checkpoints")).latest().step == 6
    with pytest.raises(TrainingError, match="unseen_ids of city"):  # nothing of that window was kept
        followed(online_file(log, "stops", tmp_path, resume=True, alarms=rule | {"stop_after": 1}))
    report = followed(online_file(log, "stops", tmp_path, resume=True, alarms=rule))
    assert report["rows"] == FILES * FILE_ROWS
    assert_same_state(log / "stops", log / "rings")


# ------------------------------------------------------------------------------------------------------------ beginning


def test_it_begins_with_a_trained_model(log):
    """And with its statistics, which an encoder of numbers needs before the first row."""
    batch_run = run_file(log, "before", max_steps=4)
    batch_run["model"] |= {"preset": "shared_bottom", "encoding": {"numbers": "quantile"}}
    train(resolve_config(batch_run))
    content = online_file(log, "after")
    content["model"]["encoding"] = {"numbers": "quantile"}
    with pytest.raises(ConfigError, match="encoders of price need statistics before the first row"):
        followed(content)
    content["online"] |= {"start_from": str(log / "before")}
    schema = content["data"]["schema"]
    city = schema["ids"][2] | {"salt": "field"}
    salted = content | {"data": content["data"] | {"schema": schema | {"ids": [*schema["ids"][:2], city]}}}
    with pytest.raises(CheckpointError, match="ids of city would get other rows .* salt was 'set' and is 'field'"):
        followed(salted)
    given = read_run_config(str(log / "before")).to_dict()["data"]["statistics"]["price"]
    shifted = {"price": given | {"quantiles": [x + 1 for x in given["quantiles"]]}}
    with pytest.raises(CheckpointError, match="other statistics of numbers"):
        followed(content | {"data": content["data"] | {"statistics": shifted}})
    scaled = schema | {"numbers": [schema["numbers"][0] | {"mean": 2.0}]}
    with pytest.raises(CheckpointError, match="numbers of price would be scaled .* mean was 0.0 and is 2.0"):
        followed(content | {"data": content["data"] | {"schema": scaled}})
    content["train"]["max_steps"] = 2
    content["train"] |= {"learning_rate": 1e-30, "embedding_learning_rate": 1e-30}
    followed(content)
    assert len(lines(log / "after")) == 1
    before, after = final_state(log / "before"), final_state(log / "after")
    for name, tensor in before.items():
        if name.startswith("model."):
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_managed_ids_are_learned_from_a_stream_and_resumed(log):
    def content(name: str, **options) -> dict:
        made = online_file(log, name, **options)
        schema = made["data"]["schema"]
        ids = [dict(column) for column in schema["ids"]]
        ids[2] |= {"mode": "managed", "num_embeddings": 32}
        made["data"]["schema"] = schema | {"ids": ids}
        return made

    followed(content("managed"))
    assert {"id_known_rate", "id_evicted_per_step"} <= lines(log / "managed")[0].keys()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        on_call(2, lambda: os.kill(os.getpid(), signal.SIGTERM))(patch, Follower, "_fit")
        followed(content("managed_parts"))
    followed(content("managed_parts", resume=True))
    assert_same_state(log / "managed_parts", log / "managed")


def test_the_command_line_follows(log, undisturbed, tmp_path, capsys):
    import yaml

    content = online_file(log, "by_command")
    del content["online"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as end:
        cli.main(["train", str(path), "--follow", str(log / "in"), "--until-idle", "0"])
    assert not end.value.code
    assert "every window before it was trained on" in capsys.readouterr().out
    assert_same_state(log / "by_command", undisturbed)
    path.write_text(yaml.safe_dump(content | {"train": content["train"] | {"decay": "cosine"}}))
    with pytest.raises(SystemExit):
        cli.main(["train", str(path), "--follow", str(log / "in")])
    assert "cosine needs a last step, and online.follow has none" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- redis


def fill(client, log: Path) -> None:
    """Every second message is a table, the others are rows as JSON; the same rows as the files, one file a table."""
    for i in range(FILES):
        table = pq.read_table(log / "in" / f"part-{i}.parquet")
        for start, stop in ((0, 100), (100, FILE_ROWS)):
            part = table.slice(start, stop - start)
            if start:
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, part.schema) as writer:
                    writer.write_table(part)
                client.xadd("events", {"rows": sink.getvalue().to_pybytes()})
            else:
                for row in part.to_pylist():
                    client.xadd("events", {"row": json.dumps(row)})
    client.xadd("events", {"done": ""})


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_broker_is_followed_and_killed(log, undisturbed, tmp_path, world_size):
    """The same rows in the same windows as the files give; it goes on from the message that was committed."""
    redis = pytest.importorskip("redis")
    with redis_server(tmp_path) as uri:
        client = redis.Redis.from_url(uri)
        fill(client, log)
        client.close()
        name = f"broker_{world_size}"
        options = {"window_rows": FILE_ROWS, "checkpoint_windows": 1, "until_idle": None}
        moment = "in a save" if world_size == 1 else "in a step"
        with pytest.raises(RankError):
            run_ranks(world_size, follow_rank, online_file(log, name, f"{uri}/events", **options), moment)
        content = online_file(log, name, f"{uri}/events", resume=True, **options)
        report = followed(content) if world_size == 1 else run_ranks(world_size, follow_rank, content)[0]
    assert (report["rows"], report["windows"], report["notes"]) == (FILES * FILE_ROWS, FILES, {})
    if world_size == 1:
        assert_same_state(log / name, undisturbed)
    for a, b in zip(lines(log / name), lines(undisturbed), strict=True):
        assert a["unseen"] == b["unseen"]
        assert a["test"]["click"]["logloss"] == pytest.approx(b["test"]["click"]["logloss"], abs=5e-3)


def test_tables_are_watched_at_the_ends_of_windows(log, undisturbed):
    content = online_file(log, "watched")
    content["train"]["monitor"] = {"collapse_every": 3}
    followed(content)
    ends = [line["step"] for line in lines(log / "watched")]
    due = [step for step, before in zip(ends, [0, *ends], strict=False) if step // 3 > before // 3]
    assert [line["step"] for line in lines(log / "watched", "collapse.jsonl")] == due and len(due) >= 2
    assert_same_state(log / "watched", undisturbed)
