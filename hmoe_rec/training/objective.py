"""Logits and a batch -> what every task minimizes: cross-entropy, or a weighted sum of losses of one's choice."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hmoe_rec.batch import Batch
from hmoe_rec.losses import USER
from hmoe_rec.losses.base import Examples, Loss, LossOfSums, Sums
from hmoe_rec.losses.bce import bce, observed_weights
from hmoe_rec.losses.ranks import SumOverRanks, rows_of_all_ranks, sizes_of_ranks
from hmoe_rec.towers.bootstrap import BootstrapTowers
from hmoe_rec.types import HASH_OF_MISSING
from hmoe_rec.uncertainty.bootstrap import bootstrap_weights


class ObjectiveOutput(NamedTuple):
    """
    Attributes:
        bce_T: cross-entropy of the logits as they are in nats per example, whatever is minimized: what is reported.
        losses_T: what is minimized, before task weights.
        terms_K: the value of every loss that was chosen, before its weight, in the order of `Objective.names`.
        present_T: 1 where the global batch has something to learn from (a label, or a pair of labels), else 0.
    """

    bce_T: Tensor
    losses_T: Tensor
    terms_K: Tensor
    present_T: Tensor


class Objective(nn.Module):
    """Losses per task, averaged over the examples (or pairs) of the *global* batch that have the label.

    Ranks may hold different numbers of labels; each divides by the global number, so that any number of processes
    trains the same model. It costs one all-reduce of T + K numbers a step. Losses that compare examples do so inside a
    process, unless they are asked to look across ranks: logits, labels and weights are then gathered, once for all.
    Focal losses, which need sums over all ranks only, share an all-reduce of five numbers each.

    A loss whose positives weigh beta sees the logits with ln beta added. So the logits themselves, and with them all
    that is reported, predicted, published or exported, are those of the log, and nothing has to be undone later.

    In evaluation only cross-entropy is computed.

    Args:
        tasks: names, in the order of the logits.
        losses: task -> what is added up; a missing task has cross-entropy.
        distributed: several processes.
    """

    def __init__(self, tasks: Sequence[str], losses: Mapping[str, Sequence[Loss]], distributed: bool) -> None:
        super().__init__()
        self.tasks, self.distributed = tuple(tasks), distributed
        self.terms = nn.ModuleDict({task: nn.ModuleList(losses[task]) for task in tasks if task in losses})
        self.names = [name for task in tasks if task in losses for name in _names(task, losses[task])]
        every = [loss for of_task in losses.values() for loss in of_task]
        starts = accumulate((len(losses.get(task, ())) for task in tasks), initial=len(tasks))
        # Of each task, where its totals are among those of all tasks' cross-entropies and then of all chosen losses.
        self._totals = [
            slice(start, start + len(losses[task])) if losses.get(task) else slice(t, t + 1)
            for t, (task, start) in enumerate(zip(tasks, starts, strict=False))
        ]
        self.within = sorted({loss.within for loss in every if loss.within is not None})
        self.gathers = distributed and any(_compares_ranks(loss) for loss in every)

    def forward(
        self, logits_BT: Tensor, levels_BT2: Tensor | None, batch: Batch, weights: Tensor | None = None
    ) -> ObjectiveOutput:
        """
        Args:
            levels_BT2: the two logits of every task, if a loss reads them.
            weights: [B] of examples or [B, T] of labels; None = those of the batch.
        """
        weights_BT = observed_weights(batch.labels, batch.weights if weights is None else weights)
        total_T = weights_BT.sum(0)
        sums = self._sums(logits_BT, levels_BT2, batch, weights_BT) if self.training and self.names else []
        totals = torch.cat([total_T, *(s.total.detach().reshape(1) for s in sums)])
        if self.distributed:
            dist.all_reduce(totals)
            totals = totals / dist.get_world_size()
        bce_T = bce(logits_BT, batch.labels, weights_BT, total_T=totals[: len(self.tasks)])
        safe_K = torch.where(totals > 0, totals, torch.ones_like(totals))[len(self.tasks) :]
        terms = [s.sum / safe_K[k] for k, s in enumerate(sums)]
        losses_T = self._combined(bce_T, terms) if terms else bce_T
        terms_K = torch.stack(terms) if terms else bce_T.new_zeros(len(self.names))
        present_T = torch.stack([(totals[own] > 0).any() for own in self._totals]) if terms else totals > 0
        return ObjectiveOutput(bce_T, losses_T, terms_K.detach(), present_T.to(bce_T.dtype))

    def _combined(self, bce_T: Tensor, terms: list[Tensor]) -> Tensor:
        remaining = iter(terms)
        losses = []
        for t, task in enumerate(self.tasks):
            own = [loss.weight * next(remaining) for loss in self._losses(task)]
            losses.append(torch.stack(own).sum() if own else bce_T[t])
        return torch.stack(losses)

    def _sums(self, logits_BT: Tensor, levels_BT2: Tensor | None, batch: Batch, weights_BT: Tensor) -> list[Sums]:
        """Of every loss, over this process's examples or, where it looks across ranks, over all."""
        own = _Side(logits_BT, levels_BT2, batch.labels, weights_BT, {n: groups_of(batch, n) for n in self.within})
        everybody = own.of_all_ranks() if self.gathers else own
        chosen = [(t, loss) for t, task in enumerate(self.tasks) for loss in self._losses(task)]
        added_up = iter(self._parts_of_all_ranks(own, chosen))
        return [
            loss.of_parts(next(added_up))
            if self._adds_up(loss)
            else loss((everybody if _compares_ranks(loss) else own).examples(t, loss))
            for t, loss in chosen
        ]

    def _parts_of_all_ranks(self, own: "_Side", chosen: Sequence[tuple[int, Loss]]) -> Sequence[Tensor]:
        """Of the losses that need sums over all ranks and no examples, by one all-reduce."""
        parts = [loss.parts(own.examples(t, loss)) for t, loss in chosen if self._adds_up(loss)]
        return SumOverRanks.apply(torch.cat(parts)).split([len(p) for p in parts]) if parts else ()

    def _adds_up(self, loss: Loss) -> TypeGuard[LossOfSums]:
        return self.distributed and loss.across_ranks and isinstance(loss, LossOfSums)

    def _losses(self, task: str) -> Sequence[Loss]:
        return self.terms[task] if task in self.terms else ()  # type: ignore[return-value]


