"""What the feed asks of a source and when: no more than is trained on, patience, idleness, an end, a stop."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hmoe_rec.data.schema import load_schema
from hmoe_rec.data.stream import Clock, Lag, Slice, Stream, Unreachable, Window, WindowRule
from hmoe_rec.sharding.process import Process
from hmoe_rec.training.feed import WindowFeed
from hmoe_rec.types import DataError

SCHEMA = load_schema({"ids": [{"name": "user", "num_embeddings": 9}], "tasks": [{"name": "click"}]})


class FakeClock(Clock):
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class Numbers(Stream):
    """Windows 0, 1, ... of one row each, so many as `there`."""

    kind = "numbers"

    def __init__(self, clock: Clock, there: int = 0) -> None:
        super().__init__("numbers", SCHEMA, rule=WindowRule(), clock=clock)
        self.there, self.next, self.polls, self.away, self.ended = there, 0, 0, False, False

    def poll(self) -> None:
        self.polls += 1
        if self.away:
            raise Unreachable("numbers: away")

    def take(self, *, flush: bool = False) -> Window | None:
        if self.next >= self.there:
            return None
        self.next += 1
        return Window((Slice(str(self.next - 1), 0, 0, 1),))

    @property
    def over(self) -> bool:
        return self.ended and self.next >= self.there

    def lag(self) -> Lag:
        return Lag(self.there - self.rows, self.there - self.rows, 0.0)

    def open(self, slices: Sequence[Slice]) -> Any:
        return slices[0].unit

    def halves(self, one: Slice) -> None:
        return None

    def _moved(self, window: Window) -> None:
        pass

    def _own_position(self) -> dict:
        return {}

    def _restore(self, position: Any) -> None:
        pass


class Reader:
    def __init__(self, number: str) -> None:
        self.number = number

    def epoch(self, epoch: int) -> list[str]:
        return [self.number]


def feed_of(stream: Numbers, **options: Any) -> WindowFeed:
    given = {"ahead": 1, "poll_seconds": 2.0, "until_idle": None, "patience_seconds": 10.0, "stop": lambda: 0} | options
    process = Process(0, 1, 0, 1, torch.device("cpu"))
    return WindowFeed(stream, lambda source, rank, world_size: Reader(source), process, clock=stream.clock, **given)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_is_taken_than_is_trained_on(ahead):
    stream = Numbers(FakeClock(), there=20)
    stream.ended = True
    given = []
    for fed in feed_of(stream, ahead=ahead).windows():
        given += fed.batches
        assert stream.next <= len(given) + ahead
        stream.done(fed.window)
    assert given == [str(i) for i in range(20)]


def test_it_ends_when_nothing_new_comes_and_looks_once_more_before():
    stream = Numbers(FakeClock(), there=1)
    given, waits = [], []
    for fed in feed_of(stream, until_idle=5.0).windows():
        if fed is None:
            waits.append(stream.clock.now())
            stream.there = 2  # while it sleeps
        else:
            given += fed.batches
            stream.clock.sleep(3 if fed.batches == ["0"] else 100)  # training
    assert given == ["0", "1"]
    assert waits == [3.0]  # the second window came at 5 s; after the long training nothing was there


def test_a_source_may_be_away_for_a_while():
    stream = Numbers(FakeClock(), there=1)
    stream.away = stream.ended = True
    given = []
    for fed in feed_of(stream).windows():
        if fed is None:
            stream.away = stream.clock.now() < 8.0
        else:
            given += fed.batches
    assert given == ["0"] and stream.clock.now() == 10.0
    stream.away, stream.ended, stream.there = True, False, 2
    with pytest.raises(Unreachable, match="away"):
        list(feed_of(stream).windows())
    assert stream.clock.now() == 20.0


def test_a_source_that_is_away_is_not_over():
    stream, times = Numbers(FakeClock()), []
    stream.away = True
    for _ in feed_of(stream, until_idle=3.0).windows():
        times.append(stream.clock.now())
        stream.away = times[-1] < 6.0
    assert times == [0.0, 2.0, 4.0, 6.0, 8.0] and stream.clock.now() == 10.0
    stream.away = True
    with pytest.raises(Unreachable):
        list(feed_of(stream, until_idle=3.0).windows())


def test_time_does_not_fall_when_the_clock_is_set_back(monkeypatch):
    clock = Clock()
    before = clock.now()
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert before <= clock.now() < before + 60


def test_a_stop_ends_it_before_the_next_window():
    stream, status = Numbers(FakeClock(), there=5), [0]
    feed = feed_of(stream, stop=lambda: status[0])
    for fed in feed.windows():
        stream.done(fed.window)
        if stream.rows == 2:
            status[0] = 143
    assert (stream.rows, feed.status) == (2, 143)


def test_what_cannot_be_read_is_passed_over_when_patience_ends():
    stream = Numbers(FakeClock(), there=3)
    stream.ended = True
    tried = []

    def open_it(slices: Sequence[Slice]) -> str:
        if slices[0].unit == "1":
            tried.append(stream.clock.now())
            raise DataError("1: cannot be read") from OSError("gone")
        return slices[0].unit

    stream.open = open_it
    found = []
    for fed in feed_of(stream).windows():
        found.append((fed.batches, fed.window.rows, [note.detail for note in fed.window.notes]))
        stream.done(fed.window)
    assert found == [(["0"], 1, []), ([], 0, ["1: cannot be read"]), (["2"], 1, [])]
    assert tried[:3] == [0.0, 5.0, 10.0] and stream.counts == {"wrong": 1}


def test_a_source_that_goes_away_while_it_is_read_is_not_passed_over():
    stream = Numbers(FakeClock(), there=1)

    def open_it(slices: Sequence[Slice]) -> str:
        raise Unreachable("numbers: away")

    stream.open = open_it
    with pytest.raises(Unreachable):
        list(feed_of(stream).windows())


@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize("where", ["open", "halves", "for good"])
def test_an_outage_while_it_is_sorted_out_makes_nothing_bad(where, lasts):
    stream = Numbers(FakeClock(), there=1)
    stream.ended, stream.next = True, 0
    parts = Slice("0", 0, 3, 4, parts=4)
    stream.take = lambda flush=False: None if stream.next else (setattr(stream, "next", 1), Window((parts,)))[1]
    calls = []

    def away_since(number: int) -> None:
        calls.append(0)
        if len(calls) > number and (lasts or len(calls) <= number + 2):
            raise Unreachable("numbers: away")

    def open_it(slices: Sequence[Slice]) -> str:
        if where != "halves":  # in the middle of halving, or when the sound rest is read for good: the eighth
            away_since(3 if where == "open" else 7)
        if any(int(one.first) <= 2 <= int(one.last) for one in slices):
            raise DataError("0: a wrong value")
        return ",".join(f"{one.first}-{one.last}" for one in slices)

    def halves(one: Slice) -> tuple[Slice, Slice]:
        if where == "halves":
            away_since(1)
        first, last = int(one.first), int(one.last)
        middle = (first + last) // 2
        return tuple(Slice("0", a, b, b - a + 1, parts=b - a + 1) for a, b in ((first, middle), (middle + 1, last)))

    stream.open, stream.halves = open_it, halves
    if lasts:
        with pytest.raises(Unreachable):
            list(feed_of(stream).windows())
        assert stream.clock.now() >= 10.0 and stream.rows == 0
        return
    (fed,) = feed_of(stream).windows()
    assert [(str(note.where), note.detail) for note in fed.window.notes] == [("0 2..2", "0: a wrong value")]
    assert (fed.batches, fed.window.rows) == (["0-1,3-3"], 3)
