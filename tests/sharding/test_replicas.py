"""2D parallel: groups that train alone between two averagings, written out with a whole model per group."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo import run_ranks
from hand_plans import ALL_KINDS, BAGS, ROWS, TABLES, hand_plan, one_kind, shards_of
from planning import bags_model
from tiny_model import TinyModel, apply_table_optimizer, batch_of, optimizer_of
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from hmoe_rec.embedding.initialization import initialize_tables
from hmoe_rec.sharding.constraints import Constraint, Constraints
from hmoe_rec.sharding.planner import make_plan, plan_for
from hmoe_rec.sharding.replicas import Averaging, group_plan
from hmoe_rec.sharding.replicated import table_optimizer
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.sharding.topology import NAMED
from hmoe_rec.training.checkpoint import CheckpointManager, read_unsharded
from hmoe_rec.training.checkpoint_rows import StoredTensors
from hmoe_rec.training.checkpoint_state import flatten
from hmoe_rec.training.checkpoint_tools import open_checkpoint
from hmoe_rec.types import PlanError

CPU = torch.device("cpu")
STEPS, EPS = 5, 1e-3  # eps as in test_types.py
OPTIMIZERS = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}


def sharded_model(kinds: dict, optimizer: str, groups: int, seed: int = 5) -> tuple[Any, Any]:
    world_size, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    model = TinyModel(bags=BAGS, rows=ROWS)
    apply_table_optimizer(model, OPTIMIZERS[optimizer], **({} if optimizer == "sgd" else {"eps": EPS}))
    size = world_size // groups
    plan = hand_plan(model, kinds, size, min(size, local))
    model = shard_model(model, plan=plan, device=CPU, seed=seed, replicas=groups)
    return model, optimizer_of(model)


def state_of(model: Any, both: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optim": both.state_dict()}


def pieces(state: dict[str, Any]) -> dict[tuple, Tensor]:
    """(name, offsets) -> what this process holds."""
    return {
        (key, tuple(offsets)): values.detach().clone()
        for key, tensor in flatten(state).items()
        for offsets, values in (
            [(s.metadata.shard_offsets, s.tensor) for s in tensor.local_shards()]
            if isinstance(tensor, ShardedTensor)
            else [([0] * tensor.dim(), tensor)]
        )
    }


def grouped_run(
    rank: int, world_size: int, kinds: dict, optimizer: str, groups: int, every: int, folder: str
) -> tuple[list[Tensor], dict[tuple, Tensor]]:
    """This process's logits before every step, and its pieces after the last averaging; saved too."""
    model, both = sharded_model(kinds, optimizer, groups)
    averaging = Averaging(model, table_optimizer(model), every=every)
    outputs = []
    for step in range(1, STEPS + 1):
        ids, labels = batch_of(step, rank, world_size, tables=TABLES)
        both.zero_grad()
        logits = model(ids)
        F.binary_cross_entropy_with_logits(logits, labels).backward()
        both.step()
        averaging.after(step)
        outputs.append(logits.detach())
    averaging.now(STEPS)
    CheckpointManager(folder).save(STEPS, state_of(model, both))
    return outputs, pieces(state_of(model, both))


