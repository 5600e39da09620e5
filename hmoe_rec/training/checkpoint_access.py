"""What the tools for checkpoints share: finding one, verifying it with progress, and a directory that appears whole."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hmoe_rec import commit, io
from hmoe_rec.lock import NAME, locked
from hmoe_rec.object_store import StorageError
from hmoe_rec.progress import Progress
from hmoe_rec.training.checkpoint import Checkpoint, CheckpointManager, read_checkpoint
from hmoe_rec.training.checkpoint_files import MANIFEST, verify
from hmoe_rec.training.checkpoint_rows import StoredTensors
from hmoe_rec.types import CheckpointError


def open_checkpoint(uri: str, checkpoint: str = "latest") -> Checkpoint:
    """
    Args:
        uri: a checkpoint's own directory, a directory of checkpoints, or a run directory.
        checkpoint: which of several, see `CheckpointManager.find`.

    Raises:
        CheckpointError: there is none, or `uri` is that of another step.
    """
    if io.exists(io.join(uri, MANIFEST)):
        found = read_checkpoint(uri)
        if checkpoint.isdigit() and int(checkpoint) != found.step:
            raise CheckpointError(
                f"{uri} is the checkpoint of step {found.step}, and step {checkpoint} was asked for; leave the step "
                "out, or give the directory that holds all checkpoints"
            )
        return found
    inner = io.join(uri, "checkpoints")
    is_run = io.exists(io.join(uri, "config.yaml"))  # where other files are no tags of checkpoints
    manager = CheckpointManager(inner if is_run or io.isdir(inner) else uri)
    found = manager.find(checkpoint)
    if found is None:
        raise CheckpointError(
            f"{manager.uri}: no checkpoint {checkpoint!r}; expected a run directory, a directory of checkpoints or a "
            "checkpoint's own directory, and latest, best or the number of a saved step"
        )
    return found


def tags_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    folder, _, name = checkpoint.uri.rstrip("/").rpartition("/")
    result = []
    for file in io.ls(folder or "."):
        if file.endswith(".json"):
            try:
                with io.open(io.join(folder or ".", file), "r") as stream:
                    content = json.load(stream)
            except StorageError:
                raise
            except (OSError, ValueError):
                continue  # not a tag
            if isinstance(content, dict) and content.get("directory") == name:
                result.append(file.removesuffix(".json"))
    return tuple(result)


def verify_files_of(
    checkpoint: Checkpoint, names: Sequence[str], progress: Progress | None, more: int = 0
) -> Iterator[tuple[str | None, int]]:
    """For every file (what is wrong with it or None, bytes so far); `more` = bytes that come after the verification."""
    total, done = sum(checkpoint.files[name]["size"] for name in names) + more, 0
    for name in names:
        problem = verify(checkpoint.uri, {name: checkpoint.files[name]})
        done += checkpoint.files[name]["size"]
        if progress is not None:
            progress(done, total)
        yield problem, done


def verified_first(stored: StoredTensors, keys: Sequence[str], progress: Progress | None) -> Callable[[int], None]:
    """Verifies the files that hold these tensors; -> what to call with the bytes that are written after that.

    Raises:
        CheckpointError: a file is damaged, missing, or not in the manifest.
    """
    found = stored.checkpoint
    names = sorted(stored.files_of(keys) | {stored.description})
    unknown = [name for name in names if name not in found.files]
    if unknown:
        raise CheckpointError(f"{found.uri}: {unknown[0]} is not in the manifest; the checkpoint is damaged")
    more, done = sum(stored.bytes_of(key) for key in keys), 0
    for problem, done in verify_files_of(found, names, progress, more):  # noqa: B007 (the last value is used below)
        if problem is not None:
            raise CheckpointError(problem)
    total = done + more

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total)

    return report


def check_is_free(target: str, mark: str) -> None:
    """Before the work that comes first."""
    if commit.is_taken(target, mark):
        raise CheckpointError(f"{target} exists; nothing is overwritten: give another name or remove it")


@contextmanager
def owning_run_of(checkpoints: str) -> Iterator[None]:
    """For a directory of checkpoints of a run: no run goes on in it meanwhile, and removes what it has not begun.

    Raises:
        LockError: a run writes there.
    """
    run = checkpoints.rstrip("/").rpartition("/")[0] or "."
    if not io.exists(io.join(run, "config.yaml")):
        yield
        return
    with locked(io.join(run, NAME), f"run {run}", "give another directory"):
        yield


@contextmanager
def committed(target: str, mark: str) -> Iterator[str]:
    """A directory to write into: it is there as `target` when the block has ended well, and gone when it has not.

    Args:
        mark: the file that is written last.

    Raises:
        CheckpointError: the target exists, or cannot be written.
        LockError: another process is writing it.
    """
    try:
        with commit.committed(target, mark) as unfinished:
            yield unfinished
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise CheckpointError(str(error)) from None
        raise CheckpointError(f"{target} cannot be written ({error.strerror or error})") from error
