"""Small layers that several rooms share: the MLP, many equal MLPs as one batched matmul, and names of modules."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
}


class MLP(nn.Module):
    """Linear layers with an activation after each; `linear_output` adds one more layer without.

    Args:
        in_dim: width of the input.
        hidden: widths of the layers; may be empty.
        linear_output: width of a last layer that has no activation; None = no such layer.
        activation: one of `ACTIVATIONS`.
        dropout: share of the hidden units dropped in training, in [0, 1).

    Raises:
        ValueError: a width < 1, an unknown activation, or neither hidden layers nor an output layer.
    """

    def __init__(
        self,
        in_dim: int,
        hidden: Sequence[int] = (),
        *,
        linear_output: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [in_dim, *hidden, *([] if linear_output is None else [linear_output])]
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"an MLP needs at least one layer and widths >= 1, got {widths}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.widths = tuple(widths)
        self.out_dim = widths[-1]
        self.num_activations = len(hidden)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True))
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        x = self.hidden(x)
        return x if self.num_activations == len(self.layers) else self.layers[-1](x)

    def hidden(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> what the layer without activation sees; without such a layer, the output."""
        for i in range(self.num_activations):
            x = self.dropout(self.activation(self.layers[i](x)))
        return x

    @property
    def flops(self) -> int:
        """Products and sums of one row's forward pass."""
        return sum(2 * i * o for i, o in zip(self.widths[:-1], self.widths[1:], strict=True))

    def linear(self, depth: int) -> nn.Linear:
        layer = self.layers[depth]
        assert isinstance(layer, nn.Linear), f"an MLP is made of linear layers, got {type(layer)}"
        return layer

    def shape_key(self) -> tuple:
        """MLPs with equal keys can run together (`run_together`)."""
        return (self.widths, self.num_activations, type(self.activation), self.dropout.p)


def run_together(mlps: Sequence[MLP], inputs: Sequence[Tensor]) -> Tensor:
    """G MLPs of equal `shape_key` on G inputs [B, I] -> [G, B, O], as one batched matmul a layer where that is faster.

    Every MLP keeps its own parameters; they are stacked here, which costs one copy of the weights (small beside the
    products for B in the thousands). Inputs that are the same tensor share one wide matmul in the first layer.
    """
    if len(mlps) == 1:
        return mlps[0](inputs[0]).unsqueeze(0)
    if not batching_pays(inputs[0]):
        return torch.stack([mlp(inputs[i]) for i, mlp in enumerate(mlps)])
    first = mlps[0]
    x_GBI = _first_layer([mlp.linear(0) for mlp in mlps], inputs)
    for depth in range(len(first.layers)):
        if depth > 0:
            layers = [mlp.linear(depth) for mlp in mlps]
            weight_GIO = torch.stack([layer.weight for layer in layers]).transpose(1, 2)
            bias_G1O = torch.stack([layer.bias for layer in layers]).unsqueeze(1)
            x_GBI = torch.baddbmm(bias_G1O, x_GBI, weight_GIO)
        if depth < first.num_activations:
            x_GBI = first.dropout(first.activation(x_GBI))
    return x_GBI


def _first_layer(layers: Sequence[nn.Linear], inputs: Sequence[Tensor]) -> Tensor:
    """[G, B, O]: one wide matmul per distinct input. Wide inputs are never copied; the results are narrower."""
    distinct: list[Tensor] = []
    members: list[list[int]] = []
    for i, x in enumerate(inputs):
        place = next((p for p, other in enumerate(distinct) if other is x), None)
        if place is None:
            distinct.append(x)
            members.append([i])
        else:
            members[place].append(i)
    parts: dict[int, Tensor] = {}
    for x, group in zip(distinct, members, strict=True):
        weight = torch.cat([layers[i].weight for i in group])
        wide = nn.functional.linear(x, weight, torch.cat([layers[i].bias for i in group]))
        wide_GBO = wide.unflatten(1, (len(group), -1)).transpose(0, 1)
        if len(group) == len(layers):
            return wide_GBO
        parts |= {i: wide_GBO[position] for position, i in enumerate(group)}
    return torch.stack([parts[i] for i in range(len(layers))])


def batching_pays(x: Tensor) -> bool:
    """For inputs such as x: batched matmuls win on a GPU and under bf16 autocast; in fp32 on a CPU they measured 25 %
    slower than a loop.
    """
    # A tracer's proxy, as in TorchRec's pipelines, is no tensor and decides nothing.
    return (isinstance(x, Tensor) and x.is_cuda) or torch.is_autocast_enabled("cpu")


def can_name_module(name: str) -> bool:
    """A part can be called that: modules are attributes of the dict that holds them, and a dot divides their paths."""
    return bool(name) and "." not in name and not hasattr(nn.ModuleDict(), name)


def module_dict(what: str, modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Modules by name.

    Args:
        what: that the names are of, for the message.

    Raises:
        ValueError: a name that `can_name_module` refuses.
    """
    for name in modules:
        if not can_name_module(name):
            raise ValueError(f"{what} {name!r}: this cannot be the name of a module; rename it")
    return nn.ModuleDict(modules)
