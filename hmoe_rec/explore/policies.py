"""Mean and variance of the logits of a request's candidates [B, A] -> which one is shown, and how likely that was.

For ranking only: what is billed, logged and calibrated stays the mean. Letters of shapes: B requests, A candidates.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from hmoe_rec.explore.highest_draw import probability_of_highest


class Choice(NamedTuple):
    """Candidates that are shown [B] int64, and the probability that this policy shows that one [B]."""

    actions_B: Tensor
    propensity_B: Tensor


class Policy(ABC):
    """Candidates that do not exist have mean -inf; every request has at least one that exists.

    A generator is on the device of the means.
    """

    @abstractmethod
    def scores(self, mean_BA: Tensor, variance_BA: Tensor, generator: torch.Generator) -> Tensor:
        """[B, A] to rank by; drawn anew at each call where the policy is random."""

    @abstractmethod
    def propensities(self, mean_BA: Tensor, variance_BA: Tensor) -> Tensor:
        """P(candidate is shown) [B, A]; rows sum to 1."""

    def choose(self, mean_BA: Tensor, variance_BA: Tensor, generator: torch.Generator) -> Tensor:
        """The best one by score [B]; of equal scores each is as likely."""
        return _random_best(self.scores(mean_BA, variance_BA, generator), generator)

    def choose_and_tell(self, mean_BA: Tensor, variance_BA: Tensor, generator: torch.Generator) -> Choice:
        """For logs that other policies shall be judged from later."""
        actions_B = self.choose(mean_BA, variance_BA, generator)
        propensities_BA = self.propensities(mean_BA, variance_BA)
        return Choice(actions_B, propensities_BA.gather(1, actions_B.unsqueeze(1)).squeeze(1))


class Greedy(Policy):
    """The highest mean: no exploration. Its propensities are 0 or 1, so that its log tells of no other policy."""

    def scores(self, mean_BA: Tensor, variance_BA: Tensor, generator: torch.Generator) -> Tensor:
        return mean_BA

    def propensities(self, mean_BA: Tensor, variance_BA: Tensor) -> Tensor:
        return _even_over_best(mean_BA)


class EpsilonGreedy(Policy):
    """With probability epsilon any candidate, else the highest mean.

    Args:
        epsilon: in [0, 1].
    """

    def __init__(self, *, epsilon: float = 0.05) -> None:
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon must be in [0, 1], got {epsilon}")
        self.epsilon = epsilon

    def scores(self, mean_BA: Tensor, variance_BA: Tensor, generator: torch.Generator) -> Tensor:
        any_BA = torch.rand(mean_BA.shape, generator=generator, dtype=mean_BA.dtype, device=mean_BA.device)
        any_BA = any_BA.masked_fill(mean_BA == -torch.inf, -torch.inf)
        explores_B1 = torch.rand((len(mean_BA), 1), generator=generator, device=mean_BA.device) < self.epsilon
        return torch.where(explores_B1, any_BA, mean_BA)

    def propensities(self, mean_BA: Tensor, variance_BA: Tensor) -> Tensor:
        exists_BA = (mean_BA > -torch.inf).to(mean_BA.dtype)
        even_BA = exists_BA / exists_BA.sum(1, keepdim=True)
        return self.epsilon * even_BA + (1 - self.epsilon) * _even_over_best(mean_BA)


class UCB(Policy):
    """The highest mean + kappa std: what could be good is shown until it is known. Deterministic, as `Greedy`.

    Args:
        kappa: >= 0; 0 is greedy.
    """

    def __init__(self, *, kappa: float = 1.0) -> None:
        if kappa < 0:
            raise ValueError(f"kappa must be >= 0, got {kappa}")
        self.kappa = kappa

    def scores(self, mean_BA: Tensor, variance_BA: Tensor, generator: torch.Generator) -> Tensor:
        return mean_BA + self.kappa * variance_BA.sqrt()

    def propensities(self, mean_BA: Tensor, variance_BA: Tensor) -> Tensor:
        return _even_over_best(mean_BA + self.kappa * variance_BA.sqrt())


class Thompson(Policy):
    """The highest draw from N(mean, scale^2 variance), drawn for every candidate apart.

    Args:
        scale: >= 0, of the standard deviation; 0 is greedy, below 1 explores less.

    Source: Thompson 1933; on the logit with a Gaussian posterior: Chapelle and Li, NIPS 2011, whose alpha is `scale`.
    Draws that are independent over candidates, not one draw of the weights for all: ours.
    """

    def __init__(self, *, scale: float = 1.0) -> None:
        if scale < 0:
            raise ValueError(f"scale must be >= 0, got {scale}")
        self.scale = scale

    def scores(self, mean_BA: Tensor, variance_BA: Tensor, generator: torch.Generator) -> Tensor:
        noise_BA = torch.randn(mean_BA.shape, generator=generator, dtype=torch.float64, device=mean_BA.device)
        return mean_BA.double() + self.scale * variance_BA.double().sqrt() * noise_BA

    def propensities(self, mean_BA: Tensor, variance_BA: Tensor) -> Tensor:
        """P(a has the highest draw), float64; see `probability_of_highest`."""
        exists_BA = mean_BA > -torch.inf
        std_BA = self.scale * variance_BA.double().sqrt()
        return probability_of_highest(mean_BA.double(), std_BA.masked_fill(~exists_BA, 0.0))


def _random_best(scores_BA: Tensor, generator: torch.Generator) -> Tensor:
    best_BA = scores_BA == scores_BA.amax(1, keepdim=True)
    order_BA = torch.rand(scores_BA.shape, generator=generator, device=scores_BA.device)
    return torch.where(best_BA, order_BA, -math.inf).argmax(1)


def _even_over_best(scores_BA: Tensor) -> Tensor:
    best_BA = (scores_BA == scores_BA.amax(1, keepdim=True)).to(scores_BA.dtype)
    return best_BA / best_BA.sum(1, keepdim=True)
