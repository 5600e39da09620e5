"""The jobs: `torchx run -s SCHEDULER hmoe.train ...`, or `launch/components.py:train` instead of `hmoe.train`.

torchx lists every function of this file as a component, reads its docstring for --help, and understands only
Optional[...], Dict[...] and List[...] in signatures: helpers live in launch/command.py.
"""

from typing import Dict, List, Optional

import torchx.specs as specs

from launch import command


def train(
    config: str,
    overrides: str = "",
    resume: bool = True,
    j: str = "1x2",
    h: str = "cpu2",
    image: str = "hmoe-rec:latest",
    name: str = "hmoe-train",
    max_restarts: int = 3,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
    env: Optional[Dict[str, str]] = None,
    allow: str = "",
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Trains the model of a run file on one or many nodes.

    Args:
        config: run file (YAML), as the job's working directory or image sees it
        overrides: changes to it, key.path=value,key.path=value; commas inside [...], {...} or quotes do not separate
        resume: go on from the newest checkpoint in train.run_dir, if there is one; restarts and retries need it
        j: [MIN_NODES:]NODES[xPROCESSES], for instance 2x8; without x, one process per GPU of the host
        h: kind of host: cpu2, cpu16, a100x8, h100x8, h200x8, or a named resource of torchx
        image: container with this package and its configs (local_cwd and slurm use the current environment instead)
        name: name of the job
        max_restarts: times the processes are started again after one of them failed, inside the job
        max_retries: times the scheduler starts the whole job again
        mounts: for containers, type=bind,src=/host/path,dst=/path[,readonly]
        env: more environment variables, KEY=value,KEY=value
        allow: packages whose parts may be run, with commas between them, as --allow of the program; installed there
        rdzv_port: port on the first node through which several nodes find each other
    """
    program = ["hmoe_rec", "train", config, *command.split_overrides(overrides), *command.allowed(allow)]
    if resume:
        program.append("--resume")
    role = command.torchrun_role(
        "trainer",
        program,
        j=j,
        h=h,
        image=image,
        max_restarts=max_restarts,
        max_retries=max_retries,
        mounts=mounts or [],
        env=env or {},
        rdzv_port=rdzv_port,
    )
    return specs.AppDef(name=name, roles=[role])


def evaluate(
    run: str,
    data: str,
    j: str = "1x1",
    h: str = "cpu2",
    image: str = "hmoe-rec:latest",
    name: str = "hmoe-evaluate",
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
    env: Optional[Dict[str, str]] = None,
    allow: str = "",
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Computes the metrics of a trained run on some data.

    Args:
        run: run directory (path or URI) that training wrote
        data: Parquet file, directory, glob or URI
        j: [MIN_NODES:]NODES[xPROCESSES]; it need not be the layout that trained
        h: kind of host: cpu2, cpu16, a100x8, h100x8, h200x8, or a named resource of torchx
        image: container with this package (local_cwd and slurm use the current environment instead)
        name: name of the job
        max_retries: times the scheduler starts the whole job again
        mounts: for containers, type=bind,src=/host/path,dst=/path[,readonly]
        env: more environment variables, KEY=value,KEY=value
        allow: packages whose parts may be run, with commas between them, as --allow of the program; installed there
        rdzv_port: port on the first node through which several nodes find each other
    """
    role = command.torchrun_role(
        "evaluator",
        ["hmoe_rec", "evaluate", run, "--data", data, *command.allowed(allow)],
        j=j,
        h=h,
        image=image,
        max_restarts=0,
        max_retries=max_retries,
        mounts=mounts or [],
        env=env or {},
        rdzv_port=rdzv_port,
    )
    return specs.AppDef(name=name, roles=[role])
