"""Messages of a real broker: each row once, from the committed id on; what cannot be read or was trimmed is told."""

import json
from dataclasses import replace

import pyarrow as pa
import pytest
from broker import redis_server

from hmoe_rec.data.parquet import BatchReader
from hmoe_rec.data.redis_stream import RedisStream
from hmoe_rec.data.schema import load_schema
from hmoe_rec.data.stream import Clock, Unreachable, WindowRule
from hmoe_rec.types import ConfigError, DataError

SCHEMA = load_schema(
    {
        "ids": [{"name": "user", "num_embeddings": 99}, {"name": "tags", "num_embeddings": 5, "pooling": "mean"}],
        "numbers": [{"name": "price"}],
        "tasks": [{"name": "click"}],
    }
)
RULE = WindowRule(rows=4, seconds=0.0)


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as uri:
        yield uri


@pytest.fixture
def client(broker, request):
    import redis

    connection = redis.Redis.from_url(broker)
    connection.flushall()
    yield connection
    connection.close()


def row(user: int, **columns) -> dict:
    return {"row": json.dumps({"user": user, "tags": [1, 2], "price": 0.5, "click": user % 2, **columns})}


def rows(*users: int) -> dict:
    columns = {"user": users, "tags": [[3]] * len(users), "price": [1.0] * len(users), "click": [0] * len(users)}
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return {"rows": sink.getvalue().to_pybytes()}


def stream_of(broker: str, rule: WindowRule = RULE) -> RedisStream:
    return RedisStream(f"{broker}/events", SCHEMA, rule=rule, clock=Clock())


def users_of(stream: RedisStream, window) -> list[int]:
    reader = BatchReader(stream.open(window.slices), global_batch_size=3, shuffle=False)
    return [int(user) for batch in reader.epoch(0) for user in batch.sparse["user"].values()]


def windows(stream: RedisStream) -> list[list[int]]:
    stream.poll()
    found = []
    while (window := stream.take()) is not None:
        if window.rows:
            found.append(users_of(stream, window))
        stream.done(window)
    return found


def test_messages_become_windows_in_order_each_once(broker, client):
    stream = stream_of(broker)
    assert windows(stream) == []  # the stream may come later
    for fields in (row(1), row(2), rows(3, 4, 5), row(6)):
        client.xadd("events", fields)
    stream.poll()
    assert (stream.lag().units, round(stream.lag().seconds)) == (4, 0)
    assert windows(stream) == [[1, 2, 3, 4, 5], [6]]
    client.xadd("events", row(7, tags=[], price=None))
    assert windows(stream) == [[7]]
    assert (stream.rows, stream.lag().units, stream.over) == (7, 0, False)
    client.xadd("events", {"done": ""})
    assert windows(stream) == [] and stream.over


def test_large_messages_stay_with_the_broker_until_they_are_wanted(broker, client):
    for user in range(9):
        client.xadd("events", rows(user, user, user))
    stream = stream_of(broker)
    asked, ask = [], stream._range
    stream._range = lambda *page: asked.append(len(found := ask(*page))) or found
    stream.poll()
    assert stream.take().rows == 6 and asked == [1, 1]


def test_a_window_waits_to_become_full(broker, client):
    stream = stream_of(broker, WindowRule(rows=4, seconds=1000.0))
    for user in range(6):
        client.xadd("events", row(user))
    assert windows(stream) == [[0, 1, 2, 3]]
    assert stream.take(flush=True).rows == 2


def test_it_goes_on_from_the_committed_id(broker, client):
    for user in range(10):
        client.xadd("events", row(user))
    stream = stream_of(broker)
    stream.poll()
    first, second = stream.take(), stream.take()
    assert users_of(stream, second) == [4, 5, 6, 7]
    stream.done(first)
    again = stream_of(broker)
    again.restore(json.loads(json.dumps(stream.position())))
    assert again.rows == 4 and windows(again) == [[4, 5, 6, 7], [8, 9]]


def test_another_process_reads_what_the_first_one_took(broker, client, monkeypatch):
    monkeypatch.setattr("hmoe_rec.data.redis_stream.PAGE", 3)
    for user in range(8):
        client.xadd("events", row(user))
    stream = stream_of(broker, WindowRule(rows=8))
    stream.poll()
    window = stream.take()
    assert users_of(stream_of(broker), window) == list(range(8))
    client.xdel("events", window.slices[0].last)
    with pytest.raises(DataError, match="were removed while they were read"):
        stream_of(broker).open(window.slices)


