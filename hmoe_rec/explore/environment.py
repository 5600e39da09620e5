r"""A simulated market of ads whose click model is known: ads come and go, some are better than they look.

A request has a context x ~ N(0, I) of `context_dim` numbers and `candidates` of the `live` ads, drawn evenly. An ad has
known content c ~ N(0, I) of `content_dim` numbers and a quality u ~ N(0, `quality_std`^2) that only clicks tell. Then

.. math:: P(click) = \sigma(b + \mathrm{affinity} \cdot x^T W c / \sqrt{d_x d_c} + w^T c / \sqrt{d_c} + u)

with W, w ~ N(0, I) drawn once. Each round `arrivals` ads, drawn evenly, make place for new ones. What is drawn does not
depend on what is shown: policies with one seed meet the same requests, and a click that would happen for one of them
happens for the other. All of it is ours: no source publishes a market.

Letters of shapes: B requests of a round, A candidates, S places of live ads, X context, C content, P features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Market:
    """Sizes and strengths.

    Attributes:
        rounds: batches of requests; the policy learns between them.
        requests: of a round.
        arrivals: ads that leave and come in a round; an ad lives for live / arrivals rounds on average.
        base_logit: b.
    """

    rounds: int = 150
    requests: int = 200
    candidates: int = 10
    live: int = 30
    arrivals: int = 1
    context_dim: int = 3
    content_dim: int = 4
    affinity: float = 1.0
    quality_std: float = 1.0
    base_logit: float = -4.0


@dataclass(frozen=True)
class Requests:
    """A round.

    Attributes:
        features_BAP: what a learner may know: 1, content, context x content, and which place of the S the ad has.
        places_BA: the places; the features of place s end with a one at -S + s.
        probability_BA: true click probabilities.
        age_BA: rounds since the ad came; a large number for ads that were there at the start.
        uniform_B: the request ends in a click where this number is below the probability of what is shown.
    """

    features_BAP: Tensor
    places_BA: Tensor
    probability_BA: Tensor
    age_BA: Tensor
    uniform_B: Tensor


class Environment:
    """Everything that a seed decides.

    Attributes:
        num_features: P.
    """

    def __init__(self, market: Market, seed: int) -> None:
        self.market, m = market, market
        self.generator = torch.Generator().manual_seed(seed)
        self.affinity_XC = self._normal(m.context_dim, m.content_dim)
        self.affinity_XC = m.affinity * self.affinity_XC / (m.context_dim * m.content_dim) ** 0.5
        self.taste_C = self._normal(m.content_dim) / m.content_dim**0.5
        self.content_SC, self.quality_S = self._new_ads(m.live)
        self.age_S = torch.full((m.live,), 1 << 30)
        self.num_features = 1 + m.content_dim * (1 + m.context_dim) + m.live

    def replace_ads(self) -> Tensor:
        """The next round's coming and going: -> the places that new ads have taken, as indices of features."""
        m = self.market
        self.age_S += 1
        places = torch.randperm(m.live, generator=self.generator)[: m.arrivals]
        self.content_SC[places], self.quality_S[places] = self._new_ads(m.arrivals)
        self.age_S[places] = 0
        return self.num_features - m.live + places

    def requests(self) -> Requests:
        """A round of requests to the ads that are there."""
        m = self.market
        contexts_BX = self._normal(m.requests, m.context_dim)
        order = torch.rand(m.requests, m.live, generator=self.generator).argsort(1)
        places_BA = order[:, : m.candidates]
        content_BAC = self.content_SC[places_BA]
        crossed_BAXC = contexts_BX[:, None, :, None] * content_BAC[:, :, None, :]
        shared_BA = (crossed_BAXC * self.affinity_XC).sum((2, 3)) + content_BAC @ self.taste_C
        which_BAS = torch.nn.functional.one_hot(places_BA, m.live).double()
        parts = [torch.ones_like(content_BAC[..., :1]), content_BAC, crossed_BAXC.flatten(2), which_BAS]
        probability_BA = (m.base_logit + shared_BA + self.quality_S[places_BA]).sigmoid()
        uniform_B = torch.rand(m.requests, generator=self.generator, dtype=torch.float64)
        return Requests(torch.cat(parts, 2), places_BA, probability_BA, self.age_S[places_BA], uniform_B)

    def _new_ads(self, count: int) -> tuple[Tensor, Tensor]:
        """-> content [count, C] and quality [count]."""
        return self._normal(count, self.market.content_dim), self.market.quality_std * self._normal(count)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)
