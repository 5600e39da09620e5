r"""Features and curvatures of all examples -> the Gaussian posterior of a last layer -> the variance of a logit.

For weights beta with prior N(0, I / lambda) and logit beta^T f the Laplace approximation has the precision matrix

.. math:: \Lambda = \lambda I + \sum_n c_n f_n f_n^T, \qquad \mathrm{Var}(z(f)) = f^T \Lambda^{-1} f

with c = w p (1 - p) for a logistic label of example weight w (c = 1 / s^2 for a Gaussian label of noise s: then it is
exact). The sum does not depend on the order of the examples and adds up over processes.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hmoe_rec.losses.bce import observed_weights
from hmoe_rec.metrics.exchange import all_reduced


class LastLayerPosterior:
    """One precision matrix per task, in float64.

    Args:
        dims: P of each task's last layer.
        prior_precision: lambda > 0: one over the variance of a weight that no example speaks of.
        device: where the sums live.

    Raises:
        ValueError: a prior precision that is not positive.

    Source: last-layer Laplace: Daxberger et al., "Laplace Redux", NeurIPS 2021, arXiv 2106.14806; of random features:
    Liu et al., arXiv 2006.10108, equation 9. Its use for exploration in ads, and `decay`: ours.
    """

    def __init__(
        self, dims: Sequence[int], *, prior_precision: float = 1.0, device: torch.device | str | None = None
    ) -> None:
        if prior_precision <= 0:
            raise ValueError(f"prior_precision must be positive, got {prior_precision}")
        self.prior_precision = prior_precision
        self.sums = [torch.zeros(d, d, dtype=torch.float64, device=device) for d in dims]
        self._axes: list[tuple[Tensor, Tensor]] | None = None

    @torch.no_grad()
    def update(self, features: Sequence[Tensor], curvature_BT: Tensor, *, decay: float = 1.0) -> None:
        """Adds a batch.

        Args:
            features: per task [B, P].
            curvature_BT: c >= 0; 0 where the example has no label.
            decay: what was added before counts that much from now on, in (0, 1]; below 1 old examples fade, for
                streams whose truth moves.
        """
        for sums, f_BP, c_B in zip(self.sums, features, curvature_BT.double().unbind(1), strict=True):
            f_BP = f_BP.double()
            sums.mul_(decay).addmm_((f_BP * c_B.unsqueeze(1)).T, f_BP)
        self._axes = None

    def reduce_(self, process_group: dist.ProcessGroup | None = None) -> None:
        """The sums of all processes on each of them. A collective call; once, when all batches are in."""
        self.sums = [all_reduced(sums, dist.ReduceOp.SUM, process_group) for sums in self.sums]
        self._axes = None

    def precision(self, t: int) -> Tensor:
        """[P, P]."""
        sums = self.sums[t]
        return sums + self.prior_precision * torch.eye(len(sums), dtype=sums.dtype, device=sums.device)

    @torch.no_grad()
    def variance(self, features: Sequence[Tensor]) -> Tensor:
        """Per task [B, P] -> variances of the logits [B, T], float64."""
        if self._axes is None:
            # Not by Cholesky: of correlated features the sums are singular but for the prior, which may be too small.
            self._axes = [torch.linalg.eigh(sums) for sums in self.sums]
        columns = [
            ((f_BP.double() @ vectors_PP).square() / (values_P.clamp(min=0) + self.prior_precision)).sum(1)
            for (values_P, vectors_PP), f_BP in zip(self._axes, features, strict=True)
        ]
        return torch.stack(columns, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Number of the task -> the sum over the examples, without the prior."""
        return {str(t): sums for t, sums in enumerate(self.sums)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.sums = [state[str(t)].to(sums) for t, sums in enumerate(self.sums)]
        self._axes = None


def logistic_curvature(logits_BT: Tensor, labels_BT: Tensor, weights: Tensor) -> Tensor:
    """w p (1 - p) [B, T], the second derivative of the log loss by the logit; 0 where the label is missing."""
    p_BT = logits_BT.double().sigmoid()
    return observed_weights(labels_BT, weights).double() * p_BT * (1 - p_BT)
