"""KuaiRand-Pure -> train, validation, test Parquet with behavior histories, and the schema that fits them.

    python tools/convert_kuairand.py KuaiRand-Pure data/kuairand

`--help` says what comes out. Where the columns come from: kuairand_source.py reads, kuairand_features.py looks back.
"""

from collections.abc import Sequence
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
from converting import (
    MISSING,
    ROW_GROUP_ROWS,
    Column,
    Floats,
    Ints,
    Windows,
    bucket,
    codes,
    floats,
    ints,
    label_rates,
    number_entry,
    quantile_edges,
    reporting_errors,
    say,
    sorted_vocabulary,
    write_rows,
    write_schema,
    write_vocabularies,
)
from kuairand_features import VideoTable, behavior_columns, past_day_columns, session_columns
from kuairand_source import (
    HISTORY_LENGTH,
    USER_CATEGORIES,
    USER_NUMBERS,
    UTC8_MS,
    Source,
    read_source,
)

from hmoe_rec.types import DataError

NUM_BUCKETS = 32
TRAIN_DAYS = "2022-04-25:2022-05-02"
WINDOW_LENGTHS = {"hist": HISTORY_LENGTH, "hist_like": 20, "hist_view": HISTORY_LENGTH}
VIDEO_CATEGORIES = ["video_type", "upload_type", "music_type"]
RATED = ["video", "author", "tab", "user"]
LOG1P = [
    *USER_NUMBERS,
    "duration_ms",
    "seconds_since_last",
    "exposures_last_hour",
    "exposures_before",
    *(f"{p}_same_{what}" for p in WINDOW_LENGTHS for what in ("video", "author", "tag")),
]
# Columns that the shorter schema does without. They are constant or repeat others (a range and its count, an author of
# a single video), and boosted trees are as good without them to a standard error.
LEFT_OUT = [
    "*_range", "tab_*", "is_*", "weekday", "video_type", "music_type", "author_share*", "user_share*", "*_same_video*",
    "*like_same_author*", "aspect_ratio_bucket", "upload_age_days_bucket",
    *(f"onehot_feat{i}" for i in (0, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15, 16, 17)),
]  # fmt: skip
COMMENT = """KuaiRand-Pure (standard policy), one row per exposure; made and explained by tools/convert_kuairand.py.
*_past_days: over strictly earlier days. hist_*: the user's behaviors strictly before the exposure, oldest first."""
FULL_COMMENT = "\nEvery column as a field; schema.yaml has those that matter."


class Table:
    """Columns of the exposures, and the schema entries that go with them, as they are added."""

    def __init__(self, train: Ints) -> None:
        self.train = train
        self.columns: dict[str, Column] = {}
        self.vocabularies: dict[str, pa.Array] = {}
        self.ids: list[dict[str, Any]] = []
        self.numbers: list[dict[str, Any]] = []

    def add_id(self, name: str, values: Ints, num_embeddings: int, **options: Any) -> None:
        """One id field; a field without two different values in training says nothing and is left out of the schema."""
        self.columns[name] = values
        if len(np.unique(values[self.train])) > 1:
            missing = {"missing": "own_row"} if (values == MISSING).any() else {}
            self.ids.append({"name": name, "num_embeddings": int(num_embeddings)} | missing | options)

    def add_category(self, name: str, values: pa.ChunkedArray, rows: Ints, **options: Any) -> Ints:
        """An id field of the features' distinct values, ascending; -1 where the feature is missing."""
        vocabulary = sorted_vocabulary(values)
        self.vocabularies[name] = vocabulary
        of_table = codes(values, vocabulary)
        self.add_id(name, of_table[rows], max(1, len(vocabulary)), **options)
        return of_table

    def add_number(self, name: str, values: Floats, transform: str) -> None:
        """A number, and an id field of its quantile buckets, whose edges are those of the training rows."""
        self.columns[name] = values
        if np.unique(values[self.train]).size < 2:
            return
        self.numbers.append(number_entry(name, values[self.train], transform))
        edges = quantile_edges(values[self.train], NUM_BUCKETS)
        self.add_id(f"{name}_bucket", bucket(values, edges), len(edges) + 1)


