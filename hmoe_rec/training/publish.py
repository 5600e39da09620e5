"""A model in training -> publications: now and then all of it, in between the rows that may have changed."""

import hashlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.lib import format as npy
from torch import Tensor, nn

from hmoe_rec import commit, io
from hmoe_rec.embedding.managed import managed_ids
from hmoe_rec.lock import NAME, Lock
from hmoe_rec.sharding.touched_rows import TouchedRows
from hmoe_rec.training.checkpoint_files import Digest, HashingFiles, write_json
from hmoe_rec.training.publication import (
    DENSE,
    LATEST,
    MANIFEST,
    SCHEMA,
    VERSION,
    Publication,
    digest_of,
    directory_of,
    latest,
    read_publication,
)
from hmoe_rec.types import CheckpointError, LockError, TrainingError

_DIRECTORY = re.compile(r"(\d{6,})-(base|delta)")


@dataclass(frozen=True)
class _Part:
    """Values [n] or [n, columns] of an array: at `rows`, or at [first, first + n) where rows is None."""

    array: str
    values: Tensor
    rows: Tensor | None = None
    first: int = 0
    column: int = 0


class Publisher:
    """Publishes a sharded model; every process makes one and calls it at the same steps.

    The first publication is a base, also after a restart and after one that failed: which rows have changed since the
    last one is not known then.

    Args:
        to: directory or URI; publications that are there are continued.
        model: under DistributedModelParallel.
        prefix: of the keys of its state dict that are published; it is taken off.
        base_every: deltas between two bases.
        keep: bases that stay, with their deltas.

    Attributes:
        step: of the newest publication that is there; 0 = none that can be read.

    Raises:
        TrainingError: the directory cannot be read.
        LockError: another run publishes there; also where that has taken this one's place.
    """

    def __init__(self, to: str, model: nn.Module, *, prefix: str = "", base_every: int = 100, keep: int = 2) -> None:
        self.to, self.model, self.prefix = to, model, prefix
        self.base_every, self.keep = base_every, keep
        self._distributed = dist.is_initialized() and dist.get_world_size() > 1
        self._rank = dist.get_rank() if self._distributed else 0
        self._touched = TouchedRows(model)
        self._ids: dict[str, Tensor] = {}
        self._dense: dict[str, bytes] = {}  # SHA-256 of what was published
        self._lock = Lock(io.join(to, NAME), f"train.publish.to {to}", "publish to another directory")
        self._on_first(self._acquire)
        self._number = self._on_first(self._newest)
        self._parent: Publication | None = None
        self.step: int = self._on_first(self._newest_step)

    def close(self) -> None:
        """Others may publish there now."""
        self._lock.release()

    @torch.no_grad()
    def publish(self, step: int) -> Publication:
        """Writes and commits what the model is after `step`. Collective.

        Raises:
            TrainingError: it cannot be written by some process; earlier publications are untouched.
        """
        parent, self._parent = self._parent, None  # if anything fails, the marks of what has changed are lost
        self._number += 1
        if parent is not None and self._number - parent.base > self.base_every:
            parent = None
        kind = "base" if parent is None else "delta"
        target = directory_of(self.to, self._number, kind)
        unfinished = self._on_first(lambda: self._open(target))
        state = self._state()
        parts = [*self._table_parts(state, kind == "base"), *self._id_parts(state, kind == "base")]
        if parent is None:
            self._dense.clear()
        written = self._everywhere(lambda: self._write(unfinished, parts, state))
        content = {
            "schema": SCHEMA,
            "version": VERSION,
            "number": self._number,
            "kind": kind,
            "base": self._number if parent is None else parent.base,
            "parent": None if parent is None else parent.sha256,
            "step": step,
            "arrays": {key: _form(x) for key, x in state.items() if _is_table(key) or _is_id(key)},
            "blocks": [block for blocks, _ in written for block in blocks],
            "files": {name: digest for _, files in written for name, digest in files.items()},
        }
        found: Publication = self._on_first(lambda: self._commit(unfinished, target, content))
        self._parent, self.step = found, step
        return found

    # -- what is published -----------------------------------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {key.removeprefix(self.prefix): x for key, x in state.items() if key.startswith(self.prefix)}

    def _table_parts(self, state: Mapping[str, Tensor], whole: bool) -> Iterator[_Part]:
        keys = {key.split(".")[-2]: key for key in state if _is_table(key)}
        for block, rows in self._touched.take():
            place = {"column": block.first_column, "array": keys[block.table]}
            if rows is None and self._rank:
                continue  # every process holds the whole table
            if rows is None or whole:
                yield _Part(values=block.values, first=block.first_row, **place)
            elif len(rows):
                yield _Part(values=block.values[rows], rows=rows + block.first_row, **place)

    def _id_parts(self, state: Mapping[str, Tensor], whole: bool) -> Iterator[_Part]:
        """The ids that rows belong to: what a lookup needs of managed fields."""
        managed = managed_ids(self.model)
        if managed is None:
            return
        for name, (ids, first) in managed.local_ids().items():
            key = next(key for key in state if _is_id(key) and key.endswith(f".{name}.ids"))
            before = None if whole else self._ids.get(name)
            self._ids[name] = ids.clone()
            if before is None:
                yield _Part(key, ids, first=first)
            elif len(changed := (ids != before).nonzero().squeeze(1)):
                yield _Part(key, ids[changed], rows=changed + first)

    # -- files -----------------------------------------------------------------------------------------------

    def _write(
        self, directory: str, parts: list[_Part], state: Mapping[str, Tensor]
    ) -> tuple[list[dict[str, Any]], dict[str, Digest]]:
        """-> (blocks of the manifest, digests) of this process's files."""
        files = HashingFiles(directory)
        name = f"rank-{self._rank}.npz"
        blocks, entries = [], {}
        for i, part in enumerate(parts):
            blocks.append(
                {
                    "array": part.array,
                    "file": name,
                    "entry": str(i),
                    "first": part.first,
                    "column": part.column,
                    "count": len(part.values),
                }
            )
            entries[f"{i}.values"] = part.values
            if part.rows is not None:
                entries[f"{i}.rows"] = part.rows
        _write_npz(files, name, entries)
        if self._rank == 0:
            _write_npz(files, DENSE, self._changed_dense(state))
        return blocks, files.digests

    def _changed_dense(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is in no table, without that which is as it was published: frozen vectors may be large."""
        changed = {}
        for key, x in state.items():
            if _is_table(key) or ".managed." in key:
                continue
            digest = hashlib.sha256(_numpy(x).data).digest()
            if self._dense.get(key) != digest:
                self._dense[key], changed[key] = digest, x
        return changed

    def _acquire(self) -> None:
        io.mkdirs(self.to)
        self._lock.acquire()

    def _newest(self) -> int:
        """Number of the newest publication that is there; -1 without."""
        if not io.isdir(self.to):
            return -1
        numbers = [int(match[1]) for name in io.ls(self.to) if (match := _DIRECTORY.fullmatch(name))]
        return max(numbers, default=-1)

    def _newest_step(self) -> int:
        try:
            number, base = latest(self.to)
            return read_publication(self.to, number, base).step
        except CheckpointError:  # the base that comes first mends it
            return 0

    def _open(self, target: str) -> str:
        names = io.ls(self.to) if io.isdir(self.to) else []
        for left in commit.leftovers(self.to, names, MANIFEST, _DIRECTORY.fullmatch):
            io.rm(io.join(self.to, left))  # of a process that was killed, or could not write
        return commit.begin(target)

    def _commit(self, unfinished: str, target: str, content: dict[str, Any]) -> Publication:
        self._lock.check()
        write_json(io.join(unfinished, MANIFEST), {**content, "sha256": digest_of(content)})
        commit.commit(unfinished, target)
        write_json(io.join(self.to, LATEST), {"number": content["number"], "base": content["base"]})
        found = read_publication(self.to, content["number"], content["base"])
        if found.kind == "base":
            self._prune(found.number)
        return found

    def _prune(self, newest: int) -> None:
        names = [(int(m[1]), m[2], name) for name in io.ls(self.to) if (m := _DIRECTORY.fullmatch(name))]
        older = [(number, kind, name) for number, kind, name in names if number <= newest]
        whole = {name for _, _, name in older if io.exists(io.join(self.to, name, MANIFEST))}
        bases = sorted(number for number, kind, name in older if kind == "base" and name in whole)
        for number, _, name in older:
            if name not in whole or number < bases[-self.keep :][0]:
                commit.remove(io.join(self.to, name), MANIFEST)

    # -- agreement between processes -------------------------------------------------------------------------

    def _on_first(self, function: Callable[[], Any]) -> Any:
        """The first process's result, or its error, on every process."""
        found = [self._tried(function) if self._rank == 0 else None]
        if self._distributed:
            dist.broadcast_object_list(found, src=0)
        assert found[0] is not None, "the first process has sent its result"
        return self._checked([found[0]])[0]

    def _everywhere(self, function: Callable[[], Any]) -> list[Any]:
        """Every process's result; an error of any of them is raised by all, so that none waits for the others."""
        mine = self._tried(function)
        found: list[Any] = [mine]
        if self._distributed:
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, mine)
        return self._checked(found)

    def _tried(self, function: Callable[[], Any]) -> tuple[Any, str | LockError | None]:
        try:
            return function(), None
        except LockError as error:
            return None, error
        except (CheckpointError, OSError) as error:
            return None, str(error)

    def _checked(self, found: list[tuple[Any, str | LockError | None]]) -> list[Any]:
        problem = next((error for _, error in found if error is not None), None)
        if isinstance(problem, LockError):
            raise problem
        if problem is not None:
            raise TrainingError(f"train.publish.to {self.to}: cannot be published: {problem}")
        return [result for result, _ in found]


def _is_table(key: str) -> bool:
    return ".embedding_bags." in key or ".embeddings." in key


def _is_id(key: str) -> bool:
    return ".managed." in key and key.endswith(".ids")


def _form(tensor: Tensor) -> dict[str, Any]:
    dtype = torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype
    return {"shape": list(tensor.size()), "dtype": str(dtype).removeprefix("torch.")}


def _numpy(tensor: Tensor) -> np.ndarray:
    """NumPy has no bfloat16: its bits."""
    values = tensor.detach().cpu().contiguous()
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


def _write_npz(files: HashingFiles, name: str, entries: Mapping[str, Tensor]) -> None:
    """Not compressed: values of a model hardly are. One entry is copied at a time."""
    with (
        files.create_stream(files.concat_path(files.path, name), "wb") as stream,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for key, values in entries.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
                npy.write_array(entry, _numpy(values), allow_pickle=False)
