"""A row of probabilities for every row of the data, on one process and on two; and what cannot be written."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from gloo import run_ranks
from small_run import make_log, run_file

from hmoe_rec.config import prepare_data, resolve_config
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.serving.predictor import predict_run
from hmoe_rec.training.build import build_model
from hmoe_rec.training.checkpoint import read_checkpoint, read_unsharded
from hmoe_rec.training.evaluate import read_run_config
from hmoe_rec.training.trainer import train
from hmoe_rec.types import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    make_log(folder)
    train(resolve_config(run_file(folder, max_steps=5)))
    return folder / "run"


@pytest.fixture(scope="module")
def new_data(run) -> str:
    """The test data without its labels and weights."""
    table = pq.read_table(run.parent / "test.parquet").drop_columns(["click", "like", "weight"])
    pq.write_table(table, run.parent / "new.parquet", row_group_size=70)
    return str(run.parent / "new.parquet")


def test_probabilities_are_those_of_the_unsharded_model_in_the_order_of_the_rows(run, new_data, tmp_path):
    written = predict_run(str(run), new_data, str(tmp_path / "out.parquet"))
    out, given = pq.read_table(tmp_path / "out.parquet"), pq.read_table(new_data)
    assert written["rows"] == out.num_rows == 300
    assert out.column_names == ["user_id", "time", "click", "like"] and out["user_id"].equals(given["user_id"])
    config = read_run_config(str(run))
    model = build_model(config).eval()
    weights = read_unsharded(read_checkpoint(written["checkpoint"]), prefix="model.")
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    source = ParquetSource(prepare_data(config).test, config.schema_of_data)
    reader = BatchReader(source, global_batch_size=300, shuffle=False)
    with torch.no_grad():
        expected = model(next(reader.epoch(0))).sigmoid().numpy()
    np.testing.assert_allclose(np.stack([out["click"], out["like"]], 1), expected, atol=1e-6)


def predict_rank(rank: int, world_size: int, run: str, data: str, out: str) -> int:
    return predict_run(run, data, out)["rows"]


@pytest.mark.slow
def test_two_processes_write_a_part_each(run, new_data, tmp_path):
    predict_run(str(run), new_data, str(tmp_path / "one"))
    assert run_ranks(2, predict_rank, str(run), new_data, str(tmp_path / "two")) == [300, 300]
    assert len(list((tmp_path / "two").iterdir())) == 2
    order = [("user_id", "ascending"), ("click", "ascending")]
    one, two = (pq.read_table(tmp_path / name).sort_by(order) for name in ("one", "two"))
    assert one["user_id"].equals(two["user_id"])
    np.testing.assert_allclose(one["like"], two["like"], atol=1e-6)


def test_nothing_is_overwritten_and_nothing_half_written_stays(run, new_data, tmp_path):
    out = tmp_path / "out.parquet"
    out.write_text("precious")
    with pytest.raises(DataError, match="exists; nothing is overwritten"):
        predict_run(str(run), new_data, str(out))
    assert out.read_text() == "precious"
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "part-00000-of-00002.parquet").write_text("of two processes")
    with pytest.raises(DataError, match="holds part-00000-of-00002.parquet, which would be read together"):
        predict_run(str(run), new_data, str(tmp_path / "parts"))
    pq.write_table(pq.read_table(new_data).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(DataError):
        predict_run(str(run), str(tmp_path / "empty.parquet"), str(tmp_path / "none.parquet"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.parquet", "out.parquet", "parts"]


def test_an_output_that_cannot_be_written(run, new_data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        predict_run(str(run), new_data, str(tmp_path / "file" / "out.parquet"))


def test_no_such_checkpoint_and_no_such_run(run, new_data, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint '77'; give best, latest"):
        predict_run(str(run), new_data, str(tmp_path / "x.parquet"), checkpoint="77")
    with pytest.raises(ConfigError, match="not a run directory"):
        predict_run(str(tmp_path), new_data, str(tmp_path / "x.parquet"))


def test_a_feature_column_is_missing(run, new_data, tmp_path):
    pq.write_table(pq.read_table(new_data).drop_columns(["price"]), tmp_path / "less.parquet")
    with pytest.raises(ValueError, match="price"):
        predict_run(str(run), str(tmp_path / "less.parquet"), str(tmp_path / "x.parquet"))
