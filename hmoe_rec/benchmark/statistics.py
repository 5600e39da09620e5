"""Step times -> medians with their spread; two orders of plans -> how well they agree. No torch in here."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def quantile(values: Sequence[float], q: float) -> float:
    return float(np.quantile(np.asarray(values, dtype=np.float64), q))


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def spread_of_median(rounds: Sequence[Sequence[float]], *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median of all values: percentile bootstrap that draws whole rounds.

    Steps of one round share whatever else the machine did then, so rounds are drawn, not steps.

    Args:
        rounds: step times by round; one round gives its median twice.
    """
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(r, dtype=np.float64) for r in rounds]
    medians = [
        np.median(np.concatenate([arrays[i] for i in rng.integers(0, len(arrays), len(arrays))]))
        for _ in range(RESAMPLES if len(arrays) > 1 else 1)
    ]
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def paired_ratio(rounds: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """Median over the rounds of the ratio of the two medians: what slows a whole round down cancels."""
    return median([median(mine) / median(theirs) for mine, theirs in zip(rounds, others, strict=True)])


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation: Pearson's of the ranks, equal values sharing their mean rank. None where one side is constant.

    Source: Spearman, "The Proof and Measurement of Association between Two Things", 1904.
    """
    a, b = _ranks(x), _ranks(y)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's tau-b: (pairs in the same order - pairs in opposite order) / sqrt(pairs untied in x, in y).

    Source: Kendall, "The Treatment of Ties in Ranking Problems", 1945.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    i, j = np.triu_indices(len(a), 1)
    dx, dy = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
    untied = float((dx != 0).sum()) * float((dy != 0).sum())
    return float((dx * dy).sum() / untied**0.5) if untied else None


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    below = (array[:, None] > array).sum(1)
    return below + ((array[:, None] == array).sum(1) - 1) / 2
