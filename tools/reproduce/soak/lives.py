"""One life of a run: a launcher with its ranks, ended by itself or by us at a drawn moment."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROGRESS = re.compile(r"^(?:step|window) +(\d+) ")
#: Exit status of a run that was told to stop and has saved everything.
STOPPED = 143


@dataclass(frozen=True)
class Life:
    """How a launch of the run looks and ends.

    Attributes:
        ranks: processes.
        plan: sharding.plan.
        after: log lines of this life after which it is ended; None = it ends by itself.
        seconds: from that line to the signal.
        end: all (SIGKILL to every process), one (SIGKILL to one rank), stop (SIGTERM to the launcher).
    """

    ranks: int
    plan: str
    after: int | None = None
    seconds: float = 0.0
    end: str = "all"

    def __str__(self) -> str:
        ended = "" if self.after is None else f" {self.end}@{self.after}"
        return f"{self.ranks}x {self.plan}{ended}"


@dataclass(frozen=True)
class Outcome:
    """Attributes: status: of the launcher; None where we ended it. lines: of progress. output: its words of errors."""

    status: int | None
    lines: int
    output: str


def live(run_file: Path, life: Life, words: list[str], environment: dict[str, str], draw: random.Random) -> Outcome:
    """Starts the run, resuming what is there, and waits for its end or brings it about."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={life.ranks}"]
    command += ["-m", "hmoe_rec", "train", str(run_file), f"sharding.plan={life.plan}", *words, "--resume"]
    threads = {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | threads | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said: list[str] = []
    seen = threading.Semaphore(0)
    listener = threading.Thread(target=_listen, args=(process, said, seen), daemon=True)
    listener.start()
    ended = life.after is not None and _ends(process, life, seen, draw)
    status = process.wait()
    listener.join()
    lines = sum(PROGRESS.match(line) is not None for line in said)
    errors = [line for line in said if "rror" in line and "elastic" not in line and "ChildFailed" not in line]
    return Outcome(None if ended and status not in (0, STOPPED) else status, lines, "".join(errors[:12] or said[-12:]))


def _listen(process: subprocess.Popen, said: list[str], seen: threading.Semaphore) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if PROGRESS.match(line):
            seen.release()


def _ends(process: subprocess.Popen, life: Life, seen: threading.Semaphore, draw: random.Random) -> bool:
    """Waits for the moment and sends the signal. -> whether the run was still there."""
    for _ in range(life.after or 0):
        while not seen.acquire(timeout=0.05):
            if process.poll() is not None:
                return False
    time.sleep(life.seconds)
    if process.poll() is not None:
        return False
    if life.end == "stop":
        process.send_signal(signal.SIGTERM)
    elif life.end == "one":
        os.kill(draw.choice(_ranks_of(process) or [process.pid]), signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    return True


def _ranks_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in children.split()]
