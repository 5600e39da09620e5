"""Exact, grouped and histogram AUC against pairs counted one by one."""

import itertools
import math

import pytest
import torch

from hmoe_rec.metrics import TaskMetrics, exact_auc
from hmoe_rec.metrics.auc import grouped_pairs, histogram_auc, score_bins


def naive_auc(scores, labels, weights=None) -> float:
    """Every pair of a positive and a negative, one after the other."""
    weights = [1.0] * len(scores) if weights is None else weights.tolist()
    rows = [r for r in zip(scores.tolist(), labels.tolist(), weights, strict=True) if not math.isnan(r[1])]
    won = pairs = 0.0
    for (high, label, w), (low, other, v) in itertools.product(rows, rows):
        if label == 1 and other == 0:
            won += w * v * (1.0 if high > low else 0.5 if high == low else 0.0)
            pairs += w * v
    return won / pairs if pairs else float("nan")


def draw(num_examples: int, levels: int | None = None, dtype=torch.float32):
    scores = torch.randn(num_examples, dtype=torch.float64)
    labels = (torch.rand(num_examples) < torch.sigmoid(scores).float()).float()
    if levels:
        scores = (scores * levels).round() / levels
    return scores.to(dtype), labels, torch.rand(num_examples) + 0.1


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_exact_auc_counts_every_pair(levels, dtype):
    scores, labels, weights = draw(83, levels, dtype)
    labels[::5] = torch.nan
    assert exact_auc(scores, labels, weights) == pytest.approx(naive_auc(scores, labels, weights), abs=1e-12)
    assert exact_auc(scores, labels) == pytest.approx(naive_auc(scores, labels), abs=1e-12)


def test_equal_scores_give_a_half_whatever_the_order_of_the_labels():
    for labels in ([1, 1, 0, 0, 0], [0, 0, 0, 1, 1]):
        assert exact_auc(torch.full((5,), -1.5), torch.tensor(labels)) == 0.5


def test_scores_are_compared_as_they_are():
    close = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert exact_auc(close, torch.tensor([0, 1])) == 1.0
    assert exact_auc(close.float(), torch.tensor([0, 1])) == 0.5
    assert exact_auc(torch.tensor([0.0, -0.0]), torch.tensor([0, 1])) == 0.5
    assert exact_auc(torch.tensor([-torch.inf, -1e30, 0.0, torch.inf]), torch.tensor([0, 0, 1, 1])) == 1.0


@pytest.mark.parametrize("labels", [[], [0, 0, 0], [1], [torch.nan, 1]])
def test_auc_of_one_class_is_nan(labels):
    assert math.isnan(exact_auc(torch.randn(len(labels)), torch.tensor(labels)))


def test_auc_of_a_nan_score_is_nan():
    assert math.isnan(exact_auc(torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([0, 1, 1])))


def test_grouped_pairs_are_those_of_each_group():
    scores, labels, weights = draw(97, levels=2)
    groups = torch.randint(0, 11, (97,))
    pairs = grouped_pairs(groups, 12, scores, labels == 1, weights)
    for group in range(12):
        of = groups == group
        expected = naive_auc(scores[of], labels[of], weights[of])
        assert pairs.auc()[group].item() == pytest.approx(expected, abs=1e-12, nan_ok=True)
        assert pairs.positives[group].item() == pytest.approx(weights[of & (labels == 1)].double().sum().item())
        assert pairs.negatives[group].item() == pytest.approx(weights[of & (labels == 0)].double().sum().item())


@pytest.mark.parametrize("num_bins", [2, 6, 1 << 18, 1 << 20])
def test_bins_keep_the_order_of_neighbouring_floats(num_bins):
    spread = torch.cat([torch.randn(4000) * scale for scale in (1e-30, 1e-6, 1.0, 8.0, 1e9)])
    above = torch.nextafter(spread, torch.tensor(torch.inf))
    ends = torch.tensor([-torch.inf, torch.inf, 0.0, -2.0, torch.finfo().max, torch.finfo().min])
    scores = torch.cat([spread, above, torch.nextafter(above, torch.tensor(torch.inf)), ends]).sort().values
    bins = score_bins(scores, num_bins)
    assert bins.diff().min() >= 0
    assert bins[0] == 0 and bins[-1] == num_bins - 1


