"""FlatDNN: the fields side by side into an MLP."""

from collections.abc import Sequence

from hmoe_rec.experts.base import Expert, SideBySide


class FlatDNNExpert(Expert):
    """relu(MLP(flatten(x))).

    Args:
        num_fields: F.
        dim: D.
        out_dim: H.
        hidden: widths of the hidden layers before the last one.
        dropout: in [0, 1).

    Source: the "FlatDNN" box of arXiv 2403.00793 (overview figure), a plain DNN.
    """

    def __init__(
        self, num_fields: int, dim: int, out_dim: int, *, hidden: Sequence[int] = (256,), dropout: float = 0.0
    ) -> None:
        super().__init__(SideBySide(), num_fields * dim, out_dim, hidden=hidden, dropout=dropout)
