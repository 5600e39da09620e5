import importlib

import pytest

from hmoe_rec import doctor
from hmoe_rec.doctor import Installed, diagnose, print_report

STAND_IN = Installed("1.8.0", has_code=False)


def packages(torch="2.13.0+cpu", torchrec="1.8.0", cpu="1.8.0", gpu=STAND_IN):
    found = {"torch": torch, "torchrec": torchrec, "fbgemm-gpu-cpu": cpu, "torchx": "0.7.0"}
    found = {name: Installed(version) for name, version in found.items() if version}
    return found | ({"fbgemm-gpu": gpu} if gpu else {})


def test_this_installation_is_sound():
    report = diagnose()
    assert report.ok, report.problems
    assert report.fbgemm_loads
    assert report.devices[0].startswith("cpu")


@pytest.mark.parametrize(("torch", "other"), doctor.KNOWN_GOOD.items())
def test_every_row_of_the_matrix_is_accepted(torch, other):
    report = diagnose(packages(f"{torch}.1", f"{other}.0", f"{other}.0"))
    assert report.ok, report.problems


def test_the_stand_in_for_fbgemm_gpu_is_no_second_fbgemm():
    assert diagnose(packages()).ok
    assert diagnose(packages(gpu=None)).ok


def test_both_fbgemm_wheels_are_explained():
    (problem,) = diagnose(packages(gpu=Installed("1.8.0"))).problems
    assert "Both fbgemm-gpu and fbgemm-gpu-cpu" in problem
    assert "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu" in problem


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"torch": "2.12.1"}, ["torch 2.12.1 goes with torchrec 1.7.x", "torchrec 1.8.0 and fbgemm-gpu-cpu 1.8.0"]),
        ({"torchrec": "1.7.0"}, ["torch 2.13.0+cpu goes with torchrec 1.8.x", "torchrec 1.7.0;"]),
        ({"torch": "2.9.0"}, ["torch 2.9.0 is outside", "2.11, 2.12, 2.13"]),
        ({"torchrec": None}, ["torchrec is not installed"]),
        ({"cpu": None}, ["fbgemm-gpu-cpu (or fbgemm-gpu on a GPU machine) is not installed"]),
    ],
)
def test_mismatches_are_explained(given, said):
    (problem,) = diagnose(packages(**given)).problems
    for words in said:
        assert words in problem


@pytest.mark.parametrize("broken", ["torch", "fbgemm_gpu"])
def test_a_broken_library_is_reported_and_not_raised(broken, capsys):
    def import_module(name):
        if name == broken:
            raise OSError(f"Could not load this library: {broken}.so\nmore")
        return importlib.import_module(name)

    report = diagnose(packages(), import_module)
    assert not report.ok and not report.fbgemm_loads
    assert f"OSError: Could not load this library: {broken}.so)" in report.problems[0]
    assert print_report(report) == 1
    assert "PROBLEM" in capsys.readouterr().out


def test_the_report_shows_versions_and_the_matrix(capsys):
    assert print_report(diagnose(packages())) == 0
    out = capsys.readouterr().out
    for words in ("2.13.0+cpu", "1.8.0 (stand-in)", "<- yours", "All good."):
        assert words in out
