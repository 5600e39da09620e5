"""Windows of examples, one after another -> the metrics of the last n of them together."""

from collections.abc import Sequence

from torch import Tensor

from hmoe_rec.metrics.task_metrics import TaskMetrics


class SlidingMetrics:
    """Keeps the sums and histograms of n windows, 32 bytes per bin, task and window, and forgets the oldest.

    Args:
        tasks: as those of the windows.
        windows: n.
        num_bins: as that of the windows; see `TaskMetrics`.
    """

    def __init__(self, tasks: Sequence[str], *, windows: int, num_bins: int) -> None:
        self._total = TaskMetrics(tasks, num_bins=num_bins, gauc=False)
        self._ring = {k: x.expand(windows, *x.shape).contiguous() for k, x in self._total.state_dict().items()}

    def add(self, window: TaskMetrics) -> None:
        """The newest window, of all ranks together. A collective call."""
        for name, newest in window.reduced_state_dict().items():
            kept = self._ring[name]
            kept[:-1] = kept[1:].clone()
            kept[-1] = newest

    def compute(self) -> dict[str, dict[str, float]]:
        """Of the windows that are kept; see `TaskMetrics.compute`. A collective call."""
        state = {k: x.amax(0) if k.endswith(".extremes") else x.sum(0) for k, x in self._ring.items()}
        self._total.load_reduced_state_dict(state)
        return self._total.compute()

    def state_dict(self) -> dict[str, Tensor]:
        """Equal on all ranks, of shapes that never change; to load, fill the tensors in place."""
        return self._ring
