"""Whole runs with chosen losses, learned task weights and projected gradients; and the mistakes in their keys."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from following import lines
from gloo import run_ranks
from small_run import make_log, run_file

from hmoe_rec.config import prepare_data, resolve_config
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.serving.predictor import predict_run
from hmoe_rec.training.build import build_model
from hmoe_rec.training.checkpoint import read_checkpoint, read_unsharded
from hmoe_rec.training.evaluate import evaluate_run, read_run_config
from hmoe_rec.training.trainer import train
from hmoe_rec.types import CheckpointError, ConfigError

EVERYTHING = {
    "losses": {
        "click": [{"kind": "bce", "weight": 0.7}, {"kind": "jrc", "weight": 0.3, "across_ranks": True}],
        "like": [
            "bce",
            {"kind": "pair", "weight": 0.5, "within": "user", "across_ranks": True},
            {"kind": "list", "weight": 0.2, "positive_weight": 0.5, "across_ranks": True, "within": "item_id"},
        ],
    },
    "task_weighting": "uncertainty",
    "task_weights": {"like": 0.5},
    "gradient_surgery": "pcgrad",
    "log_negative_gradients": True,
    "max_steps": 6,
}
DWA = EVERYTHING | {"task_weighting": {"kind": "dwa", "every": 2}, "decorrelation": 0.1}


def content(folder: Path, run: str, options: dict, **more) -> dict:
    made = run_file(folder, run, **(options | more))
    made["model"] |= {"dropout": 0.0, "preset": "mmoe", "num_experts": 3}
    return made


def figures(run_dir: Path) -> np.ndarray:
    """[steps, all that the log says of losses and gradients]."""

    def leaves(value) -> list[float]:
        return [x for v in value.values() for x in leaves(v)] if isinstance(value, dict) else [value]

    return np.array([leaves({k: v for k, v in x.items() if k != "examples_per_second"}) for x in lines(run_dir)])


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    make_log(folder)
    return folder


@pytest.fixture(scope="module")
def trained(log) -> Path:
    train(resolve_config(content(log, "one", EVERYTHING)))
    return log / "one"


def test_the_log_tells_terms_weights_and_gradients_apart(trained):
    first, last = lines(trained)[0], lines(trained)[-1]
    assert set(first["terms"]) == {"click/bce", "click/jrc", "like/bce", "like/pair", "like/list"}
    assert first["terms"]["click/bce"] == pytest.approx(first["losses"]["click"])
    assert first["loss"] == pytest.approx(first["losses"]["click"] + 0.5 * first["losses"]["like"])
    assert first["task_weight"] == {"click": 1.0, "like": 0.5} and last["task_weight"] != first["task_weight"]
    assert 0 <= last["conflicts"] <= 1 and all(x > 0 for x in last["negative_gradient"].values())


def test_predictions_are_the_difference_of_the_two_logits(trained, tmp_path):
    written = predict_run(str(trained), str(trained.parent / "test.parquet"), str(tmp_path / "out.parquet"))
    config = read_run_config(str(trained))
    model = build_model(config).eval()
    assert model.towers.out_dims == [2, 1]
    weights = read_unsharded(read_checkpoint(written["checkpoint"]), prefix="model.")
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})  # no weights of tasks in it
    reader = BatchReader(
        ParquetSource(prepare_data(config).test, config.schema_of_data), global_batch_size=300, shuffle=False
    )
    batch = next(reader.epoch(0))
    with torch.no_grad():
        logits = model(batch)
        levels = model.levels(*model.represent(batch))
    assert logits.shape == (300, 2)
    torch.testing.assert_close(levels[..., 1] - levels[..., 0], logits)
    assert (levels[:, 0, 0] != 0).all() and (levels[:, 1, 0] == 0).all()
    out = pq.read_table(tmp_path / "out.parquet")
    np.testing.assert_allclose(np.stack([out["click"], out["like"]], 1), logits.sigmoid().numpy(), atol=1e-6)


def test_evaluation_gives_the_reports_numbers(trained):
    report = json.loads((trained / "report.json").read_text())
    assert evaluate_run(str(trained))["metrics"]["like"]["logloss"] == report["test"]["like"]["logloss"]
    config = read_run_config(str(trained))
    assert report["parameters"]["dense"] == sum(
        p.numel() for name, p in build_model(config).named_parameters() if not name.startswith("embedding.")
    )


def train_rank(rank: int, world_size: int, given: dict) -> None:
    train(resolve_config(given))


def test_two_processes_train_the_same_model(log, trained):
    run_ranks(2, train_rank, content(log, "two", EVERYTHING) | {"sharding": {"plan": "row_wise"}})
    np.testing.assert_allclose(figures(log / "two"), figures(trained), rtol=2e-4, atol=1e-6)


def test_resumes_bit_for_bit(log, trained):
    train(resolve_config(content(log, "parts", EVERYTHING, max_steps=3)))
    train(resolve_config(content(log, "parts", EVERYTHING, resume=True)))
    assert np.array_equal(figures(log / "parts"), figures(trained))


@pytest.mark.slow
def test_dynamic_weights_over_two_processes_and_a_restart(log):
    train(resolve_config(content(log, "dwa", DWA)))
    assert len({tuple(line["task_weight"].values()) for line in lines(log / "dwa")}) == 3  # a new one every two steps
    train(resolve_config(content(log, "dwa_parts", DWA, max_steps=3)))
    train(resolve_config(content(log, "dwa_parts", DWA, resume=True)))
    assert np.array_equal(figures(log / "dwa_parts"), figures(log / "dwa"))
    run_ranks(2, train_rank, content(log, "dwa_two", DWA) | {"sharding": {"plan": "row_wise"}})
    np.testing.assert_allclose(figures(log / "dwa_two"), figures(log / "dwa"), rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_the_pipeline_of_gpus_equals_the_plain_loop(log):
    """TorchRec traces the training step to find the tables' inputs; the step must bear it."""
    for name in ("plain", "sparse_dist"):
        train(resolve_config(content(log, f"loop_{name}", DWA, pipeline=name)))
    assert np.array_equal(figures(log / "loop_plain"), figures(log / "loop_sparse_dist"))


