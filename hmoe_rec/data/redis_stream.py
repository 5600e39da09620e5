"""A Redis stream -> windows of its messages; each message once.

A message (XADD) has one of three fields::

    row    one example: a JSON object with every column that the schema reads (null = no value)
    rows   many examples: an Arrow IPC stream
    done   anything: no more will come

The position is the id of the last message that is done, and it is kept in the checkpoint, not in the broker: nothing is
acknowledged and nothing is removed. Producers trim the stream (MAXLEN, MINID); what they trim before it was read is
told as lost. What cannot be read, or does not fit most others of its window, is passed over (dead_letters.py).
"""

import json
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa

from hmoe_rec.data import fit
from hmoe_rec.data.arrow_message import read_table
from hmoe_rec.data.schema import Schema
from hmoe_rec.data.stream import (
    CONTENT_ERRORS,
    Clock,
    Lag,
    Note,
    Slice,
    Stream,
    TableSource,
    Unreachable,
    Window,
    WindowRule,
)
from hmoe_rec.types import ConfigError, DataError

PAGE = 1000  # messages that are asked for at once, at most
MOST_ROW_BYTES = 1 << 24  # of one example: its JSON takes some ten times as much once it is read
BEGINNING = "0-0"


@dataclass(frozen=True)
class _Message:
    """Its examples: one, or a table of many; none where it cannot be read."""

    id: str
    row: dict[str, Any] | None = None
    table: pa.Table | None = None
    problem: str = ""

    @property
    def rows(self) -> int:
        return self.table.num_rows if self.table is not None else int(self.row is not None)

    def types(self) -> pa.Schema:
        return self.table.schema if self.table is not None else pa.Table.from_pylist([self.row]).schema


