"""The model and its loss as one module: Batch in, (loss, what the log needs) out. The servable model stays apart."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hmoe_rec.batch import Batch
from hmoe_rec.losses.base import Loss
from hmoe_rec.losses.decorrelation import Decorrelation
from hmoe_rec.losses.exposure import ExposureWeights, loss_weights
from hmoe_rec.losses.surgery import PCGrad
from hmoe_rec.losses.weighting import FixedWeighting, TaskWeighting
from hmoe_rec.model import HMoE
from hmoe_rec.towers.bootstrap import BootstrapTowers
from hmoe_rec.training.objective import HeadsObjective, Objective

ExtraName = tuple[str, str]  # (what, of which task or loss); ("conflicts", "") has no second part


class StepOutput(NamedTuple):
    """Detached: cross-entropy [T] in nats per example, logits [B, T], labels [B, T], weights [B], groups [B].

    Where a batch has offsets (rows that were sampled), the logits have them too: they are those of the rows that are
    seen. Evaluation and prediction read all rows, without offsets.

    extras_X: of a training step, named by `TrainTask.extra_names`; their mean over ranks is the global batch's.
    """

    losses_T: Tensor
    logits_BT: Tensor
    labels_BT: Tensor
    weights_B: Tensor
    groups_B: Tensor
    extras_X: Tensor


class Outputs(NamedTuple):
    """
    Attributes:
        levels_BT2: the two logits of every task, if a loss reads them: logits_BT is their difference.
        h_EBH: the experts' outputs, where they are wanted.
        cut_EBH: a leaf with the same values, which the logits are a function of.
        heads_BTK: the logits of every head of bootstrap towers in training: logits_BT is their mean.
    """

    logits_BT: Tensor
    levels_BT2: Tensor | None = None
    h_EBH: Tensor | None = None
    cut_EBH: Tensor | None = None
    heads_BTK: Tensor | None = None

    def shifted(self, offsets_BT: Tensor) -> "Outputs":
        """With offsets added to the logits, of two logits to that of class 1, of heads to each."""
        if self.heads_BTK is not None:
            heads_BTK = self.heads_BTK + offsets_BT.unsqueeze(2)
            return self._replace(logits_BT=heads_BTK.mean(2), heads_BTK=heads_BTK)
        levels_BT2 = self.levels_BT2
        if levels_BT2 is not None:
            levels_BT2 = levels_BT2 + torch.stack([torch.zeros_like(offsets_BT), offsets_BT], -1)
            return self._replace(logits_BT=levels_BT2[..., 1] - levels_BT2[..., 0], levels_BT2=levels_BT2)
        return self._replace(logits_BT=self.logits_BT + offsets_BT)


class NegativeGradients(nn.Module):
    """Mean absolute gradient of a task's loss by the logits of negatives: what rare positives take away from them."""

    def __init__(self, distributed: bool) -> None:
        super().__init__()
        self.distributed = distributed

    def forward(self, losses_T: Tensor, outputs: Outputs, batch: Batch) -> Tensor:
        """[T]; before task weights. Of two logits it is the gradient by that of class 1; of heads, summed over them."""
        if outputs.heads_BTK is not None:
            (gradient,) = torch.autograd.grad(losses_T.sum(), outputs.heads_BTK, retain_graph=True)
            gradient_BT = gradient.sum(2)
        else:
            by = outputs.logits_BT if outputs.levels_BT2 is None else outputs.levels_BT2
            (gradient,) = torch.autograd.grad(losses_T.sum(), by, retain_graph=True)
            gradient_BT = gradient if outputs.levels_BT2 is None else gradient[..., 1]
        negative_BT = (batch.labels == 0) & (batch.weights > 0).unsqueeze(1)
        number_T = negative_BT.sum(0).to(gradient_BT.dtype)
        if self.distributed:
            dist.all_reduce(number_T)  # a rank's gradient is W times that of the mean over ranks
        return (gradient_BT.abs() * negative_BT).sum(0) / number_T.clamp(min=1)


