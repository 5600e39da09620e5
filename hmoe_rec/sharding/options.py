"""The ways to shard one table, and what one shard of each costs: memory by kind, milliseconds by part of the step.

A table's cost depends on its size, not on its name, and all shards of a way are alike but the last one: a way is priced
once, whatever the number of processes. No torch in here.

Time follows TorchRec's planner (torchrec/distributed/planner/estimator, 1.8; a test holds them equal), all in bytes
over bytes/ms. Per process: B examples, i ids and v vectors a table (v = 1 per example where ids are pooled, else i),
W processes, L of them on a machine, w columns, b bytes a value, c bytes a sent value::

    ids read        r = 8 B i W / s       s = 1 (table_wise, column_wise), W (row_wise), L (table_row_wise, grid)
    rows read       q = B i W w b / s     at least 32 columns where a table is not cut by rows (GPU)
    vectors written o = B v W w c         divided by s where ids are not pooled
    lookup_forward      = (r + q + o) p / memory bandwidth
                          p = 1.75, 1.15, 1 for w below 64, 128, above (GPU); 1 where rows are cut
    lookup_backward     = 2 lookup_forward
    output_all_to_all   = o / network;  with L: o / intra-node + (B v W w c / L) / inter-node
    gradient_all_to_all = the same, + 2.455 o / memory bandwidth where rows are cut (a copy)

A replicated table (data_parallel) looks up its own process's ids: W = 1 in r, q and o, and nothing is sent but the
gradient of the whole table, d = rows w b bytes; its update reads and writes whole tables. Its dense kernel has half of
the memory's bandwidth::

    optimizer           = 9.22 d / memory bandwidth

Ours, where TorchRec has nothing or other numbers: c is 4 bytes (2 with half-precision communication) whatever the
table's precision, because lookups return float32; nothing is sent where there is one process; on CPU there is no
penalty p for narrow tables, and a row reads whole cache lines of 64 bytes; and ::

    input_all_to_all = (r / 2 + 4 B f W) / network  int32 ids, and lengths of f features, which row-wise shards all need
    optimizer        = 2 max(state of a row, 32 bytes) min(B i W / s, rows) / memory bandwidth
                       state of the touched rows read and written; the rows themselves are in lookup_backward
    gradient_all_to_all = 2 d / intra-node + 2 d / (L inter-node)      of a replicated table: an all-reduce, as a
                       reduce-scatter and an all-gather on the machine, with each L-th part summed over the machines
    prefetch         = 0                            TorchRec estimates it from cache statistics, which are not known

Where the cluster was measured (`Cluster.prices`), its price list takes the place of these formulas for what it covers:
lookups of tables in the device's memory, whose backward part then holds the optimizer too, and exchanges within one
machine.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from hmoe_rec.sharding.constraints import (
    CACHING,
    DENSE,
    FUSED,
    HOST_TYPES,
    POOLED_TYPES,
    REPLICATED,
    UNPOOLED_TYPES,
    UVM,
    Rule,
)
from hmoe_rec.sharding.prediction import EXCHANGES, PARTS, Alternative
from hmoe_rec.sharding.topology import Cluster
from hmoe_rec.units import format_bytes

CACHE_LOAD_FACTOR = 0.2
MIN_COLUMNS = 16
TOO_BIG = "too big"  # how the reason begins where memory is what lacks
ID_BYTES, LENGTH_BYTES = 8, 4
SENT_ID_BYTES = 4  # RowIds sends int32, but for a collection with a table of 2^31 rows
ROW_CUT = ("row_wise", "table_row_wise", "grid_shard")
COLUMN_CUT = ("column_wise", "table_column_wise", "grid_shard")
ELEMENTWISE = 9.22  # TorchRec's DP_ELEMENTWISE_KERNELS_PERF_FACTOR
# column_wise kinds are left out because they change row-wise Adagrad: one statistic per row and block.
AUTO_TYPES = ("table_wise", "row_wise", "table_row_wise")


@dataclass(frozen=True)
class Table:
    """What a plan has to know of a table.

    Attributes:
        module: path of its collection.
        value_bytes: of one value; data_type is its name.
        pooled: one vector per example and feature; else one per id.
        feature_names: looked up in it; features is their number.
        ids, vectors: per example, over all its features.
        distinct: different ids over ids in a batch of all processes; None = as of ids drawn evenly from the rows.
        state: bytes of optimizer state: "row" (4 a row), "value" (4 a value), "two" (8 a value), "none".
    """

    module: str
    name: str
    rows: int
    dim: int
    value_bytes: int = 4
    data_type: str = "fp32"
    pooled: bool = True
    feature_names: tuple[str, ...] = ()
    features: int = 1
    ids: float = 1.0
    vectors: float = 1.0
    distinct: float | None = None
    state: str = "row"

    @property
    def table_bytes(self) -> int:
        return self.rows * self.dim * self.value_bytes

    @property
    def kind(self) -> "Table":
        """What its price depends on: the same of tables that differ in name only."""
        return replace(self, module="", name="", feature_names=())

    def state_bytes(self, columns: int) -> int:
        """Of one row of a shard."""
        return {"none": 0, "row": 4, "value": 4 * columns, "two": 8 * columns}[self.state]


@dataclass(frozen=True)
class Workload:
    """Everything of the job that prices depend on, besides table and cluster.

    Attributes:
        batch_size: examples per process.
        communication: precision of vectors on the way: fp32, fp16 or bf16.
        reserved: share of each memory that tables may not use, in [0, 1).
        gradient_communication: precision of their gradients; None = as communication.
    """

    batch_size: int = 512
    communication: str = "fp32"
    reserved: float = 0.15
    gradient_communication: str | None = None

    @property
    def sent_bytes(self) -> int:
        """Of a value of a vector."""
        return 4 if self.communication == "fp32" else 2

    @property
    def gradient_ratio(self) -> float:
        """Bytes of a value's gradient over those of the value."""
        return (4 if (self.gradient_communication or self.communication) == "fp32" else 2) / self.sent_bytes


