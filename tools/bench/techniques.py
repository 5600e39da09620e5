"""What every technique of training adds to a step, beside plain cross-entropy: losses, weights, ids, towers.

    python tools/bench/techniques.py configs/kuairand.yaml model.preset=mmoe
    python tools/bench/techniques.py configs/kuairand.yaml --only bce,pair,pcgrad train.global_batch_size=4096

Each technique has a model of its own and the same batches; they take turns in every round, so that a noisy machine is
unfair to none. A step is forward, backward and optimizers; its ratio to cross-entropy is taken round by round, and the
quartiles are shown. Losses are also timed alone, forward and backward of one task, which shows what drowns in a step.
On a CPU times are those that the process computed, which neighbors on the machine disturb less than the clock's.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hmoe_rec.batch import Batch
from hmoe_rec.config import RunConfig, load_config, prepare_data, resolve_config
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.kinds import resolve
from hmoe_rec.losses import LOSSES
from hmoe_rec.losses.base import Examples
from hmoe_rec.sharding.process import Process, process_group
from hmoe_rec.towers import TOWERS
from hmoe_rec.training.build import build_optimizers, build_sharded
from hmoe_rec.training.exposure import with_exposure_weights
from hmoe_rec.training.loop import Loop, make_loop
from hmoe_rec.training.prepare import fill_frozen_vectors, with_statistics

IDS = {"ids hashed": "hash", "ids managed": "managed"}
MANY_ROWS, WAYS = 1000, 32
GROUPED = ("pair", "list", "rcr", "jrc")
BATCHES = 4


def techniques(config: RunConfig, exposures: str | None = None) -> dict[str, list[str]]:
    """Name -> overrides; the first is what the others are compared with."""

    def everywhere(extra: str) -> list[str]:
        return [f"train.losses.{task}=[{{kind: bce}}, {{{extra}}}]" for task in config.tasks]

    found: dict[str, list[str]] = {"bce": []}
    found |= {kind: everywhere(f"kind: {kind}, weight: 0.3") for kind in LOSSES if kind != "bce"}
    if config.schema_of_data.user_key:
        found |= {f"{kind} within user": everywhere(f"kind: {kind}, weight: 0.3, within: user") for kind in GROUPED}
    found["negative gradients logged"] = ["train.log_negative_gradients=true"]
    if len(config.tasks) > 1:
        found |= {kind: [f"train.task_weighting={kind}"] for kind in ("uncertainty", "dwa")}
        found["pcgrad"] = ["train.gradient_surgery=pcgrad"]
    found["decorrelation"] = ["train.decorrelation=0.01"]
    found |= {f"{kind} towers": [f"model.tower.kind={kind}"] for kind in TOWERS if kind != "mlp"}
    if exposures is not None:
        found["weights by exposure"] = [f"train.exposure.column={exposures}", "train.exposure.propensity={power: 0.5}"]
    return found | {mode: [] for mode in IDS}


def with_ids(config: RunConfig, mode: str) -> RunConfig:
    """All ids of large fields hashed, or managed: sharing rows, or with a row each."""
    content = config.to_dict()
    for column in content["data"]["schema"]["ids"]:
        if column["num_embeddings"] >= MANY_ROWS:
            column.pop("missing", None)
            rows = -(-column["num_embeddings"] // WAYS) * WAYS
            column |= {"mode": mode, "num_embeddings": rows, "managed": {"ways": WAYS} if mode == "managed" else None}
    return resolve_config(content)


def batches_of(config: RunConfig, process: Process, exposures: str | None = None) -> list[Batch]:
    data, train = prepare_data(config), config.train
    source = ParquetSource(data.train, data.schema)
    reader = BatchReader(source, global_batch_size=train.global_batch_size, seed=train.seed, exposures=exposures)
    return [batch.to(process.device) for batch in itertools.islice(reader.epoch(0), BATCHES)]


def make(config: RunConfig, process: Process) -> Loop:
    sharded = build_sharded(config, process)
    fill_frozen_vectors(sharded, config)
    optimizers = build_optimizers(config, sharded, 1000)
    optimizers.set_learning_rates(0)
    sharded.train()
    return make_loop("plain", sharded, optimizers.combined, process.device)


def clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def alone(name: str, size: int, device: torch.device) -> float:
    """Seconds of a loss by itself, a fourth of the labels positive, groups of eight; the best of five."""
    loss = resolve(name.split()[0], LOSSES)(**({"within": "user"} if "within" in name else {}))
    levels = torch.randn(size, 2, device=device, requires_grad=True)
    labels = (torch.rand(size, device=device) < 0.25).float()
    groups = torch.randint(0, max(1, size // 8), (size,), device=device) if "within" in name else None
    seconds = []
    for _ in range(5):
        began = clock(device)
        loss.mean(Examples.of(levels[:, 1] - levels[:, 0], labels, None, groups, levels)).backward()
        seconds.append(clock(device) - began)
    return min(seconds)


def measure(
    loops: Mapping[str, Loop], batches: Mapping[str, Sequence[Batch]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Name -> seconds of a step in every round, after one that only warms up.

    batches: of a technique, or "" for those without batches of their own.
    """
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    endless: dict[str, Iterator[Batch]] = {name: itertools.cycle(batches.get(name, batches[""])) for name in loops}
    for _ in track(range(rounds + 1), "rounds", console=Console(stderr=True)):
        for name, loop in loops.items():
            began = clock(device)
            loop.progress(endless[name])
            seconds[name].append(clock(device) - began)
    return {name: times[1:] for name, times in seconds.items()}


