"""Medians, their spread, and rank correlations against naive references."""

import itertools

import numpy as np
import pytest

from hmoe_rec.benchmark.run import in_turn
from hmoe_rec.benchmark.statistics import kendall, median, paired_ratio, quantile, spearman, spread_of_median


def test_quantiles():
    assert median([3.0, 1.0, 10.0]) == 3.0 and quantile([0.0, 10.0], 0.9) == pytest.approx(9.0)


def test_spread_holds_the_median_and_follows_the_rounds_not_the_steps():
    rng = np.random.default_rng(0)
    rounds = [list(10 + shift + 0.01 * rng.normal(size=20)) for shift in (0.0, 0.0, 1.0, 2.0, 3.0)]
    low, high = spread_of_median(rounds)
    assert low <= median([x for r in rounds for x in r]) <= high
    assert high - low > 1.0  # of steps alone it would be some hundredths
    assert spread_of_median(rounds) == (low, high)
    alike = [[5.0, 6.0, 7.0]] * 4
    assert spread_of_median(alike) == (6.0, 6.0) == spread_of_median(alike[:1])


def test_a_ratio_of_rounds_does_not_see_drift():
    drift = [1.0, 1.7, 0.6, 2.0]
    slow = [[30 * d, 31 * d, 29 * d] for d in drift]
    fast = [[20 * d, 21 * d, 19 * d] for d in drift]
    assert paired_ratio(slow, fast) == pytest.approx(1.5)


def naive_tau_b(x, y):
    pairs = [(np.sign(a - c), np.sign(b - d)) for (a, b), (c, d) in itertools.combinations(zip(x, y, strict=True), 2)]
    return sum(i * j for i, j in pairs) / np.sqrt(sum(i != 0 for i, _ in pairs) * sum(j != 0 for _, j in pairs))


def test_rank_correlations():
    x = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [spearman(x, [2.0, 4.0, 8.0, 16.0, 32.0]), kendall(x, x)] == pytest.approx([1.0, 1.0])
    assert [spearman(x, x[::-1]), kendall(x, x[::-1])] == pytest.approx([-1.0, -1.0])
    # 1 - 6 sum d^2 / n (n^2 - 1) with d = 0, 0, 1, -1, 0
    assert spearman(x, [1.0, 2.0, 4.0, 3.0, 5.0]) == pytest.approx(1 - 6 * 2 / (5 * 24))
    tied, other = [1.0, 1.0, 2.0, 3.0, 3.0, 3.0], [4.0, 1.0, 1.0, 5.0, 9.0, 2.0]
    assert kendall(tied, other) == pytest.approx(naive_tau_b(tied, other))
    ranks = np.corrcoef([0.5, 0.5, 2, 4, 4, 4], [3, 0.5, 0.5, 4, 5, 2])[0, 1]
    assert spearman(tied, other) == pytest.approx(ranks)
    assert spearman(x, [1.0] * 5) is None and kendall([2.0, 2.0], [1.0, 3.0]) is None and spearman([1.0], [1.0]) is None


def test_turns_hold_every_plan_once_and_a_steady_drift_cancels_in_pairs():
    orders = [in_turn("ABCD", turn) for turn in range(8)]
    assert all(sorted(order) == list("ABCD") for order in orders) and len(set(map(tuple, orders))) == 8
    for first, second in zip(orders[::2], orders[1::2], strict=True):
        assert {first.index(x) + 4 + second.index(x) for x in "ABCD"} == {7}
    assert {order[0] for order in orders[::2]} == set("ABCD")
