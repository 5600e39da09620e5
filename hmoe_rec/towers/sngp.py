"""What each task mixed [T][B, H] -> logits [B, T] of towers that keep distances and end in a Gaussian process."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmoe_rec.layers import module_dict
from hmoe_rec.towers.base import TaskTowers


class SpectralLinear(nn.Linear):
    r"""A linear layer whose weight is scaled down to a spectral norm of at most `bound`.

    .. math:: W' = W \cdot \min(1, c / \hat\sigma), \qquad \hat\sigma = u^T W v

    with u, v from one step of power iteration a training step, which goes on from the step before.

    Source: Miyato et al., arXiv 1802.05957, algorithm 1; the bound c: Liu et al., arXiv 2006.10108, equation 8.
    """

    left_O: Tensor

    def __init__(self, in_dim: int, out_dim: int, *, bound: float) -> None:
        super().__init__(in_dim, out_dim)
        self.bound = bound
        self.register_buffer("left_O", F.normalize(torch.randn(out_dim), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.bounded(), self.bias)

    def bounded(self) -> Tensor:
        """W' [O, I]; in training mode after one more step of power iteration."""
        with torch.no_grad():
            right_I = F.normalize(self.weight.T @ self.left_O, dim=0)
            left_O = F.normalize(self.weight @ right_I, dim=0)
            if self.training:
                self.left_O.copy_(left_O)
        sigma = left_O @ self.weight @ right_I
        return self.weight * (self.bound / sigma.clamp(min=self.bound))


class RandomFeatures(nn.Module):
    r"""Features whose inner products are those of a Gaussian (RBF) kernel, in expectation.

    .. math:: \Phi(h) = \sqrt{2 / P}\,\cos(W h / \ell + b), \qquad W \sim N(0, 1),\ b \sim U(0, 2\pi)

    so that <Phi(h), Phi(h')> -> exp(-|h - h'|^2 / (2 l^2)). W and b are drawn once and never trained; l is relative to
    the root of the input's width, so that one value fits layers of any width (ours).

    Source: Rahimi and Recht, NIPS 2007; Liu et al., arXiv 2006.10108, equation 6.
    """

    projection_IP: Tensor
    phase_P: Tensor

    def __init__(self, in_dim: int, num_features: int, *, length_scale: float = 1.0) -> None:
        super().__init__()
        self.scale = math.sqrt(2.0 / num_features)
        self.register_buffer("projection_IP", torch.randn(in_dim, num_features) / (length_scale * math.sqrt(in_dim)))
        self.register_buffer("phase_P", torch.rand(num_features) * (2 * math.pi))

    def forward(self, h_BI: Tensor) -> Tensor:
        return torch.cos(h_BI @ self.projection_IP + self.phase_P) * self.scale


class SNGPTower(nn.Module):
    """One task's tower: hidden layers that keep distances, random features, a linear layer on them.

    A hidden layer is x + relu(W' x + b) where its width is that of its input, else relu(W' x + b).
    """

    def __init__(
        self,
        in_dim: int,
        hidden: Sequence[int],
        *,
        dropout: float,
        num_features: int,
        norm_bound: float,
        length_scale: float,
    ) -> None:
        super().__init__()
        widths = [in_dim, *hidden]
        self.layers = nn.ModuleList(
            SpectralLinear(i, o, bound=norm_bound) for i, o in zip(widths[:-1], widths[1:], strict=True)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(widths[-1], elementwise_affine=False)
        self.random = RandomFeatures(widths[-1], num_features, length_scale=length_scale)
        self.output = nn.Linear(num_features, 1)
        nn.init.normal_(self.output.weight, std=0.01)
        nn.init.zeros_(self.output.bias)

    def features(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            h = self.dropout(F.relu(layer(x)))
            x = x + h if h.shape[1] == x.shape[1] else h
        return self.random(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x))


class SNGPTowers(TaskTowers):
    """Spectral-normalized towers that end in a Gaussian process of random features.

    The logit is beta^T Phi(h) + a constant. Its variance needs the precision matrix of beta, which
    `hmoe-rec uncertainty fit RUN --kind sngp` sums up in one pass over the training data, at the weights of the
    checkpoint: equation 9 of the paper, exactly, where the paper adds it up during the last epoch, while beta still
    moves.

    Args:
        tasks: names.
        in_dims: width that each tower gets.
        hidden: widths of the hidden layers; equal ones are residual, as in the paper.
        dropout: in [0, 1).
        num_features: P, random features of a tower.
        norm_bound: c, spectral norm that a hidden layer has at most; > 0.
        length_scale: l, of the kernel, relative to the root of the width of the last hidden layer; > 0.

    Raises:
        ValueError: a number out of its range.

    Source: Liu et al., "Simple and Principled Uncertainty Estimation with Deterministic Deep Learning via Distance
    Awareness", NeurIPS 2020, arXiv 2006.10108. Ours: only the towers keep distances, the experts below do not; the
    constant, which starts the logit at the label rate; the length scale relative to the width.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        in_dims: Sequence[int],
        *,
        hidden: Sequence[int] = (64,),
        dropout: float = 0.0,
        num_features: int = 256,
        norm_bound: float = 0.95,
        length_scale: float = 1.0,
    ) -> None:
        super().__init__(tasks)
        if num_features < 1 or norm_bound <= 0 or length_scale <= 0:
            raise ValueError(
                "num_features must be at least 1, norm_bound and length_scale positive, got "
                f"{num_features}, {norm_bound} and {length_scale}"
            )
        options = {"num_features": num_features, "norm_bound": norm_bound, "length_scale": length_scale}
        towers = {
            task: SNGPTower(d, hidden, dropout=dropout, **options) for task, d in zip(tasks, in_dims, strict=True)
        }
        self.towers = module_dict("task", towers)

    def forward(self, mixed: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.towers[task](mixed[t]) for t, task in enumerate(self.tasks)], dim=1)

    def features(self, mixed: Sequence[Tensor]) -> list[Tensor]:
        """[T] of [B, P]: the random features of each tower."""
        return [tower.features(mixed[t]) for t, tower in enumerate(self._in_order())]

    @torch.no_grad()
    def shift(self, by: Mapping[str, float]) -> None:
        """Adds to the constant of each task's logit."""
        for task, tower in zip(self.tasks, self._in_order(), strict=True):
            tower.output.bias.add_(by[task])

    def _in_order(self) -> list[SNGPTower]:
        return [tower for task in self.tasks if isinstance(tower := self.towers[task], SNGPTower)]
