"""Whole runs whose batches do not divide by the ranks do what one process does: train, follow, resume, read a run.

1,999 rows in batches of 333: odd parts in every batch for 2 and 5 ranks, even ones for 3, one row in the last batch.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from following import final_state
from gloo import run_ranks
from managed_ids import managed_file
from small_run import make_log, run_file

from hmoe_rec.analysis.calibration import analyze_calibration
from hmoe_rec.analysis.gates import analyze_gates
from hmoe_rec.analysis.opening import opened
from hmoe_rec.config import resolve_config
from hmoe_rec.serving.predictor import predict_run
from hmoe_rec.training.checkpoint import CheckpointManager
from hmoe_rec.training.evaluate import evaluate_run
from hmoe_rec.training.evaluate_uncertainty import evaluate_uncertainty
from hmoe_rec.training.online import follow
from hmoe_rec.training.run_log import RunLog
from hmoe_rec.training.trainer import train
from hmoe_rec.training.uncertainty import fit_uncertainty

ROWS, BATCH, STEPS = 1999, 333, 7
LOSSES = {
    "click": ["bce", {"kind": "jrc", "weight": 0.3, "across_ranks": True}],
    "like": ["bce", {"kind": "pair", "weight": 0.5, "within": "user", "across_ranks": True}],
}
OF_THE_CLOCK = ("examples_per_second", "seconds_waited", "lag")


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    make_log(folder, rows=2601)  # 301 rows of test data
    table = pq.read_table(folder / "train.parquet")
    pq.write_table(table.slice(0, ROWS), folder / "train.parquet", row_group_size=170)
    (folder / "in").mkdir()
    for i, rows in enumerate((241, 1, 83)):
        pq.write_table(table.slice(300 * i, rows), folder / "in" / f"part-{i}.parquet")
    return folder


def content(folder: Path, run: str, plan: str = "auto", **options) -> dict:
    made = run_file(folder, run, **({"global_batch_size": BATCH, "epochs": 1, "evaluate_every": 4} | options))
    made["model"] |= {"dropout": 0.0, "preset": "mmoe", "num_experts": 2}
    made["train"] |= {"losses": LOSSES, "decorrelation": 0.1, "log_negative_gradients": True, "learning_rate": 1e-3}
    made["sharding"] = {"plan": plan}
    return made


def run_rank(rank: int, world_size: int, contents: list[dict]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "_scalars", lambda *_: None)  # importing TensorBoard takes longer than all the rest
        for given in contents:
            config = resolve_config(given)
            follow(config) if config.online.follow else train(config)


def leaves(value: object, path: str = "") -> dict[str, float]:
    """All numbers but those of the clock."""
    if isinstance(value, list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: x for key, v in items if key not in OF_THE_CLOCK for k, x in leaves(v, f"{path}/{key}").items()}
    return {path: float(value)} if isinstance(value, int | float) else {}


def figures(run: Path) -> dict[str, float]:
    """All that the run's logs say."""
    files = [run / name for name in ("metrics.jsonl", "evaluations.jsonl") if (run / name).exists()]
    return leaves([[json.loads(line) for line in file.read_text().splitlines()] for file in files])


def check_same(run: Path, alone: Path) -> None:
    found, wanted = figures(run), figures(alone)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        of_pairs = "auc" in key  # which two almost equal scores may change by a pair of rows
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-4 if of_pairs else 1e-6, nan_ok=True), key
    mine, theirs = final_state(run), final_state(alone)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.fixture(scope="module")
def alone(log) -> Path:
    run_rank(0, 1, [content(log, "alone")])
    assert len((log / "alone" / "metrics.jsonl").read_text().splitlines()) == STEPS
    return log / "alone"


def test_two_ranks_train_what_one_process_trains(log, alone):
    run_ranks(2, run_rank, [content(log, "two", "row_wise")])
    check_same(log / "two", alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "plan", "pipeline"),
    [
        (3, "row_wise", "sparse_dist"),
        (5, "row_wise", "plain"),
        (2, "row_wise", "sparse_dist"),
        (3, "data_parallel", "base"),
        (5, "table_wise", "base"),
    ],
)
def test_more_ranks_plans_and_pipelines(log, alone, world_size, plan, pipeline):
    name = f"{plan}_{pipeline}_{world_size}"
    run_ranks(world_size, run_rank, [content(log, name, plan, pipeline=pipeline)])
    check_same(log / name, alone)


@pytest.mark.slow
def test_tables_cut_by_columns(log):
    one, three = (content(log, name, "column_wise", embedding_optimizer="adagrad") for name in ("ada", "ada_three"))
    run_rank(0, 1, [one])
    run_ranks(3, run_rank, [three])
    check_same(log / "ada_three", log / "ada")


@pytest.mark.slow
def test_managed_fields(log):
    contents = [managed_file(log, name, global_batch_size=BATCH, epochs=1) for name in ("managed", "managed_three")]
    for given in contents:
        given["model"]["dropout"], given["sharding"] = 0.0, {"plan": "row_wise"}
    run_rank(0, 1, contents[:1])
    run_ranks(3, run_rank, contents[1:])
    check_same(log / "managed_three", log / "managed")


