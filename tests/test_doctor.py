import importlib

import pytest

from hmoe_rec import doctor
from hmoe_rec.doctor import Installed, diagnose, print_report

STAND_IN = Installed("1.9.0", has_code=False)
CPU, GPU = ("cpu (2 cores)",), ("cpu (2 cores)", "cuda:0 (NVIDIA H200)")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without a GPU, whatever this one has; call it with `GPU` for one that has."""

    def become(devices):
        monkeypatch.setattr(doctor, "_hardware", lambda: (devices, "1 in torch"))

    become(CPU)
    return become


def packages(torch="2.13.0+cpu", torchrec="1.8.0", cpu="1.8.0", gpu=STAND_IN):
    gpu = Installed(gpu) if isinstance(gpu, str) else gpu
    found = {"torch": torch, "torchrec": torchrec, "fbgemm-gpu-cpu": cpu, "torchx": "0.7.0"}
    found = {name: Installed(version) for name, version in found.items() if version}
    return found | ({"fbgemm-gpu": gpu} if gpu else {})


def no_fbgemm(name):
    """Imports as on a machine without NVIDIA's driver."""
    if name == "fbgemm_gpu":
        raise OSError("Could not load this library: fbgemm_gpu_py.so") from OSError("libnvidia-ml.so.1: not found")
    return importlib.import_module(name)


def test_this_installation_is_sound(monkeypatch):
    monkeypatch.undo()  # the real devices
    report = diagnose()
    assert report.ok, report.problems
    assert report.fbgemm_loads and report.row in doctor.KNOWN_GOOD
    assert report.devices[0].startswith("cpu")


@pytest.mark.parametrize("local", ["", "+cpu", "+cu130"])
@pytest.mark.parametrize(("torch", "other"), doctor.KNOWN_GOOD.items())
def test_every_row_of_the_table_is_accepted(torch, other, local):
    report = diagnose(packages(f"{torch}.1{local}", f"{other}.1", f"{other}.0"))
    assert report.ok and report.row == torch, report.problems