@pytest.mark.slow
def test_state_of_another_weighting_is_refused(log, trained):
    train(resolve_config(content(log, "changes", {"max_steps": 2})))
    with pytest.raises(CheckpointError, match="weighting"):
        train(resolve_config(content(log, "changes", {"task_weighting": "uncertainty", "resume": True})))


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"losses": {"clicks": "bce"}}, "train.losses.clicks: unknown task 'clicks'.*did you mean 'click'"),
            ({"losses": {"click": "pairs"}}, "train.losses.click.0.kind: unknown kind 'pairs'; did you mean 'pair'"),
            (
                {"losses": {"click": ["bce", {"kind": "pair", "wieght": 1}]}},
                "train.losses.click.1.wieght: unknown option of pair 'wieght'.*did you mean 'weight'",
            ),
            (
                {"losses": {"click": {"kind": "list", "weight": -1}}},
                "train.losses.click.0: weight must be a number >= 0",
            ),
            ({"losses": {"click": {"kind": "focal", "mean_over": "al"}}}, "train.losses.click.0.mean_over: .*'al'"),
            ({"losses": {"click": []}}, "train.losses.click: none given"),
            (
                {"losses": {"click": {"kind": "pair", "within": "item"}}},
                "train.losses.click.0.within: unknown id field 'item'.*did you mean 'item_id'",
            ),
            (
                {"losses": {"click": "torch.nn:Identity"}},
                "click.0.kind: kind 'torch.nn:Identity' is code of the package 'torch'.*add --allow torch",
            ),
            ({"task_weighting": "dwb"}, "train.task_weighting.kind: unknown kind 'dwb'; did you mean 'dwa'"),
            ({"task_weighting": {"kind": "dwa", "every": 0}}, "train.task_weighting: .*every >= 1, got 2.0 and 0"),
            ({"gradient_surgery": "pcgrd"}, "train.gradient_surgery: .*did you mean 'pcgrad'"),
        ],
    )
    def test_is_named_with_its_place(self, log, options, words):
        with pytest.raises(ConfigError, match=words):
            resolve_config(content(log, "wrong", options))

    def test_groups_of_users_without_a_user_key(self, log):
        given = content(log, "wrong", {"losses": {"click": {"kind": "pair", "within": "user"}}})
        given["data"]["schema"] = {k: v for k, v in given["data"]["schema"].items() if k != "user_key"}
        with pytest.raises(ConfigError, match="within: 'user' is the schema's user_key, and it has none"):
            resolve_config(given)

    def test_groups_of_a_list(self, log):
        given = content(log, "wrong", {"losses": {"click": {"kind": "pair", "within": "tags"}}})
        tags = {"name": "tags", "num_embeddings": 5, "pooling": "mean"}
        given["data"]["schema"] = given["data"]["schema"] | {"ids": [*given["data"]["schema"]["ids"], tags]}
        with pytest.raises(ConfigError, match="within: tags is a list"):
            resolve_config(given)
