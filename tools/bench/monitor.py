"""What `train.monitor` costs: steps without and with a measurement take turns, and the measurement's own time.

    python tools/bench/monitor.py --data /tmp/bench --width 64
    torchrun --nproc-per-node 2 tools/bench/monitor.py --data /tmp/bench --plan column_wise

The share is of one measurement each 1,000 steps, its lines and charts included.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from throughput import make_data, run_config


def main(
    data: Annotated[Path, typer.Option(help="Folder of train.parquet and meta.json; made if it is not there.")],
    model: Annotated[str, typer.Option(help="mmoe (one set), ple or stem (three sets).")] = "stem",
    width: Annotated[int, typer.Option(help="Of the tables.")] = 16,
    rows: Annotated[int, typer.Option(help="train.monitor.rows")] = 4096,
    plan: Annotated[str, typer.Option(help="sharding.plan")] = "auto",
    rounds: Annotated[int, typer.Option(help="Of ten steps without and ten with a measurement.")] = 8,
    device: Annotated[str, typer.Option(help="train.device")] = "cpu",
    vocabulary: Annotated[int, typer.Option(help="Ids per column, if the data is made.")] = 10_000,
) -> None:
    """Compare a loop with and without a monitor."""
    from hmoe_rec.config import prepare_data, resolve_config
    from hmoe_rec.sharding.process import process_group
    from hmoe_rec.training.run_log import RunLog
    from hmoe_rec.training.trainer import Trainer, choose_threads

    if not (data / "meta.json").exists():
        make_data(data, 4096 * 128, vocabulary)
    content: dict[str, Any] = run_config(data, model, "fp32", 1)
    content["model"]["embedding_dim"] = width
    content["train"] |= {"device": device, "monitor": {"collapse_every": 1, "rows": rows}, "epochs": 9}
    content["sharding"] = {"plan": plan}
    config = resolve_config(content)
    with process_group(device) as process:
        choose_threads(config, process)
        trainer = Trainer(config, prepare_data(config), process, time.perf_counter())
        trainer.sharded.train()
        batches = trainer._batches()
        log_options: Any = {"total_steps": 1, "first_step": 0, "active": process.rank == 0}
        data.joinpath("run").mkdir(exist_ok=True)
        with RunLog(str(data / "run"), trainer.tasks, **log_options) as log:
            seconds = _turns(trainer, batches, log, rounds)
        trainer.monitor = None
    if process.rank == 0:
        step, measured = (statistics.median(x) for x in seconds)
        tables = sum(1 for n in trainer.sharded.state_dict() if ".embedding_bags." in n)
        where = f"plan {plan}, {process.world_size} x {device}"
        print(
            f"{model}, {tables} tables of width {width}, {rows:,} rows each, {where}: step {1e3 * step:.1f} ms, "
            f"measurement {1e3 * measured:.1f} ms = {measured / step / 1000:.3%} of the time with collapse_every 1000"
        )


def _turns(trainer: Any, batches: Any, log: Any, rounds: int) -> tuple[list[float], list[float]]:
    """(seconds of a step, seconds of a measurement), each the median of a turn."""

    def steps() -> float:
        began = time.perf_counter()
        for _ in range(10):
            output = trainer.loop.progress(batches)
            trainer.step += 1
        output.losses_T.tolist()  # waits for the device
        return time.perf_counter() - began

    steps()
    trainer._watch(log)  # the random references are drawn once
    without, extra = [], []
    for _ in range(rounds):
        plain = steps()
        began = time.perf_counter()
        trainer._watch(log)
        watched = time.perf_counter() - began
        after = steps()
        without.append(plain / 10)
        extra.append(watched + max(0.0, after - plain))
    return without, extra


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    typer.run(main)
