"""Short training runs of every kind on a pretended GPU; fails on what a real one would refuse, or newly wait for.

    python tools/device_lint/run.py                          all variants, one process: about four minutes
    python tools/device_lint/run.py --only "expert,managed"  those whose names begin so
    python tools/device_lint/run.py --ranks 2                a few of them on two processes (mixes only, no waits)
    python tools/device_lint/run.py --update                 writes the waits that were seen to allowed.json
    python tools/device_lint/run.py --only expert --show     every event of the steps, with its line

Exit status 1: a mix of devices, a generator of another device, a run that ended in an error, or a wait in the steps or
in an evaluation that allowed.json does not list.
"""

import pretend  # before torch  # noqa: I001

import argparse
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import fake_cuda
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
fake_cuda.patch()
warnings.filterwarnings("ignore")
torch.set_num_threads(1)

import allowed  # noqa: E402
import guard  # noqa: E402
import phases  # noqa: E402
import variants  # noqa: E402
from recorder import WRONG, Recorder  # noqa: E402

from hmoe_rec.config import resolve_config  # noqa: E402
from hmoe_rec.training import trainer as trainer_module  # noqa: E402
from hmoe_rec.training.trainer import train  # noqa: E402

#: Runs on two processes: plan and variant.
ON_RANKS = (
    ("table_wise", "preset stem"),
    ("row_wise", "sequences tim"),
    ("column_wise", "loss pair within user"),
    ("row_wise", "managed lru"),
    ("table_wise", "monitor"),
)


def main() -> int:
    options = parse()
    logging.disable(logging.WARNING)
    if options.ranks > 1 and "RANK" not in os.environ:
        return on_ranks(options)
    folder = guard.scratch() / f"log_{options.ranks}"
    if options.ranks == 1:
        make_log(folder)
    else:  # TorchRec's slices of a table are no wrapper tensors, which its load_state_dict then refuses
        trainer_module.load_state = lambda *_: None
    phases.watch()
    wanted = [name for name in options.only.split(",") if name]
    files = {n: c for n, c in variants.Variants(folder).files.items() if not wanted or n.startswith(tuple(wanted))}
    if options.plan:
        files = {name: content | {"sharding": {"plan": options.plan}} for name, content in files.items()}
    return report(files, options)


def make_log(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    variants.prepare(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME,...", help="variants whose names begin so")
    parser.add_argument("--ranks", type=int, default=1, help="processes, each with a pretended GPU")
    parser.add_argument("--plan", default="", help="sharding.plan of all variants")
    parser.add_argument("--update", action="store_true", help="allow what is seen")
    parser.add_argument("--show", action="store_true", help="print every event of the steps")
    return parser.parse_args()


def report(files: dict[str, dict], options: argparse.Namespace) -> int:
    listed, most, failed = allowed.read(), dict[allowed.Key, float](), 0
    speaks = os.environ.get("RANK", "0") == "0"
    for name, content in files.items():
        began = time.perf_counter()
        recorder, error = run(content)
        seconds = time.perf_counter() - began
        waits = allowed.waits_of(recorder)
        for key, (n, _) in waits.items():
            most[key] = max(most.get(key, 0), n)
        wrong = [
            f"{e.kind} {e.op} x{n} in {e.phase} @ {e.place}:{e.line}"
            for e, n in recorder.events.items()
            if e.kind in WRONG
        ]
        wrong += [error] if error else []
        if not options.update and options.ranks == 1:  # gloo and DDP wait where NCCL would not
            wrong += allowed.offences(waits.values(), listed)
        failed += bool(wrong)
        if speaks:
            total = sum(n for (phase, *_), (n, _) in waits.items() if phase == "step")
            print(f"{'FAIL' if wrong else 'ok  '} {name:42} {seconds:5.1f} s, {total:.3g} waits a step")
            print("".join(f"       {line}\n" for line in wrong), end="", flush=True)
            if options.show:
                show(recorder)
    if options.update:
        allowed.write(most if options.only == "" else {**listed, **most})
    if speaks:
        print(f"{len(files)} variants, {failed} failed")
    return int(failed > 0)


def run(content: dict) -> tuple[Recorder, str | None]:
    """-> what happened, and the error if it ended in one."""
    recorder, error = Recorder(), None
    recorder.phase = "build"
    with open(os.devnull, "w") as nowhere, pretend.Recording(recorder):
        sys.stderr, before = nowhere, sys.stderr
        try:
            train(resolve_config(content))
        except (Exception, SystemExit) as problem:
            error = "".join(traceback.format_exception(problem)[-3:])
        finally:
            sys.stderr = before
    return recorder, error


def show(recorder: Recorder) -> None:
    rows = [(e, n) for e, n in recorder.events.items() if e.phase in phases.HOT]
    for event, n in sorted(rows, key=lambda row: row[0].key):
        print(f"       {n:5} {event.phase:9} {event.kind:5} {event.op:34} {event.place}:{event.line}")


def on_ranks(options: argparse.Namespace) -> int:
    """Every run of ON_RANKS in processes of its own."""
    failed = 0
    for plan, name in ON_RANKS:
        make_log(guard.scratch() / f"log_{options.ranks}")
        print(f"{options.ranks} ranks, {plan}", flush=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "--ranks", str(options.ranks), "--only", name, "--plan", plan]
        command += ["--update"] if options.update else []
        place = {
            "WORLD_SIZE": options.ranks,
            "LOCAL_WORLD_SIZE": options.ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        started = [
            subprocess.Popen(
                command, env=os.environ | {k: str(v) for k, v in (place | {"RANK": r, "LOCAL_RANK": r}).items()}
            )
            for r in range(options.ranks)
        ]
        failed += any([ended(process) for process in started])
    return int(failed > 0)


def ended(process: subprocess.Popen, seconds: float = 180.0) -> int:
    """Its exit status; it is ended where it waits for a process that failed."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # the wrapper tensors do not survive the interpreter's end
