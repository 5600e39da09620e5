"""Directories that appear whole, local or remote: begun, written into, committed; or gone.

Locally a directory is written under a name that begins with `.tmp_`, and renamed when all is on disk. A store has no
rename: there the files are written under their last names, and the mark (a manifest), written last and read first, is
the commit. So in both places a directory is there when its mark is, and only then.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from hmoe_rec import io
from hmoe_rec.lock import locked

TEMPORARY = ".tmp_"
BEGUN = ".begun"  # in a remote directory from its beginning, so that nobody else takes its name


def is_committed(target: str, mark: str) -> bool:
    return io.exists(io.join(target, mark))


def is_taken(target: str, mark: str) -> bool:
    """Whether something of this name is there that was not left by a process that was killed."""
    return io.exists(target) if io.is_local(target) else is_committed(target, mark)


def begin(target: str) -> str:
    """-> the directory to write into; what a process that was killed has left there is removed."""
    if not io.is_local(target):
        if io.isdir(target):
            io.rm(target)
        io.write_text(io.join(target, BEGUN), "")
        return target
    folder, name = _split(target)
    unfinished = io.join(folder, f"{TEMPORARY}{name}")
    if io.exists(unfinished):
        io.rm(unfinished)
    io.mkdirs(unfinished)
    return unfinished


def commit(unfinished: str, target: str) -> None:
    """After the mark was written into it: a local directory gets its name, for good."""
    if unfinished == target:
        io.rm(io.join(target, BEGUN))
        return
    io.rename(unfinished, target)
    io.sync_directory(io.local_path(_split(target)[0]))


def leftovers(folder: str, names: Iterable[str], mark: str, is_ours: Callable[[str], object]) -> list[str]:
    """Of names in a directory, those that were begun and never committed.

    Args:
        is_ours: whether a name is one of a directory that is committed by this mark; others are left alone.
    """
    return [
        name
        for name in names
        if name.startswith(TEMPORARY) or (is_ours(name) and not is_committed(io.join(folder, name), mark))
    ]


def remove(directory: str, mark: str) -> None:
    """The mark first: a removal that is cut short must not leave something that looks committed."""
    if is_committed(directory, mark):
        io.rm(io.join(directory, mark))
    if io.isdir(directory):
        io.rm(directory)


@contextmanager
def committed(target: str, mark: str) -> Iterator[str]:
    """A directory to write into, the mark last: it is there as `target` when the block has ended well, and gone when
    it has not.

    Raises:
        FileExistsError: the target exists.
        ConfigError: another process is writing it.
        OSError: it cannot be written.
    """
    folder, name = _split(target)
    io.mkdirs(folder)
    with locked(io.join(folder, f".{name}.lock"), target) as lock:
        if is_taken(target, mark):
            raise FileExistsError(f"{target} exists; nothing is overwritten: give another name or remove it")
        unfinished = begin(target)
        try:
            yield unfinished
            lock.check()
            commit(unfinished, target)
        except BaseException:
            if io.exists(unfinished):
                remove(unfinished, mark)
            raise


def _split(target: str) -> tuple[str, str]:
    folder, _, name = target.rstrip("/").rpartition("/")
    return folder or ".", name
