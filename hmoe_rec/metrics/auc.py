"""Scores and binary labels -> area under the ROC curve: exact by sorting, per group, or from a mergeable histogram.

AUC = P(score of a positive > score of a negative) + 1/2 P(equal), over pairs weighted by the product of their weights.
With `wins` the weighted number of pairs that the positive wins (a tie is half a win), AUC = wins / (P N), where P and N
are the weights of all positives and of all negatives.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Click logits live mostly in [-8, 4]: bins are finest around -2, and as wide as (2 + |x + 2|)^2 / num_bins at x.
BIN_CENTER = -2.0
BIN_SCALE = 2.0


class PairSums(NamedTuple):
    """Per group, float64 [G]: pairs won by the positive (a tie is half a win), weight of positives, of negatives."""

    wins: Tensor
    positives: Tensor
    negatives: Tensor

    def auc(self) -> Tensor:
        """[G]; nan for a group without both classes."""
        return self.wins / (self.positives * self.negatives)


class HistogramAuc(NamedTuple):
    """The exact AUC lies in [auc - error_bound, auc + error_bound]; both are nan without both classes. float64 [T]."""

    auc: Tensor
    error_bound: Tensor


def exact_auc(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """AUC by sorting, with ties counted half. nan if there is only one class, or if a score is nan.

    Args:
        scores: [B] of any floating type, compared as they are.
        labels: [B] in {0, 1}; nan = missing, left out.
        weights: [B] >= 0; None = all ones. Examples of weight 0 do not count.
    """
    if weights is None:
        weights = torch.ones_like(scores, dtype=torch.float64)
    known = ~labels.isnan() & (weights > 0) if labels.is_floating_point() else weights > 0
    scores, labels, weights = scores[known], labels[known], weights[known]
    if scores.isnan().any():
        return float("nan")
    groups = torch.zeros_like(scores, dtype=torch.int64)
    return grouped_pairs(groups, 1, scores, labels > 0.5, weights).auc().item()


def grouped_pairs(groups: Tensor, num_groups: int, scores: Tensor, positive: Tensor, weights: Tensor) -> PairSums:
    """Pairs within each group, exactly, with one sort of all examples.

    Args:
        groups: [B] int64 in [0, num_groups).
        scores: [B], none of them nan.
        positive: [B] bool.
        weights: [B] > 0.
    """
    key, order = ((groups << 32) + _score_ranks(scores)).sort()
    _, run, run_length = torch.unique_consecutive(key, return_inverse=True, return_counts=True)  # equal group and score
    positive, weights = positive[order], weights[order].double()
    per_run = weights.new_zeros(2, len(run_length))
    per_run[1].index_add_(0, run, weights * positive)
    per_run[0].index_add_(0, run, weights * ~positive)
    group = (key >> 32)[run_length.cumsum(0) - 1]

    totals = weights.new_zeros(2, num_groups).index_add_(1, group, per_run)
    negatives, positives = per_run
    below = negatives.cumsum(0) - negatives - (totals[0].cumsum(0) - totals[0])[group]
    wins = weights.new_zeros(num_groups).index_add_(0, group, positives * (below + negatives / 2))
    return PairSums(wins, totals[1], totals[0])


def _score_ranks(scores: Tensor) -> Tensor:
    """[B] -> int64 [B] in [0, 2^32) in the order of the scores; equal scores have equal ranks."""
    if scores.dtype == torch.float64:
        return torch.unique(scores, return_inverse=True)[1]
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    # A float's bits read as an integer grow with its magnitude: flip the order of the negative ones.
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + (1 << 31)


def score_bins(scores: Tensor, num_bins: int) -> Tensor:
    """float32 [...] -> int64 [...] in [0, num_bins): a higher score is never in a lower bin, whatever the rounding.

    Bins are equal in u = s / (s + |x - c|) on each side of c. Every step of it is a single correctly rounded
    operation of one variable, and rounding keeps order: that is why this form, and not x / (s + |x|) or a sigmoid.
    """
    centered = scores - BIN_CENTER
    half = num_bins // 2
    tail = (BIN_SCALE / (BIN_SCALE + centered.abs()) * half).to(torch.int64).clamp_(0, half - 1)
    return torch.where(centered < 0, tail, num_bins - 1 - tail)


def histogram_auc(histogram: Tensor, extremes: Tensor) -> HistogramAuc:
    """AUC of T tasks from what was counted per class and bin.

    A pair from two different bins is ordered by its bins. Within a bin the order is known if all its scores are equal
    (half a win each), or if its lowest positive is above its highest negative or the other way round. The other pairs
    count half a win each, and are wrong by at most half a win each: their sum is the error bound.

    Args:
        histogram: [T, 2, K] float64, weights of the negatives and of the positives in each bin.
        extremes: [T, 2, 2, K] float32, [:, 0] = highest score and [:, 1] = -(lowest score), per class and bin; -inf
            where there is none.
    """
    (negatives, positives), (highest, lowest) = histogram.unbind(1), (extremes[:, 0], -extremes[:, 1])
    (neg_high, pos_high), (neg_low, pos_low) = highest.unbind(1), lowest.unbind(1)
    below = negatives.cumsum(-1).roll(1, -1)
    below[:, 0] = 0

    tied = torch.minimum(neg_low, pos_low) == torch.maximum(neg_high, pos_high)
    won, lost = pos_low > neg_high, pos_high < neg_low
    pairs = positives * negatives
    share = 0.5 + 0.5 * won.double() - 0.5 * lost.double()
    all_pairs = positives.sum(-1) * negatives.sum(-1)
    auc = (positives * below + pairs * share).sum(-1) / all_pairs
    return HistogramAuc(auc, (pairs * ~(tied | won | lost)).sum(-1) / 2 / all_pairs)