def build(source: Source, train: Ints) -> Table:
    """All columns of all exposures of the log."""
    log, table = source.log, Table(train)
    user_row = _row_of(ints(source.users["user_id"]), log.user)
    video_row = _row_of(ints(source.videos["video_id"]), log.video)
    table.add_id("user_id", log.user, int(ints(source.users["user_id"]).max()) + 1)
    table.add_id("video_id", log.video, int(ints(source.videos["video_id"]).max()) + 1)
    # A behavior's author or tag may be missing even where every exposure's is known.
    author = table.add_category("author_id", source.videos["author_id"], video_row, missing="own_row")
    table.add_category("music_id", source.videos["music_id"], video_row)
    main_tag = _add_tags(table, source, video_row)
    local_s = (log.time_ms + UTC8_MS) // 1000
    table.add_id("tab", log.tab, max(15, int(log.tab.max()) + 1))
    table.add_id("hour", local_s // 3600 % 24, 24)
    table.add_id("weekday", (local_s // 86400 + 3) % 7, 7)  # 1 January 1970 was a Thursday; 0 = Monday
    for name in VIDEO_CATEGORIES:
        table.add_category(name, source.videos[name], video_row)
    for name in USER_CATEGORIES:
        table.add_category(name, source.users[name], user_row)

    numbers: dict[str, Column] = {name: floats(source.users[name])[user_row] for name in USER_NUMBERS}
    width, height = (floats(source.videos[f"server_{side}"])[video_row] for side in ("width", "height"))
    numbers["duration_ms"] = np.where(log.duration_ms > 0, log.duration_ms, np.nan)
    numbers["aspect_ratio"] = np.where((width > 0) & (height > 0), width / np.maximum(height, 1), np.nan)
    numbers["upload_age_days"] = log.day - _upload_day(source.videos["upload_dt"])[video_row]
    videos = _by_video_id(ints(source.videos["video_id"]), author, main_tag)
    numbers |= session_columns(log, source.history)
    windows = behavior_columns(log, source.history, videos, WINDOW_LENGTHS)
    numbers |= {name: c for name, c in windows.items() if not isinstance(c, Windows)}
    seen = source.history.seen.video
    numbers |= past_day_columns(
        log,
        source.history,
        {
            "video": (log.video, seen),
            "author": (videos.author[log.video], videos.author[seen]),
            "tab": (log.tab, None),
            "user": (log.user, source.history.seen.user),
        },
    )
    for name, values in numbers.items():
        table.add_number(name, np.asarray(values, np.float64), "log1p" if name in LOG1P else "none")

    table.columns |= {name: c for name, c in windows.items() if isinstance(c, Windows)}
    table.columns |= {"time_ms": log.time_ms, "date": log.date} | dict(log.labels)
    return table


def schema_of(table: Table, tasks: list[str], left_out: Sequence[str] = ()) -> dict[str, Any]:
    """The schema, without the fields whose names match `left_out`."""

    def sequence(name: str, prefix: str) -> dict[str, Any]:
        targets = ("video_id", "author_id", "main_tag")
        return {
            "name": name,
            "columns": {f"{prefix}_{target}": target for target in targets},
            "times": f"{prefix}_time_ms",
            "exposure_time": "time_ms",
            "time_unit": "ms",
            "max_length": WINDOW_LENGTHS[prefix],
        }

    def kept(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [e for e in entries if not any(fnmatch(e["name"], pattern) for pattern in left_out)]

    return {
        "ids": kept(table.ids),
        "numbers": kept(table.numbers),
        "sequences": [sequence("history", "hist"), sequence("likes", "hist_like"), sequence("views", "hist_view")],
        "tasks": [{"name": task} for task in tasks],
        "user_key": "user_id",
        "keys": ["user_id", "video_id", "time_ms"],
        "time": "time_ms",
    }


def _row_of(ids: Ints, wanted: Ints) -> Ints:
    order = np.argsort(ids)
    return order[np.searchsorted(ids, wanted, sorter=order)]


def _by_video_id(video_id: Ints, author: Ints, main_tag: Ints) -> VideoTable:
    table = np.full((2, int(video_id.max()) + 1), MISSING)
    table[:, video_id] = author, main_tag
    return VideoTable(table[0], table[1])


def _upload_day(upload_dt: pa.ChunkedArray) -> Floats:
    """Days since 1970 of texts such as 2022-04-10; NaN where missing."""
    try:
        return floats(pc.cast(pc.cast(pc.cast(upload_dt, pa.string()), pa.date32()), pa.int32()))
    except pa.ArrowInvalid as error:
        raise DataError(f"video features: upload_dt must read like 2022-04-10: {error}") from error


def _add_tags(table: Table, source: Source, video_row: Ints) -> Ints:
    """Adds `tag`, the bag of a video's tags, and `main_tag`, its first; returns the main tag's code by video row."""
    texts = pc.cast(source.videos["tag"], pa.string()).combine_chunks()
    texts = pc.if_else(pc.is_in(texts, pa.array(["unknown", "UNKNOWN", ""])), pa.scalar(None, pa.string()), texts)
    lists = pc.split_pattern(pc.fill_null(texts, ""), ",")
    flat, parent = pc.utf8_trim_whitespace(pc.list_flatten(lists)), ints(pc.list_parent_indices(lists))
    known = pc.not_equal(flat, "").to_numpy(zero_copy_only=False)
    flat, parent = flat.filter(pa.array(known)), parent[known]
    try:
        vocabulary = sorted_vocabulary(pc.cast(flat, pa.int64()))
    except pa.ArrowInvalid as error:
        raise DataError(f"video features: tag must be numbers joined by commas, such as 12,65: {error}") from error
    code = codes(pc.cast(flat, pa.int64()), vocabulary)
    stop = np.cumsum(np.bincount(parent, minlength=len(texts)))
    start = np.concatenate([[0], stop[:-1]])
    main = np.where(stop > start, np.append(code, MISSING)[start], MISSING)
    table.vocabularies["tag"] = vocabulary
    table.columns["tag"] = Windows(start, stop, code, pa.int32()).rows(video_row)
    table.ids.append({"name": "tag", "num_embeddings": len(vocabulary), "pooling": "mean"})
    table.add_id("main_tag", main[video_row], len(vocabulary), missing="own_row")
    return main


def parse_days(text: str, option: str) -> tuple[int, int]:
    """2022-04-25:2022-05-02, or one day -> first and last day as yyyymmdd."""
    try:
        days = [int(f"{date.fromisoformat(day):%Y%m%d}") for day in text.split(":")]
    except ValueError:
        days = []
    if len(days) not in (1, 2) or days[0] > days[-1]:
        raise DataError(f"{option}: got {text!r}, expected one day or FIRST:LAST, such as 2022-04-25:2022-05-02")
    return days[0], days[-1]


def convert(source: Path, out: Path, days: dict[str, tuple[int, int]], row_group_rows: int) -> dict[str, int]:
    """Writes every split, the schema and the vocabularies to `out`; returns the rows of each split."""
    read = read_source(source, days["train"][0])
    log = read.log
    rows = {name: np.flatnonzero((log.date >= first) & (log.date <= last)) for name, (first, last) in days.items()}
    later = np.flatnonzero(log.date > max(last for _, last in days.values()))
    say(f"{len(log):,} exposures, {log.dropped:,} exact duplicates dropped")
    if not len(rows["train"]):
        raise DataError(f"{source}: no exposure on the training days {days['train'][0]} to {days['train'][1]}")
    table = build(read, rows["train"])
    for name, chosen in (rows | ({"later": later} if len(later) else {})).items():
        write_rows(out / f"{name}.parquet", table.columns, chosen, row_group_rows)
        say(f"{name}: {len(chosen):,} rows; {label_rates(log.labels, chosen)}")
    tasks = list(log.labels)
    write_schema(out / "schema.yaml", schema_of(table, tasks, LEFT_OUT), COMMENT)
    write_schema(out / "schema_full.yaml", schema_of(table, tasks), COMMENT + FULL_COMMENT)
    write_vocabularies(out / "vocabularies.json", table.vocabularies)
    return {name: len(chosen) for name, chosen in rows.items()}


app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="The unpacked public release, or the Parquet form.")],
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    train_days: Annotated[str, typer.Option(help="FIRST:LAST; what lies before FIRST is history.")] = TRAIN_DAYS,
    validation_days: Annotated[str, typer.Option(help="FIRST:LAST, or one day.")] = "2022-05-03",
    test_days: Annotated[str, typer.Option(help="FIRST:LAST, or one day.")] = "2022-05-04",
    row_group_rows: Annotated[int, typer.Option(min=1, help="Rows of one Parquet row group.")] = ROW_GROUP_ROWS,
) -> None:
    """KuaiRand-Pure to OUT/{train,validation,test}.parquet, schema.yaml and schema_full.yaml, one row per exposure.

    Days are the log's own (column date). Rows equal in every column are dropped but for the first. Each exposure gets
    the last 50 videos that its user was shown strictly before it (the histories before the log, extended by the log
    itself), the last 20 liked and the last 50 long-viewed ones, each with times; a time that the source lacks is the
    time of the user's last known behavior. Counts and rates in *_past_days are over strictly earlier days. Bucket
    edges, means and deviations come from the training rows. Exposures after the last test day, if any, go to
    OUT/later.parquet. play_time_ms, profile_stay_time, comment_stay_time are outcomes and never become inputs.
    """
    with reporting_errors():
        given = {"train": train_days, "validation": validation_days, "test": test_days}
        days = {name: parse_days(text, f"--{name}-days") for name, text in given.items()}
        convert(source, out, days, row_group_rows)


if __name__ == "__main__":
    app()
