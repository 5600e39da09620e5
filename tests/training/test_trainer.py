"""The main job, small: it learns, its loops agree, it resumes exactly, and it says what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from following import lines
from gloo import run_ranks
from small_run import make_log, run_file

from hmoe_rec.config import resolve_config
from hmoe_rec.embedding.initialization import initialize_tables
from hmoe_rec.training.build import build_model, in_table
from hmoe_rec.training.checkpoint import read_checkpoint, read_unsharded
from hmoe_rec.training.evaluate import evaluate_run, read_run_config
from hmoe_rec.training.run_log import RunLog
from hmoe_rec.training.trainer import Trainer, train
from hmoe_rec.types import CheckpointError, ConfigError, DataError, TrainingError


def losses(run_dir: Path) -> list[dict]:
    return [line["losses"] for line in lines(run_dir)]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    make_log(folder)
    return folder


@pytest.fixture(scope="module")
def trained(log) -> Path:
    train(resolve_config(run_file(log, "trained", epochs=6)))
    return log / "trained"


class TestRun:
    def test_it_learns(self, trained):
        report = json.loads((trained / "report.json").read_text())
        for task in ("click", "like"):
            assert report["test"][task]["auc"] > 0.65
            assert {"auc", "gauc", "logloss", "ne", "calibration"} <= set(report["validation"][task])
        assert lines(trained)[-1]["loss_mean"]["click"] < lines(trained)[0]["loss_mean"]["click"]

    def test_run_directory(self, trained):
        assert {
            "config.yaml",
            "metrics.jsonl",
            "evaluations.jsonl",
            "report.json",
            "checkpoints",
            "tensorboard",
        } <= set(os.listdir(trained))
        line = lines(trained)[0]
        assert {"step", "loss", "losses", "examples_per_second", "label_mean", "prediction_mean"} <= set(line)
        assert [x["step"] for x in lines(trained)] == list(range(1, 79))  # 13 steps an epoch

    def test_parameters_are_those_of_the_unsharded_model(self, trained):
        from hmoe_rec.training.build import parameter_counts

        report = json.loads((trained / "report.json").read_text())
        assert report["parameters"] == parameter_counts(build_model(read_run_config(str(trained))))

    def test_evaluate_gives_the_reports_numbers(self, trained):
        report = json.loads((trained / "report.json").read_text())
        metrics = evaluate_run(str(trained))["metrics"]
        assert metrics["click"]["auc"] == report["test"]["click"]["auc"]

    def test_a_second_run_moves_the_first_aside(self, log):
        for seed in (1, 2):
            train(resolve_config(run_file(log, "twice", max_steps=2, seed=seed)))
        assert len(losses(log / "twice.previous-1")) == len(losses(log / "twice")) == 2

    @pytest.mark.parametrize("given", ["{}/with_slash/", "file://{}/with_scheme", "~/of_user"])
    def test_other_spellings_of_the_run_directory(self, log, monkeypatch, given):
        monkeypatch.setenv("HOME", str(log))
        name = given.strip("/").rpartition("/")[2]
        for seed in (1, 2):
            train(resolve_config(run_file(log, max_steps=1, seed=seed, run_dir=given.format(log))))
        assert len(losses(log / f"{name}.previous-1")) == len(losses(log / name)) == 1
        assert os.listdir(log / name / "tensorboard")

    def test_best_of_each_task_is_reported(self, trained):
        report = json.loads((trained / "report.json").read_text())
        best = report["test_at_best_of_each_task"]
        evaluations = [json.loads(line) for line in (trained / "evaluations.jsonl").read_text().splitlines()]
        for task in ("click", "like"):
            top = max(evaluations, key=lambda e: e["validation"][task]["auc"])
            assert best[task]["step"] == top["step"]


def test_early_stop(log):
    """With a learning rate of almost zero nothing improves after the first evaluation."""
    options = {"learning_rate": 1e-12, "embedding_learning_rate": 1e-12, "epochs": 9}
    config = run_file(log, "stops", early_stop={"patience": 2, "metric": "logloss"}, **options)
    report = train(resolve_config(config))
    assert report["steps"] < 9 * 13 and report["steps"] % 13 == 0


def test_what_is_not_known_does_not_stop_a_run(log):
    """Without a positive in the validation data there is no AUC."""
    rows = pq.read_table(log / "validation.parquet")
    pq.write_table(rows.filter(pc.equal(rows["click"], 0)), log / "negatives.parquet")
    config = run_file(log, "unknown", early_stop={"patience": 1, "task": "click"}, epochs=3)
    config["data"]["validation"] = str(log / "negatives.parquet")
    assert train(resolve_config(config))["steps"] == 39


def test_a_run_that_stopped_early_goes_on_with_more_patience(log):
    frozen = {"learning_rate": 1e-12, "embedding_learning_rate": 1e-12, "epochs": 4}
    options = {"metric": "logloss", "patience": 1}
    assert train(resolve_config(run_file(log, "impatient", early_stop=options, **frozen)))["steps"] < 52
    for early_stop, steps in ((options | {"patience": 2}, 39), (None, 52)):
        config = run_file(log, "impatient", early_stop=early_stop, resume=True, **frozen)
        assert train(resolve_config(config))["steps"] == steps


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["base", "sparse_dist"])
def test_pipelines_equal_the_plain_loop(log, pipeline):
    for name in ("plain", pipeline):
        train(resolve_config(run_file(log, f"loop_{name}", pipeline=name, max_steps=9, evaluate_every=4)))
    assert losses(log / "loop_plain") == losses(log / f"loop_{pipeline}")


def killed_after_step_8(config: dict) -> None:
    """As if the process were killed right after the checkpoint of step 8."""
    saved = Trainer._save

    def save_and_die(self, tags):
        saved(self, tags)
        if self.step == 8:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_save", save_and_die)
        train(resolve_config(config))


class TestResume:
    def test_continues_bit_for_bit(self, log):
        train(resolve_config(run_file(log, "whole", checkpoint_every=5)))
        train(resolve_config(run_file(log, "parts", checkpoint_every=5, max_steps=8)))
        config = run_file(log, "parts", checkpoint_every=5, resume=True)
        train(resolve_config(config))
        assert losses(log / "parts") == losses(log / "whole")
        timed = ("examples_per_second",)
        for a, b in zip(lines(log / "whole"), lines(log / "parts"), strict=True):
            assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
        reports = [json.loads((log / name / "report.json").read_text()) for name in ("whole", "parts")]
        assert reports[0]["test"] == reports[1]["test"]

    @pytest.mark.slow
    def test_metrics_of_the_epoch_and_of_the_window_go_on(self, log):
        """Stopped at step 8, which ends neither an epoch (13) nor a window (5)."""
        options = {"log_every": 5, "checkpoint_every": 8}
        train(resolve_config(run_file(log, "metrics_whole", **options)))
        killed_after_step_8(run_file(log, "metrics_parts", **options))
        train(resolve_config(run_file(log, "metrics_parts", resume=True, **options)))
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            whole, parts = ((log / f"metrics_{x}" / name).read_text().splitlines() for x in ("whole", "parts"))
            for a, b in zip(whole, parts, strict=True):
                a, b = json.loads(a), json.loads(b)
                a.pop("examples_per_second", None), b.pop("examples_per_second", None)
                assert a == b

    def test_an_epoch_that_ends_with_sigterm_is_evaluated(self, log, monkeypatch):
        count = Trainer._count_step

        def preempted(self):
            count(self)
            if self.step == 13:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
            patch.setattr(Trainer, "_count_step", preempted)
            train(resolve_config(run_file(log, "preempted")))
        train(resolve_config(run_file(log, "preempted", resume=True)))
        train(resolve_config(run_file(log, "not_preempted")))
        undisturbed, resumed = ((log / x / "evaluations.jsonl").read_text() for x in ("not_preempted", "preempted"))
        assert resumed == undisturbed

    @pytest.mark.slow
    def test_kill_at_any_moment(self, log, tmp_path):
        """kill -9 twice, in steps and in saves (every second step saves); the end equals the undisturbed run."""
        import yaml

        train(resolve_config(run_file(log, "undisturbed", checkpoint_every=2)))
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(run_file(log, "killed", checkpoint_every=2)))
        command = [sys.executable, "-m", "hmoe_rec", "train", str(path), "--resume"]
        for seen in (2, 9):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                if (log / "killed" / "metrics.jsonl").exists() and len(losses_so_far(log / "killed")) >= seen:
                    break
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
        assert losses(log / "killed") == losses(log / "undisturbed")

    def test_another_order_of_the_data_is_refused(self, log):
        train(resolve_config(run_file(log, "moved", max_steps=3)))
        with pytest.raises(CheckpointError, match="train.global_batch_size was 160 and is 80"):
            train(resolve_config(run_file(log, "moved", global_batch_size=80, resume=True)))

    def test_checkpoint_of_another_model_is_refused(self, log):
        train(resolve_config(run_file(log, "other", max_steps=3)))
        config = run_file(log, "other", resume=True)
        config["model"]["preset"] = "mmoe"
        before = (log / "other" / "config.yaml").read_text()
        with pytest.raises(CheckpointError, match="step_"):
            train(resolve_config(config))
        assert (log / "other" / "config.yaml").read_text() == before
        assert len(losses(log / "other")) == 3

    def test_weights_are_not_taken_for_those_of_other_fields_experts_or_sets(self, log):
        config = run_file(log, "reordered", max_steps=1)
        schema, model = config["data"]["schema"], config["model"]
        model["gate_inputs"] = {"click": {"sets": ["click", "shared"]}}
        train(resolve_config(config))
        config["train"]["resume"] = True
        turned = {"click": {"sets": ["shared", "click"]}}
        spelled = resolve_config(config).to_dict()["model"]
        spelled["experts"] = dict(reversed(spelled["experts"].items()))
        for change, said in (
            ({"data": config["data"] | {"schema": schema | {"ids": schema["ids"][::-1]}}}, "fields .* order user_id"),
            ({"model": model | {"gate_inputs": turned}}, "gate_inputs.click.sets .* order click, shared"),
            ({"model": spelled}, "model.experts were in the order click_1, like_1, shared_1 and"),
        ):
            with pytest.raises(CheckpointError, match=said):
                train(resolve_config(config | change))

    def test_nothing_to_resume_starts_anew(self, log):
        train(resolve_config(run_file(log, "fresh", max_steps=2, resume=True)))
        assert len(losses(log / "fresh")) == 2


def losses_so_far(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


class TestWrongInput:
    def test_a_loss_that_is_not_finite(self, log):
        config = run_file(log, "explodes", learning_rate=1e30, pipeline="plain")
        with pytest.raises(TrainingError, match=r"step \d+: the loss of task .* not finite; .*train\.parquet"):
            train(resolve_config(config))

    def test_nothing_is_saved_after_a_loss_that_is_not_finite_where_losses_are_read_seldom(self, log, monkeypatch):
        """As on a GPU."""
        made = Trainer.__init__

        def reads_seldom(self, *arguments):
            made(self, *arguments)
            self.reads_every_loss = False

        monkeypatch.setattr(Trainer, "__init__", reads_seldom)
        options = {"learning_rate": 1e30, "log_every": 100, "pipeline": "plain"}
        for due in ({"checkpoint_every": 5}, {"max_steps": 5}):
            with pytest.raises(TrainingError, match=r"step 5: the loss of task .* not finite"):
                train(resolve_config(run_file(log, "explodes_unseen", **options, **due)))
            assert not list((log / "explodes_unseen").glob("checkpoints/step_*"))

    def test_wrong_test_data_is_told_before_the_first_step(self, log):
        config = run_file(log, "untestable", max_steps=1)
        config["data"]["test"] = str(log / "none.parquet")
        with pytest.raises(DataError, match=r"none\.parquet: no such file"):
            train(resolve_config(config))
        assert not (log / "untestable").exists()

    def test_not_a_run_directory(self, tmp_path):
        with pytest.raises(ConfigError, match="not a run directory"):
            evaluate_run(str(tmp_path))

    def test_a_run_directory_that_cannot_be_written(self, log, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(TrainingError, match="cannot be written"):
            train(
                resolve_config(
                    run_file(log, train_dir := "x") | {"train": {"run_dir": str(tmp_path / "file" / train_dir)}}
                )
            )


def test_a_restart_by_the_launcher_goes_on(log, monkeypatch):
    train(resolve_config(run_file(log, "restarted", max_steps=4)))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(resolve_config(run_file(log, "restarted")))
    assert [line["step"] for line in lines(log / "restarted")] == list(range(1, 27))
    assert not (log / "restarted.previous-1").exists()


def tables_that_moved(run_dir: Path) -> dict[str, bool]:
    """Table -> whether training changed it, with the fused optimizer; the start is remade from seed and names."""
    config = read_run_config(str(run_dir))
    model = build_model(config)
    initialize_tables(model, seed=config.train.seed, std=config.model.embedding_init_std)
    found = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    weights = read_unsharded(read_checkpoint(str(found)), prefix="model.")
    start = {name: p for name, p in model.named_parameters() if in_table(name)}
    ends = {name: w for name, w in weights.items() if in_table(name)}
    match = {name: next(w for key, w in ends.items() if key.endswith(name.split("embedding.", 1)[1])) for name in start}
    return {name.split(".")[-2]: not torch.equal(match[name], start[name]) for name in start}


def routes_of(world_size: int, log: Path) -> dict[str, bool]:
    """STEM trained on clicks alone: what of its tables moved."""
    name = f"clicks_{world_size}"
    content = run_file(log, name, max_steps=6, task_weights={"like": 0.0})
    train(resolve_config(content)) if world_size == 1 else run_ranks(world_size, train_rank, content)
    return tables_that_moved(log / name)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_task_never_moves_another_tasks_tables(log, world_size):
    moved = routes_of(world_size, log)
    assert {name.split("__")[0] for name, did in moved.items() if did} == {"click", "shared"}
    assert all(did for name, did in moved.items() if not name.startswith("like__"))


# ---------------------------------------------------------------------------------------------------- several processes


def train_rank(rank: int, world_size: int, content: dict) -> None:
    torch.set_num_threads(1)
    train(resolve_config(content))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "plan"),
    [(2, "auto"), (2, "row_wise"), (2, "column_wise"), (4, "table_wise"), (2, "data_parallel")],
)
def test_n_processes_train_the_same_model_as_one(log, world_size, plan):
    one, many = f"one_{plan}_{world_size}", f"many_{plan}_{world_size}"
    contents = [run_file(log, name, max_steps=20) for name in (one, many)]
    for content in contents:
        content["model"]["dropout"] = 0.0
        content["sharding"] = {"plan": plan}
        # Row-wise Adagrad keeps one statistic per row *and column shard*: it trains another model under column_wise.
        content["train"]["embedding_optimizer"] = "adagrad" if plan == "column_wise" else "rowwise_adagrad"
        if plan == "data_parallel":  # replicated tables follow the schedule, and are not in the norm that is clipped
            content["train"] |= {"warmup_steps": 6, "decay": "linear", "clip_norm": 0.05}
    if plan == "data_parallel":
        contents[0]["sharding"] = {"plan": "table_wise"}
        contents[1]["train"]["pipeline"] = "sparse_dist"
    train(resolve_config(contents[0]))
    run_ranks(world_size, train_rank, contents[1])
    for a, b in zip(losses(log / one), losses(log / many), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    reports = [json.loads((log / name / "report.json").read_text()) for name in (one, many)]
    assert reports[0]["parameters"] == reports[1]["parameters"]
    assert reports[0]["test"]["like"] == pytest.approx(reports[1]["test"]["like"], abs=1e-4)


@pytest.mark.slow
def test_replica_groups_with_sgd_averaged_at_every_step_train_the_same_model_as_one_process(log):
    contents = [run_file(log, name, max_steps=16, embedding_optimizer="sgd") for name in ("no_groups", "groups")]
    for content in contents:
        content["model"]["dropout"] = 0.0
    contents[1]["sharding"] = {"plan": "row_wise", "replicas": 2, "sync_every": 1}
    train(resolve_config(contents[0]))
    run_ranks(4, train_rank, contents[1])
    for a, b in zip(losses(log / "no_groups"), losses(log / "groups"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    reports = [json.loads((log / name / "report.json").read_text()) for name in ("no_groups", "groups")]
    assert reports[0]["parameters"] == reports[1]["parameters"]
    alone = evaluate_run(str(log / "groups"))["metrics"]  # one process, without groups
    assert alone["like"] == pytest.approx(reports[1]["test"]["like"], abs=1e-6)


@pytest.mark.slow
def test_replica_groups_resume_bit_for_bit(log):
    """Stopped at step 8: after an averaging at 6 and another, for the checkpoint, at 8."""
    options = {"checkpoint_every": 8, "evaluate_every": 5}
    contents = [run_file(log, name, max_steps=16, **options) for name in ("groups_whole", "groups_parts")]
    for content in contents:
        content["sharding"] = {"plan": "table_wise", "replicas": 2, "sync_every": 3}
    run_ranks(2, train_rank, contents[0])
    contents[1]["train"]["max_steps"] = 8
    run_ranks(2, train_rank, contents[1])
    contents[1]["train"] |= {"max_steps": 16, "resume": True}
    run_ranks(2, train_rank, contents[1])
    assert losses(log / "groups_whole") == losses(log / "groups_parts")


def evaluate_rank(rank: int, world_size: int, run_dir: str) -> dict:
    return evaluate_run(run_dir)["metrics"]


@pytest.mark.slow
def test_a_checkpoint_of_one_process_evaluates_the_same_on_two(log, trained):
    alone = evaluate_run(str(trained))["metrics"]
    for metrics in run_ranks(2, evaluate_rank, str(trained)):
        assert metrics["click"] == pytest.approx(alone["click"], abs=1e-6)


@pytest.mark.slow
def test_a_rank_without_a_row_in_the_last_batch(log):
    """2000 rows in batches of 999: the third batch has 2 rows for 4 processes."""
    contents = [run_file(log, name, epochs=1, global_batch_size=999) for name in ("short_one", "short_four")]
    for content in contents:
        content["model"]["dropout"] = 0.0
    train(resolve_config(contents[0]))
    run_ranks(4, train_rank, contents[1])
    for a, b in zip(losses(log / "short_one"), losses(log / "short_four"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_lines_for_people_keep_their_brackets(tmp_path, capsys):
    log = RunLog(str(tmp_path), ["click"], total_steps=1, first_step=0, active=True)
    log.say("unreadable: [errno 5] [/data/x]")
    assert capsys.readouterr().err == "unreadable: [errno 5] [/data/x]\n"
