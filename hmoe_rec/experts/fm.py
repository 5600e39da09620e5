"""FM: the sum of all pairwise products of fields, and the order of field pairs that its weighted relatives share."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from hmoe_rec.experts.base import Expert, Products


def pair_places(kind: str, num_fields: int) -> Tensor:
    """[P] places i F + j in a flattened F x F grid of all P = F (F-1) / 2 pairs i < j: (0, 1), (0, 2), ..., (F-2, F-1).

    Raises:
        ValueError: one field only, which leaves nothing to multiply.
    """
    if num_fields < 2:
        raise ValueError(f"{kind}: multiplies pairs of fields, so the set must have at least 2, got {num_fields}")
    return torch.tensor([i * num_fields + j for i, j in combinations(range(num_fields), 2)])


def pair_number(num_fields: int, i: int, j: int) -> int:
    """Which of the P pairs of `pair_places` holds fields i != j, in either order."""
    first, last = min(i, j), max(i, j)
    return first * (2 * num_fields - first - 1) // 2 + last - first - 1


class FactorizationMachine(Products):
    r"""[B, F, D] -> [B, D], the pairwise products without the sum over D (an MLP gets vectors, not one scalar).

    .. math:: \sum_{i<j} e_i * e_j = \tfrac12 \Big( \big( \sum_i e_i \big)^2 - \sum_i e_i^2 \Big)

    Source: Rendle, "Factorization Machines", ICDM 2010, lemma 3.1; as a vector: He and Chua, "Neural Factorization
    Machines", SIGIR 2017, arXiv 1708.05027 (Bi-Interaction pooling).

    Args:
        num_fields: F >= 2.
        dim: D.

    Raises:
        ValueError: F < 2.
    """

    fixed = True

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        pair_places("fm", num_fields)  # raises
        self.out_dim = dim
        self.flops = 3 * num_fields * dim + dim  # F D squares, 2 (F-1) D sums, then 3 D

    def forward(self, fields_BFD: Tensor) -> Tensor:
        return (fields_BFD.sum(1).square() - fields_BFD.square().sum(1)) / 2


class FMExpert(Expert):
    """relu(MLP(sum over i < j of e_i * e_j)).

    Args:
        num_fields: F >= 2.
        dim: D.
        out_dim: H.
        hidden: widths of hidden layers before the last one.
        dropout: in [0, 1).

    Raises:
        ValueError: F < 2.

    Source: see `FactorizationMachine`.
    """

    def __init__(
        self, num_fields: int, dim: int, out_dim: int, *, hidden: Sequence[int] = (), dropout: float = 0.0
    ) -> None:
        fm = FactorizationMachine(num_fields, dim)
        super().__init__(fm, fm.out_dim, out_dim, hidden=hidden, dropout=dropout, interaction_flops=fm.flops)
