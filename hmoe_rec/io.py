"""URIs -> files: the only door to storage.

A path without a scheme (or with `file://`) is a local file. `scheme://...` goes through iopath's PathManager to the
fsspec file system of that scheme, if the scheme is in `SCHEMES` or was registered; any other scheme is an error, since
PathManager itself would take `s4://bucket/x` for a local path. Nothing heavy is imported until a remote URI is met.

What holds everywhere: a file is there whole or not at all (`open` for writing, `replacing`, `write_text`), and what a
store answers becomes an error in words (object_store.py). What does not: a store of objects has no directory without a
file in it, and no rename. Directories that appear whole are made by commit.py; nothing here renames a remote one.
"""

import builtins
import glob as _glob
import io as bytes_io
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, Any

from hmoe_rec.object_store import RemoteFile, StorageError, TextToPut, explained, tried
from hmoe_rec.suggest import nearest
from hmoe_rec.types import HmoeError

# scheme -> what must be installed beside fsspec, as pip takes it
SCHEMES: dict[str, str | None] = {
    "memory": None,
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": '"hmoe-rec[s3]"',
    "s3a": '"hmoe-rec[s3]"',
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hdfs": None,
    "webhdfs": "requests",
    "hf": "huggingface_hub",
    "oci": "ocifs",
    "oss": "ossfs",
}


def register_scheme(scheme: str) -> None:
    """Lets URIs of one more fsspec protocol in. Call it before the first remote URI of that scheme is used."""
    SCHEMES.setdefault(scheme, None)
    _manager.cache_clear()


def scheme_of(uri: str | os.PathLike) -> str | None:
    """The scheme of a remote URI; None for a local path.

    Raises:
        HmoeError: the scheme is not known.
    """
    match = re.match(r"([A-Za-z][\w+.:-]*)://", str(uri))
    scheme = match.group(1).lower() if match else None
    if scheme in (None, "file", "local"):
        return None
    if scheme not in SCHEMES:
        guess = nearest(scheme, SCHEMES)
        remedy = f"did you mean {guess}://?" if guess else f"known: {', '.join(SCHEMES)}"
        raise HmoeError(f"{uri}: unknown scheme {scheme!r}; {remedy}")
    return scheme


def is_local(uri: str | os.PathLike) -> bool:
    return scheme_of(uri) is None


def local_path(uri: str | os.PathLike) -> str:
    """The plain path of a local URI: `file://` removed, `~` expanded.

    Raises:
        HmoeError: the URI is remote.
    """
    if not is_local(uri):
        raise HmoeError(f"{uri}: expected a path on this machine, got a remote URI; copy it here first")
    return os.path.expanduser(re.sub(r"^(file|local)://", "", str(uri)))


def filesystem(uri: str | os.PathLike) -> tuple[Any, str]:
    """The fsspec file system of a URI and the path in it; pyarrow and torch's checkpoints take the pair.

    Raises:
        HmoeError: the scheme is not known, or its package is not installed.
    """
    import fsspec

    scheme = scheme_of(uri)
    if scheme is None:
        return fsspec.filesystem("file"), os.path.abspath(local_path(uri))
    try:
        # Listings are not remembered: other processes write there too.
        return fsspec.core.url_to_fs(str(uri), use_listings_cache=False)
    except ImportError as missing:
        package = SCHEMES[scheme]
        remedy = f"pip install {package}" if package else str(missing)
        raise HmoeError(f"{uri}: the file system of {scheme}:// is not installed; {remedy}") from missing


def join(uri: str | os.PathLike, *parts: str) -> str:
    """Path components after a URI: join("s3://a/b/", "c") == "s3://a/b/c"."""
    if is_local(uri):
        return os.path.join(str(uri), *parts)
    return "/".join([str(uri).rstrip("/"), *(part.strip("/") for part in parts)])


