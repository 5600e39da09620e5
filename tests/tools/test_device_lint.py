"""tools/device_lint sees what a GPU would refuse or wait for, and lets a clean run pass."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build, with CUDA hooks of its own"),
]
LINES: dict[str, list[str]] = {
    "(x * 2).sum().backward()": [],
    "x * torch.ones(4)": ["MIX mul"],
    "x * torch.tensor(2.0)": [],  # a number, which CUDA takes
    "torch.stack([x[0], torch.ones(4)])": ["MIX stack"],
    "x.sum().item()": ["SYNC _local_scalar_dense"],
    "x[x > 0]": ["SYNC index by a mask"],
    "x[torch.tensor([0, 2])]": ["H2D* index by a list or a CPU tensor"],
    "torch.rand(5, device='cuda', generator=torch.Generator())": ["GENERATOR rand"],
    "x.detach().cpu()": ["D2H _to_copy"],
    "torch.ones(3).to('cuda')": ["H2D* _to_copy"],
    "torch.ones(3).to('cuda', non_blocking=True)": ["H2D _to_copy"],
    "torch.ones(3).pin_memory().to('cuda', non_blocking=True)": ["h2d _to_copy pinned"],
    "torch.arange(6, device='cuda').repeat_interleave(2, output_size=12)": [],
    "torch.arange(3, device='cuda').repeat_interleave(torch.ones(3, dtype=int, device='cuda'))": [
        "SYNC repeat_interleave without output_size"
    ],
}
SNIPPET = f"""
import pretend
import json, torch, fake_cuda
from recorder import Recorder
fake_cuda.patch_cuda()
seen = {{}}
for line in {list(LINES)}:
    recorder = Recorder()
    with pretend.Recording(recorder):
        x = torch.randn(5, 4, device="cuda", requires_grad=True)
        exec(line)
    seen[line] = sorted(e.kind + " " + e.op for e in recorder.events)
print(json.dumps(seen))
"""


def lint(root: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    folder = root / "tools" / "device_lint"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "DEVICE_LINT_OUT": str(tmp_path)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=root)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device_lint")  # one build of the guard for all


@pytest.fixture(scope="module")
def events(root: Path, scratch: Path) -> dict[str, list[str]]:
    """Line -> what the lint saw in it."""
    result = lint(root, scratch, "-c", SNIPPET)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("line", LINES)
def test_events_of_one_line(events: dict[str, list[str]], line: str) -> None:
    assert events[line] == LINES[line]


@pytest.mark.slow
def test_a_run_on_a_pretended_gpu_is_clean_and_a_new_wait_fails(root: Path, scratch: Path, tmp_path: Path) -> None:
    clean = lint(root, scratch, "tools/device_lint/run.py", "--only", "preset mmoe")
    assert clean.returncode == 0, clean.stdout + clean.stderr[-2000:]
    copy = tmp_path / "tree"
    for part in ("hmoe_rec", "tests", "tools/device_lint"):
        shutil.copytree(root / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "hmoe_rec" / "layers.py").write_text(
        (copy / "hmoe_rec" / "layers.py").read_text() + "\n\n_call = nn.Linear.forward\n\n\ndef _waiting(self, x):\n"
        "    x.sum().item()\n    return _call(self, x)\n\n\nnn.Linear.forward = _waiting\n"
    )
    slower = lint(copy, scratch, "tools/device_lint/run.py", "--only", "preset mmoe")
    assert slower.returncode == 1
    assert "SYNC _local_scalar_dense in step @ hmoe_rec/layers.py _waiting" in slower.stdout
