"""A run file under several settings and seeds, with one budget -> a table of test metrics, mean and spread over seeds.

    python tools/reproduce/compare.py configs/kuairand.yaml --vary model.preset=mmoe --vary model.preset=stem

Every setting and seed is an ordinary run below --out; finished ones are not run again.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

Report = dict


def run_dir(out: Path, config: str, setting: str, seed: int) -> Path:
    name = re.sub(r"[^\w=.-]+", "_", setting.replace("model.", "")) or "as_it_is"
    return out / f"{Path(config).stem}-{name}-seed{seed}"


def train(config: str, directory: Path, setting: str, seed: int, overrides: list[str], threads: int) -> Report:
    """Trains if there is no report yet."""
    report = directory / "report.json"
    if not report.exists():
        fixed = [f"train.run_dir={directory}", f"train.seed={seed}", f"train.num_threads={threads}"]
        command = [sys.executable, "-m", "hmoe_rec", "train", config, *overrides, *setting.split(), *fixed]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(report.read_text())


def cell(values: list[float]) -> str:
    """Mean and standard deviation over seeds, in units of the fourth digit."""
    spread = f" ±{1e4 * statistics.stdev(values):.0f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def table(reports: dict[str, list[Report]], metric: str, split: str) -> Table:
    tasks = list(next(iter(reports.values()))[0][split])
    result = Table(title=f"{split} {metric}: mean ± standard deviation over seeds in 1e-4", title_justify="left")
    for column in ("setting", "dense", "tables", *tasks):
        result.add_column(column, justify="left" if column == "setting" else "right", no_wrap=True)
    for setting, runs in reports.items():
        counts = runs[0]["parameters"]
        values = [cell([run[split][task][metric] for run in runs]) for task in tasks]
        result.add_row(setting.replace("model.", ""), f"{counts['dense']:,}", f"{counts['tables']:,}", *values)
    return result


def main(
    config: Annotated[str, typer.Argument(help="A run file.")],
    vary: Annotated[list[str], typer.Option(help="One setting: overrides separated by spaces. Give it several times.")],
    seeds: Annotated[str, typer.Option(help="Comma list.")] = "1,2,3",
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/compare"),
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    metric: Annotated[str, typer.Option(help="Comma list: auc, gauc, logloss, ne, calibration.")] = "auc,gauc,ne",
    split: Annotated[str, typer.Option(help="test, validation, or test_at_best_of_each_task.")] = "test",
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for all runs.")] = None,
) -> None:
    """Compare settings of one run file over seeds."""
    numbers = [int(seed) for seed in seeds.split(",")]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with Progress(console=Console(stderr=True)) as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task("runs", total=len(vary) * len(numbers))

        def one(setting: str, seed: int) -> Report:
            directory = run_dir(out, config, setting, seed)
            report = train(config, directory, setting, seed, overrides or [], threads)
            progress.advance(bar)
            return report

        futures = {setting: [pool.submit(one, setting, seed) for seed in numbers] for setting in vary}
        reports = {setting: [future.result() for future in runs] for setting, runs in futures.items()}
    for name in metric.split(","):
        Console(width=160).print(table(reports, name, split))


if __name__ == "__main__":
    typer.run(main)
