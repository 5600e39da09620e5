"""(logits, labels, weights, groups) of batch after batch -> the metrics of every task, over all ranks."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from hmoe_rec.metrics.auc import grouped_pairs, histogram_auc, score_bins
from hmoe_rec.metrics.exchange import all_reduced, is_distributed, to_owners
from hmoe_rec.types import HASH_OF_MISSING, CheckpointError

MISSING = 2  # in a buffer of labels, beside 0 and 1


class TaskMetrics:
    """AUC, GAUC, log loss, normalized entropy and calibration per task, exact over batches and ranks.

    Every example counts with its weight; one without a label (NaN) or of weight 0 does not count, task by task.
    Logits are taken as float32, sums are float64. What `compute` says of each task::

        auc              P(a positive scores above a negative), a tie counts half; from a histogram of the logits
        auc_error_bound  `auc` is at most this far from the exact value, whatever the data: computed from the bins. A
                         few 1e-6 for click logits with 2^18 bins; 4 times the bins, a quarter of it; 0 if bins only
                         hold equal scores
        gauc             sum_u w_u auc_u / sum_u w_u over the users that have both classes: auc_u is exact, w_u the
                         weight of all labelled impressions of the user (unweighted data: their number)
        gauc_users       how many users have both classes
        logloss          cross entropy per example, in nats
        ne               normalized entropy: logloss / logloss of predicting label_mean for everybody
        calibration      sum of predictions / sum of labels
        label_mean, prediction_mean
        examples         labelled examples, counted without weights

    What is not defined is nan: auc and ne with one class, calibration without a positive, gauc without such a user. A
    nan logit makes all but the counts and label_mean of its task nan.

    The state (`state_dict`) is plain tensors that merge by sum and maximum, 32 bytes per bin and task. The rows that
    GAUC needs, 12 + 5 T bytes an example on the rank that saw it, are *not* in it: after loading a state, gauc covers
    what is seen from then on. To save once for all ranks use `reduced_state_dict`, and read that with
    `load_reduced_state_dict`, in a job of any size.

    NE and calibration are the definitions of torchrec.metrics, on sums of our own: its module knows no missing labels,
    wants a fixed batch size and keeps windows that we do not ask for. A test holds the values equal.

    Args:
        tasks: names of the T tasks, in the order of the logits' columns.
        num_bins: K, bins of the histograms, even.
        gauc: keep the rows that GAUC needs. Off for data without a user key or without end.
        device: where state and rows live, best where the logits are.

    Raises:
        ValueError: no task, a task twice, or num_bins not even and positive.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        num_bins: int = 1 << 18,
        gauc: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks must be names, each once, got {list(tasks)}")
        if num_bins < 2 or num_bins % 2:
            raise ValueError(f"num_bins must be even and at least 2, got {num_bins}")
        self.tasks, self.num_bins, self.gauc = tuple(tasks), num_bins, gauc
        self.device = torch.device("cpu" if device is None else device)
        num_tasks = len(self.tasks)
        # [T, 5]: examples, weight, labels, predictions, cross entropy
        self._sums = torch.zeros(num_tasks, 5, dtype=torch.float64, device=self.device)
        # [T, class, K] weights, and [T, (highest, -lowest), class, K] scores
        self._histogram = torch.zeros(num_tasks, 2, num_bins, dtype=torch.float64, device=self.device)
        self._extremes = torch.empty(num_tasks, 2, 2, num_bins, device=self.device)
        self._rows: list[tuple[Tensor, ...]] = []  # (groups [B], weights [B], scores [B, T], labels [B, T])
        self.reset()

    def reset(self) -> None:
        """Forgets everything seen."""
        self._sums.zero_()
        self._histogram.zero_()
        self._extremes.fill_(-torch.inf)
        self._rows.clear()

    @torch.no_grad()
    def update(self, logits_BT: Tensor, labels_BT: Tensor, weights_B: Tensor, groups_B: Tensor | None = None) -> None:
        """Adds a batch; B may be 0. Never waits for the device.

        Args:
            logits_BT: [B, T] of any floating type.
            labels_BT: [B, T] in {0, 1}, NaN = missing.
            weights_B: [B] >= 0.
            groups_B: [B] int64, the user of each example (HASH_OF_MISSING: nobody's, left out of GAUC); needed
                with `gauc` only.

        Raises:
            ValueError: the shapes do not fit each other or the tasks, or groups are missing.
        """
        self._check_shapes(logits_BT, labels_BT, weights_B, groups_B)
        logits_BT, labels_BT = logits_BT.to(self.device).float(), labels_BT.to(self.device)
        weights_B = weights_B.to(self.device).float()
        known_BT = ~labels_BT.isnan() & (weights_B > 0)[:, None]
        positive_BT = labels_BT > 0.5
        scores_BT = torch.where(known_BT, logits_BT, 0.0)
        weights_BT = torch.where(known_BT, weights_B[:, None], 0.0).double()

        self._add_sums(known_BT, positive_BT, scores_BT.double(), weights_BT)
        self._add_scores(known_BT, positive_BT, scores_BT, weights_BT)
        if self.gauc and groups_B is not None:
            groups_B = groups_B.to(self.device, torch.int64, copy=True)
            grouped_BT = known_BT & (groups_B != HASH_OF_MISSING)[:, None]
            labels_BT = torch.where(grouped_BT, positive_BT, MISSING).to(torch.uint8)
            self._rows.append((groups_B, weights_B.clone(), scores_BT, labels_BT))

    def compute(self, process_group: dist.ProcessGroup | None = None) -> dict[str, dict[str, float]]:
        """The metrics of all that was seen by the ranks of the group, the same on each of them.

        A collective call: with an initialised torch.distributed all ranks of the group (None = all ranks) must make it.
        """
        sums, histogram, extremes = self._reduced(process_group)
        examples, weight, labels, predictions, cross_entropy = sums.unbind(1)
        unordered = cross_entropy.isnan()  # nan logits have no place among the others
        auc, error_bound = (x.masked_fill(unordered, torch.nan) for x in histogram_auc(histogram, extremes))
        gauc, gauc_users = self._grouped_auc(process_group)
        label_mean = labels / weight
        entropy = -torch.xlogy(labels, label_mean) - torch.xlogy(weight - labels, 1 - label_mean)
        columns = {
            "auc": auc,
            "auc_error_bound": error_bound,
            "gauc": gauc.masked_fill(unordered, torch.nan),
            "gauc_users": gauc_users,
            "logloss": cross_entropy / weight,
            "ne": torch.where(entropy > 0, cross_entropy / entropy, torch.nan),
            "calibration": torch.where(labels > 0, predictions / labels, torch.nan),
            "label_mean": label_mean,
            "prediction_mean": predictions / weight,
            "examples": examples,
        }
        values = torch.stack(list(columns.values())).T.tolist()
        return {task: dict(zip(columns, row, strict=True)) for task, row in zip(self.tasks, values, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's own state: "<task>.sums", "<task>.histogram" and "<task>.extremes". Views, not copies."""
        return self._named(self._sums, self._histogram, self._extremes)

    def reduced_state_dict(self, process_group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
        """The state of all ranks together, equal on each of them; copies. A collective call, as `compute`."""
        return self._named(*self._reduced(process_group))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces this rank's state.

        Raises:
            CheckpointError: other tasks or another number of bins; nothing was changed then.
        """
        own = self.state_dict()
        if unlike := sorted(own.keys() ^ state.keys()):
            raise CheckpointError(
                f"metric state: expected tasks {list(self.tasks)}, but the keys {unlike} are missing or extra; "
                "load it with the tasks it was saved with, or reset the metrics"
            )
        if unlike := [name for name in own if own[name].shape != state[name].shape]:
            raise CheckpointError(
                f"metric state: {unlike[0]} has shape {list(state[unlike[0]].shape)}, expected "
                f"{list(own[unlike[0]].shape)}; load it with the num_bins it was saved with"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self._rows.clear()

    def load_reduced_state_dict(
        self, state: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None
    ) -> None:
        """Loads what `reduced_state_dict` gave, on every rank of a job of any size: once, not once a rank.

        Raises:
            CheckpointError: as `load_state_dict`.
        """
        self.load_state_dict(state)
        if is_distributed() and dist.get_rank(process_group) != 0:
            self.reset()

    def merge_(self, other: "TaskMetrics") -> "TaskMetrics":
        """Adds what the other one has seen, GAUC's rows included; the other one is left as it is.

        Raises:
            ValueError: the two differ in tasks, num_bins or gauc.
        """
        mine, theirs = ((m.tasks, m.num_bins, m.gauc) for m in (self, other))
        if mine != theirs:
            raise ValueError(f"metrics that merge must have equal (tasks, num_bins, gauc), got {mine} and {theirs}")
        self._sums += other._sums.to(self.device)
        self._histogram += other._histogram.to(self.device)
        torch.maximum(self._extremes, other._extremes.to(self.device), out=self._extremes)
        self._rows += [tuple(x.to(self.device) for x in rows) for rows in other._rows]
        return self

    def _check_shapes(self, logits: Tensor, labels: Tensor, weights: Tensor, groups: Tensor | None) -> None:
        shape = (len(weights), len(self.tasks))
        if weights.ndim != 1 or logits.shape != shape or labels.shape != shape:
            raise ValueError(
                f"expected logits and labels [B, {len(self.tasks)}] and weights [B], got logits {list(logits.shape)}, "
                f"labels {list(labels.shape)}, weights {list(weights.shape)}"
            )
        if self.gauc and (groups is None or groups.shape != weights.shape):
            given = "none" if groups is None else str(list(groups.shape))
            raise ValueError(f"GAUC needs groups [{len(weights)}], got {given}; without a user key set gauc=False")

    def _add_sums(self, known_BT: Tensor, positive_BT: Tensor, scores_BT: Tensor, weights_BT: Tensor) -> None:
        signed_BT = torch.where(positive_BT, scores_BT, -scores_BT)
        terms = (
            known_BT.double(),
            weights_BT,
            torch.where(positive_BT, weights_BT, 0.0),
            weights_BT * scores_BT.sigmoid(),
            weights_BT * -F.logsigmoid(signed_BT),
        )
        self._sums += torch.stack([term.sum(0) for term in terms], -1)

    def _add_scores(self, known_BT: Tensor, positive_BT: Tensor, scores_BT: Tensor, weights_BT: Tensor) -> None:
        tasks_T = torch.arange(len(self.tasks), device=self.device)
        bins_BT = score_bins(scores_BT, self.num_bins) + torch.where(positive_BT, self.num_bins, 0)
        place = (bins_BT + tasks_T * (2 * self.num_bins)).flatten()
        self._histogram.view(-1).index_add_(0, place, weights_BT.flatten())
        place = (bins_BT + tasks_T * (4 * self.num_bins)).flatten()
        for offset, bounds_BT in ((0, scores_BT), (2 * self.num_bins, -scores_BT)):
            bounds = bounds_BT.masked_fill(~known_BT, -torch.inf).flatten()
            self._extremes.view(-1).scatter_reduce_(0, place + offset, bounds, "amax")

    def _reduced(self, process_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        return (
            all_reduced(self._sums, dist.ReduceOp.SUM, process_group),
            all_reduced(self._histogram, dist.ReduceOp.SUM, process_group),
            all_reduced(self._extremes, dist.ReduceOp.MAX, process_group),
        )

    def _named(self, sums: Tensor, histogram: Tensor, extremes: Tensor) -> dict[str, Tensor]:
        state = {"sums": sums, "histogram": histogram, "extremes": extremes}
        return {f"{task}.{name}": x[t] for t, task in enumerate(self.tasks) for name, x in state.items()}

    def _grouped_auc(self, process_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """-> GAUC and number of users [T]. Rows go to the rank that owns their user; then only sums are reduced."""
        if not self.gauc:
            nothing = torch.full((len(self.tasks),), torch.nan, dtype=torch.float64, device=self.device)
            return nothing, nothing
        groups, weights, scores, labels = to_owners(*self._all_rows(), process_group)
        names, groups = torch.unique(groups, return_inverse=True)
        totals = torch.zeros(len(self.tasks), 3, dtype=torch.float64, device=self.device)
        for t in range(len(self.tasks)):
            known = labels[:, t] != MISSING
            pairs = grouped_pairs(groups[known], len(names), scores[known, t], labels[known, t] == 1, weights[known])
            mixed = (pairs.positives > 0) & (pairs.negatives > 0)
            weight = (pairs.positives + pairs.negatives)[mixed]
            totals[t] = torch.stack([(weight * pairs.auc()[mixed]).sum(), weight.sum(), mixed.sum().double()])
        weighted_auc, weight, users = all_reduced(totals, dist.ReduceOp.SUM, process_group).unbind(1)
        return weighted_auc / weight, users

    def _all_rows(self) -> tuple[Tensor, list[Tensor]]:
        empty = (
            torch.empty(0, dtype=torch.int64, device=self.device),
            torch.empty(0, device=self.device),
            torch.empty(0, len(self.tasks), device=self.device),
            torch.empty(0, len(self.tasks), dtype=torch.uint8, device=self.device),
        )
        groups, *columns = (torch.cat(parts) for parts in zip(empty, *self._rows, strict=True))
        return groups, columns
