"""What each task mixed [T][B, H] -> logits [B, T]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hmoe_rec.layers import MLP, run_together


class Towers(nn.Module):
    """One MLP per task, which ends in one logit; towers of equal shape run as one batched matmul a layer.

    Args:
        tasks: names.
        in_dims: width that each tower gets.
        hidden: widths of the hidden layers.
        dropout: in [0, 1).
    """

    def __init__(
        self, tasks: Sequence[str], in_dims: Sequence[int], *, hidden: Sequence[int] = (64,), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.towers = nn.ModuleDict(
            {task: MLP(d, hidden, linear_output=1, dropout=dropout) for task, d in zip(tasks, in_dims, strict=True)}
        )
        self.together = len(set(in_dims)) == 1

    def forward(self, mixed: Sequence[Tensor]) -> Tensor:
        towers = [tower for task in self.tasks if isinstance(tower := self.towers[task], MLP)]
        if self.together:
            return run_together(towers, [mixed[t] for t in range(len(towers))]).squeeze(2).transpose(0, 1)
        return torch.cat([tower(mixed[t]) for t, tower in enumerate(towers)], dim=1)
