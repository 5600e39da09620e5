"""Rare positives leave negatives without a gradient, and ranking losses give it back: the smallest check of that.

    python tools/reproduce/ranking_gradients.py --picture ranking_gradients.png

One batch of 4,096 calibrated logits as on Criteo (1,049 positives, AUC .81), where a positive weighs beta = .1, so that
3.3 % of the weight is positive. The mean absolute gradient on the logits of negatives, for cross-entropy (BCE) and for
alpha BCE + (1 - alpha) of a ranking loss:

* BCE: p_j / N. A calibrated p is small where positives are rare.
* pair: (1 / N-) mean over positives of sigmoid(z_j - z_i): it depends on the gap, not on p.
* list: e^z_j over the sum of the list; RCR: p_j (1 - p_j) over the sum of its probabilities.

Source: arXiv 2403.14144, section 4. Its plots show 7.3e-6 to 7.8e-6 for BCE, 4.8e-5 to 5.7e-5 for pair, 1.3e-4 to
1.7e-4 for list and RCR. The two normal distributions of the logits are ours, chosen to have Criteo's AUC and rate.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hmoe_rec.kinds import resolve
from hmoe_rec.losses import LOSSES
from hmoe_rec.losses.base import Examples

POSITIVES, NEGATIVES = 1049, 3047
MEANS, DEVIATION = {1.0: -2.604, 0.0: -4.132}, 1.236
KINDS = ("pair", "list", "rcr")


@dataclass(frozen=True)
class Batch:
    logits_B: Tensor
    labels_B: Tensor


def draw(seed: int) -> Batch:
    """Logits that are normal within each class: log odds of the weighted rate + a common variance, thus calibrated."""
    generator = torch.Generator().manual_seed(seed)
    labels_B = torch.cat([torch.ones(POSITIVES), torch.zeros(NEGATIVES)]).double()
    noise_B = torch.randn(len(labels_B), generator=generator, dtype=torch.float64)
    means_B = torch.where(labels_B > 0, MEANS[1.0], MEANS[0.0]).double()
    return Batch(means_B + DEVIATION * noise_B, labels_B)


def on_negatives(batch: Batch, kind: str | None, *, beta: float, alpha: float) -> float:
    """Mean absolute gradient by the logits of negatives; kind None = cross-entropy alone."""
    z_B = batch.logits_B.clone().requires_grad_()
    examples = Examples.of(z_B, batch.labels_B)
    loss = resolve("bce", LOSSES)(positive_weight=beta).mean(examples)
    if kind is not None:
        options = {} if kind == "pair" else {"positive_weight": beta}
        loss = alpha * loss + (1 - alpha) * resolve(kind, LOSSES)(**options).mean(examples)
    (gradient_B,) = torch.autograd.grad(loss, z_B)
    return gradient_B[batch.labels_B == 0].abs().mean().item()


def by_hand(batch: Batch, kind: str | None, *, beta: float, alpha: float) -> float:
    """The same from the formulas in the head of this file."""
    z_B, positive_B = batch.logits_B, batch.labels_B > 0
    p_B, negative_B = z_B.sigmoid(), batch.labels_B == 0
    bce = p_B[negative_B].mean() / len(z_B)
    if kind is None:
        return bce.item()
    if kind == "pair":
        ranking = (z_B[negative_B].unsqueeze(0) - z_B[positive_B].unsqueeze(1)).sigmoid().mean() / negative_B.sum()
    else:
        scores_B = z_B.exp() if kind == "list" else p_B
        moved_B = scores_B if kind == "list" else p_B * (1 - p_B)
        ranking = moved_B[negative_B].mean() / (beta * scores_B[positive_B].sum() + scores_B[negative_B].sum())
    return (alpha * bce + (1 - alpha) * ranking).item()


def draw_picture(path: Path, seeds: list[int], alpha: float) -> None:
    """Gradient over beta, with the logits of the same classes shifted so that they stay calibrated."""
    from matplotlib.figure import Figure

    betas = [0.1, 0.2, 0.4, 0.6, 0.8, 1.0]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind in (None, *KINDS):
        values = []
        for beta in betas:
            shift = torch.tensor(beta / 0.1).log()
            batches = [Batch(b.logits_B + shift, b.labels_B) for b in map(draw, seeds)]
            values.append(mean(on_negatives(batch, kind, beta=beta, alpha=alpha) for batch in batches))
        rates = [beta * POSITIVES / (beta * POSITIVES + NEGATIVES) for beta in betas]
        axes.plot(rates, values, marker="o", label=kind or "bce alone")
    axes.set(xlabel="share of the weight that is positive", ylabel="mean |gradient| on negatives", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(
    seeds: Annotated[str, typer.Option(help="Comma list of batches.")] = "1,2,3,4,5",
    beta: Annotated[float, typer.Option(help="Weight of a positive.")] = 0.1,
    alpha: Annotated[float, typer.Option(help="Weight of cross-entropy beside a ranking loss.")] = 0.5,
    picture: Annotated[Path | None, typer.Option(help="PNG to write: the gradients over beta.")] = None,
) -> None:
    """Mean absolute gradient on negatives: cross-entropy against its combinations with ranking losses."""
    batches = [draw(int(seed)) for seed in seeds.split(",")]
    table = Table("loss", title=f"Mean |gradient| on negatives, beta {beta:g}, alpha {alpha:g}", title_justify="left")
    for column in ("autograd", "by the formula", "over BCE"):
        table.add_column(column, justify="right")
    base = mean(on_negatives(batch, None, beta=beta, alpha=alpha) for batch in batches)
    for kind in (None, *KINDS):
        found = mean(on_negatives(batch, kind, beta=beta, alpha=alpha) for batch in batches)
        formula = mean(by_hand(batch, kind, beta=beta, alpha=alpha) for batch in batches)
        table.add_row(kind or "bce", f"{found:.2e}", f"{formula:.2e}", f"{found / base:.1f}")
    Console().print(table)
    if picture is not None:
        draw_picture(picture, [int(seed) for seed in seeds.split(",")], alpha)
        Console().print(f"picture: {picture}")


if __name__ == "__main__":
    typer.run(main)
