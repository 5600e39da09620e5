"""A function -> the same function in N processes that form a gloo group, for tests of what is distributed.

def sum_of_ranks(rank, world_size, term): ...          # at module level
results = run_ranks(2, sum_of_ranks, 5)                # one result per rank, in order
"""

import importlib.util
import logging
import multiprocessing
import os
import pickle
import queue
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed.checkpoint",
    "torchrec",
    "torchrec.distributed.model_parallel",
    "torchrec.distributed.planner",
    "hmoe_rec.training.online",
]


class RankError(AssertionError):
    """A rank failed; the message holds its number and traceback."""


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, local_world_size: int | None = None, timeout: float = 180.0
) -> list[Any]:
    """Runs fn(rank, world_size, *args) in fresh processes; -> their results in the order of ranks.

    Processes are forked from a server that has imported TorchRec once, so that a call costs less than a second.

    Args:
        fn: a function at module level.
        local_world_size: ranks per pretended machine.
        timeout: seconds for all.

    Raises:
        RankError: a rank raised, died or ran out of time; the others are stopped.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.Queue()
    where = (fn.__module__, fn.__code__.co_filename, fn.__qualname__)
    with tempfile.TemporaryDirectory(prefix="gloo_") as directory:
        payload = pickle.dumps(args)
        processes = [
            context.Process(
                target=_rank_main,
                args=(
                    rank,
                    world_size,
                    local_world_size or world_size,
                    f"{directory}/store",
                    where,
                    payload,
                    results,
                    timeout,
                    sys.path,
                ),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(processes: list, results: Any, timeout: float) -> list[Any]:
    values: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(values) < len(processes):
        try:
            rank, value, error = results.get(timeout=0.2)
        except queue.Empty:
            for rank, process in enumerate(processes):
                if process.exitcode is not None and rank not in values and results.empty():
                    raise RankError(f"rank {rank} died with exit code {process.exitcode}") from None
            if time.monotonic() > deadline:
                raise RankError(
                    f"no result from ranks {sorted(set(range(len(processes))) - set(values))} in {timeout} s"
                ) from None
            continue
        if error is not None:
            raise RankError(f"rank {rank}:\n{error}")
        values[rank] = pickle.loads(value)
    return [values[rank] for rank in range(len(processes))]


def _rank_main(
    rank: int,
    world_size: int,
    local: int,
    store: str,
    where: tuple,
    payload: bytes,
    results: Any,
    timeout: float,
    path: list[str],
) -> None:
    sys.path[:] = path
    os.environ.update(LOCAL_WORLD_SIZE=str(local), LOCAL_RANK=str(rank % local))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        try:
            value = pickle.dumps(_load(*where)(rank, world_size, *pickle.loads(payload)))
        finally:
            dist.destroy_process_group()
        results.put((rank, value, None))
    except BaseException:  # DCP's errors are not Exceptions
        results.put((rank, None, traceback.format_exc()))


def _load(module: str, file: str, qualname: str) -> Callable:
    """The function of that name, from its file: test modules cannot be imported by name under importlib mode."""
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None and spec.loader is not None, file
        sys.modules[module] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(Path(file).parent))
        spec.loader.exec_module(sys.modules[module])
    value: Any = sys.modules[module]
    for part in qualname.split("."):
        value = getattr(value, part)
    return value
