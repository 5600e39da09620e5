"""Sequence: what a user's behaviors say of the target, as an expert of its own."""

from collections.abc import Sequence

from hmoe_rec.experts.base import Expert, SideBySide


class SequenceExpert(Expert):
    """relu(MLP([s, v, s * v])) of every behavior sequence of the set, side by side.

    s is the summary of the behaviors and v the target, as the set's pooling sees them (TIM: with their temporal
    encodings); the pooling's own field stays with the other experts.

    Args:
        num_fields: I = 3 x behavior columns: per sequence its summary, its target and their product.
        dim: D.
        out_dim: H.
        hidden: widths of the hidden layers before the last one.
        dropout: in [0, 1).

    Source: Zhou et al., "Temporal Interest Network", WWW 2024, arXiv 2308.08487: the head of the authors' code, and
    their production note that the module enters the mixture as an additional expert over the sequence features.
    """

    reads = "interests"

    def __init__(
        self, num_fields: int, dim: int, out_dim: int, *, hidden: Sequence[int] = (64,), dropout: float = 0.0
    ) -> None:
        super().__init__(SideBySide(), num_fields * dim, out_dim, hidden=hidden, dropout=dropout)
