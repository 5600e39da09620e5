"""KuaiRand-Pure's files -> `Log`, `History`, user and video tables, alike for both forms of the source.

The public release (Gao et al., KuaiRand, CIKM 2022, https://kuairand.com) has CSV files in its folder data/; the
Parquet form has interactions_*.parquet, user_history_until_*.parquet, user_features.parquet and
item_features_basic.parquet. The release's video statistics count the whole month, also the days to predict, so they are
never read; nor is the log of randomly inserted videos.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
from converting import Ints, ints, locate, matching, read_parquet, require_columns, say

from hmoe_rec.types import DataError

HISTORY_LENGTH = 50  # behaviors of a user that are kept from before the log
DAY_MS = 86_400_000
UTC8_MS = 8 * 3_600_000

LABELS = {"click": "is_click", "long_view": "long_view", "like": "is_like", "profile_enter": "is_profile_enter"}
LOG_COLUMNS = ["user_id", "video_id", "time_ms", "date", "tab", "duration_ms", *LABELS.values()]
# Outcomes and other feedback: read only so that rows equal in everything can be told from rows that differ.
OTHER_COLUMNS = [
    "hourmin",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "play_time_ms",
    "profile_stay_time",
    "comment_stay_time",
]
VIDEO_COLUMNS = [
    "video_id",
    "author_id",
    "video_type",
    "upload_dt",
    "upload_type",
    "server_width",
    "server_height",
    "music_id",
    "music_type",
    "tag",
]
USER_NUMBERS = ["follow_user_num", "fans_user_num", "friend_user_num", "register_days"]
USER_CATEGORIES = [
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    *(f"{name}_range" for name in USER_NUMBERS),
    *(f"onehot_feat{i}" for i in range(18)),
]
PUBLIC_LOGS = "log_standard_*_pure.csv"
PARQUET_LOG = "interactions_*.parquet"


@dataclass(frozen=True)
class Log:
    """Exposures in time order, without exact duplicates.

    Attributes:
        date: day of the log as yyyymmdd; the log files an exposure up to an hour early or late, see `day`.
        labels: task -> 0/1.
        dropped: exact duplicates left out.
    """

    user: Ints
    video: Ints
    time_ms: Ints
    date: Ints
    tab: Ints
    duration_ms: Ints
    labels: Mapping[str, Ints]
    dropped: int = 0

    @property
    def day(self) -> Ints:
        """Calendar day (UTC+8) of `time_ms`, counted from 1970. What is known "from earlier days" goes by this one."""
        return (self.time_ms + UTC8_MS) // DAY_MS

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: Ints) -> "Log":
        return Log(
            self.user[rows],
            self.video[rows],
            self.time_ms[rows],
            self.date[rows],
            self.tab[rows],
            self.duration_ms[rows],
            {k: v[rows] for k, v in self.labels.items()},
            self.dropped,
        )


@dataclass(frozen=True)
class Past:
    """Behaviors of one kind, flat, sorted by user, oldest first."""

    user: Ints
    video: Ints
    time_ms: Ints


@dataclass(frozen=True)
class History:
    """What users did before the log.

    A time that the source does not have is the time of the user's last behavior: the youngest it can be.

    Attributes:
        seen: each user's last 50 exposures, watched or not.
        liked, viewed: the last 50 that got the feedback (a like, a long view).
        total: user -> all exposures before the log.
    """

    seen: Past
    liked: Past
    viewed: Past
    total: Mapping[int, int]


@dataclass(frozen=True)
class Source:
    log: Log
    history: History
    users: pa.Table
    videos: pa.Table


def read_source(source: Path, first_date: int) -> Source:
    """Reads either form. `first_date` (yyyymmdd) begins the log; what lies before it is history.

    Raises:
        DataError: neither form is there, or a file, column or video is lacking.
    """
    if matching(source, PUBLIC_LOGS):
        read = _read_public(source, first_date)
    elif matching(source, PARQUET_LOG):
        read = _read_parquet_form(source, first_date)
    else:
        raise DataError(
            f"{source}: holds neither {PUBLIC_LOGS} (the public KuaiRand-Pure release, folder data/) nor "
            f"{PARQUET_LOG} (the Parquet form); give the folder of one of them"
        )
    if not len(read.log):
        raise DataError(f"{source}: no exposure on or after {first_date}; see --train-days")
    _require_known(read)
    return read


def _read_public(source: Path, first_date: int) -> Source:
    paths = matching(source, PUBLIC_LOGS)
    say(f"public release: {', '.join(p.name for p in paths)}")
    logs = pa.concat_tables([_read_csv(p, LOG_COLUMNS + OTHER_COLUMNS) for p in paths])
    log, dropped = _sorted_log(logs)
    before = ints(log["date"]) < first_date
    users = _read_csv(
        locate(source, "user_features_pure.csv", "user features"), ["user_id", *USER_NUMBERS, *USER_CATEGORIES]
    )
    videos = _read_csv(locate(source, "video_features_basic_pure.csv", "video features"), VIDEO_COLUMNS)
    kept = log.filter(pa.array(~before & ~dropped))
    # Duplicates stay in the history: the Parquet form's histories have them too.
    return Source(
        _to_log(kept, int((dropped & ~before).sum())), _history_of_log(log.filter(pa.array(before))), users, videos
    )


def _read_parquet_form(source: Path, first_date: int) -> Source:
    paths = matching(source, PARQUET_LOG)
    say(f"Parquet form: {', '.join(p.name for p in paths)}")
    log, dropped = _sorted_log(pa.concat_tables([read_parquet(p, LOG_COLUMNS + OTHER_COLUMNS) for p in paths]))
    keep = ~dropped & (ints(log["date"]) >= first_date)
    history = locate(source, "user_history_until_*.parquet", "histories of the users before the log")
    needed = ["user_id", "history_len", "last_time_ms", "watch_seq", "like_seq", "long_view_seq"]
    users = read_parquet(
        locate(source, "user_features.parquet", "user features"), ["user_id", *USER_NUMBERS, *USER_CATEGORIES]
    )
    videos = read_parquet(locate(source, "item_features_basic.parquet", "video features"), VIDEO_COLUMNS)
    return Source(
        _to_log(log.filter(pa.array(keep)), int(dropped.sum())),
        _history_of_lists(read_parquet(history, needed)),
        users,
        videos,
    )


def _read_csv(path: Path, columns: list[str]) -> pa.Table:
    try:
        with path.open() as file:
            header = file.readline().strip().split(",")
        require_columns(header, columns, path)
        text = {c: pa.string() for c in ("tag", "upload_dt", "video_type", "upload_type", "user_active_degree")}
        return csv.read_csv(
            path,
            convert_options=csv.ConvertOptions(include_columns=columns, strings_can_be_null=True, column_types=text),
        )
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable CSV file ({error}); download it again") from error


def _sorted_log(log: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """The log in time order (equal times in the file's order), and which rows repeat an earlier row in every column."""
    log = log.take(pa.array(np.argsort(ints(log["time_ms"], "time_ms"), kind="stable")))
    rows = np.stack([ints(log[c], c) for c in LOG_COLUMNS + OTHER_COLUMNS], axis=1)
    _, first = np.unique(rows, axis=0, return_index=True)
    repeated = np.ones(len(rows), bool)
    repeated[first] = False
    return log, repeated


def _to_log(table: pa.Table, dropped: int) -> Log:
    for label in LABELS.values():
        values = ints(table[label], label)
        if ((values != 0) & (values != 1)).any():
            raise DataError(f"log: column {label} holds {values[(values != 0) & (values != 1)][0]}; expected 0 or 1")
    user, video, time, date, tab, duration = (ints(table[c], c) for c in LOG_COLUMNS[:6])
    return Log(user, video, time, date, tab, duration, {t: ints(table[c]) for t, c in LABELS.items()}, dropped)


def _history_of_log(log: pa.Table) -> History:
    """The last behaviors of each user, with their own times, out of the log before its first day."""
    order = np.argsort(ints(log["user_id"]), kind="stable")
    log = log.take(pa.array(order))

    def last(chosen: np.ndarray) -> Past:
        user, video, time = (ints(log[c])[chosen] for c in ("user_id", "video_id", "time_ms"))
        stop = np.searchsorted(user, user, side="right")
        kept = np.arange(len(user)) >= stop - HISTORY_LENGTH
        return Past(user[kept], video[kept], time[kept])

    everything = np.ones(log.num_rows, bool)
    users, counts = np.unique(ints(log["user_id"]), return_counts=True)
    return History(
        last(everything),
        last(ints(log["is_like"]) == 1),
        last(ints(log["long_view"]) == 1),
        dict(zip(users.tolist(), counts.tolist(), strict=True)),
    )


def _history_of_lists(table: pa.Table) -> History:
    table = table.sort_by("user_id").combine_chunks()
    user, last_time = ints(table["user_id"]), ints(table["last_time_ms"])

    def flat(name: str) -> Past:
        parent = ints(pc.list_parent_indices(table[name]))
        return Past(user[parent], ints(pc.list_flatten(table[name])), last_time[parent])

    return History(
        flat("watch_seq"),
        flat("like_seq"),
        flat("long_view_seq"),
        dict(zip(user.tolist(), ints(table["history_len"]).tolist(), strict=True)),
    )


def _require_known(source: Source) -> None:
    """Raises DataError when the log or a history names a user or video that the feature files lack."""
    known_videos, known_users = ints(source.videos["video_id"]), ints(source.users["user_id"])
    history = source.history
    for what, values, known in (
        ("video", np.concatenate([source.log.video, history.seen.video]), known_videos),
        ("user", source.log.user, known_users),
    ):
        unknown = np.setdiff1d(values, known)
        if len(unknown):
            raise DataError(
                f"{len(unknown)} {what} ids of the log are not in the features, such as {unknown[0]}; "
                "the files belong to different releases"
            )
