"""FwFM and NFwFM: pairwise products of fields, each pair with a learned weight."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hmoe_rec.experts.base import Expert, Products
from hmoe_rec.experts.fm import pair_number, pair_places
from hmoe_rec.experts.ipnn import InnerProducts


class _Weighted(Products):
    """A weight per pair, `weight` [P]."""

    meets = "whole vectors, one turned where the pair's weight is below 0"
    weight: nn.Parameter
    num_fields: int

    def meeting(self, fields_BFD: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
        sign = self.weight[pair_number(self.num_fields, i, j)].sign()
        return sign * fields_BFD[:, i], fields_BFD[:, j]


class FieldWeightedFM(_Weighted):
    r"""[B, F, D] -> [B, D], the weighted products without the sum over D.

    .. math:: \sum_{i<j} r_{ij}\; e_i * e_j = \sum_j \Big( \sum_i R_{ij} e_i \Big) * e_j, \qquad
              R_{ij} = r_{ij} \text{ if } i < j \text{ else } 0

    One matmul with R instead of the pairs' [B, P, D]. P = F (F-1) / 2 parameters.

    Source: Pan et al., "Field-weighted Factorization Machines", WWW 2018, arXiv 1806.03514; as a vector, NFwFM, in the
    code of the multi-embedding paper (arXiv 2310.04400). That code sums over the full grid (both orders and i = j) and
    draws r from N(0, 1); here every pair counts once, as in FwFM, and r starts at 1 (ours): training starts from FM.

    Args:
        num_fields: F >= 2.
        dim: D.

    Raises:
        ValueError: F < 2.
    """

    place_P: Tensor

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("place_P", pair_places("fwfm", num_fields), persistent=False)
        self.weight = nn.Parameter(torch.ones(len(self.place_P)))
        self.num_fields = num_fields
        self.out_dim = dim
        self.flops = 2 * num_fields**2 * dim + 2 * num_fields * dim

    def forward(self, fields_BFD: Tensor) -> Tensor:
        grid = self.weight.new_zeros(self.num_fields**2).index_copy(0, self.place_P, self.weight)
        r_FF = grid.unflatten(0, (self.num_fields, self.num_fields))
        # Copied once, so that neither the matmul nor its gradient copies it again.
        x_BDF = fields_BFD.transpose(1, 2).contiguous()
        return (x_BDF * (x_BDF @ r_FF)).sum(2)


class WeightedInnerProducts(_Weighted):
    r"""[B, F, D] -> [B, P]: :math:`r_{ij} \langle e_i, e_j \rangle` for i < j, the terms of FwFM before their sum.

    The same functions as `InnerProducts` can feed a linear layer: r only makes a pair's scale one parameter.

    Source: FwFM, arXiv 1806.03514; r starts at 1 (ours).

    Args:
        num_fields: F >= 2.
        dim: D.

    Raises:
        ValueError: F < 2.
    """

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.products = InnerProducts(num_fields, dim, kind="fwfm")
        self.num_fields, self.out_dim = num_fields, self.products.out_dim
        self.weight = nn.Parameter(torch.ones(self.out_dim))
        self.flops = self.products.flops + self.out_dim

    def forward(self, fields_BFD: Tensor) -> Tensor:
        return self.weight * self.products(fields_BFD)


class FwFMExpert(Expert):
    """relu(MLP(sum over i < j of r_ij e_i * e_j)), or of the pairs' terms r_ij <e_i, e_j>.

    Args:
        num_fields: F >= 2.
        dim: D.
        out_dim: H.
        output: what the MLP sees: "vector" = the weighted sum of the products, D numbers (NFwFM); "pairs" = the
            weighted inner products, F (F-1) / 2 numbers.
        hidden: widths of hidden layers before the last one.
        dropout: in [0, 1).

    Raises:
        ValueError: F < 2.

    Source: see `FieldWeightedFM` and `WeightedInnerProducts`. FwFM itself ends in one scalar; an expert passes on what
    it would have summed.
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
        terms = (FieldWeightedFM if output == "vector" else WeightedInnerProducts)(num_fields, dim)
        super().__init__(terms, terms.out_dim, out_dim, hidden=hidden, dropout=dropout, interaction_flops=terms.flops)
