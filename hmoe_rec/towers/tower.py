"""What each task mixed [T][B, H] -> logits [B, T]."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hmoe_rec.layers import MLP, module_dict, run_together
from hmoe_rec.towers.base import TaskTowers


class Towers(TaskTowers):
    """One MLP per task, which ends in one logit; towers of equal shape run as one batched matmul a layer.

    Args:
        tasks: names.
        in_dims: width that each tower gets.
        hidden: widths of the hidden layers.
        dropout: in [0, 1).
        two_logits: tasks whose tower ends in (z_0, z_1), one logit per class; the task's logit is z_1 - z_0.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        in_dims: Sequence[int],
        *,
        hidden: Sequence[int] = (64,),
        dropout: float = 0.0,
        two_logits: Sequence[str] = (),
    ) -> None:
        super().__init__(tasks)
        self.out_dims = [2 if task in two_logits else 1 for task in tasks]
        widths = zip(tasks, in_dims, self.out_dims, strict=True)
        towers = {task: MLP(d, hidden, linear_output=out, dropout=dropout) for task, d, out in widths}
        self.towers = module_dict("task", towers)
        self.together = len(set(in_dims)) == 1 and len(set(self.out_dims)) == 1

    def forward(self, mixed: Sequence[Tensor]) -> Tensor:
        """-> logits [B, T]."""
        if 2 in self.out_dims:
            levels_BT2 = self.levels(mixed)
            return levels_BT2[..., 1] - levels_BT2[..., 0]
        if self.together:
            return self._together(mixed).squeeze(2).transpose(0, 1)
        return torch.cat(self._one_by_one(mixed), dim=1)

    def levels(self, mixed: Sequence[Tensor]) -> Tensor:
        """-> the logits of both classes [B, T, 2]; a tower with one logit has z_0 = 0."""
        if self.together and 2 in self.out_dims:
            return self._together(mixed).transpose(0, 1)
        levels = [torch.cat([torch.zeros_like(z[:, :1]), z], 1)[:, -2:] for z in self._one_by_one(mixed)]
        return torch.stack(levels, 1)

    def features(self, mixed: Sequence[Tensor]) -> list[Tensor]:
        """[T] of [B, P + 1]: what each tower's last layer sees, and a 1 for its bias."""
        hidden = [tower.hidden(mixed[t]) for t, tower in enumerate(self._mlps())]
        return [torch.cat([h_BP, torch.ones_like(h_BP[:, :1])], 1) for h_BP in hidden]

    @torch.no_grad()
    def shift(self, by: Mapping[str, float]) -> None:
        """Adds to the constant of each task's logit; of two logits to that of class 1."""
        for task, tower in zip(self.tasks, self._mlps(), strict=True):
            tower.linear(-1).bias[-1] += by[task]

    def _together(self, mixed: Sequence[Tensor]) -> Tensor:
        return run_together(self._mlps(), [mixed[t] for t in range(len(self.tasks))])

    def _one_by_one(self, mixed: Sequence[Tensor]) -> list[Tensor]:
        return [self.towers[task](mixed[t]) for t, task in enumerate(self.tasks)]

    def _mlps(self) -> list[MLP]:
        return [tower for task in self.tasks if isinstance(tower := self.towers[task], MLP)]
