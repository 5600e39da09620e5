"""A user's behaviors [B, L, D] and the target [B, D] -> what they say together; poolings that know no time."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

MASKED = -1e9  # a large finite number, not -inf: an empty sequence must give finite gradients


class Interest(NamedTuple):
    """What a sequence says of the target; all zero for an empty sequence, except `target_BD`.

    Attributes:
        field_BD: the vector that interaction experts get, one per behavior column side by side.
        summary_BD: the behaviors' summary before it meets the target.
        target_BD: the target's vector as the pooling sees it. An expert of kind "sequence" reads
            [summary, target, summary * target].
    """

    field_BD: Tensor
    summary_BD: Tensor
    target_BD: Tensor


class Attention(NamedTuple):
    """What a pooling makes of every behavior, for analysis; zero where there is none.

    Attributes:
        logits_BL: how much the behavior weighs: as they enter a softmax; the mean over heads.
        value_norms_BL: the length of the vector that the behavior adds to the interest, before its weight.
    """

    logits_BL: Tensor
    value_norms_BL: Tensor


class Pooling(nn.Module):
    """Behaviors, target, mask and ages -> `Interest`.

    Args:
        dim: D, width of a behavior's and of the target's vector (the columns' vectors side by side).
        max_length: the most behaviors that an example can have.
        has_ages: the sequence has times.

    Attributes:
        attention_is: what `attention` returns, in the words of a report.
    """

    attention_is = "attention"

    def __init__(self, dim: int, max_length: int, has_ages: bool) -> None:
        super().__init__()
        self.dim, self.max_length, self.has_ages = dim, max_length, has_ages

    def forward(self, behaviors_BLD: Tensor, target_BD: Tensor, mask_BL: Tensor, ages_BL: Tensor | None) -> Interest:
        """Oldest behavior first, padded with zeros behind the latest; L may be smaller than `max_length`.

        Args:
            mask_BL: True where a behavior exists.
            ages_BL: seconds between behavior and exposure, >= 0; None where the sequence has no times.
        """
        raise NotImplementedError

    def attention(
        self,
        behaviors_BLD: Tensor,
        target_BD: Tensor,
        mask_BL: Tensor,
        ages_BL: Tensor | None,
        *,
        dims: slice = slice(None),
    ) -> Attention:
        """Logits and value norms of every behavior. Here those of a mean: all behaviors weigh alike.

        Args:
            dims: only these columns of the width take part, such as the category's half.
        """
        return Attention(torch.zeros_like(behaviors_BLD[..., 0]), behaviors_BLD[..., dims].norm(dim=2) * mask_BL)


class MeanPooling(Pooling):
    """The mean of the behaviors; an empty sequence gives the zero vector."""

    attention_is = "value lengths (all behaviors weigh alike)"

    def forward(self, behaviors_BLD: Tensor, target_BD: Tensor, mask_BL: Tensor, ages_BL: Tensor | None) -> Interest:
        mean_BD = behaviors_BLD.sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)
        return Interest(mean_BD, mean_BD, target_BD)


class TargetAttention(Pooling):
    r"""Softmax attention of the target over the behaviors, without projections and without time.

    .. math:: u = \sum_i \mathrm{softmax}_i(\langle e_i, v \rangle / \sqrt d)\, e_i

    An empty sequence gives the zero vector. It is TIM without temporal encoding and without the target-aware
    representation (Zhou et al., "Temporal Interest Network", WWW 2024, arXiv 2308.08487, ablations).
    """

    def forward(self, behaviors_BLD: Tensor, target_BD: Tensor, mask_BL: Tensor, ages_BL: Tensor | None) -> Interest:
        # bmm: einsum copies for "bld,bd->bl", which more than doubles the time.
        logits_BL = torch.bmm(target_BD.unsqueeze(1), behaviors_BLD.transpose(1, 2)).squeeze(1) / math.sqrt(self.dim)
        weights_BL = attention_weights(logits_BL, mask_BL)
        u_BD = torch.bmm(weights_BL.unsqueeze(1), behaviors_BLD).squeeze(1)
        return Interest(u_BD, u_BD, target_BD)

    def attention(
        self,
        behaviors_BLD: Tensor,
        target_BD: Tensor,
        mask_BL: Tensor,
        ages_BL: Tensor | None,
        *,
        dims: slice = slice(None),
    ) -> Attention:
        logits_BL = torch.einsum("bd,bld->bl", target_BD[:, dims], behaviors_BLD[..., dims]) / math.sqrt(self.dim)
        return Attention(logits_BL * mask_BL, behaviors_BLD[..., dims].norm(dim=2) * mask_BL)


def attention_weights(logits_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Softmax over the behaviors that exist; all zero where there are none."""
    return logits_BL.masked_fill(~mask_BL, MASKED).softmax(1) * mask_BL
