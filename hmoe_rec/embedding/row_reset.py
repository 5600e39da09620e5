"""Rows that another id has taken over -> their first values again, in every table of the field, and no memory of steps.

Without this the newcomer would start from a stranger's vector, and row-wise Adagrad would go on with the stranger's
statistic, that is with a step too small.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from hmoe_rec.embedding.initialization import local_blocks, named_collections, table_weights
from hmoe_rec.embedding.managed import managed_ids
from hmoe_rec.embedding.row_values import row_values
from hmoe_rec.types import HmoeError

Block = tuple[Tensor, int, int]  # values, first row, first column


class RowReset:
    """The rows of managed tables that this process holds.

    Args:
        module: holds the tables, sharded or not. Statistics of optimizers are known of sharded tables only.
        seed, std: with which `initialize_tables` filled the tables.

    Raises:
        HmoeError: a sharded table that is not trained by a fused optimizer (data_parallel).
    """

    def __init__(self, module: nn.Module, tables: Mapping[str, str], *, seed: int, std: float) -> None:
        self.seed, self.std = seed, std
        self.weights: dict[str, list[tuple[str, Block]]] = {field: [] for field in tables.values()}
        self.states: dict[str, list[tuple[Tensor, int, int]]] = {field: [] for field in tables.values()}
        for _, collection in named_collections(module):
            states = _states_of(collection)
            for table, weight in table_weights(collection).items():
                if table not in tables:
                    continue
                if states is not None and not isinstance(weight, ShardedTensor):
                    raise HmoeError(
                        f"table {table!r} of managed field {tables[table]!r} is data_parallel, where the statistics of "
                        "evicted rows are out of reach; shard it another way (sharding.constraints)"
                    )
                blocks = [(values, row, column) for values, row, column, _ in local_blocks(table, weight)]
                self.weights[tables[table]] += [(table, block) for block in blocks]
                for state in (states or {}).get(table, ()):
                    self.states[tables[table]] += [(x, first, weight.size(0)) for x, first in _local_rows(state)]

    @torch.no_grad()
    def __call__(self, field: str, rows: Tensor) -> None:
        """rows: of the whole table, distinct."""
        for table, (values, first_row, first_column) in self.weights[field]:
            here = rows[(rows >= first_row) & (rows < first_row + len(values))]
            if len(here):
                columns = range(first_column, first_column + values.shape[1])
                # Drawn on the CPU, as at the start: logarithm and cosine differ in the last bit elsewhere.
                fresh = row_values(self.seed, table, here.cpu(), columns, std=self.std)
                values[here - first_row] = fresh.to(values)
        for values, first, num_rows in self.states[field]:
            # Cut by columns, row-wise Adagrad has a statistic per row and block, block after block.
            last = first + len(values)
            for start in range(first // num_rows * num_rows, last, num_rows):
                at = rows + start
                values[at[(at >= first) & (at < last)] - first] = 0


def manage_rows(module: nn.Module, *, seed: int, std: float, device: torch.device) -> None:
    """Gives the managed ids below `module` their buckets on this process, and the tables whose rows they reset."""
    ids = managed_ids(module)
    if ids is not None:
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        ids.place(rank, world_size, device, RowReset(module, ids.tables, seed=seed, std=std))


def _states_of(collection: nn.Module) -> dict[str, list[Tensor]] | None:
    """Table -> the states of its fused optimizer that have a value per row; None for a collection not sharded."""
    optimizer = getattr(collection, "fused_optimizer", None)
    if optimizer is None:
        return None
    result: dict[str, list[Tensor]] = {}
    for key, states in optimizer.state_dict()["state"].items():
        table = key.removesuffix(".weight").split(".")[-1]
        result.setdefault(table, []).extend(states.values())
    return result


def _local_rows(state: Tensor) -> list[tuple[Tensor, int]]:
    """(values, first row) of what this process holds."""
    if isinstance(state, ShardedTensor):
        return [(shard.tensor, shard.metadata.shard_offsets[0]) for shard in state.local_shards()]
    return [(state, 0)] if state.dim() else []
