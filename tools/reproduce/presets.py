"""Presets with one budget, then every analysis over their runs on one page.

    python tools/reproduce/presets.py configs/kuairand.yaml          trains what is not there yet; 1 to 2 minutes a run

The expert takes inner products, so that distances of user and item mean something; histories are read by TIM.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from compare import compare, print_tables, run_dir

from hmoe_rec.commands import analyze

PRESETS = "single,shared_bottom,mmoe,multi_embedding,stem,ame"
COMMON = ["model.expert={kind: ipnn, hidden: [128]}", "model.encoding.sequences={kind: tim, clock: position}"]


def short_names(folder: Path, runs: dict[str, Path]) -> list[str]:
    """A link per run, so that the page says "stem" and not the name of its directory."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, directory in runs.items():
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(directory.resolve(), folder.resolve()), target_is_directory=True)
    return [str(folder / name) for name in runs]


def analyses(runs: list[str], tasks: str, out: str) -> dict[str, Callable[[], None]]:
    return {
        "correlation": lambda: analyze.correlation(runs, task=tasks.split(",")[0], out=out),
        "collapse": lambda: analyze.collapse(runs, weighted=True, out=out),
        "entanglement": lambda: analyze.entanglement(runs, tasks=tasks, out=out),
        "gates": lambda: analyze.gates(runs, out=out),
        "transfer": lambda: analyze.transfer(runs, tasks=tasks, out=out),
        "calibration": lambda: analyze.calibration(runs, out=out),
    }


def main(
    config: Annotated[str, typer.Argument(help="A run file with two tasks or more.")] = "configs/kuairand.yaml",
    presets: Annotated[str, typer.Option(help="Comma list; the first is what others are compared with.")] = PRESETS,
    tasks: Annotated[str, typer.Option(help="The two tasks of entanglement and transfer.")] = "click,like",
    seeds: Annotated[str, typer.Option(help="Comma list; the page shows the runs of the first.")] = "1,2,3",
    only: Annotated[str | None, typer.Option(help="Comma list of analyses. Default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Runs, and below page/ the report.")] = Path("runs/presets"),
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for all runs.")] = None,
) -> None:
    """Train presets with one budget and put all analyses of them on one page."""
    settings = {name: f"model.preset={name}" for name in presets.split(",")}
    numbers = [int(seed) for seed in seeds.split(",")]
    all_overrides = [*COMMON, *(overrides or [])]
    reports = compare(config, settings, seeds=numbers, out=out, jobs=jobs, overrides=all_overrides)
    print_tables(reports, ["auc"], "test")
    directories = {name: run_dir(out, config, s, numbers[0], all_overrides) for name, s in settings.items()}
    page = out / "page"
    runs = short_names(page / "runs", directories)
    for name, run in analyses(runs, tasks, str(page)).items():
        if only is None or name in only.split(","):
            run()


if __name__ == "__main__":
    typer.run(main)
