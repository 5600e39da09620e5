"""A whole run with fitted numbers, times of behaviors, frozen vectors, a sequence expert and a penalty on experts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from gloo import run_ranks
from small_run import make_log, run_file

from hmoe_rec.config import prepare_data, resolve_config
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.serving.predictor import predict_run
from hmoe_rec.sharding.process import Process
from hmoe_rec.training.build import build_model
from hmoe_rec.training.checkpoint import read_checkpoint, read_unsharded
from hmoe_rec.training.evaluate import read_run_config
from hmoe_rec.training.prepare import with_pooling
from hmoe_rec.training.trainer import train
from hmoe_rec.types import ConfigError, DataError


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoded")
    make_log(folder)
    vectors = np.random.default_rng(3).normal(size=(22, 5)).astype("f4")  # item 22 has none
    table = pa.table({"item_id": np.arange(22), "vector": pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), 5)})
    pq.write_table(table, folder / "items.parquet")
    return folder


def encoded(folder: Path, run: str, **train_options) -> dict:
    content = run_file(folder, run, **({"decorrelation": 0.1, "max_steps": 6} | train_options))
    content["sharding"] = {"measure_pooling": True, "pooling": {"user_id": 1.5}}
    content["model"] |= {
        "preset": "mmoe",
        "num_experts": 3,
        "expert": [{"kind": "flat_dnn", "hidden": [16]}, {"kind": "sequence"}, {"kind": "dcnv2"}],
        "dropout": 0.0,
        "encoding": {
            "numbers": "mnse",
            "sequences": "tim",
            "frozen_vectors": {"pretrained": {"field": "item_id", "path": str(folder / "items.parquet")}},
            "similarities": {"near": {"kind": "history", "vectors": "pretrained", "sequence": "history"}},
        },
    }
    return content


def losses(run_dir: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return np.array([list(line["losses"].values()) for line in lines])


@pytest.fixture(scope="module")
def trained(log) -> Path:
    train(resolve_config(encoded(log, "one")))
    return log / "one"


def test_statistics_are_fitted_and_kept_with_the_run(trained):
    config = read_run_config(str(trained))
    prices = np.array(
        [x for x in pq.read_table(trained.parent / "train.parquet")["price"].to_pylist() if x is not None]
    )
    (number,) = config.features.numbers
    assert number.statistics is not None and number.statistics.count == len(prices)
    assert number.statistics.maximum == pytest.approx(prices.max(), rel=1e-6)
    checkpoint = next(iter(sorted((trained / "checkpoints").glob("step_*"))))
    assert read_checkpoint(str(checkpoint)).meta["config"]["data"]["statistics"].keys() == {"price"}


def test_ids_per_example_are_measured_and_kept_with_the_run(trained):
    sharding = read_run_config(str(trained)).sharding
    assert not sharding.measure_pooling and sharding.pooling.keys() == {"user_id", "item_id", "city", "hist_item_id"}
    lengths = [min(len(row), 4) for row in pq.read_table(trained.parent / "train.parquet")["hist_item_id"].to_pylist()]
    assert sharding.pooling["hist_item_id"] == pytest.approx(np.mean(lengths), rel=1e-3)
    assert sharding.pooling["user_id"] == 1.5, "what the file says counts"
    again = resolve_config(encoded(trained.parent, "one", resume=True))
    data = replace(prepare_data(again), train=("gone.parquet",))
    assert with_pooling(again, data, Process(0, 1, 0, 1, torch.device("cpu"))).sharding == sharding, (
        "not measured again"
    )


def test_a_checkpoint_predicts_without_the_file_of_vectors(trained, tmp_path):
    vectors = trained.parent / "items.parquet"
    hidden = vectors.rename(tmp_path / "items.parquet")
    try:
        written = predict_run(str(trained), str(trained.parent / "test.parquet"), str(tmp_path / "out.parquet"))
    finally:
        hidden.rename(vectors)
    config = read_run_config(str(trained))
    model = build_model(config).eval()
    weights = read_unsharded(read_checkpoint(written["checkpoint"]), prefix="model.")
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    assert model.similarities.tables["pretrained"](torch.tensor([3, 22])).abs().sum(1).gt(0).tolist() == [True, False]
    reader = BatchReader(
        ParquetSource(prepare_data(config).test, config.schema_of_data), global_batch_size=300, shuffle=False
    )
    with torch.no_grad():
        expected = model(next(reader.epoch(0))).sigmoid().numpy()
    out = pq.read_table(tmp_path / "out.parquet")
    np.testing.assert_allclose(np.stack([out["click"], out["like"]], 1), expected, atol=1e-6)


def train_rank(rank: int, world_size: int, content: dict) -> None:
    train(resolve_config(content))


@pytest.mark.parametrize("plan", ["row_wise", pytest.param("table_wise", marks=pytest.mark.slow)])
def test_two_processes_train_the_same_model(log, trained, plan):
    content = encoded(log, f"two_{plan}") | {"sharding": {"plan": plan}}
    run_ranks(2, train_rank, content)
    np.testing.assert_allclose(losses(log / f"two_{plan}"), losses(trained), rtol=2e-5)


def test_the_penalty_changes_the_model_and_not_the_reported_loss(log, trained):
    train(resolve_config(encoded(log, "free", decorrelation=0.0)))
    with_penalty, without = losses(trained), losses(log / "free")
    assert np.array_equal(with_penalty[0], without[0]) and not np.array_equal(with_penalty[-1], without[-1])


def test_resumes_bit_for_bit(log, trained):
    train(resolve_config(encoded(log, "parts", max_steps=4)))
    (log / "items.parquet").rename(log / "gone.parquet")  # what was read once is in the checkpoint
    try:
        content = encoded(log, "parts", resume=True)
        content["model"]["encoding"]["frozen_vectors"]["pretrained"]["dim"] = 5
        train(resolve_config(content))
    finally:
        (log / "gone.parquet").rename(log / "items.parquet")
    # The schedule depends on the number of steps only through its decay, which is constant here.
    assert np.array_equal(losses(log / "parts"), losses(trained))


def test_statistics_given_as_a_file_are_not_fitted_again(log, trained, tmp_path):
    config = read_run_config(str(trained))
    fitted = dict(config.to_dict()["data"]["statistics"])
    fitted["price"] = fitted["price"] | {"low": -77.0}
    (tmp_path / "statistics.yaml").write_text(yaml.safe_dump(fitted))
    content = encoded(log, "given", max_steps=1)
    content["data"]["statistics"] = str(tmp_path / "statistics.yaml")
    train(resolve_config(content))
    assert read_run_config(str(log / "given")).features.numbers[0].statistics.low == -77.0


class TestMistakes:
    def test_a_missing_file_of_vectors(self, log):
        content = encoded(log, "missing")
        content["model"]["encoding"]["frozen_vectors"]["pretrained"]["path"] = str(log / "itms.parquet")
        with pytest.raises(ConfigError, match="model.encoding.frozen_vectors.pretrained: .*itms.parquet"):
            resolve_config(content)

    def test_vectors_of_ids_that_the_table_does_not_have(self, log, tmp_path):
        vectors = pa.FixedSizeListArray.from_arrays(np.ones(10, "f4"), 5)
        pq.write_table(pa.table({"item_id": [3, 99], "vector": vectors}), tmp_path / "far.parquet")
        content = encoded(log, "far")
        content["model"]["encoding"]["frozen_vectors"]["pretrained"]["path"] = str(tmp_path / "far.parquet")
        with pytest.raises(DataError, match="99"):
            train(resolve_config(content))

    def test_statistics_of_another_form(self, log):
        content = encoded(log, "form")
        content["data"]["statistics"] = {"price": {"cuont": 3}}
        with pytest.raises(ConfigError, match="data.statistics: .*cuont"):
            resolve_config(content)
