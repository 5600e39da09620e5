"""Policies: what they rank by, how often they choose what they say they choose, and candidates that are not there."""

import pytest
import torch

from hmoe_rec.explore import POLICIES
from hmoe_rec.explore.policies import UCB, EpsilonGreedy, Greedy, Policy, Thompson
from hmoe_rec.kinds import resolve

B, A, DRAWS = 4, 3, 60_000
MEAN = torch.tensor([[0.0, 1.0, 0.9], [2.0, -1.0, 2.0], [-3.0, -torch.inf, -2.5], [0.2, 0.1, 0.0]], dtype=torch.float64)
VARIANCE = torch.tensor([[0.5, 0.1, 0.2], [0.3, 9.0, 0.3], [1.0, 1.0, 0.01], [0.0, 0.25, 4.0]], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("policy", [UCB(kappa=0.0), Thompson(scale=0.0), EpsilonGreedy(epsilon=0.0)])
def test_without_exploration_all_are_greedy(policy):
    torch.testing.assert_close(policy.scores(MEAN, VARIANCE, generator()), MEAN)
    torch.testing.assert_close(policy.propensities(MEAN, VARIANCE), Greedy().propensities(MEAN, VARIANCE))


@pytest.mark.parametrize("policy", [Greedy(), EpsilonGreedy(epsilon=0.3), UCB(), Thompson(), Thompson(scale=0.5)])
def test_propensities_are_frequencies(policy: Policy):
    propensities = policy.propensities(MEAN, VARIANCE)
    torch.testing.assert_close(propensities.sum(1), torch.ones(B, dtype=torch.float64))
    many = MEAN.repeat(DRAWS, 1), VARIANCE.repeat(DRAWS, 1)
    shown = policy.choose(*many, generator()).view(DRAWS, B)
    frequencies = torch.stack([(shown == a).double().mean(0) for a in range(A)], 1)
    # the standard error of a frequency is at most .002
    torch.testing.assert_close(frequencies, propensities, atol=0.009, rtol=0)
    assert propensities[2, 1] == 0 and frequencies[2, 1] == 0, "a candidate that is not there is not shown"


def test_thompson_of_two_candidates_has_a_closed_form():
    mean, variance = torch.tensor([[0.3, 0.0]]).double(), torch.tensor([[0.5, 1.5]]).double()
    expected = torch.special.ndtr(torch.tensor(0.3 / (2.0**0.5), dtype=torch.float64))
    assert Thompson().propensities(mean, variance)[0, 0].item() == pytest.approx(float(expected), abs=1e-3)


def test_thompson_knows_the_probability_of_what_it_seldom_shows():
    """Closed form for two: Phi(-gap / sqrt(v + w)). A log with propensity 0 of what was shown cannot be judged."""
    gap = torch.tensor([2.0, 3.0, 3.6, 4.5, 5.5], dtype=torch.float64)
    for v, w in ((1e-4, 1.0), (1.0, 1e-4), (0.3, 0.7), (0.0, 1.0)):
        mean, variance = torch.stack([gap, 0 * gap], 1), torch.tensor([[v, w]]).double().expand(5, 2)
        expected = torch.special.ndtr(-gap / (v + w) ** 0.5)
        torch.testing.assert_close(Thompson().propensities(mean, variance)[:, 1], expected, rtol=0.15, atol=0)
    many = torch.tensor([[3.6, 0.0]]).double().expand(50_000, 2), torch.tensor([[0.0, 1.0]]).double().expand(50_000, 2)
    actions = Thompson().choose(*many, generator())
    assert actions.sum() > 0 and Thompson().propensities(many[0][:1], many[1][:1])[0, 1] > 0


def test_ucb_prefers_what_is_not_known():
    mean, variance = torch.tensor([[0.5, 0.0]]), torch.tensor([[0.01, 1.0]])
    assert UCB(kappa=1.0).choose(mean, variance, generator()).item() == 1
    assert UCB(kappa=0.1).choose(mean, variance, generator()).item() == 0


def test_a_choice_comes_with_its_probability():
    actions_B, propensity_B = EpsilonGreedy(epsilon=0.3).choose_and_tell(MEAN, VARIANCE, generator(2))
    everything = EpsilonGreedy(epsilon=0.3).propensities(MEAN, VARIANCE)
    assert propensity_B.tolist() == [everything[b, actions_B[b]].item() for b in range(B)]


def test_policies_have_names_and_refuse_numbers_out_of_range():
    assert {resolve(name, POLICIES) for name in POLICIES} == {Greedy, EpsilonGreedy, UCB, Thompson}
    for policy, options in ((EpsilonGreedy, {"epsilon": 1.1}), (UCB, {"kappa": -1.0}), (Thompson, {"scale": -1.0})):
        with pytest.raises(ValueError, match="must be"):
            policy(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [Greedy(), EpsilonGreedy(epsilon=0.3), UCB(), Thompson()])
def test_means_on_a_gpu_are_chosen_from_there(policy: Policy):
    mean, variance = MEAN.cuda(), VARIANCE.cuda()
    torch.testing.assert_close(policy.propensities(mean, variance).cpu(), policy.propensities(MEAN, VARIANCE))
    chosen = policy.choose(mean, variance, torch.Generator("cuda").manual_seed(0))
    assert chosen.is_cuda and (policy.propensities(mean, variance).gather(1, chosen[:, None]) > 0).all()
