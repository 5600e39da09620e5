"""2D parallel: groups of processes that each hold all tables and train them on their own share of the batch.

::

    processes    0 1 2 3 │ 4 5 6 7     2 groups of 4: neighbors, so that a group is whole machines (or a part of one)
    tables       sharded in a group by the same plan: all-to-all among 4 processes, whatever the size of the job
    dense part   gradients averaged over all 8 (DDP), as ever; so are those of data_parallel tables
    averaging    every n steps: shard by shard over the groups, weights and optimizer state

What it trains: between two averagings every group steps its tables by the gradient of its own examples. Averaged at
every step, SGD is the same as without groups, up to rounding: the mean of the steps is the step of the mean gradient.
Adagrad is not: its statistic then averages the squares of the groups' gradients, which exceed the square of their mean,
so that it takes smaller steps.

Source: Zhang et al., "Two-dimensional Sparse Parallelism for Large Scale Deep Learning Recommendation Model Training",
2025 (arXiv 2508.03854), without its scaled optimizer. TorchRec's DMPCollection does the same on GPUs and refuses CPUs;
here both go the same way.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.types import ShardingEnv2D, ShardingPlan
from torchrec.optim.keyed import KeyedOptimizer

from hmoe_rec.sharding.constraints import CACHING
from hmoe_rec.sharding.plan_file import plan_from_dict, plan_to_dict
from hmoe_rec.types import PlanError

CHUNK_VALUES = 1 << 24  # averaged at once: bounds the memory that fp16 tables take in fp32


def group_environment(replicas: int, device: torch.device) -> ShardingEnv2D:
    """This process's place among `replicas` groups of neighbors.

    Raises:
        PlanError: the processes cannot be divided so.
    """
    world_size = dist.get_world_size()
    if world_size % replicas:
        raise PlanError(f"replicas: {world_size} processes cannot be divided into {replicas} equal groups")
    size = world_size // replicas
    mesh = init_device_mesh(device.type, (replicas, size), mesh_dim_names=("replicate", "shard"))
    environment = ShardingEnv2D(
        sharding_pg=mesh.get_group("shard"),
        replica_pg=mesh.get_group("replicate"),
        global_pg=dist.group.WORLD,  # type: ignore[arg-type]
        device_mesh=mesh,
        node_group_size=min(size, get_local_size(world_size)),
        use_inter_host_allreduce=True,  # groups of neighbors
    )
    environment.output_dtensor = (
        False  # ShardedTensors of the group: checkpoints are then those of a job without groups
    )
    return environment


def group_plan(plan: ShardingPlan, size: int, device: torch.device) -> ShardingPlan:
    """A plan of ranks 0 to size - 1 -> the same for this process's group.

    Raises:
        PlanError: a table has a cache, which would not notice that its rows were averaged.
    """
    world_size = dist.get_world_size()
    first = dist.get_rank() // size * size
    content = plan_to_dict(plan)
    for tables in content.values():
        for name, table in tables.items():
            if table["compute_kernel"] == CACHING:
                raise PlanError(
                    f"table {name!r}: {CACHING} keeps copies of rows on the device, which averaging over replica "
                    "groups would not reach; use fused or fused_uvm, or sharding.replicas: 1"
                )
            table["shards"] = [{**shard, "rank": shard["rank"] + first} for shard in table["shards"]]
    return plan_from_dict(content, local_world_size=get_local_size(world_size), device_type=device.type)


class Averaging:
    """Averages the tables of a model from `shard_model(..., replicas=...)` and their optimizer state over the groups.

    Afterwards all groups hold the same bits. A collective of all processes.

    Args:
        optimizer: of the tables (`table_optimizer`).
        every: steps between two averagings.
    """

    def __init__(self, sharded: nn.Module, optimizer: KeyedOptimizer, *, every: int) -> None:
        if every < 1:
            raise PlanError(f"sync_every must be at least 1, got {every}")
        self.sharded, self.optimizer, self.every = sharded, optimizer, every
        environment = sharded._env
        assert isinstance(environment, ShardingEnv2D), "made without replicas"
        self.group, self.count = environment.replica_pg, environment.num_sharding_groups()
        self._averaged = -1

    def after(self, step: int) -> None:
        """To be called after every step, counted from 1."""
        if step % self.every == 0:
            self.now(step)

    @torch.no_grad()
    def now(self, step: int) -> None:
        """Averages, if it has not been done after this step."""
        if step == self._averaged:
            return
        self._averaged = step
        for state in (self.sharded.state_dict(), self.optimizer.state_dict()):
            for shard in _shards(state):
                for values in shard.view(-1).split(CHUNK_VALUES):
                    total = values.float()  # itself, if it is fp32
                    dist.all_reduce(total, group=self.group)
                    values.copy_(total.div_(self.count))


def _shards(state: Mapping[str, Any]) -> Iterator[Tensor]:
    """This process's pieces, in the same order on the processes of all groups that hold the same ones."""
    for key in sorted(state):
        value = state[key]
        if isinstance(value, Mapping):
            yield from _shards(value)
        elif isinstance(value, ShardedTensor):
            yield from (shard.tensor.detach() for shard in value.local_shards())
