"""Losses that compare examples: pairs, lists, lists of probabilities, and the joint loss of two logits.

They are the ranking parts alone; the published combinations add them to cross-entropy, as a run file does::

    Combined-Pair at alpha = .7, beta = .1      [{kind: bce, weight: .7, positive_weight: .1}, {kind: pair, weight: .3}]
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hmoe_rec.losses.base import Examples, Loss, Sums
from hmoe_rec.losses.pairs import all_pairs, pairs_within

ABSENT = -1e30  # a logit of what does not count: finite, so that nothing but absent ones has a gradient of 0, not NaN


class ComparingLoss(Loss):
    """A loss that compares examples of the batch with each other.

    What it leaves open is the mean of the predictions, which cross-entropy beside it fixes. Together their minimum is
    the true probability p with `pair`, `jrc` and, of the same beta, `rcr`: their own minima are those of cross-entropy
    up to a constant. That of `list` is not: e^z in proportion to p / (beta p + 1 - p). Predictions above the mean come
    out too low and those below it too high, by a few percent where beta p is small; their mean is right with beta = 1,
    and nearly right below. [ours]

    Args:
        within: compares only examples of one "user" (the schema's user_key), or of one value of an id field, such as a
            request; None = all.
        across_ranks: compares the examples of all processes, so that any number of them trains the same model; costs
            an exchange of logits. Otherwise each process compares its own: pairs between processes are left out.
    """

    fixes_mean: ClassVar[bool] = False

    def __init__(
        self,
        *,
        weight: float = 1.0,
        positive_weight: float = 1.0,
        within: str | None = None,
        across_ranks: bool = False,
    ) -> None:
        super().__init__(weight=weight, positive_weight=positive_weight)
        self.within, self.across_ranks = within, across_ranks


class PairLoss(ComparingLoss):
    r"""Logistic loss of all pairs of a positive and a negative (RankNet).

    .. math:: \frac{1}{N_+ N_-} \sum_{i+,\,j-} \mathrm{softplus}(z_j - z_i)

    A weight of positives would drop out of the mean, so there is none. With groups it is the mean over all pairs inside
    of groups.

    Source: L_rank of Combined-Pair, arXiv 2403.14144.
    """

    def __init__(self, *, weight: float = 1.0, within: str | None = None, across_ranks: bool = False) -> None:
        super().__init__(weight=weight, within=within, across_ranks=across_ranks)

    def forward(self, x: Examples) -> Sums:
        positives_B, negatives_B = x.weights_B * x.labels_B, x.weights_B * (1 - x.labels_B)
        if x.groups_B is not None:
            value, total = pairs_within(x.logits_B, positives_B, negatives_B, x.groups_B)
        elif len(x.logits_B) == 0:
            value = total = x.logits_B.sum()
        else:
            value = all_pairs(x.logits_B, positives_B, negatives_B)
            total = positives_B.double().sum() * negatives_B.double().sum()
        return Sums(value.to(x.logits_B.dtype), total.to(x.logits_B.dtype))


class ListLoss(ComparingLoss):
    r"""Softmax over the batch or the group (ListNet with one relevant item at a time).

    .. math:: \frac{1}{N_+} \sum_{i+} -\log \frac{e^{z_i}}{\beta \sum_{+} e^{z} + \sum_{-} e^{z}}

    A positive in a group without negatives has nothing to be compared with, and does not count.

    Source: L_rank of Combined-List, arXiv 2403.14144; there the exponentials are raw, here in the space of logarithms.
    """

    def forward(self, x: Examples) -> Sums:
        return self._cross_entropy(x, x.logits_B)

    def _cross_entropy(self, x: Examples, scores_B: Tensor) -> Sums:
        lists = Lists(x)
        weights_B = x.weights_B * x.labels_B * lists.mixed_B
        all_B = lists.log_sum_exp(scores_B, x.weights_B * self.class_weights(x.labels_B))
        return Sums((weights_B * (all_B - scores_B)).sum(), weights_B.sum())


class RCRLoss(ListLoss):
    r"""Regression-compatible ranking (ListCE): a softmax of probabilities.

    .. math:: \frac{1}{N_+} \sum_{i+} -\log \frac{\sigma(z_i)}{\beta \sum_{+} \sigma(z) + \sum_{-} \sigma(z)}

    That is `ListLoss` of log sigmoid(z). Its minimum agrees with that of cross-entropy: both can be minimized together.

    Source: Bai et al., CIKM 2023, arXiv 2211.01494; with beta as in arXiv 2403.14144.
    """

    def forward(self, x: Examples) -> Sums:
        return self._cross_entropy(x, logsigmoid(x.logits_B))


class JRCLoss(ComparingLoss):
    r"""The ranking part of joint optimization of ranking and calibration, with two logits (z_0, z_1) per example.

    .. math:: -\frac1N \sum_i \beta_{y_i} \log \frac{e^{z_{y_i,i}}}{\sum_k \beta_{y_k} e^{z_{y_i,k}}}

    The column of the example's own class over the whole batch or group. The probability is sigmoid(z_1 - z_0), and its
    cross-entropy (kind bce) is the calibrating part. N counts the examples that share a list with the other class.

    Source: Sheng et al., KDD 2023, arXiv 2208.06164, as the code of arXiv 2403.14144 computes it.
    """

    two_logits: ClassVar[bool] = True

    def forward(self, x: Examples) -> Sums:
        if x.levels_B2 is None:
            raise ValueError("JRCLoss needs examples with levels_B2: two logits (z_0, z_1) each")
        lists = Lists(x)
        weights_B = x.weights_B * self.class_weights(x.labels_B)
        nats_of_class = [lists.log_sum_exp(level_B, weights_B) - level_B for level_B in x.levels_B2.unbind(1)]
        nats_B = torch.where(x.labels_B > 0, nats_of_class[1], nats_of_class[0])
        return Sums((weights_B * lists.mixed_B * nats_B).sum(), (x.weights_B * lists.mixed_B).sum())


class Lists:
    """The examples by list: one per group, or a single one.

    Attributes:
        mixed_B: 1 where the example's list has both classes, else 0.
    """

    def __init__(self, x: Examples) -> None:
        self._list_B = None if x.groups_B is None else x.groups_B.unique(return_inverse=True)[1]
        positives_B, negatives_B = x.weights_B * x.labels_B, x.weights_B * (1 - x.labels_B)
        self.mixed_B = ((self._sum(positives_B) > 0) & (self._sum(negatives_B) > 0)).to(x.weights_B.dtype)

    def log_sum_exp(self, scores_B: Tensor, weights_B: Tensor) -> Tensor:
        """log sum_k w_k e^(s_k) over the list of each example; examples of weight 0 have no part in it."""
        counts_B = weights_B > 0
        ones_B = torch.ones_like(weights_B)
        scores_B = torch.where(counts_B, scores_B + torch.where(counts_B, weights_B, ones_B).log(), ABSENT * ones_B)
        if self._list_B is None:
            return scores_B.logsumexp(0).expand_as(scores_B) if len(scores_B) else scores_B
        top_B = scores_B.detach().new_full(scores_B.shape, ABSENT)
        top_B = top_B.scatter_reduce(0, self._list_B, scores_B.detach(), "amax")[self._list_B]
        return self._sum((scores_B - top_B).exp()).log() + top_B

    def _sum(self, values_B: Tensor) -> Tensor:
        """Over the list of each example."""
        if self._list_B is None:
            return values_B.sum().expand_as(values_B)
        return torch.zeros_like(values_B).index_add(0, self._list_B, values_B)[self._list_B]
