"""Exposures and what is known before each -> behavior windows, counts and rates of earlier days. Nothing looks ahead.

Three rules keep the future out:

- a behavior window holds what the user did at a strictly earlier time; exposures of one instant do not see each other;
- feedback (a like, a long view) enters a window only `FEEDBACK_DELAY_MS` after its exposure, when it can be known;
- counts and rates are over strictly earlier calendar days (UTC+8), by the time of the exposure.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from converting import MISSING, Column, Floats, Ints, Windows
from kuairand_source import DAY_MS, UTC8_MS, History, Log

FEEDBACK_DELAY_MS = 10 * 60_000
TIME_BITS = 44  # a time in ms fits, and so does a user id above it
SMOOTHING_EVENTS = 3.0  # a rate is mixed with the overall rate as if it had seen that many events more


@dataclass(frozen=True)
class Behaviors:
    """Behaviors of all users, flat, sorted by user and time; equal times keep their order."""

    key: Ints
    video: Ints
    time_ms: Ints

    @classmethod
    def of(cls, user: Ints, video: Ints, time_ms: Ints) -> "Behaviors":
        key = (user << TIME_BITS) + time_ms
        order = np.argsort(key, kind="stable")
        return cls(key[order], video[order], time_ms[order])

    def before(self, user: Ints, time_ms: Ints, length: int | None) -> tuple[Ints, Ints]:
        """Start and stop of each user's last `length` behaviors strictly before the given time."""
        begin = np.searchsorted(self.key, user << TIME_BITS)
        stop = np.searchsorted(self.key, (user << TIME_BITS) + time_ms)
        start = begin if length is None else np.maximum(begin, stop - length)
        return start, stop


@dataclass(frozen=True)
class VideoTable:
    """What the behaviors' videos are looked up in, indexed by video id: author code and main tag code (-1 = none)."""

    author: Ints
    main_tag: Ints


def behavior_columns(log: Log, history: History, videos: VideoTable, lengths: Mapping[str, int]) -> dict[str, Column]:
    """Windows `hist_*`, `hist_like_*`, `hist_view_*`, and how often they hold the exposure's video, author, tag."""
    like, view = log.labels["like"] == 1, log.labels["long_view"] == 1
    everything = np.ones(len(log), bool)
    kinds = {
        "hist": (history.seen.user, history.seen.video, history.seen.time_ms, everything, 0),
        "hist_like": (history.liked.user, history.liked.video, history.liked.time_ms, like, FEEDBACK_DELAY_MS),
        "hist_view": (history.viewed.user, history.viewed.video, history.viewed.time_ms, view, FEEDBACK_DELAY_MS),
    }
    columns: dict[str, Column] = {}
    for prefix, (user, video, time_ms, chosen, delay_ms) in kinds.items():
        behaviors = Behaviors.of(
            np.concatenate([user, log.user[chosen]]),
            np.concatenate([video, log.video[chosen]]),
            np.concatenate([time_ms, log.time_ms[chosen]]),
        )
        start, stop = behaviors.before(log.user, log.time_ms - delay_ms, lengths[prefix])
        window = Windows(start, stop, behaviors.video, pa.int32())
        columns[f"{prefix}_video_id"] = window
        columns[f"{prefix}_author_id"] = Windows(start, stop, videos.author[behaviors.video], pa.int32())
        columns[f"{prefix}_main_tag"] = Windows(start, stop, videos.main_tag[behaviors.video], pa.int32())
        columns[f"{prefix}_time_ms"] = Windows(start, stop, behaviors.time_ms, pa.int64())
        columns |= _matches(prefix, window, log.video, videos)
    return columns


def _matches(prefix: str, window: Windows, target: Ints, videos: VideoTable) -> dict[str, Column]:
    row, video = window.flat()
    same = {
        "video": video == target[row],
        "author": videos.author[video] == videos.author[target[row]],
        "tag": (videos.main_tag[video] == videos.main_tag[target[row]]) & (videos.main_tag[video] != MISSING),
    }
    return {
        f"{prefix}_same_{what}": np.bincount(row[hit], minlength=len(target)).astype(np.float64)
        for what, hit in same.items()
    }


