"""State of a run (nested dict of tensors) <-> a directory at a URI, atomically, for any number of processes.

    checkpoints/
        step_000001000/     committed: see checkpoint_files.py
        step_000002000/
        best.json           {"directory": "step_000001000"}: a tag
        .tmp_step_.../      being written, or left by a process that was killed: never read, removed by the next save

commit.py says how a directory appears whole, on a disk and in a store. So whatever moment a process dies at, the newest
committed checkpoint is whole. A step that is saved again gets a directory of its own (`step_000002000.1`), which
replaces the older one once it is committed.
"""

import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from hmoe_rec import commit, io
from hmoe_rec.suggest import nearest
from hmoe_rec.training import row_statistics
from hmoe_rec.training.checkpoint_files import (
    MANIFEST,
    SafeReader,
    read_manifest,
    verify,
    write_json,
    write_manifest,
    writer_to,
)
from hmoe_rec.training.checkpoint_state import PER_RANK, difference, flatten, size_of
from hmoe_rec.types import CheckpointError, LockError
from hmoe_rec.units import format_bytes

log = logging.getLogger(__name__)

_DIRECTORY = re.compile(r"step_(\d+)(?:\.(\d+))?")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        uri: its directory.
        step: as given to `save`.
        world_size: processes that wrote it.
        meta: JSON-able record that was saved beside the tensors.
        files: name -> {"size", "sha256"}.
    """

    uri: str
    step: int
    world_size: int
    meta: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)


class CheckpointManager:
    """The checkpoints of one run. All processes of the group call every method, or a single process without a group.

    Args:
        uri: directory, made at the first save; on several machines it must be one that all of them see.
        keep: newest checkpoints that are kept; tagged ones are kept besides.
        process_group: a group whose backend handles CPU tensors; None = all processes.
        before_commit: called by the first process when all is written; what it raises stops the commit.

    Raises:
        CheckpointError: everything that goes wrong with a checkpoint, on every process alike.
        LockError: of `before_commit`, likewise.
    """

    def __init__(
        self,
        uri: str,
        keep: int = 3,
        process_group: dist.ProcessGroup | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"keep must be at least 1, got {keep}")
        self.uri, self.keep, self._before_commit = str(uri), keep, before_commit
        self._distributed = dist.is_initialized()
        if self._distributed and process_group is None and "gloo" not in str(dist.get_backend_config()):
            process_group = dist.new_group(backend="gloo")  # type: ignore[assignment]
        self._group = process_group
        self._rank = dist.get_rank(process_group) if self._distributed else 0
        self._world_size = dist.get_world_size(process_group) if self._distributed else 1

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        per_rank: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
        tags: Iterable[str] = (),
    ) -> Checkpoint:
        """Writes and commits `state`; then moves the tags to it and removes what is no longer kept.

        Args:
            step: at least that of the newest checkpoint.
            state: nested dict of tensors (ShardedTensor and DTensor included). Equal keys on several processes are one
                tensor, saved once.
            per_rank: nested dict of tensors that belong to this process alone (its random state).
            meta: JSON-able; all that is not a tensor.
            tags: names such as "best"; a tag belongs to one checkpoint, which is kept as long as it has one.

        Raises:
            CheckpointError: the state holds something else than tensors, the step is older than the newest checkpoint,
                or writing failed (the earlier checkpoints are then untouched).
        """
        began = time.perf_counter()
        flat = self._everywhere(lambda: self._state_to_save(state, per_rank, meta, tags))
        name, unfinished = self._on_first(lambda: self._open_directory(step))
        writer = self._everywhere(lambda: writer_to(unfinished))
        self._dcp(
            "saving",
            unfinished,
            lambda: dcp.save(flat, storage_writer=writer, process_group=self._group, no_dist=not self._distributed),
        )
        digests = self._gather(writer.fs.digests)  # type: ignore[attr-defined]
        content = {"step": step, "world_size": self._world_size, "meta": dict(meta or {})}
        checkpoint = self._on_first(lambda: self._commit(name, unfinished, content, digests, tuple(tags)))
        if self._rank == 0:
            size = format_bytes(sum(f["size"] for f in checkpoint.files.values()))
            log.info("saved %s (%s) in %.2f s", checkpoint.uri, size, time.perf_counter() - began)
        return checkpoint

    def latest(self) -> Checkpoint | None:
        """The newest committed checkpoint; what was never committed is passed over with a warning."""
        return self._on_first(lambda: next(iter(self._committed()), None))

    def best(self) -> Checkpoint | None:
        return self.tagged("best")

    def tagged(self, tag: str) -> Checkpoint | None:
        """The checkpoint that was last saved with this tag; None if none was."""

        def find() -> Checkpoint | None:
            directory = self._tags().get(tag)
            return None if directory is None else read_checkpoint(io.join(self.uri, directory))

        return self._on_first(find)

    def at_step(self, step: int) -> Checkpoint | None:
        return self._on_first(lambda: next((c for c in self._committed() if c.step == step), None))

    def find(self, wanted: str) -> Checkpoint | None:
        """wanted: "best" (the latest where none was judged), "latest", another tag, or a step's number."""
        if wanted == "latest":
            return self.latest()
        if wanted.isdigit():
            return self.at_step(int(wanted))
        return self.tagged(wanted) or (self.latest() if wanted == "best" else None)

    def load_into(
        self, state: Mapping[str, Any], checkpoint: Checkpoint, *, per_rank: Mapping[str, Any] | None = None
    ) -> bool:
        """Fills the tensors of `state` in place, however they are sharded now.

        Files are verified and all keys, sizes and dtypes compared before anything is modified. Top-level parts of the
        checkpoint that `state` does not name are left out: `{"model": ...}` loads a model without its optimizer.

        One conversion is made: row-wise Adagrad keeps one statistic per row and column block. Where the column blocks
        have changed, statistics are averaged by width, or repeated (row_statistics.py).

        Returns:
            Whether `per_rank` was filled too: only by as many processes as saved it.

        Raises:
            CheckpointError: a damaged file, a checkpoint of another model (which keys, and their likely counterparts).
        """
        self._raise_first(verify(checkpoint.uri, checkpoint.files, self._rank, self._world_size))
        flat = self._everywhere(lambda: flatten(state))
        own = self._everywhere(lambda: self._own(per_rank or {}))
        stored = self._everywhere(lambda: SafeReader(checkpoint.uri).tensors())
        saved = {key: (tuple(m.size), m.properties.dtype) for key, m in stored.items()}
        if checkpoint.world_size != self._world_size or not any(key.startswith(f"{PER_RANK}.") for key in saved):
            own = {}
        flat |= own
        wanted: dict[str, tuple] = {}
        blocks: dict[str, row_statistics.Blocks] = {}
        forms = {key: (size_of(t), t.dtype) for key, t in flat.items()}
        for theirs, their_blocks in self._gather((forms, row_statistics.blocks_of(flat))):
            wanted |= theirs
            blocks |= their_blocks
        converted = row_statistics.changed(stored, {key: size for key, (size, _) in wanted.items()}, blocks)
        self._raise_first(difference(checkpoint.uri, saved, wanted, set(converted)))
        direct = {key: tensor for key, tensor in flat.items() if key not in converted}
        self._dcp(
            "loading",
            checkpoint.uri,
            lambda: dcp.load(
                direct,
                storage_reader=SafeReader(checkpoint.uri),
                process_group=self._group,
                no_dist=not self._distributed,
            ),
        )
        for key in sorted(converted.keys() & flat.keys()):
            row_statistics.fill(flat[key], _read(checkpoint.uri, {key: stored[key]})[key], converted[key])
        return bool(own)

    # -- what the first process does -------------------------------------------------------------------------

    def _open_directory(self, step: int) -> tuple[str, str]:
        """Removes leftovers; -> a name for this step that is not taken, and the directory to write into."""
        io.mkdirs(self.uri)
        newest = next(iter(self._committed()), None)
        if newest is not None and step < newest.step:
            raise CheckpointError(
                f"{self.uri}: cannot save step {step}, since step {newest.step} is there and a restart would take that "
                "one; resume from it, or use another directory"
            )
        names = io.ls(self.uri)
        for name in commit.leftovers(self.uri, names, MANIFEST, _DIRECTORY.fullmatch):
            log.warning("removing %s: it was never committed", io.join(self.uri, name))
            io.rm(io.join(self.uri, name))
        # A leftover's name is not used again: who began it may live, and still write there.
        taken = [int(m[2] or 0) for m in map(_DIRECTORY.fullmatch, names) if m and int(m[1]) == step]
        name = f"step_{step:09d}" + (f".{max(taken) + 1}" if taken else "")
        return name, commit.begin(io.join(self.uri, name))

    def _commit(
        self, name: str, unfinished: str, content: dict[str, Any], digests: list[dict], tags: tuple[str, ...]
    ) -> Checkpoint:
        files = {file: digest for rank in digests for file, digest in rank.items()}
        there = set(io.ls(unfinished))
        unseen = [file for file in files if file not in there]
        if unseen:
            raise CheckpointError(
                f"{unfinished}: {unseen[0]} was written by another machine but is not visible here; use a shared "
                "directory or a remote URI for checkpoints"
            )
        if self._before_commit is not None:
            self._before_commit()
        write_manifest(unfinished, {**content, "files": files})
        target = io.join(self.uri, name)
        commit.commit(unfinished, target)
        for tag in tags:
            write_json(io.join(self.uri, f"{tag}.json"), {"directory": name})
        self._prune()
        return Checkpoint(
            target, content["step"], content["world_size"], json.loads(json.dumps(content["meta"])), files
        )

    def _prune(self) -> None:
        committed = self._committed()
        tagged = {io.join(self.uri, directory) for directory in self._tags().values()}
        kept: list[int] = []
        for checkpoint in committed:
            if checkpoint.step not in kept and len(kept) < self.keep:
                kept.append(checkpoint.step)
            elif checkpoint.uri not in tagged:
                try:
                    commit.remove(checkpoint.uri, MANIFEST)
                except OSError as error:  # what was saved is saved
                    log.warning("%s is no longer needed and stays: %s", checkpoint.uri, error)

    def _committed(self) -> list[Checkpoint]:
        """Newest first."""
        if not io.isdir(self.uri):
            return []
        names = io.ls(self.uri)
        found = [(int(m[1]), int(m[2] or 0), name) for name in names if (m := _DIRECTORY.fullmatch(name))]
        result = []
        for _, _, name in sorted(found, reverse=True):
            try:
                result.append(read_checkpoint(io.join(self.uri, name)))
            except CheckpointError as error:
                log.warning("passing over a checkpoint: %s", error)
        return result

    def _tags(self) -> dict[str, str]:
        """Tag -> directory name."""
        result = {}
        for name in io.ls(self.uri) if io.isdir(self.uri) else []:
            if name.endswith(".json"):
                try:
                    with io.open(io.join(self.uri, name), "r") as file:
                        directory = json.load(file)["directory"]
                    if not io.is_file_name(directory):
                        raise ValueError(f"{directory!r} is no directory of this one")
                    result[name.removesuffix(".json")] = directory
                except (ValueError, KeyError, TypeError) as error:
                    raise CheckpointError(f"{io.join(self.uri, name)}: not a tag: {error}; remove it") from error
        return result

    # -- agreement between processes -------------------------------------------------------------------------

    def _on_first(self, function: Callable[[], Any]) -> Any:
        """The first process's result, or its error, on every process."""
        result: list[Any] = [None, None]
        if self._rank == 0:
            try:
                result[0] = function()
            except (CheckpointError, LockError) as error:
                result[1] = error
            except OSError as error:
                result[1] = CheckpointError(f"{self.uri}: {error}")
        if self._distributed:
            dist.broadcast_object_list(result, group=self._group, group_src=0)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def _everywhere(self, function: Callable[[], Any]) -> Any:
        """Each process's own result; an error of any of them is raised by all, so that none waits for the others."""
        result, problem = None, None
        try:
            result = function()
        except (CheckpointError, OSError) as error:
            problem = str(error)
        self._raise_first(problem)
        return result

    def _raise_first(self, problem: str | None) -> None:
        found = next((p for p in self._gather(problem) if p is not None), None)
        if found is not None:
            raise CheckpointError(found)

    def _gather(self, value: Any) -> list[Any]:
        if not self._distributed:
            return [value]
        values: list[Any] = [None] * self._world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _dcp(self, doing: str, uri: str, function: Callable[[], Any]) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                function()
            except (dcp.api.CheckpointException, OSError, RuntimeError, ValueError, AssertionError) as error:
                # CheckpointException is a BaseException: `except Exception` would let it through.
                cause = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
                raise CheckpointError(f"{doing} {uri} failed: {type(cause).__name__}: {cause}") from error

    # -- state -----------------------------------------------------------------------------------------------

    def _state_to_save(
        self, state: Mapping, per_rank: Mapping | None, meta: Mapping | None, tags: Iterable[str]
    ) -> dict:
        if PER_RANK in state:
            raise CheckpointError(f"state must not have a part named {PER_RANK!r}: give it as per_rank=")
        for tag in tags:
            if not re.fullmatch(r"[\w-]+", tag):
                raise CheckpointError(f"tag {tag!r}: expected letters, digits, '_' and '-' only, such as 'best'")
        try:
            json.dumps(dict(meta or {}), allow_nan=True)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"meta is not JSON: {error}; use numbers, strings, lists and dicts") from error
        return flatten(state) | self._own(per_rank or {})

    def _own(self, per_rank: Mapping[str, Any]) -> dict[str, Tensor]:
        return flatten({PER_RANK: {str(self._rank): per_rank}})


