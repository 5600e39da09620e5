"""Behaviors, targets and responses -> how much a behavior's category and position say, in the data and in a model.

    counts = BehaviorCounts(targets, categories, positions=10)
    for batch in ...:
        counts.update(...)
    counts.information()                                   # [A, C, P] bits: the truth
    learned_correlation(pooling, ...)                      # [C, P]: what a model's attention says

Letters of this file: A target categories, C behavior categories, P positions (1 = the latest behavior) or age buckets.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hmoe_rec.encoding.pooling import Pooling

TINY = 1e-5  # in place of a count of 0, as the official scripts do


def mutual_information(hits_pos: Tensor, hits_neg: Tensor, all_pos: Tensor, all_neg: Tensor) -> Tensor:
    """Bits between "the behavior is there" and the response, elementwise on broadcast counts; 0 without examples.

    Args:
        hits_pos, hits_neg: examples with the behavior, by response (n+, n-).
        all_pos, all_neg: all examples (T+, T-).

    Source: Zhou et al., "Temporal Interest Network", WWW 2024, arXiv 2308.08487, and its official scripts; a cell
    without examples counts as 1e-5 there.
    """
    cells = torch.stack(torch.broadcast_tensors(hits_pos, hits_neg, all_pos - hits_pos, all_neg - hits_neg)).double()
    total = (all_pos + all_neg).double().clamp(min=1e-300)
    cells = torch.where(cells <= 0, TINY, cells)
    with_it, without = cells[0] + cells[1], cells[2] + cells[3]
    positive, negative = all_pos.double().clamp(min=TINY), all_neg.double().clamp(min=TINY)
    terms = [
        cells[0] * (cells[0] * total / (with_it * positive)).log2(),
        cells[1] * (cells[1] * total / (with_it * negative)).log2(),
        cells[2] * (cells[2] * total / (without * positive)).log2(),
        cells[3] * (cells[3] * total / (without * negative)).log2(),
    ]
    bits = torch.stack(terms).sum(0) / total
    return torch.where((all_pos + all_neg) > 0, bits, 0.0)


def bias_of_information(hits_pos: Tensor, hits_neg: Tensor, all_pos: Tensor, all_neg: Tensor) -> Tensor:
    """Bits that two independent binary variables show on average: 1 / (2 S ln 2), S the examples; 0 where one of them
    never varies (all or no examples have the behavior, or one response), since the plain estimate is 0 then.

    Source: Miller and Madow's first order of the plug-in estimate, for a table of 2 x 2.
    """
    total, hits = all_pos + all_neg, hits_pos + hits_neg
    varies = (hits > 0) & (hits < total) & (all_pos > 0) & (all_neg > 0)
    return torch.where(varies, 1 / (2 * np.log(2) * total.double().clamp(min=1)), 0.0)


def permutation_p_values(
    hits_pos: Tensor, hits_neg: Tensor, all_pos: Tensor, all_neg: Tensor, *, draws: int = 999, seed: int = 0
) -> Tensor:
    """Share of permutations of the responses that show as much information: small = it is no accident.

    With the margins fixed, n+ of a permutation is hypergeometric, so it is drawn from that instead of shuffling rows.
    (1 + as extreme) / (1 + draws), elementwise.
    """
    shape = torch.broadcast_shapes(hits_pos.shape, all_pos.shape)
    n_pos, n_neg, t_pos, t_neg = (
        x.expand(shape).round().long().numpy() for x in (hits_pos, hits_neg, all_pos, all_neg)
    )
    rng = np.random.default_rng(seed)
    observed = mutual_information(*(torch.from_numpy(x) for x in (n_pos, n_neg, t_pos, t_neg)))
    extreme = torch.zeros(shape)
    hits = n_pos + n_neg
    for _ in range(draws):
        drawn = rng.hypergeometric(t_pos, t_neg, hits)
        found = mutual_information(*(torch.from_numpy(x) for x in (drawn, hits - drawn, t_pos, t_neg)))
        extreme += found >= observed - 1e-12
    return (1 + extreme) / (1 + draws)


@dataclass(frozen=True)
class Examples:
    """What is counted of a batch, all on the CPU.

    Attributes:
        target_B: target category of each example.
        values, lengths_B: categories of the behaviors of all examples, oldest first.
        slot: of each behavior, 0-based: position from the latest one, or age bucket.
        response_B: in [0, 1], NaN = unknown: labels, or predictions in their place.
    """

    target_B: Tensor
    values: Tensor
    lengths_B: Tensor
    slot: Tensor
    response_B: Tensor


class BehaviorCounts:
    """Streaming counts of (target category, behavior category, slot, response); processes add up.

    Args:
        targets: [A] ids.
        categories: [C] ids.
        slots: P.
    """

    def __init__(self, targets: Tensor, categories: Tensor, slots: int) -> None:
        self.targets, self.categories, self.slots = targets.long(), categories.long(), slots
        self.hits_ACP2 = torch.zeros(len(targets), len(categories), slots, 2, dtype=torch.float64)
        self.all_A2 = torch.zeros(len(targets), 2, dtype=torch.float64)

    def update(self, examples: Examples) -> None:
        """A response of .3 counts as .3 positives and .7 negatives."""
        a_B, known_B = _places(examples.target_B, self.targets)
        y_B = examples.response_B.double()
        known_B &= ~y_B.isnan()
        y_B = y_B.nan_to_num()
        both_B2 = torch.stack([y_B, 1 - y_B], 1) * known_B[:, None]
        self.all_A2.index_add_(0, a_B, both_B2)
        row = torch.repeat_interleave(torch.arange(len(a_B)), examples.lengths_B.long())
        c, counted = _places(examples.values, self.categories)
        counted &= known_B[row] & (examples.slot < self.slots) & (examples.slot >= 0)
        key = (row * len(self.categories) + c) * self.slots + examples.slot
        key = key[counted].unique()  # several behaviors of a category in one age bucket are one event
        cell, row = key % (len(self.categories) * self.slots), key // (len(self.categories) * self.slots)
        place = a_B[row] * (len(self.categories) * self.slots) + cell
        self.hits_ACP2.view(-1, 2).index_add_(0, place, both_B2[row])

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Adds up the counts of all processes; a collective call."""
        self.hits_ACP2, self.all_A2 = total(self.hits_ACP2), total(self.all_A2)

    @property
    def _cells(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hits, everything = self.hits_ACP2, self.all_A2[:, None, None]
        return hits[..., 0], hits[..., 1], everything[..., 0], everything[..., 1]

    def information(self, *, unbiased: bool = False) -> Tensor:
        """[A, C, P] bits; unbiased: less what independent variables show on average, so that a cell may be below 0.

        It is not raised to 0: the mean over cells that say nothing would be above 0 then, which was to be taken off.
        """
        bits = mutual_information(*self._cells)
        return bits - bias_of_information(*self._cells) if unbiased else bits

    def p_values(self, *, draws: int = 999) -> Tensor:
        """[A, C, P], see `permutation_p_values`."""
        return permutation_p_values(*self._cells, draws=draws)


def _places(ids: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each id among the known ones (0 where it is none of them), and whether it is one."""
    order = known.sort()
    place = torch.searchsorted(order.values, ids.long()).clamp(max=len(known) - 1)
    return order.indices[place], order.values[place] == ids


def positions_of(lengths_B: Tensor) -> Tensor:
    """Of each behavior of all examples, oldest first: 0 = the latest one, 1 = the one before it, ..."""
    ends = lengths_B.long().cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    return torch.repeat_interleave(ends, lengths_B.long()) - 1 - torch.arange(total)


def scaled(values: Tensor) -> Tensor:
    """To [0, 1] over the whole grid; zeros where all values are equal, NaN where one is NaN."""
    low, high = values.min(), values.max()
    return torch.zeros_like(values) if high == low else (values - low) / (high - low)


@torch.no_grad()
def learned_correlation(
    pooling: Pooling, categories_CD: Tensor, target_D: Tensor, *, slots: int, dims: slice, ages_P: Tensor | None
) -> Tensor:
    """What a pooling makes of category c at slot p for one target: [C, P] in [0, 1].

    Every category is shown alone, as a history of nothing else: softmax over the grid of the z-scored logits, times
    the length of the value, then scaled to [0, 1].

    Args:
        categories_CD, target_D: vectors as wide as the pooling; columns outside of `dims` are 0.
        dims: the columns that the category has.
        ages_P: seconds of each slot, the latest first; None where the sequence has no times.

    Source: arXiv 2308.08487, official scripts for TIN and DIN. Ours for the others: see their `attention`.
    """
    c = len(categories_CD)
    behaviors_CPD = categories_CD[:, None].expand(-1, slots, -1)
    ages_CP = None if ages_P is None else ages_P.flip(0).expand(c, -1)  # oldest first
    mask_CP = torch.ones(c, slots, dtype=torch.bool, device=target_D.device)
    found = pooling.attention(behaviors_CPD, target_D.expand(c, -1), mask_CP, ages_CP, dims=dims)
    logits, norms = found.logits_BL.double().flip(1), found.value_norms_BL.double().flip(1)
    spread = logits.std(correction=0)
    logits = torch.zeros_like(logits) if spread == 0 else (logits - logits.mean()) / spread
    return scaled(logits.flatten().softmax(0).view_as(logits) * norms).cpu()


def pearson(x: Tensor, y: Tensor) -> float:
    """Over all elements; 0 where one is constant (a map without positions says nothing of them), NaN with a NaN."""
    x, y = x.double().flatten() - x.double().mean(), y.double().flatten() - y.double().mean()
    scale = float(x.norm() * y.norm())
    return 0.0 if scale <= 1e-12 else float(x @ y) / scale