ADVERSARIAL = {
    "one bin": lambda n: 1e-7 * torch.randn(n),
    "two clusters": lambda n: torch.where(torch.rand(n) < 0.5, -3.0, 1.0) + 1e-6 * torch.randn(n),
    "beyond the last bins": lambda n: 1e12 * torch.randn(n),
    "few levels": lambda n: torch.randint(0, 5, (n,)).float(),
    "bfloat16": lambda n: torch.randn(n).bfloat16(),
    "typical": lambda n: torch.randn(n) - 3,
    "alternating in a bin": lambda n: torch.nextafter(torch.zeros(n), torch.tensor(1.0)) * (torch.arange(n) % 7),
}


@pytest.mark.parametrize("num_bins", [2, 64, 1 << 12])
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_error_bound_bounds_the_error(case, num_bins):
    metrics = TaskMetrics(["click"], num_bins=num_bins, gauc=False)
    for num_examples in (7, 60, 700):
        scores = ADVERSARIAL[case](num_examples)
        labels = (torch.rand(num_examples) < torch.sigmoid(scores.float())).float()
        weights = torch.rand(num_examples)
        metrics.reset()
        metrics.update(scores[:, None], labels[:, None], weights)
        found, exact = metrics.compute()["click"], exact_auc(scores, labels, weights)
        if math.isnan(exact):
            assert math.isnan(found["auc"]) and math.isnan(found["auc_error_bound"])
        else:
            assert abs(found["auc"] - exact) <= found["auc_error_bound"] + 1e-12
            assert found["auc_error_bound"] <= 0.5


def test_error_bound_is_reached_by_the_worst_order_in_a_bin():
    # One bin, and the positives lose nearly all pairs: the negative below them weighs next to nothing.
    metrics = TaskMetrics(["click"], num_bins=2, gauc=False)
    scores, labels = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    metrics.update(scores[:, None], labels[:, None], torch.tensor([1e-3, 1.0, 1.0, 1.0]))
    found = metrics.compute()["click"]
    exact = exact_auc(scores, labels, torch.tensor([1e-3, 1.0, 1.0, 1.0]))
    assert abs(found["auc"] - exact) == pytest.approx(found["auc_error_bound"], rel=1e-2)


def test_ties_and_classes_apart_in_a_bin_are_exact():
    metrics = TaskMetrics(["tied", "apart", "below"], num_bins=2, gauc=False)
    scores = torch.tensor([[3.0, 1.0, 3.0], [3.0, 2.0, 1.0], [3.0, 2.0, 2.0]])
    metrics.update(scores, torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]), torch.ones(3))
    found = metrics.compute()
    assert [found[t]["auc"] for t in metrics.tasks] == [0.5, 1.0, 0.0]
    assert [found[t]["auc_error_bound"] for t in metrics.tasks] == [0.0, 0.0, 0.0]


def test_error_bound_is_tiny_for_typical_logits():
    scores = torch.randn(100_000) * 1.2 - 3
    labels = (torch.rand(100_000) < torch.sigmoid(scores)).float()
    metrics = TaskMetrics(["click"], gauc=False)
    metrics.update(scores[:, None], labels[:, None], torch.ones(100_000))
    found = metrics.compute()["click"]
    assert found["auc_error_bound"] < 5e-6
    assert abs(found["auc"] - exact_auc(scores, labels)) <= found["auc_error_bound"] + 1e-12


def test_histogram_of_nothing_is_nan():
    found = histogram_auc(torch.zeros(3, 2, 8, dtype=torch.float64), torch.full((3, 2, 2, 8), -torch.inf))
    assert found.auc.isnan().all() and found.error_bound.isnan().all()
