"""DCN V2: explicit feature crosses of rising degree, then an MLP."""

from collections.abc import Sequence

from torch import Tensor, nn

from hmoe_rec.experts.base import Expert


class CrossLayers(nn.Module):
    r"""x_{l+1} = x_0 * (W_l x_l + b_l) + x_l on the flattened fields; W full, or U V^T of a given rank.

    Args:
        width: F*D.
        num_layers: crosses; the result holds products of up to num_layers + 1 fields.
        rank: width of the low-rank form; None = full.

    Raises:
        ValueError: num_layers < 1 or rank outside [1, width].

    Source: Wang et al., "DCN V2", WWW 2021, arXiv 2008.13535, equations 1 and 2. The same sum as
    torchrec.modules.crossnet.CrossNet, written with nn.Linear so that it is one plain matmul under autocast.
    """

    def __init__(self, width: int, num_layers: int, rank: int | None = None) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be >= 1, got {num_layers}")
        if rank is not None and not 1 <= rank <= width:
            raise ValueError(f"rank must be in [1, {width}] (number of fields x width), got {rank}")
        self.layers = nn.ModuleList(
            nn.Linear(width, width)
            if rank is None
            else nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
            for _ in range(num_layers)
        )

    def forward(self, fields_BFD: Tensor) -> Tensor:
        x0 = x = fields_BFD.flatten(1)
        for layer in self.layers:
            x = x0 * layer(x) + x
        return x


class DCNv2Expert(Expert):
    """relu(MLP(cross layers(x))).

    Args:
        num_fields: F.
        dim: D.
        out_dim: H.
        num_layers: cross layers.
        rank: of the low-rank form; None = full (F*D x F*D weights a layer).
        hidden: widths of hidden layers between the crosses and the last layer.
        dropout: in [0, 1).

    Raises:
        ValueError: num_layers < 1 or a rank outside [1, F*D].

    Source: DCN V2, arXiv 2008.13535 (stacked form); as an expert of one embedding set: arXiv 2310.04400, 2403.00793.
    """

    def __init__(
        self,
        num_fields: int,
        dim: int,
        out_dim: int,
        *,
        num_layers: int = 2,
        rank: int | None = None,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        width = num_fields * dim
        super().__init__(CrossLayers(width, num_layers, rank), width, out_dim, hidden=hidden, dropout=dropout)
