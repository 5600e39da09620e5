"""DIN: every behavior weighted by a small MLP on the behavior and the target, then summed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hmoe_rec.encoding.pooling import Attention, Interest, Pooling, attention_weights


class DIN(Pooling):
    r"""Deep Interest Network's local activation unit, without any order or time of the behaviors.

    .. math:: u = \sum_i \mathrm{MLP}([e_i, v, e_i - v, e_i * v])\, e_i

    The weights are not normalized, so that u keeps the intensity of an interest: many alike behaviors add up. An empty
    history gives the zero vector. The first layer is split by its inputs, which halves the concatenation:

    .. math:: W [e, v, e - v, e * v] = (W_1 + W_3) e + (W_2 - W_3) v + W_4 (e * v)

    Args:
        hidden: widths of the MLP's hidden layers; at least one.
        softmax: normalize the weights over the history, after a division by sqrt(d), as the authors' public code does.

    Raises:
        ValueError: no hidden layer, or one of width < 1.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978, eq. 3.
    Inputs, widths and the sigmoid after each hidden layer are those of the public code; the paper draws PReLU or Dice,
    and Dice would need statistics over real behaviors only.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        has_ages: bool,
        *,
        hidden: Sequence[int] = (80, 40),
        softmax: bool = False,
    ) -> None:
        super().__init__(dim, max_length, has_ages)
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden must hold at least one width, all >= 1, got {list(hidden)}")
        self.softmax = softmax
        self.first = nn.Linear(4 * dim, hidden[0])
        layers: list[nn.Module] = []
        for in_dim, out_dim in zip(hidden, [*hidden[1:], 1], strict=True):
            layers += [nn.Sigmoid(), nn.Linear(in_dim, out_dim)]
        self.rest = nn.Sequential(*layers)

    def forward(self, behaviors_BLD: Tensor, target_BD: Tensor, mask_BL: Tensor, ages_BL: Tensor | None) -> Interest:
        weights_BL = self._unit(behaviors_BLD, target_BD)
        if self.softmax:
            weights_BL = attention_weights(weights_BL / math.sqrt(self.dim), mask_BL)
        else:
            weights_BL = weights_BL * mask_BL
        u_BD = (weights_BL.unsqueeze(1) @ behaviors_BLD).squeeze(1)
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
        """The activation unit's output as the logit; it reads the whole width, whatever `dims`."""
        norms_BL = behaviors_BLD[..., dims].norm(dim=2)
        return Attention(self._unit(behaviors_BLD, target_BD) * mask_BL, norms_BL * mask_BL)

    def _unit(self, behaviors_BLD: Tensor, target_BD: Tensor) -> Tensor:
        """[B, L]. U: units of the first hidden layer."""
        weight_U4D = self.first.weight.unflatten(1, (4, self.dim))
        of_target_UD = weight_U4D[:, 1] - weight_U4D[:, 2]
        of_behavior_U2D = torch.cat([weight_U4D[:, 0] + weight_U4D[:, 2], weight_U4D[:, 3]], 1)
        pairs_BL2D = torch.cat([behaviors_BLD, behaviors_BLD * target_BD.unsqueeze(1)], 2)
        h_BLU = linear(pairs_BL2D, of_behavior_U2D) + linear(target_BD, of_target_UD, self.first.bias).unsqueeze(1)
        return self.rest(h_BLU).squeeze(2)
