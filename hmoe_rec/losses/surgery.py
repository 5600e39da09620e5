"""Gradients of tasks at what they share -> one gradient without the parts that work against each other."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class PCGrad(nn.Module):
    r"""Projecting conflicting gradients, at the outputs of the experts.

    .. math:: g_i \leftarrow g_i - \frac{g_i \cdot g_j}{\lVert g_j \rVert^2}\,g_j \quad \text{if } g_i \cdot g_j < 0

    for every task i and, in turn, every other task j; g_j is the original one. The gradients are those by the experts'
    outputs h [E, B, H]. Their inner products are over all examples of the global batch, and over the experts that both
    tasks train: an expert that one of them only reads or does not reach keeps the gradient that it has. What comes out
    goes on by one backward pass into experts, encoders and tables.

    What this does not do. FBGEMM's fused optimizer steps the tables inside of backward, so that a table's gradient can
    neither be held back nor taken per task: conflicts are resolved before the tables, not at them, and not parameter
    by parameter. Towers and gates belong to one task and have nothing to resolve; what reaches the tables through the
    inputs of the gates is left as it is. It costs a backward pass through gates and towers for every task, and T times
    the memory of h.

    Args:
        trains: [task][expert]: whether the task trains the expert.
        distributed: several processes, each with a part of the batch: the inner products are summed over them (one
            all-reduce of E T^2 numbers), so that they do the same as one process with the whole.

    Source: Yu et al., NeurIPS 2020, arXiv 2001.06782; there by parameters, with j in random order, here in cyclic order
    after i. Gradients at shared activations: Sener, Koltun, NeurIPS 2018, arXiv 1810.04650 (MGDA-UB).
    """

    both_TTE: Tensor

    def __init__(self, trains: Sequence[Sequence[bool]], distributed: bool) -> None:
        super().__init__()
        self.distributed = distributed
        trains_TE = torch.tensor([[float(cell) for cell in row] for row in trains])
        self.register_buffer("both_TTE", trains_TE.unsqueeze(0) * trains_TE.unsqueeze(1), persistent=False)

    def forward(self, losses_T: Tensor, cut_EBH: Tensor, h_EBH: Tensor) -> tuple[Tensor, Tensor]:
        """-> a scalar to add to the loss, of value 0, which carries the merged gradient to h; the share of conflicts.

        Args:
            losses_T: what each task adds to the loss, as functions of `cut_EBH`.
            cut_EBH: a leaf with the values of h: the loss itself does not reach h.
        """
        parts = [torch.autograd.grad(loss, cut_EBH, retain_graph=True)[0] for loss in losses_T.unbind()]
        g_TEBH = torch.stack(parts)
        dots_TTE = torch.einsum("iebh,jebh->ije", g_TEBH.float(), g_TEBH.float())
        if self.distributed:
            dist.all_reduce(dots_TTE)
        mix_TTE, conflicts = self.coefficients(dots_TTE)
        merged_EBH = torch.einsum("te,tebh->ebh", mix_TTE.sum(0).to(g_TEBH.dtype), g_TEBH)
        # Its value is exactly 0, its gradient by h is `merged`.
        return (merged_EBH * (h_EBH - h_EBH.detach())).sum(), conflicts

    def coefficients(self, dots_TTE: Tensor) -> tuple[Tensor, Tensor]:
        """Inner products per expert -> how much of g_k [k] is in the projected g_i [i], and the share of conflicts."""
        num_tasks, _, num_experts = dots_TTE.shape
        own_TTE = torch.eye(num_tasks, device=dots_TTE.device).unsqueeze(2).repeat(1, 1, num_experts)
        rows, conflicts = [], dots_TTE.new_zeros(())
        for i in range(num_tasks):
            mix_TE = own_TTE[i]
            for j in ((i + k) % num_tasks for k in range(1, num_tasks)):
                both_E = self.both_TTE[i, j]
                dot = (both_E * (mix_TE * dots_TTE[:, j]).sum(0)).sum().clamp(max=0)
                conflicts = conflicts + (dot < 0)
                square = (both_E * dots_TTE[j, j]).sum()
                step = torch.where(square > 0, dot / torch.where(square > 0, square, 1.0), 0.0)
                mix_TE = mix_TE - step * both_E * own_TTE[j]
            rows.append(mix_TE)
        return torch.stack(rows), conflicts / max(1, num_tasks * (num_tasks - 1))
