"""What sampling and weights of exposures do where the truth is known, and what sampling costs at reading.

    python tools/reproduce/sampled_rows.py calibration
    python tools/reproduce/sampled_rows.py exposures
    python tools/reproduce/sampled_rows.py reading configs/kuairand.yaml

calibration: two tasks with planted logits of user, item and slot; the log has exactly as many positives of each kind as
are expected, so that sampling alone adds noise. Trained on all rows, and on some with either correction; served for
every cell. Reported are mean prediction / mean truth and the expected calibration error (mean |error| of a cell).

exposures: items of rates rho from 1 to 6 %, the better ones shown more often; P(positive at exposure k) = rho pi(k).
Reported is the error of the best rate per item with and without weights 1 / pi.

reading: rows of the log per second of CPU time, one thread, in turns.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from hmoe_rec.config import load_config, resolve_config
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.data.sampling import RowSampler, count_kept
from hmoe_rec.losses.exposure import estimate_propensity
from hmoe_rec.serving.predictor import predict_run
from hmoe_rec.training.trainer import train

TASKS = ("click", "like")
SIZES = {"user": 10, "item": 8, "slot": 3}
RULE = {"negatives": 0.3, "slices": {"column": "slot", "rates": {0: 0.2, 1: {"click": 0.5, "like": 0.25}}}}
PROPENSITY = np.array([1.0, 1.5, 1.9, 2.2, 2.4])

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
console = Console(width=120)


def planted_log(folder: Path, rows: int) -> np.ndarray:
    """Writes train.parquet and cells.parquet -> true probabilities [cells, 2]."""
    rng = np.random.default_rng(3)
    cells = np.stack(np.meshgrid(*map(range, SIZES.values()), indexing="ij"), -1).reshape(-1, len(SIZES))
    effects = [[rng.normal(0, 0.5, n)[cells[:, i]] for i, n in enumerate(SIZES.values())] for _ in TASKS]
    p_C2 = 1 / (1 + np.exp(0.6 - np.stack([np.sum(e, 0) for e in effects], 1)))
    each = rows // len(cells)
    places = np.stack([rng.permuted(np.tile(np.arange(each), (len(cells), 1)), axis=1) for _ in TASKS], -1)
    order = rng.permutation(each * len(cells))
    labels = (places < np.round(each * p_C2)[:, None]).reshape(-1, 2)[order].astype("i1")
    ids = np.repeat(cells, each, 0)[order].astype("i4")
    columns = {name: ids[:, i] for i, name in enumerate(SIZES)} | {t: labels[:, i] for i, t in enumerate(TASKS)}
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=32768)
    pq.write_table(pa.table({n: cells[:, i].astype("i4") for i, n in enumerate(SIZES)}), folder / "cells.parquet")
    return p_C2


def served(folder: Path, name: str, sampling: dict[str, Any], epochs: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Trains, predicts every cell -> probabilities [cells, 2], report."""
    content = {
        "data": {
            "train": str(folder / "train.parquet"),
            "sampling": sampling,
            "schema": {
                "ids": [{"name": n, "num_embeddings": size} for n, size in SIZES.items()],
                "tasks": [{"name": task} for task in TASKS],
            },
        },
        "model": {
            "preset": "shared_bottom",
            "embedding_dim": 8,
            "expert": {"kind": "flat_dnn", "hidden": []},
            "expert_dim": 64,
            "tower": {"hidden": []},
        },
        "train": {
            "run_dir": str(folder / name),
            "global_batch_size": 2048,
            "epochs": epochs,
            "learning_rate": 0.003,
            "embedding_learning_rate": 0.2,
            "decay": "linear",
            "num_threads": 1,
            "log_every": 10**6,
        },
    }
    report = train(resolve_config(content))
    predict_run(str(folder / name), str(folder / "cells.parquet"), str(folder / f"{name}.parquet"), "latest")
    found = pq.read_table(folder / f"{name}.parquet")
    return np.stack([found[t].to_numpy() for t in TASKS], 1), report


