"""Unsharded module + plan + cluster -> what the plan will cost (`PlanPrediction`), whoever made the plan.

Memory and time of a process are the sums over its shards (options.py has the formulas), and per collection and sharding
type the fixed costs of a step.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from hmoe_rec.sharding.constraints import CACHING, REPLICATED, SEPARATOR, Constraints, Rule, rules_of
from hmoe_rec.sharding.options import Cost, Option, Table, Workload, fixed_ms, sent_bytes, shard_cost, shared_ms
from hmoe_rec.sharding.plan_file import collections_of, configs_of, plan_to_dict, tables_of
from hmoe_rec.sharding.prediction import MEMORY, PARTS, Alternative, PlanPrediction, RankPrediction, TablePrediction
from hmoe_rec.sharding.search import Found, Space, make_space
from hmoe_rec.sharding.topology import Cluster
from hmoe_rec.suggest import unknown
from hmoe_rec.types import PlanError
from hmoe_rec.units import format_bytes

DENSE_BYTES = 20  # of a dense parameter: itself, its gradient, DDP's copy of it, Adam's two moments
STATES = {
    "SGD": "none",
    "RowWiseAdagrad": "row",
    "Adagrad": "value",
    "PartialRowWiseAdam": "value",
    "Adam": "two",
    "LAMB": "two",
}


@dataclass(frozen=True)
class Layout:
    """Where a table's shards are.

    Attributes:
        sizes: [shards, 2] rows and columns.
        offsets: [shards, 2].
        ranks: [shards].
    """

    sharding_type: str
    kernel: str
    cache_load_factor: float | None
    sizes: np.ndarray
    offsets: np.ndarray
    ranks: np.ndarray


Layouts = dict[str, dict[str, Layout]]  # module path -> table -> layout


def read_tables(module: nn.Module, constraints: Constraints, cluster: Cluster) -> tuple[list[Table], dict[str, Rule]]:
    """The tables of an unsharded module (their optimizers attached) and the rule of each.

    Raises:
        PlanError: the constraints do not fit tables or cluster.
    """
    tables = []
    for path, collection in collections_of(module).items():
        states = {
            name.split(".")[-2]: _state(getattr(parameter, "_optimizer_classes", []))
            for name, parameter in collection.named_parameters()
        }
        for c in configs_of(collection):
            tables.append(
                Table(
                    module=path,
                    name=c.name,
                    rows=c.num_embeddings,
                    dim=c.embedding_dim,
                    value_bytes=DATA_TYPE_NUM_BITS[c.data_type] // 8,
                    data_type=str(c.data_type.value).lower(),
                    pooled=isinstance(collection, EmbeddingBagCollection),
                    feature_names=tuple(c.feature_names),
                    features=len(c.feature_names),
                    state=states.get(c.name, "row"),
                )
            )
    _check_pooling(constraints.pooling, tables)
    rules = rules_of(constraints, tables, cluster)
    return [_with_ids(t, rules[t.name], constraints) for t in tables], rules


def predict(
    module: nn.Module,
    plan: ShardingPlan,
    cluster: Cluster,
    *,
    batch_size: int = 512,
    constraints: Constraints | None = None,
    communication: str = "fp32",
    gradient_communication: str | None = None,
    reserved: float = 0.15,
) -> PlanPrediction:
    """What a plan for the unsharded `module` will cost: one of `make_plan`, of a file, or made by hand.

    Args:
        constraints: what is known of the ids is read from it, and it marks the alternatives that it excludes.

    Raises:
        PlanError: the constraints do not fit.
    """
    work = Workload(batch_size, communication, reserved, gradient_communication)
    tables, rules = read_tables(module, constraints or Constraints(), cluster)
    space = make_space(tables, rules, cluster, work)
    layouts = layouts_of(plan, module, cluster.world_size)
    return prediction_of(space, layouts, cluster, work, dense_parameters=count_dense(module))


def prediction_of(
    space: Space, layouts: Layouts, cluster: Cluster, work: Workload, *, dense_parameters: int = 0
) -> PlanPrediction:
    world = cluster.world_size
    memory = np.zeros((2, 3, world))  # hbm, ddr; tables, optimizer, activations
    ms = np.zeros((len(PARTS), world))
    callers: dict[tuple[str, bool, str], set[int]] = {}
    costs: dict[tuple, Cost] = {}
    predicted = []
    for i, table in enumerate(space.tables):
        layout = layouts[table.module][table.name]
        total, spent, mine, sent = np.zeros((2, 3)), np.zeros(len(PARTS)), np.zeros(world), Counter[str]()
        for size in np.unique(layout.sizes, axis=0):
            key = (table.kind, layout.sharding_type, layout.kernel, layout.cache_load_factor, *map(int, size))
            if key not in costs:
                rows, columns = map(int, size)
                kind, kernel, load = layout.sharding_type, layout.kernel, layout.cache_load_factor
                costs[key] = shard_cost(table, kind, kernel, rows, columns, cluster, work, load)
            cost, ranks = costs[key], layout.ranks[(layout.sizes == size).all(axis=1)]
            amounts, count = np.array([cost.hbm, cost.ddr], dtype=np.float64), np.bincount(ranks, minlength=world)
            memory += amounts[:, :, None] * count
            ms += np.array(cost.ms)[:, None] * count
            total, spent = total + amounts * len(ranks), spent + np.array(cost.ms) * len(ranks)
            mine += sum(cost.ms) * count
            bytes_of_shard = sent_bytes(table, layout.sharding_type, int(size[1]), cluster, work)
            sent += Counter({part: n * len(ranks) for part, n in bytes_of_shard.items()})
        shared = shared_ms(table, layout.sharding_type, cluster, work)
        ms, spent, mine = ms + shared[:, None], spent + world * shared, mine + shared.sum()
        callers.setdefault((table.module, table.pooled, layout.sharding_type), set()).update(layout.ranks.tolist())
        alternatives = _alternatives(space, i, layout, cluster)
        predicted.append(_table(table, layout, total, spent, float(mine.max()), sent, alternatives))
    _add_fixed_costs(ms, callers, cluster)
    capacity = (cluster.hbm_bytes, cluster.ddr_bytes)
    ranks = tuple(
        RankPrediction(
            rank=r,
            hbm=_by_kind(memory[0, :, r], capacity[0] * work.reserved),
            ddr=_by_kind(memory[1, :, r], capacity[1] * work.reserved),
            ms=dict(zip(PARTS, map(float, ms[:, r]), strict=True)),
        )
        for r in range(world)
    )
    options = {"batch_size": work.batch_size, "communication": work.communication, "reserved": work.reserved}
    if work.gradient_communication is not None:
        options["gradient_communication"] = work.gradient_communication
    return PlanPrediction(
        topology=cluster.to_dict(),
        batch_size=work.batch_size,
        ranks=ranks,
        tables=tuple(predicted),
        planner={"name": "hmoe_rec", **options},
        notes=tuple(_notes(ranks, layouts, cluster, work, dense_parameters)),
    )


def layouts_of(plan: ShardingPlan, module: nn.Module, world_size: int) -> Layouts:
    sizes = tables_of(module)

    def layout(x: Mapping, size: tuple[int, int]) -> Layout:
        shards = x["shards"]
        if x["sharding_type"] == REPLICATED:
            shards = [{"rank": rank, "sizes": size, "offsets": (0, 0)} for rank in range(world_size)]
        return Layout(
            x["sharding_type"],
            x["compute_kernel"],
            x.get("cache_load_factor"),
            np.array([s["sizes"] for s in shards], dtype=np.int64).reshape(-1, 2),
            np.array([s["offsets"] for s in shards], dtype=np.int64).reshape(-1, 2),
            np.array([s["rank"] for s in shards], dtype=np.int64),
        )

    return {
        path: {name: layout(x, sizes[path][name]) for name, x in tables.items()}
        for path, tables in plan_to_dict(plan).items()
    }


def layouts_found(space: Space, found: Found) -> Layouts:
    result: Layouts = {}
    for table, option, ranks in zip(space.tables, found.options, found.ranks, strict=True):
        shards = np.array(list(option.shards(table)), dtype=np.int64)  # row, rows, column, columns
        layout = Layout(
            option.sharding_type, option.kernel, option.cache_load_factor, shards[:, [1, 3]], shards[:, [0, 2]], ranks
        )
        result.setdefault(table.module, {})[table.name] = layout
    return result


def layouts_to_dict(layouts: Layouts) -> dict[str, dict[str, dict]]:
    """The form that `plan_from_dict` reads."""
    return {path: {name: _layout_to_dict(x) for name, x in tables.items()} for path, tables in layouts.items()}


def count_dense(module: nn.Module) -> int:
    tables = tuple(f"{path}." for path in collections_of(module))
    return sum(p.numel() for name, p in module.named_parameters() if not (f"{name}.").startswith(tables))


def _layout_to_dict(x: Layout) -> dict:
    if x.sharding_type == REPLICATED:  # a plan names no places for it
        return {"sharding_type": x.sharding_type, "compute_kernel": x.kernel, "shards": []}
    shards = zip(x.ranks.tolist(), x.sizes.tolist(), x.offsets.tolist(), strict=True)
    result = {
        "sharding_type": x.sharding_type,
        "compute_kernel": x.kernel,
        "shards": [{"rank": rank, "sizes": sizes, "offsets": offsets} for rank, sizes, offsets in shards],
    }
    return result if x.cache_load_factor is None else {**result, "cache_load_factor": x.cache_load_factor}


def _state(classes: list[type]) -> str:
    return STATES.get(classes[0].__name__, "value") if classes else "row"


def _check_pooling(pooling: Mapping[str, float], tables: Sequence[Table]) -> None:
    names = [name for t in tables for name in (t.name, *t.feature_names)]
    known = list(dict.fromkeys(part for name in names for part in (name, name.split(SEPARATOR, 1)[-1])))
    wrong = [unknown("field", name, known) for name in pooling if name not in known]
    if wrong:
        raise PlanError("\n  ".join(["sharding.pooling:", *wrong]))


def _with_ids(table: Table, rule: Rule, constraints: Constraints) -> Table:
    def known(of: Mapping[str, float], name: str) -> float | None:
        return of.get(name, of.get(name.split(SEPARATOR, 1)[-1]))

    def ids_of(feature: str) -> float:
        """The most particular that is known: behaviors, not the field whose table they share."""
        found = [known(constraints.pooling, name) for name in (feature, table.name)]
        return next(x for x in (rule.pooling_factor, *found, 1.0) if x is not None)

    ids = [ids_of(feature) for feature in table.feature_names]
    vectors = sum(min(1.0, n) for n in ids) if table.pooled else sum(ids)
    return replace(table, ids=float(sum(ids)), vectors=float(vectors), distinct=known(constraints.distinct, table.name))


def _add_fixed_costs(ms: np.ndarray, callers: Mapping[tuple[str, bool, str], set[int]], cluster: Cluster) -> None:
    for (_, pooled, kind), ranks in callers.items():
        everyone, holders = fixed_ms(kind, pooled, cluster)
        ms += everyone[:, None]
        ms[:, sorted(ranks)] += holders[:, None]


def _by_kind(amounts: np.ndarray, reserved: float) -> dict[str, int]:
    return dict(zip(MEMORY, (*map(int, amounts), int(reserved)), strict=True))


def _table(
    table: Table,
    layout: Layout,
    total: np.ndarray,
    spent: np.ndarray,
    slowest_ms: float,
    sent: Mapping[str, int],
    alternatives: tuple[Alternative, ...],
) -> TablePrediction:
    embedding_set, _, field = table.name.partition(SEPARATOR)
    return TablePrediction(
        module=table.module,
        table=table.name,
        embedding_set=embedding_set if field else "",
        field=field or table.name,
        rows=table.rows,
        dim=table.dim,
        data_type=table.data_type,
        sharding_type=layout.sharding_type,
        kernel=layout.kernel,
        ranks=tuple(layout.ranks.tolist()),
        hbm_bytes=int(total[0].sum()),
        ddr_bytes=int(total[1].sum()),
        ms=dict(zip(PARTS, map(float, spent), strict=True)),
        alternatives=alternatives,
        slowest_ms=slowest_ms,
        sent=dict(sent),
    )


def _alternatives(space: Space, i: int, layout: Layout, cluster: Cluster) -> tuple[Alternative, ...]:
    """The fastest way of every other type and kernel, the impossible ones last."""
    best: dict[tuple[str, str], Option] = {}
    for option in space.options[i] + space.excluded[i]:
        key = (option.sharding_type, option.kernel)
        if key != (layout.sharding_type, layout.kernel) and (key not in best or option.shard_ms < best[key].shard_ms):
            best[key] = option

    def alternative(o: Option) -> Alternative:
        held = sum(o.cost.hbm if cluster.device == "cuda" else o.cost.ddr)
        return Alternative(o.sharding_type, o.kernel, o.shard_ms, held, o.excluded, o.num_shards)

    possible = sorted(map(alternative, best.values()), key=lambda a: (a.impossible is not None, a.ms or 0.0))
    chosen = (layout.sharding_type, layout.kernel)
    return (*possible, *(a for a in space.impossible[i] if (a.sharding_type, a.kernel) != chosen))


def _notes(ranks: tuple[RankPrediction, ...], layouts: Layouts, cluster: Cluster, work: Workload, dense: int):
    over = max(sum(getattr(r, cluster.memory_kind).values()) for r in ranks)
    if over > cluster.memory_bytes:
        yield (
            f"does not fit: the fullest process needs {format_bytes(over)} of {cluster.memory_kind}, it has "
            f"{format_bytes(cluster.memory_bytes)}"
        )
    if dense * DENSE_BYTES > work.reserved * cluster.memory_bytes:
        room = format_bytes(work.reserved * cluster.memory_bytes)
        share = min(0.95, math.ceil(110 * dense * DENSE_BYTES / cluster.memory_bytes) / 100)
        yield (
            f"the dense part and its optimizer take about {format_bytes(dense * DENSE_BYTES)}, more than the reserved "
            f"{room} of {cluster.memory_kind}: raise sharding.reserved to {share:.2f}"
        )
    if any(x.kernel == CACHING for tables in layouts.values() for x in tables.values()):
        yield "fused_uvm_caching: prefetch time is not predicted (it depends on how often the cache misses)"
