"""Sharding plan <-> JSON, and the one check that every plan passes before it is used.

The file names the world size and every table's size, so that a plan for another job or model is refused. Reading it
runs no code.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from hmoe_rec import io
from hmoe_rec.suggest import nearest
from hmoe_rec.types import PlanError

SCHEMA = "hmoe_rec.sharding_plan"
VERSION = 1
POOLED_TYPES = tuple(
    t.value
    for t in (
        ShardingType.TABLE_WISE,
        ShardingType.ROW_WISE,
        ShardingType.COLUMN_WISE,
        ShardingType.TABLE_ROW_WISE,
        ShardingType.TABLE_COLUMN_WISE,
        ShardingType.GRID_SHARD,
    )
)
UNPOOLED_TYPES = POOLED_TYPES[:3]
HOST_TYPES = (ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)
FUSED_KERNELS = (
    EmbeddingComputeKernel.FUSED.value,
    EmbeddingComputeKernel.FUSED_UVM.value,
    EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
)

Tables = dict[str, dict[str, tuple[int, int]]]  # module path -> table -> (rows, dim)


def save_plan(plan: ShardingPlan, module: nn.Module, uri: str, *, world_size: int, local_world_size: int) -> None:
    """Writes `plan`, made for the unsharded `module`, as JSON."""
    check_plan(plan, module, world_size=world_size)
    content = {
        "schema": SCHEMA,
        "version": VERSION,
        "world_size": world_size,
        "local_world_size": local_world_size,
        "tables": tables_of(module),
        "plan": plan_to_dict(plan),
    }
    with io.open(uri, "w") as file:
        json.dump(content, file, indent=1)


def load_plan(uri: str, module: nn.Module, *, world_size: int, local_world_size: int, device_type: str) -> ShardingPlan:
    """Reads a plan for exactly this model (unsharded) and this many processes.

    Raises:
        PlanError: not a plan file, or one for another model, world size or version, or one that check_plan refuses.
    """
    content = _read(uri)
    if content.get("schema") != SCHEMA or content.get("version") != VERSION:
        raise PlanError(
            f"{uri}: expected a JSON object with schema {SCHEMA!r}, version {VERSION}; got schema "
            f"{content.get('schema')!r}, version {content.get('version')!r}"
        )
    if content.get("world_size") != world_size:
        raise PlanError(
            f"{uri}: plan for {content.get('world_size')} processes, this job has {world_size}: make a new one "
            "(sharding.plan=auto) or start that many processes"
        )
    try:
        planned = {m: {t: (size[0], size[1]) for t, size in tables.items()} for m, tables in content["tables"].items()}
        plan = plan_from_dict(content["plan"], local_world_size=local_world_size, device_type=device_type)
        types = {p.sharding_type for tables in plan.plan.values() for p in tables.values()}  # type: ignore[attr-defined]
        planned_local = content["local_world_size"]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise PlanError(f"{uri}: damaged plan: {type(error).__name__} {error}; make it again") from error
    if planned_local != local_world_size and types & set(HOST_TYPES):
        raise PlanError(
            f"{uri}: shards ({', '.join(sorted(types & set(HOST_TYPES)))}) for {planned_local} processes per machine, "
            f"here are {local_world_size}: make a new plan"
        )
    _compare_tables(planned, tables_of(module), f"{uri}: plan of another model: ")
    check_plan(plan, module, world_size=world_size, where=f"{uri}: ")
    return plan


def plan_to_dict(plan: ShardingPlan) -> dict[str, Any]:
    """JSON-able; module path -> table -> {sharding_type, compute_kernel, shards: [{rank, sizes, offsets}]}."""
    return {m: {t: _table_to_dict(p) for t, p in tables.items()} for m, tables in plan.plan.items()}  # type: ignore[attr-defined]


def plan_from_dict(content: Mapping[str, Any], *, local_world_size: int, device_type: str) -> ShardingPlan:
    """Inverse of plan_to_dict, on devices of `device_type` (a plan made without a GPU may be used with GPUs)."""

    def table(x: Mapping[str, Any]) -> ParameterSharding:
        shards = [
            ShardMetadata(
                shard_offsets=[int(v) for v in s["offsets"]],
                shard_sizes=[int(v) for v in s["sizes"]],
                placement=placement(device_type, int(s["rank"]), local_world_size),
            )
            for s in x["shards"]
        ]
        return ParameterSharding(
            sharding_type=str(x["sharding_type"]),
            compute_kernel=str(x["compute_kernel"]),
            ranks=[int(s["rank"]) for s in x["shards"]],
            sharding_spec=EnumerableShardingSpec(shards) if shards else None,
        )

    return ShardingPlan(
        {m: EmbeddingModuleShardingPlan({t: table(x) for t, x in tables.items()}) for m, tables in content.items()}
    )


def check_plan(plan: ShardingPlan, module: nn.Module, *, world_size: int, where: str = "sharding plan: ") -> None:
    """That `plan` places every value of every table of the unsharded `module` once, on kernels that train right.

    Raises:
        PlanError: with the table and what to do.
    """
    planned = {m: dict.fromkeys(tables, (0, 0)) for m, tables in plan.plan.items()}  # type: ignore[attr-defined]
    actual = tables_of(module)
    _compare_tables(planned, actual, where, sizes=False)
    for path, collection in collections_of(module).items():
        allowed = POOLED_TYPES if isinstance(collection, EmbeddingBagCollection) else UNPOOLED_TYPES
        for table, parameter in plan.plan[path].items():  # type: ignore[attr-defined]
            _check_table(f"{where}table {table!r}", parameter, actual[path][table], allowed, world_size)


def collections_of(module: nn.Module) -> dict[str, EmbeddingBagCollection | EmbeddingCollection]:
    """Path -> unsharded TorchRec collection."""
    kinds = (EmbeddingBagCollection, EmbeddingCollection)
    return {path: m for path, m in module.named_modules() if isinstance(m, kinds)}


def tables_of(module: nn.Module) -> Tables:
    result: Tables = {}
    for path, collection in collections_of(module).items():
        bags = isinstance(collection, EmbeddingBagCollection)
        configs = collection.embedding_bag_configs() if bags else collection.embedding_configs()
        result[path] = {c.name: (c.num_embeddings, c.embedding_dim) for c in configs}
    return result


def _table_to_dict(parameter: ParameterSharding) -> dict[str, Any]:
    spec = parameter.sharding_spec
    shards = spec.shards if isinstance(spec, EnumerableShardingSpec) else []
    return {
        "sharding_type": parameter.sharding_type,
        "compute_kernel": parameter.compute_kernel,
        "shards": [{"rank": _rank(s), "sizes": list(s.shard_sizes), "offsets": list(s.shard_offsets)} for s in shards],
    }


def _rank(shard: ShardMetadata) -> int:
    rank = shard.placement.rank()  # type: ignore[union-attr]
    if rank is None:
        raise PlanError(f"a shard is placed at {shard.placement}, which names no rank")
    return rank


def _read(uri: str) -> dict[str, Any]:
    try:
        with io.open(uri, "r") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise PlanError(
            f"{uri}: no such plan file; expected a path, or auto, table_wise, row_wise, column_wise"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{uri}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise PlanError(f"{uri}: expected a JSON object, got a {type(content).__name__}")
    return content


def _compare_tables(planned: Mapping[str, Mapping], actual: Tables, where: str, sizes: bool = True) -> None:
    given = {(m, t): tuple(size) for m, tables in planned.items() for t, size in tables.items()}
    wanted = {(m, t): size for m, tables in actual.items() for t, size in tables.items()}
    names = sorted({t for _, t in given})
    for path, table in wanted.keys() - given.keys():
        near = nearest(table, names)
        hint = f"; it has {near!r}" if near else ""
        raise PlanError(f"{where}table {table!r} of module {path!r} is missing{hint}: make a plan for this model")
    for path, table in given.keys() - wanted.keys():
        raise PlanError(f"{where}table {table!r} of module {path!r} is not in the model: make a plan for this model")
    for key, size in wanted.items():
        if sizes and given[key] != size:
            raise PlanError(
                f"{where}table {key[1]!r} has {given[key][0]} rows x {given[key][1]} in the plan, {size[0]} x "
                f"{size[1]} in the model: make a plan for this model"
            )


def _check_table(
    where: str, parameter: ParameterSharding, size: tuple[int, int], allowed: tuple[str, ...], world_size: int
) -> None:
    kind, kernel = parameter.sharding_type, parameter.compute_kernel
    if kind == ShardingType.DATA_PARALLEL.value:
        raise PlanError(
            f"{where}: data_parallel would take it out of the tables' optimizer (it would be trained by the dense one, "
            f"with other numbers); use one of {', '.join(allowed)}"
        )
    if kind not in allowed:
        raise PlanError(f"{where}: sharding type {kind!r}; expected one of {', '.join(allowed)}")
    if kernel not in FUSED_KERNELS:
        raise PlanError(
            f"{where}: kernel {kernel!r}; expected one of {', '.join(FUSED_KERNELS)}: other kernels drop the tables' "
            "optimizer, and the dense one gives wrong values for sequences on CPU"
        )
    spec = parameter.sharding_spec
    if not isinstance(spec, EnumerableShardingSpec) or not spec.shards:
        raise PlanError(f"{where}: no shards; make the plan again")
    for shard in spec.shards:
        if not 0 <= _rank(shard) < world_size:
            raise PlanError(f"{where}: a shard on rank {_rank(shard)}, but ranks are 0 to {world_size - 1}")
        if 0 in shard.shard_sizes:
            raise PlanError(
                f"{where}: the shard of rank {_rank(shard)} is empty, beside which other tables train wrong values; "
                f"keep a table of {size[0]} rows whole (table_wise)"
            )
    _check_tiling(where, spec.shards, size)
    if kind == ShardingType.TABLE_WISE.value and len(spec.shards) != 1:
        raise PlanError(f"{where}: table_wise takes one shard, got {len(spec.shards)}")
    if kind == ShardingType.ROW_WISE.value and [_rank(s) for s in spec.shards] != list(range(world_size)):
        raise PlanError(
            f"{where}: row_wise takes one shard per process, in order; got ranks {[_rank(s) for s in spec.shards]}"
        )


def _check_tiling(where: str, shards: list[ShardMetadata], size: tuple[int, int]) -> None:
    """The shards cover a rows x dim table, each value once."""
    bands: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (first row, last row + 1) -> the same of its columns
    for s in shards:
        (row, column), (rows, columns) = s.shard_offsets, s.shard_sizes
        bands.setdefault((row, row + rows), []).append((column, column + columns))
    if not (_partition(bands, size[0]) and all(_partition(band, size[1]) for band in bands.values())):
        raise PlanError(f"{where}: its shards do not cover {size[0]} rows x {size[1]} columns exactly once")


def _partition(intervals: Iterable[tuple[int, int]], length: int) -> bool:
    """The intervals, sorted, lead from 0 to `length` without gap or overlap."""
    end = 0
    for begin, stop in sorted(intervals):
        if begin != end:
            return False
        end = stop
    return end == length