def is_file_name(name: object) -> bool:
    """Whether it names something in a directory, and is no path that leads out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(c in name for c in "/\\\0")


def open(uri: str | os.PathLike, mode: str = "r") -> IO[Any]:
    """Opens a file; text is UTF-8. Use it as a context manager.

    A remote file that is written is there when the block has ended well; one that was there before stays until then.
    """
    if is_local(uri):
        return _open_local(local_path(uri), mode, encoding=None if "b" in mode else "utf-8")
    return _manager().open(str(uri), mode)


@contextmanager
def replacing(uri: str | os.PathLike, mode: str = "w", *, sync: bool = False) -> Iterator[IO[Any]]:
    """A file to write in, which takes the place of `uri` when it is whole.

    Locally by rename, so that the old one stays where the disk is full; in a store when it is closed.

    Args:
        mode: "w" or "wb".
        sync: a local file outlasts a power cut.
    """
    if not is_local(uri):
        with open(uri, mode) as file:
            yield file
        return
    folder, name = os.path.split(local_path(uri))
    # Readers pass over names that begin with a dot; no other writer has this one.
    target = os.path.join(folder, f".{name}.unfinished-{_mine()}")
    try:
        with open(target, mode) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        rename(target, uri)
        if sync:
            sync_directory(folder)
    finally:
        if os.path.exists(target):
            os.remove(target)


def _mine() -> str:
    """Names what no other writer writes at this moment."""
    return f"{os.getpid()}-{threading.get_ident()}"


def sync_directory(path: str) -> None:
    """Makes renames inside a local directory outlast a power cut."""
    descriptor = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(uri: str | os.PathLike, text: str) -> None:
    """Replaces a file as a whole. Its directory is made where it is missing."""
    write_bytes(uri, text.encode())


def write_bytes(uri: str | os.PathLike, data: bytes) -> None:
    """Replaces a file as a whole. Its directory is made where it is missing."""
    if not is_local(uri):
        _put(str(uri), data)
        return
    os.makedirs(os.path.dirname(local_path(uri)) or ".", exist_ok=True)
    with replacing(uri, "wb") as file:
        file.write(data)


def create_text(uri: str | os.PathLike, text: str) -> bool:
    """Writes a file that is not there yet; False where it is. Of several processes that try, one gets True.

    A store that cannot tell (it does not know If-None-Match) is asked before: there two may get True.
    """
    if not is_local(uri):
        return _put(str(uri), text.encode(), create=True)
    target = f"{local_path(uri)}.{_mine()}"
    with open(target, "w") as file:
        file.write(text)
    try:
        os.link(target, local_path(uri))  # unlike opening with "x", it has its content from the beginning
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if os.path.exists(local_path(uri)):
            return False
        os.replace(target, local_path(uri))
        return True
    finally:
        if os.path.exists(target):
            os.remove(target)


def _put(uri: str, data: bytes, create: bool = False) -> bool:
    files, path = filesystem(uri)
    if not create:
        tried(uri, lambda: files.pipe_file(path, data))
        return True
    try:
        with explained(uri):
            files.pipe_file(path, data, mode="create")
        return True
    except FileExistsError:
        return False
    except (OSError, TypeError):  # refused: it may not know the condition
        if exists(uri):
            return False
        return _put(uri, data)


def exists(uri: str | os.PathLike) -> bool:
    return os.path.exists(local_path(uri)) if is_local(uri) else _manager().exists(str(uri))


def isfile(uri: str | os.PathLike) -> bool:
    return os.path.isfile(local_path(uri)) if is_local(uri) else _manager().isfile(str(uri))


def isdir(uri: str | os.PathLike) -> bool:
    return os.path.isdir(local_path(uri)) if is_local(uri) else _manager().isdir(str(uri))


def ls(uri: str | os.PathLike) -> list[str]:
    """Names in a directory, sorted; none where a store that has no directories has no such name.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    return sorted(os.listdir(local_path(uri)) if is_local(uri) else _manager().ls(str(uri)))


def glob(pattern: str) -> list[str]:
    """URIs that match a pattern with `*`, `?`, `[...]`, `**`; sorted, each as full as the pattern was."""
    if is_local(pattern):
        return sorted(_glob.glob(local_path(pattern), recursive=True))
    files, path = filesystem(pattern)
    return sorted(files.unstrip_protocol(found) for found in tried(pattern, lambda: files.glob(path)))


def find(uri: str | os.PathLike) -> list[str]:
    """URIs of all files below a directory, sorted; links are followed, each directory is visited once."""
    if is_local(uri):
        return sorted(_files_below(local_path(uri)))
    files, path = filesystem(uri)
    return sorted(files.unstrip_protocol(found) for found in tried(str(uri), lambda: files.find(path)))


