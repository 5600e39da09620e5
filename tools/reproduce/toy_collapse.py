"""A partner with few values pulls an embedding table onto few directions: the smallest experiment that shows it.

    python tools/reproduce/toy_collapse.py --picture toy_collapse.png

Three fields with tables E_1, E_2 (100 rows each) and E_3 (3 or 100 rows) of width 10, drawn from N(0, 1). Examples are
all 100 x 100 pairs (x_1, x_2), each with an x_3 and a label drawn uniformly: there is nothing to learn. An example's
score is <e_1, e_2> + <e_1, e_3> + <e_2, e_3>; only E_1 is trained, by full-batch gradient descent of the mean binary
cross-entropy. With 3 rows in E_3 the information abundance (IA) of E_1 falls further than with 100.

Source: arXiv 2310.04400 version 1 (toy experiment of interaction-collapse theory); the width of 10 is ours.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from hmoe_rec.metrics.spectrum import gram, information_abundance, singular_values

# Letters of shapes: I values of x_1, J values of x_2, K width; an example is a pair (i, j).
NUM_VALUES = 100
RECORD_EVERY = 50


@dataclass(frozen=True)
class Examples:
    """All that stays as it is: the score of example (i, j) is <E_1[i], partners[i, j]> + offsets[i, j]."""

    partners_IJK: Tensor
    offsets_IJ: Tensor
    labels_IJ: Tensor


@dataclass(frozen=True)
class Run:
    """One training of E_1.

    Attributes:
        steps, abundances: IA(E_1) over time; the first is the start, the last is the end.
        spectrum_K: singular values of the trained E_1 over the largest one.
    """

    steps: list[int]
    abundances: list[float]
    spectrum_K: Tensor


def draw(seed: int, num_partner_values: int, dim: int) -> tuple[Tensor, Examples]:
    """E_1 at its start [I, K], and the examples. E_1 and E_2 depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    double = torch.float64
    e1_IK, e2_JK = torch.randn(2, NUM_VALUES, dim, generator=generator, dtype=double)
    e3 = torch.randn(num_partner_values, dim, generator=generator, dtype=double)
    x3_IJ = torch.randint(num_partner_values, (NUM_VALUES, NUM_VALUES), generator=generator)
    labels_IJ = torch.randint(2, (NUM_VALUES, NUM_VALUES), generator=generator).to(double)
    return e1_IK, examples_of(e2_JK, e3[x3_IJ], labels_IJ)


def examples_of(e2_JK: Tensor, third_IJK: Tensor, labels_IJ: Tensor) -> Examples:
    """<e_1, e_2> + <e_1, e_3> + <e_2, e_3> = <e_1, e_2 + e_3> + <e_2, e_3>."""
    return Examples(e2_JK + third_IJK, (e2_JK * third_IJK).sum(-1), labels_IJ)


def gradient(e1_IK: Tensor, examples: Examples) -> Tensor:
    """Of the mean binary cross-entropy by E_1: (sigmoid(score) - label) x partners, summed over j, over all I J."""
    scores_IJ = (examples.partners_IJK @ e1_IK.unsqueeze(2)).squeeze(2) + examples.offsets_IJ
    errors_IJ = scores_IJ.sigmoid() - examples.labels_IJ
    return (errors_IJ.unsqueeze(1) @ examples.partners_IJK).squeeze(1) / errors_IJ.numel()


def train(seed: int, num_partner_values: int, *, dim: int, num_steps: int, learning_rate: float) -> Run:
    e1_IK, examples = draw(seed, num_partner_values, dim)
    steps, abundances = [], []
    for step in range(num_steps + 1):
        if step % RECORD_EVERY == 0 or step == num_steps:
            steps.append(step)
            abundances.append(information_abundance(singular_values(gram(e1_IK))).item())
        if step < num_steps:
            e1_IK = e1_IK - learning_rate * gradient(e1_IK, examples)
    values_K = singular_values(gram(e1_IK))
    return Run(steps, abundances, values_K / values_K[0])


