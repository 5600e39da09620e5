"""`train.run_dir` -> a directory that belongs to this run for as long as it lasts."""

from collections.abc import Iterator
from contextlib import contextmanager

from hmoe_rec import io
from hmoe_rec.lock import NAME, Lock
from hmoe_rec.sharding.process import Process
from hmoe_rec.types import ConfigError, DataError, TrainingError


@contextmanager
def owned_run_dir(run_dir: str, process: Process, *, resumes: bool) -> Iterator[Lock]:
    """Takes the lock of a run's directory, which is made; a collective call. Its lock is held by the first process.

    A new run never writes into an old one: what is there is moved aside, not removed.

    Raises:
        LockError: another run writes there.
        ConfigError: it holds a run that cannot be moved aside.
        TrainingError: it cannot be written.
    """
    lock = Lock(io.join(run_dir, NAME), f"train.run_dir {run_dir}", "give another train.run_dir")
    process.first(lambda: _take(run_dir, lock, resumes))
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def owned(uri: str, what: str, process: Process) -> Iterator[None]:
    """Holds the lock at `uri`, whose directory is made, for as long as the block lasts; a collective call.

    Args:
        what: see `Lock`.

    Raises:
        LockError: another process has it.
        DataError: it cannot be written.
    """
    lock = Lock(uri, what)

    def acquire() -> None:
        try:
            io.mkdirs(uri.rpartition("/")[0])
            lock.acquire()
        except OSError as error:
            raise DataError(f"{what} cannot be written ({error.strerror or error})") from None

    process.first(acquire)
    try:
        yield
    finally:
        lock.release()


def _take(run_dir: str, lock: Lock, resumes: bool) -> None:
    with writing_run_dir(run_dir):
        io.mkdirs(run_dir)
        lock.acquire()
        if resumes or not io.exists(io.join(run_dir, "config.yaml")):
            return
        try:
            _move_aside(run_dir, lock)
        except BaseException:
            lock.release()
            raise


def _move_aside(run_dir: str, lock: Lock) -> None:
    if not io.is_local(run_dir):
        raise ConfigError(
            f"train.run_dir {run_dir} holds a run, and a store cannot move it aside: go on with --resume, give another "
            "train.run_dir, or remove it first"
        )
    before = f"{run_dir.rstrip('/')}.previous"
    aside = next(name for n in range(1, 10**6) if not io.exists(name := f"{before}-{n}"))
    io.rename(run_dir, aside)
    io.mkdirs(run_dir)
    lock.acquire()
    io.rm(io.join(aside, NAME))


@contextmanager
def writing_run_dir(run_dir: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"train.run_dir {run_dir!r} cannot be written ({error.strerror or error}); choose another directory"
        ) from None