def reference_run(widths: dict[str, list[int]], optimizer: str, groups: int, every: int) -> tuple[list, dict, dict]:
    """A model per group on its part of the batch: logits of each step, tables, statistics."""
    models = [TinyModel(CPU, bags=BAGS, rows=ROWS) for _ in range(groups)]
    tables = [{n.split(".")[-2]: p for n, p in m.named_parameters() if not n.startswith("mlp")} for m in models]
    for model in models:
        initialize_tables(model, seed=5)
        model.mlp = models[0].mlp
    moments = [{t: torch.zeros_like(p) for t, p in own.items()} for own in tables]
    adam = torch.optim.Adam(models[0].mlp.parameters(), lr=0.01)
    outputs = []
    for step in range(1, STEPS + 1):
        adam.zero_grad()
        for own in tables:
            for p in own.values():
                p.grad = None
        logits = []
        for group, model in enumerate(models):
            ids, labels = batch_of(step, group, groups, tables=TABLES)
            logits.append(model(ids))
            (F.binary_cross_entropy_with_logits(logits[-1], labels) / groups).backward()  # of the mean over all
        adam.step()
        with torch.no_grad():
            for t in TABLES:
                gradients = [own[t].grad * groups for own in tables]  # of a group's own examples
                if widths[t] == ["everywhere"]:
                    gradients = [sum(gradients) / groups] * groups
                for group in range(groups):
                    m, p = moments[group][t], tables[group][t]
                    for block in range(p.shape[1]) if optimizer == "adagrad" else blocks_of(widths[t], p):
                        part = (slice(None), block if isinstance(block, slice) else slice(block, block + 1))
                        m[part] += gradients[group][part].square().mean(1, keepdim=True)
                    p -= 0.1 * (gradients[group] / (m.sqrt() + EPS) if optimizer != "sgd" else gradients[group])
                if step % every == 0 or step == STEPS:
                    for values in (tables, moments):
                        mean = sum(own[t].detach() for own in values) / groups
                        for own in values:
                            own[t].copy_(mean)
        outputs.append(torch.cat(logits).detach())
    return outputs, {t: p.detach() for t, p in tables[0].items()}, moments[0]


def blocks_of(widths: list, p: Tensor) -> list[slice]:
    widths = [p.shape[1]] if widths == ["everywhere"] else widths
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def widths_of(kinds: dict[str, str], size: int, local: int) -> dict[str, list]:
    cuts = {table: shards_of(table, kind, size, local) for table, kind in kinds.items()}
    return {t: [w for _, w in sorted({(at[1], n[1]) for _, at, n in cut})] or ["everywhere"] for t, cut in cuts.items()}


def check(kinds: dict, optimizer: str, every: int, folder: str, world_size: int = 4, groups: int = 2) -> None:
    local = world_size // groups
    ranks = run_ranks(world_size, grouped_run, kinds, optimizer, groups, every, folder, local_world_size=local)
    widths = widths_of(kinds, local, local)
    wanted, tables, moments = reference_run(widths, optimizer, groups, every)
    for step in range(STEPS):
        torch.testing.assert_close(torch.cat([r[0][step] for r in ranks]), wanted[step], rtol=1e-4, atol=2e-6)
    for group in range(1, groups):  # the same bits everywhere, statistics included
        for i in range(local):
            first, other = ranks[i][1], ranks[group * local + i][1]
            assert first.keys() == other.keys() and all(torch.equal(first[k], other[k]) for k in first)
    whole = read_unsharded(open_checkpoint(folder))
    for name, table in StoredTensors(open_checkpoint(folder)).tables().items():
        torch.testing.assert_close(whole[table.key], tables[name], rtol=1e-4, atol=2e-5, msg=f"{name} {optimizer}")
        if optimizer == "rowwise_adagrad":
            found = whole[table.states["momentum1"]].view(len(table.blocks), table.rows)
            columns = [block.start for block in blocks_of(widths[name], tables[name])]
            torch.testing.assert_close(found, moments[name].t()[columns], rtol=1e-4, atol=1e-7)


def test_groups_train_alone_and_are_averaged(tmp_path: Path) -> None:
    """Two groups of two processes, every kind of sharding at once, replicated tables among them."""
    check(ALL_KINDS, "rowwise_adagrad", 2, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "every"), [("rowwise_adagrad", 1), ("adagrad", 3), ("sgd", 2)])
def test_other_optimizers_and_intervals(tmp_path: Path, optimizer: str, every: int) -> None:
    check(one_kind("row_wise"), optimizer, every, str(tmp_path))


def load(rank: int, world_size: int, folder: str, groups: int) -> list[str]:
    """Names whose bits are not the checkpoint's."""
    model, both = sharded_model(one_kind("row_wise"), "sgd", groups, seed=9)
    found = open_checkpoint(folder)
    whole, state = read_unsharded(found), state_of(model, both)
    CheckpointManager(folder).load_into(state, found)
    return [
        key
        for (key, offsets), values in pieces(state).items()
        if not torch.equal(
            values, whole[key][tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))]
        )
    ]


