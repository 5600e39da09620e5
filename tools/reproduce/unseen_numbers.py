"""Which encoders of a number know something of values that training never showed?

    python tools/reproduce/unseen_numbers.py --picture unseen_numbers.png

The price effect of the synthetic log: whole prices from 0 to 1023, P(1) = sigmoid(f(price)) with a wave and a step.
Three values in ten never occur in training. Every encoder gets the same MLP behind it, the same examples and steps.
Reported is the root mean square error of the logit over the seen and over the unseen prices, and the AUC on them.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from hmoe_rec.data.synthetic_world import PRICE_LEVELS, price_effect
from hmoe_rec.encoding import NUMBERS
from hmoe_rec.encoding.numbers import batch_value
from hmoe_rec.kinds import resolve
from hmoe_rec.layers import MLP
from hmoe_rec.metrics.auc import exact_auc
from hmoe_rec.types import NumberField, NumberStatistics

DIM, BATCH = 8, 1024
STEEPNESS = 2.0
ENCODERS: Mapping[str, Mapping] = {
    "mnse": {"kind": "mnse"},
    "mnse, base 2": {"kind": "mnse", "bases": (2,)},
    "id per value": {},
    "quantile, 32 bins": {"kind": "quantile", "num_bins": 32},
    "quantile, 256 bins": {"kind": "quantile", "num_bins": 256},
    "log_square": {"kind": "log_square"},
    "scalar": {"kind": "scalar"},
    "autodis": {"kind": "autodis"},
    "periodic": {"kind": "periodic"},
    "piecewise_linear": {"kind": "piecewise_linear"},
}


class IdPerValue(nn.Module):
    """A row for every price: what an id field would do."""

    def __init__(self, number: NumberField) -> None:
        super().__init__()
        self.number = number
        self.rows = nn.Embedding(PRICE_LEVELS, DIM)

    def forward(self, numbers_BN: Tensor) -> Tensor:
        prices = (numbers_BN * self.number.std + self.number.mean).expm1().round().long()
        return self.rows(prices.clamp(0, PRICE_LEVELS - 1))


@dataclass(frozen=True)
class World:
    """
    Attributes:
        seen: [1024] bool, prices that training shows.
        share: [1024] how often a price is drawn, over the seen ones 1.
    """

    seen: np.ndarray
    share: np.ndarray
    number: NumberField


def make_world(seed: int, unseen_share: float) -> World:
    rng = np.random.default_rng(seed)
    seen = rng.random(PRICE_LEVELS) >= unseen_share
    share = np.where(seen, 1.0 / (1.0 + np.arange(PRICE_LEVELS)) ** 0.5, 0.0)
    share /= share.sum()
    prices = np.sort(rng.choice(PRICE_LEVELS, 200_000, p=share)).astype(float)
    logs = np.log1p(prices)
    quantiles = tuple(np.quantile(prices, np.linspace(0, 1, 257)))
    squares = np.where(prices > 2, np.floor(np.log(np.maximum(prices, 1.0)) ** 2), prices - 2)
    bins = tuple(int(b) for b, count in zip(*np.unique(squares, return_counts=True), strict=True) if count >= 10)
    low, high = np.quantile(prices, [0.001, 0.999])
    fitted = NumberStatistics(
        len(prices), 0, float(prices[0]), float(prices[-1]), float(low), float(high), True, quantiles, bins
    )
    number = NumberField("price", "log1p", float(logs.mean()), float(logs.std()), statistics=fitted)
    return World(seen, share, number)


def learned_logits(world: World, encoder: nn.Module, steps: int, seed: int) -> np.ndarray:
    """The logit of every price after training on seen ones."""
    torch.manual_seed(seed)
    head = MLP(len(getattr(encoder, "field_names", ("price",))) * DIM, (64,), linear_output=1)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    values = torch.tensor([batch_value(world.number, float(p)) for p in range(PRICE_LEVELS)])
    chances = torch.sigmoid(STEEPNESS * torch.from_numpy(price_effect(np.arange(PRICE_LEVELS)))).float()
    share = torch.from_numpy(world.share)
    for _ in range(steps):
        prices = torch.multinomial(share, BATCH, replacement=True)
        logits = head(encoder(values[prices].unsqueeze(1)).flatten(1)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.bernoulli(chances[prices]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return head(encoder(values.unsqueeze(1)).flatten(1)).squeeze(1).numpy()


def make_encoder(name: str, number: NumberField, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    options = dict(ENCODERS[name])
    if not options:
        return IdPerValue(number)
    return resolve(options.pop("kind"), NUMBERS)([number], DIM, **options)


def judge(world: World, logits: np.ndarray) -> dict[str, float]:
    """Error of the logit and expected AUC, over the seen and the unseen prices, each price counted once."""
    truth = STEEPNESS * price_effect(np.arange(PRICE_LEVELS))
    figures = {}
    for name, chosen in (("seen", world.seen), ("unseen", ~world.seen)):
        figures[f"error {name}"] = float(np.sqrt(np.mean((logits - truth)[chosen] ** 2)))
        chance = 1 / (1 + np.exp(-truth[chosen]))
        scores = torch.from_numpy(np.concatenate([logits[chosen], logits[chosen]]))
        labels = torch.from_numpy(np.repeat([1.0, 0.0], chosen.sum()))
        # Every price stands for P positives and 1 - P negatives.
        figures[f"auc {name}"] = exact_auc(scores, labels, torch.from_numpy(np.concatenate([chance, 1 - chance])))
    return figures


def picture(path: Path, world: World, curves: Mapping[str, np.ndarray]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    prices = np.arange(PRICE_LEVELS)
    figure, panels = plt.subplots(len(curves), 1, figsize=(9, 1.8 * len(curves)), sharex=True, squeeze=False)
    for panel, (name, logits) in zip(panels[:, 0], curves.items(), strict=True):
        panel.plot(prices, STEEPNESS * price_effect(prices), "k-", lw=1)
        panel.plot(prices[world.seen], logits[world.seen], ".", ms=2, label="seen")
        panel.plot(prices[~world.seen], logits[~world.seen], "r.", ms=3, label="unseen")
        panel.set(title=name, ylabel="logit", ylim=(-4, 6))
    panels[0, 0].legend()
    panels[-1, 0].set(xlabel="price", xscale="symlog")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    encoders: Annotated[str, typer.Option(help="Comma list of places in the table, from 1; all by default.")] = "",
    seeds: Annotated[str, typer.Option(help="Comma list.")] = "1,2,3,4,5",
    steps: Annotated[int, typer.Option(help=f"Training steps of {BATCH} examples.")] = 1500,
    unseen: Annotated[float, typer.Option(help="Share of prices that training does not show.")] = 0.3,
    picture_file: Annotated[Path | None, typer.Option("--picture", help="Write the learned curves as PNG.")] = None,
) -> None:
    """Compare encoders of numbers on values between those that were seen."""
    names = list(ENCODERS)
    chosen = [names[int(i) - 1] for i in encoders.split(",")] if encoders else names
    numbers = [int(seed) for seed in seeds.split(",")]
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    curves: dict[str, np.ndarray] = {}
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("runs", total=len(chosen) * len(numbers))
        for seed in numbers:
            world = make_world(seed, unseen)
            for name in chosen:
                logits = learned_logits(world, make_encoder(name, world.number, seed), steps, seed)
                figures[name].append(judge(world, logits))
                curves.setdefault(name, logits)
                progress.advance(bar)
    best = judge(make_world(numbers[0], unseen), STEEPNESS * price_effect(np.arange(PRICE_LEVELS)))
    title = f"Price effect, {unseen:.0%} of the prices never seen, {len(numbers)} seeds: mean ± standard deviation"
    table = Table("encoder", title=title, title_justify="left")
    columns = ("error seen", "error unseen", "auc seen", "auc unseen")
    for column in columns:
        table.add_column(column, justify="right")
    for name, runs in figures.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        table.add_row(name, *cells)
    Console(width=120).print(table)
    print(
        f"the true probabilities reach AUC {best['auc seen']:.3f} on seen and {best['auc unseen']:.3f} on unseen prices"
    )
    if picture_file is not None:
        picture(picture_file, make_world(numbers[0], unseen), curves)


if __name__ == "__main__":
    typer.run(main)
