"""Mean and variance of a logit, and what follows from them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Of the logit as a Gaussian: mean [B, T] and variance [B, T], >= 0."""

    mean_BT: Tensor
    variance_BT: Tensor

    def std_BT(self) -> Tensor:
        return self.variance_BT.sqrt()

    def probability_BT(self) -> Tensor:
        r"""The expected probability in mean-field approximation: drawn to one half the more, the less is known.

        .. math:: E[\sigma(z)] \approx \sigma(m / \sqrt{1 + \pi v / 8})

        Source: MacKay, "The evidence framework applied to classification networks", 1992; used by Liu et al., arXiv
        2006.10108.
        """
        return mean_field_logits(self.mean_BT, self.variance_BT).sigmoid()


def mean_field_logits(mean: Tensor, variance: Tensor) -> Tensor:
    return mean / (1 + math.pi / 8 * variance).sqrt()


def over_samples(logits: Tensor, dim: int) -> Moments:
    """Mean and unbiased variance over a dimension of at least two samples, heads or members; in float32 or wider."""
    variance, mean = torch.var_mean(logits.float() if logits.dtype != torch.float64 else logits, dim)
    return Moments(mean, variance)
