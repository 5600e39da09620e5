"""A log of JSON lines that grows: locally a file that is appended to; in a store, where nothing can be, parts.

    metrics.jsonl                       local
    metrics.jsonl/part-000000.jsonl     remote: sealed when it is longer than PART_BYTES
    metrics.jsonl/part-000001.jsonl     the last one: written anew with what has come, at most PART_BYTES each time

`read_lines` reads both alike.
"""

import logging
import time
from collections.abc import Callable

from hmoe_rec import io

log = logging.getLogger(__name__)

PART_BYTES = 1 << 18
EVERY_SECONDS = 15.0  # a kill loses what was logged since, never what a checkpoint was saved after


class LineLog:
    """Args:
    uri: of the log.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._local = io.is_local(uri)
        self._parts = 0 if self._local else len(_parts(uri))
        self._last: list[str] = []  # lines of the part that is not sealed
        self._waiting = False
        self._written_at = time.monotonic()
        if self._parts:  # the last one goes on, unless it is full
            self._last = _read(_part(uri, self._parts - 1))
            self._parts -= 1

    def append(self, line: str) -> None:
        if self._local:
            with io.open(self.uri, "a") as file:
                file.write(f"{line}\n")
            return
        self._last.append(line)
        self._waiting = True
        if time.monotonic() - self._written_at >= EVERY_SECONDS:
            try:
                self.flush()
            except OSError as error:
                log.warning("%s; what is logged is kept and written later", error)
                self._written_at = time.monotonic()

    def flush(self) -> None:
        """Nothing waits any more."""
        if not self._waiting:
            return
        text = "".join(f"{line}\n" for line in self._last)
        io.write_text(_part(self.uri, self._parts), text)
        self._written_at, self._waiting = time.monotonic(), False
        if len(text) >= PART_BYTES:
            self._parts, self._last = self._parts + 1, []

    def keep(self, is_kept: Callable[[str], bool]) -> None:
        """Drops lines at the end: all after the last one that is kept, and those that are not."""
        if self._local:
            if io.exists(self.uri):
                lines = _read(self.uri)
                io.write_text(self.uri, "".join(f"{line}\n" for line in lines if is_kept(line)))
            return
        kept = [line for line in self._last if is_kept(line)]
        changed = len(kept) < len(self._last)
        while not kept and self._parts:  # a part in which nothing is kept, and the one before it
            if io.exists(_part(self.uri, self._parts)):
                io.rm(_part(self.uri, self._parts))
            self._parts -= 1
            before = _read(_part(self.uri, self._parts))
            kept = [line for line in before if is_kept(line)]
            changed = len(kept) < len(before)
        self._last, self._waiting = kept, changed
        if changed and kept:
            self.flush()
        elif changed:
            io.rm(_part(self.uri, self._parts))
            self._waiting = False


def read_lines(uri: str) -> list[str]:
    """All lines of a log, wherever it is.

    Raises:
        FileNotFoundError: there is none.
    """
    if io.is_local(uri) or io.isfile(uri):
        return _read(uri)
    parts = _parts(uri)
    if not parts:
        raise FileNotFoundError(f"{uri}: no such log")
    return [line for name in parts for line in _read(io.join(uri, name))]


def _parts(uri: str) -> list[str]:
    names = io.ls(uri) if io.isdir(uri) else []
    return [name for name in names if name.startswith("part-") and name.endswith(".jsonl")]


def _part(uri: str, number: int) -> str:
    return io.join(uri, f"part-{number:06d}.jsonl")


def _read(uri: str) -> list[str]:
    with io.open(uri, "r") as file:
        return file.read().splitlines()
