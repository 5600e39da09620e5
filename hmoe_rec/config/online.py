"""The section `online` of a run file: a source that is followed, its windows, rules and alarms."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from hmoe_rec.data.strict import Part

NotNegative = Annotated[float, Field(ge=0)]
Factor = Annotated[float, Field(gt=1)]


class AlarmConfig(Part):
    """When a window's data is suspicious, judged before the window is trained on."""

    calibration: Factor | None = Field(
        default=2.0, description="sum of predictions / sum of labels outside of [1/x, x] (null = no alarm)"
    )
    label_rate: Factor | None = Field(
        default=2.0, description="share of positives against the sliding windows' outside of [1/x, x] (null = no alarm)"
    )
    unseen_ids: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=0.5, description="more than this share of a field's ids was never seen (null = no alarm)"
    )
    min_positives: PositiveInt = Field(
        default=100, description="with fewer positives, counted or expected, the first two do not ring"
    )
    grace_windows: Annotated[int, Field(ge=0)] = Field(
        default=10, description="no alarm in a run's first windows, when everything is new"
    )
    stop_after: PositiveInt | None = Field(
        default=None,
        description="so many windows in a row with an alarm end the run, the last of them untrained (null = never)",
    )


class OnlineConfig(Part):
    """Online learning: what is followed, and how. Every window is tested on before it is trained on."""

    follow: str | None = Field(
        default=None,
        description="a directory (path or URI) in which Parquet files appear, or redis://host:port/database/stream",
    )
    until_idle: NotNegative | None = Field(
        default=None, description="end after so many seconds without anything new (null = a file _DONE, or never)"
    )
    start_from: str | None = Field(
        default=None, description="a run directory: begin with its model and optimizer (null = from scratch)"
    )
    start_checkpoint: str = Field(default="latest", description="of start_from: latest, best, or a step")
    order: Literal["name", "time"] = Field(
        default="name", description="of files: by path, or by the earliest time in them (schema's time column)"
    )
    late: Literal["train", "drop", "error"] = Field(
        default="train", description="a file that appears behind its place: train on arrival, drop it, or stop"
    )
    lateness: NotNegative = Field(
        default=0.0,
        description="order time: how much earlier than the latest file is not late yet (units of the time column)",
    )
    window_rows: PositiveInt = Field(
        default=65536, description="a window ends with the row group or message that reaches so many rows"
    )
    window_files: PositiveInt | None = Field(
        default=1, description="a window ends with the end of so many files (null = of any number)"
    )
    window_seconds: NotNegative = Field(
        default=60.0, description="a window waits no longer than this to become full (files below window_files, redis)"
    )
    windows_ahead: Annotated[int, Field(ge=0)] = Field(
        default=1, description="windows that are read while one is trained on; no more are held in memory"
    )
    sliding_windows: PositiveInt = Field(default=24, description="windows of the sliding metrics")
    poll_seconds: PositiveFloat = Field(default=2.0, description="between two looks at the source")
    patience_seconds: NotNegative = Field(
        default=300.0, description="how long an unreadable file may become readable, and a source not answer"
    )
    dead_letters: str | None = Field(
        default=None,
        description="file for messages, files and row groups that cannot be learned from, with reason and body "
        "(null = dead_letters.jsonl in run_dir)",
    )
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01,
        description="stop when more of the last 1,000 messages or row groups are bad, and ten at least (1 = never)",
    )
    checkpoint_windows: PositiveInt = Field(default=10, description="windows between checkpoints, at most")
    checkpoint_seconds: PositiveFloat = Field(default=300.0, description="seconds between checkpoints, at most")
    sketch_bits: Annotated[int, Field(ge=1024)] = Field(
        default=1 << 23, description="of the memory of seen ids, per field at most; a power of two"
    )
    alarms: AlarmConfig = Field(default=AlarmConfig(), description="when the data is suspicious")
