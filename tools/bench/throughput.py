"""Rows per second of the whole training loop, Parquet to optimizer step, beside a bare TorchRec loop, in one run.

    python tools/bench/throughput.py --data /tmp/bench

Systems take turns (A B A B ...), each in a process of its own, so that a machine that slows down slows both. Ratios
within one run are what counts; on a shared machine read rows per CPU-second.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

NUM_FIELDS, BATCH, WINDOW = 26, 4096, 10
FIELDS = [f"c{i:02d}" for i in range(NUM_FIELDS)]
BARE = Path(__file__).with_name("bare_torchrec.py")


def make_data(folder: Path, rows: int, vocabulary: int) -> None:
    """26 id columns with log-uniform (Zipf-like) ids and two labels that depend on some of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    effect = rng.normal(0, 0.5, (2, NUM_FIELDS, 997))
    with pq.ParquetWriter(folder / "train.parquet", schema_of_file()) as writer:
        for start in range(0, rows, 65536):
            count = min(65536, rows - start)
            ids = np.minimum(vocabulary ** rng.random((NUM_FIELDS, count)) - 1, vocabulary - 1).astype(np.int64)
            logits = [sum(effect[t, f][ids[f] % 997] for f in range(NUM_FIELDS)) - 1 for t in range(2)]
            labels = [(rng.random(count) < 1 / (1 + np.exp(-z))).astype(np.float32) for z in logits]
            columns = dict(zip(FIELDS, ids, strict=True)) | {"click": labels[0], "conv": labels[1]}
            writer.write_table(pa.table(columns))
    (folder / "meta.json").write_text(json.dumps({"F": NUM_FIELDS, "vocab": vocabulary, "rows": rows}))


def schema_of_file() -> Any:
    import pyarrow as pa

    return pa.schema([(f, pa.int64()) for f in FIELDS] + [("click", pa.float32()), ("conv", pa.float32())])


def run_config(data: Path, model: str, precision: str, threads: int) -> dict[str, Any]:
    """Four experts [256, 128], towers [64], width 16, row-wise Adagrad and Adam: the sizes of the bare loop."""
    vocabulary = json.loads((data / "meta.json").read_text())["vocab"]
    sizes = {"mmoe": {"num_experts": 4}, "ple": {}, "stem": {"shared_experts": 2}}[model]
    return {
        "data": {"train": str(data / "train.parquet")},
        "features": {"ids": [{"name": f, "num_embeddings": vocabulary} for f in FIELDS]},
        "tasks": [{"name": "click"}, {"name": "conv"}],
        "model": {"preset": model, "embedding_dim": 16, "expert": {"kind": "flat_dnn", "hidden": [256]}} | sizes,
        "train": {
            "run_dir": str(data / "run"),
            "global_batch_size": BATCH,
            "shuffle": False,
            "precision": precision,
            "num_threads": threads,
            "clip_norm": None,
        },
    }


def windows(stamps: list[float]) -> list[float]:
    """Rows per second of consecutive windows of ten steps."""
    return [WINDOW * BATCH / (stamps[i + WINDOW] - stamps[i]) for i in range(0, len(stamps) - WINDOW, WINDOW)]


def measure(data: Path, model: str, precision: str, threads: int, steps: int) -> dict[str, Any]:
    """Our trainer's own loop, without log, evaluation and checkpoints."""
    began = time.perf_counter()
    from hmoe_rec.config import prepare_data, resolve_config
    from hmoe_rec.sharding.process import process_group
    from hmoe_rec.training.trainer import Trainer, choose_threads

    config = resolve_config(run_config(data, model, precision, threads))
    with process_group("cpu") as process:
        choose_threads(config, process)
        trainer = Trainer(config, prepare_data(config), process, began)
        trainer.sharded.train()
        batches = trainer._batches()
        wall, cpu = [], []
        for step in range(min(steps, trainer.total_steps)):
            trainer.optimizers.set_learning_rates(step)
            output = trainer.loop.progress(batches)
            wall.append(time.perf_counter())
            cpu.append(time.process_time())
        rates, cpu_rates = windows(wall), windows(cpu)
        result = {
            "first_step_s": wall[0] - began,
            "rows_s_best": max(rates),
            "rows_s_median": statistics.median(rates),
            "rows_per_cpu_s_best": max(cpu_rates),
            "rows_per_cpu_s_median": statistics.median(cpu_rates),
            "loss": output.losses_T.mean().item(),
        }
        return result | {"share": breakdown(trainer, batches)}


