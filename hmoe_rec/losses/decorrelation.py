"""Outputs of all experts [E, B, H] -> one number that is 0 where no two experts vary together."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hmoe_rec.losses.ranks import SumOverRanks


class Decorrelation(nn.Module):
    r"""The size of the cross-covariances between experts, in the units of the outputs squared.

    .. math:: \frac{1}{n} \cdot \frac{1}{H^2} \sum_{p > q} \lVert O_p'^\top O_q' \rVert_1

    with O' the outputs of an expert less their mean over the n examples of the global batch, and the norm the sum of
    absolute values of a matrix. Invariant to a constant added to any output. Costs one product [E H, B] x [B, E H] and
    E^2 H^2 numbers of memory; with several processes also two all-reduces, of E H + 1 and of E^2 H^2 numbers. Call it
    outside of autocast, as all losses are: the products are then float32 even where the outputs are bfloat16.

    Args:
        distributed: several processes, each with a part of the batch (of any size, also empty): all get the value of
            the whole batch, and the mean over processes of a parameter's gradients is the gradient of that value.

    Source: Crocodile, arXiv 2405.12706 (cross-experts covariance loss). There the products are summed over the
    examples; the division by n is ours, so that the weight of this loss need not change with the batch size.
    """

    def __init__(self, distributed: bool) -> None:
        super().__init__()
        self.distributed = distributed

    def forward(self, h_EBH: Tensor, weights_B: Tensor) -> Tensor:
        """-> a scalar >= 0; 0 with one expert or fewer than two examples.

        Args:
            h_EBH: the experts' outputs.
            weights_B: examples of weight 0 do not count, all others count once (ours).
        """
        counted_B1 = (weights_B > 0).unsqueeze(1)
        # `where` and not a product, so that a padded example may hold anything; the zeros' shape makes it promote
        # bfloat16 outputs to the weights' float32.
        zeros_B1 = torch.zeros_like(weights_B).unsqueeze(1)
        mean_EH, count = self._mean(torch.where(counted_B1, h_EBH.detach(), zeros_B1), counted_B1)
        centered_EBH = torch.where(counted_B1, h_EBH - mean_EH.unsqueeze(1), zeros_B1)
        products_EEHH = torch.einsum("pbi,qbj->pqij", centered_EBH, centered_EBH)
        if self.distributed:
            products_EEHH = SumOverRanks.apply(products_EEHH)
        return products_EEHH.abs().mean((2, 3)).tril(-1).sum() / count

    def _mean(self, h_EBH: Tensor, counted_B1: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the global batch [E, H], and the number of its examples (at least 1).

        The mean takes no gradient, and needs none: the products change with it by -(sum of the centered outputs) = 0.
        It is subtracted before the product because a large common shift would drown the rest in float32.
        """
        sum_EH, count = h_EBH.sum(1), counted_B1.sum(0).to(h_EBH.dtype)
        if self.distributed:
            together = torch.cat([sum_EH.flatten(), count])
            dist.all_reduce(together)
            sum_EH, count = together[:-1].view_as(sum_EH), together[-1:]
        count = count.clamp(min=1).squeeze(0)
        return sum_EH / count, count
