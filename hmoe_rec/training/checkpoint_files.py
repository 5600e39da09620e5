"""Files of one checkpoint: written with their digests, committed by a manifest, read back without running any code.

step_000001000/
    __0_0.distcp ...  tensors, by torch.distributed.checkpoint
    tensors.json      where each tensor's pieces lie (in older ones .metadata, a pickle that is read as data)
    manifest.json     step, world size, meta, size and SHA-256 of every file: without it nothing is committed
"""

import hashlib
import io as bytes_io
import json
import os
import pickle
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from hmoe_rec import io
from hmoe_rec.object_store import StorageError
from hmoe_rec.training.checkpoint_metadata import (
    LARGEST,
    PICKLED,
    TENSORS,
    Stored,
    from_json,
    from_metadata,
    from_pickle,
    to_json,
    to_metadata,
)
from hmoe_rec.types import CheckpointError

MANIFEST = "manifest.json"
SCHEMA, VERSION = "hmoe_rec.checkpoint", 1
CHUNK = 1 << 22

Digest = dict[str, Any]  # {"size": bytes, "sha256": hex}


class HashingFiles(FileSystemBase):
    """DCP's view of a directory at any URI; remembers size and SHA-256 of every file written through it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.path = io.filesystem(uri)[1]
        self.digests: dict[str, Digest] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[Any, None, None]:
        name = os.path.basename(path)
        if "w" not in mode:
            with io.open(self._uri_of(path), mode) as stream:
                yield stream
            return
        with io.open(self._uri_of(path), mode) as stream:
            hashing = _HashingStream(stream)
            yield hashing
        self.digests[name] = {"size": hashing.size, "sha256": hashing.sha256.hexdigest()}

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """DCP renames the pickle only that it does not write here."""
        raise NotImplementedError(f"{path} -> {new_path}: a store renames nothing")

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return f"{os.fspath(path).rstrip('/')}/{suffix}"

    def init_path(self, path: str | os.PathLike) -> str | os.PathLike:
        return path

    def mkdir(self, path: str | os.PathLike) -> None:
        io.mkdirs(self.uri)

    def exists(self, path: str | os.PathLike) -> bool:
        return io.exists(self._uri_of(path))

    def rm_file(self, path: str | os.PathLike) -> None:
        io.rm(self._uri_of(path))

    def _uri_of(self, path: str | os.PathLike) -> str:
        """Of a file in the directory: all that a checkpoint has lie in one."""
        return io.join(self.uri, os.path.basename(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class _HashingStream(bytes_io.RawIOBase):
    """A writable stream that hashes what passes; it is left open at `close`, for its owner to close."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        with memoryview(data) as view:
            self.sha256.update(view)
            self.size += view.nbytes
            self._stream.write(view)
            return view.nbytes

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self.closed:
            self._stream.flush()

    def fileno(self) -> int:
        self._stream.flush()
        return self._stream.fileno()


def writer_to(uri: str) -> FileSystemWriter:
    """A DCP writer whose `fs` is a HashingFiles; local files are synced to the disk."""
    files = HashingFiles(uri)
    writer = _Writer(files.path, sync_files=io.is_local(uri), overwrite=False)
    writer.fs, writer.path = files, files.path  # type: ignore[assignment]
    return writer


class _Writer(FileSystemWriter):
    """Writes tensors.json where torch writes a pickle."""

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        metadata.storage_data = {written.index: written.storage_data for rank in results for written in rank}
        write_tensors(self.fs, from_metadata(metadata), sync=self.sync_files)


def write_tensors(files: Any, tensors: Mapping[str, Stored], *, sync: bool) -> None:
    """Where each tensor's pieces lie, into the directory of a HashingFiles; `sync` where it is a local one."""
    with files.create_stream(files.concat_path(files.path, TENSORS), "wb") as stream:
        stream.write(to_json(tensors))
        if sync:
            os.fsync(stream.fileno())


@contextmanager
def tensors_only() -> Generator[None, None, None]:
    """torch.load(weights_only=True) calls what any package that is loaded has put on its list; here only torch's."""
    listed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    except pickle.UnpicklingError as error:  # with advice from torch that is not for checkpoints of somebody else's
        raise ValueError("what is stored is no tensor, and reading it could run code; do not use it") from error
    finally:
        torch.serialization.add_safe_globals(listed)


