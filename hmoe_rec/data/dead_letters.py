"""What a stream brought and nobody could learn from -> a log of JSON lines, for somebody to look at and mend.

    {"id": "events 17-0..17-0", "kind": "unreadable", "reason": "...", "time": 1790.5, "bytes": 31, "body": "eyJ1..."}

A line is a message, a file, or a row group. `body` is what was sent, in base64, cut after MOST_BYTES (`bytes` says how
long it was); null for files, which lie where they lay, and for messages that the broker has trimmed. An id stands in it
once, also where a run was killed between the line and its checkpoint. In a store the log is in parts (line_log.py).
"""

import base64
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass

from hmoe_rec import io
from hmoe_rec.line_log import LineLog, read_lines

MOST_BYTES = 1 << 16  # of a body


@dataclass(frozen=True)
class Letter:
    """Attributes: time: seconds since 1970 when it was found. body: what was sent; None: it is not here."""

    id: str
    kind: str
    reason: str
    time: float
    body: bytes | None = None

    def line(self) -> str:
        body = None if self.body is None else base64.b64encode(self.body[:MOST_BYTES]).decode()
        size = None if self.body is None else len(self.body)
        content = {"id": self.id, "kind": self.kind, "reason": self.reason, "time": self.time}
        return json.dumps(content | {"bytes": size, "body": body})


class DeadLetters:
    """A log (line_log.py) of one writer.

    Args:
        uri: where it is, local or remote; it and its directory are made when the first letter comes.

    Raises:
        HmoeError: no file system takes such a URI.
    """

    def __init__(self, uri: str) -> None:
        io.filesystem(uri)
        self.uri = uri
        self._ids: set[str] | None = None
        self._parts: LineLog | None = None  # where nothing can be appended to

    def add(self, letters: Iterable[Letter]) -> None:
        """Writes those whose ids are not there yet. After an error all may be given again."""
        new = {letter.id: letter.line() for letter in letters}
        if not new:
            return
        ids = self._read() if self._ids is None else self._ids
        self._ids = None  # unless all goes well, nobody knows what was written
        lines = [line for key, line in new.items() if key not in ids]
        if lines:
            self._append(lines)
        self._ids = ids | new.keys()

    def _read(self) -> set[str]:
        """Ids that are there, and where to go on."""
        if io.is_local(self.uri):
            return _read_whole_lines(io.local_path(self.uri))
        self._parts = LineLog(self.uri)
        try:
            return {_id_of(line) for line in read_lines(self.uri)}
        except FileNotFoundError:
            return set()

    def _append(self, lines: list[str]) -> None:
        if self._parts is None:
            io.mkdirs(os.path.dirname(io.local_path(self.uri)) or ".")
            with io.open(self.uri, "a") as file:
                file.write("".join(f"{line}\n" for line in lines))
            return
        for line in lines:
            self._parts.append(line)
        self._parts.flush()


def _read_whole_lines(path: str) -> set[str]:
    """Ids in a local file. A last line that was cut short by a kill is taken away."""
    ids, size = set[str](), 0
    if os.path.exists(path):
        with open(path, "r+b") as file:
            for line in file:
                if line.endswith(b"\n"):
                    size += len(line)
                    ids.add(_id_of(line))
            file.truncate(size)
    return ids


def _id_of(line: str | bytes) -> str:
    """ "": somebody has written another line into the file."""
    try:
        return str(json.loads(line)["id"])
    except (ValueError, TypeError, LookupError):
        return ""
