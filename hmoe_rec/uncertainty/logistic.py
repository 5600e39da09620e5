"""Features and labels batch after batch -> the posterior of a logistic regression's weights. Small and exact enough to
simulate with: P weights cost P^2 numbers and P^3 products a batch."""

import torch
from torch import Tensor

from hmoe_rec.uncertainty.moments import Moments


class BayesianLogistic:
    r"""Gaussian posterior N(m, Lambda^-1) of the weights; each batch updates it, the posterior before is the prior now.

    .. math:: m' = \arg\min_w \tfrac12 (w - m)^T \Lambda (w - m) + \sum_n \log(1 + e^{-(2 y_n - 1) w^T f_n}), \qquad
              \Lambda' = \Lambda + \sum_n p_n (1 - p_n) f_n f_n^T

    with p_n at m', which Newton's method finds.

    Args:
        dim: P.
        prior_precision: one over the variance of a weight that no example speaks of, > 0; a number or [P].

    Source: Chapelle and Li, "An Empirical Evaluation of Thompson Sampling", NIPS 2011, algorithm 3, with the full
    precision matrix in place of its diagonal.
    """

    def __init__(self, dim: int, *, prior_precision: float | Tensor = 1.0) -> None:
        diagonal = torch.as_tensor(prior_precision, dtype=torch.float64).expand(dim)
        if not bool((diagonal > 0).all()):
            raise ValueError(f"prior_precision must be positive, got {prior_precision}")
        self.prior_precision = diagonal.clone()
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.precision = torch.diag(diagonal)
        self._covariance: Tensor | None = None

    def update(self, features_BP: Tensor, labels_B: Tensor, *, steps: int = 25, tolerance: float = 1e-9) -> None:
        """Adds a batch; B may be 0.

        Args:
            steps: of Newton's method, at the most.
            tolerance: it stops where no weight moves by more.
        """
        before, prior = self.mean, self.precision
        mean, hessian = before, prior
        for _ in range(steps):
            p_B = (features_BP @ mean).sigmoid()
            gradient = prior @ (mean - before) + features_BP.T @ (p_B - labels_B)
            hessian = prior + (features_BP * (p_B * (1 - p_B)).unsqueeze(1)).T @ features_BP
            step = torch.linalg.solve(hessian, gradient)
            # Without a limit Newton's method can run away from a start where all p are near 0 or 1.
            mean = mean - step * min(1.0, 5.0 / float(step.norm().clamp(min=1e-300)))
            if float(step.abs().max()) <= tolerance:
                break
        p_B = (features_BP @ mean).sigmoid()
        self.precision = prior + (features_BP * (p_B * (1 - p_B)).unsqueeze(1)).T @ features_BP
        self.mean, self._covariance = mean, None

    def forget(self, places: Tensor) -> None:
        """Weights whose place is taken by something new start from the prior again, what the others know stays.

        Args:
            places: int64, indices into the weights.
        """
        covariance = self.covariance().clone()
        covariance[places] = 0
        covariance[:, places] = 0
        covariance[places, places] = 1 / self.prior_precision[places]
        self.mean = self.mean.index_fill(0, places, 0.0)
        self.precision, self._covariance = torch.linalg.inv(covariance), covariance

    def covariance(self) -> Tensor:
        """[P, P]."""
        covariance = torch.linalg.inv(self.precision) if self._covariance is None else self._covariance
        self._covariance = covariance
        return covariance

    def moments(self, features_BP: Tensor) -> Moments:
        """[..., P] -> mean and variance of the logit [...]."""
        variance = ((features_BP @ self.covariance()) * features_BP).sum(-1)
        return Moments(features_BP @ self.mean, variance.clamp(min=0))
