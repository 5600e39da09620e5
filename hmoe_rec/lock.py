"""One writer at a time: a file beside what is written says who owns it, and is looked at before each commit.

A second writer is refused, and told who the first one is. An owner that is dead loses its lock:

- on this machine (same boot, same space of process numbers) if no process has its number and start time;
- if it was an earlier attempt of the same job (torchrun's run id, a larger restart count): the launcher has ended it;
- elsewhere, or in another container, if its heartbeat stands still for SILENT seconds of watching (clocks are not
  compared), or is OLD.

Two owners overlap only where one was taken for dead: it finds another token at its next commit, and stops before it.
"""

import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hmoe_rec import io
from hmoe_rec.types import LockError

log = logging.getLogger(__name__)

NAME = ".lock"
HEARTBEAT = 10.0  # seconds between two beats of an owner
SILENT = 60.0  # without a beat, seen from elsewhere
OLD = 900.0  # by the clocks: more than they may differ
SETTLE = 0.3  # after taking over: of several that do so at once, the last one stays


class Lock:
    """
    Args:
        uri: of the file.
        what: is written, as the user knows it: "train.run_dir runs/a".
        remedy: what to do where it is refused, besides waiting.
    """

    def __init__(self, uri: str, what: str, remedy: str = "give another name") -> None:
        self.uri, self.what, self.remedy = uri, what, remedy
        self._token = uuid.uuid4().hex
        self._since = time.time()
        self._beats = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Its directory must be there. Called again, it takes the lock anew, after the directory was moved.

        Raises:
            LockError: another process has it.
            OSError: it cannot be written.
        """
        while not io.create_text(self.uri, self._record()):
            owner = self._read()
            if owner is None:  # released just now
                continue
            if not self._is_over(owner):
                raise LockError(
                    f"{self.what} is being written by {_name(owner)}; wait for it or stop it, or {self.remedy}. If it "
                    f"is known to be dead, remove {self.uri}"
                )
            log.warning("%s: the lock of %s is taken over, since that one is dead", self.what, _name(owner))
            io.write_text(self.uri, self._record())
            time.sleep(SETTLE)
            self.check()
            break
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Call it before each commit.

        Raises:
            LockError: the lock was lost: nothing more may be written.
        """
        owner = self._read()
        if owner is None or owner.get("token") != self._token:
            by = "removed" if owner is None else f"taken over by {_name(owner)}"
            raise LockError(
                f"{self.what}: the lock of this process was {by}; it stops before it writes anything more, and what is "
                "committed stays"
            )

    def release(self) -> None:
        """Gives it back, if it is still this one's."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        with suppress(OSError):
            owner = self._read()
            if owner is not None and owner.get("token") == self._token:
                io.rm(self.uri)

    # -- what stands in the file -----------------------------------------------------------------------------------

    def _record(self) -> str:
        content = {
            "token": self._token,
            **_place(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "command": _command(),
            "job": os.environ.get("TORCHELASTIC_RUN_ID"),
            "attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            "since": self._since,
            "seen": time.time(),
            "beats": self._beats,
        }
        return json.dumps(content, indent=1)

    def _read(self) -> dict[str, Any] | None:
        """None: there is no lock. {}: nobody can say whose it is."""
        try:
            with io.open(self.uri, "r") as file:
                content = json.load(file)
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with suppress(OSError):  # the next beat may come through; what cannot be written is told at a commit
                owner = self._read()
                if owner is None or owner.get("token") != self._token:
                    return
                self._beats += 1
                io.write_text(self.uri, self._record())

    # -- whether another owner lives -------------------------------------------------------------------------------

    def _is_over(self, owner: Mapping[str, Any]) -> bool:
        if all(owner.get(key) == value for key, value in _place().items()):
            return not _is_running(owner)
        job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if job != "none" and job == owner.get("job") and attempt > owner.get("attempt", attempt):
            return True
        seen = owner.get("seen")
        if isinstance(seen, int | float) and time.time() - seen > OLD:
            return True
        return self._stands_still(owner)

    def _stands_still(self, owner: Mapping[str, Any]) -> bool:
        log.warning(
            "%s: owned by %s, which cannot be asked from here; its heartbeat is watched for up to %g s",
            self.what,
            _name(owner),
            SILENT,
        )
        deadline = time.monotonic() + SILENT
        while time.monotonic() < deadline:
            time.sleep(min(HEARTBEAT, SILENT) / 10)
            now = self._read()
            if now != owner:
                return now is None
        return True


@contextmanager
def locked(uri: str, what: str, remedy: str = "give another name") -> Iterator[Lock]:
    """Holds a lock for as long as the block lasts."""
    lock = Lock(uri, what, remedy)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def _name(owner: Mapping[str, Any]) -> str:
    if "pid" not in owner:
        return "a process that has left no name"
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(owner.get("since", 0)))
    return f"process {owner['pid']} on {owner.get('host')} since {since} ({owner.get('command')})"


def _command() -> str:
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])[:200]


def _place() -> dict[str, str | None]:
    """Where a process number means the same process: container hosts share names, containers share numbers."""
    boot, space = None, None
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "space": space}


def _is_running(owner: Mapping[str, Any]) -> bool:
    pid = owner.get("pid")
    try:
        os.kill(int(pid), 0)  # type: ignore[arg-type]
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:  # another user's
        pass
    return _started(int(pid)) == owner.get("started")  # type: ignore[arg-type]


def _started(pid: int) -> str | None:
    """Ticks after boot at which a process began; None where that is not known, "ended" of one that is not reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]
