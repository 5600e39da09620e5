"""A process's part of a vector <-> the whole vector, as checkpoints know it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor import TensorProperties as Properties
from torch.distributed._shard.sharding_spec import ShardMetadata


def as_whole(local: Tensor, bounds: Sequence[int], rank: int) -> Tensor:
    """The vector of which process p holds [bounds[p], bounds[p + 1]); shares memory with `local`. No communication."""
    if len(bounds) == 2:
        return local
    device = local.device.type if local.device.type == "cpu" else "cuda"
    shards = [
        ShardMetadata(shard_offsets=[first], shard_sizes=[last - first], placement=f"rank:{p}/{_device(device, p)}")
        for p, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        if last > first
    ]
    metadata = ShardedTensorMetadata(shards, torch.Size((bounds[-1],)), Properties(dtype=local.dtype))
    mine = [Shard(local, s) for s in shards if s.placement.rank() == rank]  # type: ignore[union-attr]
    return ShardedTensor._init_from_local_shards_and_global_metadata(mine, metadata)  # type: ignore[return-value]


def _device(kind: str, rank: int) -> str:
    return kind if kind == "cpu" else f"cuda:{rank % torch.cuda.device_count()}"


def fill_local(local: Tensor, whole: Tensor, first: int) -> None:
    """Copies this process's part, which begins at `first`, out of a whole or sharded vector."""
    if not isinstance(whole, ShardedTensor):
        local.copy_(whole[first : first + len(local)])
        return
    for shard in whole.local_shards():
        begin = shard.metadata.shard_offsets[0] - first
        if not 0 <= begin <= len(local) - len(shard.tensor):
            raise ValueError(f"a shard at {shard.metadata.shard_offsets} is not of this process")
        local[begin : begin + len(shard.tensor)].copy_(shard.tensor)
