"""Propensities of repeated exposure: given, estimated, and what weights made of them recover."""

import numpy as np
import pytest
import torch
from gloo import run_ranks

from hmoe_rec.batch import Batch
from hmoe_rec.losses.bce import bce
from hmoe_rec.losses.exposure import (
    ExposureWeights,
    clipped_weights,
    effect_of,
    estimate_propensity,
    isotonic,
    once_propensity,
    power_propensity,
    relevance,
)
from hmoe_rec.training.task import Outputs, TrainTask

NAN = float("nan")
PLANTED = np.array([1.0, 1.5, 1.9, 2.2, 2.4])  # pi(1) ... pi(5 or more)


def test_given_propensities():
    """k = 3 and p0 = .1: pi = (1 - .9^3) / .1 = 2.71, w = .369004."""
    assert once_propensity(3, 0.1)[2] == pytest.approx(2.71) and 1 / once_propensity(3, 0.1)[2] == pytest.approx(
        0.369004, abs=1e-6
    )
    assert once_propensity(2, 1.0) == [1.0, 1.0]
    assert power_propensity(4, 0.5) == pytest.approx([1, 2**0.5, 3**0.5, 2])
    assert clipped_weights([1.0, 2.0, 20.0], (0.1, 0.9)).tolist() == [0.9, 0.5, 0.1]


def test_isotonic_is_the_nearest_non_falling_sequence():
    """Against all ways to cut into blocks with the mean of each."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        values, weights = rng.normal(size=6), rng.random(6) + 0.1
        best, least = None, np.inf
        for cuts in range(32):
            bounds = [0, *(i + 1 for i in range(5) if cuts >> i & 1), 6]
            blocks = [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
            means = np.concatenate(
                [np.full(b.stop - b.start, np.average(values[b], weights=weights[b])) for b in blocks]
            )
            cost = (weights * (values - means) ** 2).sum()
            if (np.diff(means) >= 0).all() and cost < least:
                best, least = means, cost
        assert isotonic(values, weights) == pytest.approx(best)
    assert isotonic([3.0, 1.0, 2.0], [0.0, 1.0, 0.0]).tolist() == [1.0, 1.0, 1.0]


def exposures_log(rows: int, seed: int = 0):
    """Items of rates rho in [.01, .06], the better ones shown more often -> item, exposure - 1, label, rho."""
    rng = np.random.default_rng(seed)
    rho = np.linspace(0.01, 0.06, 20)
    item = rng.integers(0, 20, rows)
    shape = 0.7 - 0.5 * (rho[item] - 0.01) / 0.05
    before = np.minimum(rng.geometric(shape) - 1, 4)
    label = rng.random(rows) < rho[item] * PLANTED[before]
    return item, before, label, rho


def counts_of(item, before, label) -> tuple[np.ndarray, np.ndarray]:
    cells = item * 5 + before
    return tuple(np.bincount(cells[chosen], minlength=100).reshape(20, 5) for chosen in (slice(None), label))


def test_propensity_is_estimated_and_strata_take_away_the_bias_of_relevance():
    rows, positives = counts_of(*exposures_log(2_000_000)[:3])
    within = estimate_propensity(rows, positives)
    crude = estimate_propensity(rows.sum(0, keepdims=True), positives.sum(0, keepdims=True))
    assert np.abs(np.array(within) / PLANTED - 1).max() < 0.03
    assert crude[4] > 1.4 * PLANTED[4], "better items are shown more often"
    assert within[0] == 1 and (np.diff(within) >= 0).all()


def test_an_exposure_with_little_data_is_smoothed_and_never_falls():
    rows = np.array([[10_000, 1000, 2, 0]])
    found = estimate_propensity(rows, np.array([[1000, 150, 0, 0]]), smoothing=10.0)
    assert found[1] == pytest.approx((150 + 10) / (100 + 10) / 1.0, rel=0.15)
    assert found[1] == found[2] == found[3]
    assert estimate_propensity(np.array([[0, 5]]), np.array([[0, 5]])) == [1.0, 1.0], (
        "nothing is known of a first exposure"
    )


def test_a_propensity_may_fall_where_that_is_asked_for():
    item, before, _, rho = exposures_log(1_000_000)
    falling = 1 / PLANTED
    label = np.random.default_rng(1).random(len(item)) < rho[item] * falling[before]
    counts = counts_of(item, before, label)
    assert np.abs(np.array(estimate_propensity(*counts, falling=True)) / falling - 1).max() < 0.06
    assert max(estimate_propensity(*counts)) < 1.02, "else it stays where it was"


def odds_model(item, before, label, weights_K: np.ndarray) -> np.ndarray:
    """The best predictions per item: weighted positives over weighted rows."""
    w = np.where(label, weights_K[before], 1.0)
    return np.bincount(item, w * label, 20) / np.bincount(item, w, 20)


def test_weights_recover_the_planted_relevance():
    """Mean error of the items' rates: 49 % without weights, 2.5 % with (of which about rho (m - 1) is of the form)."""
    item, before, label, rho = exposures_log(2_000_000)
    rows, positives = counts_of(item, before, label)
    propensity = estimate_propensity(rows, positives)
    plain = odds_model(item, before, label, np.ones(5)) / rho - 1
    weighted = odds_model(item, before, label, clipped_weights(propensity, (0.1, 1.0))) / rho - 1
    assert 0.4 < np.abs(plain).mean() < 0.7 and plain[-1] - plain[0] > 0.5, "and in favor of what is shown often"
    assert np.abs(weighted).mean() < 0.06 and abs(weighted[-1] - weighted[0]) < 0.1


