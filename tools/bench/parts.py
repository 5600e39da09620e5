"""What every expert and encoder costs: time and bytes moved per example, forward and backward, one table.

    python tools/bench/parts.py
    python tools/bench/parts.py --only cin,fmfm --threads 2 --precision bf16

Parts take turns in every round, so that a noisy machine is unfair to none; the figure is the median over the rounds.
Bytes are what the operators read and write (views are free), so they show what a fused kernel could save.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hmoe_rec.encoding import NUMBERS, POOLINGS
from hmoe_rec.experts import EXPERTS
from hmoe_rec.kinds import resolve
from hmoe_rec.types import NumberField, NumberStatistics


class BytesMoved(TorchDispatchMode):
    """Adds up the sizes of what operators read and write; an operator whose result is a view of its input is free."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.total += sum(x.numel() * x.element_size() for x in tensors)
        return result


@dataclass(frozen=True)
class Candidate:
    """A module, and what makes its inputs; inputs that are float get a gradient, as they do in a model."""

    name: str
    module: nn.Module
    inputs: Callable[[], tuple[Tensor, ...]]
    flops: int | None = None


def experts(batch: int, num_fields: int, dim: int, out_dim: int) -> list[Candidate]:
    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(batch, num_fields, dim, requires_grad=True),)

    made = []
    for kind in EXPERTS:
        module = resolve(kind, EXPERTS)(num_fields, dim, out_dim)
        made.append(Candidate(f"expert {kind}", module, inputs, module.flops))
    return made


def numbers(batch: int, count: int, dim: int) -> list[Candidate]:
    """Numbers as standardized logarithms of counts, one in twenty missing."""
    quantiles = tuple(float(i) for i in range(257))
    fitted = NumberStatistics(10**6, 0, 0.0, 10_000.0, 0.0, 5000.0, True, quantiles, tuple(range(-2, 60)))
    fields = [NumberField(f"n{i}", "log1p", 3.0, 1.5, statistics=fitted) for i in range(count)]

    def inputs() -> tuple[Tensor, ...]:
        values = torch.randn(batch, count)
        return (values.masked_fill(torch.rand(batch, count) < 0.05, float("nan")),)

    return [Candidate(f"numbers {kind}", resolve(kind, NUMBERS)(fields, dim), inputs) for kind in NUMBERS]


def poolings(batch: int, length: int, dim: int) -> list[Candidate]:
    """Histories between empty and full, half full on average, oldest first."""

    def inputs() -> tuple[Tensor, ...]:
        lengths = torch.randint(0, length + 1, (batch, 1))
        mask = torch.arange(length) < lengths
        behaviors = (torch.randn(batch, length, dim) * mask[..., None]).requires_grad_()
        ages = torch.rand(batch, length).sort(1, descending=True).values * 1e6 * mask
        return behaviors, torch.randn(batch, dim, requires_grad=True), mask, ages

    return [Candidate(f"sequence {kind}", resolve(kind, POOLINGS)(dim, length, True), inputs) for kind in POOLINGS]


def step(candidate: Candidate, inputs: tuple[Tensor, ...], bf16: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = candidate.module(*inputs)
    tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.backward(tensors, [torch.ones_like(x) for x in tensors])
    for x in [*inputs, *candidate.module.parameters()]:
        x.grad = None


def measure(candidates: list[Candidate], rounds: int, bf16: bool) -> Mapping[str, tuple[float, int]]:
    """Name -> seconds of a step (median over rounds), bytes moved in a step."""
    seconds: dict[str, list[float]] = {c.name: [] for c in candidates}
    moved: dict[str, int] = {}
    for c in candidates:  # the first step warms up and counts bytes
        inputs = c.inputs()
        with BytesMoved() as counter:
            step(c, inputs, bf16)
        moved[c.name] = counter.total
    for _ in track(range(rounds), "rounds", console=Console(stderr=True)):
        for c in candidates:
            inputs = c.inputs()
            began = time.perf_counter()
            step(c, inputs, bf16)
            seconds[c.name].append(time.perf_counter() - began)
    return {name: (statistics.median(times), moved[name]) for name, times in seconds.items()}


def main(
    batch: Annotated[int, typer.Option(help="Examples of a step.")] = 2048,
    fields: Annotated[int, typer.Option(help="Fields that an expert sees.")] = 39,
    dim: Annotated[int, typer.Option(help="Width of the embedding set.")] = 16,
    out_dim: Annotated[int, typer.Option(help="Width of the experts' output.")] = 128,
    num_numbers: Annotated[int, typer.Option(help="Numbers that are encoded.")] = 13,
    length: Annotated[int, typer.Option(help="Most behaviors of a history.")] = 50,
    columns: Annotated[int, typer.Option(help="Behavior columns side by side.")] = 2,
    rounds: Annotated[int, typer.Option(help="Timed steps of every part.")] = 9,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    only: Annotated[str | None, typer.Option(help="Comma list of kinds. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of parameters and inputs.")] = 1,
) -> None:
    """Time every kind of expert and encoder."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    candidates = [
        *experts(batch, fields, dim, out_dim),
        *numbers(batch, num_numbers, dim),
        *poolings(batch, length, columns * dim),
    ]
    if only:
        candidates = [c for c in candidates if c.name.split()[1] in only.split(",")]
    figures = measure(candidates, rounds, precision == "bf16")
    title = (
        f"Forward + backward per example: batch {batch}, {fields} fields x {dim}, H {out_dim}; {num_numbers} numbers; "
        f"{length} behaviors x {columns} columns; {precision}, {threads} thread(s), median of {rounds}"
    )
    table = Table("part", title=title, title_justify="left")
    for column in ("microseconds", "bytes moved", "parameters", "flops forward", "GFLOP/s"):
        table.add_column(column, justify="right")
    for c in candidates:
        seconds, moved = figures[c.name]
        parameters = sum(p.numel() for p in c.module.parameters())
        # A backward pass is about two forward passes.
        speed = "" if c.flops is None else f"{3 * c.flops * batch / seconds / 1e9:.1f}"
        flops = "" if c.flops is None else f"{c.flops:,}"
        table.add_row(c.name, f"{1e6 * seconds / batch:.2f}", f"{moved / batch:,.0f}", f"{parameters:,}", flops, speed)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
