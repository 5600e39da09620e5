"""GwPFM: group-weighted, part-aware factorization machine in its fast form."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hmoe_rec.experts.base import Expert


class GroupWeightedPartFM(nn.Module):
    r"""Every field owns P part vectors of width K; field i meets field j with its part vector for j's part.

    .. math:: G(x) = \sum_{i<j} r_{a(i),a(j)}\; e_i^{\to b(j)} * e_j^{\to b(i)} \in R^K, \qquad r = (R + R^T) / 2

    a(i) is field i's group (whose pair weights are learned), b(i) its part. Computed as

    .. math:: G = \tfrac12 \Big( \sum_{c,c'} r_{a(c),a(c')} S_{c,b(c')} * S_{c',b(c)} - \sum_c r_{a(c),a(c)}
              \sum_{i \in c} (e_i^{\to b(c)})^2 \Big), \qquad S_{c,q} = \sum_{i \in c} e_i^{\to q}

    over the occurring cells c = (group, part): O(F P K + C^2 K) instead of O(F^2 K).

    Args:
        num_fields: F.
        dim: D = P * K, width of the set.
        num_parts: P.
        groups: group of every field; None = the parts.
        parts: part of every field; None = contiguous blocks of fields of nearly equal size.

    Raises:
        ValueError: D is not divisible by P, or a partition of the wrong length or range.

    Source: "a variant of FFM" in arXiv 2403.00793; the formula is known from third parties only; the symmetric r, the
    separate group and part maps and the fast form are ours.
    """

    in_cell_CF: Tensor
    own_part_FP: Tensor
    group_C: Tensor
    part_C: Tensor
    group_F: Tensor

    def __init__(
        self,
        num_fields: int,
        dim: int,
        num_parts: int,
        groups: Sequence[int] | None = None,
        parts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        GwPFMExpert.check(num_fields, dim, num_parts=num_parts, groups=groups, parts=parts)
        parts = [i * num_parts // num_fields for i in range(num_fields)] if parts is None else list(parts)
        groups = list(parts) if groups is None else list(groups)
        self.num_parts, self.part_dim = num_parts, dim // num_parts
        cells = sorted(set(zip(groups, parts, strict=True)))
        cell_of_field = [cells.index(c) for c in zip(groups, parts, strict=True)]
        in_cell_CF = torch.nn.functional.one_hot(torch.tensor(cell_of_field), len(cells)).T.float()
        own_part_FP = torch.nn.functional.one_hot(torch.tensor(parts), num_parts).float()
        self.register_buffer("in_cell_CF", in_cell_CF, persistent=False)
        self.register_buffer("own_part_FP", own_part_FP, persistent=False)
        self.register_buffer("group_C", torch.tensor([a for a, _ in cells]), persistent=False)
        self.register_buffer("part_C", torch.tensor([b for _, b in cells]), persistent=False)
        self.register_buffer("group_F", torch.tensor(groups), persistent=False)
        self.weight = nn.Parameter(torch.ones(max(groups) + 1, max(groups) + 1))

    def forward(self, fields_BFD: Tensor) -> Tensor:
        """[B, F, P*K] -> [B, K]."""
        x_BFPK = fields_BFD.unflatten(2, (self.num_parts, self.part_dim))
        r = (self.weight + self.weight.T) / 2
        sums_BCPK = torch.einsum("cf,bfpk->bcpk", self.in_cell_CF.to(x_BFPK.dtype), x_BFPK)
        towards_BCCK = sums_BCPK.index_select(2, self.part_C)  # [c, c']: cell c's vector for the part of cell c'
        pairs_BCCK = towards_BCCK * towards_BCCK.transpose(1, 2)
        r_CC = r.index_select(0, self.group_C).index_select(1, self.group_C)
        own_BFK = torch.einsum("fp,bfpk->bfk", self.own_part_FP.to(x_BFPK.dtype), x_BFPK)
        r_F = r.diagonal().index_select(0, self.group_F)
        return 0.5 * (torch.einsum("cd,bcdk->bk", r_CC, pairs_BCCK) - torch.einsum("f,bfk->bk", r_F, own_BFK.square()))


class GwPFMExpert(Expert):
    """relu(MLP(G(x))), G as in `GroupWeightedPartFM`.

    Args:
        num_fields: F.
        dim: D = P * K.
        out_dim: H.
        num_parts: P.
        groups: group of every field, for the pair weights; None = the parts.
        parts: part of every field; None = contiguous blocks of fields.
        hidden: widths of hidden layers before the last one.
        dropout: in [0, 1).

    Raises:
        ValueError: see `GroupWeightedPartFM`.
    """

    def __init__(
        self,
        num_fields: int,
        dim: int,
        out_dim: int,
        *,
        num_parts: int = 2,
        groups: Sequence[int] | None = None,
        parts: Sequence[int] | None = None,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        interaction = GroupWeightedPartFM(num_fields, dim, num_parts, groups, parts)
        super().__init__(interaction, dim // num_parts, out_dim, hidden=hidden, dropout=dropout)

    @staticmethod
    def check(
        num_fields: int,
        dim: int,
        *,
        num_parts: int = 2,
        groups: Sequence[int] | None = None,
        parts: Sequence[int] | None = None,
        **_: object,
    ) -> None:
        """Raises ValueError, in the user's words, for sizes that cannot work; nothing is built."""
        if num_parts < 1 or dim % num_parts:
            raise ValueError(
                f"gwpfm: the set's width {dim} must be num_parts x part width, got num_parts {num_parts}; "
                f"choose a width divisible by {max(num_parts, 1)}"
            )
        for name, partition, bound in (("parts", parts, num_parts), ("groups", groups, None)):
            if partition is None:
                continue
            if len(partition) != num_fields:
                raise ValueError(f"gwpfm: {name} must name one number per field ({num_fields}), got {len(partition)}")
            if min(partition) < 0 or (bound is not None and max(partition) >= bound):
                raise ValueError(
                    f"gwpfm: {name} must be >= 0{f' and < {bound}' if bound else ''}, got {list(partition)}"
                )