class SafeReader(FileSystemReader):
    """Reads a checkpoint of tensors from any URI; nothing that a file of it names is imported or called."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        files = HashingFiles(uri)
        self.uri = uri
        self.fs, self.path = files, files.path  # type: ignore[assignment]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises CheckpointError: anything but tensors is stored, or a file outside the checkpoint is named."""
        metadata = to_metadata(self._stored())
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with tensors_only():
            return super().read_data(plan, planner)

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Key -> size, dtype and pieces of every tensor; raises as read_metadata does."""
        content = self.read_metadata().state_dict_metadata
        return {key: m for key, m in content.items() if isinstance(m, TensorStorageMetadata)}

    def _stored(self) -> dict[str, Stored]:
        name = TENSORS if self.fs.exists(self.fs.concat_path(self.path, TENSORS)) else PICKLED
        try:
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as stream:
                content = stream.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise ValueError(f"more than {LARGEST} bytes")
            return from_json(content) if name == TENSORS else from_pickle(content)
        except CheckpointError as error:
            raise CheckpointError(f"{self.uri}/{name}: {error}") from error
        except Exception as error:  # garbage makes a reader of pickles raise nearly anything
            raise CheckpointError(f"{self.uri}/{name}: unreadable: {type(error).__name__}: {error}") from error


def write_manifest(uri: str, content: Mapping[str, Any]) -> None:
    """The commit mark of a remote checkpoint; inside a local one, written just before the commit by rename."""
    body = {"schema": SCHEMA, "version": VERSION, **content}
    write_json(io.join(uri, MANIFEST), {**body, "sha256": _digest_of(body)})


def read_manifest(uri: str) -> dict[str, Any]:
    """Raises CheckpointError: there is none (the checkpoint was never committed), or it is damaged."""
    path = io.join(uri, MANIFEST)
    try:
        with io.open(path, "r") as file:
            content = json.load(file)
        given = content.pop("sha256")
        schema = (content.get("schema"), content.get("version"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{uri}: no {MANIFEST}: not a finished checkpoint") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}; use another checkpoint") from error
    if schema != (SCHEMA, VERSION):
        raise CheckpointError(f"{path}: schema, version {schema}; expected {(SCHEMA, VERSION)}")
    if given != _digest_of(content):
        raise CheckpointError(
            f"{path}: damaged: its content does not have the SHA-256 that it states; use another checkpoint"
        )
    if not _is_right(content):
        raise CheckpointError(
            f"{path}: not what a save writes (step, world_size, meta, and files of this directory); do not use it"
        )
    return content


def _is_right(content: Mapping[str, Any]) -> bool:
    files = content.get("files")
    return (
        all(type(content.get(key)) is int for key in ("step", "world_size"))
        and isinstance(content.get("meta"), dict)
        and isinstance(files, dict)
        and all(
            io.is_file_name(name) and isinstance(d, dict) and {"size", "sha256"} <= d.keys()
            for name, d in files.items()
        )
    )


def verify(uri: str, files: Mapping[str, Digest], rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with this rank's share of the files, as a sentence; None if nothing is."""
    for name in sorted(files)[rank::world_size]:
        path = io.join(uri, name)
        try:
            with io.open(path, "rb") as file:
                sha256, size = hashlib.sha256(), 0
                while chunk := file.read(CHUNK):
                    sha256.update(chunk)
                    size += len(chunk)
        except StorageError as error:
            return str(error)
        except OSError as error:
            return f"{path}: {error.strerror or error}; the checkpoint is incomplete, use another one"
        if size != files[name]["size"]:
            return f"{path}: {size} bytes, expected {files[name]['size']}; the file is damaged, use another checkpoint"
        if sha256.hexdigest() != files[name]["sha256"]:
            return f"{path}: SHA-256 differs from the manifest's; the file is damaged, use another checkpoint"
    return None


def write_json(uri: str, content: Any) -> None:
    """Replaces a file as a whole; a local one outlasts a power cut."""
    with io.replacing(uri, sync=True) as file:
        json.dump(content, file, indent=1, sort_keys=True)


def _digest_of(content: Mapping[str, Any]) -> str:
    # Through JSON once, so that tuples or integer keys hash like what will be read back.
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
