"""Training steps -> the rows that they may have changed, as one bit map per shard.

A fused optimizer changes rows that are looked up, and no others. A row that is reset because another id has taken it
over is looked up in the same step only by the sets whose keys brought that id, so those rows are marked besides.
TorchRec's ModelDeltaTracker (1.8.0) tells the same rows. It keeps the ids of every step until it is asked, so that its
memory grows with the interval, and finds the distinct ones then; a bit map takes a byte per row, whatever the interval.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from hmoe_rec.embedding.initialization import local_blocks, named_collections, table_weights
from hmoe_rec.embedding.managed import managed_ids


@dataclass(frozen=True)
class Block:
    """A shard of a table on this process.

    Attributes:
        shape: of the whole table.
        values: [rows, columns] of the shard, sharing memory with the table.
        touched: bool [rows]; None = not known, so that all may have changed (tables that every process holds whole).
    """

    table: str
    shape: tuple[int, int]
    first_row: int
    first_column: int
    values: Tensor
    touched: Tensor | None


class TouchedRows:
    """Marks rows from now on.

    Args:
        module: under DistributedModelParallel; its training steps have gradients on, its evaluations off.
    """

    def __init__(self, module: nn.Module) -> None:
        self.blocks: list[Block] = []
        for _, collection in named_collections(module):
            marks: dict[tuple[str, int, int], Tensor] = {}
            for table, weight in table_weights(collection).items():
                sharded = isinstance(weight, ShardedTensor)
                for values, row, column, _ in local_blocks(table, weight):
                    touched = torch.zeros(len(values), dtype=torch.bool, device=values.device) if sharded else None
                    if touched is not None:
                        marks[table, row, column] = touched
                    shape = (weight.size(0), weight.size(1))
                    self.blocks.append(Block(table, shape, row, column, values, touched))
            for lookup in getattr(collection, "_lookups", ()):
                for kernel in getattr(lookup, "_emb_modules", ()):
                    _watch(kernel, marks)
        managed = managed_ids(module)
        if managed is not None:
            self._field_of = managed.tables
            managed.watch(self._reset)

    def _reset(self, field: str, rows: Tensor) -> None:
        for block in self.blocks:
            if block.touched is not None and self._field_of.get(block.table) == field:
                here = rows - block.first_row
                block.touched[here[(here >= 0) & (here < len(block.touched))]] = True

    def take(self) -> Iterator[tuple[Block, Tensor | None]]:
        """Each block with its marked rows, counted in the block (None: all), and forgets them."""
        for block in self.blocks:
            if block.touched is None:
                yield block, None
                continue
            rows = block.touched.nonzero().squeeze(1)
            block.touched.zero_()
            yield block, rows


def _watch(kernel: nn.Module, marks: dict[tuple[str, int, int], Tensor]) -> None:
    """Marks what a group of tables looks up: its features come in the order of its tables."""
    targets: list[Tensor | None] = []
    for table in kernel.config.embedding_tables:  # type: ignore[union-attr]
        place = () if table.local_metadata is None else tuple(table.local_metadata.shard_offsets)
        targets += [marks.get((table.name, *place))] * len(table.feature_names)  # type: ignore[arg-type]

    def mark(_: nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled():
            features = args[0]
            parts = features.values().split(features.length_per_key())
            for touched, ids in zip(targets, parts, strict=True):
                if touched is not None:
                    touched[ids.long()] = True

    kernel.register_forward_pre_hook(mark)
