"""Replicated tables: who steps them, under which names, and what is refused. Their numbers: test_types.py."""

from typing import Any

import pytest
import torch
from hand_plans import BAGS, ROWS, hand_plan, one_kind
from tiny_model import TinyModel, apply_table_optimizer, batch_of
from torch import Tensor
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from hmoe_rec.sharding.process import process_group
from hmoe_rec.sharding.replicated import dense_parameters, replicated_tables, table_optimizer
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.training.checkpoint_state import flatten, size_of
from hmoe_rec.training.optimizer import Optimizers, Schedule
from hmoe_rec.types import PlanError

CPU = torch.device("cpu")


def sharded(kind: str, optimizer: type = RowWiseAdagrad, **options: Any):
    model = TinyModel(bags=BAGS, rows=ROWS)
    apply_table_optimizer(model, optimizer, **options)
    return shard_model(model, plan=hand_plan(model, one_kind(kind), 1, 1), device=CPU, seed=1)


@pytest.mark.parametrize("optimizer", [RowWiseAdagrad, torch.optim.Adagrad, torch.optim.SGD])
def test_state_has_the_names_and_sizes_of_every_other_plan(optimizer: type) -> None:
    def forms(kind: str) -> dict[str, tuple[int, ...]]:
        model = sharded(kind, optimizer)
        state = {"model": model.state_dict(), "optimizer": table_optimizer(model).state_dict()}
        return {key: size_of(value) for key, value in flatten(state).items()}

    with process_group("cpu"):
        assert forms("data_parallel") == forms("table_wise")


def test_the_dense_part_and_its_gradient_norm_are_without_tables() -> None:
    with process_group("cpu"):
        parts = []
        for kind in ("data_parallel", "row_wise"):
            model = sharded(kind)
            optimizers = Optimizers(model, lr=0.1, table_lr=0.2, schedule=Schedule(0, 9), clip_norm=1.0)
            _, dense = optimizers.combined.optimizers[1]
            assert set(dense_parameters(model)) == set(dense.params)
            assert len(replicated_tables(model)) == (len({**BAGS, **ROWS}) if kind == "data_parallel" else 0)
            parts.append(sorted(dense.params))
    assert parts[0] == parts[1] == ["mlp.0.bias", "mlp.0.weight", "mlp.2.bias", "mlp.2.weight"]


def test_replicated_tables_follow_the_schedule_and_forget_their_gradient() -> None:
    with process_group("cpu"):
        model = sharded("data_parallel", torch.optim.SGD)
        optimizers = Optimizers(model, lr=0.0, table_lr=0.5, schedule=Schedule(4, 9))
        for step in range(2):
            tables: dict[str, Any] = replicated_tables(model)
            optimizers.set_learning_rates(step)
            optimizers.combined.zero_grad()
            assert all(p.grad is None for p in tables.values())
            ids, labels = batch_of(step, 0, 1, tables={**BAGS, **ROWS})
            (model(ids) * labels).sum().backward()
            before = {key: p.detach().clone() for key, p in tables.items()}
            gradients: dict[str, Tensor] = {key: p.grad.clone() for key, p in tables.items()}
            optimizers.combined.step()
            for key, p in tables.items():
                wanted = before[key] - 0.5 * (step + 1) / 4 * gradients[key]
                torch.testing.assert_close(p.detach(), wanted)
            assert any(g.abs().max() > 0 for g in gradients.values())


def test_options_that_are_not_written_out_are_refused() -> None:
    message = (
        r"a.weight: data_parallel tables are stepped by our own SGD, .* which does not know its weight_decay; shard"
    )
    with process_group("cpu"), pytest.raises(PlanError, match=message):
        sharded("data_parallel", weight_decay=0.1)
