"""Numbers [B, N] and pre-trained vectors [B, V] -> [B, N, D] and [B, number of vectors, D] of one embedding set."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ScalarNumbers(nn.Module):
    """A number x of field f becomes x * w_f + b_f; a missing one (NaN) the vector m_f.

    For an expert that flattens its fields this is the plain float input; other experts get a vector to interact with.

    Args:
        num_numbers: N.
        dim: D.

    Source: the scalar field embedding of FM-style models (see also AutoDis, KDD 2021, section 2); bias and the vector
    for missing values are ours.
    """

    def __init__(self, num_numbers: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_numbers, dim))
        self.bias = nn.Parameter(torch.zeros(num_numbers, dim))
        self.missing = nn.Parameter(torch.zeros(num_numbers, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, numbers_BN: Tensor) -> Tensor:
        missing_BN1 = numbers_BN.isnan().unsqueeze(2)
        # Zero first: NaN * 0 in the backward pass of the other branch would still be NaN.
        values_BN1 = numbers_BN.nan_to_num(0.0).unsqueeze(2)
        return torch.where(missing_BN1, self.missing, values_BN1 * self.weight + self.bias)


class ProjectedVectors(nn.Module):
    """Every pre-trained vector through a linear layer of its own to the set's width.

    Args:
        dims: width of each vector, in the order in which they lie side by side.
        dim: D.
    """

    def __init__(self, dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.dims = list(dims)
        self.projections = nn.ModuleList(nn.Linear(d, dim) for d in dims)

    def forward(self, vectors_BV: Tensor) -> Tensor:
        parts = vectors_BV.split(self.dims, dim=1)
        return torch.stack([layer(parts[i]) for i, layer in enumerate(self.projections)], dim=1)
