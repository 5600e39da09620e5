"""P(a candidate's draw is the highest): against a naive integral, closed forms and draws, for deviations that differ by
orders; and logs of such choices judged without bias."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hmoe_rec.explore import highest_draw
from hmoe_rec.explore.environment import Environment, Market
from hmoe_rec.explore.highest_draw import probability_of_highest
from hmoe_rec.explore.off_policy import OffPolicySums
from hmoe_rec.explore.policies import Thompson


def naive(mean_A: Tensor, std_A: Tensor) -> Tensor:
    """One integral per candidate over its own draw, every product written out. Deviations are above 0."""
    z_N = torch.linspace(-9, 9, 180_001, dtype=torch.float64)
    density_N = torch.exp(-(z_N**2) / 2) / (2 * np.pi) ** 0.5
    result = []
    for a in range(len(mean_A)):
        below_N = torch.zeros_like(z_N)
        for b in range(len(mean_A)):
            if b != a:
                below_N += torch.special.log_ndtr((mean_A[a] + std_A[a] * z_N - mean_A[b]) / std_A[b])
        result.append(torch.trapezoid(density_N * below_N.exp(), z_N))
    return torch.stack(result)


def hostile(case: str, a: int, seed: int) -> tuple[Tensor, Tensor]:
    """Means and deviations [1, A]."""
    generator = torch.Generator().manual_seed(seed)
    u_A, v_A = torch.rand(2, a, generator=generator, dtype=torch.float64)
    if case == "new":  # one that nobody knows among many that all know
        std_A = torch.full((a,), 0.003, dtype=torch.float64)
        std_A[0], u_A = 1.0, -4 + u_A / 2
        u_A[0] = -4.5
    elif case == "ladder":
        std_A = 4.0 ** -(torch.arange(a, dtype=torch.float64) % 6)
        u_A = std_A * (u_A - 0.5)
    elif case == "equal":
        std_A, u_A = torch.full((a,), 0.3, dtype=torch.float64), torch.full((a,), 7.0, dtype=torch.float64)
    elif case == "far":  # a narrow one far from 0, beside one that seldom reaches it
        std_A, u_A = 10 ** (-3 * v_A), 1e3 + u_A
    else:
        std_A, u_A = v_A + 0.05, 3 * u_A
    return u_A[None], std_A[None]


@pytest.mark.parametrize("case", ["new", "ladder", "equal", "far", "plain"])
@pytest.mark.parametrize("a", [2, 3, 7])
def test_it_is_the_naive_integral(case, a):
    mean_BA, std_BA = hostile(case, a, seed=a)
    found = probability_of_highest(mean_BA, std_BA)[0]
    expected = naive(mean_BA[0], std_BA[0])
    assert expected.sum().item() == pytest.approx(1, abs=1e-6) and found.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("case", ["new", "ladder", "plain"])
@pytest.mark.parametrize("a", [2, 40])
def test_it_is_how_often_thompson_chooses(case, a):
    """Within 2 % or four standard errors, whichever is more, of everything above 1e-3."""
    mean_BA, std_BA = hostile(case, a, seed=3)
    draws, chunk = 400_000, 100_000
    policy, generator = Thompson(), torch.Generator().manual_seed(5)
    counts_A = torch.zeros(a, dtype=torch.float64)
    for _ in range(draws // chunk):
        many = mean_BA.expand(chunk, a), std_BA.square().expand(chunk, a)
        counts_A += policy.choose(*many, generator).bincount(minlength=a)
    found_A = policy.propensities(mean_BA, std_BA.square())[0]
    error_A = (found_A * (1 - found_A) / draws).sqrt()
    seen = found_A > 1e-3
    assert seen.any()
    assert ((counts_A / draws - found_A).abs() <= torch.maximum(0.02 * found_A, 4 * error_A))[seen].all()


@pytest.mark.parametrize("a", [2, 30, 1000])
def test_equal_candidates_are_as_likely(a):
    ones = torch.ones(2, a, dtype=torch.float64)
    torch.testing.assert_close(probability_of_highest(4 * ones, 1e-5 * ones), ones / a, rtol=1e-10, atol=0)


def test_one_that_nobody_knows_among_a_thousand():
    """The others are steps at one place, so that it is Phi of how far it must reach."""
    mean_BA = torch.zeros(3, 1000, dtype=torch.float64)
    mean_BA[:, 0] = torch.tensor([-1.0, -3.0, 0.5])
    std_BA = torch.full_like(mean_BA, 1e-7)
    std_BA[:, 0] = 1.0
    expected = torch.special.log_ndtr(mean_BA[:, 0]).exp()
    torch.testing.assert_close(probability_of_highest(mean_BA, std_BA)[:, 0], expected, rtol=1e-5, atol=0)


def test_candidates_without_deviation_are_steps_that_share_their_part():
    inf = torch.inf
    mean = torch.tensor([[1.0, 1.0, 0.5, 0.0, -inf], [2.0, 2.0, 1.0, 0.0, -inf], [3.0, -inf, -inf, -inf, -inf]])
    std = torch.tensor([[0.0, 0.0, 0.0, 2.0, 0.0], [0.0, 1e-9, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0, 0.0]])
    above = float(torch.special.log_ndtr(torch.tensor(-0.5, dtype=torch.float64)).exp())
    expected = torch.tensor([[(1 - above) / 2, (1 - above) / 2, 0, above, 0], [0.5, 0.5, 0, 0, 0], [1, 0, 0, 0, 0]])
    torch.testing.assert_close(probability_of_highest(mean, std), expected.double(), rtol=1e-6, atol=1e-15)


def test_requests_in_chunks_say_the_same(monkeypatch):
    mean_BA = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std_BA = mean_BA.flip(0).abs()
    whole = probability_of_highest(mean_BA, std_BA)
    monkeypatch.setattr(highest_draw, "_ELEMENTS", 2 * 3 * 256)
    torch.testing.assert_close(probability_of_highest(mean_BA, std_BA), whole, rtol=1e-7, atol=1e-12)
    assert probability_of_highest(mean_BA[:0], std_BA[:0]).shape == (0, 3)


def test_float32_beliefs_are_chosen_as_told():
    """Deviations below the grain of a float32 logit still tell two ads apart."""
    mean_BA, variance_BA = torch.full((1, 3), -8.0), torch.tensor([[1e-14, 1e-14, 4e-14]])
    shown = Thompson().choose(
        mean_BA.expand(60_000, 3), variance_BA.expand(60_000, 3), torch.Generator().manual_seed(1)
    )
    frequencies = shown.bincount(minlength=3) / 60_000
    torch.testing.assert_close(
        frequencies.double(), Thompson().propensities(mean_BA, variance_BA)[0], atol=0.01, rtol=0
    )


@pytest.mark.parametrize(
    "market, behind",
    [
        (Market(rounds=30, requests=400, candidates=5, live=8), 1.0),
        (Market(rounds=1, requests=120_000, candidates=2, live=2, affinity=0.0, base_logit=0.0), 3.3),  # one request
    ],
)
def test_a_log_of_new_ads_among_known_ones_is_judged_without_bias(market, behind):
    """Each round brings an ad that nobody knows, believed to be `behind` the best; all others are known to .003.
    Thompson shows and tells. IPS of a policy that shows the newest, and its mean weight, are within three standard
    errors of the truth, which the market knows."""
    environment, generator = Environment(market, 1), torch.Generator().manual_seed(2)
    sums, true = OffPolicySums(), []
    for _ in range(market.rounds):
        environment.replace_ads()
        requests = environment.requests()
        new_BA = requests.age_BA == 0
        known_BA = requests.probability_BA.logit()
        best_B1 = known_BA.masked_fill(new_BA, -torch.inf).amax(1, keepdim=True)
        mean_BA, variance_BA = torch.where(new_BA, best_B1 - behind, known_BA), torch.where(new_BA, 1.5**2, 0.003**2)
        actions_B, propensity_B = Thompson().choose_and_tell(mean_BA, variance_BA, generator)
        q_BA = Thompson().propensities(mean_BA, variance_BA)
        q_BA = torch.where(new_BA.any(1, keepdim=True), new_BA.double(), q_BA)
        shown_B1 = actions_B.unsqueeze(1)
        reward_B = (requests.uniform_B < requests.probability_BA.gather(1, shown_B1).squeeze(1)).double()
        true.append((q_BA * requests.probability_BA).sum(1))
        sums.add(reward_B.numpy(), propensity_B.numpy(), q_BA.gather(1, shown_B1).squeeze(1).numpy())
    ips, weight = sums.values()["ips"], sums.diagnosis()["mean_weight"]
    assert abs(ips.value - float(torch.cat(true).mean())) < 3 * ips.std_error
    n, squares = sums.sums["n"], sums.sums["w2"]
    assert abs(weight - 1) < 3 * ((squares / n - weight**2) / n) ** 0.5
