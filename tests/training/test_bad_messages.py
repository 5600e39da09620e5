"""Messages that nobody can learn from: put aside once, with the reason; the rest is learned, garbage stops a run."""

import base64
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broker import redis_server
from following import assert_same_state, followed, lines, online_file
from gloo import RankError, run_ranks
from small_run import make_log

from hmoe_rec.data import redis_stream
from hmoe_rec.data.arrow_message import MOST_ROWS
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.data.schema import load_schema
from hmoe_rec.data.stream import CONTENT_ERRORS, TableSource
from hmoe_rec.training.online import follow
from hmoe_rec.types import DataError, HmoeError, TrainingError

redis = pytest.importorskip("redis")
SOUND = 300  # rows, as many messages with one each but for the tables


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    make_log(folder)
    return folder


@pytest.fixture(scope="module")
def broker(tmp_path_factory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as uri:
        yield uri


def ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def damaged(table: pa.Table) -> bytes:
    """Offsets of the histories that lead out of their values."""
    history = table["hist_item_id"].chunk(0) if table["hist_item_id"].num_chunks else None
    assert history is not None
    offsets = history.offsets.to_numpy().copy()
    offsets[2] = 1 << 30
    buffers = [None, pa.py_buffer(offsets)]
    wrong = pa.Array.from_buffers(history.type, len(history), buffers, children=[history.values])
    return ipc(
        table.set_column(table.schema.get_field_index("hist_item_id"), "hist_item_id", pa.chunked_array([wrong]))
    )


def bad_messages(table: pa.Table) -> dict[str, dict[str, Any]]:
    """What is wrong -> the message."""
    row = table.slice(0, 1).to_pylist()[0]
    few = table.slice(0, 7).combine_chunks()

    def json_row(**columns: Any) -> dict[str, Any]:
        return {"row": json.dumps({**row, **columns})}

    return {
        "no JSON": {"row": "{"},
        "not UTF-8": {"row": b'{"user_id": "\xff"}'},
        "JSON, but no object": {"row": "[1, 2]"},
        "JSON, but text": {"row": json.dumps(" ".join(row))},
        "nested too deep": {"row": "[" * 200_000},
        "a column twice": {"row": json.dumps(row)[:-1] + ', "click": 1}'},
        "a column is missing": {"row": json.dumps({k: v for k, v in row.items() if k != "item_id"})},
        "an id beyond 64 bits": json_row(user_id=1 << 70),
        "an id that is another type": json_row(user_id="17"),
        "a list where one is": json_row(item_id=[1, 2]),
        "a lone surrogate": json_row(city="\ud800"),
        "a label of 2": json_row(click=2),
        "a label of text": json_row(click="yes"),
        "an unknown field": {"record": "{}"},
        "nothing in it": {"row": ""},
        "no Arrow": {"rows": b"PAR1"},
        "an empty body": {"rows": b""},
        "Arrow cut short": {"rows": ipc(few)[:-300]},
        "damaged offsets": {"rows": damaged(few)},
        "Arrow of other types": {"rows": ipc(few.set_column(0, "user_id", pa.array([str(i) for i in range(7)])))},
        "rows out of nothing": {"rows": ipc(pa.table({name: pa.nulls(MOST_ROWS + 1) for name in table.column_names}))},
    }


def send(client: Any, log: Path, bad: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Sound rows, singly and in tables, with a bad message after every few of them. -> what is wrong by id."""
    table, ids = pq.read_table(log / "train.parquet").slice(0, SOUND), {}
    waiting = list(bad.items())
    for start in range(0, SOUND, 10):
        part = table.slice(start, 10)
        if start % 20:
            client.xadd("events", {"rows": ipc(part.combine_chunks())})
        else:
            for row in part.to_pylist():
                client.xadd("events", {"row": json.dumps(row)})
        if waiting and start:
            what, message = waiting.pop(0)
            key = client.xadd("events", message).decode()
            ids[f"events {key}..{key}"] = what
    assert not waiting
    client.xadd("events", {"done": ""})
    return ids


def content_of(log: Path, run: str, uri: str, **options: Any) -> dict[str, Any]:
    return online_file(log, run, f"{uri}/events", **{"until_idle": None, "patience_seconds": 0} | options)


@pytest.fixture
def client(broker: str) -> Iterator[Any]:
    connection = redis.Redis.from_url(broker)
    connection.flushall()
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def without(log: Path, broker: str) -> Path:
    """A run that gets the sound messages only."""
    connection = redis.Redis.from_url(broker)
    connection.flushall()
    send(connection, log, {})
    connection.close()
    followed(content_of(log, "without", broker))
    return log / "without"


def follow_rank(rank: int, world_size: int, content: dict[str, Any]) -> dict[str, Any]:
    from hmoe_rec.config import resolve_config

    return follow(resolve_config(content))


@pytest.mark.parametrize(
    "world_size", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_the_sound_rest_is_learned_and_each_bad_message_is_put_aside(log, broker, client, without, world_size):
    bad = bad_messages(pq.read_table(log / "train.parquet"))
    ids = send(client, log, bad)
    name = f"bad_{world_size}"
    content = content_of(log, name, broker, max_bad_share=1.0)
    report = followed(content) if world_size == 1 else run_ranks(world_size, follow_rank, content)[0]
    letters = {letter["id"]: letter for letter in lines(log / name, "dead_letters.jsonl")}
    assert {ids.get(key) for key in letters} == set(bad)
    assert (report["rows"], report["bad"]) == (SOUND, len(bad))
    assert report["dead_letters"] == str(log / name / "dead_letters.jsonl")
    for key, letter in letters.items():
        (body,) = bad[ids[key]].values()
        sent = body.encode() if isinstance(body, str) else body
        known = letter["body"] is not None and sent.startswith(base64.b64decode(letter["body"]))
        assert letter["reason"] and (known or ids[key] == "an unknown field"), ids[key]
    assert [line["bad"] for line in lines(log / name)] == [len(bad)]
    if world_size == 1:
        assert_same_state(log / name, without)


@pytest.mark.parametrize("odd_one", [0, 3, 6])
def test_messages_that_fit_alone_but_not_together_are_judged_by_the_most_of_them(log, broker, client, odd_one):
    row = pq.read_table(log / "train.parquet").slice(0, 1).to_pylist()[0]
    cities = ["a", "b", "c", "d", "e", "f", "g"]
    cities[odd_one] = 17
    for i, city in enumerate(cities):
        client.xadd("events", {"row": json.dumps({**row, "city": city, "price": None if i % 2 else 0.5})})
    client.xadd("events", {"done": ""})
    report = followed(content_of(log, f"together_{odd_one}", broker, max_bad_share=1.0))
    assert (report["rows"], report["bad"]) == (6, 1)


def test_dictionaries_and_text_go_together(log, broker, client):
    table = pq.read_table(log / "train.parquet").slice(0, 40)
    at = table.schema.get_field_index("city")
    for start in range(0, 40, 10):
        part = table.slice(start, 10).combine_chunks()
        encoded = part.set_column(
            at, "city", part["city"].dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string()))
        )
        if start % 20:
            client.xadd("events", {"rows": ipc(encoded)})
        else:
            for row in part.to_pylist():
                client.xadd("events", {"row": json.dumps(row)})
    client.xadd("events", {"done": ""})
    report = followed(content_of(log, "dictionaries", broker))
    assert (report["rows"], report["bad"]) == (40, 0)
    client.flushall()
    client.xadd("events", {"rows": ipc(table.combine_chunks())})
    client.xadd("events", {"done": ""})
    followed(content_of(log, "text", broker))
    assert_same_state(log / "dictionaries", log / "text")


def test_mostly_garbage_stops_the_run_and_all_else_is_saved(log, broker, client):
    row = pq.read_table(log / "train.parquet").slice(0, 1).to_pylist()[0]
    for i in range(60):
        client.xadd("events", {"row": "{" if i % 5 == 4 else json.dumps(row)})
    client.xadd("events", {"done": ""})
    options = {"window_rows": 16, "checkpoint_windows": 1000}
    content = content_of(log, "garbage", broker, **options)
    with pytest.raises(TrainingError, match=r"11 of the last 59 messages.*max_bad_share is 1.0%.*dead_letters"):
        followed(content)
    assert len(lines(log / "garbage", "dead_letters.jsonl")) == 11
    content["train"]["resume"] = True
    report = followed(content)  # who resumes it has looked at them
    assert (report["rows"], report["bad"]) == (48, 12)


def test_a_few_bad_ones_among_few_do_not_stop_a_run(log, broker, client):
    row = pq.read_table(log / "train.parquet").slice(0, 1).to_pylist()[0]
    for i in range(18):
        client.xadd("events", {"row": "{" if i % 2 else json.dumps(row)})
    client.xadd("events", {"done": ""})
    assert followed(content_of(log, "few", broker))["bad"] == 9


def die_after_the_letters(rank: int, world_size: int, content: dict[str, Any]) -> None:
    import os

    from hmoe_rec.training.online import Follower

    if rank == 0:
        Follower._move_on = lambda self, window: os._exit(9)
    follow_rank(rank, world_size, content)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_kill_between_letter_and_checkpoint_repeats_neither_rows_nor_letters(log, broker, client, world_size):
    bad = bad_messages(pq.read_table(log / "train.parquet"))
    ids = send(client, log, bad)
    name = f"killed_{world_size}"
    content = content_of(log, name, broker, max_bad_share=1.0)
    with pytest.raises(RankError):
        run_ranks(world_size, die_after_the_letters, content)
    before = (log / name / "dead_letters.jsonl").read_text()
    content["train"]["resume"] = True
    (report, *_) = run_ranks(world_size, follow_rank, content)
    assert (report["rows"], report["bad"]) == (SOUND, len(ids))
    assert (log / name / "dead_letters.jsonl").read_text() == before


def test_many_bad_ones_are_found_by_few_reads(log, broker, client, monkeypatch):
    row = pq.read_table(log / "train.parquet").slice(0, 1).to_pylist()[0]
    for i in range(256):
        client.xadd("events", {"row": json.dumps({**row, "click": 2 if i % 4 == 3 else 1})})
    client.xadd("events", {"done": ""})
    read, together = [], redis_stream._together
    compared, key = [], redis_stream._key
    monkeypatch.setattr(redis_stream, "_key", lambda message: compared.append(0) or key(message))
    monkeypatch.setattr(redis_stream, "_together", lambda messages: read.append(len(messages)) or together(messages))
    report = followed(content_of(log, "many", broker, max_bad_share=1.0))
    assert (report["rows"], report["bad"]) == (192, 64)
    assert len(compared) <= 64 * 8 * 2 * 2 * 16  # bad ones, halvings, two halves, looks at each, ids to find it
    assert sum(read) <= 256 * (8 + 1 + 3)  # each halving reads all at most once; then together, and for good


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lasts", [False, True])
def test_letters_that_cannot_be_written_are_waited_for(log, broker, client, world_size, lasts):
    bad = bad_messages(pq.read_table(log / "train.parquet"))
    ids = send(client, log, bad)
    name = f"full_{world_size}_{lasts}"
    content = content_of(log, name, broker, max_bad_share=1.0, patience_seconds=0 if lasts else 60)
    if lasts:
        with pytest.raises((DataError, RankError), match="dead letters cannot be written: OSError: full"):
            run_ranks(world_size, follow_with_a_full_disk, content, 1000)
        content["train"]["resume"] = (log / name / "checkpoints").exists()
        (report, *_) = run_ranks(world_size, follow_rank, content)
    else:
        (report, *_) = run_ranks(world_size, follow_with_a_full_disk, content, 2)
    assert (report["rows"], report["bad"]) == (SOUND, len(ids))
    assert {line["id"] for line in lines(log / name, "dead_letters.jsonl")} == set(ids)


def follow_with_a_full_disk(rank: int, world_size: int, content: dict[str, Any], failures: int) -> dict[str, Any]:
    from hmoe_rec.data.dead_letters import DeadLetters
    from hmoe_rec.training import online

    left, append = [OSError("full")] * failures, DeadLetters._append

    def appended(self: DeadLetters, lines: list[str]) -> None:
        if left:
            raise left.pop()
        append(self, lines)

    DeadLetters._append, online.RETRY_SECONDS = appended, 0.01
    return follow_rank(rank, world_size, content)


# ------------------------------------------------------------------------------------------------------------- mutants


def mutants(body: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Bytes flipped, cut out, doubled, or replaced by others, at drawn places."""
    draw = random.Random(seed)
    for _ in range(count):
        mutant = bytearray(body)
        for _ in range(draw.choice((1, 1, 2, 5))):
            place = draw.randrange(len(mutant))
            kind = draw.choice(("flip", "flip", "byte", "cut", "double", "end"))
            if kind == "flip":
                mutant[place] ^= 1 << draw.randrange(8)
            elif kind == "byte":
                mutant[place] = draw.choice((0, 0x7F, 0x80, 0xFF))
            elif kind == "cut":
                del mutant[place : place + draw.randrange(1, 9)]
            elif kind == "double":
                mutant[place:place] = mutant[place : place + draw.randrange(1, 9)]
            else:
                del mutant[max(1, place) :]
        yield bytes(mutant)


@pytest.mark.parametrize("field", ["row", "rows"])
@pytest.mark.parametrize("seed", range(3))
def test_a_mutant_is_read_or_refused_and_nothing_else(log, field, seed):
    table = pq.read_table(log / "train.parquet").slice(0, 5).combine_chunks()
    schema = load_schema(online_file(log, "x")["data"]["schema"])
    columns = schema.read_columns()
    body = ipc(table) if field == "rows" else json.dumps(table.slice(0, 1).to_pylist()[0]).encode()
    refused = 0
    for mutant in mutants(body, 200, seed):
        message = redis_stream._message("1-0", {field.encode(): mutant}, columns)
        if message.problem or not message.rows:
            refused += 1
            continue
        try:
            source = TableSource(redis_stream._together([message]), schema, "mutant")
            assert (
                sum(len(batch) for batch in BatchReader(source, global_batch_size=3, shuffle=False).epoch(0))
                == message.rows
            )
        except (HmoeError, *CONTENT_ERRORS):
            refused += 1
    assert 50 < refused <= 200


def test_a_damaged_parquet_file_is_read_or_refused_and_nothing_else(log, tmp_path):
    """Of its pages: a damaged footer may end the process inside Arrow, in `RowGroupMetaData.column`."""
    path, table = tmp_path / "x.parquet", pq.read_table(log / "train.parquet").slice(0, 200)
    schema = load_schema(online_file(log, "x")["data"]["schema"])
    refused, draw = 0, random.Random(2)
    for compression in ("none", "zstd"):
        pq.write_table(table, path, compression=compression, row_group_size=70)
        body = path.read_bytes()
        pages = len(body) - 8 - int.from_bytes(body[-8:-4], "little")
        for _ in range(150):
            mutant = bytearray(body)
            for _ in range(draw.choice((1, 2, 5))):
                mutant[draw.randrange(pages)] ^= 1 << draw.randrange(8)
            path.write_bytes(mutant)
            try:
                source = ParquetSource([str(path)], schema)
                for _ in BatchReader(source, global_batch_size=33, shuffle=False).epoch(0):
                    pass
            except (HmoeError, *CONTENT_ERRORS):
                refused += 1
    assert 30 < refused < 300
