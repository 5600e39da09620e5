"""Every way to shard a table that TorchRec knows and a fused optimizer can train gives the model of one process.

The reference is one process without TorchRec's sharding: dense gradients, and the optimizers written out.
"""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gloo import run_ranks
from hand_plans import ALL_KINDS, BAGS, POOLED, ROWS, TABLES, hand_plan, one_kind, shards_of
from tiny_model import TinyModel, apply_table_optimizer, batch_of, full, optimizer_of
from torch import Tensor
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from hmoe_rec.embedding.initialization import initialize_tables
from hmoe_rec.sharding.shard import shard_model

CPU = torch.device("cpu")
STEPS = 4
EPS = 1e-3  # large: where a gradient is nearly 0, a small one turns rounding errors into steps of full length
OPTIMIZERS = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}


def sharded_runs(rank: int, world_size: int, runs: list[tuple[dict, str]]) -> list[tuple]:
    return [sharded_run(rank, world_size, kinds, optimizer) for kinds, optimizer in runs]


def sharded_run(rank: int, world_size: int, kinds: dict, optimizer: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """This process's logits before every step, and the whole state after the last."""
    model = TinyModel(bags=BAGS, rows=ROWS)
    apply_table_optimizer(model, OPTIMIZERS[optimizer], **({} if optimizer == "sgd" else {"eps": EPS}))
    plan = hand_plan(model, kinds, world_size, int(os.environ["LOCAL_WORLD_SIZE"]))
    model = shard_model(model, plan=plan, device=CPU, seed=5)
    both = optimizer_of(model)
    outputs = []
    for step in range(STEPS):
        ids, labels = batch_of(step, rank, world_size, tables=TABLES)
        both.zero_grad()
        logits = model(ids)
        F.binary_cross_entropy_with_logits(logits, labels).backward()
        both.step()
        outputs.append(logits.detach())
    return outputs, {key: full(value) for key, value in model.state_dict().items()}


def reference_run(widths: dict[str, list[int]], optimizer: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """widths: table -> widths of its column blocks: row-wise Adagrad has a statistic for each of them."""
    model = TinyModel(CPU, bags=BAGS, rows=ROWS)
    initialize_tables(model, seed=5)
    tables = {name.split(".")[-2]: p for name, p in model.named_parameters() if not name.startswith("mlp")}
    moments = {t: torch.zeros_like(p) for t, p in tables.items()}
    adam = torch.optim.Adam(model.mlp.parameters(), lr=0.01)
    outputs = []
    for step in range(STEPS):
        ids, labels = batch_of(step, 0, 1, tables=TABLES)
        model.zero_grad()
        logits = model(ids)
        F.binary_cross_entropy_with_logits(logits, labels).backward()
        adam.step()
        with torch.no_grad():
            for t, p in tables.items():
                step_of_table(p, p.grad, moments[t], widths[t], optimizer)
        outputs.append(logits.detach())
    return outputs, model.state_dict()


def step_of_table(p: Tensor, gradient: Tensor, moment: Tensor, widths: list[int], optimizer: str) -> None:
    if optimizer == "sgd":
        p -= 0.1 * gradient
        return
    if optimizer == "adagrad":
        moment += gradient.square()
    else:
        for m, g in zip(moment.split(widths, 1), gradient.split(widths, 1), strict=True):
            m += g.square().mean(1, keepdim=True)
    p -= 0.1 * gradient / (moment.sqrt() + EPS)


def check(runs: list[tuple[dict[str, str], str]], world_size: int, local: int) -> None:
    """runs: (table -> kind, optimizer)."""
    ranks: list[Any] = run_ranks(world_size, sharded_runs, runs, local_world_size=local)
    for number, (kinds, optimizer) in enumerate(runs):
        wanted, state = reference_run(widths_of(kinds, world_size, local), optimizer)
        for step in range(STEPS):
            logits = torch.cat([results[number][0][step] for results in ranks])
            torch.testing.assert_close(logits, wanted[step], rtol=1e-4, atol=2e-6)
        for key, value in state.items():
            whole = ranks[0][number][1][key]
            where = f"{kinds}, {optimizer}, {key}"
            torch.testing.assert_close(whole, value, rtol=1e-4, atol=2e-5, msg=lambda m, w=where: f"{w}: {m}")


def widths_of(kinds: dict[str, str], world_size: int, local: int) -> dict[str, list[int]]:
    cuts = {table: shards_of(table, kind, world_size, local) for table, kind in kinds.items()}
    blocks = {table: [w for _, w in sorted({(at[1], size[1]) for _, at, size in cut})] for table, cut in cuts.items()}
    return {table: widths or [TABLES[table][1]] for table, widths in blocks.items()}


def test_all_kinds_at_once_on_two_machines() -> None:
    """Each table by another kind; two machines of two processes, so that table_row_wise and grid_shard cut rows."""
    check([(ALL_KINDS, "rowwise_adagrad")], 4, 2)


@pytest.mark.slow
def test_all_kinds_at_once_with_other_optimizers() -> None:
    check([(ALL_KINDS, "adagrad"), (ALL_KINDS, "sgd")], 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "local"), [(2, 2), (2, 1), (4, 2), (4, 4)])
def test_each_kind_alone(world_size: int, local: int) -> None:
    check([(one_kind(kind), "rowwise_adagrad") for kind in POOLED], world_size, local)
