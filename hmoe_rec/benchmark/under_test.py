"""One plan, built: its training steps by the clock, the same steps taken apart, and the dense part without tables."""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.utils._pytree import tree_leaves
from torchrec.distributed.types import ShardingPlan

from hmoe_rec.batch import Batch
from hmoe_rec.benchmark.parts import StepParts, synchronize
from hmoe_rec.config import RunConfig
from hmoe_rec.embedding.lookup import MultiEmbedding, SetVectors
from hmoe_rec.sharding.process import Process
from hmoe_rec.training.build import build_optimizers, build_sharded, in_table
from hmoe_rec.training.loop import make_loop
from hmoe_rec.training.prepare import fill_frozen_vectors

FIRST_STEPS = 2  # of a new plan: allocations, TorchRec's first look at a batch
DENSE_BATCHES = 4  # whose vectors are kept for the steps without tables


@dataclass(frozen=True)
class Memory:
    """Of this process, in bytes.

    Attributes:
        tables, optimizer: held by the tables' shards and the state of their optimizer.
        peak: cuda: the most allocated in timed steps, without other plans; cpu: growth of the resident set from before
            the plan was built until after its first timed steps (memory that an earlier plan has left is not counted).
    """

    tables: int
    optimizer: int
    peak: int


class PlanUnderTest:
    """A plan's model and optimizers on this process. All methods but `memory` are collective calls.

    Args:
        batches: this process's part of global batches, in memory; taken in turn, again and again.
    """

    def __init__(self, config: RunConfig, process: Process, plan: ShardingPlan, batches: Sequence[Batch]) -> None:
        self.process, self.device, self.batches = process, process.device, batches
        self._before = _used(self.device)
        self.sharded = build_sharded(config, process, plan)
        fill_frozen_vectors(self.sharded, config)
        self.sharded.train()
        self.optimizers = build_optimizers(config, self.sharded, total_steps=10**9)
        self._vectors: list[tuple[Batch, dict[str, SetVectors]]] = []
        self._pipeline, self._steps = config.train.pipeline, 0
        self._loop: Any = None
        self.embedding = next(m for m in self.sharded.modules() if isinstance(m, MultiEmbedding))
        for batch in itertools.islice(itertools.cycle(batches), FIRST_STEPS):
            self._plain_step(batch.to(self.device))
        self._allocated = _used(self.device) - self._before
        self._peak = 0

    def parts(self, count: int) -> StepParts:
        """Takes `count` steps apart; before any timed step, since pipelines change how TorchRec is called."""
        assert self._loop is None, "the pipeline is running"
        parts = StepParts(self.embedding, self.device)
        with parts.watching():
            for batch in itertools.islice(itertools.cycle(self.batches), count):
                here = batch.to(self.device)
                parts.step(lambda: self._loss(here), lambda loss: loss.backward(), self.optimizers.combined.step)  # noqa: B023
        return parts

    def keep_vectors(self) -> None:
        """Looks up what `dense_block` works on: as `parts`, before any timed step."""
        assert self._loop is None, "the pipeline is running"
        with torch.no_grad():
            for batch in self.batches[:DENSE_BATCHES]:
                here = batch.to(self.device)
                self._vectors.append((batch, _leaves(self.embedding(here.sparse, here.longest))))

    def block(self, warmup: int, count: int, first: int) -> list[float]:
        """Milliseconds of `count` training steps of the run's own loop after `warmup` ones; on a GPU, of its clock.

        Args:
            first: which batch to begin with; the same for all plans of a round.
        """
        if self._loop is None:
            self._loop = make_loop(self._pipeline, self.sharded, self.optimizers.combined, self.device)  # type: ignore[arg-type]
            self._source = _Cycle(self.batches)
        self._source.next = first
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        others = _used(self.device) - self._allocated
        times = _timed(lambda: self._loop.progress(self._source), warmup, count, self.device)
        if self.device.type == "cuda":
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self.device) - others)
        elif not self._peak:
            self._peak = max(0, _used(self.device) - self._before)
        return times

    def dense_block(self, warmup: int, count: int) -> list[float]:
        """The same steps with the vectors given: no ids, no tables, no exchange of either."""
        turn = itertools.cycle(self._vectors)

        def step() -> None:
            batch, vectors = next(turn)
            here = batch.to(self.device)
            for leaf in tree_leaves([vars(v) for v in vectors.values()]):
                if isinstance(leaf, Tensor):
                    leaf.grad = None
            with _returning(self.embedding, vectors):
                self._plain_step(here)

        return _timed(step, warmup, count, self.device)

    def memory(self) -> Memory:
        state = self.optimizers.tables.state_dict()["state"]
        tables = [value for name, value in self.sharded.state_dict().items() if in_table(name)]
        return Memory(_held(tables), _held(tree_leaves(state)), self._peak)

    def _loss(self, batch: Batch) -> Tensor:
        self.optimizers.combined.zero_grad()
        self.optimizers.set_learning_rates(self._steps)
        self._steps += 1
        return self.sharded(batch)[0]

    def _plain_step(self, batch: Batch) -> None:
        self._loss(batch).backward()
        self.optimizers.combined.step()


class _Cycle(Iterator[Batch]):
    """The batches in turn, without an end: a pipeline that takes them ahead never runs dry."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.next = batches, 0

    def __next__(self) -> Batch:
        batch = self.batches[self.next % len(self.batches)]
        self.next += 1
        return batch


def _timed(step: Callable[[], Any], warmup: int, count: int, device: torch.device) -> list[float]:
    """From the end of a step to the end of the next one; nothing waits in between, as in a run."""
    dist.barrier()
    for _ in range(warmup):
        step()
    if device.type == "cpu":
        ends = [time.perf_counter()]
        for _ in range(count):
            step()
            ends.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(ends)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


@contextmanager
def _returning(module: nn.Module, value: Any) -> Iterator[None]:
    module.forward = lambda *_: value
    try:
        yield
    finally:
        del module.forward


def _leaves(vectors: dict[str, SetVectors]) -> dict[str, SetVectors]:
    """Copies that take gradients, as lookups do."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_()

    return {
        name: SetVectors(
            pooled=None if v.pooled is None else leaf(v.pooled),
            targets={key: leaf(x) for key, x in v.targets.items()},
            behaviors={key: leaf(x) for key, x in v.behaviors.items()},
        )
        for name, v in vectors.items()
    }


def _held(values: Sequence[Any]) -> int:
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, ShardedTensor):
            tensors += [shard.tensor for shard in value.local_shards()]
        elif isinstance(value, Tensor):
            tensors.append(value)
    return sum(t.numel() * t.element_size() for t in tensors)


def _used(device: torch.device) -> int:
    """Bytes allocated on the GPU, or resident in the machine's memory, by this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
