"""Managed ids on several processes: the same rows for the same global batches, sharded, saved and sharded anew."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gloo import run_ranks
from managed_ids import POLICIES, ROWS, SETS, features_of, stream
from tiny_model import full, optimizer_of
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.embedding.lookup import MultiEmbedding
from hmoe_rec.embedding.managed import ManagedIds
from hmoe_rec.embedding.row_reset import RowReset
from hmoe_rec.embedding.row_values import row_values
from hmoe_rec.sharding.planner import make_plan
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.training.checkpoint import CheckpointManager
from hmoe_rec.training.optimizer import attach_table_optimizer

CPU = torch.device("cpu")
SEED, STD = 3, 0.5
SIZE = 8  # examples of a global batch


class Model(nn.Module):
    """A pooled and an unpooled managed field in two sets, and a little of a dense part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = MultiEmbedding(features(), SETS, device=torch.device("meta"))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.out = nn.Linear(sum(2 * s.dim for s in SETS), 1)

    def forward(self, sparse: KeyedJaggedTensor) -> torch.Tensor:
        vectors = self.embedding(sparse)
        parts = [x for s in SETS for x in (vectors[s.name].pooled, vectors[s.name].behaviors["history"].sum(1))]
        return self.out(torch.cat(parts, 1)).squeeze(1)


def features():
    from dataclasses import replace

    found = features_of(POLICIES[3])
    user = replace(found.ids[0], num_embeddings=20, hashed=True, managed=replace(POLICIES[0], ways=4))
    return replace(found, ids=(user, found.ids[1]))


def part_of(step: int, rank: int, world_size: int) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """Examples have a user, an ad and one or two behaviors."""
    ids = stream(20, seed=7)[step]
    rows = range(rank * SIZE // world_size, (rank + 1) * SIZE // world_size)
    values = [
        [ids[i] % 97 for i in rows],
        [ids[i] for i in rows],
        [ids[j] for i in rows for j in range(i, i + 1 + i % 2)],
    ]
    lengths = [[1] * len(rows), [1] * len(rows), [1 + i % 2 for i in rows]]
    sparse = KeyedJaggedTensor.from_lengths_sync(
        keys=["tab", "ad", "hist_ad"],
        values=torch.tensor(sum(values, [])),
        lengths=torch.tensor(sum(lengths, []), dtype=torch.int32),
    )
    return sparse, torch.tensor([float(ids[i] % 2) for i in rows])


def build(rank: int, world_size: int, kind: str):
    model = Model()
    attach_table_optimizer(model, lr=0.1)
    plan = make_plan(model, kind=kind, world_size=world_size, local_world_size=world_size, device_type="cpu")
    sharded = shard_model(model, plan=plan, device=CPU, seed=SEED, std=STD)
    return sharded, optimizer_of(sharded)


def run(rank: int, world_size: int, kind: str, steps: range, load: str | None, save: str | None) -> dict:
    """Trains the steps after loading; -> every tensor whole."""
    sharded, optimizer = build(rank, world_size, kind)
    state = {"model": sharded.state_dict(), "optimizer": optimizer.state_dict()}
    if load is not None:
        manager = CheckpointManager(load)
        manager.load_into(state, manager.latest())
        sharded.load_state_dict(dict(state["model"]))
        optimizer.load_state_dict(state["optimizer"])
    for step in steps:
        sparse, labels = part_of(step, rank, world_size)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(sharded(sparse), labels).backward()
        optimizer.step()
    state = {"model": sharded.state_dict(), "optimizer": optimizer.state_dict()}
    if save is not None:
        CheckpointManager(save).save(steps.stop, state)
    result = {f"model.{key}": full(x) for key, x in sorted(state["model"].items())}
    for key, states in sorted(state["optimizer"]["state"].items()):
        result |= {f"optimizer.{key}.{name}": full(x) for name, x in states.items() if name != "step"}
    return result


def is_map(key: str) -> bool:
    return ".managed." in key


def assert_equal(a: dict, b: dict, only=lambda key: True) -> None:
    keys = [key for key in a if only(key)]
    assert keys and keys == [key for key in b if only(key)]
    for key in keys:
        assert torch.equal(a[key], b[key]), key


def test_one_and_two_processes_give_the_same_rows_and_resume_each_others_checkpoints(tmp_path: Path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    (whole,) = run_ranks(1, run, "row_wise", range(12), None, None)
    pair = run_ranks(2, run, "row_wise", range(12), None, None)
    assert int(whole["model.embedding.managed.totals"][0, :, 4].min()) > 3  # rows change hands in both fields
    for found in pair:
        assert_equal(whole, found, is_map)
        for key, x in whole.items():
            torch.testing.assert_close(found[key], x, rtol=1e-4, atol=1e-5)
    (start,) = run_ranks(1, run, "row_wise", range(7), None, one)
    for moved in run_ranks(2, run, "row_wise", range(7, 7), one, two):
        assert_equal(start, moved)
    (end,) = run_ranks(1, run, "table_wise", range(7, 12), two, None)
    assert_equal(whole, end)


def reset(rank: int, world_size: int, kind: str) -> tuple:
    """-> whole weights, and this process's statistics as (key, first row, values), before and after."""
    sharded, optimizer = build(rank, world_size, kind)

    def tables() -> tuple:
        states = sorted(optimizer.state_dict()["state"].items())
        local = [(key, s) for key, found in states for x in found.values() if "__" in key for s in x.local_shards()]
        weights = {key: full(x) for key, x in sharded.state_dict().items() if "__" in key}
        return weights, [(key, s.metadata.shard_offsets[0], s.tensor.clone()) for key, s in local]

    for step in range(4):
        sparse, labels = part_of(step, rank, world_size)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(sharded(sparse), labels).backward()
    before = tables()
    managed = next(m for m in sharded.modules() if isinstance(m, ManagedIds))
    RowReset(sharded, managed.tables, seed=SEED, std=STD)("ad", torch.tensor([23, 0, 12, 5]))
    return before, tables()


@pytest.mark.parametrize("kind", ["row_wise", "column_wise", pytest.param("table_wise", marks=pytest.mark.slow)])
def test_rows_are_reset_with_their_statistics_wherever_they_are(kind):
    rows = torch.tensor([0, 5, 12, 23])
    changed = set()
    for (weights, states), (new_weights, new_states) in run_ranks(2, reset, kind):
        for key, old in weights.items():
            table, new = key.split(".")[-2], new_weights[key]
            expected = old.clone()
            if "__ad" in table:
                expected[rows] = row_values(SEED, table, rows, range(old.shape[1]), std=STD)
            assert torch.equal(new, expected)
        for (key, first, old), (_, _, new) in zip(states, new_states, strict=True):
            place = (torch.arange(len(old)) + first) % (ROWS + 3)
            expected = old.masked_fill(torch.isin(place, rows), 0.0) if "__ad" in key else old
            assert torch.equal(new, expected)
            changed |= {key.split(".")[-2]} if not torch.equal(old, new) else set()
    assert changed == {"a__ad", "b__ad"}
