"""tools/run with a Python that only writes down what it is asked for: what is built, and what is kept."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PYTHON = """#!/usr/bin/env bash
echo "$@" >>"$LOG"
self=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
case "$*" in
    -V) echo Python 3.12.0 ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$self" "$3/bin/python" && cp "$self" "$3/bin/hmoe-rec" ;;
    *"-m pip install"*+cpu*) [ -n "${CPU_WHEEL:-}" ] && [[ "$*" == *"$CPU_WHEEL"* ]] || exit 1 ;;
    *"-m pip install"*-r*) exit "${BROKEN:-0}" ;;
    *"-m pip install"*torch==*) touch "$LOG.nvidia" ;;
    "-c import torch") [ -n "${CPU_WHEEL:-}" ] || [ -f "$LOG.nvidia" ] ;;
    -c*) echo "$self" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    return make_checkout(tmp_path / "checkout")


def make_checkout(folder: Path) -> Path:
    (folder / "tools/shim").mkdir(parents=True)
    shutil.copy(ROOT / "tools/run", folder / "tools/run")
    (folder / "tools/lock-cpu.txt").write_text("torch==2.14.1\ntyper==0.17.0\n")
    for name in ("pyproject.toml", "tools/shim/pyproject.toml"):
        (folder / name).write_text("")
    program(folder.parent / "bin/python3.11", PYTHON)
    return folder


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(checkout: Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """`tools/run doctor` with an interpreter of ours as the only one in sight; no uv."""
    base = {
        "PATH": f"{checkout.parent / 'bin'}:/usr/bin:/bin",
        "LOG": str(checkout.parent / "log"),
        "HMOE_REC_LOCK": "cpu",
        "HMOE_REC_PYTHON": "python3.11",
        "HOME": str(checkout.parent),
    }
    return subprocess.run(
        [checkout / "tools/run", "doctor"], env=base | environment, cwd=cwd or checkout, capture_output=True, text=True
    )


def calls(checkout: Path) -> list[str]:
    return (checkout.parent / "log").read_text().splitlines()


def virtual_environment(folder: Path) -> Path:
    """Somebody's environment, and in it the package that they are working on."""
    (folder / "src").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (folder / "src/work.py").write_text("months = 'of work'\n")
    return folder


@pytest.mark.parametrize("name", ["theirs", "checkout/.venv"])  # one of another place, and one here made by other means
def test_an_environment_of_other_origin_is_kept(checkout, tmp_path, name):
    theirs = virtual_environment(tmp_path / name)
    result = run(checkout, HMOE_REC_VENV=str(theirs))
    assert result.returncode == 1
    assert (
        f"{theirs} is there and is no environment that {checkout}/tools/run made; it is left as it is" in result.stderr
    )
    assert "HMOE_REC_VENV" in result.stderr and (theirs / "src/work.py").exists()


@pytest.mark.parametrize("mark", ["made-by-tools-run", "built-from"])
def test_an_environment_of_another_checkout_is_kept(checkout, tmp_path, mark):
    theirs = virtual_environment(tmp_path / "theirs")
    (theirs / mark).write_text(f"{tmp_path}/other" + (" cpu 1 2" if mark == "built-from" else "") + "\n")
    assert run(checkout, HMOE_REC_VENV=str(theirs)).returncode == 1
    assert (theirs / "src/work.py").exists()


def test_what_is_no_environment_is_kept(checkout, tmp_path):
    (tmp_path / "thesis").write_text("text")
    assert run(checkout, HMOE_REC_VENV=str(tmp_path / "thesis")).returncode == 1
    assert (tmp_path / "thesis").read_text() == "text"


def test_one_of_its_own_is_built_again_when_the_lock_changes(checkout, tmp_path):
    venv = tmp_path / "venv"
    venv.mkdir()  # an empty folder is no loss
    assert run(checkout, HMOE_REC_VENV=str(venv), CPU_WHEEL="--no-index").returncode == 0
    (venv / "old").touch()
    (checkout / "tools/lock-cpu.txt").write_text("torch==2.14.2\n")
    result = run(checkout, HMOE_REC_VENV=str(venv), CPU_WHEEL="--no-index")
    assert result.returncode == 0, result.stderr
    assert (venv / "built-from").exists() and not (venv / "old").exists()
    assert sum(call.startswith("-m venv") for call in calls(checkout)) == 2
    assert run(checkout, HMOE_REC_VENV=str(venv)).returncode == 0
    assert sum(call.startswith("-m venv") for call in calls(checkout)) == 2


def test_what_an_interrupted_build_left_is_built_again(checkout):
    assert run(checkout, BROKEN="1", CPU_WHEEL="--no-index").returncode == 1
    assert (checkout / ".venv").exists() and not (checkout / ".venv/built-from").exists()
    assert run(checkout, CPU_WHEEL="--no-index").returncode == 0


def test_an_environment_that_moved_with_its_checkout_is_built_again(checkout, tmp_path):
    assert run(checkout, CPU_WHEEL="--no-index").returncode == 0
    moved = tmp_path / "moved"
    checkout.rename(moved)
    assert run(moved, CPU_WHEEL="--no-index").returncode == 0
    assert (moved / ".venv/built-from").read_text().startswith(f"{moved} cpu")


def test_a_relative_folder_is_one_of_where_the_command_was_given(checkout, tmp_path):
    result = run(checkout, cwd=tmp_path, HMOE_REC_VENV="mine", CPU_WHEEL="--no-index")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "mine/built-from").exists() and not (checkout / "mine").exists()


