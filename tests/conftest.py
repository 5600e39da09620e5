"""What every test gets: seeds, one thread, quiet libraries; and for those that ask, the folder with the real logs."""

import itertools
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from object_store import ObjectStore

# Before torch is imported, here and in every process that a test starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
# Device "auto" is the CPU in tests, also in processes that they start: a machine with a GPU runs the same ones.
os.environ["HMOE_REC_DEVICE"] = "cpu"

ROOT = Path(__file__).resolve().parents[1]
DATA_REQUIRED = os.environ.get("HMOE_REC_REQUIRE_DATA", "") == "1"

for _name in ("torchrec", "torch.fx._symbolic_trace"):
    logging.getLogger(_name).setLevel(logging.ERROR)


_NUMBERS = itertools.count()
LONG = ("test_readme.py", "test_readme_real_logs.py", "test_online.py", "test_trainer.py", "test_checkpoint_tools.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process ends late; tests marked `gpu` are skipped where there is none."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """With HMOE_REC_REQUIRE_DATA=1 a test marked `data` may not skip."""
    report = yield
    if DATA_REQUIRED and report.skipped and item.get_closest_marker("data") and not hasattr(report, "wasxfail"):
        reason = call.excinfo.value if call.excinfo else "no reason given"
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped ({reason}), although HMOE_REC_REQUIRE_DATA=1"
    return report


@pytest.fixture(autouse=True)
def seeds() -> Iterator[None]:
    """The same random numbers in every test, whatever ran before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What device "auto" is: the CPU, or the GPU in tests marked `gpu`."""
    name = "cuda" if request.node.get_closest_marker("gpu") else "cpu"
    monkeypatch.setenv("HMOE_REC_DEVICE", name)
    return name


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real logs: $HMOE_REC_DATA, or ../shared/data beside the repository."""
    given = os.environ.get("HMOE_REC_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real logs: {folder} is not a folder (set HMOE_REC_DATA)")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def object_store() -> Iterator["ObjectStore"]:
    pytest.importorskip("moto", reason="moto[server] is not installed")

    from object_store import ObjectStore

    store = ObjectStore()
    store.start()
    yield store
    store.stop()


@pytest.fixture
def bucket(object_store: "ObjectStore", monkeypatch: pytest.MonkeyPatch) -> Iterator["ObjectStore"]:
    """A bucket on an S3 server of the tests; a process that is started finds both by its environment."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    object_store.make_bucket(f"bucket-{next(_NUMBERS)}")
    yield object_store
    object_store.heal()
    object_store.requests.clear()
    s3fs.S3FileSystem.clear_instance_cache()
