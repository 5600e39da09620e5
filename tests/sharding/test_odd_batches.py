"""Ranks that hold different numbers of examples, or none, train what one process trains, whatever the plan."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from hand_plans import BAGS, POOLED, ROWS, TABLES, hand_plan, one_kind
from tiny_model import TinyModel, apply_table_optimizer, batch_of, full, optimizer_of
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from hmoe_rec.batch import Batch
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.training.task import TrainTask

CPU = torch.device("cpu")
BY_COLUMNS = ("column_wise", "table_column_wise", "grid_shard")  # there row-wise Adagrad has a statistic per block
SIZES = (11, 13, 1, 12, 2, 7, 1)  # odd, fewer examples than ranks, one in all


class TinyOnBatch(TinyModel):
    def forward(self, batch: Batch) -> torch.Tensor:
        return super().forward(batch.sparse).unsqueeze(1)


def share_of(step: int, size: int, rank: int, world_size: int) -> Batch:
    ids, labels = batch_of(step, rank, world_size, size, TABLES)
    weights = torch.rand(size, generator=torch.Generator().manual_seed(step)) + 0.5
    weights[size // 2] = float(size == 1)  # an example of the data that has weight 0
    mine = slice(rank * size // world_size, (rank + 1) * size // world_size)
    batch = Batch.of(ids, labels.unsqueeze(1), weights=weights[mine])
    return replace(batch, share=-(-size // world_size)).filled()


def trained(rank: int, world_size: int, kind: str, rowwise: bool) -> dict[str, torch.Tensor]:
    """The losses of all steps, and at the end all parameters and the optimizer's state, whole."""
    model = TinyOnBatch(bags=BAGS, rows=ROWS)
    # Adagrad divides small gradients by their size, and with them their rounding.
    apply_table_optimizer(model, RowWiseAdagrad if rowwise else torch.optim.Adagrad, lr=0.03)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    model = shard_model(model, plan=hand_plan(model, one_kind(kind), world_size, local), device=CPU, seed=5)
    task, optimizer = TrainTask(model, ["y"], distributed=world_size > 1), optimizer_of(model)
    losses = []
    for step, size in enumerate(SIZES):
        optimizer.zero_grad()
        loss, _ = task(share_of(step, size, rank, world_size))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    total = torch.stack(losses)
    dist.all_reduce(total)
    state = dict(item for of_parameter in optimizer.state_dict()["state"].values() for item in of_parameter.items())
    parameters = {key: full(value) for key, value in model.state_dict().items()}
    return {"losses": total / world_size} | parameters | whole(state)


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Optimizer state of all ranks, each of which has that of its own shards only."""
    mine = {
        key: (value.size(), [(s.metadata.shard_offsets, s.tensor) for s in value.local_shards()])
        if isinstance(value, ShardedTensor)
        else (value.size(), [([0] * value.dim(), value)])
        for key, value in state.items()
    }
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    result: dict[str, torch.Tensor] = {}
    for key, (size, shards) in (item for one in everyone for item in one.items()):
        result.setdefault(key, torch.full(size, torch.nan))
        for offsets, values in shards:
            result[key][tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values
    return result


def all_kinds(rank: int, world_size: int, kinds: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: trained(rank, world_size, kind, kind not in BY_COLUMNS) for kind in kinds}


def references(rank: int, world_size: int) -> dict[bool, dict[str, torch.Tensor]]:
    return {rowwise: trained(rank, world_size, "table_wise", rowwise) for rowwise in (False, True)}


@pytest.fixture(scope="module")
def alone() -> dict[bool, dict[str, torch.Tensor]]:
    return run_ranks(1, references)[0]


def check(alone: dict, world_size: int, local: int, kinds: tuple[str, ...] = POOLED) -> None:
    for found in run_ranks(world_size, all_kinds, kinds, local_world_size=local):
        for kind, result in found.items():
            wanted = alone[kind not in BY_COLUMNS]
            assert result.keys() == wanted.keys()
            for name, value in wanted.items():
                apart = (result[name].view_as(value) - value).abs().max().item()
                assert apart <= 1e-6, (kind, name, apart)


def test_two_ranks_train_what_one_process_trains(alone: dict) -> None:
    check(alone, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "local"), [(3, 3), (5, 5), (4, 2)])
def test_more_ranks_train_what_one_process_trains(alone: dict, world_size: int, local: int) -> None:
    check(alone, world_size, local)
