"""Models of 1, 10 and 100 TB on 64, 512 and 2,048 GPUs that are not here: is there a plan, how long is a step, and why.

    python tools/reproduce/scale.py --out runs/scale
    python tools/reproduce/scale.py --sizes 10 --tables 1000 --gpus 1024 --write-config runs/ten_terabytes.yaml

A model has four embedding sets of widths 32, 64, 64 and 128, each with a table for every field. Fields differ as those
of ads models do, by orders of magnitude (ours): rows are log-normal with sigma 2, so that the largest of 250 fields has
a tenth of all rows; three of four fields have one id per example, a fifth has lists of 2 to 19, the rest of 20 to 99.
Times are the planner's estimates of the embedding part of a step; the dense part comes on top. No table is allocated.
"""

import json
import math
import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from hmoe_rec.config.file import to_yaml
from hmoe_rec.sharding.prediction import PARTS
from hmoe_rec.types import EmbeddingSet, Features, IdField
from hmoe_rec.units import format_bytes, format_count

WIDTHS = (32, 64, 64, 128)
SIGMA = 2.0
LEAST_ROWS = 10_000
SHOWN_REMEDIES = 3


@dataclass(frozen=True)
class Case:
    """A model and a cluster.

    Attributes:
        terabytes: 10^12 bytes of fp32 weights, without optimizer state.
        tables: over all sets.
        batch: examples per GPU.
    """

    terabytes: float
    tables: int
    gpus: int
    topology: str = "h100x8"
    batch: int = 512
    seed: int = 1
    seconds: float = 120.0


@dataclass(frozen=True)
class Result:
    """What the planner made of a case.

    Attributes:
        ms: of the busiest rank, by part; empty where there is no plan.
        imbalance: busiest rank over the mean.
        held: bytes of the fullest rank and of the mean rank, what is reserved left out.
        types: sharding type -> tables.
        missing: why there is no plan; remedies that were tried and make it fit, with their ms per step.
        plan_seconds: wall time of the planner; peak_bytes: of the process that planned.
    """

    case: Case
    largest: int
    ms: dict[str, float] = field(default_factory=dict)
    imbalance: float = 0.0
    held: tuple[float, float] = (0.0, 0.0)
    types: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    missing: str = ""
    remedies: list[tuple[str, float]] = field(default_factory=list)
    in_vain: list[str] = field(default_factory=list)
    plan_seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def total_ms(self) -> float:
        return sum(self.ms.values())

    @property
    def examples_per_second(self) -> float:
        return self.case.gpus * self.case.batch / self.total_ms * 1e3


# --------------------------------------------------------------------------------------------------------------- models


