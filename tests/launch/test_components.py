"""The jobs that torchx makes of our components: their text for clusters, and one real run on two local processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from torchx.components.component_test_base import ComponentTestCase

from launch import components

CLUSTER = """--config configs/cluster_example.yaml -j 2x8 -h h100x8 --image repo/hmoe:1
    --max_retries 2 --max_restarts 5 --allow my_parts
    --mounts type=bind,src=/mnt/logs,dst=/data,readonly --env NCCL_DEBUG=WARN,A=b
    --overrides train.run_dir=s3://bucket/run,model.expert.hidden=[256,128]"""
TORCHRUN = "python -m torch.distributed.run --nnodes 2 --nproc-per-node 8 --max-restarts 5 --rdzv-backend c10d"
PROGRAM = (
    "-m hmoe_rec train configs/cluster_example.yaml "
    "train.run_dir=s3://bucket/run 'model.expert.hidden=[256,128]' --allow my_parts --resume"
)


def torchx_run(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`torchx run` in a process of its own, as its command line keeps state, with our `python` first on the PATH."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "torchx.cli.main", "run", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)


def dry_run(root: Path, scheduler: str, component: str = "launch/components.py:train") -> str:
    """The request that the scheduler would get."""
    done = torchx_run(root, "--dryrun", "-s", scheduler, component, *CLUSTER.split())
    assert done.returncode == 0, done.stderr
    return done.stdout.split("=== SCHEDULER REQUEST ===")[1]


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_torchx_accepts_the_component(name):
    ComponentTestCase().validate(components, name)


@pytest.mark.parametrize("component", ["launch/components.py:train", "hmoe.train"])
def test_slurm(component, root):
    text = dry_run(root, "slurm", component)
    nodes = [line for line in text.splitlines() if line.startswith("#SBATCH --job-name=trainer-")]
    assert len(nodes) == 2
    for node in nodes:
        for option in ("--gpus-per-task=8", "--ntasks-per-node=1", "--cpus-per-task=88", "--mem=1600000", "--requeue"):
            assert option in node
    assert "export TORCHX_MAX_RETRIES=2" in text and 'scontrol requeue "$SLURM_JOB_ID"' in text
    plain = text.replace("'\"'\"'", "'")  # the quotes of a quoted command
    assert plain.count(TORCHRUN + " --rdzv-id '\"$SLURM_JOB_ID\"'") == 2
    assert plain.count("--rdzv-endpoint ${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29500") == 2
    assert plain.count(PROGRAM) == 2
    for variable in ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "OMP_WAIT_POLICY=PASSIVE", "NCCL_DEBUG=WARN", "A=b"):
        assert text.count(variable) == 2


def test_kubernetes(root):
    job = yaml.safe_load(dry_run(root, "kubernetes"))["spec"]
    assert job["maxRetry"] == 2
    tasks = job["tasks"]
    assert [task["name"] for task in tasks] == ["trainer-0", "trainer-1"]
    assert {"action": "RestartJob", "event": "PodFailed"} in tasks[1]["policies"]
    for task, endpoint in zip(tasks, ("${TORCHX_RANK0_HOST:=", "${VC_TRAINER_0_HOSTS:="), strict=True):
        (container,) = task["template"]["spec"]["containers"]
        assert container["image"] == "repo/hmoe:1"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        assert container["ports"] == [{"containerPort": 29500, "name": "c10d"}]
        assert {"mountPath": "/data", "name": "mount-0", "readOnly": True} in container["volumeMounts"]
        assert {"hostPath": {"path": "/mnt/logs"}, "name": "mount-0"} in task["template"]["spec"]["volumes"]
        assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]
        assert {"name": "NCCL_DEBUG", "value": "WARN"} in container["env"]
        command = container["command"][-1]
        assert TORCHRUN in command and PROGRAM in command
        assert f"--rdzv-endpoint {endpoint}localhost}}:29500" in command


def test_aws_batch(root):
    job = yaml.safe_load(dry_run(root, "aws_batch"))["job_def"]
    assert job["type"] == "multinode" and job["nodeProperties"]["numNodes"] == 2
    assert job["retryStrategy"]["attempts"] == 2
    (nodes,) = job["nodeProperties"]["nodeRangeProperties"]
    assert nodes["targetNodes"] == "0:1"
    container = nodes["container"]
    assert container["image"] == "repo/hmoe:1"
    assert {"type": "GPU", "value": "8"} in container["resourceRequirements"]
    assert {"containerPath": "/data", "readOnly": True, "sourceVolume": "mount_0"} in container["mountPoints"]
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["environment"]
    command = container["command"][-1]
    assert TORCHRUN in command and PROGRAM in command
    assert "--rdzv-endpoint ${AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS:=localhost}:29500" in command


def test_builtin_components_are_still_there(root):
    assert "hello" in torchx_run(root, "--dryrun", "-s", "local_cwd", "utils.echo", "--msg", "hello").stdout


def test_evaluate_runs_the_program_on_the_data():
    (role,) = components.evaluate("runs/x", "s3://b/day=4", j="1x4", h="h100x8").roles
    assert role.args[1].endswith("-m hmoe_rec evaluate runs/x --data s3://b/day=4")
    assert "--max-restarts 0 " in role.args[1]


def workers_of(run_dir: Path) -> list[int]:
    """Process ids of the training processes (not of torchx and torchrun, which carry the same words)."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_text().split("\0") if entry.name.isdigit() else []
        except OSError:  # it ended while we looked
            continue
        if "hmoe_rec" in words and f"train.run_dir={run_dir}" in words and "torch.distributed.run" not in words:
            found.append(int(entry.name))
    return found


def kill_a_worker_after_a_checkpoint(run_dir: Path, patience_seconds: float = 240) -> None:
    deadline = time.monotonic() + patience_seconds
    while not list(run_dir.glob("checkpoints/step_*")):
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)
    os.kill(max(workers_of(run_dir)), signal.SIGKILL)


@pytest.mark.slow
def test_two_local_processes_train_and_outlive_a_killed_one(tmp_path, root):
    run_dir = tmp_path / "run"
    overrides = {
        "train.run_dir": run_dir,
        "train.max_steps": 100,
        "train.log_every": 10,
        "train.checkpoint_every": 20,
        "train.global_batch_size": 64,
        "data.synthetic.rows": 16000,
        "data.synthetic.validation_rows": 1000,
        "data.synthetic.test_rows": 1000,
        "data.synthetic.dir": tmp_path / "synthetic",
    }
    text = ",".join(f"{key}={value}" for key, value in overrides.items())
    job = ["-s", "local_cwd", "-cfg", f"log_dir={tmp_path / 'log'}", "launch/components.py:train"]
    killer = threading.Thread(target=kill_a_worker_after_a_checkpoint, args=[run_dir], daemon=True)
    killer.start()
    done = torchx_run(root, *job, "--config", "configs/quickstart.yaml", "-j", "1x2", "--overrides", text)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resumed at step" in done.stdout + done.stderr
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 100
    assert json.loads((run_dir / "report.json").read_text())["test"]


@pytest.mark.slow
def test_a_failing_job_says_so(tmp_path, root):
    job = ["-s", "local_cwd", "-cfg", f"log_dir={tmp_path / 'log'}", "launch/components.py:train"]
    done = torchx_run(root, *job, "--config", str(tmp_path / "absent.yaml"), "-j", "1x1", "--max_restarts", "0")
    assert done.returncode == 1
    assert "absent.yaml" in done.stdout + done.stderr
