"""The pipelined loop: it runs every collection's ids ahead, and changes nothing, whatever comes between two steps."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gloo import run_ranks
from small_run import make_log, run_file
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.utils import PipelinedPostproc

from hmoe_rec.config import resolve_config
from hmoe_rec.training.loop import SparseDistLoop
from hmoe_rec.training.online import follow
from hmoe_rec.training.trainer import train

PRESETS = ("single", "shared_bottom", "mmoe", "ple", "multi_embedding", "stem", "ame", "stem_al")
TOWERS = ("bootstrap towers", "sngp towers")
FROZEN = ("frozen vectors", "frozen, data_parallel")


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    make_log(folder)
    vectors = np.random.default_rng(3).normal(size=(22, 3)).astype("f4")
    table = pa.table({"item_id": np.arange(22), "vector": pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), 3)})
    pq.write_table(table, folder / "items.parquet")
    return folder


def model_of(log: Path, kind: str, **train_options: Any) -> dict:
    """A run file of a preset, or of one of the other kinds of tables."""
    content = run_file(log, kind, pipeline="sparse_dist", max_steps=3, evaluate_every=2, **train_options)
    if kind in PRESETS:
        content["model"] |= {"preset": kind} | ({"main_task": "click"} if kind == "stem_al" else {})
        if kind == "ame":
            del content["model"]["embedding_dim"]
            content["model"]["widths"] = [4, 8]
    elif kind == "hashed ids only":
        content["data"]["schema"] = content["data"]["schema"] | {
            "ids": [{**i, "num_embeddings": 19, "mode": "hash"} for i in content["data"]["schema"]["ids"]]
        }
    elif kind == "bags only":
        content["data"]["schema"] = content["data"]["schema"] | {"sequences": []}
    elif kind in FROZEN:
        part = {"kind": "history", "vectors": "pretrained", "sequence": "history"}
        content["model"]["encoding"] = {
            "frozen_vectors": {"pretrained": {"field": "item_id", "path": str(log / "items.parquet")}},
            "similarities": {"near": part},
        }
    elif kind == "everything in the loss":
        content["train"] |= {"losses": {"click": ["bce", "pair"]}, "gradient_surgery": "pcgrad", "decorrelation": 0.1}
        content["train"]["log_negative_gradients"] = True
        content["data"]["sampling"] = {"negatives": 0.5, "correction": "logit"}
    elif kind == "bootstrap towers":
        content["model"]["tower"] = {"kind": "bootstrap", "hidden": [10], "num_heads": 3}
    elif kind == "sngp towers":
        content["model"] |= {"tower": {"kind": "sngp", "hidden": [10]}, "dropout": 0.0}
    if kind.endswith("data_parallel"):
        content["sharding"] = {"plan": "data_parallel"}
    return content


class Seen:
    """What a run's loop says of itself after every step, and in every evaluation."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.waiting: list[list[str]] = []
        self.ahead: list[int] = []
        self.left_in_evaluations: list[str] = []
        progress, evaluation_model = SparseDistLoop.progress, SparseDistLoop.evaluation_model

        def seen_progress(loop, batches):
            output = progress(loop, batches)
            self.waiting.append(loop.not_ahead())
            self.ahead.append(len(loop.pipeline._pipelined_modules))
            return output

        def seen_evaluation(loop):
            model = evaluation_model(loop)
            self.left_in_evaluations += [
                name
                for owner in model.modules()
                for name, child in owner.named_children()
                if isinstance(child, PipelinedPostproc) or "." in name
            ]
            return model

        patch.setattr(SparseDistLoop, "progress", seen_progress)
        patch.setattr(SparseDistLoop, "evaluation_model", seen_evaluation)


@pytest.mark.parametrize(
    "kind", [*PRESETS, "hashed ids only", "bags only", *FROZEN, "stem data_parallel", *TOWERS, "everything in the loss"]
)
def test_the_ids_of_every_collection_are_exchanged_ahead(log, kind, monkeypatch, caplog):
    seen = Seen(monkeypatch)
    train(resolve_config(model_of(log, kind)))
    assert seen.waiting == [[]] * 3 and min(seen.ahead) > 0
    assert not seen.left_in_evaluations, "an evaluation would look up the rows of the batch in flight"
    assert "ahead of the step" not in caplog.text