def session_columns(log: Log, history: History) -> dict[str, Column]:
    """How much, and how long ago, the user was shown something before (no feedback in it)."""
    behaviors = Behaviors.of(
        np.concatenate([history.seen.user, log.user]),
        np.concatenate([history.seen.video, log.video]),
        np.concatenate([history.seen.time_ms, log.time_ms]),
    )
    begin, stop = behaviors.before(log.user, log.time_ms, None)
    last = np.where(stop > begin, behaviors.time_ms[np.maximum(stop - 1, 0)], 0)
    gap_s = np.where(stop > begin, (log.time_ms - last) / 1000.0, np.nan)
    logged = Behaviors.of(log.user, log.video, log.time_ms)
    first, now = logged.before(log.user, log.time_ms, None)
    _, hour_ago = logged.before(log.user, log.time_ms - 3_600_000 + 1, None)
    earlier = Behaviors.of(history.seen.user, history.seen.video, history.seen.time_ms)
    _, before = earlier.before(log.user, log.time_ms, None)
    not_yet = np.searchsorted(earlier.key, (log.user + 1) << TIME_BITS) - before
    before_log = np.array([history.total.get(int(u), 0) for u in log.user], np.float64) - not_yet
    return {
        "seconds_since_last": gap_s,
        "exposures_last_hour": (now - hour_ago).astype(np.float64),
        "exposures_before": before_log + (now - first),
    }


def past_day_columns(log: Log, history: History, entities: Mapping[str, tuple[Ints, Ints | None]]) -> dict[str, Column]:
    """Popularity and smoothed feedback rates of each entity on strictly earlier days.

    Args:
        entities: name -> its code at every exposure, and at every behavior of `history.seen` (None: not known there).

    Returns columns `{entity}_share_past_days` = log(1 + exposures among 10,000), and `{entity}_{task}_rate_past_days`
    = logit of (events + s p) / (exposures + s), p = rate of that task over all earlier days, s = SMOOTHING_EVENTS / p.
    NaN where the entity has no earlier day. Histories know of likes and long views, not of the other tasks.
    """
    day = np.concatenate([(history.seen.time_ms + UTC8_MS) // DAY_MS, log.day])
    day -= day.min()
    num_days = int(day.max()) + 1
    known = _history_labels(history)
    unknown = np.full(len(history.seen.user), np.nan)
    labels = {task: np.concatenate([known.get(task, unknown), values]) for task, values in log.labels.items()}
    columns: dict[str, Column] = {}
    now = slice(len(history.seen.user), None)
    for name, (logged, before) in entities.items():
        code = np.concatenate([np.full(len(unknown), MISSING) if before is None else before, logged])
        counts = _PastCounts(code, day, num_days)
        shown, shown_all = counts.of(code != MISSING, now)
        columns[f"{name}_share_past_days"] = np.where(
            shown > 0, np.log1p(10_000 * shown / np.maximum(shown_all, 1)), np.nan
        )
        for task, label in labels.items():
            seen, seen_all = counts.of((code != MISSING) & ~np.isnan(label), now)
            events, events_all = counts.of((code != MISSING) & (label == 1), now)
            with np.errstate(divide="ignore", invalid="ignore"):
                overall = (events_all + 1) / (seen_all + 2)
                smooth = SMOOTHING_EVENTS / overall
                rate = (events + smooth * overall) / (seen + smooth)
                columns[f"{name}_{task}_rate_past_days"] = np.where(seen > 0, np.log(rate / (1 - rate)), np.nan)
    return columns


@dataclass(frozen=True)
class _PastCounts:
    """Counts of rows by entity over the days strictly before each row's own."""

    code: Ints
    day: Ints
    num_days: int

    def of(self, chosen: np.ndarray, rows: slice) -> tuple[Floats, Floats]:
        """For every row in `rows`: chosen rows of its entity on earlier days, and of all entities on earlier days."""
        num_codes = int(self.code.max(initial=-1)) + 1
        cell = self.code[chosen] * self.num_days + self.day[chosen]
        by_day = np.bincount(cell, minlength=num_codes * self.num_days).reshape(num_codes, self.num_days)
        earlier = np.cumsum(by_day, axis=1) - by_day
        code, day = self.code[rows], self.day[rows]
        entity = np.where(code == MISSING, 0, earlier[code, day]).astype(np.float64)
        return entity, earlier.sum(0)[day].astype(np.float64)


def _history_labels(history: History) -> dict[str, Floats]:
    """Whether each behavior of `seen` is among the user's liked and long-viewed ones, by user and video."""

    def among(user: Ints, video: Ints) -> Floats:
        pairs = (user << TIME_BITS) + video
        return np.isin((history.seen.user << TIME_BITS) + history.seen.video, pairs).astype(np.float64)

    return {
        "like": among(history.liked.user, history.liked.video),
        "long_view": among(history.viewed.user, history.viewed.video),
    }
