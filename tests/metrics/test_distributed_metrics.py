"""Ranks that saw parts of the data say what one process says that saw all of it."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hmoe_rec.metrics import TaskMetrics

TASKS = ["click", "like"]
NUM_BINS = 128  # few enough that classes overlap in some bins, many enough that they do not in others


def draw(seed: int, num_examples: int):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_examples, 2, generator=g)
    logits[:, 1] = logits[:, 1].mul(4).round() / 4  # ties within and between the ranks
    labels = (torch.rand(num_examples, 2, generator=g) < logits.sigmoid()).float()
    labels[torch.rand(num_examples, 2, generator=g) < 0.2] = torch.nan
    groups = torch.randint(0, 23, (num_examples,), generator=g)  # users meet on both ranks
    return logits, labels, torch.rand(num_examples, generator=g), groups


BATCHES = [draw(1, 101), draw(2, 58), draw(3, 0)]
SHARES = {2: ([0], [1, 2]), 3: ([0, 1], [], [2])}  # world size -> the batches of each rank; one rank never updates


def measured(indices) -> TaskMetrics:
    metrics = TaskMetrics(TASKS, num_bins=NUM_BINS)
    for index in indices:
        metrics.update(*BATCHES[index])
    return metrics


def run_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        metrics = measured(SHARES[world_size][rank])
        resumed = TaskMetrics(TASKS, num_bins=NUM_BINS)
        resumed.load_reduced_state_dict(metrics.reduced_state_dict())
        found = {
            "computed": metrics.compute(),
            "again": metrics.compute(dist.group.WORLD),
            "resumed": resumed.compute(),
            "empty": TaskMetrics(TASKS, num_bins=NUM_BINS).compute(),
            "state": metrics.reduced_state_dict(),
        }
        torch.save(found, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_agree_with_one_process(world_size, tmp_path):
    mp.spawn(run_rank, (world_size, str(tmp_path)), nprocs=world_size)
    whole = measured(range(len(BATCHES)))
    expected = whole.compute()
    for rank in range(world_size):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for task in TASKS:
            assert found["computed"][task] == pytest.approx(expected[task], rel=1e-12, abs=1e-12)
            resumed = {name: value for name, value in expected[task].items() if not name.startswith("gauc")}
            assert found["resumed"][task] == pytest.approx(
                resumed | {"gauc": math.nan, "gauc_users": 0}, rel=1e-12, abs=1e-12, nan_ok=True
            )
            assert found["empty"][task]["examples"] == 0 and math.isnan(found["empty"][task]["gauc"])
        assert found["again"] == found["computed"]
        other_size = TaskMetrics(TASKS, num_bins=NUM_BINS)  # saved by these ranks, read by one process
        other_size.load_reduced_state_dict(found["state"])
        assert other_size.compute()["click"]["auc"] == pytest.approx(expected["click"]["auc"], abs=1e-12)
