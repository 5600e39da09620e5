"""What exploration costs and brings where new ads keep coming: regret of policies on one simulated market.

    python tools/reproduce/regret.py --out runs/regret

The market is `hmoe_rec.explore.environment`: its click model is known, and of a new ad's quality only clicks tell. All
policies have one learner (Bayesian logistic regression), meet the same requests with the same luck, show one ad per
request, and learn from a round's clicks after the round. Regret is the true click probability of the best candidate
minus that of the one shown; it is "cold" where the best candidate came less than ten rounds ago. Differences to greedy
are paired, seed by seed: one smaller than two of its standard errors is none.

What is planted (market, strengths of the policies) was chosen on seeds 100 to 103. All of it is ours.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress

from hmoe_rec.explore.environment import Environment, Market
from hmoe_rec.explore.policies import UCB, EpsilonGreedy, Greedy, Policy, Thompson
from hmoe_rec.explore.simulation import simulate
from hmoe_rec.uncertainty.logistic import BayesianLogistic

MARKET = Market(rounds=100, requests=500, candidates=20, live=40, affinity=0.5, quality_std=1.5)
POLICIES: Mapping[str, Policy] = {
    "greedy": Greedy(),
    "epsilon .01": EpsilonGreedy(epsilon=0.01),
    "epsilon .05": EpsilonGreedy(epsilon=0.05),
    "UCB .5": UCB(kappa=0.5),
    "UCB 1": UCB(kappa=1.0),
    "Thompson .5": Thompson(scale=0.5),
    "Thompson 1": Thompson(scale=1.0),
}


@dataclass(frozen=True)
class Run:
    """One policy on one seed; sums round by round [R]."""

    policy: str
    seed: int
    regret: list[float]
    cold_regret: list[float]
    clicks: float
    cold_requests: float
    cold_shown: float


def run(job: tuple[str, int, Market]) -> Run:
    name, seed, market = job
    torch.set_num_threads(1)  # matrices are small: threads only wait for each other
    environment = Environment(market, seed)
    learner = BayesianLogistic(environment.num_features)
    h = simulate(environment, POLICIES[name], learner, seed=seed)
    totals = (float(x.sum()) for x in (h.clicks, h.cold_requests, h.cold_shown))
    return Run(name, seed, h.regret.tolist(), h.cold_regret.tolist(), *totals)


def results(todo: Sequence[tuple[str, int, Market]], jobs: int) -> Iterator[Run]:
    if jobs == 1:
        yield from map(run, todo)
        return
    with get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(run, todo)


def per_thousand(runs: Sequence[Run], what: str, market: Market) -> list[float]:
    """Expected clicks lost per 1,000 requests (of those whose best ad is new), seed by seed."""
    requests = [r.cold_requests if what == "cold_regret" else market.rounds * market.requests for r in runs]
    return [1000 * sum(getattr(r, what)) / n if n else 0.0 for r, n in zip(runs, requests, strict=True)]


def summary(runs: Mapping[str, Sequence[Run]], market: Market) -> list[dict[str, Any]]:
    """A record per policy: means over seeds, and paired differences to the first policy with their standard errors."""
    base = next(iter(runs))
    records = []
    for name, of_policy in runs.items():
        total = market.rounds * market.requests
        record: dict[str, Any] = {"policy": name}
        record["clicks"] = statistics.mean(1000 * r.clicks / total for r in of_policy)
        record["new_shown"] = statistics.mean(r.cold_shown / total for r in of_policy)
        for what in ("regret", "cold_regret"):
            values = per_thousand(of_policy, what, market)
            of_base = per_thousand(runs[base], what, market)
            differences = [v - b for v, b in zip(values, of_base, strict=True)]
            record[what] = statistics.mean(values)
            record[f"{what}_spread"] = statistics.stdev(values) if len(values) > 1 else 0.0
            record[f"{what}_minus_{base}"] = statistics.mean(differences)
            record[f"{what}_error"] = standard_error(differences)
            record[f"{what}_better"] = sum(d < 0 for d in differences)
        records.append(record)
    return records


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def markdown(records: Sequence[Mapping[str, Any]], num_seeds: int) -> str:
    base = records[0]["policy"]
    columns = (
        "policy",
        "lost per 1,000 requests",
        f"minus {base}",
        "lost per 1,000 whose best ad is new",
        f"minus {base}",
    )
    lines = [f"| {' | '.join((*columns, 'seeds better', 'new ads shown', 'clicks per 1,000'))} |", "|---" * 8 + "|"]
    for r in records:
        cells = [r["policy"]]
        for what in ("regret", "cold_regret"):
            cells.append(f"{r[what]:.1f} ±{r[f'{what}_spread']:.1f}")
            difference = f"{r[f'{what}_minus_{base}']:+.1f} ±{r[f'{what}_error']:.1f}"
            cells.append("" if r["policy"] == base else difference)
        cells.append("" if r["policy"] == base else f"{r['cold_regret_better']} of {num_seeds}")
        cells += [f"{r['new_shown']:.1%}".replace("%", " %"), f"{r['clicks']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(path: Path, runs: Mapping[str, Sequence[Run]]) -> None:
    """Cumulative regret, all of it and on new ads: mean over seeds, with a band of one standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for panel, what, title in (
        (panels[0], "regret", "all requests"),
        (panels[1], "cold_regret", "requests whose best ad came less than ten rounds ago"),
    ):
        for i, (name, of_policy) in enumerate(runs.items()):
            curves_SR = np.cumsum([getattr(r, what) for r in of_policy], 1)
            mean_R, rounds = curves_SR.mean(0), np.arange(1, curves_SR.shape[1] + 1)
            panel.plot(rounds, mean_R, color=f"C{i}", label=name)
            if len(curves_SR) > 1:
                error_R = curves_SR.std(0, ddof=1) / math.sqrt(len(curves_SR))
                panel.fill_between(rounds, mean_R - error_R, mean_R + error_R, color=f"C{i}", alpha=0.15, linewidth=0)
        panel.set(title=title, xlabel="rounds", ylabel="expected clicks lost so far")
        panel.legend()
    base, *others = runs
    for i, name in enumerate(others, 1):
        pairs = zip(runs[name], runs[base], strict=True)
        points = [sum(r.cold_regret) - sum(b.cold_regret) for r, b in pairs]
        panels[2].scatter(points, [i] * len(points), color=f"C{i}", s=14)
        panels[2].scatter([statistics.mean(points)], [i], color=f"C{i}", marker="|", s=400)
    panels[2].axvline(0, color="gray", linewidth=1)
    panels[2].set_yticks(range(1, len(runs)), others)
    panels[2].invert_yaxis()
    panels[2].set(title=f"new ads: lost beside {base}, a dot per seed", xlabel=f"clicks lost minus those of {base}")
    figure.savefig(path, dpi=120)


