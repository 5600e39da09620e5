"""Two optimizers behind one: that of the tables (FBGEMM's, which steps in backward), torch's Adam for the rest."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from hmoe_rec.embedding.lookup import MultiEmbedding
from hmoe_rec.sharding.replicated import dense_parameters, table_optimizer

TABLE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


def attach_table_optimizer(model: nn.Module, *, kind: str = "rowwise_adagrad", lr: float, eps: float = 1e-8) -> None:
    """Marks every embedding table of the model for a fused optimizer; to be called before sharding.

    Without it TorchRec trains tables silently with SGD at 0.01.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in TABLE_OPTIMIZERS:
        raise ValueError(f"embedding_optimizer must be one of {sorted(TABLE_OPTIMIZERS)}, got {kind!r}")
    # A fresh dict: the sharder writes into it.
    options: dict[str, Any] = {"lr": lr} if kind == "sgd" else {"lr": lr, "eps": eps}
    for module in model.modules():
        if isinstance(module, MultiEmbedding):
            apply_optimizer_in_backward(TABLE_OPTIMIZERS[kind], module.parameters(), options)


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor by step: a linear warm-up, then constant, linear or cosine decay to `min_ratio`.

    A pure function of the step, so that a resumed run needs no scheduler state.

    Attributes:
        warmup_steps: 0 = none.
        total_steps: where the decay ends.
    """

    warmup_steps: int
    total_steps: int
    decay: Literal["constant", "linear", "cosine"] = "constant"
    min_ratio: float = 0.0

    def factor(self, step: int) -> float:
        """Of the step that is about to be taken, counted from 0; in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        shape = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.min_ratio + (1 - self.min_ratio) * shape


class Optimizers:
    """The combined optimizer and its schedule.

    Args:
        sharded: the model from `shard_model`.
        lr: of the dense part (Adam).
        table_lr: of the tables.
        weight_decay: decoupled, dense part only (FBGEMM's CPU kernels ignore it for tables).
        clip_norm: largest L2 norm of the gradient of the dense part, without tables whatever the plan; None = no
            clipping.
        schedule: applied to both.

    Attributes:
        combined: both as one optimizer.
        tables: that of the tables.
    """

    def __init__(
        self,
        sharded: nn.Module,
        *,
        lr: float,
        table_lr: float,
        schedule: Schedule,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        self.tables = table_optimizer(sharded)
        # Rates are set at every step; 0 here, so that making the state (a step with zero gradients) changes nothing.
        adam = KeyedOptimizerWrapper(
            dense_parameters(sharded), lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=weight_decay)
        )
        _init_state(adam)  # else a checkpoint's Adam state has no place to go and is dropped without a word
        dense: KeyedOptimizer = adam
        if clip_norm is not None:
            dense = GradientClippingOptimizer(adam, clipping=GradientClipping.NORM, max_gradient=clip_norm)
        self.combined = CombinedOptimizer([("tables", self.tables), ("dense", dense)])
        self._parts = [(self.tables, table_lr), (dense, lr)]
        self._schedule = schedule

    def set_learning_rates(self, step: int) -> float:
        """Sets both rates for the step about to be taken; returns the dense one.

        The fused kernels take theirs at zero_grad() or step(), which every loop calls.
        """
        factor = self._schedule.factor(step)
        for optimizer, rate in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        return self._parts[1][1] * factor


def _init_state(adam: KeyedOptimizer) -> None:
    """Makes Adam's moments. TorchRec does so by a real step with zero gradients, whose count is taken back here."""
    adam.init_state()
    for state in adam.state.values():
        count = state["step"]
        assert isinstance(count, torch.Tensor), "Adam counts steps in a tensor"
        count.zero_()