def breakdown(trainer: Any, batches: Any) -> dict[str, float]:
    """Share of a step's CPU time per part, by a plain loop over ten more batches."""
    seconds = dict.fromkeys(("batch", "forward", "backward with tables' optimizer", "dense optimizer"), 0.0)
    marks = list(seconds)
    for _ in range(10):
        times = [time.process_time()]
        batch = next(batches)
        times.append(time.process_time())
        trainer.optimizers.combined.zero_grad()
        loss, _ = trainer.sharded(batch)
        times.append(time.process_time())
        loss.backward()
        times.append(time.process_time())
        trainer.optimizers.combined.step()
        times.append(time.process_time())
        for name, start, end in zip(marks, times[:-1], times[1:], strict=True):
            seconds[name] += end - start
    return {name: value / sum(seconds.values()) for name, value in seconds.items()}


def in_a_process(command: list[str], threads: int) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def main(
    data: Annotated[Path, typer.Option(help="Folder of train.parquet and meta.json; made if it is not there.")],
    models: Annotated[str, typer.Option(help="Comma list: mmoe, ple, stem.")] = "mmoe,stem",
    precisions: Annotated[str, typer.Option(help="Comma list: fp32, bf16.")] = "fp32,bf16",
    rows: Annotated[int, typer.Option(help="Of the data, if it is made.")] = 524_288,
    vocabulary: Annotated[int, typer.Option(help="Ids per column, if the data is made.")] = 10_000,
    steps: int = 100,
    rounds: int = 2,
    threads: int = 1,
    bare: Annotated[str, typer.Option(help="Command of the other loop; what stands in braces is filled in.")] = (
        f"{sys.executable} {BARE} {{model}} {{data}} {{threads}} dmp {{steps}}"
    ),
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Compare our loop with a bare one."""
    if one:
        model, precision = one.split(":")
        print(json.dumps(measure(data, model, precision, threads, steps)))
        return
    if not (data / "meta.json").exists():
        make_data(data, rows, vocabulary)
    for model in models.split(","):
        systems = {"bare fp32": bare.format(model=model, data=data, threads=threads, steps=steps).split()}
        for precision in precisions.split(","):
            fixed = ["--data", str(data), "--steps", str(steps), "--threads", str(threads)]
            systems[f"hmoe_rec {precision}"] = [sys.executable, __file__, *fixed, "--one", f"{model}:{precision}"]
        results: dict[str, list[dict]] = {name: [] for name in systems}
        for _ in range(rounds):
            for name, command in systems.items():
                results[name].append(in_a_process(command, threads))
        print_results(model, results)


def print_results(model: str, results: dict[str, list[dict]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ["rows_s_best", "rows_s_median", "rows_per_cpu_s_best", "rows_per_cpu_s_median", "first_step_s"]
    table = Table("system", *columns, "x bare (CPU)", title=model, title_justify="left")
    base = max(r["rows_per_cpu_s_best"] for r in results["bare fp32"])
    for name, runs in results.items():
        best = max(r["rows_per_cpu_s_best"] for r in runs)
        cells = [min(r[c] for r in runs) if c == "first_step_s" else max(r[c] for r in runs) for c in columns]
        table.add_row(name, *(f"{c:,.1f}" if c < 100 else f"{c:,.0f}" for c in cells), f"{best / base:.2f}")
    Console(width=140).print(table)
    for name, runs in results.items():
        if "share" in runs[-1]:
            print(f"  {name}: " + ", ".join(f"{part} {share:.0%}" for part, share in runs[-1]["share"].items()))


if __name__ == "__main__":
    typer.run(main)
