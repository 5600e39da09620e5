"""Environment of a launcher (or none) -> this process's place in the job, for as long as a `with` block lasts."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hmoe_rec.types import ConfigError, HmoeError

DEVICES = ("auto", "cpu", "cuda")
CUDA_BACKENDS = "cpu:gloo,cuda:nccl"


@dataclass(frozen=True)
class Process:
    """This process among the job's: `rank` of `world_size`, `local_rank` of `local_world_size` on its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    def gather(self, mine: Any) -> list[Any]:
        """What every process has, in the order of ranks; a collective call. It travels by pickle."""
        everyone = [mine] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, mine)
        return everyone

    def first(self, act: Callable[[], None]) -> None:
        """The first process acts, and all wait for it; what it raises is raised by all. A collective call."""
        problem: Exception | None = None
        if self.rank == 0:
            try:
                act()
            except Exception as error:  # whatever it is, nobody may wait for ever
                problem = error
        if problem := self.gather(problem)[0]:
            raise problem


@contextmanager
def process_group(device: str = "cpu", *, timeout: timedelta | None = None) -> Iterator[Process]:
    """The default process group: of all processes that torchrun (or torchx) started, or of this one alone.

    A group that exists already is used and left alone. Otherwise the group is made here and always destroyed at the
    end: without that, even a successful gloo run may die with SIGABRT.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl, and gloo beside it for objects and checkpoints).
        timeout: of a collective; torch's default if None.

    Raises:
        HmoeError: the launcher's variables are incomplete; or "cuda" without enough devices, or without nccl, also in a
            group that exists.
    """
    if device not in ("cpu", "cuda"):
        raise HmoeError(f"device must be 'cpu' or 'cuda', got {device!r}")
    rank, world_size, local_rank, local_world_size = _place()
    torch_device = torch.device("cpu")
    if device == "cuda":
        _check_cuda(rank, local_rank)
        torch_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(torch_device)
    created = not dist.is_initialized()
    with quiet_torchrec():
        try:
            if created:
                _init(device, rank, world_size, timeout)
            yield Process(dist.get_rank(), dist.get_world_size(), local_rank, local_world_size, torch_device)
        finally:
            if created and dist.is_initialized():
                dist.destroy_process_group()


def choose_device(asked: str) -> str:
    """ "auto", "cpu" or "cuda" -> "cpu" or "cuda"; auto: what $HMOE_REC_DEVICE says, else cuda where there is one.

    Raises:
        ConfigError: another word.
    """
    if asked == "auto":
        asked = os.environ.get("HMOE_REC_DEVICE") or asked
    if asked not in DEVICES:
        raise ConfigError(f"device {asked!r}: expected {', '.join(DEVICES)}")
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _check_cuda(rank: int, local_rank: int) -> None:
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise HmoeError(
            f"device cuda: torch {torch.__version__}, built {built}, finds no GPU here (hmoe-rec doctor says more); "
            "ask for device cpu: --device cpu, in a run file train.device: cpu"
        )
    if local_rank >= torch.cuda.device_count():
        raise HmoeError(
            f"process {rank} is number {local_rank} on its machine, which has {torch.cuda.device_count()} CUDA "
            "devices: start at most one process per device, or ask for device cpu"
        )
    if not dist.is_nccl_available():
        raise HmoeError(
            f"device cuda: torch {torch.__version__} was built without NCCL, which carries tables between GPUs; "
            "install a build that has it (Linux), or ask for device cpu"
        )
    if dist.is_initialized() and "cuda:nccl" not in (backends := str(dist.get_backend_config())):
        raise HmoeError(
            f"device cuda: the process group that exists has the backends {backends}, and not nccl for GPUs: make it "
            f"by dist.init_process_group({CUDA_BACKENDS!r}), leave making it to process_group('cuda'), or ask for "
            "device cpu"
        )


@contextmanager
def quiet_torchrec() -> Iterator[None]:
    """Without the warnings that TorchRec gives about itself; its errors stay."""
    loggers = [logging.getLogger(name) for name in ("torchrec", "torch.fx._symbolic_trace")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torchrec\..*")
        warnings.filterwarnings("ignore", category=FutureWarning, message=r".*`torch\.distributed\..*` is deprecated")
        warnings.filterwarnings("ignore", category=FutureWarning, message=r"`broadcast_buffers` is deprecated")
        warnings.filterwarnings("ignore", category=FutureWarning, message=r"Please use DTensor instead")
        # Of replicated tables on CPU; their gradients are right all the same (tests/sharding/test_types.py).
        warnings.filterwarnings("ignore", category=UserWarning, message=r"fbgemm::dense_embedding_codegen_lookup")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _place() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size); (0, 1, 0, 1) without a launcher."""
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        return rank, world_size, int(os.environ.get("LOCAL_RANK", rank % local_world_size)), local_world_size
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not given:
        return 0, 1, 0, 1
    missing = [
        n
        for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if n not in os.environ
    ]
    if missing:
        raise HmoeError(
            f"environment has {', '.join(given)} but not {', '.join(missing)}: start with torchrun (it sets them all), "
            "or unset them for a single process"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return rank, world_size, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])


def _init(device: str, rank: int, world_size: int, timeout: timedelta | None) -> None:
    backend = "gloo" if device == "cpu" else CUDA_BACKENDS
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        # torchrun's agent keeps one store over restarts; without a prefix a restarted worker reads the addresses of
        # dead ones (pytorch issue 135712). The count does not rise when a machine joins or leaves: launchers
        # therefore also set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and then this branch is not taken.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        prefixed = dist.PrefixStore(f"hmoe_attempt_{attempt}_of_{world_size}", store)
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world_size, timeout=timeout)