class RedisStream(Stream):
    """
    Args:
        uri: redis://[user:password@]host[:port]/database/stream; rediss:// with TLS.

    Raises:
        ConfigError: the URI names no database or no stream, or the package `redis` is not installed.
    """

    kind = "redis"

    def __init__(
        self, uri: str, schema: Schema, *, rule: WindowRule, clock: Clock, more_columns: Sequence[str] = ()
    ) -> None:
        super().__init__(_without_password(uri), schema, rule=rule, clock=clock, more_columns=more_columns)
        self._client, self.name = _connect(uri)
        self._last = BEGINNING  # done
        self._messages = 0  # done, or trimmed before the run began
        self._lost = 0  # less what a stream that was begun anew does not count any more
        self._taken = BEGINNING
        self._waiting: deque[_Message] = deque()
        self._seen, self._num_seen = BEGINNING, 0  # the last one of those that wait; messages up to it
        self._rows_per_message = rule.rows  # about; at first a window of its own
        self._opened: dict[tuple[str, str], list[_Message]] = {}  # of the first process, which need not ask again
        self._notes: list[Note] = []
        self._added = 0
        self._oldest: str | None = None
        self._ended = False

    # ------------------------------------------------------------------------------------------------ the first process

    def poll(self) -> None:
        from redis.exceptions import ResponseError

        try:
            about = self._ask(lambda client: client.xinfo_stream(self.name))
        except ResponseError as error:
            if "no such key" in str(error):
                return
            raise DataError(f"{self.name}: not a stream: {error}") from error
        self._added = int(about.get("entries-added", about["length"]))
        first, newest = about.get("first-entry"), _text(about["last-generated-id"])
        if first and _key(newest) < _key(self._seen):
            raise DataError(
                f"{self.name}: its newest message {newest} comes before {self._seen}, which was read already: the "
                "stream was begun anew with lower ids. Add messages with ids above that one (XADD with *, or XSETID), "
                "or follow it with another run (online.start_from)"
            )
        if "entries-added" in about:  # since version 7
            self._notice_lost(self._added - int(about["length"]), first)
        self._fill()
        following = self._ask(lambda client: client.xrange(self.name, f"({self._last}", "+", count=1))
        self._oldest = _text(following[0][0]) if following else None

    def _notice_lost(self, trimmed: int, first: Any) -> None:
        """Messages that were trimmed behind the last one that was seen, or went with the stream itself."""
        if self._seen == BEGINNING:
            self._messages = self._num_seen = trimmed
        lost = trimmed - self._num_seen
        if not lost or (first and _key(_text(first[0])) <= _key(self._seen)):
            return
        if lost > 0:
            detail = f"{lost} messages after {self._seen} were trimmed before they were read; keep more of them"
        else:
            detail = f"the stream was begun anew after {self._seen}; what it still held then was never read"
        self._notes.append(Note("lost", self.name, detail, passed_over=False))
        self._lost += lost
        self._num_seen += lost

    def take(self, *, flush: bool = False) -> Window | None:
        self._fill()
        chosen: list[_Message] = []
        rows = 0
        for message in self._waiting:
            if rows >= self.rule.rows:
                break
            chosen.append(message)
            rows += message.rows
        if not chosen:
            return Window((), self._told()) if self._notes else None
        if not self._may_go(full=flush or self._ended or rows >= self.rule.rows):
            return None
        for message in chosen:
            self._waiting.popleft()
            if message.problem:
                where = Slice(self.name, message.id, message.id, 0)
                unit = f"{self.name} {message.id}"
                self._notes.append(Note("unreadable", unit, message.problem, passed_over=False, where=where))
        span = chosen[0].id, chosen[-1].id
        self._opened[span] = chosen
        return Window((Slice(self.name, *span, rows, len(chosen)),), self._told())

    @property
    def over(self) -> bool:
        return self._ended and not self._waiting and not self._notes

    def lag(self) -> Lag:
        units = max(0, self._added - self._messages - self._lost - self._ended)
        rows = units * (self.rows / self._messages if self._messages else 1.0)
        arrived = self.clock.now() if self._oldest is None else _key(self._oldest)[0] / 1000
        return Lag(units, round(rows), max(0.0, self.clock.now() - arrived))

    def _fill(self) -> None:
        """Reads on until a window is full: what nobody asks for stays with the broker."""
        while not self._ended and (missing := self.rule.rows - sum(m.rows for m in self._waiting)) > 0:
            page = self._range(f"({self._seen}", "+", min(PAGE, -(-missing // self._rows_per_message)))
            rows = 0
            for key, fields in page:
                if b"done" in fields:
                    self._ended = True
                    return
                message = _message(key, fields, self.columns)
                self._waiting.append(message)
                self._seen, self._num_seen = key, self._num_seen + 1
                rows += message.rows
            if not page:
                return
            self._rows_per_message = max(1, rows // len(page))

    def _told(self) -> tuple[Note, ...]:
        told = tuple(self._notes)
        self._notes.clear()
        return told

    # -------------------------------------------------------------------------------------------------- every process

    def open(self, slices: Sequence[Slice]) -> TableSource:
        messages = [message for one in slices for message in self._messages_of(one)]
        try:
            table = _together([m for m in messages if m.rows])
        except CONTENT_ERRORS as error:
            raise DataError(f"{self.name}: messages of one window do not fit each other: {error}") from None
        return TableSource(table, self.schema, f"{self.name} {slices[0].first}..{slices[-1].last}")

    def fitting(self, slices: Sequence[Slice]) -> tuple[tuple[Slice, ...], list[tuple[Slice, str]]]:
        """Messages whose types are not those of the most others are left out: who comes first decides nothing."""
        found = [(one, self._messages_of(one)) for one in slices]
        problems = _misfits(message for _, messages in found for message in messages if message.rows)
        kept, left = list[Slice](), list[tuple[Slice, str]]()
        for one, messages in found:
            for is_misfit, group in groupby(messages, key=lambda m: m.id in problems):
                run = list(group)
                if is_misfit:
                    left += [(self._slice_of(one, [m])[0], problems[m.id]) for m in run]
                else:
                    kept += self._slice_of(one, run)
        return tuple(kept), left

    def _slice_of(self, one: Slice, run: Sequence[_Message]) -> list[Slice]:
        """Some neighboring messages of a slice, as slices: one, or none."""
        if not run:
            return []
        rows = sum(message.rows for message in run)
        return [replace(one, first=run[0].id, last=run[-1].id, rows=rows, parts=len(run))]

    def body_of(self, one: Slice) -> bytes | None:
        page = self._range(str(one.first), str(one.last), 1)
        fields = page[0][1] if page else {}
        return next((fields[name] for name in (b"row", b"rows") if name in fields), None)

    def halves(self, one: Slice) -> tuple[Slice, Slice] | None:
        messages = self._messages_of(one)
        middle = len(messages) // 2
        if not middle:
            return None
        before, after = (self._slice_of(one, run)[0] for run in (messages[:middle], messages[middle:]))
        return before, after

    def _messages_of(self, one: Slice) -> list[_Message]:
        first, last = str(one.first), str(one.last)
        for (begin, end), messages in self._opened.items():
            if _key(begin) <= _key(first) and _key(last) <= _key(end):
                start = bisect_left(messages, _key(first), key=_place)
                return messages[start : bisect_right(messages, _key(last), key=_place)]
        found: list[_Message] = []
        start = first
        while page := self._range(start, last, PAGE):
            found += [_message(key, fields, self.columns) for key, fields in page]
            start = f"({page[-1][0]}"
        if len(found) != one.parts:
            raise DataError(f"{self.name} {first}..{last}: messages were removed while they were read; trim later")
        return found

    def _moved(self, window: Window) -> None:
        for s in (*window.slices, *window.passed):
            self._last = max(self._last, str(s.last), key=_key)
        self._opened = {span: messages for span, messages in self._opened.items() if _key(span[1]) > _key(self._last)}
        self._messages += sum(s.parts for s in (*window.slices, *window.passed))

    def _own_position(self) -> dict[str, Any]:
        return {"last": self._last, "messages": self._messages, "lost": self._lost}

    def _restore(self, position: Mapping[str, Any]) -> None:
        self._last = self._seen = position["last"]
        self._messages, self._lost = position["messages"], position["lost"]
        self._num_seen = self._messages + self._lost

    # ------------------------------------------------------------------------------------------------------ the broker

    def _range(self, first: str, last: str, count: int) -> list[tuple[str, dict[bytes, bytes]]]:
        page = self._ask(lambda client: client.xrange(self.name, first, last, count=count))
        return [(_text(key), fields) for key, fields in page]

    def _ask(self, question: Any) -> Any:
        from redis.exceptions import ConnectionError, TimeoutError

        try:
            return question(self._client)
        except (ConnectionError, TimeoutError) as error:
            raise Unreachable(f"{self.name}: the broker does not answer: {error}") from error


def _connect(uri: str) -> tuple[Any, str]:
    parts = urlsplit(uri)
    path = parts.path.strip("/").split("/", 1)
    if len(path) != 2 or not path[0].isdigit() or not path[1]:
        raise ConfigError(
            f"online.follow: {uri}: expected redis://host:port/database/stream, such as redis://localhost/0/events"
        )
    try:
        import redis
    except ImportError:
        raise ConfigError("online.follow: redis:// needs the package redis; pip install 'hmoe-rec[redis]'") from None
    return redis.Redis.from_url(urlunsplit(parts._replace(path=f"/{path[0]}"))), path[1]


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))


def _together(messages: Sequence[_Message]) -> pa.Table:
    """The examples of some messages in one table, in order; runs of single ones are converted at once."""
    parts: list[pa.Table] = []
    for is_row, group in groupby(messages, key=lambda m: m.row is not None):
        run = list(group)
        parts += [pa.Table.from_pylist([m.row for m in run])] if is_row else [m.table for m in run]
    return pa.concat_tables(_alike(parts), promote_options="permissive")


def _alike(parts: list[pa.Table]) -> list[pa.Table]:
    """Columns that are dictionaries in some tables and of other types, such as text, in others: dictionaries in all."""
    kinds = {name: {part.schema.field(name).type for part in parts} for name in parts[0].column_names} if parts else {}
    wanted = {name: pa.dictionary(pa.int32(), _values(found)) for name, found in kinds.items() if _is_mixed(found)}
    for name, kind in wanted.items():
        at = [part.schema.get_field_index(name) for part in parts]
        parts = [part.set_column(i, name, part[name].cast(kind)) for i, part in zip(at, parts, strict=True)]
    return parts


def _is_mixed(kinds: set[pa.DataType]) -> bool:
    return len(kinds) > 1 and any(map(pa.types.is_dictionary, kinds))


def _values(kinds: Iterable[pa.DataType]) -> pa.DataType:
    """A type for all that the dictionaries and columns hold."""
    schemas = [pa.schema([("", fit.decoded(kind))]) for kind in kinds]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def _misfits(messages: Iterable[_Message]) -> dict[str, str]:
    """Ids -> why: a column's type goes with none of the types that more messages of the window have."""
    known: dict[pa.Schema, pa.Schema] = {}  # few are different
    types = {m.id: known.setdefault(found := m.types(), found) for m in messages}
    counts: dict[str, Counter[pa.DataType]] = {}
    for found in types.values():
        for field in found:
            counts.setdefault(field.name, Counter())[fit.decoded(field.type)] += 1
    refused: dict[tuple[str, pa.DataType], str] = {}
    for name, kinds in counts.items():
        common = pa.schema([])
        for kind, _ in kinds.most_common():
            try:
                common = pa.unify_schemas([common, pa.schema([(name, kind)])], promote_options="permissive")
            except CONTENT_ERRORS as error:
                refused[name, kind] = f"not of the type that most of its window have: {error}"
    reasons = {
        key: [refused.get((field.name, fit.decoded(field.type))) for field in found] for key, found in types.items()
    }
    return {key: next(filter(None, found)) for key, found in reasons.items() if any(found)}


def _message(key: str, fields: Mapping[bytes, bytes], columns: Sequence[str]) -> _Message:
    """What cannot be read is a message with a problem."""
    try:
        if b"rows" in fields:
            return _Message(key, table=_table(fields[b"rows"], columns))
        if b"row" in fields:
            return _Message(key, row=_row(fields[b"row"], columns))
    except (*CONTENT_ERRORS, OSError) as error:  # Arrow's OSError is of the bytes here, no file is read
        return _Message(key, problem=f"{type(error).__name__}: {error}")
    return _Message(key, problem=f"no field row, rows or done; its fields: {', '.join(map(repr, fields))}")


def _row(body: bytes, columns: Sequence[str]) -> dict[str, Any]:
    if len(body) > MOST_ROW_BYTES:
        raise ValueError(f"{len(body):,} bytes of JSON; one example takes at most {MOST_ROW_BYTES:,}")
    row = json.loads(body, object_pairs_hook=_object)
    _check_columns(columns, row)
    return {c: row[c] for c in columns}


def _table(body: bytes, columns: Sequence[str]) -> pa.Table:
    table = read_table(body)
    _check_columns(columns, table.column_names)
    table = table.select(list(columns))
    table.validate(full=True)  # offsets and text that are damaged would end the process later
    return table


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"column {next(n for n in names if names.count(n) > 1)} is there twice")
    return result


def _check_columns(wanted: Sequence[str], found: Any) -> None:
    missing = [c for c in wanted if c not in found]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; write null where there is no value")


def _text(key: Any) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)


def _place(message: _Message) -> tuple[int, int]:
    return _key(message.id)


def _key(message: str) -> tuple[int, int]:
    """Ids in the order of the stream."""
    first, _, second = message.partition("-")
    return int(first), int(second or 0)
