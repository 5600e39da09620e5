"""Installed packages -> a report on whether they fit together, and in one sentence each what to do where they do not.

Survives every broken installation: nothing is imported here that is not tried and answered for.
"""

import importlib
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

# The supported triples: torch's minor version -> the one that torchrec and fbgemm must both have. fbgemm's operators
# are compiled against one torch, and torchrec calls them by name; other mixes fail at the import, or later at a call.
KNOWN_GOOD = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8", "2.14": "1.9"}
NEWEST = list(KNOWN_GOOD)[-1]
FBGEMM = ("fbgemm-gpu-cpu", "fbgemm-gpu")
PACKAGES = ("torch", "torchrec", *FBGEMM, "torchx", "numpy", "pyarrow")


@dataclass(frozen=True)
class Installed:
    """One distribution. `has_code` is False for a stand-in that only satisfies a requirement's name."""

    version: str
    has_code: bool = True


@dataclass(frozen=True)
class Report:
    """What was found. `row` is the key of `KNOWN_GOOD` that all three follow, empty where they are a mix. `problems`
    break training; `notes` do not."""

    python: str
    versions: Mapping[str, str]
    row: str
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
    """Compares versions with the known-good triples and tries to load torch and fbgemm.

    Args:
        installed: distributions by name; what is installed here where None.
        import_module: how a module is loaded; a test hands in one that fails.
    """
    installed = installed_packages() if installed is None else installed
    torch_error = _import_error("torch", import_module) if "torch" in installed else "not installed"
    fbgemm_error = _fbgemm_error(import_module) if not torch_error else "torch does not load"
    devices, threads = _hardware() if not torch_error else ((), "unknown")
    has_gpu = any(device.startswith("cuda") for device in devices) if not torch_error else None
    remedy = _remedy(installed, has_gpu)
    problems = [*_missing(installed, remedy), *_builds(installed, remedy), *_mismatches(installed, remedy)]
    if torch_error and "torch" in installed:
        again = f"pip install --force-reinstall 'torch=={_public(installed['torch'].version)}'"
        problems.append(f"torch does not load ({torch_error}); install it again with its own requirements: {again}")
    elif fbgemm_error and _row(installed):  # else the versions are the reason
        problems.append(f"fbgemm does not load ({fbgemm_error}): {_why_not(installed, has_gpu)}; run {remedy}")
    versions = {
        name: package.version + ("" if package.has_code else " (stand-in)") for name, package in installed.items()
    }
    return Report(
        platform.python_version(),
        versions,
        _row(installed),
        not fbgemm_error,
        devices,
        threads,
        tuple(problems),
        _notes(installed, bool(has_gpu)),
    )


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
    matrix = Table("torch", "torchrec", "fbgemm", "", title="Known to work together", title_justify="left")
    for torch_version, other in KNOWN_GOOD.items():
        matrix.add_row(torch_version, other, other, "<- yours" if torch_version == report.row else "")
    console.print(matrix)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    for problem in report.problems:
        console.print(f"PROBLEM: {problem}", markup=False)
    console.print("All good." if report.ok else f"{len(report.problems)} problem(s) found.")
    return 0 if report.ok else 1


def _notes(installed: Mapping[str, Installed], has_gpu: bool) -> tuple[str, ...]:
    notes = []
    if has_gpu and not _has_code(installed, "fbgemm-gpu"):
        notes.append(
            "There is a GPU, but fbgemm is the CPU build; HMOE_REC_LOCK=cuda ./tools/run doctor installs for it."
        )
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        notes.append(
            "OMP_WAIT_POLICY is not PASSIVE; on a shared machine that can cost a factor of ten (tools/run sets it)."
        )
    return tuple(notes)


def _row(installed: Mapping[str, Installed]) -> str:
    """torch's minor version where torchrec and one build of fbgemm go with it, else an empty string."""
    builds = [name for name in FBGEMM if _has_code(installed, name)]
    if not builds or _builds(installed, "") or "torch" not in installed or "torchrec" not in installed:
        return ""
    torch = _minor(installed["torch"].version)
    others = {_minor(installed[name].version) for name in ("torchrec", *builds)}
    return torch if others == {KNOWN_GOOD.get(torch)} else ""


