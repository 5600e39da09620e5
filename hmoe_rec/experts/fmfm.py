"""FmFM: pairwise products of fields, each pair with a learned matrix between its two vectors."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hmoe_rec.experts.base import Expert, Products
from hmoe_rec.experts.fm import pair_number, pair_places


def pair_matrices(num_pairs: int, dim: int) -> nn.Parameter:
    """[P, D, D], drawn from N(0, 1/D) (ours): e_i M_ij is as long as e_i on average."""
    return nn.Parameter(torch.randn(num_pairs, dim, dim) / dim**0.5)


class _Matrixed(Products):
    """A matrix per pair, `weight` [P, D, D], on the vector of the earlier field."""

    meets = "the earlier field's vector times the pair's matrix, and the later field's"
    weight: nn.Parameter
    num_fields: int

    def meeting(self, fields_BFD: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
        matrix_DD = self.weight[pair_number(self.num_fields, i, j)]
        e_i, e_j = fields_BFD[:, i], fields_BFD[:, j]
        return (e_i @ matrix_DD, e_j) if i < j else (e_i, e_j @ matrix_DD)


class FieldMatrixedFM(_Matrixed):
    r"""[B, F, D] -> [B, D], the projected products without the sum over D.

    .. math:: \sum_{i<j} (e_i M_{ij}) * e_j = \sum_j \Big( \sum_{i<j} e_i M_{ij} \Big) * e_j

    The inner sums of all j are one matmul of flatten(x) with a matrix of F x F blocks: M_ij above the diagonal, zeros
    elsewhere. Half of its products are wasted, and still it is about seven times as fast as a product per pair
    (F = 39, D = 16), whose [B, P, D] it never builds. P D^2 = F (F-1) / 2 D^2 parameters.

    Source: Sun et al., "FM2: Field-matrixed Factorization Machines", WWW 2021, arXiv 2102.12994, where the products
    are summed to a scalar.

    Args:
        num_fields: F >= 2.
        dim: D.

    Raises:
        ValueError: F < 2.
    """

    place_P: Tensor

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("place_P", pair_places("fmfm", num_fields), persistent=False)
        self.weight = pair_matrices(len(self.place_P), dim)
        self.num_fields, self.dim = num_fields, dim
        self.out_dim = dim
        self.flops = 2 * (num_fields * dim) ** 2 + 2 * num_fields * dim

    def forward(self, fields_BFD: Tensor) -> Tensor:
        x = fields_BFD.flatten(1)
        grid = self.weight.new_zeros(self.num_fields**2, self.dim**2)
        grid = grid.index_copy(0, self.place_P, self.weight.flatten(1))
        blocks_FFDD = grid.view(self.num_fields, self.num_fields, self.dim, self.dim)
        matrix = blocks_FFDD.transpose(1, 2).flatten(0, 1).flatten(1)
        return (x @ matrix * x).unflatten(1, (self.num_fields, self.dim)).sum(1)


class MatrixedInnerProducts(_Matrixed):
    r"""[B, F, D] -> [B, P]: :math:`\langle e_i M_{ij}, e_j \rangle` for i < j, the terms of FmFM before their sum.

    Training keeps the P projected vectors of every example for the gradient (F = 50, D = 16: 78 KB in fp32);
    `FieldMatrixedFM` does not.

    Source: arXiv 2102.12994.

    Args:
        num_fields: F >= 2.
        dim: D.

    Raises:
        ValueError: F < 2.
    """

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.out_dim = len(pair_places("fmfm", num_fields))
        self.weight = pair_matrices(self.out_dim, dim)
        self.num_fields, self.dim = num_fields, dim
        self.flops = self.out_dim * (2 * dim**2 + 2 * dim)

    def forward(self, fields_BFD: Tensor) -> Tensor:
        terms, start = [], 0
        for i in range(self.num_fields - 1):
            later = self.num_fields - 1 - i
            # The pairs (i, i+1), (i, i+2), ... lie together: field i meets all their matrices in one matmul.
            matrices = self.weight.narrow(0, start, later).transpose(0, 1).flatten(1)
            projected = (fields_BFD[:, i] @ matrices).unflatten(1, (later, self.dim))
            terms.append((projected * fields_BFD[:, i + 1 :]).sum(2))
            start += later
        return torch.cat(terms, 1)


class FmFMExpert(Expert):
    """relu(MLP(sum over i < j of (e_i M_ij) * e_j)), or of the pairs' terms <e_i M_ij, e_j>.

    Args:
        num_fields: F >= 2.
        dim: D.
        out_dim: H.
        output: what the MLP sees: "vector" = the sum of the projected products, D numbers; "pairs" = the projected
            inner products, F (F-1) / 2 numbers (slower, and more memory: see `MatrixedInnerProducts`).
        hidden: widths of hidden layers before the last one.
        dropout: in [0, 1).

    Raises:
        ValueError: F < 2.

    Source: see `FieldMatrixedFM`. FmFM itself ends in one scalar; an expert passes on what it would have summed.
    """

    def __init__(
        self,
        num_fields: int,
        dim: int,
        out_dim: int,
        *,
        output: Literal["vector", "pairs"] = "vector",
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        terms = (FieldMatrixedFM if output == "vector" else MatrixedInnerProducts)(num_fields, dim)
        super().__init__(terms, terms.out_dim, out_dim, hidden=hidden, dropout=dropout, interaction_flops=terms.flops)
