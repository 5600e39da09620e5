"""The file of dead letters: an id once, a cut line taken away, a long body cut."""

import base64
import json
from pathlib import Path

import pytest

from hmoe_rec import io, line_log
from hmoe_rec.data import dead_letters
from hmoe_rec.data.dead_letters import DeadLetters, Letter
from hmoe_rec.line_log import read_lines
from hmoe_rec.types import HmoeError


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def letter(number: int, body: bytes | None = b"{") -> Letter:
    return Letter(f"events {number}-0", "unreadable", "no JSON", 17.5, body)


@pytest.mark.parametrize("again", [False, True])
def test_an_id_stands_in_the_file_once(tmp_path, again):
    path = tmp_path / "deep" / "dead.jsonl"
    letters = DeadLetters(str(path))
    letters.add([letter(1), letter(2)])
    if again:  # after a kill before the checkpoint
        letters = DeadLetters(str(path))
    letters.add([letter(2), letter(3)])
    assert [line["id"] for line in lines(path)] == ["events 1-0", "events 2-0", "events 3-0"]


def test_nothing_is_made_without_a_letter(tmp_path):
    DeadLetters(str(tmp_path / "dead.jsonl")).add([])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_was_cut_short_is_written_again(tmp_path, cut):
    path = tmp_path / "dead.jsonl"
    DeadLetters(str(path)).add([letter(1), letter(2)])
    whole = path.read_text()
    path.write_text(whole[:-cut])
    DeadLetters(str(path)).add([letter(2)])
    assert path.read_text() == whole


def test_a_body_is_what_was_sent_and_a_long_one_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(dead_letters, "MOST_BYTES", 5)
    path = tmp_path / "dead.jsonl"
    DeadLetters(str(path)).add([letter(1, b"\x00\xff"), letter(2, b"1234567"), letter(3, None)])
    bodies = [(line["bytes"], line["body"] and base64.b64decode(line["body"])) for line in lines(path)]
    assert bodies == [(2, b"\x00\xff"), (7, b"12345"), (None, None)]


def test_a_store_that_cannot_append_holds_the_same(tmp_path):
    uri = "memory://dead-letters/dead.jsonl"
    for numbers in ((1, 2), (2, 3)):
        DeadLetters(uri).add([letter(n) for n in numbers])
    written = [json.loads(line)["id"] for line in read_lines(uri)]
    assert written == ["events 1-0", "events 2-0", "events 3-0"]


def test_in_a_store_what_is_written_does_not_grow_with_what_is_there(monkeypatch):
    sizes, write = [], io.write_text
    monkeypatch.setattr(io, "write_text", lambda uri, text: (sizes.append(len(text)), write(uri, text)))
    monkeypatch.setattr(line_log, "PART_BYTES", 1000)
    letters = DeadLetters("memory://dead-letters-long/dead.jsonl")
    for number in range(60):
        letters.add([letter(number)])
    assert len(read_lines(letters.uri)) == 60
    assert max(sizes) < 1300


@pytest.mark.parametrize("uri", ["local", "memory://dead-letters-again/dead.jsonl"])
def test_what_could_not_be_written_is_given_again(tmp_path, monkeypatch, uri):
    uri = str(tmp_path / "dead.jsonl") if uri == "local" else uri
    letters = DeadLetters(uri)
    letters.add([letter(1)])
    with monkeypatch.context() as broken:
        broken.setattr(io, "write_text", fail)
        broken.setattr(io, "open", fail)
        with pytest.raises(OSError, match="full"):
            letters.add([letter(2), letter(3)])
    letters.add([letter(2), letter(3)])
    assert [json.loads(line)["id"] for line in read_lines(uri)] == ["events 1-0", "events 2-0", "events 3-0"]


def fail(*args, **options):
    raise OSError("full")


def test_a_line_of_somebody_elses_does_no_harm(tmp_path):
    path = tmp_path / "dead.jsonl"
    DeadLetters(str(path)).add([letter(1)])
    path.write_text(path.read_text() + "# looked at until here\n17\n")
    DeadLetters(str(path)).add([letter(1), letter(2)])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines() if "events" in line] == [
        "events 1-0",
        "events 2-0",
    ]


def test_a_place_that_takes_no_file_is_refused_at_once():
    with pytest.raises(HmoeError, match="unknown scheme 'redis'"):
        DeadLetters("redis://localhost/0/dead")
