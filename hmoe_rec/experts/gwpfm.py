"""GwPFM: group-weighted, part-aware factorization machine in its fast form; partitions of fields by number or name."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hmoe_rec.experts.base import Expert, Products
from hmoe_rec.suggest import listing, unknown

Partition = Sequence[int] | Sequence[Sequence[str]] | Mapping[str, int]


class GroupWeightedPartFM(Products):
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

    meets = "part vectors"
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
        if num_parts < 1 or dim % num_parts:
            raise ValueError(
                f"gwpfm: the set's width {dim} must be num_parts x part width, got num_parts {num_parts}; "
                f"choose a width divisible by {max(num_parts, 1)}"
            )
        _check_numbers("parts", parts, num_fields, num_parts)
        _check_numbers("groups", groups, num_fields, None)
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
        sums, pairs = 2 * (len(cells) + 1) * num_fields * dim, 3 * len(cells) ** 2 * self.part_dim
        self.flops = sums + pairs + (3 * num_fields + 2) * self.part_dim

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

    def meeting(self, fields_BFD: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
        x_BFPK = fields_BFD.unflatten(2, (self.num_parts, self.part_dim))
        part_F = self.own_part_FP.argmax(1)
        a, b = self.group_F[i], self.group_F[j]
        sign = (self.weight[a, b] + self.weight[b, a]).sign()
        towards_j, towards_i = (
            x_BFPK[:, field].index_select(1, part_F[other : other + 1]).squeeze(1) for field, other in ((i, j), (j, i))
        )
        return sign * towards_j, towards_i


class GwPFMExpert(Expert):
    """relu(MLP(G(x))), G as in `GroupWeightedPartFM`.

    A partition is given as one number per field, as lists of field names (the first list is 0), or as field name ->
    number. A name stands for all fields made of it: `price` for `price_base2`, `price_base3`, ... of a multi-base
    encoding too.

    Args:
        num_fields: F.
        dim: D = P * K.
        out_dim: H.
        num_parts: P.
        groups: group of every field, for the pair weights; None = the parts.
        parts: part of every field, in [0, P); None = contiguous blocks of fields.
        field_names: of the F fields, in order; the model hands them over.
        hidden: widths of hidden layers before the last one.
        dropout: in [0, 1).

    Raises:
        ValueError: see `GroupWeightedPartFM` and `numbers_of_fields`.
    """

    def __init__(
        self,
        num_fields: int,
        dim: int,
        out_dim: int,
        *,
        num_parts: int = 2,
        groups: Partition | None = None,
        parts: Partition | None = None,
        field_names: Sequence[str] | None = None,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        group_F = None if groups is None else numbers_of_fields("groups", groups, field_names)
        part_F = None if parts is None else numbers_of_fields("parts", parts, field_names)
        interaction = GroupWeightedPartFM(num_fields, dim, num_parts, group_F, part_F)
        super().__init__(
            interaction,
            dim // num_parts,
            out_dim,
            hidden=hidden,
            dropout=dropout,
            interaction_flops=interaction.flops,
        )


def numbers_of_fields(option: str, partition: Partition, field_names: Sequence[str] | None) -> list[int]:
    """One number per field, from any of the three ways to write a partition.

    Args:
        option: "groups" or "parts", for messages.

    Raises:
        ValueError: a name that no field has, a field named twice or not at all, or names where fields have none.
    """
    if isinstance(partition, Mapping):
        named = [(name, int(number)) for name, number in partition.items()]
    elif any(not isinstance(entry, int) for entry in partition):
        named = [(name, number) for number, names in enumerate(partition) for name in _names(option, names)]
    else:
        return [int(number) for number in partition if isinstance(number, int)]
    if field_names is None:
        raise ValueError(f"gwpfm: {option} names fields, but their names are not known here; give a number per field")
    numbers: dict[str, int] = {}
    for name, number in named:
        for covered in _fields_of(option, name, [other for other, _ in named], field_names):
            if covered in numbers:
                raise ValueError(f"gwpfm: {option} names field {covered!r} twice")
            numbers[covered] = number
    missing = [name for name in field_names if name not in numbers]
    if missing:
        raise ValueError(f"gwpfm: {option} must name every field of the set once; missing: {listing(missing)}")
    return [numbers[name] for name in field_names]


def _names(option: str, names: object) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(f"gwpfm: {option} must be numbers, lists of field names, or names -> numbers; got {names!r}")
    return [str(name) for name in names]


def _fields_of(option: str, name: str, all_named: Sequence[str], field_names: Sequence[str]) -> list[str]:
    """The field of that name, and its encodings in several bases unless they are named on their own."""
    pattern = re.compile(re.escape(name) + r"(_base\d+)?")
    found = [f for f in field_names if pattern.fullmatch(f)]
    if not found:
        raise ValueError(f"gwpfm: {option}: {unknown('field', name, field_names)}")
    return [f for f in found if f == name or f not in all_named]


def _check_numbers(option: str, numbers: Sequence[int] | None, num_fields: int, bound: int | None) -> None:
    if numbers is None:
        return
    if len(numbers) != num_fields:
        raise ValueError(f"gwpfm: {option} must name one number per field ({num_fields}), got {len(numbers)}")
    if min(numbers) < 0 or (bound is not None and max(numbers) >= bound):
        limit = "" if bound is None else f" and < {bound} (num_parts)"
        raise ValueError(f"gwpfm: {option} must be >= 0{limit}, got {list(numbers)}")