def test_relevance_is_exact_where_exposures_do_not_depend_on_the_example():
    """In the limit of many rows: k has one distribution, so that odds = rho / (1 - m rho)."""
    share, rho = np.array([0.4, 0.3, 0.15, 0.1, 0.05]), np.array([0.02, 0.1, 0.3, 0.4])
    m = float((share * PLANTED).sum())
    positives_RK = rho[:, None] * PLANTED * share
    odds = (positives_RK / PLANTED).sum(1) / (1 - positives_RK.sum(1))
    logits = relevance(torch.tensor(np.log(odds)), m)
    assert logits.sigmoid().tolist() == pytest.approx(rho.tolist(), rel=1e-9)
    assert (1 / (1 + 1 / odds) / rho).tolist()[0] == pytest.approx(1, abs=0.02)


def test_the_effect_is_that_of_the_weights_on_the_mean_prediction():
    """The best constant prediction with weights is `weighted_mean`, and with weights / W the label mean again."""
    item, before, label, _ = exposures_log(200_000)
    rows, positives = counts_of(item, before, label)
    effect = effect_of(PLANTED.tolist(), (0.1, 1.0), rows.sum(0), positives.sum(0))
    weights_K = clipped_weights(PLANTED, (0.1, 1.0))
    for weights, mean in ((weights_K, effect.weighted_mean), (weights_K / effect.mean_weight, effect.label_mean)):
        w = np.where(label, weights[before], 1.0)
        assert (w * label).sum() / w.sum() == pytest.approx(mean)
    odds = [p / (1 - p) for p in (effect.weighted_mean, effect.label_mean)]
    assert np.log(odds[0] / odds[1]) == pytest.approx(effect.logit_shift)
    assert effect.mean_propensity == pytest.approx(PLANTED[before].mean())
    nothing = effect_of([1.0, 2.0], (0.1, 1.0), np.zeros(2), np.zeros(2))
    assert (nothing.mean_weight, nothing.logit_shift, nothing.label_mean) == (1.0, 0.0, 0.0)


# ---------------------------------------------------------------------------------------------------------- in the loss


WEIGHTS = {"like": [0.9, 0.5, 0.25]}


def test_factors_of_positives_only_and_of_named_tasks_only():
    module = ExposureWeights(["click", "like"], WEIGHTS)
    labels = torch.tensor([[1, 1], [0, 1], [1, 0], [NAN, 1], [1, NAN]])
    factors = module(labels, torch.tensor([0, 1, 2, 99, 1]))
    assert factors.tolist() == [[1, pytest.approx(0.9)], [1, 0.5], [1, 1], [1, 0.25], [1, 1]]


class Constant(torch.nn.Module):
    """Logits that are parameters."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits_BT = torch.nn.Parameter(logits)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.logits_BT


def part(rows: slice) -> tuple[TrainTask, Batch]:
    """A training step and some rows of one batch of seven."""
    generator = torch.Generator().manual_seed(4)
    logits, labels = torch.randn(7, 2, generator=generator), torch.randint(0, 2, (7, 2), generator=generator).float()
    labels[3, 1] = NAN
    weights, offsets = torch.rand(7, generator=generator), torch.tensor([[2.0, 0.5]]).repeat(7, 1)
    exposures = torch.randint(0, 5, (7,), generator=generator)
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    nothing = KeyedJaggedTensor(
        keys=["a"], values=torch.empty(0), lengths=torch.zeros(len(labels[rows]), dtype=torch.int32)
    )
    batch = Batch.of(nothing, labels[rows], weights=weights[rows], offsets=offsets[rows], exposures=exposures[rows])
    exposure = ExposureWeights(["click", "like"], WEIGHTS)
    distributed = torch.distributed.is_initialized()
    return TrainTask(Constant(logits[rows]), ["click", "like"], exposure=exposure, distributed=distributed), batch


def test_the_loss_has_weights_and_offsets_and_metrics_have_offsets_only():
    task, batch = part(slice(0, 7))
    loss, output = task(batch)
    logits, weights = task.model.logits_BT.detach() + batch.offsets, batch.weights
    factors = task.exposure(batch.labels, batch.exposures)
    expected = [bce(logits[:, [t]], batch.labels[:, [t]], weights * factors[:, t]) for t in range(2)]
    torch.testing.assert_close(loss.detach(), sum(expected).squeeze())
    assert torch.equal(output.logits_BT, logits) and torch.equal(output.weights_B, weights)
    without = TrainTask(task.model, ["click", "like"])
    assert without(batch)[0] != loss
    plain = Batch.of(batch.sparse, batch.labels, weights=weights)
    assert torch.equal(task(plain)[1].logits_BT, task.model.logits_BT), "what is evaluated or served has no offset"


def test_an_offset_of_two_logits_is_that_of_class_one():
    levels, offsets = torch.randn(5, 2, 2), torch.randn(5, 2)
    shifted = Outputs(levels[..., 1] - levels[..., 0], levels).shifted(offsets)
    torch.testing.assert_close(shifted.logits_BT, levels[..., 1] - levels[..., 0] + offsets)
    assert torch.equal(shifted.levels_BT2[..., 0], levels[..., 0])
    torch.testing.assert_close(shifted.levels_BT2[..., 1], levels[..., 1] + offsets)


def gradients_of_rank(rank: int, world_size: int) -> tuple[float, torch.Tensor]:
    task, batch = part(slice(0, 3) if rank == 0 else slice(3, 7))
    loss, _ = task(batch)
    loss.backward()
    return loss.item(), task.model.logits_BT.grad


def test_two_processes_weight_as_one():
    task, batch = part(slice(0, 7))
    loss, _ = task(batch)
    loss.backward()
    (loss0, grad0), (loss1, grad1) = run_ranks(2, gradients_of_rank)
    assert (loss0 + loss1) / 2 == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(torch.cat([grad0, grad1]) / 2, task.model.logits_BT.grad)
