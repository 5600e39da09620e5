"""A function -> the same function in N processes of this machine that find each other as under torchrun.

Where a launcher has started this process already, it is one of its processes and nothing is started.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from hmoe_rec import types
from hmoe_rec.types import ConfigError, HmoeError

# Imported once, by the process that the others are forked from: on CPU a start then takes less than a second each.
PRELOAD = ["torch", "torchrec", "torchrec.distributed.model_parallel", "torchrec.distributed.planner"]


def run_processes(
    world_size: int, function: Callable[..., Any], arguments: Mapping[str, Any], *, device: str = "cpu"
) -> Any:
    """What function(**arguments) returns on the first process.

    Args:
        world_size: processes; under a launcher it must be the launcher's number.
        function: at the top of a module; it and the arguments travel by pickle.
        device: "cuda" starts fresh processes, since CUDA cannot be used after a fork.

    Raises:
        HmoeError: that any process raised; RuntimeError: with the traceback of what else went wrong there.
    """
    if "RANK" in os.environ:
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != world_size:
            raise ConfigError(f"--world-size {world_size}: the launcher started {started} processes; leave it out")
        return function(**arguments)
    context: Any = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
    if device == "cpu":
        context.set_forkserver_preload(PRELOAD)
    port = _free_port()
    pipes, processes = [], []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            environment = {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
                **{"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            }
            job = (sender, dict(os.environ) | environment, function, dict(arguments))
            processes.append(context.Process(target=_main, args=job, daemon=True))
            with _not_from_current_folder():
                processes[-1].start()
            sender.close()
            pipes.append(receiver)
        return _collect(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def _not_from_current_folder() -> Iterator[None]:
    """Python's server of forks is started by `python -c`, which would search for its modules there first."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _collect(pipes: list[Connection]) -> Any:
    """The first process's result once all have ended; whatever goes wrong anywhere ends the wait."""
    results: dict[int, Any] = {}
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    while open_pipes:
        for pipe in wait(list(open_pipes)):
            rank = open_pipes.pop(pipe)  # type: ignore[arg-type]
            try:
                error, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"process {rank} died without a word (out of memory?)") from None
            if error == "HmoeError":
                kind, message = value
                raise getattr(types, kind, HmoeError)(message)
            if error is not None:
                raise RuntimeError(f"process {rank}:\n{value}")
            results[rank] = value
    return pickle.loads(results[0])


def _main(sender: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: dict) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends us
    os.environ.clear()
    os.environ.update(environment)
    with suppress(BrokenPipeError):
        try:
            result = function(**arguments)
            sender.send((None, pickle.dumps(result if environment["RANK"] == "0" else None)))
        except HmoeError as error:
            sender.send(("HmoeError", (type(error).__name__, str(error))))
        except BaseException:
            sender.send(("other", traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
