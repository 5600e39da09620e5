"""Scale on paper: models have the size they say, figures follow by hand, and what does not fit is told."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scale
import torch

from hmoe_rec.config import resolve_config
from hmoe_rec.config.file import parse_yaml, to_yaml
from hmoe_rec.embedding.lookup import MultiEmbedding
from hmoe_rec.sharding.estimate import read_tables
from hmoe_rec.sharding.planner import plan_for
from hmoe_rec.sharding.prediction import PARTS
from hmoe_rec.sharding.topology import cluster_of
from hmoe_rec.training.build import plan_model
from hmoe_rec.training.optimizer import attach_table_optimizer
from hmoe_rec.types import EmbeddingSet

ROOT = Path(__file__).resolve().parents[2]
SMALL = scale.Case(terabytes=0.1, tables=40, gpus=16, batch=64)


@pytest.mark.parametrize("terabytes", [1, 10, 100])
def test_models_have_the_size_they_say_and_sizes_of_all_orders(terabytes: float) -> None:
    case = replace(SMALL, terabytes=terabytes, tables=1000)
    rows, ids = scale.fields(case)
    assert len(rows) == 250 and 4 * sum(scale.WIDTHS) * rows.sum() == pytest.approx(terabytes * 1e12, rel=0.01)
    assert rows.max() > 1000 * np.median(rows) / 30 and rows.max() > 0.05 * rows.sum()
    assert 0.6 < np.mean(ids == 1) < 0.9 and 20 <= ids.max() < 100
    assert all((a == b).all() for a, b in zip(scale.fields(case), scale.fields(case), strict=True))


def test_figures_follow_by_hand() -> None:
    """Whole tables: bytes are rows x width x 4 and 4 of state a row; every example's vector is sent out and back."""
    features, pooling = scale.features(SMALL)
    sets = [EmbeddingSet(f"set{i}", width) for i, width in enumerate(scale.WIDTHS)]
    model = MultiEmbedding(features, sets, device=torch.device("meta"))
    attach_table_optimizer(model, kind="rowwise_adagrad", lr=0.1, eps=1e-8)
    cluster = cluster_of("h100x8", 2)
    prediction = plan_for(model, cluster, kind="table_wise", batch_size=64).prediction
    rows = sum(f.num_rows for f in features.ids)
    assert sum(r.hbm["tables"] for r in prediction.ranks) == rows * (32 + 64 + 64 + 128) * 4
    assert sum(r.hbm["optimizer"] for r in prediction.ranks) == rows * 4 * 4
    vectors = 64 * 16 * len(features.ids) * (32 + 64 + 64 + 128) * 4
    assert sum(t.sent["output_all_to_all"] for t in prediction.tables) == vectors
    ids = 64 * 16 * len(features.ids) * 4 * (4 + 4)  # one int32 id and one length for each of four sets
    assert sum(t.sent["input_all_to_all"] for t in prediction.tables) == ids
    # 50 GB/s a process between machines, and one small all-to-all of 0.05 ms
    assert sum(r.ms["output_all_to_all"] for r in prediction.ranks) == pytest.approx(vectors / 50e9 * 1e3 + 16 * 0.05)


def test_the_run_file_is_the_same_model() -> None:
    config = resolve_config(parse_yaml(to_yaml(scale.run_file(SMALL)), "scale.yaml"))
    _, planned = plan_model(config, cluster_of("h100x8", 2))
    features, pooling = scale.features(SMALL)
    shown = {(t.field, t.dim): t for t in planned.prediction.tables}
    assert len(planned.prediction.tables) == 40 and planned.prediction.batch_size == 64
    assert [shown[f.name, 128].rows for f in features.ids] == [f.num_rows for f in features.ids]
    tables, _ = read_tables(
        plan_model(config, cluster_of("h100x8", 2))[0], config.sharding.rules(), cluster_of("h100x8")
    )
    assert {t.name.split("__")[1]: t.ids for t in tables} == pooling
    assert not any("lists taken for one id" in note for note in planned.prediction.notes)


def test_a_case_is_solved_or_said_to_be_too_large() -> None:
    fits = scale.solve(SMALL)
    assert fits.total_ms > 0 and sum(fits.types.values()) == 40 and fits.peak_bytes > 1e8
    assert fits.examples_per_second == pytest.approx(16 * 64 / fits.total_ms * 1e3)
    large = scale.solve(replace(SMALL, terabytes=1.2))
    assert not large.ms and "too little" in large.missing and large.remedies
    text = scale.markdown([fits, large])
    row, other = text.splitlines()[2:4]
    part = max(fits.ms, key=fits.ms.__getitem__).replace("_", " ").split(" ")[0]
    assert row.startswith("| 0.1 TB | 40 | 16 |") and part in row and f"{fits.total_ms:.1f}" in row
    assert "no plan: " in other and large.remedies[0][0] in text and row.count("|") == other.count("|")


@pytest.mark.slow
def test_the_whole_script(tmp_path) -> None:
    options = ["--sizes", "0.1", "--tables", "40", "--gpus", "16", "--batch", "64", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, scale.__file__, *options], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "scale.json").read_text())
    assert [r["case"]["terabytes"] for r in results] == [0.1] and set(results[0]["ms"]) == set(PARTS)
    assert (tmp_path / "scale.png").stat().st_size > 10_000 and "| 0.1 TB | 40 | 16 |" in done.stdout
