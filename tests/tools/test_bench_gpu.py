"""The GPU bench: a block's findings outlive it, a failing one says why, and on the CPU every block runs."""

from pathlib import Path

import gpu
import gpu_blocks
import pytest


def test_a_block_finds_versions_and_a_right_lookup(tmp_path: Path) -> None:
    summary = gpu.run_block(0, tmp_path, "cpu", 120)
    assert summary["ok"], summary
    assert summary["found"]["fbgemm rows moved"] == [0, 1, 4, 9]


def test_a_block_that_dies_keeps_what_it_found_and_shows_its_log(tmp_path: Path) -> None:
    summary = gpu.run_block(0, tmp_path, "nowhere", 120)
    assert not summary["ok"] and summary["status"] == 1
    assert "doctor" in summary["found"] and "nowhere" in summary["log"]


def test_what_is_checked_and_wrong_fails_a_block(tmp_path: Path) -> None:
    bench = gpu_blocks.Bench(gpu.Results(tmp_path / "x.json"), "cpu", 1.0)
    bench.check("right", True, 1)
    assert "failures" not in bench.results.found
    bench.check("wrong", False, 2)
    assert bench.results.found["failures"] == ["wrong: 2"]


def test_every_block_has_a_limit_and_all_fit_eight_minutes() -> None:
    assert sorted(gpu.LIMITS) == list(range(len(gpu_blocks.BLOCKS)))
    assert sum(gpu.LIMITS.values()) <= 8 * 60


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 4, 5, 6, 8])
def test_a_block_runs_on_the_cpu(tmp_path: Path, number: int) -> None:
    summary = gpu.run_block(number, tmp_path, "cpu", 500)
    assert summary["ok"], summary
    assert summary["found"]["finished"]
