"""Tables that every process holds whole (data_parallel): the tables' optimizer for them, and their right lookup.

TorchRec leaves two things to others. Its fused optimizers do not know replicated tables: whoever steps the dense part
would step them too, by other rules. And its dense kernel for sequences sums what it should not on CPU. Both are made
right here, so that a table trains to the same numbers whether it is replicated or sharded.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbedding
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.sharding.constraints import REPLICATED
from hmoe_rec.sharding.plan_file import collections_of
from hmoe_rec.types import PlanError

OPTIMIZERS = ("SGD", "Adagrad", "RowWiseAdagrad")
_MARK = "_hmoe_update"  # attribute of a replicated table's parameter: its Update


class ReplicatedTables(KeyedOptimizer):
    r"""FBGEMM's fused optimizers written out for dense gradients, which DDP has averaged: names and state are theirs.

    With gradient g of a row of D values, learning rate :math:`\eta`, all element by element::

        SGD             w -= lr g
        Adagrad         m += g^2              w -= lr g / (sqrt(m) + eps)
        RowWiseAdagrad  m += sum(g^2) / D     w -= lr g / (sqrt(m) + eps)      one m per row

    A row without ids has g = 0 and stays as it is, as under the fused kernels.

    Args:
        tables: "path.TABLE.weight" -> parameter [rows, D].
        kind: class name of the optimizer that was applied to them.
    """

    def __init__(self, tables: Mapping[str, Tensor], *, kind: str, lr: float, eps: float) -> None:
        state: dict[Tensor, dict[str, Tensor]] = {p: {} for p in tables.values()}
        for key, p in tables.items():
            if kind != "SGD":
                shape = p.shape[:1] if kind == "RowWiseAdagrad" else p.shape
                state[p][f"{key.split('.')[-2]}.momentum1"] = torch.zeros(shape, device=p.device)
        self.kind = kind
        super().__init__(tables, state, [{"params": list(tables.values()), "lr": lr, "eps": eps}])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.params.values():
            p.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                step = p.grad
                for moment in self.state[p].values():
                    moment += step.square().mean(1) if self.kind == "RowWiseAdagrad" else step.square()
                    scale = moment.sqrt() + group["eps"]
                    step = step / (scale[:, None] if scale.dim() == 1 else scale)
                p.sub_(step, alpha=group["lr"])


def table_optimizer(sharded: nn.Module) -> KeyedOptimizer:
    """The one optimizer of all tables of a model from `shard_model`: fused kernels and replicated tables.

    Its state has the same names whatever the plan. Learning rates are set in its `param_groups`; the fused kernels take
    theirs at `zero_grad()` or `step()`.
    """
    parts: list[Any] = [sharded.fused_optimizer]
    by_update: dict[tuple[str, float, float], dict[str, Tensor]] = {}
    for key, parameter in replicated_tables(sharded).items():
        by_update.setdefault(getattr(parameter, _MARK), {})[key] = parameter
    parts += [ReplicatedTables(tables, kind=kind, lr=lr, eps=eps) for (kind, lr, eps), tables in by_update.items()]
    return CombinedOptimizer(parts) if len(parts) > 1 else parts[0]


def replicated_tables(sharded: nn.Module) -> dict[str, nn.Parameter]:
    return {key: p for key, p in sharded.named_parameters() if hasattr(p, _MARK)}


def dense_parameters(sharded: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that is no table, of a model from `shard_model`: for an ordinary optimizer."""
    others = in_backward_optimizer_filter(sharded.named_parameters())
    return {key: p for key, p in others if not hasattr(p, _MARK)}


def updates_of(module: nn.Module, plan: ShardingPlan) -> dict[str, tuple[str, float, float]]:
    """Parameter of a table that the plan replicates -> (optimizer, lr, eps) that was applied to it.

    Raises:
        PlanError: an optimizer, or an option of it, that is not written out in `ReplicatedTables`.
    """
    result = {}
    for path, collection in collections_of(module).items():
        kinds = plan.plan[path]
        for name, parameter in collection.named_parameters():
            marks: Any = parameter  # TorchRec hangs the optimizer on it
            if kinds[name.split(".")[-2]].sharding_type != REPLICATED:  # type: ignore[index]
                continue
            kind, options = marks._optimizer_classes[0].__name__, marks._optimizer_kwargs[0]
            unknown = sorted(options.keys() - {"lr", "eps"})
            if kind not in OPTIMIZERS or unknown:
                what = f"its {unknown[0]}" if kind in OPTIMIZERS else kind
                raise PlanError(
                    f"{path}.{name}: data_parallel tables are stepped by our own {', '.join(OPTIMIZERS)} with lr and "
                    f"eps, which does not know {what}; shard the table otherwise (table_wise)"
                )
            # FBGEMM's defaults, not those of the classes, whose step is never called.
            result[f"{path}.{name}" if path else name] = (kind, options.get("lr", 0.01), options.get("eps", 1e-8))
    return result


def mark(sharded: nn.Module, updates: Mapping[str, tuple[str, float, float]]) -> None:
    parameters = dict(sharded.named_parameters())
    for key, update in updates.items():
        setattr(parameters[key], _MARK, update)


def look_up_sequences(sharded: nn.Module) -> None:
    """Replicated tables of sequences are looked up by torch's own embedding.

    FBGEMM's dense kernel on CPU ignores PoolingMode.NONE: it sums ids of a bag and writes out of bounds (1.8).
    """
    for module in sharded.modules():
        lookups: Any = module._lookups if isinstance(module, ShardedEmbeddingCollection) else ()
        for lookup in lookups:
            for kernel in getattr(lookup, "module", lookup)._emb_modules:  # the module of DDP
                if isinstance(kernel, BatchedDenseEmbedding):
                    kernel.forward = partial(_rows, kernel)


def _rows(kernel: BatchedDenseEmbedding, features: KeyedJaggedTensor) -> Tensor:
    """[number of ids, D], feature after feature."""
    sizes = list(zip(kernel._local_rows, kernel._local_cols, strict=True))
    flat = kernel.emb_module.weights.split([rows * columns for rows, columns in sizes])
    tables = [weights.view(size) for weights, size in zip(flat, sizes, strict=True)]
    ids = features.values().split(features.length_per_key())
    return torch.cat([F.embedding(i, tables[t]) for i, t in zip(ids, kernel._feature_table_map, strict=True)])