def pip_calls(checkout: Path) -> list[str]:
    return [call.split("--disable-pip-version-check ")[1] for call in calls(checkout) if "pip install" in call]


LOCKED = "--no-deps -r tools/lock-cpu.txt -e ."


def test_torch_comes_from_a_folder_of_cpu_builds_first(checkout):
    assert run(checkout, CPU_WHEEL="--no-index").returncode == 0
    assert pip_calls(checkout) == ["--no-deps --no-index torch==2.14.1+cpu", LOCKED]


def test_then_from_a_page_of_cpu_builds(checkout):
    assert run(checkout, CPU_WHEEL="page.example", HMOE_REC_TORCH_INDEX="https://page.example").returncode == 0
    assert pip_calls(checkout)[1:] == ["--no-deps --index-url=https://page.example torch==2.14.1+cpu", LOCKED]


@pytest.mark.parametrize("page", ["https://page.example", ""])
def test_and_else_the_cuda_build_with_what_it_needs_to_load(checkout, page):
    result = run(checkout, HMOE_REC_TORCH_INDEX=page)
    assert result.returncode == 0, result.stderr
    assert pip_calls(checkout)[-2:] == [LOCKED, "torch==2.14.1"]
    assert len(pip_calls(checkout)) == (4 if page else 3)
    assert "no CPU build of torch" in result.stderr


def test_an_interpreter_that_does_not_run_is_passed_over(checkout):
    """As the shim of pyenv for a version that is not chosen."""
    bin = checkout.parent / "bin"
    (bin / "python3.11").rename(bin / "python3.13")
    for name in ("python3.11", "python3.12"):
        program(bin / name, "#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    result = run(checkout, HMOE_REC_PYTHON="", CPU_WHEEL="--no-index")
    assert result.returncode == 0, result.stderr
    assert len([call for call in calls(checkout) if call.startswith("-m venv")]) == 1


def test_without_an_interpreter_it_says_what_to_install(checkout):
    result = run(checkout, HMOE_REC_PYTHON="python3.99")
    assert result.returncode == 1
    assert "found no Python 3.11 to 3.13" in result.stderr and "HMOE_REC_PYTHON" in result.stderr


def test_a_lock_file_that_is_not_there(checkout):
    assert "give cpu, cuda or cpu-oldest" in run(checkout, HMOE_REC_LOCK="gpu").stderr
