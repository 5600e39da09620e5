"""Files that keep appearing: each row once, in order; what is late, half-written, damaged or changed; restarts."""

import json
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hmoe_rec import io
from hmoe_rec.data import listing
from hmoe_rec.data.file_stream import FileStream
from hmoe_rec.data.schema import load_schema
from hmoe_rec.data.stream import Clock, Lag, Window, WindowRule
from hmoe_rec.types import CheckpointError, DataError

SCHEMA = load_schema({"ids": [{"name": "user", "num_embeddings": 9}], "tasks": [{"name": "click"}], "time": "when"})
EVERYTHING = WindowRule(rows=10**6, files=None, seconds=0.0)


class FakeClock(Clock):
    def __init__(self) -> None:
        self.time = 1e9

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def write(uri: str, rows: int = 5, *, groups: int = 10**6, when: object = 0, **columns: object) -> None:
    table = pa.table({"user": np.zeros(rows, int), "click": np.zeros(rows, int), "when": [when] * rows, **columns})
    files, path = io.filesystem(uri)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    pq.write_table(table, path, filesystem=files, row_group_size=groups)


def put(uri: str, content: bytes) -> None:
    with io.open(uri, "wb") as file:
        file.write(content)


def stream_of(uri: object, rule: WindowRule | None = None, clock: Clock | None = None, **options) -> FileStream:
    return FileStream(str(uri), SCHEMA, rule=rule or WindowRule(), clock=clock or FakeClock(), **options)


def taken(stream: FileStream, *, finish: bool = True) -> list[list[tuple]]:
    """All windows that are there, as lists of (unit, first, last, rows)."""
    stream.poll()
    found = []
    while (window := stream.take()) is not None:
        found.append([(s.unit, s.first, s.last, s.rows) for s in window.slices])
        if finish:
            stream.done(window)
    return found


def names(stream: FileStream) -> list[str]:
    return [unit for window in taken(stream) for unit, *_ in window]


@pytest.fixture(params=["", "file://", "memory://"])
def place(request, tmp_path) -> str:
    return f"memory://stream-{uuid.uuid4()}" if request.param == "memory://" else f"{request.param}{tmp_path}/in"


def test_each_file_is_taken_once_as_it_appears(place):
    stream = stream_of(place)
    assert taken(stream) == []  # the directory may come later
    for name in ("b.parquet", "a.parquet", "day 2/c.parquet"):
        write(f"{place}/{name}", 5)
    for other in ("_tmp/x.parquet", ".hidden.parquet", "y.parquet.tmp", "notes.txt"):
        write(f"{place}/{other}", 5)
    assert [w[0][0] for w in taken(stream)] == ["a.parquet", "b.parquet", "day 2/c.parquet"]
    assert taken(stream) == []
    write(f"{place}/day 2/d.parquet", 3)
    assert taken(stream) == [[("day 2/d.parquet", 0, 0, 3)]]
    assert (stream.rows, stream.files, stream.over) == (18, 4, False)
    put(f"{place}/_DONE", b"")
    assert taken(stream) == [] and stream.over


def test_the_rows_of_a_window_are_read_in_order(place):
    for name, start in (("a", 0), ("b", 4)):
        write(f"{place}/{name}.parquet", 4, groups=2, click=np.arange(start, start + 4) % 2, user=[start] * 4)
    stream = stream_of(place, WindowRule(rows=6, files=None, seconds=0))
    stream.poll()
    window = stream.take()
    source = stream.open(window.slices)
    assert window.rows == source.num_rows == 6
    assert [(g.file, g.index, g.first_row, g.num_rows) for g in source.row_groups] == [
        (0, 0, 0, 2),
        (0, 1, 2, 2),
        (1, 0, 0, 2),
    ]


