"""The promise of the towers: what each task mixed [T][B, H] -> logits [B, T]."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class TaskTowers(nn.Module):
    """One logit per task. Subclasses take (tasks, widths that the towers get, *, options).

    Args:
        tasks: names, in the order of the labels.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)

    def forward(self, mixed: Sequence[Tensor]) -> Tensor:
        """-> logits [B, T]."""
        raise NotImplementedError(f"{type(self).__name__} defines forward(mixed) -> logits [B, T]")

    def shift(self, by: Mapping[str, float]) -> None:
        """Adds to the constant of each task's logit."""
        raise NotImplementedError(f"{type(self).__name__} defines shift(by), which starts logits at the label rates")
