"""CIN: explicit crosses of rising degree, weighted per pair of vectors; with `deep`, the whole of xDeepFM."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hmoe_rec.experts.base import Expert
from hmoe_rec.layers import MLP


class CompressedInteractions(nn.Module):
    r"""[B, F, D] -> [B, sum of C_l]: the vectors of every layer, summed over D.

    .. math:: X^l_c = \mathrm{relu} \Big( \sum_{i,j} w^{l,c}_{ij}\; X^{l-1}_i * X^0_j + b^l_c \Big) \in R^D, \qquad
              X^0 = x

    Layer l makes C_l vectors of the C_{l-1} (first: F) vectors before it, from C_l C_{l-1} F weights and a bias per
    vector, the same in every coordinate. Every coordinate of D is a row of its own. A row's products X_i X_j are never
    laid out (F^2 of them): the longer of the two vectors first meets the weights, and the result,
    min(C_{l-1}, F) x C_l, the shorter one.

    Source: Lian et al., "xDeepFM", KDD 2018, arXiv 1803.05170, equations 6 and 7, which have no
    bias; every public code has (a convolution of kernel 1). ReLU as in the code of the multi-embedding paper
    (arXiv 2310.04400) and without its split into halves; other public code has no ReLU. Weights and biases start as
    those of a convolution of kernel 1, uniform within (C_{l-1} F)^-1/2.

    Args:
        num_fields: F.
        dim: D.
        layers: C_l, the vectors of every layer, each >= 1.
        relu: False = each layer is the sum alone.
        bias: False = the equations of the paper, and what runs of earlier versions had.

    Raises:
        ValueError: no layers, or one of width < 1.
    """

    def __init__(
        self, num_fields: int, dim: int, layers: Sequence[int], *, relu: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        if not layers or min(layers) < 1:
            raise ValueError(f"cin: layers must name at least one width, all >= 1, got {list(layers)}")
        self.num_fields, self.dim = num_fields, dim
        self.layers = tuple(layers)
        self.widths_before = (num_fields, *layers[:-1])
        self.activation = nn.ReLU() if relu else nn.Identity()
        self.weights, self.biases = nn.ModuleList(), nn.ParameterList()
        self.out_dim = sum(layers)
        self.flops = self.out_dim * dim
        for before, width in zip(self.widths_before, self.layers, strict=True):
            few, many = sorted((before, num_fields))
            weight = nn.Linear(many, few * width, bias=False)
            bound = (few * many) ** -0.5
            nn.init.uniform_(weight.weight, -bound, bound)
            self.weights.append(weight)
            self.flops += 2 * few * many * width * dim + 2 * few * width * dim
            if bias:
                self.biases.append(nn.Parameter(torch.empty(width).uniform_(-bound, bound)))
                self.flops += width * dim

    def forward(self, fields_BFD: Tensor) -> Tensor:
        first = x = fields_BFD.transpose(1, 2).flatten(0, 1)
        outputs = []
        for layer, (weight, before, width) in enumerate(
            zip(self.weights, self.widths_before, self.layers, strict=True)
        ):
            few, many = (x, first) if before <= self.num_fields else (first, x)
            weighted = weight(many).unflatten(1, (-1, width))
            x = torch.bmm(few.unsqueeze(1), weighted).squeeze(1)
            x = self.activation(x + self.biases[layer] if self.biases else x)
            outputs.append(x)
        return torch.cat(outputs, 1).unflatten(0, (-1, self.dim)).sum(1)


class CrossesAndDeep(nn.Module):
    """[B, F, D] -> [B, crosses + last width]: the crosses beside a plain MLP of the flattened fields.

    Args:
        crosses: the explicit interactions.
        deep: the MLP.

    Source: arXiv 1803.05170, section 3.3.
    """

    def __init__(self, crosses: CompressedInteractions, deep: MLP) -> None:
        super().__init__()
        self.crosses, self.deep = crosses, deep
        self.out_dim = crosses.out_dim + deep.out_dim
        self.flops = crosses.flops + deep.flops

    def forward(self, fields_BFD: Tensor) -> Tensor:
        return torch.cat([self.crosses(fields_BFD), self.deep(fields_BFD.flatten(1))], 1)


class CINExpert(Expert):
    """relu(MLP(CIN(x))); with `deep`, xDeepFM: relu(MLP([CIN(x), DNN(flatten(x))])).

    Args:
        num_fields: F.
        dim: D.
        out_dim: H.
        layers: vectors of every layer of the CIN.
        relu: after every layer of the CIN.
        bias: in every layer of the CIN; a run whose checkpoint has none is read with `bias: false`.
        deep: widths of a plain DNN beside the CIN; empty = none.
        hidden: widths of hidden layers before the last one.
        dropout: in [0, 1), in the DNN and in the MLP.

    Raises:
        ValueError: see `CompressedInteractions`; a width of `deep` < 1.

    Source: see `CompressedInteractions`; layers (16, 16) as in the code of arXiv 2310.04400.
    """

    def __init__(
        self,
        num_fields: int,
        dim: int,
        out_dim: int,
        *,
        layers: Sequence[int] = (16, 16),
        relu: bool = True,
        bias: bool = True,
        deep: Sequence[int] = (),
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        crosses = CompressedInteractions(num_fields, dim, layers, relu=relu, bias=bias)
        parts = CrossesAndDeep(crosses, MLP(num_fields * dim, deep, dropout=dropout)) if deep else crosses
        super().__init__(parts, parts.out_dim, out_dim, hidden=hidden, dropout=dropout, interaction_flops=parts.flops)
