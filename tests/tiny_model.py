"""A small model with pooled and unpooled tables, its batches and its optimizers: what the distributed tests shard."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.sharding.replicated import dense_parameters, table_optimizer

BAGS = {"s__a": (40, 8), "s__b": (3, 8), "t__a": (17, 16)}
ROWS = {"s__h": (23, 8)}


class TinyModel(nn.Module):
    def __init__(self, device: torch.device | None = None, bags: dict = BAGS, rows: dict = ROWS) -> None:
        super().__init__()
        device = device or torch.device("meta")
        self.bags, self.rows = list(bags), list(rows)
        self.ebc = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=t, feature_names=[t], num_embeddings=n, embedding_dim=d)
                for t, (n, d) in bags.items()
            ],
            device=device,
        )
        self.ec = EmbeddingCollection(
            tables=[
                EmbeddingConfig(name=t, feature_names=[t], num_embeddings=n, embedding_dim=d)
                for t, (n, d) in rows.items()
            ],
            device=device,
        )
        width = sum(d for _, d in bags.values()) + sum(d for _, d in rows.values())
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.mlp = nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 1))

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        pooled = self.ebc(ids)
        sequences = self.ec(ids)
        fields = [pooled[t] for t in self.bags] + [sequences[t].to_padded_dense(4).sum(1) for t in self.rows]
        return self.mlp(torch.cat(fields, 1)).squeeze(1)


def apply_table_optimizer(model: nn.Module, optimizer: type = RowWiseAdagrad, **options: Any) -> None:
    for collection in (model.ebc, model.ec):
        apply_optimizer_in_backward(optimizer, collection.parameters(), {"lr": 0.1, **options})


def optimizer_of(model: DistributedModelParallel) -> CombinedOptimizer:
    dense = KeyedOptimizerWrapper(dense_parameters(model), lambda p: torch.optim.Adam(p, lr=0.01))
    dense.init_state()  # a step of zero gradients, which Adam counts
    for state in dense.state.values():
        state["step"].zero_()
    return CombinedOptimizer([("tables", table_optimizer(model)), ("dense", dense)])


def batch_of(
    step: int, rank: int, world_size: int, size: int = 12, tables: dict | None = None
) -> tuple[KeyedJaggedTensor, Tensor]:
    """Global batch `step`'s share of one rank; 0 to 3 ids per bag."""
    tables = tables or {**BAGS, **ROWS}
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, 4, (len(tables), size), generator=generator)
    values = [
        torch.randint(0, n, (int(lengths[i].sum()),), generator=generator) for i, (n, _) in enumerate(tables.values())
    ]
    labels = torch.randint(0, 2, (size,), generator=generator).float()
    mine = slice(rank * size // world_size, (rank + 1) * size // world_size)
    local = [v[int(n[: mine.start].sum()) : int(n[: mine.stop].sum())] for v, n in zip(values, lengths, strict=True)]
    kjt = KeyedJaggedTensor(
        keys=list(tables),
        values=torch.cat(local),
        lengths=lengths[:, mine].reshape(-1),
        stride=mine.stop - mine.start,
    )
    return kjt, labels[mine]


def train(model: nn.Module, optimizer: Any, steps: range, rank: int, world_size: int) -> list[float]:
    """Local losses of the steps."""
    losses = []
    for step in steps:
        ids, labels = batch_of(step, rank, world_size)
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(ids), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def full(tensor: Tensor) -> Tensor:
    """The whole of a ShardedTensor on every rank (collective), or a copy of a plain one."""
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    if not isinstance(tensor, ShardedTensor):
        return tensor.detach().clone()
    import torch.distributed as dist

    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [(s.metadata.shard_offsets, s.tensor.clone()) for s in tensor.local_shards()])
    nothing = float("nan") if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max
    result = torch.full(tensor.size(), nothing, dtype=tensor.dtype)
    for offsets, values in (shard for part in parts for shard in part):
        result[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values
    return result
