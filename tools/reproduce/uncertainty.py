"""How sure models are of their logits, where the true logits are known: every kind of estimate on one synthetic log.

    python tools/reproduce/uncertainty.py --out runs/uncertainty

The model is that of `configs/quickstart.yaml`, the log a smaller one of its kind. A tenth of the items never occurs in
training and validation, neither as what is shown nor in histories, so that they are new in the test data. Per seed one
run has towers of kind mlp (which last layer, rows, dropout and ensemble share), one sngp and one bootstrap towers; an
ensemble is the mlp runs of all seeds. On the test rows: log loss of the mean logit and of the expected probability; how
often a central interval holds the true logit; -log N(true logit; mean, variance) in nats per row; and the chance that a
new item has a larger std than a known one. Finished runs are not run again.

"rows" has the prior variances under which the training data are likeliest, "rows x 1" those that the tables show.
"rows x 30" and "item rows x 100" have larger ones (`--row-variance`), chosen in a first look at a larger log of this
kind with its truth at hand, of 1 and 30, and of 1, 10, 100, 1000.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from compare import run_dir
from rich.console import Console
from rich.progress import Progress

from hmoe_rec.config import load_config
from hmoe_rec.data.synthetic import synthesize
from hmoe_rec.metrics.auc import exact_auc
from hmoe_rec.serving.predictor import predict_run
from hmoe_rec.training.trainer import train
from hmoe_rec.training.uncertainty import fit_uncertainty

ESTIMATES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {  # name -> towers, kind, options of the fit
    "last layer": ("mlp", "laplace", {}),
    "rows": ("mlp", "row_laplace", {}),
    "rows x 1": ("mlp", "row_laplace", {"row_variance": 1.0}),
    "rows x 30": ("mlp", "row_laplace", {"row_variance": 30.0}),
    "item rows x 100": ("mlp", "row_laplace", {"row_variance": 100.0, "ids": ["item_id"]}),
    "sngp": ("sngp", "sngp", {}),
    "bootstrap": ("bootstrap", "bootstrap", {}),
    "dropout": ("mlp", "mc_dropout", {}),
    "ensemble": ("mlp", "ensemble", {}),
}
CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml")
USERS, ITEMS = 400, 300
DROPOUT = 0.1
COMMON = ("train.global_batch_size=256", "train.epochs=2", "train.keep_checkpoints=1", "train.num_threads=1")
LEVELS = np.arange(0.05, 1.0, 0.05)
SHOWN_LEVEL = 0.9
Figures = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------- data


def make_log(folder: Path, rows: int, test_rows: int, seed: int = 1) -> np.ndarray:
    """Writes the log without the items that are held out -> their ids. Histories get others of the same category in
    their place, which leaves the true probabilities as they are: they depend on categories only."""
    sizes = {"validation_rows": test_rows // 2, "test_rows": test_rows, "num_users": USERS, "num_items": ITEMS}
    log = synthesize(folder / "log", rows=rows, seed=seed, **sizes)
    table = pq.read_table(log.train, columns=["item_id", "category_id"])
    category_of = np.zeros(int(log.truth["arguments"]["num_items"]), np.int64)
    category_of[table["item_id"].to_numpy()] = table["category_id"].to_numpy()
    held_out = np.random.default_rng(seed).permutation(len(category_of))[: len(category_of) // 10]
    instead = stand_ins(category_of, held_out)
    for split in ("train", "validation", "test"):
        table = pq.read_table(getattr(log, split))
        if split != "test":
            table = table.filter(pa.array(~np.isin(table["item_id"].to_numpy(), held_out)))
        place = table.column_names.index("hist_item_id")
        histories = table["hist_item_id"].combine_chunks()
        seen = pa.array(instead[histories.flatten().to_numpy()], histories.type.value_type)
        lengths = histories.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.r_[0, np.cumsum(lengths)], pa.int32())
        table = table.set_column(place, "hist_item_id", pa.ListArray.from_arrays(offsets, seen))
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=16384)
    return held_out


def stand_ins(category_of: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """[item] -> itself, or another item of its category in place of one that is held out."""
    instead, known = np.arange(len(category_of)), np.ones(len(category_of), bool)
    known[held_out] = False
    for item in held_out:
        same = np.flatnonzero(known & (category_of == category_of[item]))
        instead[item] = same[item % len(same)] if len(same) else np.flatnonzero(known)[0]
    return instead


# -------------------------------------------------------------------------------------------------------- runs, figures


def train_run(folder: Path, out: Path, tower: str, seed: int, task: str, overrides: Sequence[str]) -> str:
    """Trains if there is no report yet -> directory of the run."""
    directory = run_dir(out, folder.name, tower, seed, [task, *overrides])
    if not (directory / "report.json").exists():
        data = [f"data.{split}={folder / split}.parquet" for split in ("train", "validation", "test")]
        own = [
            f"data.tasks=[{task}]",
            f"model.tower.kind={tower}",
            f"model.dropout={DROPOUT if tower == 'mlp' else 0.0}",
        ]
        own += [f"train.run_dir={directory}", f"train.seed={seed}"]
        schema = f"data.schema={folder / 'log' / 'schema.yaml'}"
        train(load_config(CONFIG, ["data.synthetic=null", schema, *data, *COMMON, *own, *overrides]))
    return str(directory)


def estimate(run: str, name: str, folder: Path, out: Path, members: Sequence[str] = ()) -> tuple[pa.Table, Figures]:
    """-> predictions of the test rows with their std, in order of the log; seconds of the fit and of the prediction."""
    _, kind, options = ESTIMATES[name]
    begin = time.perf_counter()
    if kind != "bootstrap":
        fit_uncertainty(run, kind, members=members, **options)
    fitted = time.perf_counter()
    file = out / f"{Path(run).name}-{name.replace(' ', '_')}.parquet"
    file.unlink(missing_ok=True)
    predict_run(run, str(folder / "test.parquet"), str(file), uncertainty=kind)
    seconds = {"fit_seconds": fitted - begin, "predict_seconds": time.perf_counter() - fitted}
    return pq.read_table(file).sort_by("row_id"), seconds


def figures(logit: np.ndarray, std: np.ndarray, true: np.ndarray, label: np.ndarray, new: np.ndarray) -> Figures:
    """Of one task, over rows [n]: true logits; labels, nan where there is none; whether the item is new."""
    error, half_widths = np.abs(true - logit), math.sqrt(2) * torch.special.erfinv(torch.tensor(LEVELS)).numpy()
    inside = error[:, None] <= std[:, None] * half_widths
    nats = 0.5 * ((error / std) ** 2 + np.log(2 * np.pi * std**2))
    expected = logit / np.sqrt(1 + np.pi / 8 * std**2)
    found: Figures = {"new_auc": exact_auc(torch.from_numpy(std), torch.from_numpy(new.astype(float)))}
    for name, rows in (("known", ~new), ("new", new)):
        labelled = rows & ~np.isnan(label)
        found |= {
            f"logloss_{name}": logloss(logit[labelled], label[labelled]),
            f"logloss_expected_{name}": logloss(expected[labelled], label[labelled]),
            f"error_{name}": float(np.sqrt((error[rows] ** 2).mean())),
            f"std_{name}": float(std[rows].mean()),
            f"nll_{name}": float(nats[rows].mean()),
            f"coverage_{name}": inside[rows].mean(0).tolist(),
        }
    return found


def logloss(logit: np.ndarray, label: np.ndarray) -> float:
    return float((np.logaddexp(0, logit) - label * logit).mean())


def logits_of(p: np.ndarray) -> np.ndarray:
    p = p.astype(float).clip(1e-7, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


def judged(predictions: pa.Table, folder: Path, task: str, held_out: np.ndarray) -> Figures:
    test = pq.read_table(folder / "test.parquet").sort_by("row_id")
    truth = pq.read_table(folder / "log" / "truth" / "test.parquet").sort_by("row_id")
    return figures(
        logits_of(predictions[task].to_numpy()),
        predictions[f"{task}_std"].to_numpy().astype(float),
        logits_of(truth[task].to_numpy()),
        test[task].cast(pa.float64()).to_numpy(zero_copy_only=False),
        np.isin(test["item_id"].to_numpy(), held_out),
    )


# -------------------------------------------------------------------------------------------------------------- reports


def markdown(found: Mapping[str, Sequence[Figures]]) -> str:
    """A row per kind: means over the runs, and their standard deviation where there are several."""
    columns = (
        *("kind", "error of the logit, known (new)", "mean std, known (new)", "coverage of 90 %, known", "new items"),
        *("-log N, known (new)", "P(std of new > known)", "log loss on new items: of the mean, expected"),
        *("fit, s", "rows/s"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    at = int(np.argmin(np.abs(LEVELS - SHOWN_LEVEL)))

    def mean(runs: Sequence[Figures], name: str) -> float:
        return statistics.mean(r[name] for r in runs)

    def nats(x: float) -> str:
        return f"{x:.2f}" if x < 1000 else "> 1,000"

    def share(values: Sequence[float]) -> str:
        shown = [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
        return " ±".join(f"{x:.3f}".removeprefix("0") for x in shown)

    for name, runs in found.items():
        coverage = [share([r[f"coverage_{who}"][at] for r in runs]) for who in ("known", "new")]
        cells = [
            name,
            *(f"{mean(runs, f'{x}_known'):.2f} ({mean(runs, f'{x}_new'):.2f})" for x in ("error", "std")),
        ]
        cells += [*coverage, f"{nats(mean(runs, 'nll_known'))} ({nats(mean(runs, 'nll_new'))})"]
        cells.append(share([r["new_auc"] for r in runs]))
        cells.append(f"{mean(runs, 'logloss_new'):.4f}, {mean(runs, 'logloss_expected_new'):.4f}")
        cells.append(f"{statistics.mean(r['fit_seconds'] for r in runs):.0f}")
        cells.append(f"{statistics.mean(r['rows'] / r['predict_seconds'] for r in runs):,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(path: Path, found: Mapping[str, Sequence[Figures]], task: str) -> None:
    """How often intervals hold the true logit, by what they promise; and std of new items beside known ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    for panel, who in zip(panels, ("known", "new"), strict=False):
        panel.plot([0, 1], [0, 1], color="black", linestyle=":", label="ideal")
        for i, (name, runs) in enumerate(found.items()):
            panel.plot(LEVELS, np.mean([r[f"coverage_{who}"] for r in runs], 0), color=f"C{i}", label=name)
        panel.set(xlim=(0, 1), ylim=(0, 1), xlabel="mass of the central interval", title=f"{who} items")
    panels[0].set_ylabel(f"share of true logits of {task} inside")
    panels[0].legend()
    places = np.arange(len(found))
    for shift, who, color in ((-0.2, "known", "C7"), (0.2, "new", "C1")):
        heights = [statistics.mean(r[f"std_{who}"] for r in runs) for runs in found.values()]
        errors = [statistics.mean(r[f"error_{who}"] for r in runs) for runs in found.values()]
        panels[2].bar(places + shift, heights, 0.38, color=color, label=f"mean std, {who} items")
        marks = "errors of the logit (root mean square)" if who == "new" else None
        panels[2].scatter(places + shift, errors, color="black", marker="_", s=120, label=marks, zorder=3)
    aucs = [statistics.mean(r["new_auc"] for r in runs) for runs in found.values()]
    labels = [f"{name} ({auc:.2f})" for name, auc in zip(found, aucs, strict=True)]
    panels[2].set_xticks(places, labels, rotation=30, ha="right")
    panels[2].set(
        title="std and error of the logit (AUC of new items by std)", ylim=(0, 1.45 * panels[2].get_ylim()[1])
    )
    panels[2].legend(loc="upper left")
    figure.savefig(path, dpi=120)