def _remedy(installed: Mapping[str, Installed], has_gpu: bool | None) -> str:
    """The commands that make a supported triple of what is installed: torch stays where it is in a row.

    The CPU build of fbgemm goes with every build of torch, the CUDA build only with torch's CUDA build and a driver.
    torchrec is installed without its requirements, since these name the CUDA build.

    Args:
        has_gpu: None where torch does not load, so that nobody knows: then the build that is there stays.
    """
    torch = installed["torch"].version if "torch" in installed else ""
    row = _minor(torch) if _minor(torch) in KNOWN_GOOD else NEWEST
    keeps_cuda = has_gpu is None and _has_code(installed, "fbgemm-gpu") and "+cpu" not in torch
    wheel = "fbgemm-gpu" if has_gpu or keeps_cuda else "fbgemm-gpu-cpu"
    commands = []
    if any(_has_code(installed, name) for name in FBGEMM if name != wheel):
        commands.append("pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu")
    if _minor(torch) != row:
        commands.append(f"pip install 'torch=={row}.*'")
    again = "--force-reinstall " if _has_code(installed, wheel) else ""
    commands.append(f"pip install --no-deps {again}'torchrec=={KNOWN_GOOD[row]}.*' '{wheel}=={KNOWN_GOOD[row]}.*'")
    return " && ".join(commands)


def _missing(installed: Mapping[str, Installed], remedy: str) -> list[str]:
    missing = [name for name in ("torch", "torchrec") if name not in installed]
    if not any(_has_code(installed, name) for name in FBGEMM):
        missing.append("fbgemm")
    problems = [f"{' and '.join(missing)}: not installed; run {remedy}"] if missing else []
    if "torchx" not in installed:
        problems.append("torchx: not installed; run pip install 'torchx>=0.7'")
    return problems


def _builds(installed: Mapping[str, Installed], remedy: str) -> list[str]:
    """Builds of fbgemm that stand in each other's way or in torch's."""
    if all(_has_code(installed, name) for name in FBGEMM):
        return [
            f"Both fbgemm-gpu and fbgemm-gpu-cpu are installed and have overwritten each other's files; run {remedy}"
        ]
    torch = installed["torch"].version if "torch" in installed else ""
    if _has_code(installed, "fbgemm-gpu") and "+cpu" in torch:
        return [f"fbgemm-gpu is the CUDA build and cannot load beside torch {torch}, the CPU build; run {remedy}"]
    return []


def _mismatches(installed: Mapping[str, Installed], remedy: str) -> list[str]:
    if "torch" not in installed:
        return []
    torch_version = installed["torch"].version
    expected = KNOWN_GOOD.get(_minor(torch_version))
    if expected is None:
        known = ", ".join(KNOWN_GOOD)
        return [f"torch {torch_version} is in no row that was tried ({known}); run {remedy}"]
    wrong = [
        f"{name} {installed[name].version}"
        for name in ("torchrec", *FBGEMM)
        if _has_code(installed, name) and _minor(installed[name].version) != expected
    ]
    if not wrong:
        return []
    return [
        f"torch {torch_version} goes with torchrec {expected}.x and fbgemm {expected}.x, but here are "
        f"{' and '.join(wrong)}; run {remedy}"
    ]


def _why_not(installed: Mapping[str, Installed], has_gpu: bool | None) -> str:
    if _has_code(installed, "fbgemm-gpu") and not has_gpu:
        return "the CUDA build needs NVIDIA's driver, also to be imported, and no GPU is visible here"
    return "its files were made for another torch, or another build was installed over them"


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


def _first_line(exception: BaseException) -> str:
    text = (str(exception).strip() or "no message").splitlines()[0]
    cause = f", {_first_line(exception.__cause__)}" if exception.__cause__ else ""
    return f"{type(exception).__name__}: {text}{cause}"


def _public(version: str) -> str:
    """2.13.0+cpu -> 2.13.0"""
    return version.split("+")[0]


def _minor(version: str) -> str:
    """2.13.0+cpu -> 2.13"""
    return ".".join(_public(version).split(".")[:2])
