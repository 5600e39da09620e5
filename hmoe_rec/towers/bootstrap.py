"""What each task mixed [T][B, H] -> logits [B, T]: the mean of several towers that learn from different examples."""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from hmoe_rec.towers.base import TaskTowers
from hmoe_rec.towers.tower import Towers

DRAWS = ("poisson", "bernoulli")


class BootstrapTowers(TaskTowers):
    """K towers per task on the same input; the logit is their mean, their spread tells how sure it is.

    In training every head has a loss of its own, with example weights drawn for it by the id of the row
    (`hmoe_rec.uncertainty.bootstrap`); the experts and tables below learn from the mean of the heads' losses.

    Args:
        tasks: names.
        in_dims: width that each tower gets.
        hidden: widths of the hidden layers.
        dropout: in [0, 1).
        num_heads: K, >= 2.
        draws: of an example's weight for a head: "poisson" (mean 1) or "bernoulli" (2 or nothing).
        seed: of the draws.

    Raises:
        ValueError: fewer than two heads, or unknown draws.

    Source: Osband et al., "Deep Exploration via Bootstrapped DQN", NeurIPS 2016, arXiv 1602.04621 (heads on a shared
    network); that recommenders explore with them: no source says how, ours.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        in_dims: Sequence[int],
        *,
        hidden: Sequence[int] = (64,),
        dropout: float = 0.0,
        num_heads: int = 8,
        draws: Literal["poisson", "bernoulli"] = "poisson",
        seed: int = 0,
    ) -> None:
        super().__init__(tasks)
        if num_heads < 2:
            raise ValueError(f"num_heads must be at least 2, got {num_heads}")
        if draws not in DRAWS:
            raise ValueError(f"draws must be one of {DRAWS}, got {draws!r}")
        self.num_heads = num_heads
        self.draws, self.seed = draws, seed
        # One set of towers over all (task, head) pairs, so that towers of equal shape run as one batched matmul.
        self.places = [t for t in range(len(tasks)) for _ in range(num_heads)]
        names = [f"{task}_{k}" for task in tasks for k in range(num_heads)]
        self.towers = Towers(names, [in_dims[t] for t in self.places], hidden=hidden, dropout=dropout)

    def forward(self, mixed: Sequence[Tensor]) -> Tensor:
        return self.heads(mixed).mean(2)

    def heads(self, mixed: Sequence[Tensor]) -> Tensor:
        """Logits [B, T, K] of every head apart."""
        logits = self.towers([mixed[t] for t in self.places])
        return logits.unflatten(1, (len(self.tasks), self.num_heads))

    def shift(self, by: Mapping[str, float]) -> None:
        """Adds to the constant of each task's logit, in every head."""
        self.towers.shift({f"{task}_{k}": by[task] for task in self.tasks for k in range(self.num_heads)})
