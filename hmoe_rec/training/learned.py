"""A checkpoint -> the examples that its parameters have learned from, again: of files, of a stream, of a run before.

::

    train      the first `step` global batches of the first epoch; all rows once where that epoch was finished
    follow     the windows of metrics.jsonl up to the checkpoint's step: slices of files, or messages
    start_from what the run that it began with had learned from, before its own

Every example counts once, however many epochs it was seen in: to see it again tells a posterior nothing new.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from hmoe_rec import io
from hmoe_rec.batch import Batch
from hmoe_rec.config import RunConfig, prepare_data
from hmoe_rec.data.parquet import BatchReader
from hmoe_rec.data.stream import Clock, Slice
from hmoe_rec.losses.exposure import loss_weights
from hmoe_rec.sharding.process import Process
from hmoe_rec.training.build import exposure_weights
from hmoe_rec.training.checkpoint import Checkpoint
from hmoe_rec.training.evaluate import find_checkpoint, open_run, read_run_config
from hmoe_rec.training.online import BEGAN_WITH, history_of, is_broker, open_stream, window_reader
from hmoe_rec.training.run_log import read_windows
from hmoe_rec.training.sampling import training_reader
from hmoe_rec.types import CheckpointError, ConfigError, DataError, HmoeError

GIVE_DATA = "give --data URI with the examples to fit on"


class Examples:
    """What one run has learned from, up to a step.

    Attributes:
        rows: over all processes.
    """

    rows: int
    steps: int

    def __init__(self, config: RunConfig, process: Process) -> None:
        self.config, self.process = config, process

    def batches(self) -> Iterator[Batch]:
        """This process's part of every global batch, as many on every process."""
        raise NotImplementedError(f"{type(self).__name__} defines batches()")

    def weighted(self) -> Iterator[tuple[Batch, Tensor]]:
        """The batches on the device, filled to equal parts, with the weights of their examples in the loss."""
        exposure = exposure_weights(self.config)
        exposure = exposure if exposure is None else exposure.to(self.process.device)
        for batch in self.batches():
            there = batch.filled().to(self.process.device, non_blocking=True)
            yield there, loss_weights(there, exposure)


class ReadExamples(Examples):
    """All rows of a reader, once, or those of its first steps."""

    def __init__(self, config: RunConfig, process: Process, reader: BatchReader, steps: int | None = None) -> None:
        super().__init__(config, process)
        self.reader = reader
        self.steps = reader.steps_per_epoch if steps is None else min(steps, reader.steps_per_epoch)
        self.rows = min(self.steps * config.train.global_batch_size, reader.num_rows)

    def batches(self) -> Iterator[Batch]:
        batches = self.reader.epoch(0)
        yield from islice(batches, self.steps)
        batches.close()  # type: ignore[attr-defined]


class FollowedExamples(Examples):
    """The windows of a stream, each read as it was in training.

    Raises:
        DataError: they are not there any more as they were.
    """

    def __init__(self, config: RunConfig, process: Process, windows: Sequence[Sequence[Slice]]) -> None:
        super().__init__(config, process)
        self.windows = windows
        self.stream = open_stream(config, prepare_data(config), Clock())
        self.rows = sum(one.rows for window in windows for one in window)
        # Looked at before the first collective call, so that no process is left waiting for another one.
        self.steps = sum(self._reader(window).steps_per_epoch for window in windows)

    def _reader(self, window: Sequence[Slice]) -> BatchReader:
        try:
            source = self.stream.open(window)
            rows = sum(one.rows for one in window)
            if source.num_rows != rows:
                raise DataError(f"{window[0]}: {source.num_rows} rows, {rows} when the run learned from them")
        except HmoeError as error:
            raise DataError(
                f"{self.stream.source}: what the run learned from cannot be read again ({error}); {GIVE_DATA}"
            ) from None
        return window_reader(self.config, source, self.process.rank, self.process.world_size)

    def batches(self) -> Iterator[Batch]:
        for window in self.windows:
            yield from self._reader(window).epoch(0)


