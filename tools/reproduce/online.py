"""KuaiRand hour by hour: a model that goes on learning against one that was trained once.

    python tools/reproduce/online.py --seeds 1,2,3 --picture online.png

A model is trained on the first four days. From then on each hour is a file. One copy of the model predicts an hour and
then learns from it, the other stays as it is; both predict the same rows with what was known before the hour.
"""

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from compare import paired
from rich.console import Console
from rich.table import Table

from hmoe_rec.config import load_config
from hmoe_rec.metrics import SlidingMetrics, TaskMetrics
from hmoe_rec.sharding.process import process_group
from hmoe_rec.training.evaluate import (
    device_of,
    evaluation_reader,
    load_for_evaluation,
    open_run,
    read_run_config,
    score,
)
from hmoe_rec.training.online import WINDOW_BINS, follow
from hmoe_rec.training.trainer import choose_threads
from hmoe_rec.training.trainer import train as train_once

HOUR_MS = 3_600_000
DAY = 24
SPLITS = ("train", "validation", "test")
ONCE = ["train.global_batch_size=512", "train.precision=fp32", "data.validation=[]", "data.test=[]"]
ONLINE = [
    *ONCE,
    "train.global_batch_size=256",
    "train.decay=constant",
    "train.learning_rate=0.0003",  # a tenth of what the first training begins with, which ends with 0
    "train.embedding_learning_rate=0.02",
    "online.until_idle=0",
]
Figures = dict[str, dict[str, float]]


def write_hours(log: Path, out: Path, *, first_days: int | None = None) -> tuple[Path, Path]:
    """The log in time order -> one file of its first days, and a file per hour of the rest. -> the two places."""
    table = pa.concat_tables([pq.read_table(log / f"{split}.parquet") for split in SPLITS]).sort_by("time_ms")
    hour = (table["time_ms"].to_numpy() - table["time_ms"][0].as_py()) // HOUR_MS
    begin = 0 if first_days is None else first_days * DAY
    first, rest = out / "first.parquet", out / "hours"
    shutil.rmtree(rest, ignore_errors=True)
    rest.mkdir(parents=True)
    pq.write_table(table.filter(pa.array(hour < begin)), first)
    for h in range(begin, int(hour[-1]) + 1):
        rows = table.filter(pa.array(hour == h))
        if len(rows):
            pq.write_table(rows, rest / f"hour-{h:04d}.parquet")
    return first, rest


def frozen(run: Path, hours: Path, windows: int) -> tuple[list[Figures], Figures]:
    """The trained model on every hour, as it is. -> sliding metrics after each, metrics of all."""
    config = read_run_config(str(run))
    with process_group(device_of(config)) as process:
        choose_threads(config, process)
        model, _ = load_for_evaluation(open_run(str(run), config), process, "latest")
        everything = TaskMetrics(config.tasks, num_bins=WINDOW_BINS, gauc=False)
        sliding = SlidingMetrics(config.tasks, windows=windows, num_bins=WINDOW_BINS)
        found = []
        for file in sorted(hours.glob("*.parquet")):
            metrics = TaskMetrics(config.tasks, num_bins=WINDOW_BINS, gauc=False)
            reader = evaluation_reader([str(file)], config.schema_of_data, config, process)
            score(model, reader.epoch(0), metrics, process.device)
            everything.merge_(metrics)
            sliding.add(metrics)
            found.append(sliding.compute())
        return found, everything.compute()


def followed(run: Path) -> tuple[list[Figures], Figures]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["sliding"] for line in lines], json.loads((run / "report.json").read_text())["progressive"]


def main(
    config: Annotated[str, typer.Argument(help="A run file of KuaiRand.")] = "configs/kuairand.yaml",
    log: Annotated[Path, typer.Option(help="The converted log.")] = Path("data/kuairand"),
    out: Annotated[Path, typer.Option(help="Where files and runs go; finished runs are not run again.")] = Path(
        "runs/online"
    ),
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "1,2,3",
    first_days: Annotated[int, typer.Option(help="Days that both models are trained on.")] = 4,
    last_hours: Annotated[int | None, typer.Option(help="Follow only so many hours (default: all).")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of normalized entropy over the hours.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value for all runs.")] = None,
) -> None:
    """Predict every hour before it is learned from, with a model that learns from it and one that does not."""
    first, rest = write_hours(log, out, first_days=first_days)
    for file in sorted(rest.glob("*.parquet"))[last_hours:] if last_hours else []:
        file.unlink()
    results: dict[str, list[tuple[list[Figures], Figures]]] = {"trained once": [], "goes on": []}
    for seed in map(int, seeds.split(",")):
        common = [f"train.seed={seed}", *(overrides or [])]
        once, online = out / f"once-{seed}", out / f"online-{seed}"
        if not (once / "report.json").exists():
            train_once(load_config(config, [*ONCE, *common, f"data.train={first}", f"train.run_dir={once}"]))
        if not (online / "report.json").exists():
            places = [f"online.follow={rest}", f"online.start_from={once}", f"train.run_dir={online}"]
            follow(load_config(config, [*ONLINE, *common, *places]))
        results["trained once"].append(frozen(once, rest, DAY))
        results["goes on"].append(followed(online))
    print_hours(results)
    (out / "results.json").write_text(json.dumps(results))
    if picture is not None:
        draw_hours(results, picture)


def print_hours(results: Mapping[str, Sequence[tuple[list[Figures], Figures]]]) -> None:
    console, seeds = Console(width=160, highlight=False), len(results["goes on"])
    for metric, better in (("ne", "lower"), ("auc", "higher"), ("calibration", "1")):
        table = Table(
            title=f"{metric} over all hours ({better} is better), mean of {seeds} seeds", title_justify="left"
        )
        for column in ("task", "trained once", "goes on", "difference in 1e-4 ± standard error"):
            table.add_column(column, justify="right")
        for task in results["goes on"][0][1]:
            values = {name: [every[task][metric] for _, every in runs] for name, runs in results.items()}
            cells = [f"{statistics.mean(of_seeds):.4f}" for of_seeds in values.values()]
            difference = paired(values["goes on"], values["trained once"]) if seeds > 1 else "-"
            table.add_row(task, *cells, difference)
        console.print(table)


def draw_hours(results: Mapping[str, Sequence[tuple[list[Figures], Figures]]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(results["goes on"][0][1])
    figure, panels = pyplot.subplots(len(tasks), 1, figsize=(9, 2.4 * len(tasks)), sharex=True, squeeze=False)
    for panel, task in zip(panels[:, 0], tasks, strict=True):
        for (name, runs), color in zip(results.items(), ("tab:gray", "tab:blue"), strict=True):
            for i, (sliding, _) in enumerate(runs):
                values = [figures[task]["ne"] for figures in sliding]
                panel.plot(range(1, len(values) + 1), values, color=color, lw=1, label=None if i else name)
        panel.set_ylabel(f"NE of {task}")
        panel.grid(alpha=0.3)
    panels[0, 0].legend()
    panels[0, 0].set_title("predicted before it was learned from, mean of the last 24 hours; a line per seed")
    panels[-1, 0].set_xlabel("hours after the first part")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    typer.run(main)
