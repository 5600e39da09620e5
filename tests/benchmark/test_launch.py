"""Processes that the command starts itself: the first one's result, and whatever goes wrong in any of them."""

import os
import subprocess
import sys
import time

import pytest

from hmoe_rec.benchmark.launch import run_processes
from hmoe_rec.types import ConfigError, DataError


def place(value: int) -> tuple[str, ...]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], str(value)


def fails(kind: str) -> None:
    if os.environ["RANK"] == "0":
        time.sleep(60)  # the others' failure does not wait for it
    if kind == "data":
        raise DataError("row 7")
    if kind == "exit":
        os._exit(3)
    raise KeyError("oh")


def test_processes():
    began = time.perf_counter()
    assert run_processes(2, place, {"value": 5}) == ("0", "2", "0", "5")
    with pytest.raises(DataError, match="^row 7$"):
        run_processes(2, fails, {"kind": "data"})
    with pytest.raises(RuntimeError, match="process 1:\n(.*\n)*KeyError: 'oh'"):
        run_processes(2, fails, {"kind": "other"})
    with pytest.raises(RuntimeError, match="process 1 died"):
        run_processes(2, fails, {"kind": "exit"})
    assert time.perf_counter() - began < 50


SCRIPT = """
from hmoe_rec.benchmark import launch
launch.PRELOAD.clear()
if __name__ == "__main__":
    print(launch.run_processes(1, launch._free_port, {}))
"""


def test_modules_of_the_current_folder_are_not_taken_for_pythons(tmp_path, root):
    """It may be a run directory; `multiprocessing` starts its server by `python -c`."""
    for folder in ("run", "bin"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run" / "selectors.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom select import *\n")
    (tmp_path / "bin" / "start.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {"PYTHONPATH": str(root)}
    command = [sys.executable, str(tmp_path / "bin" / "start.py")]
    done = subprocess.run(command, cwd=tmp_path / "run", env=environment, capture_output=True, text=True, timeout=300)
    assert not (tmp_path / "ran").exists()
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr


def test_under_a_launcher_nothing_is_started(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run_processes(2, place, {"value": 7}) == ("1", "2", "1", "7")
    with pytest.raises(ConfigError, match="--world-size 4: the launcher started 2 processes"):
        run_processes(4, place, {"value": 7})