def fields(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(rows, mean ids per example) of each field; every set has a table for each."""
    rng = np.random.default_rng(case.seed)
    count = case.tables // len(WIDTHS)
    rows = np.exp(rng.normal(0.0, SIGMA, count))
    kind = rng.random(count)
    few, many = rng.integers(2, 20, count), rng.integers(20, 100, count)
    ids = np.where(kind < 0.75, 1, np.where(kind < 0.95, few, many)).astype(float)
    rows *= case.terabytes * 1e12 / (4 * sum(WIDTHS) * rows.sum())
    return np.maximum(rows, LEAST_ROWS).astype(np.int64), ids


def features(case: Case) -> tuple[Features, dict[str, float]]:
    """The fields as the model takes them, and their pooling factors."""
    rows, ids = fields(case)
    names = [f"f{i:04d}" for i in range(len(rows))]
    made = [IdField(n, int(r), hashed=True, multi_valued=k > 1) for n, r, k in zip(names, rows, ids, strict=True)]
    return Features(ids=tuple(made)), dict(zip(names, ids.tolist(), strict=True))


def run_file(case: Case) -> dict[str, Any]:
    """The same model as a run file, for `hmoe-rec plan`."""
    rows, ids = fields(case)
    columns = []
    for i, (r, k) in enumerate(zip(rows.tolist(), ids.tolist(), strict=True)):
        lists = {"pooling": "sum", "max_length": int(2 * k)} if k > 1 else {}
        columns.append({"name": f"f{i:04d}", "num_embeddings": r, "mode": "hash"} | lists)
    return {
        "data": {"train": "s3://my-bucket/ads/train/"},
        "features": {"ids": columns},
        "tasks": [{"name": "click"}, {"name": "conversion"}],
        "model": {
            "preset": "ame",
            "widths": list(WIDTHS),
            "expert": [{"kind": "flat_dnn", "hidden": [512]}, {"kind": "dcnv2", "num_layers": 2, "rank": 64}],
            "gate_sets": {"click": "set1", "conversion": "set2"},
        },
        "train": {"global_batch_size": case.gpus * case.batch},
        "sharding": {
            "pooling": {f"f{i:04d}": k for i, k in enumerate(ids.tolist()) if k > 1},
            "seconds": case.seconds,
        },
    }


# ------------------------------------------------------------------------------------------------------------- planning


def solve(case: Case) -> Result:
    """Plans one case; in a process of its own, so that its memory can be told."""
    import torch

    from hmoe_rec.embedding.lookup import MultiEmbedding
    from hmoe_rec.sharding.constraints import Constraints
    from hmoe_rec.sharding.planner import plan_for
    from hmoe_rec.sharding.suggestions import DoesNotFitError
    from hmoe_rec.sharding.topology import cluster_of
    from hmoe_rec.training.optimizer import attach_table_optimizer

    known, pooling = features(case)
    sets = [EmbeddingSet(f"set{i + 1}", width) for i, width in enumerate(WIDTHS)]
    model = MultiEmbedding(known, sets, device=torch.device("meta"))
    attach_table_optimizer(model, kind="rowwise_adagrad", lr=0.02, eps=1e-8)
    cluster = cluster_of(case.topology)
    cluster = cluster.with_nodes(math.ceil(case.gpus / cluster.ranks_per_node))
    largest = max(f.num_rows for f in known.ids) * max(WIDTHS) * 4
    begin = time.perf_counter()
    rules = Constraints(pooling=pooling)
    try:
        planned = plan_for(model, cluster, batch_size=case.batch, constraints=rules, seconds=case.seconds)
        prediction = planned.prediction
    except DoesNotFitError as error:
        took, tried = time.perf_counter() - begin, error.suggestions
        return Result(
            case,
            largest,
            missing=_reason(error),
            remedies=[(s.what, s.ms or 0.0) for s in tried if s.fits],
            in_vain=[s.what for s in tried if not s.fits],
            plan_seconds=took,
            peak_bytes=_peak(),
        )
    took = time.perf_counter() - begin
    held = [sum(v for k, v in r.hbm.items() if k != "reserved") for r in prediction.ranks]
    worst = max(prediction.ranks, key=lambda r: r.total_ms)
    sent: Counter[str] = Counter()
    for t in prediction.tables:
        sent.update(t.sent)
    return Result(
        case,
        largest,
        ms=dict(worst.ms),
        imbalance=prediction.imbalance,
        held=(max(held), sum(held) / len(held)),
        types=dict(Counter(t.sharding_type for t in prediction.tables)),
        sent=dict(sent),
        plan_seconds=took,
        peak_bytes=_peak(),
    )


def _reason(error: Any) -> str:
    if error.missing_bytes:
        return f"{format_bytes(error.missing_bytes)} too little"
    return "enough in sum, but " + next(
        (line.strip() for line in str(error).splitlines() if "found no room" in line or "no way" in line),
        "no placement",
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -------------------------------------------------------------------------------------------------------------- reports


def limit_of(result: Result) -> str:
    """The largest part of the step on the busiest rank, and its share."""
    part = max(result.ms, key=lambda p: result.ms[p])
    return (
        f"{part.replace('_', ' ').replace('all to all', 'all-to-all')} {100 * result.ms[part] / result.total_ms:.0f} %"
    )


def markdown(results: Sequence[Result]) -> str:
    """A row per case; and what would make the others fit."""
    columns = (
        *(
            "model",
            "tables",
            "GPUs",
            "ms a step",
            "million examples/s",
            "largest part of the busiest rank",
            "imbalance",
        ),
        *("fullest rank (mean)", "table_wise / table_row_wise / row_wise", "planner"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in results:
        c = r.case
        head = f"| {c.terabytes:g} TB | {format_count(c.tables)} | {c.gpus:,} |"
        if not r.ms:
            remedy = "; ".join(f"{what} ({ms:.3g} ms)" for what, ms in r.remedies[:1]) or "nothing that was tried"
            lines.append(f"{head} no plan: {r.missing} | fits with: {remedy} | | | | | {r.plan_seconds:.0f} s |")
            continue
        types = " / ".join(f"{r.types.get(t, 0):,}" for t in ("table_wise", "table_row_wise", "row_wise"))
        memory = f"{format_bytes(r.held[0])} ({format_bytes(r.held[1])})"
        speed = f"{r.total_ms:.1f} | {r.examples_per_second / 1e6:.1f} | {limit_of(r)} | {r.imbalance:.2f}"
        planner = f"{r.plan_seconds:.0f} s, {format_bytes(r.peak_bytes)}"
        lines.append(f"{head} {speed} | {memory} | {types} | {planner} |")
    for r in results:
        if not r.ms:
            what = [f"  - {what}: {ms:.3g} ms a step" for what, ms in r.remedies[:SHOWN_REMEDIES]]
            vain = [f"  - in vain: {'; '.join(r.in_vain)}"] if r.in_vain else []
            c = r.case
            lines += [f"\n{c.terabytes:g} TB, {c.tables:,} tables, {c.gpus:,} GPUs: {r.missing}", *what, *vain]
    return "\n".join(lines) + "\n"


def picture(path: Path, results: Sequence[Result]) -> None:
    """Parts of the step of the busiest rank, a bar per case that fits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [r for r in results if r.ms]
    labels = [f"{r.case.terabytes:g} TB\n{r.case.tables:,} tables\n{r.case.gpus:,} GPUs" for r in shown]
    figure, axes = plt.subplots(figsize=(1.2 * len(shown) + 3, 4.5))
    bottom = np.zeros(len(shown))
    for part in PARTS:
        heights = np.array([r.ms.get(part, 0.0) for r in shown])
        if heights.any():
            axes.bar(labels, heights, bottom=bottom, label=part.replace("_", " ").replace("all to all", "all-to-all"))
            bottom += heights
    for x, (height, r) in enumerate(zip(bottom, shown, strict=True)):
        axes.annotate(f"{r.examples_per_second / 1e6:.1f} M/s", (x, height), ha="center", va="bottom", fontsize=8)
    axes.set(ylabel="ms a step, busiest rank (embedding part, predicted)")
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ----------------------------------------------------------------------------------------------------------------- main


def main(
    sizes: Annotated[str, typer.Option(help="Comma list of terabytes.")] = "1,10,100",
    tables: Annotated[str, typer.Option(help="Comma list; over all four sets.")] = "1000,4000",
    gpus: Annotated[str, typer.Option(help="Comma list.")] = "64,512,2048",
    topology: Annotated[str, typer.Option(help="A name or file, as of hmoe-rec plan.")] = "h100x8",
    batch: Annotated[int, typer.Option(help="Examples per GPU.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the fields.")] = 1,
    seconds: Annotated[float, typer.Option(help="The planner looks no longer for a better plan.")] = 120.0,
    jobs: Annotated[int, typer.Option(help="Cases at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for scale.json, scale.md, scale.png.")] = Path("runs/scale"),
    write_config: Annotated[
        Path | None, typer.Option(help="Plan nothing; write the first model as a run file, for hmoe-rec plan.")
    ] = None,
) -> None:
    """Plan large models for large clusters, and say what limits them."""
    cases = [
        Case(float(size), int(count), int(g), topology, batch, seed, seconds)
        for size in sizes.split(",")
        for count in tables.split(",")
        for g in gpus.split(",")
    ]
    if write_config is not None:
        case = cases[0]
        head = f"# Made by tools/reproduce/scale.py: {case.terabytes:g} TB in {case.tables:,} tables of four sets.\n"
        write_config.parent.mkdir(parents=True, exist_ok=True)
        write_config.write_text(head + to_yaml(run_file(case)))
        typer.echo(f"wrote {write_config}: hmoe-rec plan {write_config} --topology {topology}")
        return
    out.mkdir(parents=True, exist_ok=True)
    results: dict[Case, Result] = {}
    with Progress(console=Console(stderr=True)) as bar, get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        task = bar.add_task("cases", total=len(cases))
        for result in pool.imap_unordered(solve, cases):
            c = result.case
            results[c] = result
            shown = f"{result.total_ms:.1f} ms" if result.ms else "no plan"
            bar.update(
                task, advance=1, description=f"{c.terabytes:g} TB, {c.tables:,} tables, {c.gpus:,} GPUs: {shown}"
            )
    ordered = [results[case] for case in cases]
    (out / "scale.json").write_text(json.dumps([asdict(r) for r in ordered], indent=1))
    (out / "scale.md").write_text(markdown(ordered))
    if any(r.ms for r in ordered):
        picture(out / "scale.png", ordered)
    typer.echo(markdown(ordered))


if __name__ == "__main__":
    typer.run(main)
