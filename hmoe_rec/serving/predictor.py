"""A run and Parquet files without (or with) labels -> Parquet with the key columns and one probability per task."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from hmoe_rec import io
from hmoe_rec.batch import Batch
from hmoe_rec.config import RunConfig
from hmoe_rec.data.parquet import BatchReader
from hmoe_rec.lock import NAME
from hmoe_rec.sharding.process import Process, process_group
from hmoe_rec.training.checkpoint import Checkpoint
from hmoe_rec.training.evaluate import (
    device_of,
    evaluation_reader,
    load_for_evaluation,
    open_run,
    read_run_config,
)
from hmoe_rec.training.run_dir import owned
from hmoe_rec.training.uncertainty import open_estimate
from hmoe_rec.types import ConfigError, DataError

ROWS_PER_ROW_GROUP = 131_072


def predict_run(
    run_dir: str,
    data: str | Sequence[str],
    out: str,
    checkpoint: str = "best",
    uncertainty: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Streams files of any size; a row out for every row in, without an order that is promised over several processes.

    Args:
        run_dir: the `train.run_dir` of a run.
        data: Parquet files, directories, globs or URIs with the feature and key columns; labels are not read.
        out: a file (*.parquet, one process) or a directory, which gets one part per process. Each is there when it is
            complete.
        checkpoint: "best", "latest" or a step.
        uncertainty: a kind of estimate (`hmoe_rec.uncertainty.KINDS`): the probability is then that of its mean logit,
            and TASK_std the standard deviation of the logit.
        device: see `device_of`.

    Returns:
        {"rows": n over all processes, "checkpoint": directory, "files": this process's file}.

    Raises:
        HmoeError: bad data, no such checkpoint, an output that exists, that another process writes, or that cannot be
            written.
    """
    config = read_run_config(run_dir)
    keys = config.schema_of_data.keys
    written = [*config.tasks, *([f"{task}_std" for task in config.tasks] if uncertainty else [])]
    if clash := sorted(set(keys) & set(written)):
        raise ConfigError(
            f"key column {clash[0]!r} has the name of a task, which names its column of predictions; rename one"
        )
    if len(set(written)) < len(written):
        clash = next(name for name in config.tasks if f"{name}_std" in config.tasks)
        raise ConfigError(
            f"--uncertainty: the std of task {clash!r} and task '{clash}_std' name one column; rename one"
        )
    uris = [data] if isinstance(data, str) else list(data)
    with process_group(device_of(config, device)) as process:
        with owned(_lock_of(out), f"--out {out}", process):
            target = _target(out, process)
            reader = evaluation_reader(uris, config.schema_of_data, config, process, with_labels=False, carry=keys)
            estimate, found = _estimate(run_dir, config, process, checkpoint, uncertainty)
            rows = torch.tensor([_write(target, _tables(estimate, reader, written, process))])
            if process.world_size > 1:
                rows = rows.to(process.device)
                dist.all_reduce(rows)
    return {"rows": int(rows.item()), "checkpoint": found.uri, "files": target}


def _lock_of(out: str) -> str:
    """One command at a time writes there: two could find it empty, and mix their parts."""
    if not out.endswith(".parquet"):
        return io.join(out, NAME)
    folder, _, name = out.rpartition("/")
    return io.join(folder or ".", f".{name}.lock")


def _target(out: str, process: Process) -> str:
    single = out.endswith(".parquet")
    if single and process.world_size > 1:
        raise ConfigError(f"--out {out}: {process.world_size} processes write one file each; give a directory")
    if single and io.exists(out):
        raise DataError(f"--out {out} exists; nothing is overwritten: give another name or remove it")
    there = [] if single or not io.isdir(out) else [name for name in io.ls(out) if name.endswith(".parquet")]
    if there:
        raise DataError(
            f"--out {out} holds {there[0]}, which would be read together with the new predictions: give another name "
            "or remove it"
        )
    return out if single else io.join(out, f"part-{process.rank:05d}-of-{process.world_size:05d}.parquet")


def _estimate(
    run_dir: str, config: RunConfig, process: Process, checkpoint: str, uncertainty: str | None
) -> tuple[Callable[[Batch], tuple[Tensor, ...]], Checkpoint]:
    """-> Batch to (logits [B, T],) or (mean logits [B, T], variances [B, T]), and the checkpoint."""
    if uncertainty is not None:
        return open_estimate(run_dir, config, process, uncertainty, checkpoint)
    sharded, found = load_for_evaluation(open_run(run_dir, config), process, checkpoint)
    sharded.eval()
    return lambda batch: (sharded(batch)[1].logits_BT,), found


@torch.no_grad()
def _tables(
    estimate: Callable[[Batch], tuple[Tensor, ...]], reader: BatchReader, names: Sequence[str], process: Process
) -> Iterator[pa.Table]:
    for item in reader.epoch(0):
        batch, carried = item if reader.carry else (item, pa.table({}))
        logits_BT, *variance = estimate(batch.filled().to(process.device, non_blocking=True))
        parts = torch.cat([logits_BT.sigmoid(), *(v_BT.sqrt() for v_BT in variance)], 1)[: len(batch)].cpu().numpy()
        columns = {name: carried.column(name) for name in carried.column_names}
        columns |= {name: pa.array(parts[:, i]) for i, name in enumerate(names)}
        yield pa.table(columns)


def _write(target: str, tables: Iterator[pa.Table]) -> int:
    """Rows written. The target is there only when it is complete."""
    rows, waiting = 0, []
    try:
        with io.replacing(target, "wb") as file:
            writer: pq.ParquetWriter | None = None
            for table in tables:
                writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
                waiting.append(table)
                rows += table.num_rows
                if sum(t.num_rows for t in waiting) >= ROWS_PER_ROW_GROUP:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if writer is None:
                raise DataError("no rows to predict")
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
            writer.close()
    except OSError as error:
        raise DataError(f"--out {target} cannot be written ({error.strerror or error})") from None
    return rows