class TestWindows:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        for name, rows in (("a", 7), ("b", 2), ("c", 2)):
            write(f"{tmp_path}/{name}.parquet", rows, groups=3)  # a: 3 + 3 + 1
        return tmp_path

    def test_a_file_is_a_window_and_a_long_one_is_cut_at_row_groups(self, folder):
        assert taken(stream_of(folder, WindowRule(rows=5))) == [
            [("a.parquet", 0, 1, 6)],
            [("a.parquet", 2, 2, 1)],
            [("b.parquet", 0, 0, 2)],
            [("c.parquet", 0, 0, 2)],
        ]

    def test_small_files_share_a_window(self, folder):
        rule = WindowRule(rows=4, files=None, seconds=0.0)
        assert taken(stream_of(folder, rule)) == [
            [("a.parquet", 0, 1, 6)],
            [("a.parquet", 2, 2, 1), ("b.parquet", 0, 0, 2), ("c.parquet", 0, 0, 2)],
        ]

    def test_a_window_waits_to_become_full(self, folder):
        clock = FakeClock()
        stream = stream_of(folder, WindowRule(rows=12, files=4, seconds=30.0), clock)
        assert taken(stream) == []
        clock.sleep(29)
        assert taken(stream) == []
        clock.sleep(1)
        assert [unit for unit, *_ in taken(stream)[0]] == ["a.parquet", "b.parquet", "c.parquet"]
        write(f"{folder}/d.parquet", 1)
        assert taken(stream) == []  # the wait begins anew
        assert stream.take(flush=True) is not None
        write(f"{folder}/e.parquet", 12)
        assert len(taken(stream)) == 1  # full at once
        write(f"{folder}/f.parquet", 1)
        put(f"{folder}/_DONE", b"")
        assert len(taken(stream)) == 1  # nothing will follow


class TestUnreadable:
    @pytest.mark.parametrize("content", [b"", b"PAR1 and half of it"])
    def test_it_is_waited_for_and_then_passed_over(self, tmp_path, content):
        clock = FakeClock()
        stream = stream_of(tmp_path, clock=clock, patience_seconds=60)
        put(f"{tmp_path}/a.parquet", content)
        write(f"{tmp_path}/b.parquet")
        assert taken(stream) == []  # b waits for a
        clock.sleep(59)
        put(f"{tmp_path}/a.parquet", content + b" and more")  # it grows
        assert taken(stream) == []
        clock.sleep(59)
        assert taken(stream) == []
        clock.sleep(1)
        stream.poll()
        window = stream.take()
        stream.done(window)
        assert [s.unit for s in window.slices] == ["b.parquet"]
        assert [(n.kind, n.unit) for n in window.notes] == [("unreadable", "a.parquet")]
        write(f"{tmp_path}/a.parquet")
        assert taken(stream) == []  # whoever mends it gives it a new name
        assert stream.counts == {"unreadable": 1} and stream.files == 1

    def test_it_becomes_readable(self, tmp_path):
        stream = stream_of(tmp_path)
        put(f"{tmp_path}/a.parquet", b"PAR1")
        assert taken(stream) == []
        write(f"{tmp_path}/a.parquet")
        assert names(stream) == ["a.parquet"]

    def test_by_time_the_others_do_not_wait(self, tmp_path):
        stream = stream_of(tmp_path, order="time")
        put(f"{tmp_path}/a.parquet", b"")
        write(f"{tmp_path}/b.parquet", when=7)
        assert names(stream) == ["b.parquet"]
        write(f"{tmp_path}/a.parquet", when=9)
        assert names(stream) == ["a.parquet"]

    def test_what_does_not_fit_the_schema_or_is_empty_is_passed_over(self, tmp_path):
        stream = stream_of(tmp_path)
        write(f"{tmp_path}/a.parquet", click=["no"] * 5)
        write(f"{tmp_path}/b.parquet", 0)
        stream.poll()
        window = stream.take()
        assert window.rows == 0 and [(n.kind, n.unit) for n in window.notes] == [
            ("misfit", "a.parquet"),
            ("empty", "b.parquet"),
        ]
        assert "column click (label of click)" in window.notes[0].detail
        stream.done(window)
        assert taken(stream) == []