@dataclass(frozen=True)
class Cost:
    """One shard.

    Attributes:
        hbm, ddr: bytes of (tables, optimizer, activations).
        ms: by part, in the order of PARTS.
    """

    hbm: tuple[int, int, int]
    ddr: tuple[int, int, int]
    ms: tuple[float, ...]


@dataclass(frozen=True)
class Option:
    """A way to shard a table: `row_blocks` x `column_blocks` shards, or `copies` of the whole table.

    Attributes:
        cost: of the largest shard.
        excluded: why the planner does not take it by itself though it is possible; None = it may.
    """

    sharding_type: str
    kernel: str
    cache_load_factor: float | None
    row_blocks: int
    column_blocks: int
    cost: Cost
    excluded: str | None = None
    copies: int = 1

    @property
    def num_shards(self) -> int:
        return self.row_blocks * self.column_blocks * self.copies

    @cached_property
    def shard_ms(self) -> float:
        return sum(self.cost.ms)

    @cached_property
    def total_ms(self) -> float:
        return self.shard_ms * self.num_shards

    def shards(self, table: Table) -> Iterator[tuple[int, int, int, int]]:
        """(first row, rows, first column, columns) of the shards, in TorchRec's order."""
        width = table.dim // self.column_blocks
        block = -(-table.rows // self.row_blocks)
        for _ in range(self.copies):
            for column in range(0, table.dim, width):
                for row in range(0, block * self.row_blocks, block):
                    yield row, min(block, table.rows - row), column, width


def shard_cost(
    table: Table,
    sharding_type: str,
    kernel: str,
    rows: int,
    columns: int,
    cluster: Cluster,
    work: Workload,
    cache_load_factor: float | None = None,
) -> Cost:
    """Price of one shard of `rows` x `columns`; formulas above."""
    load = CACHE_LOAD_FACTOR if cache_load_factor is None else cache_load_factor
    time, inputs, outputs = _time(table, sharding_type, kernel, rows, columns, cluster, work, load)
    weights, state = rows * columns * table.value_bytes, rows * table.state_bytes(columns)
    io = inputs + outputs + (weights if sharding_type == REPLICATED else 0)  # its gradient is dense
    if cluster.device == "cpu":
        return Cost((0, 0, 0), (weights, state, io), time)
    if kernel in (FUSED, DENSE):
        return Cost((weights, state, io), (0, 0, 0), time)
    # The cache holds rows, and per slot 16 bytes of bookkeeping and per row of the table 4 (FBGEMM's lxu_cache_*).
    cache = round(weights * load) + math.ceil(rows * (4 + 16 * load)) if kernel == CACHING else 0
    return Cost((cache, 0, io + (inputs if kernel == CACHING else 0)), (weights, state, 0), time)


def _time(
    table: Table, kind: str, kernel: str, rows: int, columns: int, cluster: Cluster, work: Workload, load: float
) -> tuple[tuple[float, ...], int, int]:
    """(milliseconds by part, bytes of ids, bytes of vectors)"""
    if kind == REPLICATED:
        return _time_replicated(table, rows, columns, cluster, work)
    world, local = cluster.world_size, cluster.ranks_per_node
    split = {"row_wise": world, "table_row_wise": local, "grid_shard": local}.get(kind, 1)
    cut = split > 1 or kind in ROW_CUT
    lookups = work.batch_size * table.ids * world / split
    vectors = work.batch_size * table.vectors * world / (1 if table.pooled else split)
    read, written = math.ceil(lookups * ID_BYTES), vectors * columns * work.sent_bytes
    gpu = cluster.device == "cuda"
    row_bytes = columns * table.value_bytes
    gathered = lookups * (max(row_bytes, 32 * table.value_bytes if not cut else 0) if gpu else max(row_bytes, 64))
    penalty = 1.0 if cut or not gpu or columns >= 128 else 1.15 if columns >= 64 else 1.75
    memory = _kernel_bandwidth(kernel, cluster, load) / 1e3
    intra, inter = cluster.intra_node_bandwidth / 1e3, cluster.inter_node_bandwidth / 1e3
    network = intra if cluster.nodes == 1 else inter
    forward = (read + gathered + written) * penalty / memory
    received = lookups * SENT_ID_BYTES + LENGTH_BYTES * table.features * work.batch_size * world
    if world == 1:
        output = copy = inputs = 0.0
    else:
        output = written / network
        if kind in ("table_row_wise", "grid_shard"):
            among = work.batch_size * table.vectors * cluster.nodes * columns * work.sent_bytes
            output = written / intra + (among / inter if cluster.nodes > 1 else 0.0)
        copy = 2.455 * written / memory if cut else 0.0
        inputs = received / network
    ms = {
        "input_all_to_all": inputs,
        "lookup_forward": forward,
        "output_all_to_all": output,
        "gradient_all_to_all": output * work.gradient_ratio + copy,
        "lookup_backward": 2 * forward,
        "optimizer": _optimizer(table.state_bytes(columns), min(lookups, rows)) / memory,
    }
    if cluster.prices is not None:
        cells = lookups * row_bytes + 4 * vectors * columns
        amounts = {"ids": lookups, "rows": _different(table, lookups, rows), "vectors": vectors, "bytes": cells}
        exchanged = dict(zip(EXCHANGES, (received, written, written * work.gradient_ratio), strict=True))
        ms |= _priced(cluster, table.pooled, cut, kernel, amounts, exchanged)
    return tuple(ms.get(part, 0.0) for part in PARTS), read, math.ceil(vectors * columns * 4)


def _time_replicated(
    table: Table, rows: int, columns: int, cluster: Cluster, work: Workload
) -> tuple[tuple[float, ...], int, int]:
    lookups, vectors = work.batch_size * table.ids, work.batch_size * table.vectors
    read, row_bytes = math.ceil(lookups * ID_BYTES), columns * table.value_bytes
    gathered = lookups * (row_bytes if cluster.device == "cuda" else max(row_bytes, 64))
    memory = _kernel_bandwidth(DENSE, cluster, 0.0) / 1e3
    intra, inter = cluster.intra_node_bandwidth / 1e3, cluster.inter_node_bandwidth / 1e3
    forward = (read + gathered + vectors * columns * work.sent_bytes) / memory
    gradient = rows * row_bytes
    machine, network = _summed_bytes(gradient, cluster)
    summed = machine / intra + network / inter
    ms = {
        "lookup_forward": forward,
        "lookup_backward": 2 * forward,
        "gradient_all_to_all": summed,
        "optimizer": ELEMENTWISE * gradient / memory,
    }
    if cluster.prices is not None:
        ms["optimizer"] = cluster.prices.update.ms(bytes=gradient)
        if summed and cluster.nodes == 1:
            ms["gradient_all_to_all"] = cluster.prices.all_reduce.ms(bytes=gradient)
    return tuple(ms.get(part, 0.0) for part in PARTS), read, math.ceil(vectors * columns * 4)


def _summed_bytes(gradient: float, cluster: Cluster) -> tuple[float, float]:
    """What each process sends of a dense gradient that is summed over all: on its machine, between machines."""
    local = cluster.ranks_per_node
    return 2 * gradient if local > 1 else 0.0, 2 * gradient / local if cluster.nodes > 1 else 0.0


def sent_bytes(table: Table, kind: str, columns: int, cluster: Cluster, work: Workload) -> dict[str, int]:
    """What exchanges of one shard send, by part of `EXCHANGES`, in the terms of the formulas above; {} if alone."""
    world, local = cluster.world_size, cluster.ranks_per_node
    if world == 1:
        return {}
    if kind == REPLICATED:
        return dict(zip(EXCHANGES, (0, 0, round(sum(_summed_bytes(table.table_bytes, cluster)))), strict=True))
    split = {"row_wise": world, "table_row_wise": local, "grid_shard": local}.get(kind, 1)
    examples = work.batch_size * world
    ids = SENT_ID_BYTES * examples * table.ids / split + LENGTH_BYTES * examples * table.features
    vectors = examples * table.vectors * columns * work.sent_bytes / (1 if table.pooled else split)
    if kind in ("table_row_wise", "grid_shard") and cluster.nodes > 1:
        vectors += vectors / local  # summed on the machine first, then between machines
    return dict(zip(EXCHANGES, (round(ids), round(vectors), round(vectors * work.gradient_ratio)), strict=True))


def _different(table: Table, lookups: float, rows: int) -> float:
    """Rows of a shard that its lookups touch; n draws from m rows are expected to touch m (1 - e^(-n / m))."""
    if table.distinct is not None:
        return min(table.distinct * lookups, rows)
    return -rows * math.expm1(-lookups / rows)


def _optimizer(state: int, rows: float) -> float:
    """Bytes read and written."""
    return 2 * max(state, 32) * rows if state else 0.0


def _priced(
    cluster: Cluster, pooled: bool, cut: bool, kernel: str, amounts: dict[str, float], sent: Mapping[Any, float]
) -> dict[str, float]:
    """The parts that were measured: kernels of tables in the device's memory, exchanges inside one machine.

    sent: bytes of a process, by part of `EXCHANGES`.
    """
    prices, ms = cluster.prices, {}
    assert prices is not None
    if kernel == FUSED:
        ms["lookup_forward"] = prices.lookup("forward", pooled=pooled).ms(**amounts)
        ms["lookup_backward"] = prices.lookup("backward", pooled=pooled).ms(**amounts)
        ms["optimizer"] = 0.0  # is in lookup_backward
    if cluster.nodes == 1:
        ms["input_all_to_all"] = (prices.input_cut if cut else prices.input).ms(
            ids=amounts["ids"], bytes=sent["input_all_to_all"]
        )
        for part in ("output_all_to_all", "gradient_all_to_all") if cluster.world_size > 1 else ():
            ms[part] = prices.exchange(part, cut=cut, pooled=pooled).ms(bytes=sent[part])
    return ms


def shared_ms(table: Table, kind: str, cluster: Cluster, work: Workload) -> np.ndarray:
    """What a table costs every process, whoever holds its shards, by part: its vectors put together, gradients taken
    apart. 0 where the cluster was not measured, as in TorchRec's formulas."""
    ms: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    if cluster.prices is not None and kind != REPLICATED:
        vectors = work.batch_size * table.vectors
        for part, name in (("output_all_to_all", "join"), ("gradient_all_to_all", "split")):
            price = cluster.prices.around(name, cut=kind in ROW_CUT, pooled=table.pooled)
            ms[part] = price.ms(vectors=vectors, bytes=4 * vectors * table.dim)
    return np.array([ms[part] for part in PARTS])


def fixed_ms(kind: str, pooled: bool, cluster: Cluster) -> tuple[np.ndarray, np.ndarray]:
    """What a collection costs for each of its sharding types, whatever it holds, by part (in the order of `PARTS`).

    -> of every process: collectives, 3 small ones for the input, 1 each for vectors and gradients (replicated tables:
    one all-reduce of gradients); of those that hold a shard: a lookup call forward and one backward.
    """
    everyone, holders = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    cut, prices = kind in ROW_CUT, cluster.prices
    latency = cluster.all_to_all_latency_ms if cluster.world_size > 1 else 0.0
    everyone |= {"input_all_to_all": 3 * latency, "output_all_to_all": latency, "gradient_all_to_all": latency}
    holders |= {"lookup_forward": cluster.kernel_overhead_ms, "lookup_backward": cluster.kernel_overhead_ms}
    if kind == REPLICATED:
        everyone |= {"input_all_to_all": 0.0, "output_all_to_all": 0.0}
        if prices is not None:
            everyone["optimizer"] = prices.update.call_ms
            everyone["gradient_all_to_all"] = prices.all_reduce.call_ms if cluster.world_size > 1 else 0.0
    elif prices is not None:
        holders["lookup_forward"] = prices.lookup("forward", pooled=pooled).call_ms
        holders["lookup_backward"] = prices.lookup("backward", pooled=pooled).call_ms
        if cluster.nodes == 1:
            everyone["input_all_to_all"] = (prices.input_cut if cut else prices.input).call_ms
            for part in ("output_all_to_all", "gradient_all_to_all") if cluster.world_size > 1 else ():
                everyone[part] = prices.exchange(part, cut=cut, pooled=pooled).call_ms
        everyone["output_all_to_all"] += prices.around("join", cut=cut, pooled=pooled).call_ms
        everyone["gradient_all_to_all"] += prices.around("split", cut=cut, pooled=pooled).call_ms
    return np.array([everyone[part] for part in PARTS]), np.array([holders[part] for part in PARTS])


def _kernel_bandwidth(kernel: str, cluster: Cluster, load: float) -> float:
    """Bytes/s at which a kernel reads rows, as TorchRec's `kernel_bw_lookup`."""
    if cluster.device == "cpu":
        return cluster.ddr_bandwidth * (0.5 if kernel == DENSE else 1.0)
    return {
        FUSED: cluster.hbm_bandwidth,
        DENSE: cluster.hbm_bandwidth / 2,
        UVM: cluster.hbm_to_ddr_bandwidth / 10,
        CACHING: (load * cluster.hbm_bandwidth + (1 - load) * cluster.hbm_to_ddr_bandwidth) / 10,
    }[kernel]


def fills(rows: int, num_shards: int) -> bool:
    """Whether every one of TorchRec's `num_shards` equal blocks of ceil(rows / num_shards) rows holds a row.

    An empty shard beside tables of another width trains wrong values on CPU without an error (measured with torchrec
    1.8), and alone it raises.
    """
    return (num_shards - 1) * -(-rows // num_shards) < rows


def ways(table: Table, rule: Rule, cluster: Cluster, work: Workload) -> tuple[list[Option], list[Alternative]]:
    """All ways to shard a table that are possible on a cluster, and the impossible ones with the reason."""
    options: list[Option] = []
    impossible: list[Alternative] = []
    for kind in POOLED_TYPES:
        blocks, reason = _blocks(table, kind, rule, cluster)
        for kernel in _kernels(kind, rule, cluster):
            ways_of_kind = [_option(table, kind, kernel, rule, *block, cluster, work) for block in blocks]
            fitting = [o for o in ways_of_kind if _too_big(o, cluster, work) is None]
            options += [replace(o, excluded=_excluded(kind, rule)) for o in fitting]
            if not fitting:
                why = reason or _too_big(ways_of_kind[-1], cluster, work)
                impossible.append(Alternative(kind, kernel, None, None, why))
    return options, impossible


def _kernels(kind: str, rule: Rule, cluster: Cluster) -> tuple[str, ...]:
    if kind == REPLICATED:
        return (DENSE,)
    return (rule.kernels or (FUSED,)) if cluster.device == "cuda" else (FUSED,)


def _option(
    table: Table,
    kind: str,
    kernel: str,
    rule: Rule,
    row_blocks: int,
    column_blocks: int,
    cluster: Cluster,
    work: Workload,
) -> Option:
    rows, columns = -(-table.rows // row_blocks), table.dim // column_blocks
    load = (rule.cache_load_factor or CACHE_LOAD_FACTOR) if kernel == CACHING else None
    cost = shard_cost(table, kind, kernel, rows, columns, cluster, work, load)
    copies = cluster.world_size if kind == REPLICATED else 1
    return Option(kind, kernel, load, row_blocks, column_blocks, cost, copies=copies)


def _too_big(option: Option, cluster: Cluster, work: Workload) -> str | None:
    """Why no process can hold a shard; None if one can."""
    for name, held, capacity in (
        ("hbm", sum(option.cost.hbm), cluster.hbm_bytes),
        ("ddr", sum(option.cost.ddr), cluster.ddr_bytes),
    ):
        usable = capacity * (1 - work.reserved)
        if held > usable:
            room = f"{format_bytes(usable)} of {format_bytes(capacity)} are usable"
            return f"{TOO_BIG} for one process: a shard takes {format_bytes(held)} of {name}, {room}"
    return None


def _excluded(kind: str, rule: Rule) -> str | None:
    if rule.types:
        return None if kind in rule.types else f"excluded by a constraint: types {', '.join(rule.types)}"
    if kind in AUTO_TYPES:
        return None
    if kind == REPLICATED:
        return (
            "not chosen by itself: all processes hold the table whole and sum its dense gradient at every step, which "
            "pays for small tables only; allow it in sharding.constraints"
        )
    return (
        "not chosen by itself: with row-wise Adagrad it keeps one statistic per row and block of columns, which trains "
        "other numbers; allow it in sharding.constraints"
    )


def _blocks(table: Table, kind: str, rule: Rule, cluster: Cluster) -> tuple[list[tuple[int, int]], str | None]:
    """[(blocks of rows, blocks of columns)], or [] and why not."""
    world, local = cluster.world_size, cluster.ranks_per_node
    if not table.pooled and kind not in UNPOOLED_TYPES:
        return [], f"not offered for sequences (unpooled tables): {', '.join(UNPOOLED_TYPES)} are"
    if kind in HOST_TYPES and cluster.nodes == 1 and kind not in rule.types:
        same = {"table_row_wise": "row_wise", "table_column_wise": "column_wise", "grid_shard": "row_wise"}[kind]
        return [], f"one machine only: the same as {same}"
    ranks = set(rule.ranks or range(world))
    if kind == REPLICATED and table.value_bytes < 4:
        return [], f"takes fp32 tables only (its gradient would be summed in {table.data_type})"
    if kind in ("row_wise", REPLICATED) and len(ranks) < world:
        return [], f"takes all {world} processes, but a constraint allows {len(ranks)}"
    whole_hosts = sum(1 for h in range(cluster.nodes) if ranks.issuperset(range(h * local, (h + 1) * local)))
    if kind in ("table_row_wise", "grid_shard") and not whole_hosts:
        return [], "takes whole machines, but a constraint allows none"
    rows = {"row_wise": world, "table_row_wise": local, "grid_shard": local}.get(kind, 1)
    if kind in ROW_CUT[:2] and rows == 1 and kind not in rule.types:
        return [], "one process: the same as table_wise"
    if not fills(table.rows, rows):
        return [], f"{table.rows} rows do not give each of {rows} processes a block of rows"
    if kind not in COLUMN_CUT:
        return [(rows, 1)], None
    most = {
        "column_wise": len(ranks),
        "table_column_wise": max(len(ranks & set(range(h * local, (h + 1) * local))) for h in range(cluster.nodes)),
        "grid_shard": whole_hosts,
    }[kind]
    narrowest = rule.min_partition or MIN_COLUMNS
    counts = [n for n in range(2, most + 1) if table.dim % (4 * n) == 0 and table.dim // n >= narrowest]
    if not counts:
        limit = "one process" if most < 2 else f"blocks of {narrowest} columns or more, in multiples of 4"
        return [], f"{table.dim} columns cannot be cut: {limit}"
    return [(rows, n) for n in sorted({counts[0], counts[len(counts) // 2], counts[-1]})], None


def usable_bytes(cluster: Cluster, work: Workload) -> np.ndarray:
    """[2]: bytes of hbm and ddr of one process that tables and activations may use."""
    return np.array([cluster.hbm_bytes, cluster.ddr_bytes], dtype=np.float64) * (1 - work.reserved)
