"""Projection of conflicting gradients: the published loop, routes, and several processes against one."""

import torch
from gloo import run_ranks

from hmoe_rec.losses.surgery import PCGrad

T, E, B, H = 3, 2, 8, 5
TRAINS = [[True, True], [True, False], [True, True]]  # task 1 does not train expert 1


def pcgrad_by_loop(gradients: list[torch.Tensor], trains: list[list[bool]]) -> list[torch.Tensor]:
    """Algorithm 1 of the paper, j in cyclic order, over what both tasks train; gradients [E, ...] of each task."""
    projected = []
    for i, own in enumerate(gradients):
        g = own.clone()
        for k in range(1, len(gradients)):
            j = (i + k) % len(gradients)
            shared = [e for e in range(len(own)) if trains[i][e] and trains[j][e]]
            dot = sum((g[e] * gradients[j][e]).sum() for e in shared)
            square = sum(gradients[j][e].square().sum() for e in shared)
            if shared and dot < 0:
                for e in shared:
                    g[e] = g[e] - dot / square * gradients[j][e]
        projected.append(g)
    return projected


def task_losses(cut: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    """[T], such that tasks 0 and 2 pull against each other; a task has no gradient where it trains nothing."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.randn(T, E, B, H, dtype=cut.dtype, generator=generator)
    targets[2] = -targets[0] + 0.3 * targets[2]
    mask = torch.tensor(TRAINS, dtype=cut.dtype)
    per_task = (mask[:, :, None, None] * (cut - targets[:, :, rows]).square()).sum((1, 2, 3))
    return per_task * torch.tensor([1.0, 0.5, 2.0], dtype=cut.dtype) / B


def merged(h: torch.Tensor, distributed: bool = False, rows: slice = slice(None)) -> tuple[torch.Tensor, ...]:
    """-> value, share of conflicts, gradient by h."""
    h = h.clone().requires_grad_()
    cut = h.detach().requires_grad_()
    value, conflicts = PCGrad(TRAINS, distributed)(task_losses(cut, rows), cut, h)
    (gradient,) = torch.autograd.grad(value, h)
    return value.detach(), conflicts, gradient


def start() -> torch.Tensor:
    return 0.1 * torch.randn(E, B, H, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_equals_the_published_loop():
    cut = start().requires_grad_()
    gradients = [torch.autograd.grad(loss, cut, retain_graph=True)[0] for loss in task_losses(cut)]
    expected = sum(pcgrad_by_loop(gradients, TRAINS))
    value, conflicts, gradient = merged(start())
    assert value == 0 and 0 < conflicts < 1
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)  # inner products are float32
    assert not torch.allclose(gradient, sum(gradients), rtol=1e-2)


def test_tasks_that_agree_keep_their_gradients():
    h = start().requires_grad_()
    cut = h.detach().requires_grad_()
    losses = torch.stack([(cut * (t + 1)).sum() for t in range(T)])
    value, conflicts = PCGrad([[True] * E] * T, False)(losses, cut, h)
    (gradient,) = torch.autograd.grad(value, h)
    assert conflicts == 0
    torch.testing.assert_close(gradient, torch.full_like(gradient, 6.0))


def test_an_expert_that_one_task_trains_alone_is_not_touched():
    """The tasks conflict on expert 0, which both train; expert 1 learns from task 0 as if it were alone."""
    h = start().requires_grad_()
    cut = h.detach().requires_grad_()
    losses = torch.stack([cut.sum(), -2 * cut[0].sum()])
    value, conflicts = PCGrad([[True, True], [True, False]], False)(losses, cut, h)
    (gradient,) = torch.autograd.grad(value, h)
    assert conflicts == 1
    torch.testing.assert_close(gradient[0], torch.zeros_like(gradient[0]), rtol=0, atol=1e-6)  # opposite: both vanish
    torch.testing.assert_close(gradient[1], torch.ones_like(gradient[1]))


def on_rank(rank: int, world_size: int) -> tuple[torch.Tensor, ...]:
    rows = slice(0, 3) if rank == 0 else slice(3, B)
    return merged(start()[:, rows], True, rows)


def test_two_processes_project_as_one():
    _, conflicts, expected = merged(start())
    results = run_ranks(2, on_rank)
    assert all(result[1] == conflicts for result in results)
    torch.testing.assert_close(torch.cat([result[2] for result in results], 1), expected, rtol=1e-5, atol=1e-7)
