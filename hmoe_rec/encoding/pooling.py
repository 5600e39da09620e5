"""A user's behaviors [B, L, D] and the target [B, D] -> one vector [B, D]."""

import math

import torch
from torch import Tensor, nn


class MeanPooling(nn.Module):
    """The mean of the behaviors; an empty sequence gives the zero vector.

    Args:
        dim: D, width of a behavior's and of the target's vector (attributes side by side).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, behaviors_BLD: Tensor, target_BD: Tensor, mask_BL: Tensor) -> Tensor:
        """mask True where a behavior exists. -> [B, D]."""
        return behaviors_BLD.sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)


class TargetAttention(nn.Module):
    r"""Softmax attention of the target over the behaviors, without projections and without time.

    .. math:: u = \sum_i \mathrm{softmax}_i(\langle e_i, v \rangle / \sqrt d)\, e_i

    An empty sequence gives the zero vector. It is TIM without temporal encoding and without the target-aware
    representation (Zhou et al., "Temporal Interest Network", WWW 2024, arXiv 2308.08487, ablations).

    Args:
        dim: D, width of a behavior's and of the target's vector (attributes side by side).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = 1.0 / math.sqrt(dim)

    def forward(self, behaviors_BLD: Tensor, target_BD: Tensor, mask_BL: Tensor) -> Tensor:
        """mask True where a behavior exists. -> [B, D]."""
        logits_BL = torch.einsum("bld,bd->bl", behaviors_BLD, target_BD) * self.scale
        # A large finite number, not -inf: an empty sequence must give finite gradients.
        weights_BL = logits_BL.masked_fill(~mask_BL, -1e9).softmax(1) * mask_BL
        return torch.einsum("bl,bld->bd", weights_BL, behaviors_BLD)