class TrainTask(nn.Module):
    """(what is minimized, StepOutput).

    Args:
        model: Batch -> logits [B, T].
        tasks: names, in the order of the logits.
        losses: task -> what is added up; a missing task has binary cross-entropy.
        weighting: how the tasks' losses are added; None = as they are.
        precision: "fp32", or "bf16": matmuls of the dense part under autocast; tables, loss and optimizer stay fp32.
        distributed: several processes.
        decorrelation: weight of the penalty on correlated outputs of different experts; needs an `HMoE`.
        surgery: "none", or "pcgrad": conflicting gradients of tasks are projected (`PCGrad`); needs an `HMoE`.
        log_negative_gradients: adds `NegativeGradients` to the extras.
        exposure: weights of positives by earlier exposures, for batches that have them; of the loss, not of metrics.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[str],
        *,
        losses: Mapping[str, Sequence[Loss]] | None = None,
        weighting: TaskWeighting | None = None,
        precision: str = "fp32",
        device_type: str = "cpu",
        distributed: bool = False,
        decorrelation: float = 0.0,
        surgery: str = "none",
        log_negative_gradients: bool = False,
        exposure: ExposureWeights | None = None,
    ) -> None:
        super().__init__()
        self.model, self.exposure = model, exposure
        towers = model.towers if isinstance(model, HMoE) else None
        self.has_heads = isinstance(towers, BootstrapTowers)
        if isinstance(towers, BootstrapTowers):
            self.objective = HeadsObjective(tasks, losses or {}, distributed, towers)
        else:
            self.objective = Objective(tasks, losses or {}, distributed)
        self.weighting = weighting or FixedWeighting([1.0] * len(tasks), distributed)
        self.two_logits = any(loss.two_logits for of_task in (losses or {}).values() for loss in of_task)
        self.decorrelation_weight = decorrelation
        self.decorrelation = Decorrelation(distributed) if decorrelation else None
        self.surgery = PCGrad(_trains(model), distributed) if surgery == "pcgrad" else None
        self.negative_gradients = NegativeGradients(distributed) if log_negative_gradients else None
        self.bf16, self.device_type = precision == "bf16", device_type
        self.extra_names = self._extra_names(tasks)

    def forward(self, batch: Batch) -> tuple[Tensor, StepOutput]:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16):
            outputs = self._outputs(batch)
        if batch.offsets is not None:
            outputs = outputs.shifted(batch.offsets)
        logits = outputs.logits_BT if outputs.heads_BTK is None else outputs.heads_BTK
        found = self.objective(logits, outputs.levels_BT2, batch, loss_weights(batch, self.exposure))
        losses_T = self.weighting(found.losses_T, found.present_T)
        loss = losses_T.sum()
        extras = [found.terms_K]
        if self.weighting.weights() is not None:
            extras.append(self.weighting.weights())
        if self.negative_gradients is not None and self.training:
            extras.append(self.negative_gradients(found.losses_T, outputs, batch))
        if self.surgery is not None and self.training:
            merged, conflicts = self.surgery(losses_T, outputs.cut_EBH, outputs.h_EBH)
            loss = loss + merged
            extras.append(conflicts.reshape(1))
        if self.decorrelation is not None:
            assert outputs.h_EBH is not None, "a penalty on experts keeps their outputs"
            loss = loss + self.decorrelation_weight * self.decorrelation(outputs.h_EBH.float(), batch.weights)
        logits_BT = outputs.logits_BT.detach()
        groups = (batch.labels, batch.weights, batch.groups)
        return loss, StepOutput(found.bce_T.detach(), logits_BT, *groups, torch.cat(extras).detach())

    def _outputs(self, batch: Batch) -> Outputs:
        in_heads = self.has_heads and self.training
        if self.surgery is None and self.decorrelation is None and not self.two_logits and not in_heads:
            return Outputs(self.model(batch).float())
        assert isinstance(self.model, HMoE), f"experts and two logits are those of an HMoE, got {type(self.model)}"
        fields, h_EBH = self.model.represent(batch)
        cut_EBH = None
        if self.surgery is not None and self.training:
            cut_EBH = h_EBH.detach().requires_grad_()
        seen_EBH = h_EBH if cut_EBH is None else cut_EBH
        if in_heads:
            heads_BTK = self.model.heads(fields, seen_EBH).float()
            return Outputs(heads_BTK.mean(2), None, h_EBH, cut_EBH, heads_BTK)
        if not self.two_logits:
            return Outputs(self.model.classify(fields, seen_EBH).float(), None, h_EBH, cut_EBH)
        levels_BT2 = self.model.levels(fields, seen_EBH).float()
        return Outputs(levels_BT2[..., 1] - levels_BT2[..., 0], levels_BT2, h_EBH, cut_EBH)

    def _extra_names(self, tasks: Sequence[str]) -> list[ExtraName]:
        names = [("terms", name) for name in self.objective.names]
        names += [("task_weight", task) for task in tasks if self.weighting.weights() is not None]
        names += [("negative_gradient", task) for task in tasks if self.negative_gradients is not None]
        return names + ([("conflicts", "")] if self.surgery is not None else [])


def train_task_of(sharded: nn.Module) -> TrainTask:
    """The training step inside of what wraps it."""
    return next(module for module in sharded.modules() if isinstance(module, TrainTask))


def _trains(model: nn.Module) -> list[list[bool]]:
    """[task][expert] of the route table."""
    assert isinstance(model, HMoE), f"routes are those of an HMoE, got {type(model)}"
    return [[cell == "train" for cell in row] for row in model.layout.routing.cells]
