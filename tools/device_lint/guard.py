"""guard.cpp -> a library, loaded before torch asks for the first time whether there is CUDA.

Built once per version of torch, into the folder that DEVICE_LINT_OUT names (default: the system's temporary one).
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def scratch() -> Path:
    """Where the library and the runs of the lint lie."""
    folder = Path(os.environ.get("DEVICE_LINT_OUT") or Path(tempfile.gettempdir()) / f"device_lint_{os.getuid()}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build() -> Path:
    """The library for the installed torch.

    Raises:
        SystemExit: no C++ compiler, or it does not take the file.
    """
    library = scratch() / f"guard-{metadata.version('torch')}-{int(SOURCE.stat().st_mtime)}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise SystemExit("device_lint needs a C++20 compiler: install g++ or name one with CXX")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations, "torch is not installed"
    torch = spec.submodule_search_locations[0]
    unfinished = library.with_suffix(f".{os.getpid()}")
    options = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", f"-L{torch}/lib"]
    linked = ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib", "-o", str(unfinished)]
    subprocess.run([compiler, *options, str(SOURCE), *linked], check=True)
    unfinished.replace(library)
    return library


def has_cpu_torch() -> bool:
    """Whether the installed torch is a CPU build, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations, "torch is not installed"
    return not list(Path(spec.submodule_search_locations[0], "lib").glob("libtorch_cuda*"))


def load() -> None:
    """From here on torch believes in CUDA devices, one per process of this machine."""
    if not has_cpu_torch():
        raise SystemExit(
            f"device_lint: torch {metadata.version('torch')} is a CUDA build, whose own CUDA hooks leave no place for "
            "pretended ones; install a CPU build"
        )
    if "torch" in sys.modules:
        raise SystemExit("device_lint: torch was imported before the guard; its CUDA hooks are made only once")
    ctypes.CDLL(str(build()))


load()
