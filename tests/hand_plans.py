"""Sharding plans made by hand: any of TorchRec's kinds for any table, for tests of what shards and what reshards.

TorchRec has no helper for table_column_wise, and its grid_shard takes widths of 256 and more only.
"""

from collections.abc import Callable, Mapping

from tiny_model import TinyModel
from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, placement
from torchrec.distributed.types import ParameterSharding, ShardingPlan

Shards = list[tuple[int, tuple[int, int], tuple[int, int]]]  # rank, (row, column), (rows, columns)

REPLICATED = "data_parallel"
POOLED = ("table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard", REPLICATED)
UNPOOLED = (*POOLED[:3], REPLICATED)
# A table for every kind; sizes are all different, rows do not divide by the processes.
BAGS = {"a": (40, 8), "b": (37, 8), "c": (23, 16), "d": (31, 8), "e": (29, 16), "f": (41, 32), "g": (17, 8)}
ROWS = {"x": (19, 16), "y": (22, 16), "z": (27, 16), "w": (14, 16)}
TABLES = {**BAGS, **ROWS}
ALL_KINDS = {**dict(zip(BAGS, POOLED, strict=True)), **dict(zip(ROWS, UNPOOLED, strict=True))}


def one_kind(kind: str) -> dict[str, str]:
    """Every pooled table by one kind; sequences by it too, where they can be."""
    return {**dict.fromkeys(BAGS, kind), **dict.fromkeys(ROWS, kind if kind in UNPOOLED else "table_wise")}


def shards_of(table: str, kind: str, world_size: int, local: int) -> Shards:
    """The shards of one of `TABLES` on world_size processes, `local` per machine."""
    rows, dim = TABLES[table]
    turn = [*(BAGS if table in BAGS else ROWS)].index(table)  # where it begins differs from table to table
    hosts = world_size // local
    host = [local * ((turn + 1) % hosts) + i for i in range(local)]  # one machine's processes
    if kind == REPLICATED:
        return []
    if kind == "table_wise":
        return [((turn + 1) % world_size, (0, 0), (rows, dim))]
    if kind == "row_wise":
        return _rows(list(range(world_size)), rows, 0, dim)
    if kind == "table_row_wise":
        return _rows(host, rows, 0, dim)
    if kind == "grid_shard":  # columns over the machines, rows inside each
        width = dim // hosts
        return [s for h in range(hosts) for s in _rows([h * local + i for i in range(local)], rows, h * width, width)]
    ranks = {"column_wise": list(range(world_size))[::-1], "table_column_wise": host}[kind]
    count = min(len(ranks), dim // 4)  # FBGEMM takes widths that divide by 4
    if table in ROWS:
        count = max(n for n in range(1, count + 1) if dim % (4 * n) == 0)
    ranks = ranks[:count]
    widths = [dim // len(ranks)] * len(ranks)
    if table in BAGS:  # unequal blocks, so that averages over them show their weights; TorchRec has none for sequences
        widths = [dim - 4 * (len(ranks) - 1), *[4] * (len(ranks) - 1)]
    return [(rank, (0, sum(widths[:i])), (rows, widths[i])) for i, rank in enumerate(ranks)]


def _rows(ranks: list[int], rows: int, column: int, width: int) -> Shards:
    block = -(-rows // len(ranks))
    return [(r, (i * block, column), (min(block, rows - i * block), width)) for i, r in enumerate(ranks)]


def place(kind: str, shards: Shards) -> Callable[..., ParameterSharding]:
    if kind == REPLICATED:
        return data_parallel()

    def generator(param: nn.Parameter, local: int, world_size: int, device_type: str, sharder: object):
        pieces = [
            ShardMetadata(
                shard_offsets=list(offsets), shard_sizes=list(sizes), placement=placement(device_type, rank, local)
            )
            for rank, offsets, sizes in shards
        ]
        ranks = [rank for rank, _, _ in shards]
        return ParameterSharding(kind, "fused", ranks, EnumerableShardingSpec(pieces))

    return generator


def hand_plan(model: TinyModel, kinds: Mapping[str, str], world_size: int, local: int) -> ShardingPlan:
    """`TABLES` of the model sharded by their kinds."""
    plan = {}
    for path, collection, sharder in (
        ("ebc", model.ebc, EmbeddingBagCollectionSharder()),
        ("ec", model.ec, EmbeddingCollectionSharder()),
    ):
        configs = collection.embedding_bag_configs() if path == "ebc" else collection.embedding_configs()
        generators = {
            c.name: place(kinds[c.name], shards_of(c.name, kinds[c.name], world_size, local)) for c in configs
        }
        plan[path] = construct_module_sharding_plan(collection, generators, sharder, local, world_size, "cpu")
    return ShardingPlan(plan)
