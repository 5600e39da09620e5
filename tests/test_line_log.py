import json

import pytest

from hmoe_rec import io, line_log
from hmoe_rec.line_log import LineLog, read_lines


@pytest.fixture(params=["", "memory://"])
def uri(request, tmp_path) -> str:
    return f"{request.param}{tmp_path}/metrics.jsonl"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(line_log, "PART_BYTES", 100)
    monkeypatch.setattr(line_log, "EVERY_SECONDS", 0.0)


def line(step: int) -> str:
    return json.dumps({"step": step})


def up_to(step: int):
    return lambda text: json.loads(text)["step"] <= step


def test_it_is_one_log_wherever_it_is_and_however_often_it_is_opened(uri):
    with pytest.raises(FileNotFoundError):
        read_lines(uri)
    for first in (0, 7, 21):
        log = LineLog(uri)
        for step in range(first, {0: 7, 7: 21, 21: 40}[first]):
            log.append(line(step))
        log.flush()
    assert read_lines(uri) == [line(step) for step in range(40)]


@pytest.mark.parametrize("last", [39, 38, 12, 7, 0, -1])
def test_lines_after_a_step_are_dropped_and_written_again(uri, last):
    log = LineLog(uri)
    for step in range(40):
        log.append(line(step))
    log = LineLog(uri)
    log.keep(up_to(last))
    assert (read_lines(uri) if io.exists(uri) else []) == [line(step) for step in range(last + 1)]
    for step in range(last + 1, 45):
        log.append(line(step))
    log.flush()
    assert read_lines(uri) == [line(step) for step in range(45)]


def test_no_line_is_written_more_often_than_a_part_is_long(tmp_path, monkeypatch):
    written = []
    whole = io.write_text
    monkeypatch.setattr(line_log.io, "write_text", lambda uri, text: (written.append(len(text)), whole(uri, text)))
    log = LineLog(f"memory://{tmp_path}/metrics.jsonl")
    for step in range(500):
        log.append(line(step))
    assert max(written) < 100 + len(line(499)) + 1 and len(written) == 500
    assert len(io.ls(f"memory://{tmp_path}/metrics.jsonl")) > 50


def test_lines_wait_for_a_store_that_does_not_answer(bucket, monkeypatch, caplog):
    log = LineLog(f"{bucket.uri}/metrics.jsonl")
    bucket.spoil("PUT", "metrics", 403)
    log.append(line(0))
    assert "kept and written later" in caplog.text and not io.exists(log.uri)
    log.append(line(1))
    assert read_lines(log.uri) == [line(0), line(1)]
    bucket.spoil("PUT", "metrics", 403)
    monkeypatch.setattr(line_log, "EVERY_SECONDS", 1e9)
    log.append(line(2))
    with pytest.raises(OSError, match="refused PutObject"):  # before a checkpoint it may not be lost
        log.flush()
    log.flush()
    assert read_lines(log.uri) == [line(step) for step in range(3)]
