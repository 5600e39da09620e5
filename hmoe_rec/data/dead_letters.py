"""What a stream brought and nobody could learn from -> a file of JSON lines, so that somebody can look and mend.

    {"id": "events 17-0..17-0", "kind": "unreadable", "reason": "...", "time": 1790.5, "bytes": 31, "body": "eyJ1..."}

A line is a message, a file, or a row group. `body` is what was sent, in base64, cut after MOST_BYTES (`bytes` says how
long it was); null for files, which lie where they lay, and for messages that the broker has trimmed. An id stands in
the file once, also where a run was killed between the line and its checkpoint.
"""

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass

from hmoe_rec import io

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
    """One file, of one writer.

    Args:
        uri: where it is, local or remote; it and its directory are made when the first letter comes.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._ids: set[str] | None = None

    def add(self, letters: Iterable[Letter]) -> None:
        """Writes those whose ids are not there yet."""
        new = {letter.id: letter.line() for letter in letters}
        if not new:
            return
        if self._ids is None:
            self._ids = self._read()
        lines = [line for key, line in new.items() if key not in self._ids]
        if lines:
            self._append(lines)
            self._ids |= new.keys()

    def _read(self) -> set[str]:
        """Ids that are there. A last line that was cut short by a kill is taken away."""
        if not io.exists(self.uri):
            return set()
        with io.open(self.uri, "r") as file:
            text = file.read()
        whole, _, rest = text.rpartition("\n")
        if rest:
            io.write_text(self.uri, f"{whole}\n" if whole else "")
        return {json.loads(line)["id"] for line in whole.splitlines()}

    def _append(self, lines: list[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        if not io.exists(self.uri):
            io.write_text(self.uri, text)
        elif io.is_local(self.uri):
            with io.open(self.uri, "a") as file:
                file.write(text)
        else:
            with io.open(self.uri, "r") as file:
                before = file.read()
            io.write_text(self.uri, before + text)
