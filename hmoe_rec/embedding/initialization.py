"""Embedding tables -> the same tables filled with random values that depend on nothing but seed, table and row.

A table is cut into blocks of rows; every block is drawn from its own generator, keyed by (seed, table name, block).
A process fills the rows and columns that it holds. So one process or eight, row-wise or column-wise: the table is the
same, bit for bit, and no two shards start alike. The global random state is neither read nor moved.

Tables of managed fields, whose rows are reset one at a time, are filled value by value (row_values.py).
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from hmoe_rec.embedding.managed import managed_tables
from hmoe_rec.embedding.row_values import row_values
from hmoe_rec.types import HmoeError

BLOCK_VALUES = 1 << 16  # values drawn from one generator; changing it changes every table
TABLE_MODULES = (
    EmbeddingBagCollection,
    EmbeddingCollection,
    ShardedEmbeddingBagCollection,
    ShardedEmbeddingCollection,
)


@torch.no_grad()
def initialize_tables(
    module: nn.Module, *, seed: int, std: float = 0.01, distribution: Literal["normal", "uniform"] = "normal"
) -> None:
    """Fills every table below `module`, in place; sharded (this process's shards) or not.

    Bits are equal on machines whose CPUs run torch's vectorised generator (AVX2 and later).

    Args:
        module: holds EmbeddingBagCollections and EmbeddingCollections, bare or under DistributedModelParallel.
        seed: any integer.
        std: standard deviation of the values; mean 0. Uniform values lie in +- std * sqrt(3).

    Raises:
        HmoeError: a table has no memory yet (meta device), or two modules hold a table of one name.
    """
    owners: dict[str, str] = {}
    by_row = managed_tables(module)
    for path, collection in named_collections(module):
        for table, weight in table_weights(collection).items():
            if table in owners:
                raise HmoeError(
                    f"table {table!r} is in {owners[table]!r} and in {path!r}: both would start alike; rename one"
                )
            owners[table] = path
            for values, row_offset, column_offset, dim in local_blocks(table, weight):
                fill = _fill_by_row if table in by_row else _fill
                fill(values, seed, table, row_offset, column_offset, dim, std, distribution)


def named_collections(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, collection) of every TorchRec embedding collection, sharded or not."""
    return ((path, m) for path, m in module.named_modules() if isinstance(m, TABLE_MODULES))


def table_weights(collection: nn.Module) -> dict[str, Tensor]:
    """Table name -> its weight: Tensor [rows, D] or ShardedTensor of that size, sharing memory with the lookup."""
    # The state dict, not modules(): TorchRec keeps sharded lookups in plain lists, where modules() does not reach.
    suffix = ".weight"
    return {
        key.removesuffix(suffix).split(".")[-1]: w for key, w in collection.state_dict().items() if key.endswith(suffix)
    }


def local_blocks(table: str, weight: Tensor) -> Iterator[tuple[Tensor, int, int, int]]:
    """(values, first row, first column, D of the whole table) of what this process holds."""
    if isinstance(weight, ShardedTensor):
        for shard in weight.local_shards():
            row, column = shard.metadata.shard_offsets
            yield (shard.tensor, row, column, weight.metadata().size[1])
    elif weight.is_meta:
        raise HmoeError(f"table {table!r} is on the meta device: give it memory (shard it) before filling it")
    else:
        yield (weight, 0, 0, weight.size(1))


def _fill(
    values: Tensor, seed: int, table: str, row_offset: int, column_offset: int, dim: int, std: float, distribution: str
) -> None:
    rows, columns = values.shape
    block_rows = max(1, BLOCK_VALUES // dim)
    buffer = torch.empty(block_rows, dim)
    generator = torch.Generator()
    bound = std * math.sqrt(3)
    for block in range(row_offset // block_rows, -(-(row_offset + rows) // block_rows) if rows else 0):
        generator.manual_seed(_block_seed(seed, table, block))
        # Whole blocks always, also at a shard's edge: the values of a row must not depend on where a shard ends.
        if distribution == "normal":
            buffer.normal_(0.0, std, generator=generator)
        else:
            buffer.uniform_(-bound, bound, generator=generator)
        first = block * block_rows
        begin, end = max(first, row_offset), min(first + block_rows, row_offset + rows)
        values[begin - row_offset : end - row_offset].copy_(
            buffer[begin - first : end - first, column_offset : column_offset + columns]
        )


def _fill_by_row(
    values: Tensor, seed: int, table: str, row_offset: int, column_offset: int, dim: int, std: float, distribution: str
) -> None:
    columns = range(column_offset, column_offset + values.shape[1])
    for part in torch.arange(row_offset, row_offset + len(values)).split(max(1, BLOCK_VALUES // dim)):
        drawn = row_values(seed, table, part, columns, std=std, distribution=distribution)
        values[part - row_offset] = drawn.to(values)


def _block_seed(seed: int, table: str, block: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{table}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF_FFFF_FFFF
