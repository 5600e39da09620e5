"""A source without end -> windows of rows in order, each row once; the position goes into the model's checkpoint.

::

    look around ─▶ take: a window ─▶ (tested, then trained) ─▶ done: the position ─▶ saved with the parameters

What was taken and is not done is taken again after a restart. Delivery may thus repeat a row, the parameters that
survive have learned from it once: position and parameters are committed together or not at all.
"""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from hmoe_rec.data.parquet import ParquetSource
from hmoe_rec.data.schema import Schema
from hmoe_rec.data.source import RowGroup
from hmoe_rec.data.source import Unreachable as Unreachable  # what a stream raises, too
from hmoe_rec.types import CheckpointError

TABLE_GROUP_ROWS = 1 << 16
# What json, pyarrow and numpy raise at content that is not what it should be.
CONTENT_ERRORS = (pa.ArrowException, ValueError, TypeError, LookupError, OverflowError, RecursionError)
BAD = ("unreadable", "misfit", "wrong")  # kinds of notes: what they are about can never be learned from


class Clock:
    """Seconds since 1970, which never fall, and waiting. Tests put another one in its place."""

    def __init__(self) -> None:
        self._started = time.time() - time.monotonic()

    def now(self) -> float:
        return self._started + time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class Slice:
    """A run of rows that is read at once.

    Attributes:
        unit: a file, as its path below the stream's URI; or a broker's stream.
        first, last: row groups of the file, or ids of messages; both belong to it.
        rows: how many.
        parts: row groups or messages.
        ends: nothing of the unit is left behind it.
        time: the unit's earliest event, where units are ordered by time.
        mark: what the unit looked like, to see whether it has been changed.
    """

    unit: str
    first: int | str
    last: int | str
    rows: int
    parts: int = 1
    ends: bool = False
    time: float = 0.0
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.unit} {self.first}..{self.last}"


@dataclass(frozen=True)
class Note:
    """Something to tell of a unit: late, unreadable, misfit, empty, lost, wrong.

    Attributes:
        passed_over: nothing of the unit is learned from.
        where: what it is about, where that is less than the unit.
    """

    kind: str
    unit: str
    detail: str
    passed_over: bool = True
    where: Slice | None = None

    @property
    def id(self) -> str:
        """Names what it is about, the same after a restart."""
        return self.unit if self.where is None else str(self.where)


@dataclass(frozen=True)
class Window:
    """What is tested on, then trained on, as one.

    Attributes:
        slices: in order.
        notes: of what was found on the way.
        passed: slices that turned out unreadable: the position moves over them, nobody learns from them.
    """

    slices: tuple[Slice, ...]
    notes: tuple[Note, ...] = ()
    passed: tuple[Slice, ...] = ()

    @property
    def rows(self) -> int:
        return sum(s.rows for s in self.slices)

    @property
    def bad(self) -> tuple[Note, ...]:
        """Of what cannot be learned from."""
        return tuple(note for note in self.notes if note.kind in BAD)

    @property
    def units(self) -> int:
        """Messages or row groups of the window, bad ones included; a file that cannot be read counts as one."""
        whole = sum(note.where is None for note in self.bad)
        return sum(s.parts for s in (*self.slices, *self.passed)) + whole


@dataclass(frozen=True)
class WindowRule:
    """When a window is full.

    Attributes:
        rows: it ends with the row group or message that reaches so many rows.
        files: it ends with the end of so many files; None = of any number.
        seconds: it waits no longer than this to become full.
    """

    rows: int = 65536
    files: int | None = 1
    seconds: float = 60.0


@dataclass(frozen=True)
class Lag:
    """What is there and not done. units: files or messages. rows: about. seconds: since the oldest of it arrived."""

    units: int
    rows: int
    seconds: float


