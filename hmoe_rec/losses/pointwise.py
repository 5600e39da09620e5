"""Losses of single examples: binary cross-entropy, and the focal loss that does not shrink negatives."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from hmoe_rec.losses.base import Examples, Loss, LossOfSums, Sums


class BCELoss(Loss):
    r"""Binary cross-entropy, with a weight of positives.

    .. math:: \frac1N \sum_i w_i\,\beta_{y_i}\,\mathrm{softplus}(\mp z_i), \qquad N = \sum_i w_i

    Divided by the weight of the examples, which that of the positives does not change.

    Source: BCE_b of "Understanding the Ranking Loss for Recommendation with Sparse User Feedback", arXiv 2403.14144.
    """

    def forward(self, x: Examples) -> Sums:
        weights_B = x.weights_B * self.class_weights(x.labels_B)
        return Sums((weights_B * cross_entropy(x)).sum(), x.weights_B.sum())


class FocalLoss(LossOfSums):
    r"""Focal loss, modified so that the weights of negatives are 1 on average.

    .. math:: w_+ = (1 - p)^\gamma, \qquad w_- = p^\gamma + 1 - \frac1{N_-} \sum_{j-} p_j^\gamma

    times the cross-entropy, with p = sigmoid(z); divided by the number of all examples. The plain focal loss gives easy
    negatives, which is nearly all of them where positives are rare, no gradient at all; this one keeps the mean.
    Gradients go through the weights and their mean too.

    Args:
        gamma: >= 0; 0 = binary cross-entropy.
        mean_over: whose mean of p^gamma is subtracted: the batch's "negatives", as in the paper's code, or "all"
            examples (ours; then the weights of negatives are above or below 1 on average).
        across_ranks: the mean is that of all ranks' examples, so that any number of them trains the same model; costs
            an exchange of five numbers. Otherwise each rank takes that of its own.

    Source: the modified focal loss of "Understanding the Ranking Loss for Recommendation with Sparse User Feedback",
    arXiv 2403.14144, as its code (DCNv2Focal) computes it; there one device, here weights of examples.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        positive_weight: float = 1.0,
        gamma: float = 2.0,
        mean_over: Literal["negatives", "all"] = "negatives",
        across_ranks: bool = True,
    ) -> None:
        super().__init__(weight=weight, positive_weight=positive_weight)
        if gamma < 0:
            raise ValueError(f"gamma must be >= 0, got {gamma}")
        if mean_over not in ("negatives", "all"):
            raise ValueError(f"mean_over must be negatives or all, got {mean_over!r}")
        self.gamma, self.mean_over, self.across_ranks = gamma, mean_over, across_ranks

    def parts(self, x: Examples) -> Tensor:
        """The loss with weights p^gamma + 1 of negatives, their cross-entropy; of p^gamma the sum and the weight of
        what the mean is over; the weight of all examples."""
        nats_B, power_B = cross_entropy(x), (self.gamma * logsigmoid(x.logits_B)).exp()
        focus_B = torch.where(x.labels_B > 0, (self.gamma * logsigmoid(-x.logits_B)).exp(), power_B + 1)
        negatives_B = x.weights_B * (1 - x.labels_B)
        over_B = negatives_B if self.mean_over == "negatives" else x.weights_B
        weights_B = x.weights_B * self.class_weights(x.labels_B)
        columns = [weights_B * focus_B * nats_B, negatives_B * nats_B, over_B * power_B, over_B, x.weights_B]
        return torch.stack([column.sum() for column in columns])

    def of_parts(self, parts_P: Tensor) -> Sums:
        value, negatives, power, over, total = parts_P.unbind()
        mean = power / over.clamp(min=torch.finfo(over.dtype).tiny)
        return Sums(value - mean * negatives, total)


def cross_entropy(x: Examples) -> Tensor:
    """[B], in nats: softplus(-z) of a positive, softplus(z) of a negative."""
    return softplus(torch.where(x.labels_B > 0, -x.logits_B, x.logits_B))
