"""Data -> how often each row of each table is looked up."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hmoe_rec.config import RunConfig
from hmoe_rec.embedding.lookup import MultiEmbedding
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
    features = config.features
    embedding = MultiEmbedding(features, config.layout().sets, device=torch.device("meta"))
    ids = [module for name, module in embedding.named_children() if name.endswith("_ids")]
    tables = {name: p.shape[0] for name, p in _weights(embedding)}
    counts = {name: torch.zeros(size, dtype=torch.float64) for name, size in tables.items()}
    reader = evaluation_reader(uris, config.schema_of_data, config, process, with_labels=False)
    done = 0
    with progress_bar("counting ids") as bar:
        for batch in reader.epoch(0):
            for module in ids:
                looked_up = module(batch.sparse)
                for key in looked_up.keys():
                    name = _table_of(key, tables, features.targets)
                    values = looked_up[key].values().long()
                    counts[name] += torch.bincount(values, minlength=tables[name])
            done += config.train.global_batch_size
            if process.rank == 0:
                bar(min(done, reader.num_rows), reader.num_rows)
            if rows is not None and done >= rows:
                break
    return counts if total is None else {name: total(c) for name, c in counts.items()}


def _weights(embedding: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name.split(".")[-2], p) for name, p in embedding.named_parameters()]


def _table_of(key: str, tables: dict[str, int], targets: dict[str, str]) -> str:
    """set__column -> the table it is looked up in."""
    if key in tables:
        return key
    embedding_set, _, column = key.partition("__")
    return f"{embedding_set}__{targets[column]}"