def main(
    rows: Annotated[int, typer.Option(help="Of training.")] = 40_000,
    test_rows: Annotated[int, typer.Option(help="Of the test data; validation has half.")] = 10_000,
    seeds: Annotated[str, typer.Option(help="Comma list; of the runs. An ensemble is one run of each.")] = "1,2",
    kinds: Annotated[str, typer.Option(help="Comma list.")] = ",".join(ESTIMATES),
    task: Annotated[str, typer.Option(help="Of the table and the picture.")] = "click",
    out: Annotated[Path, typer.Option(help="Folder for log, runs, uncertainty.json .md .png.")] = Path(
        "runs/uncertainty"
    ),
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for all runs.")] = None,
) -> None:
    """Judge every kind of estimate where the truth is known."""
    names, numbers = kinds.split(","), [int(seed) for seed in seeds.split(",")]
    if unknown := [name for name in names if name not in ESTIMATES]:
        raise typer.BadParameter(f"kind {unknown[0]!r}; expected some of {', '.join(ESTIMATES)}")
    if "ensemble" in names and len(numbers) < 2:
        raise typer.BadParameter("an ensemble needs two seeds or more; give --seeds 1,2 or leave it out of --kinds")
    folder = out / f"log-{rows}-{test_rows}"
    folder.mkdir(parents=True, exist_ok=True)
    held_out = make_log(folder, rows, test_rows)
    todo = [(name, seed) for seed in numbers for name in names if name != "ensemble" or seed == numbers[-1]]
    found: dict[str, list[Figures]] = {name: [] for name in names}
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("estimates", total=len(todo))
        for name, seed in todo:
            of = numbers if name == "ensemble" else [seed]
            runs = [train_run(folder, out / "runs", ESTIMATES[name][0], s, task, overrides or ()) for s in of]
            predictions, seconds = estimate(runs[0], name, folder, out, runs[1:])
            found[name].append({**judged(predictions, folder, task, held_out), **seconds, "rows": test_rows})
            progress.advance(bar)
    content = {"levels": LEVELS.tolist(), "seeds": numbers, "task": task, "kinds": found}
    (out / "uncertainty.json").write_text(json.dumps(content, indent=1))
    (out / "uncertainty.md").write_text(markdown(found))
    picture(out / "uncertainty.png", found, task)
    typer.echo(markdown(found))


if __name__ == "__main__":
    typer.run(main)
