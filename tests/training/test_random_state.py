"""A run goes on from a CPU on a GPU and back; what of its random state cannot is said."""

import json
from pathlib import Path

import pytest
import torch
from small_run import make_log, run_file

from hmoe_rec.config import resolve_config
from hmoe_rec.training import trainer
from hmoe_rec.training.checkpoint import CheckpointManager
from hmoe_rec.training.random_state import change_of_generators, random_state, restore_random_state
from hmoe_rec.training.trainer import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    make_log(folder)
    return folder


@pytest.fixture
def gpu(monkeypatch) -> list:
    """A GPU's generator; -> what is asked of it."""
    calls: list = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.arange(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: calls.append((state.tolist(), device)))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: calls.append(seed))
    return calls


def test_each_device_restores_what_it_can(gpu):
    on_gpu, on_cpu = random_state(CUDA), random_state(CPU)
    assert (sorted(on_gpu), sorted(on_cpu)) == (["cpu", "cuda"], ["cpu"])
    expected = torch.rand(3)
    for state, device, calls in (
        (on_gpu, CUDA, [(list(range(16)), CUDA)]),
        (on_cpu, CUDA, [17]),
        (on_gpu, CPU, []),
        (on_cpu, CPU, []),
    ):
        gpu.clear()
        restore_random_state(state, device, seed=17)
        assert torch.equal(torch.rand(3), expected) and gpu == calls


def test_what_cannot_go_on_is_said():
    assert "seeded" in (change_of_generators(["cpu"], ["cpu", "cuda"]) or "")
    assert "cannot go on" in (change_of_generators(["cpu", "cuda"], ["cpu"]) or "")
    assert change_of_generators(["cpu"], ["cpu"]) is change_of_generators(["cpu", "cuda"], ["cpu", "cuda"]) is None


def with_a_gpus_generator(device: torch.device) -> dict[str, torch.Tensor]:
    return random_state(device) | {"cuda": torch.arange(16, dtype=torch.uint8)}


SAVE = CheckpointManager.save


def without_generators(manager: CheckpointManager, *args, meta: dict, **options):
    return SAVE(manager, *args, meta={key: x for key, x in meta.items() if key != "random"}, **options)


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu"), ("old", "cpu"), ("old", "cuda")])
def test_a_run_is_resumed_on_another_kind_of_device(log, monkeypatch, capsys, first, then):
    """The states that are saved are those of the device; "old": a checkpoint that does not say which it holds."""
    name, options = f"{first}-{then}", {"checkpoint_every": 4}
    if first == "cuda":
        monkeypatch.setattr(trainer, "random_state", with_a_gpus_generator)
    with monkeypatch.context() as patch:
        if first == "old":
            patch.setattr(CheckpointManager, "save", without_generators)
        train(resolve_config(run_file(log, name, max_steps=4, **options)))
    monkeypatch.setattr(trainer, "random_state", with_a_gpus_generator if then == "cuda" else random_state)
    capsys.readouterr()
    train(resolve_config(run_file(log, name, max_steps=8, resume=True, **options)))
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert "resumed at step 4" in said
    assert ("saved on a CPU" in said, "saved on a GPU" in said) == (then == "cuda", first == "cuda")
    train(resolve_config(run_file(log, f"whole-{name}", max_steps=8, **options)))
    found = [
        [json.loads(line)["losses"] for line in (log / run / "metrics.jsonl").open()] for run in (name, f"whole-{name}")
    ]
    assert found[0] == found[1], "the CPU's generator goes on, and so does all else"
