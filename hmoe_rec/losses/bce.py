"""Binary cross-entropy per task, with missing labels and example weights."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def observed_weights(labels_BT: Tensor, weights: Tensor) -> Tensor:
    """Weights [B] of examples or [B, T] of labels -> [B, T]; 0 where the label is missing (NaN)."""
    weights_BT = weights.unsqueeze(1) if weights.ndim == 1 else weights
    return weights_BT * (~labels_BT.isnan()).to(weights.dtype)


def bce(logits_BT: Tensor, labels_BT: Tensor, weights: Tensor, *, total_T: Tensor | None = None) -> Tensor:
    """Weighted mean over the examples whose label is there, in nats per example -> [T].

    Args:
        logits_BT: before the sigmoid.
        labels_BT: 0, 1, or NaN = missing.
        weights: [B], or [B, T] where labels differ; >= 0; examples of weight 0 do not count.
        total_T: the sum of weights to divide by; None = that of this batch. With the sum over all ranks divided by
            the number of ranks, the mean over ranks is the loss of the global batch.

    A task without a label in the batch has loss 0.
    """
    observed_BT = observed_weights(labels_BT, weights)
    nats_BT = binary_cross_entropy_with_logits(logits_BT.float(), labels_BT.nan_to_num(0.0), reduction="none")
    total_T = observed_BT.sum(0) if total_T is None else total_T
    return (nats_BT * observed_BT).sum(0) / torch.where(total_T > 0, total_T, torch.ones_like(total_T))