class Stream(ABC):
    """One source. The first process looks and takes; every process opens slices and is told what is done.

    Args:
        source: its address, without passwords.
        more_columns: that are read besides those of the schema.

    Attributes:
        restored_from: the address under which the restored position was saved; None where there is none.
    """

    kind: str

    def __init__(
        self, source: str, schema: Schema, *, rule: WindowRule, clock: Clock, more_columns: Sequence[str] = ()
    ) -> None:
        self.source, self.schema, self.rule, self.clock = source, schema, rule, clock
        self.restored_from: str | None = None
        self.columns = tuple(dict.fromkeys((*schema.read_columns(), *more_columns)))
        self.rows = 0  # done
        self.counts: Counter[str] = Counter()  # notes by kind, done
        self._partial_since: float | None = None

    @abstractmethod
    def poll(self) -> None:
        """Looks at what is there. Raises Unreachable."""

    @abstractmethod
    def take(self, *, flush: bool = False) -> Window | None:
        """The next window; None where there is none yet. flush: also one that is not full.

        Raises:
            DataError: something that the rules do not let pass.
        """

    @property
    @abstractmethod
    def over(self) -> bool:
        """Whether an end was announced, and all before it is taken."""

    @abstractmethod
    def lag(self) -> Lag: ...

    @abstractmethod
    def open(self, slices: Sequence[Slice]) -> ParquetSource:
        """The rows of some slices, in order.

        Raises:
            DataError, SchemaError: they cannot be read. Unreachable: not now.
        """

    @abstractmethod
    def halves(self, one: Slice) -> tuple[Slice, Slice] | None:
        """A slice in two, to find what is wrong in it; None: it is the smallest there is."""

    def fitting(self, slices: Sequence[Slice]) -> tuple[tuple[Slice, ...], list[tuple[Slice, str]]]:
        """Slices each of which can be read -> those that can be read together, and the others with the reason."""
        return tuple(slices), []

    def body_of(self, one: Slice) -> bytes | None:
        """What was sent, for someone who looks for what is wrong in it; None: the source keeps it, or has lost it."""
        return None

    @abstractmethod
    def _moved(self, window: Window) -> None: ...

    @abstractmethod
    def _own_position(self) -> dict[str, Any]: ...

    @abstractmethod
    def _restore(self, position: Mapping[str, Any]) -> None: ...

    def done(self, window: Window) -> None:
        """The parameters have learned from the window."""
        self.rows += window.rows
        self.counts.update(note.kind for note in window.notes)
        self._moved(window)

    def position(self) -> dict[str, Any]:
        """All that is done, for JSON."""
        common = {"kind": self.kind, "source": self.source, "rows": self.rows, "counts": dict(self.counts)}
        return common | self._own_position()

    def restore(self, position: Mapping[str, Any]) -> None:
        """Goes on behind a position.

        Raises:
            CheckpointError: it is one of another kind of source.
        """
        if position["kind"] != self.kind:
            raise CheckpointError(
                f"the checkpoint's position is in a stream of kind {position['kind']!r}, online.follow names one of "
                f"kind {self.kind!r}; follow the same source, or begin a run with online.start_from"
            )
        self.restored_from = position.get("source")
        self.rows, self.counts = position["rows"], Counter(position["counts"])
        self._restore(position)

    def _may_go(self, *, full: bool) -> bool:
        """Whether a window goes, or has waited long enough to become full."""
        now = self.clock.now()
        if self._partial_since is None:
            self._partial_since = now
        if not full and now - self._partial_since < self.rule.seconds:
            return False
        self._partial_since = None
        return True


class TableSource(ParquetSource):
    """A table in memory, for a `BatchReader`.

    Args:
        name: what error messages call it.

    Raises:
        SchemaError: it does not fit.
    """

    def __init__(self, table: pa.Table, schema: Schema, name: str) -> None:
        self._table, self.schema, self.files = table, schema, (name,)
        starts = range(0, table.num_rows, TABLE_GROUP_ROWS)
        self.row_groups = tuple(
            RowGroup(0, i, start, min(TABLE_GROUP_ROWS, table.num_rows - start)) for i, start in enumerate(starts)
        )
        self.num_rows = table.num_rows
        self._arrow_schemas, self._all_null = [table.schema], set()
        self.check(schema.read_columns())

    def open(self, file: int) -> Any:
        return _TableFile(self._table)


class _TableFile:
    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def read_row_group(self, index: int, columns: Sequence[str], use_threads: bool = False) -> pa.Table:
        return self._table.slice(index * TABLE_GROUP_ROWS, TABLE_GROUP_ROWS).select(list(columns))

    def close(self) -> None:
        pass
