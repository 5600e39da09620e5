"""What pyproject.toml, the lock files and the stand-in ask for: always a torch, torchrec and fbgemm that fit."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from hmoe_rec.doctor import FBGEMM, KNOWN_GOOD, NEWEST

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
LOCKS = {path.stem.removeprefix("lock-"): path for path in sorted((ROOT / "tools").glob("lock-*.txt"))}
OLDEST, LOCKED = next(iter(KNOWN_GOOD)), "2.13"  # the lock files move to the newest row when all tests pass on it
# A version that is not out yet, of the series that follows the newest row.
NEXT = {"torch": "2.15.0", "torchrec": "1.10.0", "fbgemm-gpu": "1.10.0", "fbgemm-gpu-cpu": "1.10.0"}


def minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def pins(path: Path) -> dict[str, str]:
    return dict(line.split("==") for line in path.read_text().splitlines() if "==" in line and not line.startswith("#"))


def versions_of(row: str) -> dict[str, str]:
    return {"torch": f"{row}.1", "torchrec": f"{KNOWN_GOOD[row]}.1"} | {name: f"{KNOWN_GOOD[row]}.0" for name in FBGEMM}


@pytest.mark.parametrize("row", KNOWN_GOOD)
def test_the_wheel_takes_every_row_and_nothing_newer(row):
    for name in ("torch", "torchrec", "fbgemm-gpu"):
        assert BASE[name].specifier.contains(versions_of(row)[name]), name
        assert not BASE[name].specifier.contains(NEXT[name]), name


@pytest.mark.parametrize(("extra", "build"), [("cpu", "fbgemm-gpu-cpu"), ("cuda", "fbgemm-gpu")])
def test_an_extra_takes_the_newest_row_and_no_other(extra, build):
    asked = {r.name: r.specifier for r in map(Requirement, PROJECT["optional-dependencies"][extra])}
    assert asked.keys() == {"torch", "torchrec", build}
    for row in KNOWN_GOOD:
        for name, specifier in asked.items():
            assert specifier.contains(versions_of(row)[name]) == (row == NEWEST), (row, name)
    assert not any(specifier.contains(NEXT[name]) for name, specifier in asked.items())


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_holds_a_row_and_all_that_the_wheel_asks_for(lock):
    pinned = pins(LOCKS[lock])
    row = minor(pinned["torch"])
    assert row == (OLDEST if lock.endswith("oldest") else LOCKED)
    build = "fbgemm-gpu" if lock == "cuda" else "fbgemm-gpu-cpu"
    assert {minor(pinned["torchrec"]), minor(pinned[build])} == {KNOWN_GOOD[row]}
    stand_in = {} if lock == "cuda" else {"fbgemm-gpu": SHIM["version"]}
    for name, requirement in BASE.items():
        assert requirement.specifier.contains((pinned | stand_in)[name]), name


def test_the_oldest_lock_file_holds_the_lower_bounds():
    pinned = pins(LOCKS["cpu-oldest"])
    for name, requirement in BASE.items():
        low = next(s.version for s in requirement.specifier if s.operator == ">=")
        release = Version(pinned.get(name, pinned["fbgemm-gpu-cpu"])).release
        assert release[: len(Version(low).release)] == Version(low).release, name


SHIM = tomllib.loads((ROOT / "tools/shim/pyproject.toml").read_text())["project"]


def test_the_stand_in_suits_every_cpu_lock_file_and_the_wheel():
    (asked,) = map(Requirement, SHIM["dependencies"])
    assert BASE["fbgemm-gpu"].specifier.contains(SHIM["version"])
    for lock in ("cpu", "cpu-oldest"):
        assert asked.specifier.contains(pins(LOCKS[lock])[asked.name])


def test_the_stated_pythons_are_those_that_tools_run_takes():
    stated = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert stated == ["3.11", "3.12", "3.13"] and PROJECT["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= sys.version_info < (3, 14)" in (ROOT / "tools/run").read_text()


@pytest.fixture(scope="module")
def pip_report(tmp_path_factory):
    """pip's arguments after `install` -> name -> what it would install into a fresh environment. Skips offline."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    source = folder / "source"
    for name in ("hmoe_rec", "launch", "tools/shim"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)

    def pip(*arguments) -> subprocess.CompletedProcess:
        command = [folder / "venv/bin/python", "-m", "pip", "--disable-pip-version-check", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=source)

    built = pip("wheel", "-q", "--no-deps", "-w", str(folder), ".")
    if "No matching distribution found for setuptools" in built.stderr:
        pytest.skip("no package index in reach")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")

    def report(extra: str, *arguments: str) -> dict[str, dict]:
        name = f"{wheel}[{extra}]" if extra else str(wheel)
        result = pip("install", "--dry-run", "-q", "--report", "-", name, *arguments)
        assert result.returncode == 0, result.stderr
        return {
            entry["metadata"]["name"].lower().replace("_", "-"): entry for entry in json.loads(result.stdout)["install"]
        }

    return report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "arguments", "row"),
    [
        ("", (), NEWEST),
        ("cpu", ("./tools/shim",), NEWEST),
    ],
    ids=["plain", "cpu"],
)
def test_pip_resolves_a_row(pip_report, extra, arguments, row):
    chosen = pip_report(extra, *arguments)
    build = "fbgemm-gpu-cpu" if extra == "cpu" else "fbgemm-gpu"
    triple = [minor(chosen[name]["metadata"]["version"]) for name in ("torch", "torchrec", build)]
    assert triple == [row, KNOWN_GOOD[row], KNOWN_GOOD[row]]
    wheels = [name for name in FBGEMM if name in chosen and "dir_info" not in chosen[name]["download_info"]]
    assert wheels == [build]  # of the other one at most the stand-in
