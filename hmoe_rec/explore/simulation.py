"""A policy, a learner and an environment -> clicks and regret, round by round.

Each round the policy sees the learner's means and variances, one ad per request is shown, and its click reaches the
learner `delay` rounds later, with its whole batch, as logs reach a trainer.
"""

from collections import deque
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hmoe_rec.explore.environment import Environment, Requests
from hmoe_rec.explore.policies import Policy


class Learner(Protocol):
    """`hmoe_rec.uncertainty.logistic.BayesianLogistic`, or anything else that learns and knows how sure it is."""

    def update(self, features_BP: Tensor, labels_B: Tensor) -> None: ...

    def forget(self, places: Tensor) -> None:
        """Another ad has these places among the features from now on."""
        ...

    def moments(self, features_BP: Tensor) -> tuple[Tensor, Tensor]:
        """[..., P] -> mean and variance of the logit [...]."""
        ...


class History(NamedTuple):
    """Of every round, float64 [R]; regret = true probability of the best candidate - that of the one shown, summed.

    Attributes:
        cold_regret: of requests whose best candidate came less than `cold_rounds` rounds ago.
        cold_requests: their number.
        cold_shown: requests to which an ad was shown that came less than `cold_rounds` rounds ago.
    """

    regret: Tensor
    clicks: Tensor
    cold_regret: Tensor
    cold_requests: Tensor
    cold_shown: Tensor


def simulate(
    environment: Environment,
    policy: Policy,
    learner: Learner,
    *,
    seed: int,
    delay: int = 1,
    cold_rounds: int = 10,
    warm_rounds: int = 10,
) -> History:
    """
    Args:
        environment: a new one.
        seed: of the policy's random choices.
        delay: rounds until the clicks of a round are learned from, >= 1. Those of ads that have gone are lost then.
        warm_rounds: rounds before the first one, in which ads are shown at random and none comes: a system that
            runs already, the same for every policy. Not in the history.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(warm_rounds):
        requests = environment.requests()
        learner.update(*_show(requests, torch.zeros(len(requests.uniform_B), dtype=torch.int64)))
    waiting: deque[tuple[Tensor, Tensor]] = deque()
    rows = []
    for _ in range(environment.market.rounds):
        places = environment.replace_ads()
        learner.forget(places)
        waiting = deque(_without(batch, places) for batch in waiting)
        requests = environment.requests()
        shown_B = policy.choose(*learner.moments(requests.features_BAP), generator)
        batch = _show(requests, shown_B)
        rows.append(_account(requests, shown_B, batch[1], cold_rounds))
        waiting.append(batch)
        if len(waiting) >= delay:
            learner.update(*waiting.popleft())
    return History(*torch.tensor(rows, dtype=torch.float64).T)


def _show(requests: Requests, shown_B: Tensor) -> tuple[Tensor, Tensor]:
    """-> features of what is shown [B, P], clicks [B]. Candidates stand in random order."""
    rows = torch.arange(len(shown_B))
    clicks_B = (requests.uniform_B < requests.probability_BA[rows, shown_B]).double()
    return requests.features_BAP[rows, shown_B], clicks_B


def _account(requests: Requests, shown_B: Tensor, clicks_B: Tensor, cold_rounds: int) -> list[float]:
    rows = torch.arange(len(shown_B))
    best = requests.probability_BA.max(1)
    lost_B = best.values - requests.probability_BA[rows, shown_B]
    cold_BA = requests.age_BA < cold_rounds
    cold_B = cold_BA[rows, best.indices]
    sums = lost_B.sum(), clicks_B.sum(), lost_B[cold_B].sum(), cold_B.sum(), cold_BA[rows, shown_B].sum()
    return [float(x) for x in sums]


def _without(batch: tuple[Tensor, Tensor], gone: Tensor) -> tuple[Tensor, Tensor]:
    """What was not about ads whose places, given as indices of features, are taken."""
    features_BP, clicks_B = batch
    stays_B = (features_BP[:, gone] == 0).all(1)
    return features_BP[stays_B], clicks_B[stays_B]
