"""torch.cuda, FBGEMM's lookups and process groups as a run on a GPU meets them, on a machine without one.

Streams and events do nothing but say where the host would wait; NCCL becomes gloo; FBGEMM's operators for CUDA run as
those for the CPU behind an autograd function.
"""

import contextlib
import os
import types
from collections.abc import Iterator
from typing import Any

import pretend  # before torch  # noqa: I001
import torch
from pretend import CPU, CUDA, Pretended
from recorder import Recorder, note
from torch.utils._pytree import tree_map

COUNT = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Stream:
    """A queue of nothing. `name` is "" for the default one."""

    device = CUDA
    _made = 0

    def __init__(self, *_: Any, name: str | None = None, **__: Any) -> None:
        Stream._made += name is None
        self.name = f"side stream {Stream._made}" if name is None else name

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "Event":
        return Event()

    def synchronize(self) -> None:
        note("SYNC", "stream.synchronize")

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        note("SYNC", "event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def query(self) -> bool:
        return True


DEFAULT = Stream(name="")
_current = [DEFAULT]


@contextlib.contextmanager
def _on(stream: Any) -> Iterator[None]:
    _current.append(stream if isinstance(stream, Stream) else _current[-1])
    _tell()
    try:
        yield
    finally:
        _current.pop()
        _tell()


def _tell() -> None:
    if Recorder.active is not None:
        Recorder.active.stream = _current[-1].name and "a side stream"


def patch_cuda() -> None:
    """torch.cuda says that there is one device per process."""
    properties = types.SimpleNamespace(
        name="pretended", total_memory=141 * 10**9, major=9, minor=0, multi_processor_count=132, warp_size=32
    )
    answers: dict[str, Any] = dict(
        is_available=True,
        is_initialized=True,
        _is_in_bad_fork=False,
        device_count=COUNT,
        current_device=CUDA.index,
        is_bf16_supported=True,
        get_device_name="pretended",
        get_device_capability=(9, 0),
        get_device_properties=properties,
        mem_get_info=(100 * 10**9, 141 * 10**9),
        memory_allocated=10**6,
        max_memory_allocated=10**6,
        default_stream=DEFAULT,
        **dict.fromkeys(
            "_lazy_init set_device set_stream manual_seed manual_seed_all set_rng_state reset_peak_memory_stats "
            "empty_cache".split()
        ),
    )
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event, cuda.stream = Stream, Event, _on
    cuda.current_stream = lambda *_: _current[-1]
    cuda.synchronize = lambda *_: note("SYNC", "cuda.synchronize")
    cuda.get_rng_state = lambda *_, **__: torch.arange(16, dtype=torch.uint8)
    cuda.device = lambda *_: contextlib.nullcontext()
    bindings: Any = torch._C
    bindings._cuda_getDevice = lambda: CUDA.index


def patch_groups() -> None:
    """gloo in place of NCCL: what is sent lies in CPU memory all the same."""
    import torch.distributed as dist

    real = dist.init_process_group

    def init(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        return real(str(backend).replace("nccl", "gloo") if backend else backend, *args, **kwargs)

    dist.init_process_group = init
    dist.is_nccl_available = lambda: True
    config = dist.get_backend_config
    dist.get_backend_config = lambda *args: str(config(*args)).replace("cuda:gloo", "cuda:nccl")
    # DistributedDataParallel's: it has timers for real devices only.
    dist.Logger.set_runtime_stats_and_log = lambda self: None  # type: ignore[attr-defined]


def patch_lookups() -> None:
    """FBGEMM's training operators, asked for CUDA, are made for the CPU; what goes in and out passes the border."""
    import fbgemm_gpu.split_table_batched_embeddings_ops_training as ops

    _patch_split(ops)
    _patch_dense(ops)


def _inner(x: Any) -> Any:
    return x.elem if isinstance(x, Pretended) else x


def _outer(x: Any) -> Any:
    return Pretended(x.detach()) if isinstance(x, torch.Tensor) and not isinstance(x, Pretended) else x


def _patch_split(ops: Any) -> None:
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation

    lookup = ops.SplitTableBatchedEmbeddingBagsCodegen
    make, forward = lookup.__init__, lookup.forward

    def init(self: Any, embedding_specs: Any, *args: Any, **kwargs: Any) -> None:
        self.pretended = embedding_specs[0][3] == ops.ComputeDevice.CUDA
        if self.pretended:
            embedding_specs = [(r, d, EmbeddingLocation.HOST, ops.ComputeDevice.CPU) for r, d, *_ in embedding_specs]
            kwargs["device"] = CPU
        make(self, embedding_specs, *args, **kwargs)

    class Lookup(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, anchor: Any, self: Any, indices: Any, offsets: Any) -> Any:
            with torch.enable_grad():
                ctx.out = forward(self, _inner(indices), _inner(offsets), None)
            return Pretended(ctx.out.detach())

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            with torch.enable_grad():
                torch.autograd.backward(ctx.out, grad.elem.to(ctx.out.dtype))
            return Pretended(torch.zeros(())), None, None, None

    def lookup_forward(self: Any, indices: Any, offsets: Any, per_sample_weights: Any = None, *a: Any, **k: Any) -> Any:
        if not getattr(self, "pretended", False):
            return forward(self, indices, offsets, per_sample_weights, *a, **k)
        if not isinstance(indices, Pretended):
            note("MIX", "FBGEMM lookup: indices on the CPU")
        anchor = Pretended(torch.zeros(())).requires_grad_(torch.is_grad_enabled())
        return Lookup.apply(anchor, self, indices, offsets)

    lookup.__init__, lookup.forward = init, lookup_forward
    for name in ("split_embedding_weights", "split_optimizer_states", "get_optimizer_state"):
        setattr(lookup, name, _on_device(getattr(lookup, name)))


def _on_device(function: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = function(self, *args, **kwargs)
        return tree_map(_outer, out) if getattr(self, "pretended", False) else out

    return call


def _patch_dense(ops: Any) -> None:
    """Replicated tables are made, not looked up: DDP's slices of them are no wrappers."""
    dense = ops.DenseTableBatchedEmbeddingBagsCodegen
    make, forward = dense.__init__, dense.forward

    def init(self: Any, embedding_specs: Any, *args: Any, use_cpu: bool = False, **kwargs: Any) -> None:
        make(self, embedding_specs, *args, use_cpu=True, **kwargs)
        self.pretended = not use_cpu
        if self.pretended:
            self.weights = torch.nn.Parameter(Pretended(self.weights.detach()))

    def dense_forward(self: Any, indices: Any, offsets: Any, *args: Any, **kwargs: Any) -> Any:
        if self.pretended:
            raise RuntimeError("device_lint cannot look up replicated tables on a pretended GPU")
        return forward(self, indices, offsets, *args, **kwargs)

    dense.__init__, dense.forward = init, dense_forward


def patch() -> None:
    """All of it."""
    patch_cuda()
    patch_lookups()
    patch_groups()


__all__ = ["patch", "pretend"]