def test_the_rows_are_those_whose_wheels_belong_together():
    assert doctor.KNOWN_GOOD == {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8", "2.14": "1.9"}
    assert doctor.NEWEST == "2.14"


def test_a_lent_gpu_has_the_oldest_row(machine):
    machine(GPU)
    report = diagnose(packages("2.11.0+cu130", "1.6.1", None, "1.6.0"))
    assert report.ok and report.row == "2.11", report.problems


def test_the_stand_in_for_fbgemm_gpu_is_no_second_fbgemm():
    assert diagnose(packages()).ok
    assert diagnose(packages(gpu=None)).ok


INSTALL_18 = "pip install --no-deps 'torchrec==1.8.*' 'fbgemm-gpu-cpu==1.8.*'"
AGAIN_18 = INSTALL_18.replace("--no-deps", "--no-deps --force-reinstall")
UNINSTALL = "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && "


@pytest.mark.parametrize(
    ("installed", "said", "remedy"),
    [
        # What pip made of an unpinned wheel: torchrec before fbgemm.
        (
            {"torch": "2.13.0", "cpu": None, "gpu": "1.9.0"},
            "torch 2.13.0 goes with torchrec 1.8.x and fbgemm 1.8.x, but here are fbgemm-gpu 1.9.0;",
            UNINSTALL + INSTALL_18,
        ),
        (
            {"torch": "2.12.1+cpu"},
            "torchrec 1.7.x and fbgemm 1.7.x, but here are torchrec 1.8.0 and fbgemm-gpu-cpu 1.8.0;",
            AGAIN_18.replace("1.8", "1.7"),
        ),
        (
            {"torchrec": "1.6.1"},
            "but here are torchrec 1.6.1;",
            AGAIN_18,
        ),
        (
            {"torch": "2.11.0+cu130", "torchrec": "1.6.1", "cpu": "1.6.0", "gpu": "1.6.0"},
            "Both fbgemm-gpu and fbgemm-gpu-cpu",
            UNINSTALL + AGAIN_18.replace("1.8", "1.6"),
        ),
        ({"cpu": None, "gpu": "1.8.0"}, "fbgemm-gpu is the CUDA build", UNINSTALL + INSTALL_18),
        (
            {"torch": "2.15.0"},
            "torch 2.15.0 is in no row that was tried (2.11, 2.12, 2.13, 2.14);",
            "pip install 'torch==2.14.*' && " + AGAIN_18.replace("1.8", "1.9"),
        ),
        ({"torchrec": None}, "torchrec: not installed;", AGAIN_18),
        ({"cpu": None}, "fbgemm: not installed;", INSTALL_18),
        ({"cpu": None, "gpu": None, "torchrec": None}, "torchrec and fbgemm: not installed;", INSTALL_18),
        (
            {"torch": None, "torchrec": None, "cpu": None, "gpu": None},
            "torch and torchrec and fbgemm: not installed;",
            "pip install 'torch==2.14.*' && " + INSTALL_18.replace("1.8", "1.9"),
        ),
    ],
)
def test_what_is_in_no_row_is_explained_with_the_commands_that_mend_it(installed, said, remedy):
    report = diagnose(packages(**installed))
    (problem,) = report.problems
    assert said in problem and problem.endswith(f"; run {remedy}")
    assert report.row == ""


@pytest.mark.parametrize(
    ("installed", "said", "remedy"),
    [
        (
            {"torch": "2.11.0+cu130", "torchrec": "1.9.2", "cpu": None, "gpu": "1.6.0"},
            "but here are torchrec 1.9.2;",
            "pip install --no-deps --force-reinstall 'torchrec==1.6.*' 'fbgemm-gpu==1.6.*'",
        ),
        (
            {"torch": "2.14.1", "torchrec": "1.9.2", "cpu": "1.9.0", "gpu": "1.9.0"},
            "Both fbgemm-gpu and fbgemm-gpu-cpu",
            UNINSTALL + "pip install --no-deps --force-reinstall 'torchrec==1.9.*' 'fbgemm-gpu==1.9.*'",
        ),
        ({"torch": "2.13.0", "cpu": None, "gpu": None}, "fbgemm:", INSTALL_18.replace("gpu-cpu", "gpu")),
    ],
)
def test_where_there_is_a_gpu_the_cuda_build_is_installed(machine, installed, said, remedy):
    machine(GPU)
    (problem,) = diagnose(packages(**installed)).problems
    assert said in problem and problem.endswith(f"; run {remedy}")


def test_the_cuda_build_without_a_driver_is_explained():
    report = diagnose(packages("2.14.1", "1.9.2", None, "1.9.0"), no_fbgemm)
    (problem,) = report.problems
    assert "libnvidia-ml.so.1" in problem and "needs NVIDIA's driver" in problem
    assert problem.endswith(UNINSTALL + INSTALL_18.replace("1.8", "1.9"))
    assert report.row == "2.14" and not report.fbgemm_loads


def test_torchx_alone_is_asked_for_alone():
    installed = packages()
    del installed["torchx"]
    assert diagnose(installed).problems == ("torchx: not installed; run pip install 'torchx>=0.7'",)


@pytest.mark.parametrize(
    ("broken", "remedy"), [("torch", "--force-reinstall 'torch==2.13.0'"), ("fbgemm_gpu", f"run {AGAIN_18}")]
)
def test_a_broken_library_is_reported_and_not_raised(broken, remedy, capsys):
    def import_module(name):
        if name == broken:
            raise OSError(f"Could not load this library: {broken}.so\nmore")
        return importlib.import_module(name)

    report = diagnose(packages(), import_module)
    assert not report.ok and not report.fbgemm_loads
    (problem,) = report.problems
    assert f"OSError: Could not load this library: {broken}.so)" in problem and problem.endswith(remedy)
    assert print_report(report) == 1
    assert "PROBLEM" in capsys.readouterr().out


def test_a_broken_torch_leaves_the_build_of_fbgemm_as_it_is():
    def import_module(name):
        raise OSError("libcudnn.so.9: cannot open shared object file")

    problems = diagnose(packages("2.13.0", "1.7.0", None, "1.8.0"), import_module).problems
    assert len(problems) == 2 and problems[0].endswith(AGAIN_18.replace("gpu-cpu", "gpu"))


def test_the_report_shows_versions_and_the_row(capsys):
    assert print_report(diagnose(packages())) == 0
    out = capsys.readouterr().out
    for words in ("2.13.0+cpu", "1.9.0 (stand-in)", "All good."):
        assert words in out
    (yours,) = (line for line in out.splitlines() if "<- yours" in line)
    assert "2.13" in yours and "1.8" in yours


def test_no_row_is_called_yours_where_the_triple_is_a_mix(capsys):
    assert print_report(diagnose(packages(torchrec="1.7.0"))) == 1
    assert "<- yours" not in capsys.readouterr().out