class HeadsObjective(Objective):
    """For bootstrap towers: in training the mean over their heads, each with its own weights of the examples.

    It costs K times the losses, and K all-reduces in place of one.

    Args:
        towers: say how the weights are drawn.
    """

    def __init__(
        self, tasks: Sequence[str], losses: Mapping[str, Sequence[Loss]], distributed: bool, towers: BootstrapTowers
    ) -> None:
        super().__init__(tasks, losses, distributed)
        self.draws, self.seed = towers.draws, towers.seed

    def forward(
        self, logits: Tensor, levels_BT2: Tensor | None, batch: Batch, weights: Tensor | None = None
    ) -> ObjectiveOutput:
        """logits: [B, T, K] in training, [B, T] in evaluation.

        Raises:
            ValueError: a batch to train on without row ids, by which a head's examples are drawn.
        """
        if logits.ndim == 2:
            return super().forward(logits, levels_BT2, batch, weights)
        if batch.row_ids is None:
            raise ValueError("bootstrap towers need Batch.row_ids: a number per example that stays the same")
        weights = batch.weights if weights is None else weights
        weights_BT = weights.unsqueeze(1) if weights.ndim == 1 else weights
        draws_BK = bootstrap_weights(batch.row_ids, logits.shape[2], draws=self.draws, seed=self.seed)
        found = [
            super(HeadsObjective, self).forward(z_BT, levels_BT2, batch, weights_BT * draws_B.unsqueeze(1))
            for z_BT, draws_B in zip(logits.unbind(2), draws_BK.unbind(1), strict=True)
        ]
        return ObjectiveOutput(*(torch.stack(values).mean(0) for values in zip(*found, strict=True)))


class _Side(NamedTuple):
    """What losses look at, of one process or of all."""

    logits_BT: Tensor
    levels_BT2: Tensor | None
    labels_BT: Tensor
    weights_BT: Tensor
    groups: dict[str, tuple[Tensor, Tensor]]  # name -> the group of each example, and whether it has one

    def examples(self, t: int, loss: Loss) -> Examples:
        """Of task t, with the loss's own offset of the logits, of two logits of that of class 1."""
        weights_B, groups_B = self.weights_BT[:, t], None
        if loss.within is not None:
            groups_B, has_B = self.groups[loss.within]
            weights_B = weights_B * has_B
        logits_B = self.logits_BT[:, t] + loss.offset
        levels_B2 = None
        if self.levels_BT2 is not None:
            levels_B2 = torch.stack([self.levels_BT2[:, t, 0], self.levels_BT2[:, t, 1] + loss.offset], 1)
        return Examples.of(logits_B, self.labels_BT[:, t], weights_B, groups_B, levels_B2)

    def of_all_ranks(self) -> "_Side":
        sizes = sizes_of_ranks(len(self.weights_BT), self.weights_BT.device)
        num_tasks = self.labels_BT.shape[1]
        floats = [self.logits_BT if self.levels_BT2 is None else self.levels_BT2.flatten(1)]
        floats += [self.labels_BT, self.weights_BT, *(has.unsqueeze(1) for _, has in self.groups.values())]
        widths = [x.shape[1] for x in floats]
        given, labels_BT, weights_BT, *has = rows_of_all_ranks(torch.cat(floats, 1), sizes).split(widths, 1)
        levels_BT2 = None if self.levels_BT2 is None else given.unflatten(1, (num_tasks, 2))
        logits_BT = given if levels_BT2 is None else levels_BT2[..., 1] - levels_BT2[..., 0]
        groups = {
            name: (rows_of_all_ranks(group_B, sizes), has_B1.squeeze(1))
            for (name, (group_B, _)), has_B1 in zip(self.groups.items(), has, strict=True)
        }
        return _Side(logits_BT, levels_BT2, labels_BT, weights_BT, groups)


def groups_of(batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """-> the group of each example [B] int64, and 1.0 where it has one, else 0.0.

    Args:
        name: "user" = Batch.groups (HASH_OF_MISSING: none), or an id field with at most one id per example.
    """
    if name == USER:
        return batch.groups, (batch.groups != HASH_OF_MISSING).to(batch.weights.dtype)
    ids = batch.sparse[name]
    lengths_B = ids.lengths()
    starts_B = (lengths_B.cumsum(0) - lengths_B).long()
    padded = torch.cat([ids.values().long(), ids.values().new_zeros(1, dtype=torch.int64)])
    return padded[starts_B], lengths_B.to(batch.weights.dtype)


def _compares_ranks(loss: Loss) -> bool:
    """Whether it needs the examples of all ranks."""
    return loss.across_ranks and not isinstance(loss, LossOfSums)


def _names(task: str, losses: Sequence[Loss]) -> list[str]:
    """click/pair, and click/pair_2 for a second one of its kind."""
    kinds = [type(loss).__name__.removesuffix("Loss").lower() for loss in losses]
    seen = [kinds[:i].count(kind) + 1 for i, kind in enumerate(kinds)]
    return [f"{task}/{kind}" + (f"_{n}" if n > 1 else "") for kind, n in zip(kinds, seen, strict=True)]
