"""Losses of single examples: binary cross-entropy, and the focal loss that does not shrink negatives."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from hmoe_rec.losses.base import Examples, Loss, Sums


class BCELoss(Loss):
    r"""Binary cross-entropy, with a weight of positives.

    .. math:: \frac1N \sum_i w_i\,\beta_{y_i}\,\mathrm{softplus}(\mp z_i), \qquad N = \sum_i w_i

    Divided by the weight of the examples, which that of the positives does not change.

    Source: BCE_b of "Understanding the Ranking Loss for Recommendation with Sparse User Feedback", arXiv 2403.14144.
    """

    def forward(self, x: Examples) -> Sums:
        weights_B = x.weights_B * self.class_weights(x.labels_B)
        return Sums((weights_B * cross_entropy(x)).sum(), x.weights_B.sum())


class FocalLoss(Loss):
    r"""Focal loss, modified so that the weights of negatives are 1 on average.

    .. math:: w_+ = (1 - p)^\gamma, \qquad w_- = p^\gamma + 1 - \overline{p^\gamma}

    times the cross-entropy, with p = sigmoid(z). The plain focal loss gives easy negatives, which is nearly all of
    them where positives are rare, no gradient at all; this one keeps the mean. The weights are not detached (ours).

    Args:
        gamma: >= 0; 0 = binary cross-entropy.
        mean_over: whose mean of p^gamma is subtracted: "all" examples, as in the paper's code, or "negatives" (ours).
        across_ranks: the mean is that of all processes' examples.

    Source: the modified focal loss of arXiv 2403.14144.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        positive_weight: float = 1.0,
        gamma: float = 2.0,
        mean_over: Literal["all", "negatives"] = "all",
        across_ranks: bool = False,
    ) -> None:
        super().__init__(weight=weight, positive_weight=positive_weight)
        if gamma < 0:
            raise ValueError(f"gamma must be >= 0, got {gamma}")
        if mean_over not in ("all", "negatives"):
            raise ValueError(f"mean_over must be all or negatives, got {mean_over!r}")
        self.gamma, self.mean_over, self.across_ranks = gamma, mean_over, across_ranks

    def forward(self, x: Examples) -> Sums:
        power_B = (self.gamma * logsigmoid(x.logits_B)).exp()
        over_B = x.weights_B if self.mean_over == "all" else x.weights_B * (1 - x.labels_B)
        mean = (over_B * power_B).sum() / over_B.sum().clamp(min=torch.finfo(over_B.dtype).tiny)
        focus_B = torch.where(x.labels_B > 0, (self.gamma * logsigmoid(-x.logits_B)).exp(), power_B + 1 - mean)
        weights_B = x.weights_B * self.class_weights(x.labels_B)
        return Sums((weights_B * focus_B * cross_entropy(x)).sum(), x.weights_B.sum())


def cross_entropy(x: Examples) -> Tensor:
    """[B], in nats: softplus(-z) of a positive, softplus(z) of a negative."""
    return softplus(torch.where(x.labels_B > 0, -x.logits_B, x.logits_B))
