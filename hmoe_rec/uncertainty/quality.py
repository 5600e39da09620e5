"""Moments and labels of batch after batch -> how good a variance is, per task, over all ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hmoe_rec.losses.bce import bce, observed_weights
from hmoe_rec.metrics import TaskMetrics
from hmoe_rec.metrics.exchange import all_reduced
from hmoe_rec.uncertainty.moments import Moments, mean_field_logits

# Half-widths, in standard deviations, of the intervals that hold so much of a Gaussian.
INTERVALS = {"coverage_50": 0.6744897501960817, "coverage_90": 1.6448536269514722, "coverage_95": 1.959963984540054}
_SUMS = ("examples", "weight", "plain", "field", "std", "known", *INTERVALS, "squares", "scaled", "logs")
_OF_NEW = ("new", "new_weight", "new_plain", "new_field", "new_std")


class UncertaintyMetrics:
    """Sums of batches -> figures of each task; labelled examples count, with their weight in log losses only::

        logloss             of sigmoid(mean), in nats per example
        logloss_mean_field  of the expected probability
        std                 mean standard deviation of the logit
        coverage_50 .._90, .._95   share of the true logits in the central interval of that mass; ideal: .50, .90, .95
        nll_of_true_logit   -log N(true logit; mean, variance), nats per example: low where the variance is neither
                            too large nor too small
        std_new, logloss_new, logloss_mean_field_new, new   on examples that are marked as new, and their number
        new_auc             P(the std of a new example is above that of another)

    Figures of the true logit need `true_BT`, those of new examples `new_B`; what was not given is nan.
    """

    def __init__(self, tasks: Sequence[str], device: torch.device | str | None = None) -> None:
        self.tasks = tuple(tasks)
        names = (*_SUMS, *_OF_NEW)
        self.sums = torch.zeros(len(names), len(tasks), dtype=torch.float64, device=device)
        self.names = {name: i for i, name in enumerate(names)}
        self.new = TaskMetrics(tasks, num_bins=1 << 14, gauc=False, device=device)

    @torch.no_grad()
    def update(
        self,
        moments: Moments,
        labels_BT: Tensor,
        weights_B: Tensor,
        *,
        true_BT: Tensor | None = None,
        new_B: Tensor | None = None,
    ) -> None:
        """
        Args:
            labels_BT: in {0, 1}, NaN = missing.
            true_BT: true logits.
            new_B: bool.
        """
        known_BT = (observed_weights(labels_BT, weights_B) > 0).double()
        self._add_losses(moments, labels_BT, weights_B, known_BT, "")
        std_BT = moments.std_BT().double()
        self._add("std", (std_BT * known_BT).sum(0))
        if true_BT is not None:
            error_BT = (true_BT - moments.mean_BT).double().abs()
            self._add("known", known_BT.sum(0))
            for name, half_width in INTERVALS.items():
                self._add(name, ((error_BT <= half_width * std_BT) * known_BT).sum(0))
            variance_BT = moments.variance_BT.double().clamp(min=1e-12)
            self._add("scaled", (error_BT.square() / variance_BT * known_BT).sum(0))
            self._add("logs", ((2 * torch.pi * variance_BT).log() * known_BT).sum(0))
            self._add("squares", (error_BT.square() * known_BT).sum(0))
        if new_B is not None:
            self._add_losses(moments, labels_BT, weights_B * new_B, known_BT * new_B.unsqueeze(1), "new_")
            self._add("new", (known_BT * new_B.unsqueeze(1)).sum(0))
            self._add("new_std", (std_BT * known_BT * new_B.unsqueeze(1)).sum(0))
            is_new_BT = torch.where(known_BT > 0, new_B.unsqueeze(1).float(), torch.nan)
            self.new.update(moments.variance_BT.log(), is_new_BT, torch.ones_like(weights_B))

    def compute(self, process_group: dist.ProcessGroup | None = None) -> dict[str, dict[str, float]]:
        """Of all ranks together; a collective call."""
        sums = all_reduced(self.sums, dist.ReduceOp.SUM, process_group)
        auc = self.new.compute(process_group)

        def mean(name: str, over: str) -> list[float]:
            return (sums[self.names[name]] / sums[self.names[over]]).tolist()

        columns = {
            "examples": sums[self.names["examples"]].tolist(),
            "logloss": mean("plain", "weight"),
            "logloss_mean_field": mean("field", "weight"),
            "std": mean("std", "examples"),
            **{name: mean(name, "known") for name in INTERVALS},
            "error_of_true_logit": [x**0.5 for x in mean("squares", "known")],
            "nll_of_true_logit": [
                (a + b) / 2 for a, b in zip(mean("scaled", "known"), mean("logs", "known"), strict=True)
            ],
            "new": sums[self.names["new"]].tolist(),
            "std_new": mean("new_std", "new"),
            "logloss_new": mean("new_plain", "new_weight"),
            "logloss_mean_field_new": mean("new_field", "new_weight"),
            "new_auc": [auc[task]["auc"] for task in self.tasks],
        }
        return {task: {name: values[t] for name, values in columns.items()} for t, task in enumerate(self.tasks)}

    def _add(self, name: str, values_T: Tensor) -> None:
        self.sums[self.names[name]] += values_T

    def _add_losses(
        self, moments: Moments, labels_BT: Tensor, weights_B: Tensor, known_BT: Tensor, prefix: str
    ) -> None:
        one_T = labels_BT.new_ones(len(self.tasks))
        field_BT = mean_field_logits(moments.mean_BT, moments.variance_BT)
        if not prefix:
            self._add("examples", known_BT.sum(0))
        self._add(f"{prefix}weight", observed_weights(labels_BT, weights_B).double().sum(0))
        self._add(f"{prefix}plain", bce(moments.mean_BT, labels_BT, weights_B, total_T=one_T).double())
        self._add(f"{prefix}field", bce(field_BT, labels_BT, weights_B, total_T=one_T).double())
