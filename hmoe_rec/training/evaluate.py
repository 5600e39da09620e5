"""A model and a reader -> metrics per task; and the same for a finished run and any data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hmoe_rec import io
from hmoe_rec.batch import Batch
from hmoe_rec.config import RunConfig, load_config, prepare_data
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.data.schema import Schema
from hmoe_rec.metrics import TaskMetrics
from hmoe_rec.sharding.process import Process, choose_device, process_group
from hmoe_rec.training.build import build_sharded, load_state, state_of
from hmoe_rec.training.checkpoint import Checkpoint, CheckpointManager
from hmoe_rec.training.offsets import undo_in
from hmoe_rec.training.task import StepOutput
from hmoe_rec.types import CheckpointError, ConfigError

Results = dict[str, dict[str, float]]


def evaluate_batches(model: nn.Module, reader: BatchReader, tasks: Sequence[str], process: Process) -> Results:
    """Metrics of all ranks together, the same on each. A collective call; leaves the model in training mode if it was.

    Args:
        model: Batch -> (loss, StepOutput).
    """
    metrics = TaskMetrics(tasks, device=process.device, gauc=reader.source.schema.user_key is not None)
    score(model, reader.epoch(0), metrics, process.device)
    return metrics.compute()


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Batch], metrics: TaskMetrics, device: torch.device) -> None:
    """Adds this rank's predictions of some batches to the metrics; leaves the model in training mode if it was."""
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            _, output = model(batch.filled().to(device, non_blocking=True))
            assert isinstance(output, StepOutput)
            metrics.update(output.logits_BT, output.labels_BT, output.weights_B, output.groups_B)
    finally:
        model.train(was_training)


def evaluation_reader(
    uris: Sequence[str],
    schema: Schema,
    config: RunConfig,
    process: Process,
    *,
    with_labels: bool = True,
    carry: Sequence[str] = (),
) -> BatchReader:
    """In the files' order, every row once. See `BatchReader` for with_labels and carry."""
    source = ParquetSource(uris, schema, columns=(*schema.read_columns(with_labels), *carry))
    return BatchReader(
        source,
        global_batch_size=config.train.global_batch_size,
        rank=process.rank,
        world_size=process.world_size,
        shuffle=False,
        num_workers=config.data.num_workers,
        with_labels=with_labels,
        carry=carry,
    )


@dataclass(frozen=True)
class Run:
    """A run that has been trained: its configuration and its checkpoints."""

    config: RunConfig
    checkpoints: CheckpointManager


def read_run_config(run_dir: str) -> RunConfig:
    """
    Raises:
        ConfigError: not a run directory.
    """
    path = io.join(run_dir, "config.yaml")
    if not io.exists(path):
        raise ConfigError(f"{run_dir}: not a run directory (no config.yaml in it); give the train.run_dir of a run")
    return load_config(path)


def open_run(run_dir: str, config: RunConfig) -> Run:
    """Needs a process group, because all processes must find the same checkpoint."""
    return Run(config, CheckpointManager(io.join(run_dir, "checkpoints")))


def find_checkpoint(run: Run, wanted: str) -> Checkpoint:
    """wanted: see `CheckpointManager.find`.

    Raises:
        CheckpointError: there is none.
    """
    found = run.checkpoints.find(wanted)
    if found is None:
        raise CheckpointError(
            f"{run.checkpoints.uri}: no checkpoint {wanted!r}; give best, latest or the number of a saved step "
            "(a run saves at the end of every epoch and every train.checkpoint_every steps)"
        )
    return found


def load_for_evaluation(run: Run, process: Process, checkpoint: str) -> tuple[nn.Module, Checkpoint]:
    """The sharded training step with a checkpoint's model, whatever processes and plan wrote it."""
    found = find_checkpoint(run, checkpoint)
    # All groups hold the same tables, so that one will do; but a plan file is for a group of the run's.
    sharding = run.config.sharding
    grouped = sharding.plan.endswith(".json") and process.world_size % sharding.replicas == 0
    sharded = build_sharded(run.config, process, replicas=sharding.replicas if grouped else 1)
    state = {"model": state_of(sharded)["model"]}
    run.checkpoints.load_into(state, found)
    load_state(sharded, state)
    undo_in(sharded, found)
    return sharded, found


def evaluate_run(
    run_dir: str, data: str | Sequence[str] | None = None, checkpoint: str = "best", device: str | None = None
) -> dict[str, Any]:
    """Metrics of a run's checkpoint on some data.

    Args:
        data: files with labels; None = the run's own test data (validation where it has none).
        device: see `device_of`.

    Returns:
        {"checkpoint": directory, "step": n, "data": [...], "metrics": {task: {metric: value}}, "reference": ...}, where
        the reference is what the true probabilities of a synthetic log reach.
    """
    config = read_run_config(run_dir)
    with process_group(device_of(config, device)) as process:
        run = open_run(run_dir, config)
        uris, reference = _data_of(config, data)
        reader = evaluation_reader(uris, config.schema_of_data, config, process)
        sharded, found = load_for_evaluation(run, process, checkpoint)
        results = evaluate_batches(sharded, reader, config.tasks, process)
    return {
        "checkpoint": found.uri,
        "step": found.step,
        "data": list(uris),
        "metrics": results,
        "reference": reference,
    }


def device_of(config: RunConfig, asked: str | None = None) -> str:
    """ "cpu" or "cuda". asked: auto, cpu or cuda, in place of the run's own train.device; None = that."""
    return choose_device(asked or config.train.device)


def _data_of(config: RunConfig, data: str | Sequence[str] | None) -> tuple[Sequence[str], Mapping[str, Any] | None]:
    if data is not None:
        return ([data] if isinstance(data, str) else list(data)), None
    resolved = prepare_data(config)
    split = "test" if resolved.test else "validation"
    uris = resolved.test or resolved.validation
    if not uris:
        raise ConfigError("the run has neither test nor validation data; give --data URI")
    return uris, None if resolved.truth is None else resolved.truth.get(split)