@pytest.mark.slow
def test_sgd_averaged_at_every_step_is_one_process_and_its_checkpoint_is_anybodys(tmp_path: Path) -> None:
    kinds, folder = one_kind("table_wise"), str(tmp_path)
    ranks = run_ranks(4, grouped_run, kinds, "sgd", 2, 1, folder, local_world_size=4)
    wanted, tables, _ = reference_run(widths_of(kinds, 1, 1), "sgd", 1, 1)
    for step in range(STEPS):
        torch.testing.assert_close(torch.cat([r[0][step] for r in ranks]), wanted[step], rtol=1e-4, atol=2e-6)
    stored = StoredTensors(open_checkpoint(folder))
    whole = read_unsharded(open_checkpoint(folder))
    for name, table in stored.tables().items():
        torch.testing.assert_close(whole[table.key], tables[name], rtol=1e-4, atol=2e-6)
        assert len(stored.forms[table.key].chunks) == 1, "written once"
    assert run_ranks(1, load, folder, 1) == [[]]
    assert run_ranks(2, load, folder, 2) == [[]] * 2


# What cannot be.


def plans_here(rank: int, world_size: int) -> tuple[list[int], list[str]]:
    """Ranks of this group's plan, and messages of what is refused."""
    model = TinyModel(bags=BAGS, rows=ROWS)
    apply_table_optimizer(model)

    def plan(replicas: int):
        return make_plan(
            model, kind="auto", world_size=2, local_world_size=2, device_type="cpu", replicas=replicas, seconds=5
        )

    cached = plan(2)
    cached.plan["ebc"]["b"].compute_kernel = "fused_uvm_caching"
    messages = []
    for attempt in (
        lambda: shard_model(model, plan=hand_plan(model, one_kind("row_wise"), 2, 2), device=CPU, replicas=2),
        lambda: group_plan(cached, 1, CPU),
        lambda: plan(3),
        lambda: shard_model(model, plan=cached, device=CPU, replicas=3),
    ):
        with pytest.raises(PlanError) as error:
            attempt()
        messages.append(str(error.value))
    ranks = {r for tables in group_plan(plan(2), 1, CPU).plan.values() for p in tables.values() for r in p.ranks}
    return sorted(ranks), messages


def test_each_group_has_its_ranks_and_what_does_not_fit_is_refused() -> None:
    for rank, (ranks, messages) in enumerate(run_ranks(2, plans_here)):
        assert ranks == [rank]
        assert "a shard on rank 1, but ranks are 0 to 0" in messages[0]
        assert "'b': fused_uvm_caching keeps copies of rows on the device" in messages[1]
        assert messages[2].startswith("replicas: 3; expected a divisor of the 1 machines, or a number of groups")
        assert messages[3] == "replicas: 2 processes cannot be divided into 3 equal groups"


def test_plans_are_of_one_group() -> None:
    model = bags_model({"s__a": (4000, 64), "s__b": (50, 64)})
    for replicas, nodes, local in ((2, 2, 8), (4, 1, 8), (8, 1, 4)):
        planned = plan_for(model, NAMED["h100x8"].with_nodes(4), replicas=replicas)
        assert (planned.cluster.nodes, planned.cluster.ranks_per_node) == (nodes, local)
        plan = make_plan(
            model, kind="row_wise", world_size=32, local_world_size=8, device_type="cuda", replicas=replicas
        )
        assert len(plan.plan["ebc"]["s__a"].ranks) == 32 // replicas
    only = Constraints({"*": Constraint(types=("row_wise",), ranks=(0, 9))})
    with pytest.raises(PlanError, match="ranks: 9, but this cluster has ranks 0 to 7"):
        plan_for(model, NAMED["h100x8"].with_nodes(4), replicas=4, constraints=only)