class TestLate:
    def late_file(self, tmp_path, rule: str) -> FileStream:
        stream = stream_of(tmp_path, late=rule)
        for name in "bd":
            write(f"{tmp_path}/{name}.parquet")
        assert names(stream) == ["b.parquet", "d.parquet"]
        write(f"{tmp_path}/c.parquet")
        write(f"{tmp_path}/e.parquet")
        return stream

    def test_train(self, tmp_path):
        stream = self.late_file(tmp_path, "train")
        assert names(stream) == ["c.parquet", "e.parquet"] and stream.counts == {"late": 1}

    def test_drop(self, tmp_path):
        stream = self.late_file(tmp_path, "drop")
        assert names(stream) == ["e.parquet"] and stream.counts == {"late": 1}
        assert taken(stream) == []

    def test_error(self, tmp_path):
        stream = self.late_file(tmp_path, "error")
        with pytest.raises(DataError, match=r"c\.parquet: late: it comes before others"):
            names(stream)

    def test_by_time_a_file_may_be_a_little_late(self, tmp_path):
        stream = stream_of(tmp_path, order="time", late="drop", lateness=10)
        for name, when in (("x", 100), ("a", 130), ("m", 115)):
            write(f"{tmp_path}/{name}.parquet", when=when)
        assert names(stream) == ["x.parquet", "m.parquet", "a.parquet"]
        write(f"{tmp_path}/in_time.parquet", when=120)
        write(f"{tmp_path}/late.parquet", when=119)
        assert names(stream) == ["in_time.parquet"] and stream.counts == {"late": 1}


def test_time_is_read_from_statistics(tmp_path):
    second = pa.scalar(3, pa.timestamp("s", "UTC")).as_py()
    write(f"{tmp_path}/a.parquet", when=second)
    stream = stream_of(tmp_path, order="time")
    stream.poll()
    assert stream.take().slices[0].time == 3.0
    pq.write_table(pq.read_table(tmp_path / "a.parquet"), tmp_path / "b.parquet", write_statistics=False)
    stream.poll()
    assert "no statistics of column when" in stream.take().notes[0].detail
    write(f"{tmp_path}/c.parquet", when="yesterday")
    stream.poll()
    assert "no statistics of column when as numbers, timestamps or dates" in stream.take().notes[0].detail
    with pq.ParquetWriter(tmp_path / "d.parquet", (table := pq.read_table(tmp_path / "a.parquet")).schema) as writer:
        for rows in (0, 5):
            writer.write_table(table.slice(0, rows))
    stream.poll()
    assert stream.take().slices[0].time == 3.0
    schema = load_schema({"ids": [{"name": "user", "num_embeddings": 9}], "tasks": [{"name": "click"}]})
    with pytest.raises(DataError, match="needs the schema's time column"):
        FileStream(str(tmp_path), schema, rule=EVERYTHING, clock=FakeClock(), order="time")


