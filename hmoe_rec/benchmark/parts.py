"""One training step, taken apart: milliseconds and bytes of each part that the planner predicts, on this process.

::

    input     ids picked, permuted, put into buckets, and exchanged: from the embedding's call to a collection's lookup
    forward   FBGEMM's lookup kernels
    output    exchange of vectors;    join   what TorchRec and the embedding make of them: reordered, put side by side
    split     gradients taken apart;  gradient   exchange of gradients
    backward  FBGEMM's kernels, which also step the tables' optimizer
    wait      for the slowest process before each exchange
    rest      everything else: experts, gates, towers, losses, DDP, Adam

A barrier before every exchange of TorchRec's and a synchronization of the device at every border keep parts apart:
nothing overlaps, so the parts say where time goes, and their sum is above a step's time. Steps are timed without this.
"""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed import comm_ops, dist_data
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from hmoe_rec.benchmark.result import KINDS, MEASURED

SHARDED = (ShardedEmbeddingBagCollection, ShardedEmbeddingCollection)
EXCHANGES = ("all_to_all_single", "reduce_scatter_tensor", "reduce_scatter", "all_gather_into_tensor", "all_gather")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepParts:
    """Measures steps while its `watching` block lasts.

    Args:
        tables: the module that holds the collections and nothing else that takes long; under any wrapper.

    Attributes:
        steps: of each step, part (`MEASURED`) -> milliseconds of this process.
        sent: of each step, "input", "output", "gradient" -> bytes that left this process for others.
        exchanges: the same keys -> exchanges of all steps together.
    """

    def __init__(self, tables: nn.Module, device: torch.device) -> None:
        self.tables, self.device = tables, device
        self.steps: list[dict[str, float]] = []
        self.sent: list[Counter[str]] = []
        self.exchanges: Counter[str] = Counter()
        self._ms: dict[str, float] = defaultdict(float)
        self._part, self._since = "rest", 0.0
        self._backward = False
        self._gradients = self._lookups = 0  # that are still to come in this step's backward pass

    def median_ms(self) -> dict[str, float]:
        return {part: statistics.median(step.get(part, 0.0) for step in self.steps) for part in MEASURED}

    def mean_sent(self) -> dict[str, float]:
        return {kind: statistics.fmean(step[kind] for step in self.sent) for kind in KINDS}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in (comm_ops, dist_data):
                stack.enter_context(patch.object(module, "dist", _Exchanges(self)))
            stack.enter_context(_wrapped(SplitTableBatchedEmbeddingBagsCodegen, "forward", self._lookup))
            for kind in SHARDED:
                stack.enter_context(_wrapped(kind, "input_dist", self._input_begins))
                stack.enter_context(_wrapped(kind, "compute_and_output_dist", self._input_ends))
            stack.enter_context(_wrapped(type(self.tables), "forward", self._embed))
            yield

    def step(self, forward: Callable[[], Tensor], backward: Callable[[Tensor], None], optimize: Callable[[], None]):
        """One step: the loss; its gradients; the optimizer. To be called by all processes, inside `watching`."""
        dist.barrier()
        self._ms, self._part, self._backward = defaultdict(float), "rest", False
        self._gradients = self._lookups = 0
        self.sent.append(Counter())
        self._since = self._now()
        loss = forward()
        self._backward = True
        backward(loss)
        self._enter("rest")
        optimize()
        self._enter("rest")
        self.steps.append(dict(self._ms))

    # ------------------------------------------------------------------------------- every moment belongs to one part

    def _now(self) -> float:
        synchronize(self.device)
        return 1e3 * time.perf_counter()

    def _enter(self, part: str) -> None:
        now = self._now()
        self._ms[self._part] += now - self._since
        self._part, self._since = part, now

    @contextmanager
    def _within(self, part: str) -> Iterator[None]:
        around = self._part
        self._enter(part)
        yield
        self._enter(around)

    # ---------------------------------------------------------------------------------------------- what is called when

    def _embed(self, original: Callable, module: nn.Module, *arguments: Any, **named: Any) -> Any:
        if module is not self.tables:
            return original(module, *arguments, **named)
        with self._within("input"):
            vectors = original(module, *arguments, **named)
            for tensor in _tensors(vectors):
                if tensor.requires_grad:
                    self._gradients += 1
                    tensor.register_hook(self._gradient_arrives)
        return vectors

    def _input_begins(self, original: Callable, *arguments: Any, **named: Any) -> Any:
        self._enter("input")
        return original(*arguments, **named)

    def _input_ends(self, original: Callable, *arguments: Any, **named: Any) -> Any:
        self._enter("join")
        return original(*arguments, **named)

    def _lookup(self, original: Callable, *arguments: Any, **named: Any) -> Any:
        with self._within("forward"):
            vectors = original(*arguments, **named)
        if vectors.grad_fn is not None:
            self._lookups += 1
            vectors.grad_fn.register_prehook(lambda _: self._enter("backward"))
            vectors.grad_fn.register_hook(lambda *_: self._lookup_done())
        return vectors

    def _gradient_arrives(self, _: Tensor) -> None:
        self._gradients -= 1
        if not self._gradients:
            self._enter("split")

    def _lookup_done(self) -> None:
        self._lookups -= 1
        self._enter("split" if self._lookups else "rest")

    def exchange(self, name: str, original: Callable, *arguments: Any, **named: Any) -> Any:
        """A collective of TorchRec's, in order and by itself; the caller's wait() then returns at once."""
        part = "gradient" if self._backward else "input" if self._part == "input" else "output"
        self.sent[-1][part] += sent_bytes(name, *arguments, **named)
        self.exchanges[part] += 1
        if self._backward and self._part == "rest":  # a vector that the loss does not use has no gradient to wait for
            self._enter("split")
        with self._within("wait"):
            dist.barrier()
        with self._within(part):
            work = original(*arguments, **named)
            if work is not None:
                work.wait()
        return work


class _Exchanges:
    """`torch.distributed` as TorchRec sees it while it is watched."""

    def __init__(self, parts: StepParts) -> None:
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        original = getattr(dist, name)
        if name not in EXCHANGES:
            return original
        return lambda *arguments, **named: self._parts.exchange(name, original, *arguments, **named)


@contextmanager
def _wrapped(kind: type[nn.Module], name: str, wrapper: Callable) -> Iterator[None]:
    original = getattr(kind, name)

    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        return wrapper(original, self, *arguments, **named)

    with patch.object(kind, name, method):
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    """In records and mappings, each once."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif value is not None:
        yield from _tensors(vars(value))


def sent_bytes(name: str, *arguments: Any, **named: Any) -> int:
    """Bytes of a collective's call that leave this process: its buffer without its own part."""
    given = dict(zip(("output", "input", "output_split_sizes", "input_split_sizes"), arguments, strict=False)) | named
    group = given.get("group")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    source = next(given[key] for key in ("input", "input_tensor", "input_list", "tensor") if key in given)
    if isinstance(source, list):  # reduce_scatter
        return sum(_size(t) for i, t in enumerate(source) if i != rank)
    if name.startswith("all_gather"):
        return _size(source) * (world - 1)
    splits = given.get("input_split_sizes")
    if not splits:
        return _size(source) * (world - 1) // world
    width = _size(source) // max(1, source.shape[0])
    return width * (sum(splits) - splits[rank])


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
