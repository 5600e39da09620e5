"""A run directory -> its sharded model and batches of data, for analyses that look at both.

    with opened(run_dir) as run:
        for batch in run.batches(uri):
            fields, h_EBH = run.model.represent(batch)

Every process opens the same run and reads its share of the rows; what they count is added up by `total`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn

from hmoe_rec import io
from hmoe_rec.config import RunConfig, prepare_data
from hmoe_rec.model import HMoE
from hmoe_rec.progress import progress_bar
from hmoe_rec.sharding.process import Process, process_group
from hmoe_rec.training.checkpoint import Checkpoint
from hmoe_rec.training.evaluate import device_of, evaluation_reader, load_for_evaluation, open_run, read_run_config
from hmoe_rec.types import ConfigError


@dataclass(frozen=True)
class OpenRun:
    """A trained run, open for reading.

    Attributes:
        run_dir: where it is.
        task: the sharded training step in evaluation mode: Batch -> (loss, StepOutput).
        checkpoint: the one that was loaded.
    """

    run_dir: str
    config: RunConfig
    task: nn.Module
    checkpoint: Checkpoint
    process: Process

    @property
    def model(self) -> HMoE:
        """The model inside, its tables sharded."""
        inner: Any = self.task.module
        inner = getattr(inner, "module", inner)  # DDP's wrapper, where there are several processes
        assert isinstance(inner.model, HMoE), type(inner.model)
        return inner.model

    @property
    def is_first(self) -> bool:
        return self.process.rank == 0

    def uris(self, data: str | Sequence[str] | None = None) -> list[str]:
        """The files to read: `data`, or the run's test data, else validation, else train.

        Raises:
            ConfigError: the run has no data.
        """
        return data_of(self.config, data)

    def batches(
        self, uris: Sequence[str], *, rows: int | None = None, with_labels: bool = True, carry: Sequence[str] = ()
    ) -> Iterator[Any]:
        """This process's share of every batch, on its device, as large as that of the others (`Batch.filled`).

        All processes take the same number of batches, so that each may call the sharded model. Examples that only fill
        the share have weight 0.

        Args:
            rows: stop after about so many, over all processes; None = all.
            carry: further columns; then pairs (Batch, pyarrow.Table with this batch's rows of them) are given, where
                the table has no rows of examples that only fill the share.
        """
        reader = evaluation_reader(
            uris, self.config.schema_of_data, self.config, self.process, with_labels=with_labels, carry=carry
        )
        total = reader.source.num_rows if rows is None else min(rows, reader.source.num_rows)
        done = 0
        with progress_bar("rows") as progress:
            for item in reader.epoch(0):
                batch, carried = item if carry else (item, None)
                batch = batch.filled().to(self.process.device, non_blocking=True)
                yield (batch, carried) if carry else batch
                done += self.config.train.global_batch_size
                if self.is_first:
                    progress(min(done, total), total)
                if done >= total:
                    return

    def total(self, counts: Tensor) -> Tensor:
        """The sum over all processes, on each."""
        return total_over(self.process)(counts)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all processes, in the order of processes, on each."""
        return np.concatenate(self.process.gather(rows))

    def source(self, uris: Sequence[str] | None = None) -> dict[str, Any]:
        """For `Section.source`."""
        found: dict[str, Any] = {"run": self.run_dir, "step": self.checkpoint.step}
        return found if uris is None else {**found, "data": list(uris)}


@contextmanager
def opened(run_dir: str, checkpoint: str = "best", device: str | None = None) -> Iterator[OpenRun]:
    """Opens a run in its own process group; for several runs one after another, see `load`.

    Args:
        device: see `device_of`.

    Raises:
        ConfigError: not a run directory.
        CheckpointError: no such checkpoint.
    """
    with process_group(device_of(read_run_config(run_dir), device)) as process:
        yield load(run_dir, process, checkpoint)


def load(run_dir: str, process: Process, checkpoint: str = "best") -> OpenRun:
    """Opens one of several runs in a process group that exists."""
    config = read_run_config(run_dir)
    task, found = load_for_evaluation(open_run(run_dir, config), process, checkpoint)
    task.eval()
    return OpenRun(run_dir, config, task, found, process)


def data_of(config: RunConfig, data: str | Sequence[str] | None = None) -> list[str]:
    """`data`, or the run's test data, else validation, else train.

    Raises:
        ConfigError: the run has no data.
    """
    if data is not None:
        return [data] if isinstance(data, str) else list(data)
    resolved = prepare_data(config)
    found = resolved.test or resolved.validation or resolved.train
    if not found:
        raise ConfigError(f"{config.train.run_dir}: the run names no data; give --data URI")
    return list(found)


def total_over(process: Process) -> Callable[[Tensor], Tensor]:
    """A function that adds up a tensor over all processes; its result is on the CPU."""

    def total(counts: Tensor) -> Tensor:
        if process.world_size > 1:
            counts = counts.to(process.device)
            dist.all_reduce(counts)
        return counts.cpu()

    return total


def join_names(run_dirs: Sequence[str]) -> list[str]:
    """Short names that are all different: as many of the last folders as it takes."""
    parts = [d.rstrip("/").split("/") for d in run_dirs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [io.join(*p[-depth:]) if len(p[-depth:]) > 1 else p[-1] for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{d} ({i + 1})" for i, d in enumerate(run_dirs)]