@pytest.mark.slow
def test_replica_groups(log):
    contents = [content(log, name, "row_wise", embedding_optimizer="sgd") for name in ("sgd", "groups")]
    contents[1]["sharding"] |= {"replicas": 2, "sync_every": 1}
    run_rank(0, 1, contents[:1])
    run_ranks(4, run_rank, contents[1:])
    check_same(log / "groups", log / "sgd")


# ------------------------------------------------------------------------------------------------- resuming, following


def stopped_and_resumed(log: Path, name: str, steps: int, world_sizes: tuple[int, int], **data) -> Path:
    """Stopped after some steps of one number of ranks, gone on with another."""
    for world_size, more in zip(world_sizes, ({"max_steps": steps}, {"resume": True}), strict=True):
        given = content(log, name, "row_wise", **more)
        given["data"] |= data
        run_ranks(world_size, run_rank, [given])
    return log / name


def check_same_training(run: Path, alone: Path) -> None:
    """Steps and the model; the sums of metrics and the evaluation at the stop are others."""
    found, wanted = (leaves([json.loads(x)["losses"] for x in (r / "metrics.jsonl").open()]) for r in (run, alone))
    assert found == pytest.approx(wanted, abs=1e-6) and len(found) == 2 * STEPS
    mine, theirs = final_state(run), final_state(alone)
    for key in (key for key in theirs if key.startswith(("model.", "optimizer."))):
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_going_on_at_odd_batches_with_more_ranks(log, alone):
    check_same_training(stopped_and_resumed(log, "last_on_two", STEPS - 2, (1, 2)), alone)


@pytest.mark.slow
@pytest.mark.parametrize(("world_sizes", "steps"), [((2, 3), 6), ((3, 1), 4), ((5, 2), 1)])
def test_going_on_with_another_number_of_ranks(log, alone, world_sizes, steps):
    check_same_training(stopped_and_resumed(log, f"from_{world_sizes}", steps, world_sizes), alone)


@pytest.mark.slow
def test_more_ranks_than_lanes_go_on(log):
    """As an elastic job that begins with one node and goes on with two."""
    for run, world_sizes in (("lanes_alone", (1, 1)), ("lanes", (1, 3))):
        stopped_and_resumed(log, run, 4, world_sizes, lanes=2)
    check_same_training(log / "lanes", log / "lanes_alone")


def test_a_run_goes_on_with_the_lanes_that_it_was_begun_with(log):
    """Before, their number followed that of the ranks; what is saved counts more than today's default."""
    run_rank(0, 1, [content(log, "eleven", max_steps=3) | {"data": content(log, "")["data"] | {"lanes": 11}}])
    run_rank(0, 1, [content(log, "eleven", resume=True)])
    run_rank(0, 1, [content(log, "eleven_whole") | {"data": content(log, "")["data"] | {"lanes": 11}}])
    check_same_training(log / "eleven", log / "eleven_whole")
    found = CheckpointManager(str(log / "eleven" / "checkpoints")).latest()
    assert found.meta["position"]["data.lanes"] == 11


def followed(log: Path, run: str, **online) -> dict:
    made = content(log, run, "row_wise", evaluate_every=None)
    del made["train"]["epochs"]
    made["data"] = {"schema": made["data"]["schema"]}
    return made | {
        "online": {"follow": str(log / "in"), "until_idle": 0, "poll_seconds": 0.01, "window_files": 1} | online
    }


def test_windows_that_are_odd_are_followed(log):
    """Windows of 241, 1 and 83 rows; batches of 333."""
    run_rank(0, 1, [followed(log, "followed")])
    run_ranks(2, run_rank, [followed(log, "followed_two")])
    check_same(log / "followed_two", log / "followed")
    rows = [json.loads(line)["rows"] for line in (log / "followed" / "metrics.jsonl").open()]
    assert rows == [241, 1, 83]


# ------------------------------------------------------------------------------------------------------- reading a run


def all_readings(rank: int, world_size: int, run: str, out: str) -> dict[str, float]:
    """What evaluation, posteriors, predictions and analyses say of 301 rows."""
    found = {"evaluation": evaluate_run(run)["metrics"]}
    fit_uncertainty(run, "row_laplace")
    found["uncertainty"] = evaluate_uncertainty(run, "row_laplace", new_ids="item_id")["metrics"]
    written = predict_run(run, f"{Path(run).parent}/test.parquet", f"{out}/{world_size}")
    with opened(run) as open_run:
        uris = open_run.uris()
        calibration = analyze_calibration(open_run, uris, by=["city", "price"], counts=["time"], frequency=["user_id"])
        found["calibration"] = calibration.numbers
        found["gates"] = analyze_gates(open_run, uris, by="price").numbers
    return leaves(found) | {"predicted": written["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 5])
def test_a_run_is_read_as_by_one_process(log, world_size, tmp_path):
    run_rank(0, 1, [content(log, f"read_{world_size}", "row_wise", max_steps=3)])
    run = str(log / f"read_{world_size}")
    alone = all_readings(0, 1, run, str(tmp_path))
    assert alone["predicted"] == 301 and len(alone) > 200
    for found in run_ranks(world_size, all_readings, run, str(tmp_path)):
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), key
    one, many = (pq.read_table(tmp_path / str(n)).sort_by([("user_id", "ascending")]) for n in (1, world_size))
    assert np.sort(one["click"]) == pytest.approx(np.sort(many["click"]), abs=1e-6)