def learned_from(
    run_dir: str, config: RunConfig, checkpoint: Checkpoint, process: Process
) -> tuple[list[Examples], list[str]]:
    """-> the examples, of the run that it began with first, and what a person should know of them. A collective call.

    Raises:
        CheckpointError, DataError: the run's own examples are not known, or not there any more as they were.
    """
    return _of_history(history_of(run_dir, checkpoint.step, checkpoint.meta), config, process)


def training_data(config: RunConfig, run_dir: str | None = None, step: int | None = None) -> list[str]:
    """Files that hold what a run has learned from: data.train, or of a followed run those of its windows, each whole.

    Args:
        run_dir: where the run is now; None = where its configuration says.
        step: windows up to it; None = all.

    Raises:
        ConfigError: the run names no training data, or followed a broker, which has no files.
    """
    run_dir = run_dir or config.train.run_dir
    windows = read_windows(run_dir) if config.online.follow is not None else []
    if windows and is_broker(str(config.online.follow)):
        raise ConfigError(f"{run_dir}: it learned from messages, which are in no files that could be counted here")
    units = dict.fromkeys(str(s[0]) for w in windows if step is None or w["step"] <= step for s in w["slices"])
    found = [io.join(str(config.online.follow), unit) for unit in units] or list(prepare_data(config).train)
    if not found:
        raise ConfigError(f"{run_dir}: the run names no training data (data.train), which is counted here")
    return found


def _of_history(history: Mapping[str, Any], config: RunConfig, process: Process) -> tuple[list[Examples], list[str]]:
    if history["rows of the stream"] is None:
        return [_of_files(history, config, process)], []
    windows = _windows(history)
    examples, notes = _of_run_before(history, config, process)
    return [*examples, FollowedExamples(config, process, windows)], notes


def _of_files(history: Mapping[str, Any], config: RunConfig, process: Process) -> Examples:
    position = history["position"]
    reader = training_reader(config, prepare_data(config), process, lanes=position.get("data.lanes"))
    rows = position.get("rows of data.train", reader.num_rows)
    if rows != reader.num_rows:
        raise DataError(
            f"{history['run_dir']}: {reader.num_rows:,} rows of data.train are learned from, {rows:,} when the "
            f"checkpoint was made; {GIVE_DATA}"
        )
    return ReadExamples(config, process, reader, history["step"])


def _windows(history: Mapping[str, Any]) -> list[list[Slice]]:
    run_dir, rows = history["run_dir"], history["rows of the stream"]
    lines = [line for line in read_windows(run_dir) if line["step"] <= history["step"]]
    windows = [_slices(line) for line in lines]
    found = sum(one.rows for window in windows for one in window)
    if found != rows:
        raise CheckpointError(
            f"{run_dir}: its metrics.jsonl tells of {found:,} rows up to step {history['step']}, and the checkpoint "
            f"learned from {rows:,}; {GIVE_DATA}"
        )
    return windows


def _slices(line: Mapping[str, Any]) -> list[Slice]:
    """Of a window. Logs of before do not say of how many parts; a message with one row, as most are, is one."""
    parts = line.get("parts", [rows for *_, rows in line["slices"]])
    return [Slice(*one, parts=n) for one, n in zip(line["slices"], parts, strict=True) if one[3]]


def _of_run_before(history: Mapping[str, Any], config: RunConfig, process: Process) -> tuple[list[Examples], list[str]]:
    """Of online.start_from, as far as it is known."""
    run_dir, before, notes = config.online.start_from, history[BEGAN_WITH], []
    if run_dir is None and before is None:
        return [], []
    try:
        other = read_run_config(before["run_dir"] if before else str(run_dir))
        if before is None:  # a run of before this was recorded
            found = find_checkpoint(open_run(str(run_dir), other), config.online.start_checkpoint)
            before = history_of(str(run_dir), found.step, found.meta)
            notes.append(
                f"which step of {run_dir} the run began with was not recorded; taken for the one that is its "
                f"{config.online.start_checkpoint} now, {found.step}"
            )
        if other.tasks != config.tasks:
            raise DataError(f"its tasks are {', '.join(other.tasks)}")
        examples, more = _of_history(before, other, process)
    except HmoeError as error:
        return [], [
            f"what {before['run_dir'] if before else run_dir} had learned from, which the run began with, is left out "
            f"({error}); variances are larger than they should be"
        ]
    return examples, [*notes, *more]