def main(
    seeds: Annotated[str, typer.Option(help="Comma list.")] = ",".join(map(str, range(1, 13))),
    policies: Annotated[str, typer.Option(help="Comma list; the first is the base.")] = ",".join(POLICIES),
    rounds: Annotated[int, typer.Option(help="Batches of requests; policies learn between them.")] = MARKET.rounds,
    requests: Annotated[int, typer.Option(help="Of a round.")] = MARKET.requests,
    arrivals: Annotated[int, typer.Option(help="Ads that are replaced in a round.")] = MARKET.arrivals,
    quality_std: Annotated[
        float, typer.Option(help="Of what only clicks tell of an ad, on the logit.")
    ] = MARKET.quality_std,
    jobs: Annotated[int, typer.Option(help="Simulations at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for regret.json, regret.md, regret.png.")] = Path("runs/regret"),
) -> None:
    """Simulate policies on one market and compare what they lose."""
    names, numbers = policies.split(","), [int(seed) for seed in seeds.split(",")]
    if unknown := [name for name in names if name not in POLICIES]:
        raise typer.BadParameter(f"policy {unknown[0]!r}; expected some of {', '.join(POLICIES)}")
    market = replace(MARKET, rounds=rounds, requests=requests, arrivals=arrivals, quality_std=quality_std)
    todo = [(name, seed, market) for seed in numbers for name in names]
    found: list[Run] = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("simulations", total=len(todo))
        for result in results(todo, jobs):
            found.append(result)
            progress.advance(bar)
    runs = {name: [r for r in found if r.policy == name] for name in names}
    records = summary(runs, market)
    out.mkdir(parents=True, exist_ok=True)
    content = {"market": asdict(market), "seeds": numbers, "policies": records, "runs": [asdict(r) for r in found]}
    (out / "regret.json").write_text(json.dumps(content))
    (out / "regret.md").write_text(markdown(records, len(numbers)))
    picture(out / "regret.png", runs)
    typer.echo(markdown(records, len(numbers)))


if __name__ == "__main__":
    typer.run(main)
