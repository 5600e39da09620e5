"""Model + number of processes -> sharding plan: which process holds which rows and columns of which table.

Every plan is the same on every process, uses fused kernels only (so every table keeps the optimizer that was applied to
it) and never replicates a table.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType

from hmoe_rec import io
from hmoe_rec.sharding.plan_file import (
    Tables,
    check_plan,
    collections_of,
    load_plan,
    plan_from_dict,
    plan_to_dict,
    tables_of,
)
from hmoe_rec.suggest import nearest
from hmoe_rec.types import PlanError

KINDS = ("auto", "table_wise", "row_wise", "column_wise")
FUSED = EmbeddingComputeKernel.FUSED.value
GB, MS = 1024**3, 1e3
RESERVED = 0.15  # share of the device's memory that "auto" leaves to the dense part and to activations
Assignment = dict[str, dict[str, Callable]]  # module path -> table -> TorchRec's generator of its sharding


def sharders() -> list[ModuleSharder[nn.Module]]:
    return [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]  # type: ignore[list-item]


def make_plan(
    module: nn.Module,
    *,
    kind: str,
    world_size: int,
    local_world_size: int,
    device_type: str,
    batch_size: int = 512,
) -> ShardingPlan:
    """A plan for the unsharded `module` (tables may be on the meta device).

    ============  =====================================================================================================
    auto          TorchRec's planner chooses table-wise, row-wise or (several machines) table-row-wise by estimated time
                  and memory. Collective if there is a process group of `world_size`: rank 0 plans, all take its plan.
    table_wise    whole tables, the largest first onto the process with the fewest bytes
    row_wise      every table cut into blocks of rows, except those too small to give every process a row
    column_wise   every table cut into column blocks whose widths are multiples of 4; narrow ones stay whole. Row-wise
                  Adagrad then keeps one statistic per row *and block*: training differs slightly from other plans.
    a path        plan file (plan_file.py) made for this model and world size
    ============  =====================================================================================================

    Args:
        local_world_size: processes per machine.
        device_type: "cpu" or "cuda".
        batch_size: examples per process, for the estimates of "auto".

    Raises:
        PlanError: no plan fits, an unknown kind, or a plan file that does not belong to this model and world size.
    """
    if kind in KINDS:
        if kind == "auto":
            plan = _auto_on_rank_zero(module, world_size, local_world_size, device_type, batch_size)
        else:
            assign = {"table_wise": _table_wise, "row_wise": _row_wise, "column_wise": _column_wise}[kind]
            plan = _construct(module, assign(tables_of(module), world_size), world_size, local_world_size, device_type)
        check_plan(plan, module, world_size=world_size)
        return plan
    if not io.exists(kind):
        guess = nearest(kind, KINDS)
        remedy = (
            f"did you mean {guess!r}?" if guess else f"expected one of {', '.join(KINDS)}, or the path of a plan file"
        )
        raise PlanError(f"sharding plan {kind!r}: no such kind and no such file; {remedy}")
    return load_plan(kind, module, world_size=world_size, local_world_size=local_world_size, device_type=device_type)


def _table_wise(tables: Tables, world_size: int) -> Assignment:
    load = [0] * world_size
    result: Assignment = {}
    for path, table, rows, dim in _largest_first(tables):
        rank = load.index(min(load))
        load[rank] += rows * dim
        result.setdefault(path, {})[table] = table_wise(rank=rank, compute_kernel=FUSED)
    return result


def _row_wise(tables: Tables, world_size: int) -> Assignment:
    result = _table_wise(tables, world_size)
    for path, members in tables.items():
        cut = {table: row_wise(compute_kernel=FUSED) for table, (rows, _) in members.items() if fills(rows, world_size)}
        result[path] = result[path] | cut
    return result


def fills(rows: int, num_shards: int) -> bool:
    """Whether every one of TorchRec's `num_shards` equal blocks of ceil(rows / num_shards) rows holds a row.

    An empty shard beside tables of another width trains wrong values on CPU without an error (measured with torchrec
    1.8), and alone it raises.
    """
    return (num_shards - 1) * -(-rows // num_shards) < rows


def _column_wise(tables: Tables, world_size: int) -> Assignment:
    load = [0] * world_size
    result: Assignment = {}
    for path, table, rows, dim in _largest_first(tables):
        num_blocks = next(n for n in range(world_size, 0, -1) if n == 1 or dim % (4 * n) == 0)
        ranks = sorted(sorted(range(world_size), key=lambda rank: (load[rank], rank))[:num_blocks])
        for rank in ranks:
            load[rank] += rows * dim // num_blocks
        whole = num_blocks == 1
        generator = table_wise(ranks[0], compute_kernel=FUSED) if whole else column_wise(ranks, compute_kernel=FUSED)
        result.setdefault(path, {})[table] = generator
    return result


def _largest_first(tables: Tables) -> list[tuple[str, str, int, int]]:
    flat = [(path, table, rows, dim) for path, members in tables.items() for table, (rows, dim) in members.items()]
    return sorted(flat, key=lambda x: (-x[2] * x[3], x[0], x[1]))


def _construct(
    module: nn.Module, assignment: Assignment, world_size: int, local: int, device_type: str
) -> ShardingPlan:
    by_module = {s.module_type: s for s in sharders()}
    return ShardingPlan(
        {
            path: construct_module_sharding_plan(
                collection, assignment[path], by_module[type(collection)], local, world_size, device_type
            )
            for path, collection in collections_of(module).items()
        }
    )


def _auto_on_rank_zero(
    module: nn.Module, world_size: int, local_world_size: int, device_type: str, batch_size: int
) -> ShardingPlan:
    if not (dist.is_initialized() and dist.get_world_size() == world_size):
        return _auto(module, world_size, local_world_size, device_type, batch_size)
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [plan_to_dict(_auto(module, world_size, local_world_size, device_type, batch_size))]
        except PlanError as error:
            result = [error]
    dist.broadcast_object_list(result, src=0)
    if isinstance(result[0], PlanError):
        raise result[0]
    return plan_from_dict(result[0], local_world_size=local_world_size, device_type=device_type)


def _auto(module: nn.Module, world_size: int, local_world_size: int, device_type: str, batch_size: int) -> ShardingPlan:
    # column_wise is left out because it changes row-wise Adagrad, data_parallel because it leaves the fused optimizer.
    def constraint(rows: int) -> ParameterConstraints:
        by_row = {ShardingType.ROW_WISE: world_size, ShardingType.TABLE_ROW_WISE: local_world_size}
        types = [ShardingType.TABLE_WISE, *(t for t, num_shards in by_row.items() if fills(rows, num_shards))]
        return ParameterConstraints(sharding_types=[t.value for t in types], compute_kernels=[FUSED])

    constraints = {t: constraint(rows) for tables in tables_of(module).values() for t, (rows, _) in tables.items()}
    planner = EmbeddingShardingPlanner(
        topology=_topology(world_size, local_world_size, device_type),
        batch_size=max(1, batch_size),
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(RESERVED),
        # The greedy proposers alone get stuck in poor plans of many tables; the uniform one alone misses mixed plans.
        proposer=[UniformProposer(), GreedyProposer(threshold=10), GreedyProposer(use_depth=False, threshold=10)],
        stats=NoopEmbeddingStats(),
        debug=False,
        timeout_seconds=120,
    )
    try:
        return planner.plan(module, sharders())
    except (PlannerError, RuntimeError) as error:
        size = sum(4 * rows * dim for tables in tables_of(module).values() for rows, dim in tables.values()) / GB
        memory = _memory_per_process(local_world_size, device_type) / GB
        raise PlanError(
            f"no sharding plan for {world_size} processes ({local_world_size} per machine) with {memory:.1f} GB each "
            f"({device_type}) and tables of {size:.1f} GB: {str(error).splitlines()[0].strip()} Use more processes, "
            "fewer rows, narrower tables, or a plan file"
        ) from error


def _memory_per_process(local_world_size: int, device_type: str) -> int:
    if device_type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80 * GB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_world_size


def _topology(world_size: int, local_world_size: int, device_type: str) -> Topology:
    ram = _memory_per_process(local_world_size, "cpu")
    hbm = _memory_per_process(local_world_size, "cuda") if device_type == "cuda" else 0
    # Bytes per ms of an H100 machine; their ratios steer the choice, and on CPU only memory does.
    hardware = HardwareConfig(
        hbm_cap_bytes=hbm,
        ddr_cap_bytes=ram,
        hbm_mem_bw=3350e9 / MS,
        ddr_mem_bw=300e9 / MS,
        hbm_to_ddr_mem_bw=50e9 / MS,
        intra_host_bw=400e9 / MS,
        inter_host_bw=50e9 / MS,
    )
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=world_size, local_world_size=local_world_size, hbm_cap_bytes=hbm, ddr_cap_bytes=ram),
        hardware,
        KernelConfig(compute_device=device_type),
    )
