"""(true logits, labels, weights) of block after block -> the figures that no model of these rows can beat by much."""

from typing import Any

import numpy as np


class TrueScore:
    """Sums over the rows of one task and split -> the figures that the true probabilities reach on them.

    The AUC is that of logits in bins of width 2.4e-4: pairs in one bin count one half, so that it is off by at most
    `auc_error_bound`. Nothing here grows with the rows.
    """

    LIMIT, BINS = 16.0, 1 << 17

    def __init__(self) -> None:
        # [label, bin] sums of weights; of rows; and of weights by the logit that does not know the order.
        self.weighted, self.plain, self.unordered = (np.zeros((2, self.BINS)) for _ in range(3))
        self.loss_weighted = self.loss_plain = 0.0

    def update(self, logits: np.ndarray, unordered: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> None:
        labels = labels.astype(np.int64)
        losses = np.logaddexp(0, np.where(labels == 1, -logits, logits))
        self.loss_plain += float(losses.sum())
        self.loss_weighted += float((losses * weights).sum())
        cells = self._cells(logits, labels)
        np.add.at(self.plain.reshape(-1), cells, 1.0)
        np.add.at(self.weighted.reshape(-1), cells, weights)
        np.add.at(self.unordered.reshape(-1), self._cells(unordered, labels), weights)

    def _cells(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        bins = ((logits + self.LIMIT) * (self.BINS / (2 * self.LIMIT))).astype(np.int64)
        return bins.clip(0, self.BINS - 1) + labels * self.BINS

    def figures(self) -> dict[str, Any]:
        """Undefined figures (no rows, one class) are None."""
        weighted = _figures(self.weighted, self.loss_weighted)
        return weighted | {
            "auc_without_order": _auc(self.unordered)[0],
            "examples": int(self.plain.sum()),
            "positives": int(self.plain[1].sum()),
            "unweighted": _figures(self.plain, self.loss_plain),
        }


def _figures(histogram: np.ndarray, loss_sum: float) -> dict[str, float | None]:
    total, positives = histogram.sum(), histogram[1].sum()
    auc, bound = _auc(histogram)
    rate = positives / total if total else 0.0
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)) if 0 < rate < 1 else 0.0
    logloss = loss_sum / total if total else None
    return {
        "auc": auc,
        "auc_error_bound": bound,
        "logloss": logloss,
        "ne": float(logloss / entropy) if entropy and logloss is not None else None,
        "label_mean": float(rate) if total else None,
    }


def _auc(histogram: np.ndarray) -> tuple[float | None, float | None]:
    """P(a positive's bin is above a negative's) + half of the ties, and half of the ties."""
    negatives, positives = histogram
    pairs = negatives.sum() * positives.sum()
    if not pairs:
        return None, None
    below = np.cumsum(negatives) - negatives
    ties = float((positives * negatives).sum()) / 2
    return float(((positives * below).sum() + ties) / pairs), float(ties / pairs)
