"""Tensors of one process <-> what all processes have together, with gradients that fit a trainer's mean over ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SumOverRanks(torch.autograd.Function):
    """The sum over all ranks of a tensor that every rank goes on with in the same way.

    All ranks compute one and the same loss from the sum, so its gradient g is the same everywhere, and a parameter's
    true gradient is the sum over ranks of g d(part)/d(parameter). The trainer takes the mean over ranks, so that each
    one hands back W g, W = number of ranks. That needs no second all-reduce, which would meet the trainer's own ones.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * dist.get_world_size()


class RowsOfAllRanks(torch.autograd.Function):
    """The rows [B, N] of all ranks, one rank after another; from then on all ranks do the same.

    The gradient goes to the own rows only, times W, for the reason that `SumOverRanks` gives.
    """

    @staticmethod
    def forward(ctx: Any, rows_BN: Tensor, sizes: list[int]) -> Tensor:
        rank = dist.get_rank()
        ctx.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        return torch.cat(_gather(rows_BN, sizes))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.own] * dist.get_world_size(), None


def sizes_of_ranks(size: int, device: torch.device) -> list[int]:
    """The number of examples on every rank. Waits for the device."""
    own = torch.tensor([size], device=device)
    sizes = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    return torch.cat(sizes).tolist()


def rows_of_all_ranks(rows: Tensor, sizes: list[int]) -> Tensor:
    """[B, ...] -> [sum of sizes, ...]; with gradient where the rows have one."""
    if rows.requires_grad:
        return RowsOfAllRanks.apply(rows, sizes)  # type: ignore[return-value]
    return torch.cat(_gather(rows, sizes))


def _gather(rows: Tensor, sizes: list[int]) -> list[Tensor]:
    """all_gather takes tensors of one size, so the shorter ones are filled up."""
    longest = max(sizes)
    filled = rows.new_zeros(longest, *rows.shape[1:])
    filled[: len(rows)] = rows.detach()
    parts = [torch.empty_like(filled) for _ in sizes]
    dist.all_gather(parts, filled)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]