def _files_below(path: str) -> Iterator[str]:
    seen = {os.path.realpath(path)}
    for folder, folders, names in os.walk(path, followlinks=True):
        inside = {os.path.realpath(os.path.join(folder, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = [name for target, name in inside.items() if target not in seen]
        seen.update(inside)
        yield from (os.path.join(folder, name) for name in names)


def mkdirs(uri: str | os.PathLike) -> None:
    """Makes a directory and its parents, if they are not there yet. A store needs none: there its bucket is looked for.

    Raises:
        StorageError: there is no such bucket, or it may not be read. None is made.
    """
    if is_local(uri):
        os.makedirs(local_path(uri), exist_ok=True)
    else:
        _manager().mkdirs(str(uri))


def rename(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Moves a local file or directory in one atomic step, which replaces a file.

    Raises:
        HmoeError: one of them is remote: stores copy and delete, one object after another.
    """
    for uri in (source, target):
        if not is_local(uri):
            raise HmoeError(f"cannot rename {source} to {target}: {uri} is remote, where nothing can be renamed")
    os.replace(local_path(source), local_path(target))


def upload(path: str, uri: str | os.PathLike) -> None:
    """A local file -> a remote one."""
    files, inner = filesystem(uri)
    tried(str(uri), lambda: files.put_file(path, inner))


def sizes(uri: str | os.PathLike) -> dict[str, int]:
    """Name -> bytes of the files in a directory.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    files, path = filesystem(uri)
    found = tried(str(uri), lambda: files.ls(path, detail=True))
    return {os.path.basename(f["name"].rstrip("/")): f["size"] or 0 for f in found if f["type"] == "file"}


def rm(uri: str | os.PathLike) -> None:
    """Removes a file, or a directory with all that is in it.

    Raises:
        FileNotFoundError: there is nothing of this name.
    """
    if not is_local(uri):
        _manager().rm(str(uri))
    elif os.path.isdir(local_path(uri)) and not os.path.islink(local_path(uri)):
        shutil.rmtree(local_path(uri))
    else:
        os.remove(local_path(uri))


_open_local = builtins.open


@cache
def _manager() -> Any:
    """iopath's PathManager with every scheme of `SCHEMES` on fsspec."""
    from iopath.common.file_io import PathHandler, PathManager

    class FsspecHandler(PathHandler):
        def _get_supported_prefixes(self) -> list[str]:
            return [f"{scheme}://" for scheme in SCHEMES]

        def _open(self, path: str, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
            if "a" in mode:
                raise HmoeError(f"{path}: nothing can be appended to a remote file")
            if "b" in mode:
                return RemoteFile(path, *filesystem(path), mode)
            if "r" in mode:  # at once: a file that is replaced meanwhile is the old one or the new one
                return bytes_io.TextIOWrapper(bytes_io.BytesIO(self._call(path, "cat_file")), "utf-8")
            return TextToPut(lambda data: write_bytes(path, data))

        def _exists(self, path: str, **options: Any) -> bool:
            return self._is(path, None)

        def _isfile(self, path: str, **options: Any) -> bool:
            return self._is(path, "file")

        def _isdir(self, path: str, **options: Any) -> bool:
            return self._is(path, "directory")

        def _ls(self, path: str, **options: Any) -> list[str]:
            try:
                names = self._call(path, "ls", detail=False)
            except FileNotFoundError:
                if filesystem(path)[0].root_marker:
                    raise
                names = []
            return [os.path.basename(name.rstrip("/")) for name in names]

        def _mkdirs(self, path: str, **options: Any) -> None:
            files, inner = filesystem(path)
            if files.root_marker:  # it has directories
                self._call(path, "makedirs", exist_ok=True)
            else:
                self._is(path, "directory")

        def _rm(self, path: str, **options: Any) -> None:
            self._call(path, "rm", recursive=True)
            if self._is(path, None):  # some clients do not look at what each deletion was answered
                raise StorageError(
                    f"{path}: cannot be removed; check that the credentials may delete (s3:DeleteObject)"
                )

        def _is(self, path: str, kind: str | None) -> bool:
            """Unlike fsspec's own questions, it does not take a refusal or a missing bucket for a no. None = any."""
            if scheme_of(path) in ("http", "https"):  # whose directories are pages with links
                return self._call(path, {"file": "isfile", "directory": "isdir", None: "exists"}[kind])
            try:
                found = self._call(path, "info")["type"]
            except FileNotFoundError:
                return False
            return kind in (None, found)

        def _call(self, path: str, name: str, **options: Any) -> Any:
            files, inner = filesystem(path)
            return tried(path, lambda: getattr(files, name)(inner, **options))

    manager = PathManager()
    manager.register_handler(FsspecHandler())
    return manager