def test_a_table_with_two_columns_of_a_name_is_passed_over(broker, client):
    table, sink = (
        pa.table([[1], [2], [[3]], [0.5], [1]], ["user", "user", "tags", "price", "click"]),
        pa.BufferOutputStream(),
    )
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for fields in (row(1), {"rows": sink.getvalue().to_pybytes()}, row(2)):
        client.xadd("events", fields)
    stream = stream_of(broker)
    assert windows(stream) == [[1, 2]] and stream.counts == {"unreadable": 1}


def test_a_message_that_cannot_be_read_is_passed_over(broker, client):
    no_price = {"row": json.dumps({"user": 1, "tags": [], "click": 0})}
    for fields in (row(1), {"row": "{"}, no_price, {"x": "y"}, {"rows": "no arrow"}, {"row": "[" * 99999}, row(2)):
        client.xadd("events", fields)
    stream = stream_of(broker)
    stream.poll()
    window = stream.take()
    assert users_of(stream, window) == [1, 2] and users_of(stream_of(broker), window) == [1, 2]
    assert [note.kind for note in window.notes] == ["unreadable"] * 5
    assert "no column price; write null" in window.notes[1].detail
    assert "no field row, rows or done; its fields: b'x'" in window.notes[2].detail
    stream.done(window)
    assert stream.counts == {"unreadable": 5} and stream.lag().units == 0


@pytest.mark.parametrize("wrong", [{"price": "a lot"}, {"user": 2**70}, {"user": "\ud800"}])
def test_messages_that_do_not_fit_each_other_are_found_by_halves(broker, client, wrong):
    third = {"row": json.dumps(json.loads(row(3)["row"]) | wrong)}
    for fields in (row(1), row(2), third, row(4)):
        client.xadd("events", fields)
    stream = stream_of(broker)
    stream.poll()
    window = stream.take()
    with pytest.raises(DataError, match="do not fit each other"):
        stream.open(window.slices)
    left, right = stream.halves(window.slices[0])
    assert users_of(stream, replace(window, slices=(left,))) == [1, 2]
    bad, good = stream.halves(right)
    assert (bad.rows, bad.parts, stream.halves(bad)) == (1, 1, None)
    stream.done(replace(window, slices=(left, good), passed=(bad,)))
    assert stream.rows == 3 and windows(stream) == []


def test_what_was_trimmed_before_it_was_read_is_told(broker, client):
    ids = [client.xadd("events", row(user)) for user in range(6)]
    stream = stream_of(broker, WindowRule(rows=2, seconds=0.0))
    stream.poll()
    stream.done(stream.take())
    client.xtrim("events", minid=ids[4], approximate=False)
    again = stream_of(broker)
    again.restore(stream.position())
    again.poll()
    window = again.take()
    assert users_of(again, window) == [4, 5]
    assert [note.kind for note in window.notes] == ["lost"]
    assert window.notes[0].detail.startswith(f"2 messages after {ids[1].decode()} were trimmed")
    again.done(window)
    assert again.lag().units == 0 and stream_of(broker).take().notes == ()


def test_a_stream_that_was_begun_anew_is_told(broker, client):
    for i in range(1, 7):
        client.xadd("events", row(i), id=f"{i}-0")
    stream = stream_of(broker)
    stream.poll()
    stream.done(stream.take())
    client.delete("events")
    client.xadd("events", row(7), id="3-0")
    again = stream_of(broker)
    again.restore(stream.position())
    with pytest.raises(DataError, match="newest message 3-0 comes before 4-0, .* begun anew with lower ids"):
        again.poll()
    client.xadd("events", row(8), id="8-0")
    client.xdel("events", "3-0")
    again.poll()
    assert again.lag().units == 1 and windows(again) == [[8]]
    assert again.counts == {"lost": 1} and again.lag().units == 0


def test_what_was_trimmed_before_the_run_began_is_not_lost(broker, client):
    ids = [client.xadd("events", row(user)) for user in range(6)]
    client.xtrim("events", minid=ids[4], approximate=False)
    stream = stream_of(broker)
    assert windows(stream) == [[4, 5]]
    assert stream.counts == {} and stream.lag().units == 0


def test_what_is_no_stream_or_no_broker_is_told(broker, client):
    client.set("events", "a string")
    with pytest.raises(DataError, match="not a stream"):
        stream_of(broker).poll()
    with pytest.raises(Unreachable, match="does not answer"):
        RedisStream("redis://127.0.0.1:1/0/events", SCHEMA, rule=RULE, clock=Clock()).poll()
    with pytest.raises(ConfigError, match="expected redis://host:port/database/stream"):
        RedisStream(broker, SCHEMA, rule=RULE, clock=Clock())


def test_a_position_holds_no_password():
    stream = RedisStream("redis://me:secret@host:1/0/events?password=secret", SCHEMA, rule=RULE, clock=Clock())
    assert stream.position()["source"] == "redis://host:1/0/events"
