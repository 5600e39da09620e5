"""Run files of every kind of part: what the lint sends over the pretended GPU."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from managed_ids import managed_file
from phases import FIRST_STEPS
from small_run import make_log, run_file

from hmoe_rec.encoding import NUMBERS, POOLINGS
from hmoe_rec.experts import EXPERTS

Content = dict[str, Any]
Edit = Callable[[Content], None]
STEPS = 6
#: What has options besides the defaults, and goes another way with them.
MORE_EXPERTS: list[Content] = [
    {"kind": "dcnv2", "rank": 4, "num_experts": 2},
    {"kind": "fwfm", "output": "pairs"},
    {"kind": "fmfm", "output": "pairs"},
    {"kind": "masknet", "parallel": False},
]
MORE_NUMBERS: list[Content] = [
    {"kind": "mnse", "resolution": 100000, "combine": "project"},
    {"kind": "mnse", "quantize": "quantile", "combine": "sum"},
]
MORE_SEQUENCES: list[Content] = [
    {"kind": "tim", "clock": "both", "projections": True, "num_heads": 2, "post_attention": "affine_dense"},
    {"kind": "tim", "clock": "position"},
    {"kind": "din", "softmax": True},
]
SIMILARITIES: dict[str, Content] = {
    "cosine": {"kind": "cosine", "of": ["graph", "pretrained"]},
    "dot": {"kind": "dot", "of": ["graph", "pretrained"], "low": -9, "high": 9},
    "history": {"kind": "history", "vectors": "pretrained", "sequence": "history"},
    "history dot": {
        "kind": "history",
        "vectors": "pretrained",
        "sequence": "history",
        "measure": "dot",
        "low": -9,
        "high": 9,
    },
    "tiers": {"kind": "tiers", "vectors": "pretrained", "sequence": "history"},
    "vector": {"kind": "vector", "of": "pretrained"},
}
LOSSES: dict[str, list] = {
    "focal": ["focal"],
    "pair": ["bce", "pair"],
    "pair within user": ["bce", {"kind": "pair", "within": "user"}],
    "pair within field": ["bce", {"kind": "pair", "within": "user_id"}],
    "list": ["bce", "list"],
    "list within user": ["bce", {"kind": "list", "within": "user"}],
    "rcr": ["bce", "rcr"],
    "jrc": ["bce", "jrc"],
    "jrc within user": ["bce", {"kind": "jrc", "within": "user"}],
}


def prepare(folder: Path) -> None:
    """The small log of the tests, and frozen vectors for its items."""
    make_log(folder)
    vectors = np.random.default_rng(3).normal(size=(22, 3)).astype("f4")
    table = pa.table({"item_id": np.arange(22), "vector": pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), 3)})
    pq.write_table(table, folder / "items.parquet")


class Variants:
    """Name -> run file, in `files`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Content] = {}
        self._structure(), self._parts(), self._training(), self._managed(), self._rest()

    def add(self, name: str, edit: Edit | None = None, **train: Any) -> None:
        content = run_file(self.folder, f"runs/{name}", **self._options(train))
        if edit is not None:
            edit(content)
        self.files[name] = content

    def _options(self, train: Content) -> Content:
        return {"max_steps": STEPS + FIRST_STEPS, "log_every": 1000, "evaluate_every": 5, "device": "cuda"} | train

    def _structure(self) -> None:
        for name in ("single", "shared_bottom", "mmoe", "ple", "multi_embedding", "stem", "ame", "stem_al"):
            self.add(f"preset {name}", _preset(name))
        for pipeline in ("base", "plain"):
            self.add(f"stem {pipeline} pipeline", pipeline=pipeline)
        for combine in ("mean", "sum", "weighted_sum", "concat"):
            self.add(f"combine {combine}", _model(combine=combine))

    def _parts(self) -> None:
        for expert in [{"kind": kind} for kind in EXPERTS] + MORE_EXPERTS:
            self.add(f"expert {_label(expert)}", _model(preset="mmoe", num_experts=2, expert=expert))
        mixed = [{"kind": kind} for kind in ("dcnv2", "gwpfm", "sequence", "cin")]
        self.add("experts mixed bf16", _model(preset="mmoe", num_experts=4, expert=mixed), precision="bf16")
        for number in [{"kind": kind} for kind in NUMBERS] + MORE_NUMBERS:
            self.add(f"numbers {_label(number)}", _model(encoding={"numbers": number}))
        self.add("numbers of two kinds", _two_groups)
        for sequence in [{"kind": kind} for kind in POOLINGS] + MORE_SEQUENCES:
            self.add(f"sequences {_label(sequence)}", _model(encoding={"sequences": sequence}))
        frozen = {"pretrained": {"field": "item_id", "path": str(self.folder / "items.parquet")}}
        for name, part in SIMILARITIES.items():
            encoding = {"frozen_vectors": frozen, "similarities": {"near": part}}
            self.add(f"similarity {name}", _model(encoding=encoding))
        self.add("tower sngp", _model(tower={"kind": "sngp", "hidden": [10, 10]}, dropout=0.0))
        self.add("tower bootstrap", _model(tower={"kind": "bootstrap", "hidden": [10], "num_heads": 3}))

    def _training(self) -> None:
        for name, parts in LOSSES.items():
            self.add(f"loss {name}", losses={"click": parts})
        self.add("loss pair bf16", losses={"click": ["bce", "pair"]}, precision="bf16")
        self.add("stem bf16", precision="bf16")
        self.add("weighting uncertainty", task_weighting="uncertainty")
        self.add("weighting dwa", task_weighting={"kind": "dwa", "every": 2})
        self.add("pcgrad", gradient_surgery="pcgrad")
        self.add("decorrelation", _model(preset="mmoe", num_experts=3), decorrelation=0.1)
        self.add("negative gradients", log_negative_gradients=True)
        self.add("tables fp16", _model(table_precision="fp16"))
        self.add("clip_norm", clip_norm=1.0)
        for optimizer in ("adagrad", "sgd"):
            self.add(f"optimizer {optimizer}", embedding_optimizer=optimizer)
        self.add("sampled weights", lambda c: c["data"].update(sampling={"negatives": 0.5}))
        self.add("sampled logit", lambda c: c["data"].update(sampling={"negatives": 0.5, "correction": "logit"}))

    def _managed(self) -> None:
        for name, evict, train in (
            ("managed lru", "lru", {}),
            ("managed lfu", "lfu", {}),
            ("managed, every step logged", "lru", {"log_every": 1}),
        ):
            self.files[name] = managed_file(self.folder, f"runs/{name}", evict, **self._options(train))

    def _rest(self) -> None:
        self.add("monitor", monitor={"collapse_every": 2})
        self.add("publish", publish={"to": str(self.folder / "runs/published"), "every": 2})
        self.add("every step logged", log_every=1)
        run_dir = str(self.folder / "runs/every step logged")
        self.add("resume", resume=True, run_dir=run_dir, max_steps=2 * (STEPS + FIRST_STEPS), log_every=1)


def _label(part: Content) -> str:
    return " ".join(str(value) for value in part.values())


def _model(**options: Any) -> Edit:
    return lambda content: content["model"].update(options)


def _preset(name: str) -> Edit:
    def edit(content: Content) -> None:
        content["model"]["preset"] = name
        if name == "stem_al":
            content["model"]["main_task"] = "click"
        if name == "ame":
            del content["model"]["embedding_dim"]
            content["model"]["widths"] = [4, 8]

    return edit


def _two_groups(content: Content) -> None:
    content["model"]["encoding"] = {"numbers": "scalar", "fields": {"time": "periodic"}}
    schema = content["data"]["schema"] = copy.deepcopy(content["data"]["schema"])
    schema["numbers"].append({"name": "time"})
