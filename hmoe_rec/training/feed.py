"""A stream -> windows with their batches, the same on every process, one or more of them decoded ahead.

The first process looks and decides, the others are told; each reads its own share of every batch. No more than
`ahead` + 1 windows are in memory: the source is not asked for more than is trained on.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from hmoe_rec.batch import Batch
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.data.stream import CONTENT_ERRORS, Clock, Lag, Note, Slice, Stream, Unreachable, Window
from hmoe_rec.sharding.process import Process
from hmoe_rec.types import DataError, HmoeError

RETRY_SECONDS = 5.0
_Reading = tuple[Window, Future[list[Batch]]]


@dataclass(frozen=True)
class Fed:
    """batches: of this process, as many on every one. waited: seconds until they were there. lag: of the first."""

    window: Window
    batches: list[Batch]
    waited: float
    lag: Lag | None


@dataclass(frozen=True)
class _Decision:
    window: Window | None
    over: bool = False
    error: HmoeError | None = None


class WindowFeed:
    """
    Args:
        reader_of: (source, rank, world size) -> reader of its rows in order.
        ahead: windows that are decoded while one is trained on.
        poll_seconds: between two looks at the source.
        until_idle: seconds without anything new after which it is over; None = never.
        patience_seconds: how long the source may not answer, and reading may fail.
        stop: an exit status as soon as this process shall stop, 0 before.

    Attributes:
        status: the exit status, once `windows` ended because a process was told to stop; else 0.
    """

    def __init__(
        self,
        stream: Stream,
        reader_of: Callable[[ParquetSource, int, int], BatchReader],
        process: Process,
        *,
        ahead: int,
        poll_seconds: float,
        until_idle: float | None,
        patience_seconds: float,
        clock: Clock,
        stop: Callable[[], int],
    ) -> None:
        self.stream, self.reader_of, self.process, self.clock, self.stop = stream, reader_of, process, clock, stop
        self.ahead, self.poll_seconds, self.until_idle = ahead, poll_seconds, until_idle
        self.patience_seconds = patience_seconds
        self.status = 0
        self._first = process.rank == 0
        self._several = process.world_size > 1
        self._last_news = self._last_answer = clock.now()
        self._next_poll = self._last_news

    def windows(self) -> Iterator[Fed | None]:
        """Window after window; None where there is nothing to do, before waiting. Ends when the source is over.

        Raises:
            DataError: the source does not answer, or does not let itself be read, for `patience_seconds`.
        """
        reading: deque[_Reading] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="hmoe-window") as pool:
            while True:
                over = self._take_ahead(reading, pool)
                if self.status:
                    pool.shutdown(wait=True, cancel_futures=True)
                    return
                if reading:
                    yield self._finished(*reading.popleft())
                elif over:
                    return
                else:
                    yield None
                    if self._first:
                        self.clock.sleep(self.poll_seconds)

    def _take_ahead(self, reading: "deque[_Reading]", pool: ThreadPoolExecutor) -> bool:
        """Has windows read until there are enough of them. -> the source is over."""
        while True:
            decision = self._decide(busy=bool(reading))
            if decision.window is not None:
                reading.append((decision.window, pool.submit(self._read, decision.window.slices)))
            if self.status or decision.window is None or len(reading) > self.ahead:
                return decision.over

    # ------------------------------------------------------------------------------------------ what all agree upon

    def _decide(self, *, busy: bool) -> _Decision:
        self._agree_to_stop()
        decision = self.first_says(self._look(busy) if self._first and not self.status else _Decision(None))
        if decision.error is not None:
            raise decision.error
        return decision

    def _agree_to_stop(self) -> None:
        status = torch.tensor(self.stop())
        if self._several:
            dist.all_reduce(status, op=dist.ReduceOp.MAX)
        self.status = int(status)

    def first_says(self, value: Any) -> Any:
        """The first process's value, on every process."""
        values = [value]
        if self._several:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def _look(self, busy: bool) -> _Decision:
        """What the first process decides: the next window, that there is none yet, or that it is over."""
        now = self.clock.now()
        idle = self.until_idle is not None and not busy and now - self._last_news >= self.until_idle
        window = None
        try:
            if idle or now >= self._next_poll:
                self._next_poll = now + self.poll_seconds
                self.stream.poll()
            window = self.stream.take(flush=idle)
            self._last_answer = now
        except Unreachable as error:
            self._last_news = now  # nobody knows whether there is anything new
            return _Decision(None, error=error if now - self._last_answer >= self.patience_seconds else None)
        except HmoeError as error:
            return _Decision(None, error=error)
        if busy or window is not None:
            self._last_news = now
        return _Decision(window, over=window is None and (idle or self.stream.over))

    # ----------------------------------------------------------------------------------------------------- reading

    def _read(self, slices: Sequence[Slice]) -> list[Batch]:
        slices = [s for s in slices if s.rows]
        if not slices:
            return []
        reader = self.reader_of(self.stream.open(slices), self.process.rank, self.process.world_size)
        return list(reader.epoch(0))

    def _finished(self, window: Window, reading: "Future[list[Batch]]") -> Fed:
        began = time.perf_counter()
        batches, problem = self._outcome(reading.result)
        if self._failed_anywhere(problem):
            window, batches = self._repaired(window, problem)
        lag = self.stream.lag() if self._first else None
        return Fed(window, batches, time.perf_counter() - began, lag)

    def _outcome(self, read: Callable[[], list[Batch]]) -> tuple[list[Batch], DataError | None]:
        """-> the batches, or what went wrong: of the data, not of the program."""
        try:
            return read(), None
        except HmoeError as error:
            return [], error if isinstance(error, DataError) else DataError(str(error))
        except CONTENT_ERRORS as error:
            return [], DataError(f"{type(error).__name__}: {error}")

    def _repaired(self, window: Window, problem: DataError | None) -> tuple[Window, list[Batch]]:
        """The window without the slices that cannot be read; what may be the network's fault is tried again first."""
        batches, problem = self._insist(window.slices, [], problem)
        if not self._failed_anywhere(problem):
            return window, batches
        self._raise_unreachable(problem)
        sound, passed = self._sorted_out_patiently(window.slices)
        notes = tuple(Note("wrong", str(one), reason, passed_over=False, where=one) for one, reason in passed)
        repaired = replace(window, slices=sound, notes=window.notes + notes, passed=tuple(one for one, _ in passed))
        batches, problem = self._insist(sound, *self._outcome(lambda: self._read(sound)))
        worst = next((found for found in self.process.gather(problem) if found is not None), None)
        if worst is not None:
            raise worst
        return repaired, batches

    def _insist(
        self, slices: Sequence[Slice], batches: list[Batch], problem: DataError | None
    ) -> tuple[list[Batch], DataError | None]:
        """Reads again what may become readable, until it is read on every process or `patience_seconds` are over."""
        began = self.clock.now()
        while any(self.process.gather(_may_pass(problem))):
            if self.first_says(self.clock.now() - began) >= self.patience_seconds:
                break
            self.clock.sleep(RETRY_SECONDS)
            batches, problem = self._outcome(lambda: self._read(slices))
        return batches, problem

    def _failed_anywhere(self, problem: DataError | None) -> bool:
        return any(found is not None for found in self.process.gather(problem))

    def _sorted_out_patiently(self, slices: Sequence[Slice]) -> tuple[tuple[Slice, ...], list[tuple[Slice, str]]]:
        """As the first process finds it; an outage in the middle makes nothing bad: it is begun again.

        Raises:
            Unreachable: the outage lasts.
        """
        began = self.clock.now()
        while True:
            found = self.first_says(self._sorted_out_or_not(slices) if self._first else None)
            if not isinstance(found, Unreachable):
                return found
            if self.first_says(self.clock.now() - began) >= self.patience_seconds:
                raise found
            self.clock.sleep(RETRY_SECONDS)

    def _sorted_out_or_not(self, slices: Sequence[Slice]) -> Any:
        try:
            return self._sorted_out(slices)
        except Unreachable as outage:
            return outage

    def _raise_unreachable(self, problem: DataError | None) -> None:
        for found in self.process.gather(problem):
            if isinstance(found, Unreachable):
                raise found

    def _sorted_out(self, slices: Sequence[Slice]) -> tuple[tuple[Slice, ...], list[tuple[Slice, str]]]:
        """-> what can be read together, and what cannot with the reason, down to single row groups or messages."""
        sound, passed = self._by_halves(slices)
        fitting, misfits = self.stream.fitting(sound)
        kept = list(fitting)
        problem = self._problem_of(kept) if misfits or len(kept) > 1 else None
        if problem is not None:  # nothing that types would show
            kept, more = self._by_halves(kept, together=True)
            misfits += more
        return tuple(kept), passed + misfits

    def _by_halves(
        self, slices: Sequence[Slice], *, together: bool = False
    ) -> tuple[list[Slice], list[tuple[Slice, str]]]:
        """-> what can be read, each by itself or together with those before it, and what cannot with the reason.

        About as many reads as there are bad ones, times the number of halvings.
        """
        sound: list[Slice] = []
        passed: list[tuple[Slice, str]] = []
        left = deque(slices)
        while left:
            one = left.popleft()
            problem = self._problem_of([*sound, one] if together else [one])
            if problem is None:
                sound.append(one)
                continue
            halves = self._halves(one)
            if halves is None:
                passed.append((one, problem))
            else:
                left.extendleft(reversed(halves))
        return sound, passed

    def _halves(self, one: Slice) -> tuple[Slice, Slice] | None:
        try:
            return self.stream.halves(one) if one.parts > 1 else None
        except Unreachable:
            raise
        except HmoeError:  # not even its footer can be read now
            return None

    def _problem_of(self, slices: Sequence[Slice]) -> str | None:
        """Raises Unreachable, which says nothing about the rows."""
        slices = [one for one in slices if one.rows]
        if not slices:
            return None

        def read() -> list[Batch]:
            for _ in self.reader_of(self.stream.open(slices), 0, 1).epoch(0):
                pass
            return []

        _, problem = self._outcome(read)
        if isinstance(problem, Unreachable):
            raise problem
        return None if problem is None else str(problem)


def _may_pass(problem: DataError | None) -> bool:
    """A failure of reading, which the network or another program may have caused; not a value that cannot be right."""
    return isinstance(problem, Unreachable) or isinstance(getattr(problem, "__cause__", None), OSError)
