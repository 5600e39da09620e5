"""What losses add to a model's logits, so that these are the log's own: where a run begins, older runs, what is said.

A positive that weighs beta in cross-entropy makes a model learn the odds times beta. `Objective` adds ln beta to the
logits that the loss sees, and sampling its own offset, so that the model's logits stay those of the log (the identity
of case-control studies, see `hmoe_rec.data.sampling`). A run begins with logits that are lower by what is added: the
loss then sees what it would see without, and trains the same.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from hmoe_rec.config import RunConfig
from hmoe_rec.losses import LOSSES
from hmoe_rec.losses.base import Loss
from hmoe_rec.losses.pointwise import FocalLoss
from hmoe_rec.model import HMoE
from hmoe_rec.training.build import build_loss, build_losses
from hmoe_rec.training.checkpoint import Checkpoint

SAVED = "offsets of the losses"  # of a checkpoint's meta: task -> what its losses add; older ones have none


def loss_offsets(config: RunConfig) -> dict[str, float]:
    """Task -> what its losses add to the logits."""
    return dict.fromkeys(config.tasks, 0.0) | {task: _offset(losses) for task, losses in build_losses(config).items()}


def _offset(losses: Sequence[Loss]) -> float:
    """Of several weights of positives ln of their mean by the weights of the losses; 0 where none fixes the mean."""
    fixing = [loss for loss in losses if loss.fixes_mean]
    weighted = sum(loss.weight * loss.positive_weight for loss in fixing)
    return math.log(weighted / sum(loss.weight for loss in fixing)) if weighted > 0 else 0.0


def begin_at(model: nn.Module, *added: Mapping[str, float]) -> None:
    """Lowers the logits of a run that begins by what its losses and its sampling add to them."""
    tasks = dict.fromkeys(task for offsets in added for task in offsets)
    shift(model, {task: -sum(offsets.get(task, 0.0) for offsets in added) for task in tasks})


@torch.no_grad()
def shift(model: nn.Module, by: Mapping[str, float]) -> None:
    """Adds to the constant of each task's logit."""
    if any(by.values()):
        for hmoe in (m for m in model.modules() if isinstance(m, HMoE)):
            hmoe.towers.shift(by)  # type: ignore[operator]


def undo_in(model: nn.Module, checkpoint: Checkpoint) -> None:
    """After loading: makes the logits of a run whose losses added nothing those of the log, as runs have them now."""
    saved = checkpoint.meta.get("config", {}).get("train", {}).get("losses", {})
    if SAVED in checkpoint.meta or not saved:
        return
    for hmoe in (m for m in model.modules() if isinstance(m, HMoE)):
        # Losses from elsewhere are left alone: what is opened imports nothing.
        tasks: Sequence[str] = hmoe.towers.tasks  # type: ignore[assignment]
        own = {task: [part for part in saved.get(task, ()) if part["kind"] in LOSSES] for task in tasks}
        shift(hmoe, {task: -_offset([build_loss(part) for part in parts]) for task, parts in own.items()})


def probability_lines(config: RunConfig) -> Iterator[str]:
    """What a person should know of the predictions when a run begins, a line per task that is not plain."""
    for task, losses in build_losses(config).items():
        kinds = ", ".join(part["kind"] for part in config.train.losses[task])
        fixing = [loss for loss in losses if loss.fixes_mean and loss.weight > 0]
        weights = {loss.positive_weight for loss in fixing} - {1.0}
        if not fixing:
            yield (
                f"note: {kinds} of {task} compare(s) examples and says nothing of the mean: predictions of {task} are "
                "scores to rank by, no probabilities; add bce to train.losses for probabilities"
            )
        elif any(isinstance(loss, FocalLoss) and loss.gamma > 0 for loss in fixing):
            yield (
                f"note: focal with gamma above 0 has its minimum beside the probability: predictions of {task} rank, "
                "and are no probabilities (see calibration in the metrics)"
            )
        if 0.0 in weights:
            yield f"note: positives of {task} weigh nothing in {kinds} (positive_weight 0): nothing undoes that"
        elif weights:
            shown = ", ".join(f"{weight:g}" for weight in sorted(weights))
            yield f"positives of {task} weigh {shown} in the loss; predictions and metrics are of the log as it is"
