"""The file of dead letters: an id once, a cut line taken away, a long body cut."""

import base64
import json
from pathlib import Path

import pytest

from hmoe_rec.data import dead_letters
from hmoe_rec.data.dead_letters import DeadLetters, Letter


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
    import fsspec

    text = fsspec.filesystem("memory").cat("/dead-letters/dead.jsonl").decode()
    assert [json.loads(line)["id"] for line in text.splitlines()] == ["events 1-0", "events 2-0", "events 3-0"]
