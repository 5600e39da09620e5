"""Everything that can only be known on a GPU, in one script of at most eight minutes for one device.

    python tools/bench/gpu.py --out runs/gpu                   all blocks, results.json after each
    python tools/bench/gpu.py --out runs/gpu --blocks 3,6      some of them
    python tools/bench/gpu.py --out runs/gpu --device cpu      the script itself, tried without a GPU

Each block runs in a process of its own with a limit of seconds, since an error of the device spoils the process that
meets it; what a block has found is written as it is found, so that a block that is cut short loses nothing. A block
fails by itself: the others go on. Exit status: the number of blocks that failed.

    0  doctor, and one FBGEMM lookup                 5  kernels x optimizers x precisions, best step loaded again
    1  a run: pipeline, resume, CPU <-> GPU, waits   6  speed by batch, precision, pinning, pipeline; a trace
    2  the tests marked gpu                          7  bench plan, bench calibrate
    3  parity with the CPU, part by part             8  follow, uncertainty, analyze
    4  managed ids, row reset, publishing
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: Seconds that each block may take.
LIMITS = {0: 30, 1: 75, 2: 60, 3: 65, 4: 40, 5: 65, 6: 70, 7: 40, 8: 35}


class Results:
    """The findings of one block: a JSON file that is written anew with each of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, dict[str, Any]()

    def add(self, name: str, value: Any) -> None:
        self.found[name] = value
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.found, indent=1))
        unfinished.replace(self.path)


def run_block(number: int, out: Path, device: str, limit: float) -> dict[str, Any]:
    """One block in a process of its own. -> what it found, with "ok", "seconds" and the end of its output if not ok."""
    path, began = out / f"block_{number}.json", time.perf_counter()
    path.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "gpu_blocks.py"), str(number), str(path), device, str(limit)]
    paths = [str(ROOT), str(ROOT / "tests"), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_WAIT_POLICY": "PASSIVE"}
    log = out / f"block_{number}.log"
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, timeout=limit + 10
            ).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    found = json.loads(path.read_text()) if path.exists() else {}
    ok = status == 0 and not found.get("failures")
    summary = {"ok": ok, "seconds": round(time.perf_counter() - began, 1), "found": found}
    return summary if ok else summary | {"status": status, "log": log.read_text()[-3000:]}


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json, a log per block, and the trace.")],
    blocks: Annotated[str, typer.Option(help="Comma list of numbers.")] = ",".join(map(str, LIMITS)),
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script itself.")] = "cuda",
    slower: Annotated[float, typer.Option(help="Multiplies every limit of seconds.")] = 1.0,
) -> None:
    """Run the blocks one after the other."""
    out.mkdir(parents=True, exist_ok=True)
    console, results = Console(width=140), dict[str, Any]()
    for number in map(int, blocks.split(",")):
        results[str(number)] = summary = run_block(number, out.resolve(), device, LIMITS[number] * slower)
        (out / "results.json").write_text(json.dumps(results, indent=1))
        state = "ok" if summary["ok"] else f"FAILED ({summary['status']})"
        console.print(f"block {number}: {state} in {summary['seconds']} s", highlight=False)
        for name, value in summary["found"].items():
            console.print(f"    {name}: {json.dumps(value)}"[:400], highlight=False)
        if not summary["ok"]:
            console.print(summary["log"][-1200:], markup=False, highlight=False)
    raise SystemExit(sum(not summary["ok"] for summary in results.values()))


if __name__ == "__main__":
    typer.run(main)
