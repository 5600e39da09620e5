"""Data -> how often each row of each table is looked up, and how often each id of a field occurs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hmoe_rec.config import RunConfig
from hmoe_rec.embedding.lookup import MultiEmbedding
from hmoe_rec.embedding.tables import table_name
from hmoe_rec.progress import progress_bar
from hmoe_rec.sharding.process import Process
from hmoe_rec.training.evaluate import evaluation_reader


def row_counts(
    config: RunConfig,
    process: Process,
    uris: Sequence[str],
    *,
    rows: int | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Table -> [rows] float64, over all processes; 8 bytes per row of every table. Behaviors count as their target.

    Args:
        rows: stop after about so many rows of data; None = all.
        total: adds up a tensor over all processes.

    Raises:
        DataError, SchemaError: the data is not what the run's schema says.
    """
    features, sets = config.features, config.layout().sets
    embedding = MultiEmbedding(features, sets, device=torch.device("meta"))
    ids = [module for name, module in embedding.named_children() if name.endswith("_ids")]
    table_of = {
        table_name(s.name, column): table_name(s.name, t) for s in sets for column, t in features.targets.items()
    }
    counts = {name: torch.zeros(len(p), dtype=torch.float64) for name, p in _weights(embedding)}
    reader = evaluation_reader(uris, config.schema_of_data, config, process, with_labels=False)
    done = 0
    with progress_bar("counting ids") as bar:
        for batch in reader.epoch(0):
            for module in ids:
                looked_up = module(batch.sparse)
                for key in looked_up.keys():
                    name = table_of[key] if key in table_of else key
                    values = looked_up[key].values().long()
                    counts[name].index_add_(0, values, torch.ones(len(values), dtype=torch.float64))
            done += config.train.global_batch_size
            if process.rank == 0:
                bar(min(done, reader.num_rows), reader.num_rows)
            if rows is not None and done >= rows:
                break
    return counts if total is None else {name: total(c) for name, c in counts.items()}


def _weights(embedding: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name.split(".")[-2], p) for name, p in embedding.named_parameters()]


# ------------------------------------------------------------------------------------------------------------ of fields

PENDING = 1 << 22  # ids that wait to be merged


@dataclass(frozen=True)
class IdCounts:
    """Attributes: ids: ascending. counts: how many rows have each."""

    ids: np.ndarray
    counts: np.ndarray

    @staticmethod
    def merged(parts: Sequence["IdCounts"]) -> "IdCounts":
        ids, place = np.unique(np.concatenate([p.ids for p in parts]), return_inverse=True)
        counts = np.bincount(place, weights=np.concatenate([p.counts for p in parts]), minlength=len(ids))
        return IdCounts(ids, counts.astype(np.int64))

    def of(self, ids: np.ndarray) -> np.ndarray:
        """[n] rows that have each id; 0 where none has."""
        if not len(self.ids):
            return np.zeros(len(ids), np.int64)
        place = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[place] == ids, self.counts[place], 0)


def id_counts(config: RunConfig, process: Process, uris: Sequence[str], fields: Sequence[str]) -> dict[str, IdCounts]:
    """Field -> its ids in the data, over all processes: one pass; 16 bytes per distinct id, on each process.

    Raises:
        DataError, SchemaError: the data is not what the run's schema says.
    """
    nothing = IdCounts(np.zeros(0, np.int64), np.zeros(0, np.int64))
    found, pending = {f: [nothing] for f in fields}, 0
    reader = evaluation_reader(uris, config.schema_of_data, config, process, with_labels=False)
    with progress_bar("ids in the training data") as bar:
        for done, batch in enumerate(reader.epoch(0), 1):
            for f in fields if len(batch) else ():
                ids, there = first_ids(batch.sparse[f], len(batch))
                found[f].append(IdCounts(*np.unique(ids[there], return_counts=True)))
                pending += len(found[f][-1].ids)
            if pending > PENDING:
                found, pending = {f: [IdCounts.merged(parts)] for f, parts in found.items()}, 0
            if process.rank == 0:
                bar(min(done * config.train.global_batch_size, reader.num_rows), reader.num_rows)
    mine = {f: IdCounts.merged(parts) for f, parts in found.items()}
    if process.world_size == 1:
        return mine
    shares = process.gather(mine)
    return {f: IdCounts.merged([s[f] for s in shares]) for f in fields}


def first_ids(column: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first id of every row, and whether there is one."""
    values, offsets = column.values().cpu().numpy().astype(np.int64), column.offsets().cpu().numpy()
    there = np.diff(offsets) > 0
    keys = np.zeros(size, np.int64)
    keys[there] = values[offsets[:-1][there]]
    return keys, there
