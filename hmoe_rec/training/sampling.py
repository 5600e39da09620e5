"""`data.sampling` in a run: the reader of the rows that are kept, where the towers begin, and what is reported."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hmoe_rec.config import ResolvedData, RunConfig
from hmoe_rec.config.sampling import sampler_of
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.data.sampling import KeptRows, RowSampler, count_kept
from hmoe_rec.metrics.exchange import all_reduced
from hmoe_rec.progress import progress_bar
from hmoe_rec.sharding.process import Process


def training_reader(
    config: RunConfig, data: ResolvedData, process: Process, *, lanes: int | None = None
) -> BatchReader:
    """This process's reader of data.train. What data.sampling keeps is counted first, a share by every process.

    Args:
        lanes: those of a run that is read again; None = data.lanes.

    Raises:
        HmoeError: files that do not fit the schema, a value that cannot be right, or no row that is kept.
    """
    source = ParquetSource(data.train, data.schema)
    sampler = sampler_of(config.data.sampling, data.schema)
    train = config.train
    return BatchReader(
        source,
        global_batch_size=train.global_batch_size,
        rank=process.rank,
        world_size=process.world_size,
        shuffle=train.shuffle,
        seed=train.seed,
        lanes=lanes or config.data.lanes,
        shuffle_rows=config.data.shuffle_rows,
        num_workers=config.data.num_workers,
        sampler=sampler,
        kept=None if sampler is None else _counted(source, sampler, process),
        exposures=train.exposure.column,
    )


def _counted(source: ParquetSource, sampler: RowSampler, process: Process) -> KeptRows:
    with progress_bar("rows that are kept") as progress:
        kept = count_kept(source, sampler, rank=process.rank, world_size=process.world_size, progress=progress)
    return KeptRows(summed(kept.per_chunk), summed(kept.labels))


def summed(counts: np.ndarray) -> np.ndarray:
    """Over all processes."""
    return all_reduced(torch.from_numpy(counts), dist.ReduceOp.SUM, None).numpy()


def sampling_offsets(reader: BatchReader) -> dict[str, float]:
    """Task -> mean of what sampling adds to the logits in the loss; {} where all rows are read."""
    if reader.sampler is None or reader.kept is None:
        return {}
    return dict(zip(reader.sampler.tasks, reader.kept.mean_offsets(reader.sampler).tolist(), strict=True))


def sampling_report(reader: BatchReader) -> dict[str, Any] | None:
    """What is read of data.train: rows, and per slice and task the labels [in the log, that count]; None: all of it."""
    sampler, kept = reader.sampler, reader.kept
    if sampler is None or kept is None:
        return None
    slices = [*sampler.slice_names, "others"] if sampler.slice_names else ["all"]

    def figures(s: int, t: int) -> dict[str, Any]:
        negatives, positives = kept.labels[s, t].tolist()
        rate, offset = float(sampler.rates_ST[s, t]), float(sampler.offsets_ST[s, t])
        return {"rate": rate, "offset": offset, "negatives": negatives, "positives": positives}

    return {
        "rows": reader.source.num_rows,
        "kept": kept.total,
        "correction": sampler.correction,
        "training_metrics": "of the kept rows, weighted to stand for all"
        if sampler.correction == "weights"
        else "of the kept rows",
        "slices": {
            name: {task: figures(s, t) for t, task in enumerate(sampler.tasks)} for s, name in enumerate(slices)
        },
    }


def sampling_line(reader: BatchReader) -> str | None:
    """What a person should know when a run begins."""
    sampler, kept = reader.sampler, reader.kept
    if sampler is None or kept is None:
        return None
    how = "weigh 1 / rate" if sampler.correction == "weights" else "have an offset of the logit in the loss"
    return (
        f"sampling: {kept.total:,} of {reader.source.num_rows:,} rows of data.train are read; they {how}. Training "
        "metrics are of these rows; validation, test and predictions are of all rows"
    )
