"""One writer at a time: who is refused, who is taken for dead, and who stops because it was."""

import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from hmoe_rec import io, lock
from hmoe_rec.lock import Lock, locked
from hmoe_rec.types import LockError


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("bucket").uri
    if request.param == "memory":
        return f"memory://{tmp_path}"
    return str(tmp_path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.1)
    monkeypatch.setattr(lock, "SILENT", 0.8)
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def uri_in(folder: str) -> str:
    return io.join(folder, lock.NAME)


def new(folder: str) -> Lock:
    return Lock(uri_in(folder), f"train.run_dir {folder}", "give another train.run_dir")


def left_by(folder: str, **changes) -> None:
    """A lock whose owner did not give it back."""
    content = json.loads(new(folder)._record())
    io.write_text(uri_in(folder), json.dumps({**content, **changes}))


def test_the_second_is_refused_and_told_who_is_there_and_what_to_do(folder):
    first = new(folder)
    first.acquire()
    with pytest.raises(LockError) as refused:
        new(folder).acquire()
    for part in (
        f"train.run_dir {folder} is being written by process {os.getpid()} on ",
        " since 2",
        "wait for it or stop it, or give another train.run_dir",
        f"remove {uri_in(folder)}",
    ):
        assert part in str(refused.value)
    first.check()
    first.release()
    assert not io.exists(uri_in(folder))
    with locked(uri_in(folder), folder) as second:
        second.check()


def test_a_dead_owners_lock_is_taken_over_and_said(folder, caplog):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left_by(folder, pid=ended.pid, started="1")
    with caplog.at_level(logging.WARNING, lock.__name__), locked(uri_in(folder), folder) as mine:
        mine.check()
    assert f"lock of process {ended.pid} on " in caplog.text and "is taken over" in caplog.text


def test_a_number_that_another_process_has_got_is_not_its_owner(tmp_path):
    left_by(str(tmp_path), started="17")  # this very number, of a process that began at another time
    with locked(uri_in(str(tmp_path)), "it"):
        pass


def test_a_process_that_ended_and_was_not_waited_for_is_dead(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left_by(str(tmp_path), pid=child.pid, started=lock._started(child.pid))
    with pytest.raises(LockError):
        new(str(tmp_path)).acquire()
    child.kill()
    deadline = time.monotonic() + 20
    while lock._started(child.pid) != "ended" and time.monotonic() < deadline:
        time.sleep(0.01)
    with locked(uri_in(str(tmp_path)), "it"):
        pass
    child.wait()


@pytest.mark.parametrize("where", [{"host": "other"}, {"space": "pid:[1]"}, {"boot": "another"}])
def test_an_owner_elsewhere_is_watched(folder, where):
    """Also one of this host's name and this very number in another container: both may live."""
    left_by(folder, **where)
    began = time.monotonic()
    with locked(uri_in(folder), folder):  # it stood still
        assert time.monotonic() - began >= lock.SILENT


def test_an_owner_elsewhere_whose_heart_beats_is_not_robbed(folder, monkeypatch):
    elsewhere = {"host": "other", "boot": "another", "space": None}
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_place", lambda: elsewhere)
        theirs = new(folder)
        theirs.acquire()
    with pytest.raises(LockError, match="process .* on other since"):
        patched = lock._place
        monkeypatch.setattr(lock, "_place", lambda: {"host": "mine", "boot": "mine", "space": None})
        new(folder).acquire()
    monkeypatch.setattr(lock, "_place", patched)
    theirs.check()
    theirs.release()


def test_a_lock_that_is_old_or_unreadable(tmp_path):
    left_by(str(tmp_path), host="other", seen=time.time() - lock.OLD - 1)
    began = time.monotonic()
    with locked(uri_in(str(tmp_path)), "it"):
        assert time.monotonic() - began < lock.SILENT
    for text in ("", "[1]", "no json"):
        io.write_text(uri_in(str(tmp_path)), text)
        with locked(uri_in(str(tmp_path)), "it"):
            pass


@pytest.mark.parametrize(
    ("job", "attempt", "is_at_once"), [("a", 1, True), ("a", 0, False), ("b", 1, False), ("none", 1, False)]
)
def test_a_launcher_that_restarts_its_processes_elsewhere_is_not_hindered(
    tmp_path, monkeypatch, job, attempt, is_at_once
):
    left_by(str(tmp_path), host="other", job="none" if job == "none" else "a", attempt=0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    began = time.monotonic()
    with locked(uri_in(str(tmp_path)), "it"):
        assert (time.monotonic() - began < lock.SILENT) == is_at_once


def test_who_was_taken_for_dead_stops_before_it_commits_and_does_not_take_the_lock_back(folder):
    first = new(folder)
    first.acquire()
    left_by(folder, host="other", token="theirs")
    with pytest.raises(LockError, match="was taken over by process .* on other since .*; it stops before it writes"):
        first.check()
    time.sleep(5 * lock.HEARTBEAT)
    first.release()
    assert json.loads(io.open(uri_in(folder)).read())["token"] == "theirs"


def test_a_lock_that_somebody_removed_is_lost(folder):
    first = new(folder)
    first.acquire()
    io.rm(uri_in(folder))
    with pytest.raises(LockError, match="was removed"):
        first.check()
    first.release()


@pytest.mark.parametrize("is_left", [False, True])
def test_of_many_at_once_one_gets_it(folder, is_left):
    if is_left:
        left_by(folder, started="17")
    owners, refused, barrier = [], [], threading.Barrier(5)

    def act() -> None:
        mine = new(folder)
        barrier.wait()
        try:
            mine.acquire()
            owners.append(mine)
        except LockError:
            refused.append(mine)

    threads = [threading.Thread(target=act) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = []
    for owner in owners:  # two takers can pass each other; the next look settles it
        try:
            owner.check()
            kept.append(owner)
        except LockError:
            pass
    assert len(kept) == 1 and len(owners) + len(refused) == 5 and (is_left or len(owners) == 1)
    for owner in owners:
        owner.release()
