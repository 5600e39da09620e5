"""The promise of an expert: an interaction of its fields, then an MLP with a non-linearity to the common width H."""

from collections.abc import Sequence

from torch import Tensor, nn

from hmoe_rec.layers import MLP


class Products(nn.Module):
    """An interaction that multiplies vectors of two fields.

    Attributes:
        meets: which vectors these are, in the words of a report.
    """

    meets = "whole vectors"

    def meeting(self, fields_BFD: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
        """The two vectors [B, K] whose product stands for fields i and j, i's first; a weight below 0 of the pair has
        turned one of them."""
        return fields_BFD[:, i], fields_BFD[:, j]


class SideBySide(nn.Module):
    """[B, F, D] -> [B, F*D]: no interaction but what the MLP makes."""

    fixed = True

    def forward(self, fields_BFD: Tensor) -> Tensor:
        return fields_BFD.flatten(1)


class Expert(nn.Module):
    """[B, F, D] -> [B, H] as `mlp(interaction(fields))`.

    `flops` counts the products and sums of one example's forward pass (a multiply-add is two), parameters not counted.

    The non-linearity at the end is required: with linear experts several sets equal one wide set (arXiv 2310.04400,
    appendix). The two halves are kept apart so that equal MLPs of several experts run as one batched matmul.

    Args:
        interaction: [B, F, D] -> [B, I]. With an attribute `fixed` that is true, nothing but the fields decides what it
            says, and experts of one set share it: no parameters, options or randomness of its own.
        interaction_dim: I.
        out_dim: H.
        hidden: widths of hidden layers before the last one.
        dropout: share of units dropped in training.
        interaction_flops: of the interaction, for one example.

    Attributes:
        reads: what the expert is given of its set: "fields", or "interests" (see `hmoe_rec.encoding.pooling`).
    """

    reads = "fields"

    def __init__(
        self,
        interaction: nn.Module,
        interaction_dim: int,
        out_dim: int,
        *,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        interaction_flops: int = 0,
    ) -> None:
        super().__init__()
        self.interaction = interaction
        self.interaction_flops = interaction_flops
        self.mlp = MLP(interaction_dim, [*hidden, out_dim], dropout=dropout)

    def forward(self, fields_BFD: Tensor) -> Tensor:
        return self.mlp(self.interaction(fields_BFD))

    @property
    def flops(self) -> int:
        return self.interaction_flops + self.mlp.flops