@app.command()
def calibration(
    rows: Annotated[int, typer.Option(help="Rows of the log.")] = 720_000,
    epochs: Annotated[int, typer.Option(help="Passes; fewer leave training itself off by more.")] = 6,
) -> None:
    """Train on all rows and on sampled ones; compare what is served with the truth."""
    runs = {
        "all rows": {},
        "logit": RULE | {"correction": "logit"},
        "weights": RULE | {"correction": "weights"},
    }
    title = "Mean prediction / mean truth by task and slot, and expected calibration error"
    table = Table("rows, correction", title=title, title_justify="left")
    for column in ("read", *(f"{t} {s}" for t in TASKS for s in ("all", "0", "1", "2")), "largest ECE"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        true_C2 = planted_log(Path(folder), rows)
        for name, sampling in runs.items():
            found_C2, report = served(Path(folder), name.replace(" ", "_"), sampling, epochs)
            parts = [slice(None), *(slice(slot, None, 3) for slot in range(3))]
            ratios = [found_C2[c, t].mean() / true_C2[c, t].mean() for t in range(2) for c in parts]
            ece = max(float(np.abs(found_C2[c] - true_C2[c]).mean(0).max()) for c in parts)
            kept = (report["sampling"] or {"kept": rows})["kept"]
            table.add_row(name, f"{kept:,}", *(f"{r:.4f}" for r in ratios), f"{ece:.4f}")
    console.print(table)


@app.command()
def exposures(rows: Annotated[int, typer.Option(help="Exposures.")] = 4_000_000, seeds: str = "1,2,3") -> None:
    """Weight positives by inverse propensity; compare the items' rates with the planted ones."""
    table = Table("weights", "pi(2) ... pi(5 and more)", "mean |error|", "best minus worst item")
    rho = np.linspace(0.01, 0.06, 20)
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for seed in map(int, seeds.split(",")):
        rng = np.random.default_rng(seed)
        item = rng.integers(0, 20, rows)
        before = np.minimum(rng.geometric(0.7 - 0.5 * (rho[item] - 0.01) / 0.05) - 1, 4)
        label = rng.random(rows) < rho[item] * PROPENSITY[before]
        counts = [np.bincount((item * 5 + before)[c], minlength=100).reshape(20, 5) for c in (slice(None), label)]
        crude = estimate_propensity(*(c.sum(0, keepdims=True) for c in counts))
        estimates = {"none": np.ones(5), "planted": PROPENSITY, "estimated": estimate_propensity(*counts)}
        for name, pi in (estimates | {"estimated without strata": crude}).items():
            w = np.where(label, 1 / np.asarray(pi)[before], 1.0)
            error = np.bincount(item, w * label, 20) / np.bincount(item, w, 20) / rho - 1
            found.setdefault(name, []).append((np.asarray(pi), error))
    for name, runs in found.items():
        pi = np.mean([p for p, _ in runs], 0)
        errors = np.stack([e for _, e in runs])
        spread = errors[:, -1] - errors[:, 0]
        shown = " ".join(f"{x:.3f}" for x in pi[1:])
        table.add_row(name, shown, f"{np.abs(errors).mean():.1%}", f"{spread.mean():+.1%}")
    console.print(table)


@app.command()
def reading(
    config: Annotated[str, typer.Argument(help="A run file whose data.train is read.")],
    rates: Annotated[str, typer.Option(help="Shares of the negatives that are kept, a comma list.")] = "1,0.1,0.01",
    tasks: Annotated[str, typer.Option(help="Tasks of the schema, a comma list; all by default.")] = "",
    turns: Annotated[int, typer.Option(help="Passes of each, taking turns; the best one counts.")] = 4,
) -> None:
    """Rows of the log per second of CPU time that one thread reads, counts and samples."""
    resolved = load_config(config, [f"data.tasks=[{tasks}]"] if tasks else [])
    schema = resolved.schema_of_data
    source = ParquetSource(resolved.data.train, schema)
    samplers = {
        float(rate): RowSampler(schema, rates=dict.fromkeys(schema.task_names, float(rate)), correction="logit")
        for rate in rates.split(",")
    }
    kept = {rate: count_kept(source, sampler) for rate, sampler in samplers.items()}
    best: dict[Any, float] = {}

    def timed(name: Any, read: Any) -> None:
        began = time.process_time()
        read()
        best[name] = max(best.get(name, 0), source.num_rows / (time.process_time() - began))

    for _ in range(turns):
        for rate, sampler in samplers.items():
            chosen = {} if rate == 1 else {"sampler": sampler, "kept": kept[rate]}
            reader = BatchReader(source, global_batch_size=1024, num_workers=0, **chosen)
            timed(rate, lambda reader=reader: [None for _ in reader.epoch(0)])
        timed("counting", lambda: count_kept(source, next(iter(samplers.values()))))
    table = Table("negatives kept", "rows kept", "rows of the log per CPU second")
    for rate in samplers:
        share = kept[rate].total / source.num_rows
        table.add_row(f"{rate:g}", "all" if rate == 1 else f"{share:.1%}", f"{best[rate]:,.0f}")
    console.print(table)
    console.print(f"counting beforehand: {best['counting']:,.0f} rows of the log per CPU second")


if __name__ == "__main__":
    app()
