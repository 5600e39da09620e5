"""IPNN: the inner products of all pairs of fields, with or without the fields beside them, into an MLP."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hmoe_rec.experts.base import Expert, Products
from hmoe_rec.experts.fm import pair_places


class InnerProducts(Products):
    r"""[B, F, D] -> [B, P]: :math:`\langle e_i, e_j \rangle` for all P = F (F-1) / 2 pairs i < j, row by row.

    Taken from X X^T: all F^2 products in one batched matmul cost far less than gathering the pairs' vectors, [B, P, D].

    Source: Qu et al., "Product-based Neural Networks", ICDM 2016, arXiv 1611.00144.

    Args:
        num_fields: F >= 2.
        dim: D.
        kind: the expert that an error names.

    Raises:
        ValueError: F < 2.
    """

    fixed = True
    place_P: Tensor

    def __init__(self, num_fields: int, dim: int, *, kind: str = "ipnn") -> None:
        super().__init__()
        self.register_buffer("place_P", pair_places(kind, num_fields), persistent=False)
        self.out_dim = len(self.place_P)
        self.flops = 2 * num_fields**2 * dim

    def forward(self, fields_BFD: Tensor) -> Tensor:
        products_BFF = torch.bmm(fields_BFD, fields_BFD.transpose(1, 2))
        return products_BFF.flatten(1).index_select(1, self.place_P)


class FieldsAndProducts(Products):
    """[B, F, D] -> [B, F*D + P]: the fields side by side, then their `InnerProducts`.

    Args:
        num_fields: F >= 2.
        dim: D.

    Raises:
        ValueError: F < 2.
    """

    fixed = True

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.products = InnerProducts(num_fields, dim)
        self.out_dim = num_fields * dim + self.products.out_dim
        self.flops = self.products.flops

    def forward(self, fields_BFD: Tensor) -> Tensor:
        return torch.cat([fields_BFD.flatten(1), self.products(fields_BFD)], 1)


class IPNNExpert(Expert):
    """relu(MLP([flatten(x), <e_i, e_j> for i < j])), or of the products alone.

    Args:
        num_fields: F >= 2.
        dim: D.
        out_dim: H.
        embeddings: the MLP also sees the fields. In the multi-embedding paper's code (arXiv 2310.04400) the single
            IPNN does and the multi-embedding IPNN does not: F (F-1) / 2 inputs a set, so one set of the latter is not
            the former.
        hidden: widths of hidden layers before the last one.
        dropout: in [0, 1).

    Raises:
        ValueError: F < 2.

    Source: see `InnerProducts`.
    """

    def __init__(
        self,
        num_fields: int,
        dim: int,
        out_dim: int,
        *,
        embeddings: bool = True,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        inputs = (FieldsAndProducts if embeddings else InnerProducts)(num_fields, dim)
        super().__init__(
            inputs, inputs.out_dim, out_dim, hidden=hidden, dropout=dropout, interaction_flops=inputs.flops
        )
