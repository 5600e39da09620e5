"""Commands that measure: bench plan, bench calibrate."""

import os
import sys
from typing import Annotated, Any

import typer

from hmoe_rec.commands.common import ConfigFile, Device, Overrides, group, is_first, quiet, reads_parts

app = group(
    "Run training steps under several sharding plans in turns; measure what this machine takes for their parts."
)

WorldSize = Annotated[
    int | None,
    typer.Option(min=1, help="Processes to start here. Default: one per GPU, else 2; under torchrun, its processes."),
]


@app.command("plan")
@reads_parts
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    plans: Annotated[
        list[str] | None,
        typer.Option(
            help="Kinds of plans (table_wise, row_wise, auto, ...), plan files (.json), folders of them; with commas "
            "between them, or option after option."
        ),
    ] = None,
    world_size: WorldSize = None,
    data: Annotated[
        str | None, typer.Option(help="Parquet: file, directory, glob or URI. Default: data.train.")
    ] = None,
    zipf: Annotated[
        float | None, typer.Option(min=0, help="Draw ids from the tables in place of data, with this skew; 0 = evenly.")
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(help="For the predictions: a name or a .yaml file; several are compared. Default: the run's."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every plan.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a turn.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them that do not count.")] = 2,
    together: Annotated[
        bool | None,
        typer.Option(
            "--together/--one-by-one",
            help="All plans in memory, or each built anew for every turn. Default: together if they fit.",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="The file (.json) to write, with every step.")] = None,
    html: Annotated[str | None, typer.Option(help="The report (.html) to write; needs nothing but a browser.")] = None,
    device: Device = None,
) -> None:
    """Measure a run's training step under several sharding plans, and how well they were predicted.

    Real steps: forward, backward, both optimizers, DDP; gloo on CPU, nccl on GPUs. Batches are in memory before a clock
    runs. Plans take turns, in another order each round. A plan that cannot be built is reported; the others go on.
    Time of the tables = a step minus the same step with the tables' vectors given; it is what planners predict.

    \b
    Examples:
      hmoe-rec bench plan configs/benchmark.yaml --zipf 0.8 --plans table_wise,row_wise,column_wise,auto
      hmoe-rec bench plan configs/kuairand.yaml --plans auto --plans mine.json --topology cpu --topology here.yaml \\
          --world-size 2 --json bench.json --html bench.html
      torchrun --nproc-per-node 8 -m hmoe_rec bench plan configs/cluster_example.yaml --plans auto,row_wise
    """
    from hmoe_rec.benchmark.launch import run_processes
    from hmoe_rec.config import load_config
    from hmoe_rec.sharding.process import choose_device
    from hmoe_rec.types import ConfigError

    overrides = [*(overrides or []), *([] if device is None else [f"train.device={device}"])]
    resolved = load_config(config, overrides)
    chosen = _files([name.strip() for given in plans or [] for name in given.split(",") if name.strip()])
    if not chosen:
        raise ConfigError(
            "bench plan: which plans? Give --plans table_wise,row_wise,auto or files that plan --out wrote"
        )
    if data is not None and zipf is not None:
        raise ConfigError("bench plan: --data reads ids and --zipf draws them; give one of them")
    quiet()
    chosen_device = choose_device(resolved.train.device)
    arguments = {
        "config": resolved,
        "config_name": config,
        "overrides": tuple(overrides),
        "settings": {
            **{"plans": tuple(chosen), "data": () if data is None else (data,), "zipf": zipf},
            **{"topologies": tuple(topology or ()), "rounds": rounds, "steps": steps, "warmup": warmup},
            "together": together,
        },
    }
    report = run_processes(_world_size(world_size, chosen_device), measure_plans, arguments, device=chosen_device)
    if is_first():
        _show(report, json_file, html)


def measure_plans(settings: dict[str, Any], **arguments: Any) -> Any:
    """On every process; the first shows a bar."""
    quiet()
    from hmoe_rec.benchmark.run import BenchmarkSettings, benchmark_plans

    with _bar("turns") as progress:
        return benchmark_plans(settings=BenchmarkSettings(**settings), progress=progress, **arguments)


def _files(given: list[str]) -> list[str]:
    """A folder stands for the plan files in it."""
    from hmoe_rec import io

    def within(folder: str) -> list[str]:
        return [io.join(folder, name) for name in io.ls(folder) if name.endswith(".json")]

    return [file for x in given for file in (within(x) if io.isdir(x) else [x])]


def _show(report: Any, json_file: str | None, html: str | None) -> None:
    from rich.console import Console

    from hmoe_rec import io
    from hmoe_rec.benchmark.report import print_benchmark
    from hmoe_rec.benchmark.report_html import benchmark_html

    print_benchmark(report, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    for path, text in ((json_file, report.to_json), (html, lambda: benchmark_html(report))):
        if path is not None:
            io.write_text(path, text())
            typer.echo(f"wrote {path}")


def _bar(description: str) -> Any:
    from contextlib import nullcontext

    from hmoe_rec.progress import progress_bar

    return progress_bar(description) if is_first() else nullcontext(None)


def _world_size(given: int | None, device: str) -> int:
    if given is not None:
        return given
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cpu":
        return 2
    import torch

    return max(1, torch.cuda.device_count())


@app.command("calibrate")
@reads_parts
def calibrate(
    world_size: WorldSize = None,
    device: Annotated[str, typer.Option(help="auto (cuda where there is one), cpu or cuda.")] = "auto",
    config: Annotated[
        str | None,
        typer.Option(help="A run file: its widths, batch and optimizer are measured in place of usual ones."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The topology file (.yaml) to write.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="The file (.json) with every measurement.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Steps of every load; their median counts.")] = 9,
) -> None:
    """Measure what this machine takes for lookups and exchanges, and write a topology for the planner.

    FBGEMM's kernels forward and backward by width, batch and ids per bag; TorchRec's collectives by size of message;
    copies. All processes work at once, as in training. Measure on a quiet machine: what else runs is in the prices.

    \b
    Examples:
      hmoe-rec bench calibrate --world-size 2 --out runs/here.yaml
      hmoe-rec bench calibrate --config configs/benchmark.yaml --out runs/here.yaml
      hmoe-rec plan configs/benchmark.yaml --topology runs/here.yaml
      torchrun --nproc-per-node 8 -m hmoe_rec bench calibrate --out h100.yaml
    """
    from hmoe_rec.benchmark.launch import run_processes
    from hmoe_rec.config import load_config
    from hmoe_rec.sharding.process import choose_device
    from hmoe_rec.types import ConfigError

    if out is not None and not out.endswith((".yaml", ".yml")):
        raise ConfigError(f"--out {out}: expected a name that ends with .yaml, as --topology takes it")
    quiet()
    run = None if config is None else load_config(config)
    chosen = choose_device(device)
    size = _world_size(world_size, chosen)
    arguments = {"device": chosen, "run": run, "repeats": repeats, "world_size": size}
    found = run_processes(size, measure_machine, arguments, device=chosen)
    if is_first():
        _show_calibration(found, out, json_file)


def measure_machine(device: str, run: Any, repeats: int, world_size: int) -> Any:
    """On every process; the first shows a bar."""
    quiet()
    from dataclasses import replace

    from hmoe_rec.benchmark.calibrate import CalibrationSettings, settings_of
    from hmoe_rec.benchmark.calibrate import calibrate as measure

    settings = CalibrationSettings() if run is None else settings_of(run, world_size)
    with _bar("collections") as progress:
        return measure(replace(settings, repeats=repeats), device, progress=progress)


def _show_calibration(found: Any, out: str | None, json_file: str | None) -> None:
    import json
    from pathlib import PurePosixPath

    from rich.console import Console

    from hmoe_rec import io
    from hmoe_rec.benchmark.topology_file import print_calibration, topology_yaml

    print_calibration(found, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    if json_file is not None:
        io.write_text(json_file, json.dumps(found.to_dict(), indent=1))
        typer.echo(f"wrote {json_file}")
    if out is not None:
        io.write_text(out, topology_yaml(found, PurePosixPath(out).stem))
        typer.echo(f"topology: {out} (--topology {out}, or sharding.topology={out})")
