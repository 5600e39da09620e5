"""Sharding plan <-> JSON, and the one check that every plan passes before it is used.

The file names the world size and every table's size and precision, so that a plan for another job or model is refused,
and carries the prediction that was made with the plan. Reading it runs no code. Version 1 had no prediction; a file
without precisions is for tables of any.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from hmoe_rec import io
from hmoe_rec.sharding.constraints import DENSE, HOST_TYPES, KERNELS, POOLED_TYPES, REPLICATED, UNPOOLED_TYPES
from hmoe_rec.sharding.options import ROW_CUT
from hmoe_rec.sharding.prediction import PlanPrediction
from hmoe_rec.suggest import nearest
from hmoe_rec.types import PlanError

SCHEMA = "hmoe_rec.sharding_plan"
VERSION = 2
READABLE = (1, 2)
FUSED_KERNELS = KERNELS

Tables = dict[str, dict[str, tuple[int, int]]]  # module path -> table -> (rows, dim)
DataTypes = dict[str, dict[str, str]]  # module path -> table -> precision


@dataclass(frozen=True)
class PlanFile:
    """A plan file, whatever model it is for.

    Attributes:
        tables: module path -> table -> (rows, dim).
        plan: module path -> table -> what `plan_to_dict` gives.
        prediction: None in version 1 and for plans that nobody estimated.
        data_types: module path -> table -> fp32, fp16, ...; empty in older files.
    """

    world_size: int
    local_world_size: int
    tables: Tables
    plan: dict[str, dict[str, Any]]
    prediction: PlanPrediction | None = None
    data_types: DataTypes = field(default_factory=dict)


def save_plan(
    plan: ShardingPlan,
    module: nn.Module,
    uri: str,
    *,
    world_size: int,
    local_world_size: int,
    prediction: PlanPrediction | None = None,
) -> None:
    """Writes `plan`, made for the unsharded `module`, as JSON."""
    check_plan(plan, module, world_size=world_size, local_world_size=local_world_size)
    content = {
        "schema": SCHEMA,
        "version": VERSION,
        "world_size": world_size,
        "local_world_size": local_world_size,
        "tables": tables_of(module),
        "data_types": data_types_of(module),
        "plan": plan_to_dict(plan),
        "prediction": None if prediction is None else prediction.to_dict(),
    }
    io.write_text(uri, json.dumps(content, indent=1))


def read_plan(uri: str) -> PlanFile:
    """A plan file as data, to look at or to compare; nothing is checked against a model.

    Raises:
        PlanError: no plan file, another version, or damaged.
    """
    content = _read(uri)
    if content.get("schema") != SCHEMA or content.get("version") not in READABLE:
        raise PlanError(
            f"{uri}: expected a JSON object with schema {SCHEMA!r}, version {VERSION}; got schema "
            f"{content.get('schema')!r}, version {content.get('version')!r}"
        )
    try:
        prediction = content.get("prediction")
        file = PlanFile(
            world_size=int(content["world_size"]),
            local_world_size=int(content["local_world_size"]),
            tables={m: {t: (s[0], s[1]) for t, s in tables.items()} for m, tables in content["tables"].items()},
            plan=content["plan"],
            prediction=None if prediction is None else PlanPrediction.from_dict(prediction),
            data_types={m: dict(tables) for m, tables in content.get("data_types", {}).items()},
        )
        for tables in file.plan.values():
            for table in tables.values():
                _ = table["sharding_type"], table["compute_kernel"]
                _ = [(int(s["rank"]), tuple(s["sizes"]), tuple(s["offsets"])) for s in table["shards"]]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise PlanError(f"{uri}: damaged plan: {type(error).__name__} {error}; make it again") from error
    return file


def load_plan(
    uri: str,
    module: nn.Module,
    *,
    world_size: int,
    local_world_size: int,
    device_type: str,
    user: str = "this job",
) -> ShardingPlan:
    """Reads a plan for exactly this model (unsharded) and this many processes.

    Args:
        user: whose processes they are, for the message.

    Raises:
        PlanError: not a plan file, or one for another model, world size or version, or one that check_plan refuses.
    """
    file = read_plan(uri)
    if file.world_size != world_size:
        raise PlanError(
            f"{uri}: plan for {file.world_size} processes, {user} has {world_size}: make a new one "
            "(sharding.plan=auto) or start that many processes"
        )
    try:
        plan = plan_from_dict(file.plan, local_world_size=local_world_size, device_type=device_type)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise PlanError(f"{uri}: damaged plan: {type(error).__name__} {error}; make it again") from error
    types = {p.sharding_type for tables in plan.plan.values() for p in tables.values()}  # type: ignore[attr-defined]
    if file.local_world_size != local_world_size and types & set(HOST_TYPES):
        raise PlanError(
            f"{uri}: shards ({', '.join(sorted(types & set(HOST_TYPES)))}) for {file.local_world_size} processes per "
            f"machine, here are {local_world_size}: make a new plan"
        )
    _compare_tables(file.tables, tables_of(module), f"{uri}: plan of another model: ")
    _compare_data_types(file.data_types, data_types_of(module), f"{uri}: ")
    check_plan(plan, module, world_size=world_size, local_world_size=local_world_size, where=f"{uri}: ")
    return plan


@dataclass(frozen=True)
class Difference:
    """One thing in which two plans differ.

    Attributes:
        table: None = the whole plan.
        what: "world size", "only in one", "size", "precision", "sharding type", "kernel", "shards" (how many), "sizes"
            (of as many shards), "processes" or a predicted value, such as "predicted ms of the busiest process".
        first, second: its value in the one and in the other.
    """

    table: str | None
    what: str
    first: Any
    second: Any

    @property
    def is_predicted(self) -> bool:
        return self.what.startswith("predicted ")

    def __str__(self) -> str:
        return f"{self.table or 'plan'}: {self.what}: {_shown(self.first)} -> {_shown(self.second)}"


def diff_plans(first: PlanFile, second: PlanFile) -> list[Difference]:
    """What changes from one plan to the other: the whole first, then table by table."""
    result = [
        Difference(None, what, a, b)
        for what, a, b in (
            ("world size", first.world_size, second.world_size),
            ("processes per machine", first.local_world_size, second.local_world_size),
        )
        if a != b
    ]
    if first.prediction is not None and second.prediction is not None:
        pairs = zip(_predicted(first.prediction), _predicted(second.prediction), strict=True)
        result += [Difference(None, what, a, b) for (what, a), (_, b) in pairs if a != b]
    ours, theirs = (
        {(m, t): (file.tables.get(m, {}).get(t), x) for m, tables in file.plan.items() for t, x in tables.items()}
        for file in (first, second)
    )
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in ours or key not in theirs:
            result.append(Difference(key[1], "only in one", key in ours, key in theirs))
            continue
        (size, a), (other_size, b) = ours[key], theirs[key]
        values = {
            "size": (size, other_size),
            "precision": tuple(file.data_types.get(key[0], {}).get(key[1]) for file in (first, second)),
            "sharding type": (a["sharding_type"], b["sharding_type"]),
            "kernel": (a["compute_kernel"], b["compute_kernel"]),
            "cache load factor": (a.get("cache_load_factor"), b.get("cache_load_factor")),
            "shards": (len(a["shards"]), len(b["shards"])),
            "sizes": ([s["sizes"] for s in a["shards"]], [s["sizes"] for s in b["shards"]]),
            "processes": ([s["rank"] for s in a["shards"]], [s["rank"] for s in b["shards"]]),
        }
        changed = {what: pair for what, pair in values.items() if pair[0] != pair[1]}
        if "shards" in changed:
            changed.pop("sizes", None)
            changed.pop("processes", None)
        result += [Difference(key[1], what, *pair) for what, pair in changed.items()]
    return result


def _predicted(prediction: PlanPrediction) -> list[tuple[str, float]]:
    fullest = {kind: max(sum(getattr(r, kind).values()) for r in prediction.ranks) for kind in ("hbm", "ddr")}
    return [
        ("predicted ms of the busiest process", round(prediction.critical_ms, 4)),
        ("predicted imbalance", round(prediction.imbalance, 4)),
        *((f"predicted {kind} bytes of the fullest process", held) for kind, held in fullest.items()),
    ]


def _shown(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
            cache_params=None if (load := x.get("cache_load_factor")) is None else CacheParams(load_factor=float(load)),
        )

    return ShardingPlan(
        {m: EmbeddingModuleShardingPlan({t: table(x) for t, x in tables.items()}) for m, tables in content.items()}
    )


def check_plan(
    plan: ShardingPlan,
    module: nn.Module,
    *,
    world_size: int,
    local_world_size: int | None = None,
    where: str = "sharding plan: ",
) -> None:
    """That `plan` places every value of every table of the unsharded `module` once (replicated ones everywhere), on
    kernels that train right.

    Args:
        local_world_size: processes per machine, to check what is bound to machines; None = not checked.

    Raises:
        PlanError: with the table and what to do.
    """
    planned = {m: dict.fromkeys(tables, (0, 0)) for m, tables in plan.plan.items()}  # type: ignore[attr-defined]
    actual = tables_of(module)
    _compare_tables(planned, actual, where, sizes=False)
    data_types = data_types_of(module)
    for path, collection in collections_of(module).items():
        pooled = isinstance(collection, EmbeddingBagCollection)
        allowed = POOLED_TYPES if pooled else UNPOOLED_TYPES
        if not pooled:
            _check_blocks(where, path, plan.plan[path])  # type: ignore[attr-defined]
        for table, parameter in plan.plan[path].items():  # type: ignore[attr-defined]
            if parameter.sharding_type == REPLICATED:
                _check_replicated(f"{where}table {table!r}", parameter, data_types[path][table], allowed)
                continue
            _check_table(f"{where}table {table!r}", parameter, actual[path][table], allowed, world_size)
            if local_world_size is not None and parameter.sharding_type in HOST_TYPES:
                _check_hosts(f"{where}table {table!r}", parameter, local_world_size)


def collections_of(module: nn.Module) -> dict[str, EmbeddingBagCollection | EmbeddingCollection]:
    """Path -> unsharded TorchRec collection."""
    kinds = (EmbeddingBagCollection, EmbeddingCollection)
    return {path: m for path, m in module.named_modules() if isinstance(m, kinds)}


def tables_of(module: nn.Module) -> Tables:
    return {
        path: {c.name: (c.num_embeddings, c.embedding_dim) for c in configs_of(collection)}
        for path, collection in collections_of(module).items()
    }


def data_types_of(module: nn.Module) -> DataTypes:
    return {
        path: {c.name: str(c.data_type.value).lower() for c in configs_of(collection)}
        for path, collection in collections_of(module).items()
    }


def configs_of(collection: EmbeddingBagCollection | EmbeddingCollection) -> Sequence[BaseEmbeddingConfig]:
    """Of its tables."""
    bags = isinstance(collection, EmbeddingBagCollection)
    return collection.embedding_bag_configs() if bags else collection.embedding_configs()


def _table_to_dict(parameter: ParameterSharding) -> dict[str, Any]:
    spec, cache = parameter.sharding_spec, parameter.cache_params
    shards = spec.shards if isinstance(spec, EnumerableShardingSpec) else []
    result = {
        "sharding_type": parameter.sharding_type,
        "compute_kernel": parameter.compute_kernel,
        "shards": [{"rank": _rank(s), "sizes": list(s.shard_sizes), "offsets": list(s.shard_offsets)} for s in shards],
    }
    return result if cache is None or cache.load_factor is None else {**result, "cache_load_factor": cache.load_factor}


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


def _compare_data_types(planned: DataTypes, actual: DataTypes, where: str) -> None:
    for path, tables in actual.items():
        for table, data_type in tables.items():
            given = planned.get(path, {}).get(table, data_type)
            if given != data_type:
                raise PlanError(
                    f"{where}table {table!r} is {given} in the plan, {data_type} in the model (model.table_precision, "
                    "model.table_precisions): its memory was planned for another model; make a new plan"
                )


def _check_replicated(where: str, parameter: ParameterSharding, data_type: str, allowed: tuple[str, ...]) -> None:
    if parameter.compute_kernel != DENSE or parameter.sharding_spec is not None:
        raise PlanError(
            f"{where}: data_parallel takes kernel {DENSE!r} and no shards (every process holds the table whole); got "
            f"kernel {parameter.compute_kernel!r}; make the plan again"
        )
    if data_type != "fp32":
        raise PlanError(
            f"{where}: data_parallel takes fp32 tables only, this one is {data_type}, in which its gradient would be "
            f"summed; use one of {', '.join(t for t in allowed if t != REPLICATED)}"
        )


def _check_blocks(where: str, path: str, tables: Mapping[str, ParameterSharding]) -> None:
    """One width for all column blocks of a collection of sequences: otherwise TorchRec fails or damages its memory."""
    widths = {
        table: [int(s.shard_sizes[1]) for s in p.sharding_spec.shards]
        for table, p in tables.items()
        if p.sharding_type == ShardingType.COLUMN_WISE.value and isinstance(p.sharding_spec, EnumerableShardingSpec)
    }
    first = next(iter(widths), None)
    for table, given in widths.items():
        if first is not None and set(given) != {widths[first][0]}:
            others = f" and those of table {first!r} are {widths[first][0]} wide" if table != first else ""
            raise PlanError(
                f"{where}table {table!r} of {path!r} has column blocks of widths {', '.join(map(str, given))}{others}: "
                "TorchRec cuts all column-wise tables of sequences in a collection into blocks of one width; cut them "
                "alike, or shard them table_wise or row_wise"
            )


def _check_table(
    where: str, parameter: ParameterSharding, size: tuple[int, int], allowed: tuple[str, ...], world_size: int
) -> None:
    kind, kernel = parameter.sharding_type, parameter.compute_kernel
    if kind not in allowed:
        raise PlanError(f"{where}: sharding type {kind!r}; expected one of {', '.join(allowed)}")
    if kernel not in FUSED_KERNELS:
        raise PlanError(
            f"{where}: kernel {kernel!r}; expected one of {', '.join(FUSED_KERNELS)}: other kernels drop the tables' "
            f"optimizer ({DENSE!r} is for data_parallel only)"
        )
    load = None if parameter.cache_params is None else parameter.cache_params.load_factor
    if load is not None and not 0 < load <= 1:
        raise PlanError(f"{where}: cache_load_factor {load:g}; expected a share of the rows, above 0 and at most 1")
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
    if kind in ROW_CUT:
        _check_rows(f"{where}: {kind}", spec.shards, size[0])
    if kind == ShardingType.TABLE_WISE.value and len(spec.shards) != 1:
        raise PlanError(f"{where}: table_wise takes one shard, got {len(spec.shards)}")
    if kind == ShardingType.ROW_WISE.value and [_rank(s) for s in spec.shards] != list(range(world_size)):
        raise PlanError(
            f"{where}: row_wise takes one shard per process, in order; got ranks {[_rank(s) for s in spec.shards]}"
        )


def _check_rows(where: str, shards: list[ShardMetadata], rows: int) -> None:
    """Equal blocks of rows in the order of the shards: TorchRec divides ids by them and looks no shard's offset up."""
    columns: dict[int, list[tuple[int, int]]] = {}
    for s in shards:
        columns.setdefault(s.shard_offsets[1], []).append((s.shard_offsets[0], s.shard_sizes[0]))
    for blocks in columns.values():
        block = -(-rows // len(blocks))
        for i, found in enumerate(blocks):
            if found != (i * block, min(block, rows - i * block)):
                raise PlanError(
                    f"{where} takes blocks of {block} rows in the order of the processes; shard {i} has {found[1]} "
                    f"from row {found[0]}, and ids would be looked up in other rows; make the plan again"
                )


def _check_hosts(where: str, parameter: ParameterSharding, local: int) -> None:
    """table_row_wise and grid_shard take all processes of a machine, in order; table_column_wise some of one."""
    ranks = parameter.ranks or []
    if parameter.sharding_type == ShardingType.TABLE_COLUMN_WISE.value:
        right = len({rank // local for rank in ranks}) == 1
    else:
        blocks = [ranks[i : i + local] for i in range(0, len(ranks), local)]
        right = all(b[0] % local == 0 and b == list(range(b[0], b[0] + local)) for b in blocks)
        right = right and (len(blocks) == 1 or parameter.sharding_type == ShardingType.GRID_SHARD.value)
    if not right:
        raise PlanError(
            f"{where}: {parameter.sharding_type} with shards on ranks {ranks}, which are not those of one machine "
            f"({local} processes each) in order; make the plan again"
        )


def _check_tiling(where: str, shards: list[ShardMetadata], size: tuple[int, int]) -> None:
    """The shards cover a rows x dim table, each value once."""
    bands: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (first row, last row + 1) -> the same of its columns
    for s in shards:
        (row, column), (rows, columns) = s.shard_offsets, s.shard_sizes
        bands.setdefault((row, row + rows), []).append((column, column + columns))
    if not (is_partition(bands, size[0]) and all(is_partition(band, size[1]) for band in bands.values())):
        raise PlanError(f"{where}: its shards do not cover {size[0]} rows x {size[1]} columns exactly once")


def is_partition(intervals: Iterable[tuple[int, int]], length: int) -> bool:
    """The intervals, sorted, lead from 0 to `length` without gap or overlap."""
    end = 0
    for begin, stop in sorted(intervals):
        if begin != end:
            return False
        end = stop
    return end == length
