"""A directory in which Parquet files keep appearing -> windows of their row groups; each file once.

A file counts from the moment its footer can be read: names that begin with "_" or "." or do not end with ".parquet" are
other programs' business, and a file that is empty or half-written is waited for. Under order "name" the files behind it
wait too; under order "time" they do not, since nobody knows its time. What stays unreadable without growing for
`patience_seconds` is passed over.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hmoe_rec import io
from hmoe_rec.data import fit
from hmoe_rec.data.listing import Names, is_ours, list_files
from hmoe_rec.data.parquet import ParquetSource
from hmoe_rec.data.schema import Schema
from hmoe_rec.data.source import read_footer
from hmoe_rec.data.stream import Clock, Lag, Note, Slice, Stream, Unreachable, Window, WindowRule
from hmoe_rec.types import DataError

DONE = "_DONE"  # a file of this name in the directory says that no more will come


@dataclass(frozen=True)
class _File:
    """A file whose footer has been read. groups: rows of each row group."""

    name: str
    groups: tuple[int, ...]
    time: float

    @property
    def key(self) -> tuple[float, str]:
        return self.time, self.name

    @property
    def mark(self) -> str:
        return _mark(self.groups)


class FileStream(Stream):
    """
    Args:
        uri: a directory, local or remote; it may not be there yet.
        order: "name": by path below the directory; "time": by each file's earliest `schema.time`, from its statistics.
        late: what becomes of a file that appears behind its place: "train" = when it arrives, "drop", "error".
        lateness: with order "time", how much earlier than the latest file taken a file may be before it is late; in
            units of the time column, in seconds for timestamps.
        patience_seconds: see above.

    Raises:
        DataError: order "time" without a time column in the schema.
    """

    kind = "files"

    def __init__(
        self,
        uri: str,
        schema: Schema,
        *,
        rule: WindowRule,
        order: str = "name",
        late: str = "train",
        lateness: float = 0.0,
        patience_seconds: float = 300.0,
        clock: Clock,
        more_columns: Sequence[str] = (),
    ) -> None:
        super().__init__(uri, schema, rule=rule, clock=clock, more_columns=more_columns)
        if order == "time" and schema.time is None:
            raise DataError("online.order: time needs the schema's time column; set `time:` in the schema")
        self.uri, self.order, self.late, self.lateness = uri, order, late, lateness
        self.patience_seconds = patience_seconds
        # On every process: what is done.
        self.files = 0
        self._done = Names()
        self._latest: tuple[float, str] | None = None
        self._current: dict[str, Any] | None = None  # a file that is done in part: name, next row group, mark
        # On the first process: what is on its way.
        self._listed: dict[str, tuple[int, float]] = {}  # name -> (size, arrival)
        self._ready: dict[str, _File] = {}
        self._next_group: dict[str, int] = {}  # of a file that is taken in part
        self._gone: dict[str, int] = {}  # name -> rows: taken or passed over, not done
        self._ahead: tuple[float, str] | None = None  # the latest file taken
        self._trouble: dict[str, tuple[int, float]] = {}  # unreadable -> (size, since when it has this size)
        self._notes: list[Note] = []
        self._announced_end = False

    # ------------------------------------------------------------------------------------------------ the first process

    def poll(self) -> None:
        try:
            found = list_files(self.uri, self.clock.now(), self._listed)
        except OSError as error:
            raise Unreachable(f"{self.uri}: cannot be listed: {error}") from error
        self._announced_end = DONE in found
        self._listed = {name: what for name, what in found.items() if is_ours(name)}
        if self._listed:  # a directory that is away for a while comes back with the same names
            self._done.forget(self._listed)
        for name in self._next_group:  # also where it is no longer there: it is waited for, and then told
            self._listed.setdefault(name, (-1, self.clock.now()))
        self._ready = {name: file for name, file in self._ready.items() if name in self._listed}

    @property
    def over(self) -> bool:
        return self._announced_end and not self._waiting() and not self._notes

    def take(self, *, flush: bool = False) -> Window | None:
        self._read_footers()
        chosen: list[Slice] = []
        notes: list[Note] = []
        for file in self._in_order():
            if self._is_late(file):
                late = Note("late", file.name, "it comes before others that are done", passed_over=self.late == "drop")
                if self._is_refused(late):
                    continue
                notes.append(late)
            chosen.append(self._slice(file, self.rule.rows - sum(s.rows for s in chosen)))
            if self._is_full(chosen):
                break
        if chosen and self._may_go(full=flush or self._announced_end or self._is_full(chosen)):
            for one in chosen:
                self._took(one)
            return Window(tuple(chosen), (*self._told(), *notes))
        return Window((), self._told()) if self._notes and not chosen else None

    def lag(self) -> Lag:
        known = {name: sum(file.groups[self._next_group.get(name, 0) :]) for name, file in self._ready.items()}
        known |= self._gone
        undone = [name for name in self._listed if name not in self._done]
        mean = sum(known.values()) / len(known) if known else self.rows / max(1, self.files)
        rows = sum(known.get(name, mean) for name in undone)
        oldest = min((self._listed[name][1] for name in undone), default=self.clock.now())
        return Lag(len(undone), round(rows), max(0.0, self.clock.now() - oldest))

    def _waiting(self) -> list[str]:
        """By name; the file that is taken in part comes first."""
        names = [name for name in self._listed if name not in self._gone and name not in self._done]
        return sorted(names, key=lambda name: (name not in self._next_group, name))

    def _read_footers(self) -> None:
        """Of the files that come next, up to a full window; of all that wait where their times make the order."""
        rows = 0
        for name in self._waiting():
            if name not in self._ready and not self._look_at(name):
                if self.order == "name" and name not in self._gone:
                    return
                continue
            rows += sum(self._ready[name].groups[self._next_group.get(name, 0) :])
            if self.order == "name" and rows >= self.rule.rows:
                return

    def _in_order(self) -> Iterator[_File]:
        """Files to take from: under order "name" up to the first one that is not ready.

        A file that is taken in part is finished before another one begins, since a position is in one file.
        """
        names = self._waiting()
        if any(name not in self._ready for name in self._next_group):
            return
        if self.order == "time":
            ready = [self._ready[name] for name in names if name in self._ready]
            yield from sorted(ready, key=lambda file: (file.name not in self._next_group, file.key))
            return
        for name in names:
            if name not in self._ready:
                return
            yield self._ready[name]

    def _look_at(self, name: str) -> bool:
        """Reads a footer; a file that cannot be read, or does not fit, is passed over in time. -> it is ready."""
        size = self._listed[name][0]
        try:
            footer = read_footer(io.join(self.uri, name))
        except Unreachable:  # the file may be sound
            raise
        except DataError as error:
            known, since = self._trouble.get(name, (size, self.clock.now()))
            self._trouble[name] = size, since if known == size else self.clock.now()
            if self.clock.now() - self._trouble[name][1] >= self.patience_seconds:
                self._pass_over(Note("unreadable", name, str(error)))
            return False
        self._trouble.pop(name, None)
        problems = fit.misfits(footer.schema.to_arrow_schema(), self.schema, self.columns)
        groups = _rows_of_groups(footer)
        times = _earliest(footer, self.schema.time) if self.order == "time" and self.schema.time else 0.0
        if problems:
            self._pass_over(Note("misfit", name, "; ".join(problems)))
        elif not sum(groups):
            self._pass_over(Note("empty", name, "0 rows"))
        elif times is None:
            detail = f"no statistics of column {self.schema.time} as numbers, timestamps or dates; order by name"
            self._pass_over(Note("misfit", name, detail))
        else:
            self._ready[name] = self._unchanged(_File(name, groups, times))
            return True
        return False

    def _unchanged(self, file: _File) -> _File:
        if self._current and file.name == self._current["file"] and file.mark != self._current["mark"]:
            raise DataError(
                f"{io.join(self.uri, file.name)}: it was changed while it was being read ({self._current['mark']} "
                f"before, {file.mark} now); put the file back as it was, or remove it"
            )
        return file

    def _is_late(self, file: _File) -> bool:
        if self._ahead is None or file.name in self._next_group:
            return False
        if self.order == "name":
            return file.key < self._ahead
        return file.time < self._ahead[0] - self.lateness

    def _is_refused(self, late: Note) -> bool:
        if self.late == "error":
            raise DataError(
                f"{io.join(self.uri, late.unit)}: late: {late.detail}; set online.late to train or drop, or raise "
                "online.lateness"
            )
        if late.passed_over:
            self._pass_over(late)
        return late.passed_over

    def _slice(self, file: _File, room: int) -> Slice:
        """The next row groups of a file, until `room` rows are reached."""
        first = last = self._next_group.get(file.name, 0)
        rows = file.groups[first]
        while rows < room and last + 1 < len(file.groups):
            last += 1
            rows += file.groups[last]
        ends = last + 1 == len(file.groups)
        return Slice(file.name, first, last, rows, last + 1 - first, ends, file.time, file.mark)

    def _is_full(self, chosen: Sequence[Slice]) -> bool:
        ended = sum(one.ends for one in chosen)
        return sum(one.rows for one in chosen) >= self.rule.rows or ended >= (self.rule.files or ended + 1)

    def _took(self, one: Slice) -> None:
        file = self._ready[one.unit]
        self._ahead = file.key if self._ahead is None else max(self._ahead, file.key)
        if one.ends:
            self._gone[one.unit] = sum(file.groups)
            del self._ready[one.unit]
            self._next_group.pop(one.unit, None)
        else:
            self._next_group[one.unit] = int(one.last) + 1

    def _pass_over(self, note: Note) -> None:
        self._notes.append(note)
        self._gone[note.unit] = 0
        self._ready.pop(note.unit, None)
        self._next_group.pop(note.unit, None)

    def _told(self) -> tuple[Note, ...]:
        told = tuple(self._notes)
        self._notes.clear()
        return told

    # -------------------------------------------------------------------------------------------------- every process

    def open(self, slices: Sequence[Slice]) -> ParquetSource:
        return _Groups(self.uri, slices, self.schema)

    def halves(self, one: Slice) -> tuple[Slice, Slice] | None:
        first, last = int(one.first), int(one.last)
        if first == last:
            return None
        middle = (first + last) // 2
        groups = _rows_of_groups(read_footer(io.join(self.uri, one.unit)))
        if _mark(groups) != one.mark:
            return None
        rows = sum(groups[first : middle + 1])
        before = replace(one, last=middle, rows=rows, parts=middle + 1 - first, ends=False)
        return before, replace(one, first=middle + 1, rows=one.rows - rows, parts=last - middle)

    def _moved(self, window: Window) -> None:
        slices = (*window.slices, *window.passed)
        ended = {s.unit for s in slices if s.ends}
        for s in slices:
            key = s.time, s.unit
            self._latest = key if self._latest is None else max(self._latest, key)
        for name in sorted(ended | {note.unit for note in window.notes if note.passed_over}):
            self._done.add(name)
            self._gone.pop(name, None)
        self.files += len(ended)
        left = [s for s in slices if s.unit not in ended]
        if left:
            next_group = max(int(s.last) for s in left) + 1
            self._current = {"file": left[0].unit, "next": next_group, "mark": left[0].mark}
        elif slices or (self._current and self._current["file"] in self._done):
            self._current = None

    def _own_position(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "latest": None if self._latest is None else list(self._latest),
            "current": self._current,
            "done": self._done.packed(),
        }

    def _restore(self, position: Mapping[str, Any]) -> None:
        self.files, self._current = position["files"], position["current"]
        self._latest = None if position["latest"] is None else (position["latest"][0], position["latest"][1])
        self._ahead, self._done = self._latest, Names(position["done"])
        self._next_group = {} if self._current is None else {self._current["file"]: self._current["next"]}


class _Groups(ParquetSource):
    """Some row groups of some files. A label that no row has is no mistake here: a window may be small.

    Raises:
        DataError: a file has been changed since its slice was taken, so that processes could read different rows.
    """

    def __init__(self, uri: str, slices: Sequence[Slice], schema: Schema) -> None:
        names = list(dict.fromkeys(s.unit for s in slices))
        super().__init__([io.join(uri, name) for name in names], schema, columns=schema.read_columns(with_labels=False))
        wanted = {(s.unit, g) for s in slices for g in range(int(s.first), int(s.last) + 1)}
        self.row_groups = tuple(g for g in self.row_groups if (names[g.file], g.index) in wanted)
        self.num_rows = sum(group.num_rows for group in self.row_groups)
        self._all_null = set()
        rows_of = {(names[g.file], g.index): g.num_rows for g in self.row_groups}
        for s in slices:
            rows = sum(rows_of.get((s.unit, g), 0) for g in range(int(s.first), int(s.last) + 1))
            if rows != s.rows:
                raise DataError(
                    f"{io.join(uri, s.unit)}: it was changed while it was being read ({s.rows} rows in row groups "
                    f"{s.first} to {s.last} before, {rows} now); give new rows a file of another name"
                )


def _rows_of_groups(footer: pq.FileMetaData) -> tuple[int, ...]:
    return tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))


def _mark(groups: Sequence[int]) -> str:
    return f"{sum(groups)} rows in {len(groups)} row groups"


def _earliest(footer: pq.FileMetaData, column: str) -> float | None:
    """The least value of a column by its statistics, in seconds for timestamps; None where they do not say it."""
    least = []
    for g in range(footer.num_row_groups):
        group = footer.row_group(g)
        if not group.num_rows:
            continue
        of_column = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column]
        statistics = of_column[0].statistics if of_column else None
        if statistics is None or not statistics.has_min_max:
            return None
        least.append(statistics.min)
    if not least:
        return 0.0
    if isinstance(least[0], int | float):
        return float(min(least))
    try:
        return pa.scalar(min(least)).cast(pa.timestamp("us")).value * 1e-6
    except pa.ArrowException:  # text that is no time, a time of day
        return None
