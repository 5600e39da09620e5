"""Live shards of every table -> Gram matrices of a sample of its rows, on every process. No table is gathered.

    grams = live_grams(sharded, process, max_rows=4096, turn=3)          # {"set1__user": TableGram, ...}

Where rows lie whole on a process (table-wise, row-wise) its Gram matrix adds up with the others'. Where tables are cut
by columns, a chunk of the sampled rows at a time is put together on all processes, each of which takes a share of
these rows. So do the processes of a table that all of them hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from hmoe_rec.embedding.initialization import local_blocks, named_collections, table_weights
from hmoe_rec.metrics.spectrum import gram
from hmoe_rec.sharding.process import Process

CHUNK_VALUES = 1 << 20  # of rows that are put together from column blocks: 4 MB
REDUCED_VALUES = 1 << 22  # of Gram matrices in one all-reduce: 32 MB
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class TableGram:
    """Attributes: rows: of the table. sampled: of these, in the matrix. gram_DD: float64, on the CPU."""

    rows: int
    sampled: int
    gram_DD: Tensor


@dataclass(frozen=True)
class RowSample:
    """Every `stride`-th row of a table, from `offset` on: of rows ordered by frequency or age a fair share of each."""

    rows: int
    stride: int
    offset: int

    @staticmethod
    def of(rows: int, max_rows: int, turn: int) -> "RowSample":
        """At most max_rows of them, half as many at least where there are; other rows at every turn.

        Offsets follow the golden ratio, which spreads any number of turns evenly.
        """
        stride = max(1, -(-rows // max_rows))
        return RowSample(rows, stride, int(turn * GOLDEN % 1 * stride))

    @property
    def count(self) -> int:
        return -(-(self.rows - self.offset) // self.stride)

    def within(self, values: Tensor, first_row: int) -> tuple[Tensor, int]:
        """(sampled rows of a block that begins at first_row, place of the first of them in the sample); a view."""
        skipped = (self.offset - first_row) % self.stride
        return values[skipped :: self.stride], (first_row + skipped - self.offset) // self.stride


@torch.no_grad()
def live_grams(
    module: nn.Module, process: Process, *, max_rows: int, turn: int = 0, replicas: int = 1
) -> dict[str, TableGram]:
    """Of every table below `module`, the same on every process whatever the plan. A collective call.

    Waits for the device. Rows in a kernel's cache are written back first (TorchRec does so for a state dict).

    Args:
        module: under DistributedModelParallel.
        max_rows: of a table that are looked at.
        turn: number of the call; it chooses the rows.
        replicas: groups of processes that each hold all tables; those of the first group are looked at.

    Source: ours.
    """
    found: dict[str, TableGram] = {}
    looks = process.rank < process.world_size // replicas
    waiting: list[tuple[str, RowSample, Tensor]] = []
    for name, weight in _tables(module):
        sample = RowSample.of(weight.size(0), max_rows, turn)
        waiting.append((name, sample, _own_part(name, weight, sample, process, looks)))
        if sum(part.numel() for _, _, part in waiting) > REDUCED_VALUES:
            found |= _added_up(waiting, process)
            waiting = []
    return found | _added_up(waiting, process)


def _tables(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    weights = [item for _, c in named_collections(module) for item in table_weights(c).items()]
    return iter(sorted(weights, key=lambda item: item[0]))  # all processes in one order: what follows is collective


def _own_part(name: str, weight: Tensor, sample: RowSample, process: Process, looks: bool) -> Tensor:
    """[D, D] float64 that the processes add up. looks: whether this one's shards count."""
    rank, world_size, dim = process.rank, process.world_size, weight.size(1)
    if not isinstance(weight, ShardedTensor):  # every process holds the whole table
        return gram(sample.within(weight, 0)[0][rank::world_size])
    total_DD = torch.zeros(dim, dim, dtype=torch.float64, device=process.device)
    local = local_blocks(name, weight) if looks else ()
    blocks = [(sample.within(values, row), column) for values, row, column, _ in local]
    if all(shard.shard_sizes[1] == dim for shard in weight.metadata().shards_metadata):
        for (rows, _), _ in blocks:
            total_DD += gram(rows).to(process.device)
        return total_DD
    chunk_rows = max(1, CHUNK_VALUES // dim)
    for start in range(0, sample.count, chunk_rows):
        chunk = torch.zeros(min(chunk_rows, sample.count - start), dim, device=process.device)
        for (rows, place), column in blocks:
            first = max(0, place - start)
            part = rows[max(0, start - place) :][: max(0, len(chunk) - first)]
            chunk[first : first + len(part), column : column + rows.shape[1]] = part
        if world_size > 1:
            dist.all_reduce(chunk)  # exact: all but one of the terms are zero
        total_DD += gram(chunk[rank::world_size])
    return total_DD


def _added_up(parts: list[tuple[str, RowSample, Tensor]], process: Process) -> dict[str, TableGram]:
    if not parts:
        return {}
    flat = torch.cat([part.flatten() for _, _, part in parts])
    if process.world_size > 1:
        dist.all_reduce(flat)
    whole = flat.cpu().split([part.numel() for _, _, part in parts])
    return {
        name: TableGram(sample.rows, sample.count, total.view(part.shape))
        for (name, sample, part), total in zip(parts, whole, strict=True)
    }