class TestRestart:
    def restarted(self, stream: FileStream, **options) -> FileStream:
        again = stream_of(stream.uri, stream.rule, **options)
        again.restore(json.loads(json.dumps(stream.position())))
        return again

    def test_what_was_not_done_is_taken_again(self, tmp_path):
        for name in "abc":
            write(f"{tmp_path}/{name}.parquet", 6, groups=2)
        stream = stream_of(tmp_path, WindowRule(rows=4))
        stream.poll()
        first, second, third = stream.take(), stream.take(), stream.take()
        stream.done(first)
        again = self.restarted(stream)
        assert taken(again, finish=False)[0] == [("a.parquet", 2, 2, 2)]
        stream.done(second)
        stream.done(third)
        assert taken(self.restarted(stream))[0] == [("b.parquet", 2, 2, 2)]
        assert self.restarted(stream).rows == 4 + 2 + 4

    def test_the_watermark_is_kept(self, tmp_path):
        write(f"{tmp_path}/b.parquet")
        stream = stream_of(tmp_path, late="drop")
        names(stream)
        write(f"{tmp_path}/a.parquet")
        assert names(self.restarted(stream, late="drop")) == []

    def test_a_file_that_changed_in_between_is_told(self, tmp_path):
        write(f"{tmp_path}/a.parquet", 6, groups=2)
        stream = stream_of(tmp_path, WindowRule(rows=2))
        stream.poll()
        stream.done(stream.take())
        write(f"{tmp_path}/a.parquet", 6, groups=3)
        again = self.restarted(stream)
        again.poll()
        with pytest.raises(
            DataError, match="changed while it was being read .6 rows in 3 row groups before, 6 rows in 2"
        ):
            again.take()

    def test_a_file_that_is_gone_in_between_is_told_after_a_while(self, tmp_path):
        write(f"{tmp_path}/a.parquet", 6, groups=2)
        write(f"{tmp_path}/b.parquet")
        stream = stream_of(tmp_path, WindowRule(rows=2))
        stream.poll()
        stream.done(stream.take())
        (tmp_path / "a.parquet").unlink()
        clock = FakeClock()
        again = self.restarted(stream, clock=clock)
        assert taken(again) == []
        clock.sleep(400)
        assert names(again) == ["b.parquet"] and again.counts == {"unreadable": 1}

    def test_the_rest_of_a_file_that_goes_while_its_first_part_is_learned_is_not_forgotten(self, tmp_path):
        write(f"{tmp_path}/a.parquet", 4, groups=2)
        write(f"{tmp_path}/b.parquet")
        stream = stream_of(tmp_path, WindowRule(rows=2))
        stream.poll()
        first = stream.take()
        (tmp_path / "a.parquet").unlink()
        stream.poll()
        rest = stream.take()
        stream.done(first)
        assert [(s.unit, s.first) for s in rest.slices] == [("a.parquet", 1)]
        with pytest.raises(DataError, match="a.parquet: no such file"):
            stream.open(rest.slices)

    def test_by_time_too_a_file_is_finished_before_another_begins(self, tmp_path):
        for when, name in enumerate("ab"):
            write(f"{tmp_path}/{name}.parquet", 4, groups=2, when=when)
        stream = stream_of(tmp_path, WindowRule(rows=2), order="time")
        stream.poll()
        stream.done(stream.take())
        (tmp_path / "a.parquet").rename(tmp_path / "_a.parquet")
        again = self.restarted(stream, order="time")
        assert names(again) == []
        (tmp_path / "_a.parquet").rename(tmp_path / "a.parquet")
        assert taken(self.restarted(again, order="time"))[0] == [("a.parquet", 1, 1, 2)]

    def test_a_position_of_another_source_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="kind 'redis'"):
            stream_of(tmp_path).restore({"kind": "redis", "rows": 0, "counts": {}})

    @pytest.mark.parametrize("seed", range(12))
    def test_whatever_happens_every_row_is_done_once(self, seed):
        """Files appear, windows are taken ahead, done, committed; the process dies and goes on from the last commit."""
        rng = np.random.default_rng(seed)
        place = f"memory://random-{uuid.uuid4()}"
        rule = WindowRule(int(rng.integers(1, 9)), [1, 2, None][seed % 3], 0.0)
        options = {"order": ["name", "time"][seed % 2]}
        written: dict[str, int] = {}
        stream, ahead = stream_of(place, rule, **options), []
        lineage: list[tuple[str, int, int]] = []  # (unit, row group, rows) that the present parameters have learned
        committed: tuple[dict, list] = (stream.position(), [])
        for number in range(80):
            action = rng.choice(["write", "poll", "take", "take", "done", "done", "commit", "die"])
            if action == "write":
                name = f"{rng.integers(100):02d}-{number}.parquet"
                written[name] = int(rng.integers(1, 12))
                write(f"{place}/{name}", written[name], groups=3, when=int(rng.integers(50)))
            elif action == "poll":
                stream.poll()
            elif action == "take" and (window := stream.take()) is not None:
                ahead.append(window)
            elif action == "done" and ahead:
                lineage += groups_of(ahead[0])
                stream.done(ahead.pop(0))
            elif action == "commit":
                committed = json.loads(json.dumps(stream.position())), list(lineage)
            elif action == "die":
                stream, ahead = stream_of(place, rule, **options), []
                stream.restore(committed[0])
                lineage = list(committed[1])
        for window in ahead:
            lineage += groups_of(window)
            stream.done(window)
        stream.poll()
        while (window := stream.take(flush=True)) is not None:
            lineage += groups_of(window)
            stream.done(window)
        assert sorted(lineage) == sorted((name, g) for name, rows in written.items() for g in range(-(-rows // 3)))
        assert (stream.rows, stream.files) == (sum(written.values()), len(written))


def groups_of(window: Window) -> list[tuple[str, int]]:
    return [(s.unit, g) for s in window.slices for g in range(int(s.first), int(s.last) + 1)]


def test_a_slice_is_halved_down_to_row_groups(tmp_path):
    write(f"{tmp_path}/a.parquet", 7, groups=2)
    stream = stream_of(tmp_path)
    stream.poll()
    whole = stream.take().slices[0]
    left, right = stream.halves(whole)
    assert [(s.first, s.last, s.rows, s.parts, s.ends) for s in (left, right)] == [
        (0, 1, 4, 2, False),
        (2, 3, 3, 2, True),
    ]
    one = stream.halves(left)[0]
    assert stream.halves(one) is None
    stream.done(Window((left,), (), (right,)))
    assert (stream.rows, stream.files) == (4, 1) and taken(stream) == []


def test_a_file_that_is_replaced_before_it_is_read_is_not_learned_from(tmp_path):
    write(f"{tmp_path}/a.parquet", 6, groups=2)
    stream = stream_of(tmp_path, WindowRule(rows=4))
    stream.poll()
    (one,) = stream.take().slices
    write(f"{tmp_path}/a.parquet", 3, groups=1)
    with pytest.raises(
        DataError, match=r"a.parquet: .* while it was being read .4 rows in row groups 0 to 1 before, 2"
    ):
        stream.open([one])
    assert stream.halves(one) is None


def test_lag_counts_what_is_not_done(tmp_path):
    import os

    clock = FakeClock()
    stream = stream_of(tmp_path, clock=clock)
    for name, rows, age in (("a", 4, 50), ("b", 6, 20)):
        write(f"{tmp_path}/{name}.parquet", rows)
        os.utime(tmp_path / f"{name}.parquet", (clock.time - age,) * 2)
    stream.poll()
    first = stream.take()
    stream.take()
    assert stream.lag() == Lag(2, 10, 50.0)
    stream.done(first)
    assert stream.lag() == Lag(1, 6, 20.0)
    taken(stream)


def test_names_are_forgotten_only_when_they_are_many_and_no_longer_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "REMEMBERED", 2)
    stream = stream_of(tmp_path)
    for name in "abcdef":
        write(f"{tmp_path}/{name}.parquet", 1)
    assert len(names(stream)) == 6
    for name in "abcd":
        (tmp_path / f"{name}.parquet").unlink()
    stream.poll()
    assert [name for name in "abcdef" if f"{name}.parquet" in stream._done] == ["c", "d", "e", "f"]


def test_no_name_is_forgotten_while_the_directory_is_away(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "REMEMBERED", 2)
    stream = stream_of(tmp_path / "in")
    for name in "abcdef":
        write(f"{tmp_path}/in/{name}.parquet", 1)
    assert len(names(stream)) == 6
    (tmp_path / "in").rename(tmp_path / "away")
    assert names(stream) == []
    (tmp_path / "away").rename(tmp_path / "in")
    assert names(stream) == []