def test_what_is_not_run_ahead_is_said_once(log, monkeypatch, caplog):
    """As it was without `pipeline_postproc`."""

    def without(*args, **options):
        return TrainPipelineSparseDist(*args, **options | {"pipeline_postproc": False})

    monkeypatch.setattr("hmoe_rec.training.loop.TrainPipelineSparseDist", without)
    with caplog.at_level(logging.WARNING, logger="hmoe_rec.training.loop"):
        train(resolve_config(model_of(log, "stem")))
    lines = [r.message for r in caplog.records if "ahead of the step" in r.message]
    assert len(lines) == 1 and "model.embedding.ebc, model.embedding.ec_8 ahead of the step" in lines[0]


# -------------------------------------------------------------------------------------------------- between two steps

PLANS = ("auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard", "data_parallel")


def busy(log: Path, plan: str, pipeline: str, **options: Any) -> dict:
    """Odd batches, 20 an epoch; evaluated, saved, measured and published in between, at steps of each their own."""
    content = run_file(log, f"{plan}-{pipeline}", pipeline=pipeline, max_steps=16, evaluate_every=3)
    content["train"] |= {"global_batch_size": 101, "checkpoint_every": 4, "monitor": {"collapse_every": 5}}
    content["train"] |= {"publish": {"to": str(log / f"published-{plan}-{pipeline}"), "every": 7}} | options
    content["sharding"] = {"plan": plan}
    return content


def train_all(rank: int, world_size: int, contents: list[dict]) -> None:
    for content in contents:
        train(resolve_config(content))


def written(log: Path, run: str) -> list[dict]:
    lines = [json.loads(x) for n in ("metrics", "evaluations") for x in (log / run / f"{n}.jsonl").open()]
    return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines]


@pytest.mark.parametrize(("plans", "steps"), [(PLANS[2:3], 7), pytest.param(PLANS, 22, marks=pytest.mark.slow)])
def test_two_processes_that_evaluate_in_between_equal_the_plain_loop(log, plans, steps):
    ways = [(plan, pipeline) for plan in plans for pipeline in ("plain", "sparse_dist")]
    contents = [busy(log, plan, pipeline, max_steps=steps) for plan, pipeline in ways]
    run_ranks(2, train_all, contents, timeout=600)
    for plan in plans:
        plain, piped = written(log, f"{plan}-plain"), written(log, f"{plan}-sparse_dist")
        assert len(plain) > steps and piped == plain, plan
        reports = [json.loads((log / f"{plan}-{p}" / "report.json").read_text()) for p in ("plain", "sparse_dist")]
        assert reports[0]["test"] == reports[1]["test"], plan


@pytest.mark.slow
def test_two_processes_resume_from_a_checkpoint_with_a_batch_in_flight(log):
    contents = [busy(log, "row_wise", "sparse_dist", run_dir=str(log / name)) for name in ("whole", "parts", "parts")]
    contents[1]["train"]["max_steps"] = 8
    contents[2]["train"]["resume"] = True
    run_ranks(2, train_all, contents, timeout=600)
    found = [[x for x in written(log, name) if "loss" in x] for name in ("whole", "parts")]
    assert [x["losses"] for x in found[0]] == [x["losses"] for x in found[1]]


def follow_all(rank: int, world_size: int, contents: list[dict]) -> None:
    for content in contents:
        follow(resolve_config(content))


@pytest.mark.slow
def test_two_processes_that_follow_equal_the_plain_loop(log):
    """Windows of three batches and of one; each is evaluated before it is trained on."""
    rows = pq.read_table(log / "train.parquet")
    (log / "in").mkdir()
    for i, (first, count) in enumerate([(0, 480), (480, 160), (640, 480), (1120, 160), (1280, 320)]):
        pq.write_table(rows.slice(first, count), log / "in" / f"part-{i}.parquet", row_group_size=80)
    contents = []
    for pipeline in ("plain", "sparse_dist"):
        content = run_file(log, f"follow-{pipeline}", pipeline=pipeline)
        del content["train"]["epochs"]
        content["data"] = {"schema": content["data"]["schema"]}
        content["online"] = {"follow": str(log / "in"), "until_idle": 0, "poll_seconds": 0.01}
        content["sharding"] = {"plan": "row_wise"}
        contents.append(content)
    run_ranks(2, follow_all, contents, timeout=600)
    timed = ("examples_per_second", "seconds_waited", "lag")
    found = [
        [{k: v for k, v in json.loads(x).items() if k not in timed} for x in (log / run / "metrics.jsonl").open()]
        for run in ("follow-plain", "follow-sparse_dist")
    ]
    assert len(found[0]) == 5 and found[0] == found[1]