def quartiles(values: Sequence[float], of_base: Sequence[float]) -> str:
    """Of the ratios within a round."""
    ratios = [value / other for value, other in zip(values, of_base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main(
    config: Annotated[str, typer.Argument(help="A run file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for all techniques.")] = None,
    only: Annotated[str | None, typer.Option(help="Comma list of techniques; the first is the base.")] = None,
    exposures: Annotated[
        str | None, typer.Option(help="A column of earlier exposures, to time weights by them.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of every technique.")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time a training step with every technique."""
    given = list(overrides or [])
    base = load_config(config, given)
    chosen = techniques(base, exposures)
    if only:
        chosen = {name: chosen[name] for name in only.split(",")}
    with process_group(device) as process:
        torch.set_num_threads(threads)
        data_of_base = prepare_data(base)
        base = with_statistics(base, data_of_base, process)
        batches, loops = {"": batches_of(base, process, exposures)}, {}
        for name, more in chosen.items():
            resolved = load_config(config, [*given, *more])
            data = resolved.data.model_copy(update={"statistics": base.data.statistics})
            resolved = with_exposure_weights(resolved.model_copy(update={"data": data}), data_of_base, process)
            if name in IDS:
                resolved = with_ids(resolved, IDS[name])
                batches[name] = batches_of(resolved, process)
            loops[name] = make(resolved, process)
        figures = measure(loops, batches, rounds, process.device)
    first = next(iter(figures))
    title = (
        f"{config}: step of {base.train.global_batch_size:,} examples, {len(base.tasks)} task(s), "
        f"{base.train.precision}, {device}, {threads} thread(s), median of {rounds}"
    )
    table = Table("technique", title=title, title_justify="left")
    sizes = (base.train.global_batch_size, 65536)
    for column in ("ms a step", f"over {first}", *(f"alone, ms at {size:,}" for size in sizes)):
        table.add_column(column, justify="right")
    for name, seconds in figures.items():
        is_loss = name.split()[0] in LOSSES
        by_itself = [f"{1e3 * alone(name, size, torch.device(device)):.2f}" if is_loss else "" for size in sizes]
        table.add_row(name, f"{1e3 * statistics.median(seconds):.1f}", quartiles(seconds, figures[first]), *by_itself)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
