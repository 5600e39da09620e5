"""What a loss sees of one task, what it gives back, and the promise that every loss keeps."""

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Examples(NamedTuple):
    """One task's side of a batch, or of all processes' batches together. `Examples.of` makes it from raw tensors.

    Attributes:
        logits_B: before the sigmoid; 0 where the weight is 0.
        labels_B: 0 or 1; 0 where the weight is 0.
        weights_B: >= 0; 0 where the label is missing.
        groups_B: int64; examples of one user, request, ... have equal values. None = all belong together.
        levels_B2: of a tower with two logits (z_0, z_1), whose difference z_1 - z_0 is logits_B; else None.
    """

    logits_B: Tensor
    labels_B: Tensor
    weights_B: Tensor
    groups_B: Tensor | None = None
    levels_B2: Tensor | None = None

    @classmethod
    def of(
        cls,
        logits_B: Tensor,
        labels_B: Tensor,
        weights_B: Tensor | None = None,
        groups_B: Tensor | None = None,
        levels_B2: Tensor | None = None,
    ) -> "Examples":
        """labels_B: 0, 1, or NaN = missing. What does not count may hold any logit, NaN too."""
        weights_B = torch.ones_like(logits_B) if weights_B is None else weights_B
        weights_B = torch.where(labels_B.isnan(), torch.zeros_like(weights_B), weights_B)
        counts_B = weights_B > 0
        zeros_B = torch.zeros_like(logits_B)
        if levels_B2 is not None:
            levels_B2 = torch.where(counts_B.unsqueeze(1), levels_B2, torch.zeros_like(levels_B2))
        return cls(
            torch.where(counts_B, logits_B, zeros_B),
            torch.where(counts_B, labels_B, torch.zeros_like(labels_B)),
            weights_B,
            groups_B,
            levels_B2,
        )


class Sums(NamedTuple):
    """A loss before its division: several processes add up both parts, then divide.

    Attributes:
        sum: with gradient.
        total: what to divide by (a weight of examples or of pairs); 0 = there is nothing to learn from, and sum is 0.
    """

    sum: Tensor
    total: Tensor


class Loss(nn.Module):
    """Examples -> Sums, in nats. All losses promise:

    * An example of weight k counts as k examples of weight 1; one of weight 0 counts nowhere.
    * Logits up to +-80 give finite values and gradients in float32.
    * Where there is nothing to learn from (no label, or one class where two are compared) value and gradient are 0.

    Args:
        weight: of this loss in the task's sum.
        positive_weight: beta, of examples with label 1 beside the others; stands for rarer positives. The logits of
            such a loss are those of the odds times beta: `offset` is what they are above those of the log. Training
            adds it to the logits that the loss sees (`Objective`), so that the model's own are those of the log.

    Attributes:
        fixes_mean: its minimum says how large the probabilities are; else only in which order, or in which ratios.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    two_logits: ClassVar[bool] = False  # reads levels_B2, so that the task's tower must have two outputs
    fixes_mean: ClassVar[bool] = True
    within: str | None = None
    across_ranks: bool = False

    def __init__(self, *, weight: float = 1.0, positive_weight: float = 1.0) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("positive_weight", positive_weight)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a number >= 0, got {value}")
        self.weight, self.positive_weight = weight, positive_weight

    @property
    def offset(self) -> float:
        """ln beta; 0 where positives do not count at all (beta = 0), which nothing undoes."""
        return math.log(self.positive_weight) if self.positive_weight > 0 else 0.0

    def forward(self, x: Examples) -> Sums:
        raise NotImplementedError(f"{type(self).__name__} defines forward(examples) -> Sums")

    def mean(self, x: Examples) -> Tensor:
        """The loss of one process, a scalar."""
        sums = self(x)
        return sums.sum / torch.where(sums.total > 0, sums.total, torch.ones_like(sums.total))

    def class_weights(self, labels_B: Tensor) -> Tensor:
        """beta for positives, 1 for negatives."""
        return 1 + (self.positive_weight - 1) * labels_B


class LossOfSums(Loss):
    """A loss that needs no more of the batch than sums over its examples: ranks exchange these, and no examples."""

    def parts(self, x: Examples) -> Tensor:
        """-> [P], with gradient; those of a batch are the sums of those of its pieces."""
        raise NotImplementedError(f"{type(self).__name__} defines parts(examples) -> [P]")

    def of_parts(self, parts_P: Tensor) -> Sums:
        raise NotImplementedError(f"{type(self).__name__} defines of_parts([P]) -> Sums")

    def forward(self, x: Examples) -> Sums:
        return self.of_parts(self.parts(x))
