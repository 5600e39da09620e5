r"""How often an ad was shown to a user before -> the weight of a positive: inverse propensities, and what they do.

Repeated exposure weighting: positives that come from repeated exposure are down-weighted by inverse propensity (named
in arXiv 2403.00793; no formula is published). Ours, for the k-th exposure of a user to an item (k = 1: the first)::

    P(y = 1 | x, k) = rho(x) pi(k),   pi(1) = 1, pi not falling          weight of a positive  w(k) = clip(1 / pi(k))

pi is given, as k^gamma or (1 - (1 - p0)^k) / p0 or a table, or estimated from a log (`estimate_propensity`). Negatives
keep weight 1. Where people tire of an ad pi falls, and positives of later exposures weigh more, not less; that is
another thing than what the paper names, and has to be asked for (`falling`).

What it does to predictions: a model learns odds times E[w | x, y = 1]. With k independent of x these are, with
m = E[pi(k)], rho / (1 - m rho): for rates of a few percent about those of the relevance rho, and `relevance` gives rho
exactly. On the whole the odds fall by W = mean weight of the positives. Divided by W (`normalize`), the weights leave
the mean prediction about where it was, at the rate of the log; else a logit lacks -ln W to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hmoe_rec.batch import Batch


def power_propensity(exposures: int, gamma: float) -> list[float]:
    """pi(k) = k^gamma for k = 1, ..., exposures."""
    return (np.arange(1, exposures + 1) ** gamma).tolist()


def once_propensity(exposures: int, p0: float) -> list[float]:
    """pi(k) = (1 - (1 - p0)^k) / p0: how much likelier what has chance p0 in (0, 1] is in k trials than in one."""
    k = np.arange(1, exposures + 1)
    return (-np.expm1(k * np.log1p(-p0)) / p0 if p0 < 1 else np.ones(exposures)).tolist()


def isotonic(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """The non-falling sequence that is nearest in weighted squares: pool adjacent violators (Ayer et al., 1955).

    Args:
        values: K numbers.
        weights: K numbers >= 0; where it is 0 the value of the neighbor before is taken, or of the first with a weight.
    """
    blocks: list[list[float]] = []  # [sum of weights, weighted mean, length]
    for value, weight in zip(values, weights, strict=True):
        blocks.append([float(weight), float(value), 1])
        while len(blocks) > 1 and (blocks[-1][0] == 0 or blocks[-2][0] == 0 or blocks[-2][1] >= blocks[-1][1]):
            w2, v2, n2 = blocks.pop()
            w1, v1, n1 = blocks.pop()
            total = w1 + w2
            blocks.append([total, (w1 * v1 + w2 * v2) / total if total else v1, n1 + n2])
    return np.repeat([b[1] for b in blocks], [int(b[2]) for b in blocks])


def estimate_propensity(
    rows_SK: np.ndarray, positives_SK: np.ndarray, *, smoothing: float = 10.0, falling: bool = False
) -> list[float]:
    r"""pi(1), ..., pi(K) of one task from counts by stratum and exposure (the last column: K and more).

    .. math:: \hat\pi(k) = \frac{O(k) + a}{E(k) + a}, \quad O(k) = \sum_s y_s(k), \quad
              E(k) = \sum_s n_s(k) \frac{y_s(1)}{n_s(1)}

    observed positives over those expected if every exposure were a first one (indirect standardization), a of them
    added to both, then made non-falling by `isotonic` with weights E(k) + a, and divided by pi(1). What is often shown
    is often relevant: strata (such as the item) keep that apart from the effect of repetition. Strata that have no
    first exposure tell nothing and are left out.

    Args:
        rows_SK: number (or weight) of labelled rows. positives_SK: of positive ones.
        smoothing: a > 0, expected positives.
        falling: never rising, in place of never falling.
    """
    known = rows_SK[:, 0] > 0
    rows, positives = rows_SK[known].astype(np.float64), positives_SK[known].astype(np.float64)
    expected_K = (rows * (positives[:, :1] / rows[:, :1])).sum(0) + smoothing
    sign = -1.0 if falling else 1.0
    smooth = sign * isotonic(sign * (positives.sum(0) + smoothing) / expected_K, expected_K)
    return (smooth / smooth[0]).tolist()


@dataclass(frozen=True)
class ExposureEffect:
    """What the weights of one task do, by the log they were fitted to.

    Attributes:
        mean_weight: W, mean weight of the positives before normalization.
        logit_shift: ln W, by which predictions on the whole fall without normalization.
        label_mean: positives per labelled row.
        weighted_mean: the same with the weights: the mean that predictions go to without normalization.
        mean_propensity: m = E[pi(k)] over labelled rows, for `relevance`.
    """

    mean_weight: float
    logit_shift: float
    label_mean: float
    weighted_mean: float
    mean_propensity: float


def clipped_weights(propensity: Sequence[float], clip: tuple[float, float]) -> np.ndarray:
    """1 / pi(k), within `clip`."""
    return np.clip(1.0 / np.asarray(propensity, np.float64), *clip)


def effect_of(
    propensity: Sequence[float], clip: tuple[float, float], rows_K: np.ndarray, positives_K: np.ndarray
) -> ExposureEffect:
    """
    Args:
        rows_K, positives_K: of the log, by exposure (the last one: K and more).
    """
    weights_K = clipped_weights(propensity, clip)
    positives, negatives = float(positives_K.sum()), float((rows_K - positives_K).sum())
    weighted = float((weights_K * positives_K).sum())
    mean = weighted / positives if positives else 1.0
    rows = max(positives + negatives, 1.0)
    return ExposureEffect(
        mean_weight=mean,
        logit_shift=float(np.log(mean)),
        label_mean=positives / rows,
        weighted_mean=weighted / max(weighted + negatives, 1e-300),
        mean_propensity=float((np.asarray(propensity) * rows_K).sum() / rows),
    )


def relevance(logits: Tensor, mean_propensity: float) -> Tensor:
    """Logits of a model with weights 1 / pi(k), neither normalized nor clipped -> logits of rho; k independent of x.

    The model's odds are o = rho / (1 - m rho), so rho / (1 - rho) = o / (1 + (m - 1) o).
    """
    return logits - torch.log1p((mean_propensity - 1.0) * logits.exp())


class ExposureWeights(nn.Module):
    """Labels [B, T] and earlier exposures [B] -> factors [B, T] of the weights in the loss, 1 where y is not 1.

    Args:
        tasks: names, in the order of the labels.
        weights: task -> w(1), ..., w(K); the last one for K and more. Tasks without have weight 1.
    """

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, Sequence[float]]) -> None:
        super().__init__()
        longest = max((len(w) for w in weights.values()), default=1)
        rows = [list(weights.get(task, [1.0])) for task in tasks]
        filled = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], dtype=torch.float32)
        self.register_buffer("weights_KT", filled.T.contiguous(), persistent=False)

    weights_KT: Tensor

    def forward(self, labels_BT: Tensor, exposures_B: Tensor) -> Tensor:
        of_positives_BT = self.weights_KT[exposures_B.long().clamp(0, len(self.weights_KT) - 1)]
        return torch.where(labels_BT == 1, of_positives_BT, 1.0)


def loss_weights(batch: Batch, exposure: ExposureWeights | None) -> Tensor:
    """Weights in the loss: of the examples [B], or of their labels [B, T] where positives weigh by exposures."""
    if exposure is None or batch.exposures is None:
        return batch.weights
    return batch.weights.unsqueeze(1) * exposure(batch.labels, batch.exposures)
