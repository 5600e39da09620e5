"""One loss per task [T] -> what each adds to the sum that is minimized [T]: fixed weights, learned ones, or by pace."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class TaskWeighting(nn.Module):
    """Losses -> contributions, and the weights that they imply.

    Parameters and persistent buffers belong to the training, not to the served model; they are in its checkpoints.

    Args:
        task_weights: >= 0, of every task's loss, whatever else weighs it.
        distributed: several processes, each with its share of the loss; the mean over them is the loss.
    """

    task_weights_T: Tensor

    def __init__(self, task_weights: Sequence[float], distributed: bool) -> None:
        super().__init__()
        self.distributed = distributed
        self.register_buffer("task_weights_T", torch.tensor(list(task_weights)), persistent=False)

    def forward(self, losses_T: Tensor, present_T: Tensor) -> Tensor:
        """
        Args:
            losses_T: nats; 0 where there is nothing to learn from.
            present_T: 1 where the global batch has something that the task learns from, else 0.
        """
        raise NotImplementedError(f"{type(self).__name__} defines forward(losses_T, present_T)")

    def weights(self) -> Tensor | None:
        """The present weight of every loss [T]; None = as they were given."""
        return None


class FixedWeighting(TaskWeighting):
    """The task weights as they are given."""

    def forward(self, losses_T: Tensor, present_T: Tensor) -> Tensor:
        return losses_T * self.task_weights_T


class UncertaintyWeighting(TaskWeighting):
    r"""Weights that are learned, as the noise of each task.

    .. math:: e^{-s_t} L_t + s_t / 2, \qquad s_t = \log \sigma_t^2

    At the optimum e^{s_t} = 2 L_t, so that a loss counts relative to its own size. The s_t start at 0 and are trained
    by the dense optimizer with its rate and weight decay; a batch that a task cannot learn from leaves its s_t alone.

    Source: Kendall, Gal, Cipolla, CVPR 2018, arXiv 1705.07115, its form for cross-entropy.
    """

    def __init__(self, task_weights: Sequence[float], distributed: bool) -> None:
        super().__init__(task_weights, distributed)
        self.log_variance_T = nn.Parameter(torch.zeros(len(task_weights)))

    def forward(self, losses_T: Tensor, present_T: Tensor) -> Tensor:
        uncertain_T = (-self.log_variance_T).exp() * losses_T + self.log_variance_T / 2
        return self.task_weights_T * present_T * uncertain_T

    def weights(self) -> Tensor:
        return self.task_weights_T * (-self.log_variance_T.detach()).exp()


class DWAWeighting(TaskWeighting):
    r"""Dynamic weight average: tasks whose loss falls slowly get more weight.

    .. math:: \lambda_t = T\,\mathrm{softmax}_t(r_t / \tau), \qquad r_t = \bar L_t(n-1) / \bar L_t(n-2)

    with the mean losses of the last two intervals; 1 in the first two. The paper's intervals are epochs; as models
    here often see their data once, they are a number of steps (ours).

    Args:
        temperature: tau > 0; large = equal weights.
        every: steps of an interval.

    Source: Liu, Johns, Davison, CVPR 2019, arXiv 1803.10704.
    """

    sums_2T: Tensor
    last_T: Tensor
    steps: Tensor
    lambda_T: Tensor

    def __init__(
        self, task_weights: Sequence[float], distributed: bool, *, temperature: float = 2.0, every: int = 100
    ) -> None:
        super().__init__(task_weights, distributed)
        if temperature <= 0 or every < 1:
            raise ValueError(f"temperature must be > 0 and every >= 1, got {temperature} and {every}")
        self.temperature, self.every = temperature, every
        num_tasks = len(task_weights)
        self.register_buffer("sums_2T", torch.zeros(2, num_tasks))  # of the interval: losses, steps with a label
        self.register_buffer("last_T", torch.zeros(num_tasks))  # mean losses of the interval before; 0 = none yet
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("lambda_T", torch.ones(num_tasks))

    def forward(self, losses_T: Tensor, present_T: Tensor) -> Tensor:
        contributions_T = losses_T * self.task_weights_T * self.lambda_T.clone()
        if self.training:
            self._observe(losses_T.detach().clone(), present_T)
        return contributions_T

    def weights(self) -> Tensor:
        return self.task_weights_T * self.lambda_T

    @torch.no_grad()
    def _observe(self, losses_T: Tensor, present_T: Tensor) -> None:
        """All in tensors: nothing waits for the device but the count of steps, which is the same everywhere."""
        if self.distributed:
            dist.all_reduce(losses_T)
            losses_T /= dist.get_world_size()
        self.sums_2T += torch.stack([losses_T, present_T])
        self.steps += 1
        ends = self.steps % self.every == 0
        mean_T = torch.where(self.sums_2T[1] > 0, self.sums_2T[0] / self.sums_2T[1].clamp(min=1), self.last_T)
        pace_T = torch.where(self.last_T > 0, mean_T / self.last_T.clamp(min=1e-12), torch.ones_like(mean_T))
        lambda_T = len(pace_T) * (pace_T / self.temperature).softmax(0)
        self.lambda_T.copy_(torch.where(ends, lambda_T, self.lambda_T))
        self.last_T.copy_(torch.where(ends, mean_T, self.last_T))
        self.sums_2T.mul_(~ends)
