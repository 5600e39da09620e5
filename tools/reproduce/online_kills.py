"""`kill -9` at random moments: a follower loses no row, repeats none, and ends as if nothing had happened.

    python tools/reproduce/online_kills.py --moments 10 --processes 1
    python tools/reproduce/online_kills.py --moments 10 --processes 2

A small model follows a directory into which the hours of KuaiRand are written half by half, and is killed at random
moments (of two processes, one of them), each time to be started again. The checkpoint counts for every row how often
the parameters in it have learned from it; in the end each count must be 1, and the parameters must equal those of a run
that nobody disturbed. The exit code says whether it is so.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import typer
from online import write_hours

from hmoe_rec.batch import Batch
from hmoe_rec.cli import ENVIRONMENT
from hmoe_rec.config import load_config, prepare_data
from hmoe_rec.data.stream import Clock
from hmoe_rec.sharding.process import process_group
from hmoe_rec.training.checkpoint import CheckpointManager, read_unsharded
from hmoe_rec.training.evaluate import device_of
from hmoe_rec.training.online import Follower
from hmoe_rec.training.trainer import choose_threads

SMALL = [
    "model.preset=shared_bottom",
    "model.embedding_dim=4",
    "model.expert_dim=8",
    "model.expert={kind: flat_dnn, hidden: [8]}",
    "model.encoding.sequences=mean",
    "train.global_batch_size=128",
    "train.decay=constant",
    "train.precision=fp32",
    "data.validation=[]",
    "data.test=[]",
    "online.poll_seconds=0.05",
    "online.checkpoint_windows=3",
]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Audited(Follower):
    """Counts, beside the parameters and in the same checkpoints, how often they have learned from each row."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.first_row = json.loads(Path(self.run_dir).with_suffix(".rows.json").read_text())
        self.learned = torch.zeros(self.first_row["all rows"], dtype=torch.int32)

    def _fit(self, batches: Sequence[Batch]) -> float:
        rate, now = super()._fit(batches), torch.zeros_like(self.learned)
        for place in (place for batch in batches for place in batch.files):
            file, _, span = place.rpartition(" rows ")
            start, stop = map(int, span.split("-"))
            row = self.first_row[Path(file).name]
            now[row + start : row + stop + 1] += 1
        if self.process.world_size > 1:
            dist.all_reduce(now)
        self.learned += now
        return rate

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "audit": {"learned": self.learned}}


@app.command(hidden=True)
def audited(config: str, overrides: list[str]) -> None:
    """One attempt of the follower that is killed."""
    resolved = load_config(config, overrides)
    with process_group(device_of(resolved)) as process:
        choose_threads(resolved, process)
        Audited(resolved, prepare_data(resolved), process, time.perf_counter(), Clock()).run()


class Producer(threading.Thread):
    """Copies files into a directory, each in two halves, in their order, and says at the end that it is done."""

    def __init__(self, files: Sequence[Path], target: Path, seconds: float) -> None:
        super().__init__(daemon=True)
        self.files, self.target, self.seconds = files, target, seconds

    def run(self) -> None:
        for file in self.files:
            content = file.read_bytes()
            with (self.target / file.name).open("wb") as out:
                out.write(content[: len(content) // 2])
                out.flush()
                time.sleep(self.seconds / 2)
                out.write(content[len(content) // 2 :])
            time.sleep(self.seconds / 2)
        (self.target / "_DONE").touch()


def attempt(config: str, run: Path, hours: Path, processes: int) -> subprocess.Popen:
    start = [sys.executable]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    places = [f"online.follow={hours}", f"train.run_dir={run}", "train.resume=true"]
    command = [*start, __file__, "audited", config, "--", *SMALL, *places]
    environment = {**ENVIRONMENT, **os.environ}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def workers_of(process: subprocess.Popen, processes: int) -> list[int]:
    if processes == 1:
        return [process.pid]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in children.split()]


def lines_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def final_state(run: Path) -> dict[str, torch.Tensor]:
    found = CheckpointManager(str(run / "checkpoints")).latest()
    assert found is not None
    return {k: x for k, x in read_unsharded(found).items() if not k.startswith("per_rank")}


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="A run file of KuaiRand.")] = "configs/kuairand.yaml",
    log: Annotated[Path, typer.Option(help="The converted log.")] = Path("data/kuairand"),
    out: Annotated[Path, typer.Option(help="Emptied first.")] = Path("runs/online-kills"),
    moments: Annotated[int, typer.Option(help="How often it is killed.")] = 10,
    processes: Annotated[int, typer.Option(help="Of the follower; one of them is killed.")] = 1,
    num_hours: Annotated[int, typer.Option(help="Files.")] = 100,
    at_most_seconds: Annotated[float, typer.Option(help="From a window's log line to the kill, uniform.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 1,
) -> None:
    """Kill a follower again and again; exit code 1 if a row was lost or repeated, or a parameter differs."""
    if context.invoked_subcommand is not None:
        return
    draw = random.Random(seed)
    shutil.rmtree(out, ignore_errors=True)
    _, rest = write_hours(log, out)
    files = sorted(rest.glob("*.parquet"))[:num_hours]
    first_row, total = {}, 0
    for file in files:
        first_row[file.name] = total
        total += pq.read_metadata(file).num_rows
    runs = {name: out / name for name in ("undisturbed", "killed")}
    for run in runs.values():
        run.with_suffix(".rows.json").write_text(json.dumps(first_row | {"all rows": total}))
        (out / f"{run.name}-in").mkdir()
    for file in files:
        shutil.copy(file, out / "undisturbed-in")
    (out / "undisturbed-in" / "_DONE").touch()
    _finish(attempt(config, runs["undisturbed"], out / "undisturbed-in", processes))
    Producer(files, out / "killed-in", seconds=0.2).start()
    places: list[str] = []
    while len(places) < moments:
        before, process = lines_of(runs["killed"]), attempt(config, runs["killed"], out / "killed-in", processes)
        wanted = before + draw.randint(1, max(1, (len(files) - before) // (moments - len(places) + 1)))
        while process.poll() is None and lines_of(runs["killed"]) < wanted:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, at_most_seconds))
        if process.poll() is not None:
            _finish(process)
            break
        victim = draw.choice(workers_of(process, processes))
        os.kill(victim, signal.SIGKILL)
        process.communicate()
        places.append(f"window {lines_of(runs['killed'])}")
    _finish(attempt(config, runs["killed"], out / "killed-in", processes))
    report(final_state(runs["undisturbed"]), final_state(runs["killed"]), places, total)


def report(undisturbed: dict[str, torch.Tensor], killed: dict[str, torch.Tensor], places: list[str], rows: int) -> None:
    learned = killed["audit.learned"]
    different = [key for key, x in undisturbed.items() if key.startswith(("model.", "optimizer.", "seen."))]
    different = [key for key in different if not torch.equal(undisturbed[key], killed[key])]
    print(f"killed {len(places)} times, after: {', '.join(places)}")
    print(f"rows {rows:,}: never learned {int((learned == 0).sum())}, more than once {int((learned > 1).sum())}")
    print(f"tensors of model, optimizer and seen ids that differ from the undisturbed run: {len(different)}")
    if different or not (learned == 1).all():
        raise typer.Exit(1)


def _finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the follower failed:\n{errors[-3000:]}")


if __name__ == "__main__":
    app()