def table(runs: dict[int, dict[int, Run]]) -> Table:
    """num_partner_values -> seed -> run: one row a seed, and the mean."""
    result = Table(title="IA(E_1) at the start and at the end", title_justify="left")
    result.add_column("seed")
    for num_partner_values in runs:
        result.add_column(f"D_3 = {num_partner_values}: start", justify="right", no_wrap=True)
        result.add_column("end", justify="right")
    seeds = list(next(iter(runs.values())))
    rows = {str(seed): [by_seed[seed].abundances for by_seed in runs.values()] for seed in seeds}
    for seed, abundances in rows.items():
        result.add_row(seed, *ends(abundances), end_section=seed == str(seeds[-1]))
    over_seeds = zip(*rows.values(), strict=True)
    result.add_row("mean", *ends([mean_curve(curves) for curves in over_seeds]))
    return result


def ends(curves: Iterable[list[float]]) -> list[str]:
    """The first and the last value of every curve."""
    return [f"{curve[i]:.2f}" for curve in curves for i in (0, -1)]


def mean_curve(curves: Iterable[list[float]]) -> list[float]:
    return [statistics.mean(values) for values in zip(*curves, strict=True)]


def draw_picture(runs: dict[int, dict[int, Run]], path: Path) -> None:
    """Spectra at the end, and IA over steps: one thin line per seed, the mean thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    spectra, curves = figure.subplots(1, 2)
    for i, (num_partner_values, by_seed) in enumerate(runs.items()):
        all_runs, color = list(by_seed.values()), f"C{i}"
        ranks = range(1, len(all_runs[0].spectrum_K) + 1)
        for run in all_runs:
            spectra.plot(ranks, run.spectrum_K, color=color, alpha=0.3, linewidth=1)
            curves.plot(run.steps, run.abundances, color=color, alpha=0.3, linewidth=1)
        label = f"$D_3$ = {num_partner_values}"
        mean_K = torch.stack([run.spectrum_K for run in all_runs]).mean(0)
        spectra.plot(ranks, mean_K, color=color, linewidth=2, marker="o", markersize=4, label=label)
        mean = mean_curve(run.abundances for run in all_runs)
        curves.plot(all_runs[0].steps, mean, color=color, linewidth=2, label=label)
    spectra.set(title="Spectrum of the trained $E_1$", xlabel="k", ylabel="$s_k / s_1$", ylim=(0, 1.05))
    curves.set(title="Information abundance of $E_1$", xlabel="step", ylabel="IA")
    for axes in (spectra, curves):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(
    seeds: Annotated[str, typer.Option(help="Comma list.")] = "1,2,3",
    partners: Annotated[str, typer.Option(help="Rows of E_3, comma list.")] = "3,100",
    dim: Annotated[int, typer.Option(help="Width of the tables.", min=1)] = 10,
    steps: Annotated[int, typer.Option(help="Steps of gradient descent.", min=0)] = 5000,
    learning_rate: Annotated[float, typer.Option(help="Of the gradient descent.")] = 1.0,
    picture: Annotated[Path | None, typer.Option(help="PNG to write: spectra, and IA over steps.")] = None,
) -> None:
    """Train E_1 beside a partner of few and of many values, and compare its information abundance."""
    numbers, sizes = whole_numbers(seeds), whole_numbers(partners)
    runs: dict[int, dict[int, Run]] = {size: {} for size in sizes}
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("runs", total=len(sizes) * len(numbers))
        for size in sizes:
            for seed in numbers:
                runs[size][seed] = train(seed, size, dim=dim, num_steps=steps, learning_rate=learning_rate)
                progress.advance(bar)
    Console().print(table(runs))
    if picture is not None:
        draw_picture(runs, picture)
        Console().print(f"picture: {picture}")


if __name__ == "__main__":
    typer.run(main)
