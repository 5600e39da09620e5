"""A run that follows the small log, and what it leaves behind."""

import json
from pathlib import Path

import torch
from small_run import run_file

from hmoe_rec.config import resolve_config
from hmoe_rec.data.stream import Clock
from hmoe_rec.training.checkpoint import CheckpointManager, read_unsharded
from hmoe_rec.training.online import follow


def online_file(log: Path, run: str, follow: object = None, *, resume: bool = False, **options) -> dict:
    content = run_file(log, run, resume=resume)
    del content["train"]["epochs"]
    content["data"] = {"schema": content["data"]["schema"]}
    content["model"]["preset"] = "shared_bottom"
    content["online"] = {"follow": str(follow or log / "in"), "until_idle": 0, "poll_seconds": 0.01} | options
    return content


def followed(content: dict, clock: Clock | None = None) -> dict:
    return follow(resolve_config(content), clock)


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """All that the last checkpoint holds: model, optimizer, metrics, seen ids; not the random states of processes."""
    found = CheckpointManager(str(run / "checkpoints")).latest()
    return {k: x for k, x in read_unsharded(found).items() if not k.startswith("per_rank")}


def assert_same_state(a: Path, b: Path) -> None:
    mine, theirs = final_state(a), final_state(b)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        # Sums of metrics over two processes are rounded where a restart added them up.
        rounding = 1e-12 if key.startswith(("metrics.", "sliding.")) else 0.0
        torch.testing.assert_close(tensor, theirs[key], rtol=rounding, atol=0.0, msg=key)
