"""Installed packages -> a report on whether they fit together, and in one sentence each what to do where they do not.

Survives every broken installation: nothing is imported here that is not tried and answered for.
"""

import importlib
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

# torch minor version -> the minor version that torchrec and fbgemm must have.
KNOWN_GOOD = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8"}
PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchx", "numpy", "pyarrow")
REINSTALL = "pip install --no-deps --force-reinstall -r tools/lock-cpu.txt (or lock-cuda.txt)"


@dataclass(frozen=True)
class Installed:
    """One distribution. `has_code` is False for a stand-in that only satisfies a requirement's name."""

    version: str
    has_code: bool = True


@dataclass(frozen=True)
class Report:
    """What was found. `problems` break training; `notes` do not."""

    python: str
    versions: Mapping[str, str]
    fbgemm_loads: bool
    devices: tuple[str, ...]
    threads: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def installed_packages() -> dict[str, Installed]:
    """Distributions of `PACKAGES` that are installed here, by name."""
    found = {}
    for name in PACKAGES:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        files = distribution.files or []
        found[name] = Installed(distribution.version, any(".dist-info/" not in str(file) for file in files))
    return found


def diagnose(
    installed: Mapping[str, Installed] | None = None, import_module: Callable[[str], object] = importlib.import_module
) -> Report:
    """Compares versions with the known-good matrix and tries to load torch and fbgemm.

    Args:
        installed: distributions by name; what is installed here where None.
        import_module: how a module is loaded; a test hands in one that fails.
    """
    installed = installed_packages() if installed is None else installed
    problems = [*_missing(installed), *_both_fbgemms(installed), *_mismatches(installed)]
    notes = []
    fbgemm_loads = False
    torch_error = _import_error("torch", import_module)
    if torch_error:
        problems.append(f"torch does not load ({torch_error}); reinstall it with its own requirements: {_torch_pin()}.")
    else:
        fbgemm_error = _fbgemm_error(import_module)
        fbgemm_loads = not fbgemm_error
        if fbgemm_error:
            problems.append(
                f"fbgemm does not load ({fbgemm_error}): its build does not match torch, or another build was "
                f"installed over it; run `pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu`, then {REINSTALL}."
            )
    devices, threads = _hardware() if not torch_error else ((), "unknown")
    if any(device.startswith("cuda") for device in devices) and not _has_code(installed, "fbgemm-gpu"):
        notes.append(
            "There is a GPU, but fbgemm is the CPU build; HMOE_REC_LOCK=cuda ./tools/run doctor installs for it."
        )
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        notes.append(
            "OMP_WAIT_POLICY is not PASSIVE; on a shared machine that can cost a factor of ten (tools/run sets it)."
        )
    versions = {
        name: package.version + ("" if package.has_code else " (stand-in)") for name, package in installed.items()
    }
    return Report(platform.python_version(), versions, fbgemm_loads, devices, threads, tuple(problems), tuple(notes))


def print_report(report: Report) -> int:
    """Prints the report for a person. Returns the exit code: 0 if training can work, 1 if not."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    facts = Table("what", "found", title="Installation", title_justify="left")
    facts.add_row("python", report.python)
    for name, version in report.versions.items():
        facts.add_row(name, version)
    facts.add_row("fbgemm operators", "load" if report.fbgemm_loads else "do NOT load")
    facts.add_row("devices", ", ".join(report.devices) or "none found")
    facts.add_row("threads", report.threads)
    console.print(facts)
    torch_minor = _minor(report.versions.get("torch", ""))
    matrix = Table("torch", "torchrec", "fbgemm", "", title="Known to work together", title_justify="left")
    for torch_version, other in KNOWN_GOOD.items():
        matrix.add_row(torch_version, other, other, "<- yours" if torch_version == torch_minor else "")
    console.print(matrix)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    for problem in report.problems:
        console.print(f"PROBLEM: {problem}", markup=False)
    console.print("All good." if report.ok else f"{len(report.problems)} problem(s) found.")
    return 0 if report.ok else 1


def _missing(installed: Mapping[str, Installed]) -> list[str]:
    missing = [name for name in ("torch", "torchrec", "torchx") if name not in installed]
    if not any(_has_code(installed, name) for name in ("fbgemm-gpu", "fbgemm-gpu-cpu")):
        missing.append("fbgemm-gpu-cpu (or fbgemm-gpu on a GPU machine)")
    return [f"{name} is not installed; run {REINSTALL}." for name in missing]


def _both_fbgemms(installed: Mapping[str, Installed]) -> list[str]:
    if not (_has_code(installed, "fbgemm-gpu") and _has_code(installed, "fbgemm-gpu-cpu")):
        return []
    return [
        "Both fbgemm-gpu and fbgemm-gpu-cpu are installed and have overwritten each other's files; run "
        f"`pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu`, then {REINSTALL}."
    ]


def _mismatches(installed: Mapping[str, Installed]) -> list[str]:
    if "torch" not in installed:
        return []
    torch_version = installed["torch"].version
    expected = KNOWN_GOOD.get(_minor(torch_version))
    if expected is None:
        known = ", ".join(KNOWN_GOOD)
        return [f"torch {torch_version} is outside what was tried ({known}); run {REINSTALL}."]
    wrong = [
        f"{name} {installed[name].version}"
        for name in ("torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu")
        if _has_code(installed, name) and _minor(installed[name].version) != expected
    ]
    if not wrong:
        return []
    return [
        f"torch {torch_version} goes with torchrec {expected}.x and fbgemm {expected}.x, but here are "
        f"{' and '.join(wrong)}; install one row of the table below the versions, or run {REINSTALL}."
    ]


def _fbgemm_error(import_module: Callable[[str], object]) -> str:
    """Why fbgemm cannot be used, or an empty string. Loading alone is not enough: its operators must register."""
    error = _import_error("fbgemm_gpu", import_module)
    if error:
        return error
    import torch

    try:
        torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
    except (AttributeError, RuntimeError, NotImplementedError) as exception:
        return _first_line(exception)
    return ""


def _import_error(module: str, import_module: Callable[[str], object]) -> str:
    try:
        import_module(module)
    except Exception as exception:  # a broken wheel may raise OSError, ImportError, AttributeError and others
        return _first_line(exception)
    return ""


def _hardware() -> tuple[tuple[str, ...], str]:
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    devices = (f"cpu ({os.cpu_count()} cores)", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in gpus))
    return (
        devices,
        f"{torch.get_num_threads()} in torch, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}",
    )


def _has_code(installed: Mapping[str, Installed], name: str) -> bool:
    return name in installed and installed[name].has_code


def _first_line(exception: Exception) -> str:
    text = (str(exception).strip() or "no message").splitlines()[0]
    return f"{type(exception).__name__}: {text}"


def _minor(version: str) -> str:
    """2.13.0+cpu -> 2.13"""
    return ".".join(version.split("+")[0].split(".")[:2])


def _torch_pin() -> str:
    return "pip install --force-reinstall 'torch==<the version in tools/lock-*.txt>'"
