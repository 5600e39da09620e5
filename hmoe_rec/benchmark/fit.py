"""Measured parts of many steps -> a price list: non-negative least squares, one part at a time. No torch in here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hmoe_rec.sharding.prices import PARTS_PRICED, TERMS, Price, Prices


@dataclass(frozen=True)
class Observation:
    """One part of one process's step.

    Attributes:
        part: of `Prices`.
        amounts: term of `Price` -> what the price multiplies: calls, ids, rows, vectors or bytes, in units that make
            the product milliseconds.
        ms: measured.
    """

    part: str
    amounts: Mapping[str, float]
    ms: float


@dataclass(frozen=True)
class Fit:
    """A price list, and per part how far it is from what was measured: the median of |fitted / measured - 1|."""

    prices: Prices
    error: Mapping[str, float]
    count: Mapping[str, int]


def fit_prices(observations: Sequence[Observation]) -> Fit:
    """Of each part sum over observations (amounts . price - ms)^2 / ms at the least, all prices at least 0.

    A squared error in milliseconds alone would leave small steps out of account, a relative one large steps; this is
    between them. Parts without observations cost nothing.
    """
    prices: dict[str, Price] = {}
    error: dict[str, float] = {}
    count: dict[str, int] = {}
    for part in PARTS_PRICED:
        mine = [o for o in observations if o.part == part and o.ms > 0]
        count[part] = len(mine)
        if not mine:
            continue
        amounts = np.array([[o.amounts.get(term, 0.0) for term in TERMS] for o in mine])
        ms = np.array([o.ms for o in mine])
        found = nonnegative(amounts / np.sqrt(ms)[:, None], np.sqrt(ms))
        prices[part] = Price(**dict(zip(TERMS, map(float, found), strict=True)))
        error[part] = float(np.median(np.abs(amounts @ found / ms - 1)))
    return Fit(Prices(**prices), error, count)


def nonnegative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x >= 0 with the least |matrix x - target|^2; of its few columns, every choice of those above 0 is tried.

    The minimum is an ordinary least-squares solution on the columns where it is above 0, so it is among the tried ones.
    """
    scale = np.linalg.norm(matrix, axis=0)
    usable = [i for i in range(matrix.shape[1]) if scale[i] > 0]
    best, least = np.zeros(matrix.shape[1]), float(target @ target)
    for size in range(1, len(usable) + 1):
        for chosen in combinations(usable, size):
            columns = list(chosen)
            x, *_ = np.linalg.lstsq(matrix[:, columns] / scale[columns], target, rcond=None)
            left = target - matrix[:, columns] / scale[columns] @ x
            if (x >= 0).all() and left @ left < least * (1 - 1e-9):
                best, least = np.zeros(matrix.shape[1]), float(left @ left)
                best[columns] = x / scale[columns]
    return best
