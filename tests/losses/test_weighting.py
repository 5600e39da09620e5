"""Weights of tasks: fixed, learned as noise, by the pace of learning; and what two processes make of them."""

import math

import pytest
import torch
from gloo import run_ranks

from hmoe_rec.losses.weighting import DWAWeighting, FixedWeighting, UncertaintyWeighting

ALL = torch.ones(3)


def test_fixed_weights():
    found = FixedWeighting([2.0, 0.0, 1.0], False)(torch.tensor([0.5, 0.7, 0.1]), ALL)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.1]))


class TestUncertainty:
    def test_formula_and_optimum(self):
        """e^-s L + s/2 has its minimum where e^s = 2 L."""
        weighting, losses = UncertaintyWeighting([1.0, 3.0, 1.0], False), torch.tensor([0.6, 0.2, 0.05])
        assert weighting(losses, ALL).tolist() == pytest.approx([0.6, 0.6, 0.05])  # s = 0
        with torch.no_grad():
            weighting.log_variance_T.copy_((2 * losses).log())
        total = weighting(losses, ALL).sum()
        assert total.item() == pytest.approx(
            sum(w * (0.5 + math.log(2 * x) / 2) for w, x in zip((1, 3, 1), losses.tolist(), strict=True))
        )
        (gradient,) = torch.autograd.grad(total, weighting.log_variance_T)
        torch.testing.assert_close(gradient, torch.zeros(3), rtol=0, atol=1e-6)
        torch.testing.assert_close(weighting.weights(), torch.tensor([1.0, 3.0, 1.0]) / (2 * losses))

    def test_a_batch_without_labels_of_a_task_leaves_its_variance_alone(self):
        weighting = UncertaintyWeighting([1.0, 1.0, 1.0], False)
        weighting(torch.tensor([0.5, 0.0, 0.5]), torch.tensor([1.0, 0.0, 1.0])).sum().backward()
        assert weighting.log_variance_T.grad[1] == 0


def dwa_by_hand(losses: list[list[float]], every: int, temperature: float) -> list[list[float]]:
    """The weights that each step uses."""
    used, means = [], []
    weights = [1.0] * len(losses[0])
    for start in range(0, len(losses), every):
        interval = losses[start : start + every]
        used += [weights] * len(interval)
        means.append([sum(column) / len(column) for column in zip(*interval, strict=True)])
        if len(means) > 1 and len(interval) == every:
            powers = [math.exp(now / last / temperature) for now, last in zip(means[-1], means[-2], strict=True)]
            weights = [len(powers) * p / sum(powers) for p in powers]
    return used


class TestDWA:
    def test_equals_the_formula_step_by_step(self):
        losses = (torch.rand(11, 3) + 0.1).tolist()
        weighting = DWAWeighting([1.0, 1.0, 2.0], False, temperature=1.5, every=3)
        for step, expected in zip(losses, dwa_by_hand(losses, 3, 1.5), strict=True):
            found = weighting(torch.tensor(step), ALL)
            assert found.tolist() == pytest.approx(
                [a * b * w for a, b, w in zip(step, expected, (1, 1, 2), strict=True)]
            )
        assert weighting.weights().sum() != pytest.approx(4.0)  # by now they differ

    def test_state_goes_on_where_it_was(self):
        losses = torch.rand(9, 3) + 0.1
        whole, parts = (DWAWeighting([1.0] * 3, False, every=2) for _ in range(2))
        expected = [whole(step, ALL) for step in losses]
        for step in losses[:5]:
            parts(step, ALL)
        restored = DWAWeighting([1.0] * 3, False, every=2)
        restored.load_state_dict(parts.state_dict())
        assert all(torch.equal(restored(step, ALL), e) for step, e in zip(losses[5:], expected[5:], strict=True))

    def test_steps_without_labels_do_not_count(self):
        weighting = DWAWeighting([1.0, 1.0], False, every=2)
        for losses, present in (([1.0, 0.0], [1.0, 0.0]), ([1.0, 3.0], [1.0, 1.0])):
            weighting(torch.tensor(losses), torch.tensor(present))
        assert weighting.last_T.tolist() == [1.0, 3.0]

    def test_evaluation_changes_nothing(self):
        weighting = DWAWeighting([1.0] * 3, False, every=1).eval()
        before = {name: x.clone() for name, x in weighting.state_dict().items()}
        weighting(torch.rand(3), ALL)
        assert all(torch.equal(x, before[name]) for name, x in weighting.state_dict().items())

    def test_a_temperature_that_cannot_be(self):
        with pytest.raises(ValueError, match="temperature must be > 0"):
            DWAWeighting([1.0], False, temperature=0.0)


def dwa_on_ranks(rank: int, world_size: int) -> torch.Tensor:
    weighting = DWAWeighting([1.0] * 3, True, every=2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        parts = torch.rand(2, 3, generator=generator)
        weighting(parts[rank], ALL)
    return weighting.weights()


def test_two_processes_weigh_by_the_loss_of_both():
    weighting, generator = DWAWeighting([1.0] * 3, False, every=2), torch.Generator().manual_seed(1)
    for _ in range(6):
        weighting(torch.rand(2, 3, generator=generator).mean(0), ALL)
    for found in run_ranks(2, dwa_on_ranks):
        torch.testing.assert_close(found, weighting.weights())
