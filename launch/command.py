"""Nodes, processes and a program -> one torchx role that starts it with torchrun on every node."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchx import specs

ENV = {
    # A restarted worker otherwise finds the keys of the attempt before it in the rendezvous' store.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Layout:
    """How many nodes (at least, at most) and how many processes on each."""

    min_nodes: int
    nodes: int
    processes_per_node: int

    @property
    def nodes_text(self) -> str:
        """What torchrun's --nnodes takes."""
        return str(self.nodes) if self.min_nodes == self.nodes else f"{self.min_nodes}:{self.nodes}"


def parse_layout(j: str, num_gpus: int) -> Layout:
    """`2x8` -> 2 nodes with 8 processes; `1:2x8` -> 1 or 2 nodes; `2` -> one process per GPU of the host (else one).

    Raises:
        ValueError: another form, a zero, a minimum above the maximum, or more processes than the host has GPUs.
    """
    match = re.fullmatch(r"(?:(\d+):)?(\d+)(?:x(\d+))?", j)
    if not match:
        raise ValueError(f"-j {j}: expected [MIN_NODES:]NODES[xPROCESSES], for instance 2x8")
    nodes = int(match[2])
    min_nodes = int(match[1]) if match[1] else nodes
    processes = int(match[3]) if match[3] else max(1, num_gpus)
    if not 1 <= min_nodes <= nodes or processes < 1:
        raise ValueError(f"-j {j}: need 1 <= MIN_NODES <= NODES and at least one process")
    if num_gpus and processes > num_gpus:
        raise ValueError(f"-j {j}: {processes} processes on a host with {num_gpus} GPUs; give at most one per GPU")
    return Layout(min_nodes, nodes, processes)


def split_overrides(text: str) -> list[str]:
    """`a=1,b=[2,3]` -> `a=1` and `b=[2,3]`: cut at commas outside of brackets, braces and quotes.

    Raises:
        ValueError: unbalanced brackets or quotes, or a piece that is not key=value.
    """
    pieces, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            pieces.append("")
        else:
            pieces[-1] += character
    if depth or quote:
        raise ValueError(f"--overrides {text}: a bracket or a quote is not closed")
    overrides = [piece.strip() for piece in pieces if piece.strip()]
    for override in overrides:
        if not re.match(r"[^\s=]+=", override):
            raise ValueError(
                f"--overrides: {override!r} is not key=value; a value with commas goes in brackets: data.train=[a,b]"
            )
    return overrides


def allowed(packages: str) -> list[str]:
    """`a,b` -> `--allow a --allow b`."""
    return [word for name in packages.split(",") if name.strip() for word in ("--allow", name.strip())]


def torchrun_role(
    name: str,
    program: Sequence[str],
    *,
    j: str,
    h: str,
    image: str,
    max_restarts: int,
    max_retries: int,
    mounts: Sequence[str],
    env: Mapping[str, str],
    rdzv_port: int,
) -> specs.Role:
    """One role whose replicas are nodes; torchrun starts and, after a failure, restarts the processes of all of them.

    Args:
        name: of the role; it prefixes the lines of the log.
        program: what follows `-m` on torchrun's command line.
        j: see `parse_layout`.
        h: a named resource; it gives the scheduler its request and the layout its number of GPUs.
        max_restarts: times torchrun starts the processes again, inside the job.
        max_retries: times the scheduler starts the whole job again, after a node was lost for instance.
        mounts: torchx's words, such as ["type=bind", "src=/mnt/logs", "dst=/data", "readonly"].
        env: added to, and stronger than, `ENV`.
        rdzv_port: where node 0 answers the others; unused on one node.
    """
    resource = specs.resource(h=h)
    layout = parse_layout(j, resource.gpu)
    # "$$" is a "$" that torchx hands on; the shell on the node then finds the first node's name. AWS Batch tells it to
    # every node but the first itself, hence the default.
    endpoint = "localhost:0" if layout.nodes == 1 else f"$${{{specs.macros.rank0_env}:=localhost}}:{rdzv_port}"
    torchrun = [
        *("exec", "python", "-m", "torch.distributed.run"),
        *("--nnodes", layout.nodes_text, "--nproc-per-node", str(layout.processes_per_node)),
        *("--max-restarts", str(max_restarts)),
        *("--rdzv-backend", "c10d", "--rdzv-id", specs.macros.app_id, "--rdzv-endpoint", endpoint),
        *("--tee", "3", "--role", name),
    ]
    command = " ".join(torchrun) + " -m " + shlex.join(program).replace("$", "$$")
    return specs.Role(
        name=name,
        image=image,
        entrypoint="bash",
        args=["-c", command],
        env={**ENV, **env},
        num_replicas=layout.nodes,
        min_replicas=layout.min_nodes if layout.min_nodes < layout.nodes else None,
        max_retries=max_retries,
        resource=resource,
        port_map={"c10d": rdzv_port},
        mounts=specs.parse_mounts(list(mounts)) if mounts else [],
    )
