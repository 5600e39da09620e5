"""Processes that the command starts itself: the first one's result, and whatever goes wrong in any of them."""

import os
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


def test_under_a_launcher_nothing_is_started(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run_processes(2, place, {"value": 7}) == ("1", "2", "1", "7")
    with pytest.raises(ConfigError, match="--world-size 4: the launcher started 2 processes"):
        run_processes(4, place, {"value": 7})