def read_checkpoint(uri: str) -> Checkpoint:
    """The committed checkpoint in directory `uri`; raises CheckpointError if it is none."""
    content = read_manifest(uri)
    return Checkpoint(uri, content["step"], content["world_size"], content["meta"], content["files"])


def read_unsharded(checkpoint: Checkpoint, keys: Iterable[str] | None = None, *, prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors in this process's memory, without a process group: for serving and analysis.

    Args:
        keys: full names such as "model.mlp.0.weight"; None = all that begin with `prefix`.
        prefix: is taken off the names of the result.

    Raises:
        CheckpointError: a damaged file, or a key that is not there.
    """
    problem = verify(checkpoint.uri, checkpoint.files)
    if problem:
        raise CheckpointError(problem)
    saved = SafeReader(checkpoint.uri).tensors()
    chosen = [key for key in saved if key.startswith(prefix)] if keys is None else list(keys)
    for key in chosen:
        if key not in saved:
            raise CheckpointError(f"{checkpoint.uri}: no tensor {key!r}; nearest: {nearest(key, saved)}")
    return {
        key.removeprefix(prefix): tensor for key, tensor in _read(checkpoint.uri, {k: saved[k] for k in chosen}).items()
    }


def _read(uri: str, wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in wanted.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(dict(tensors), storage_reader=SafeReader(uri), no_dist=True)
        except dcp.api.CheckpointException as error:
            raise CheckpointError(f"loading {uri} failed: {error}") from error
    return tensors
