"""URIs -> files: the only door to storage.

A path without a scheme (or with `file://`) is a local file. `scheme://...` goes through iopath's PathManager to the
fsspec file system of that scheme, if the scheme is in `SCHEMES` or was registered; any other scheme is an error, since
PathManager itself would take `s4://bucket/x` for a local path. Nothing heavy is imported until a remote URI is met.
"""

import builtins
import glob as _glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, Any

from hmoe_rec.suggest import nearest
from hmoe_rec.types import HmoeError

# scheme -> what must be installed beside fsspec
SCHEMES: dict[str, str | None] = {
    "memory": None,
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
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
        return fsspec.core.url_to_fs(str(uri))
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
    """Opens a file; text is UTF-8. Use it as a context manager: remote files are committed on close."""
    if is_local(uri):
        return _open_local(local_path(uri), mode, encoding=None if "b" in mode else "utf-8")
    return _manager().open(str(uri), mode)


@contextmanager
def replacing(uri: str | os.PathLike) -> Iterator[IO[str]]:
    """A text file to write in, which takes the place of `uri` when it is whole.

    Locally by rename, so that the old one stays where the disk is full; on object stores by their atomic put.
    """
    local = is_local(uri)
    target = f"{uri}.tmp" if local else str(uri)
    try:
        with open(target, "w") as file:
            yield file
        if local:
            rename(target, uri)
    finally:
        if local and exists(target):
            rm(target)


def write_text(uri: str | os.PathLike, text: str) -> None:
    """Replaces a file as a whole. Its directory is made where it is missing."""
    if is_local(uri):
        os.makedirs(os.path.dirname(local_path(uri)) or ".", exist_ok=True)
    with replacing(uri) as file:
        file.write(text)


def exists(uri: str | os.PathLike) -> bool:
    return os.path.exists(local_path(uri)) if is_local(uri) else _manager().exists(str(uri))


def isfile(uri: str | os.PathLike) -> bool:
    return os.path.isfile(local_path(uri)) if is_local(uri) else _manager().isfile(str(uri))


def isdir(uri: str | os.PathLike) -> bool:
    return os.path.isdir(local_path(uri)) if is_local(uri) else _manager().isdir(str(uri))


def ls(uri: str | os.PathLike) -> list[str]:
    """Names in a directory, sorted.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    return sorted(os.listdir(local_path(uri)) if is_local(uri) else _manager().ls(str(uri)))


def glob(pattern: str) -> list[str]:
    """URIs that match a pattern with `*`, `?`, `[...]`, `**`; sorted, each as full as the pattern was."""
    if is_local(pattern):
        return sorted(_glob.glob(local_path(pattern), recursive=True))
    files, path = filesystem(pattern)
    return sorted(files.unstrip_protocol(found) for found in files.glob(path))


def find(uri: str | os.PathLike) -> list[str]:
    """URIs of all files below a directory, sorted; links are followed, each directory is visited once."""
    if is_local(uri):
        return sorted(_files_below(local_path(uri)))
    files, path = filesystem(uri)
    return sorted(files.unstrip_protocol(found) for found in files.find(path))


def _files_below(path: str) -> Iterator[str]:
    seen = {os.path.realpath(path)}
    for folder, folders, names in os.walk(path, followlinks=True):
        inside = {os.path.realpath(os.path.join(folder, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = [name for target, name in inside.items() if target not in seen]
        seen.update(inside)
        yield from (os.path.join(folder, name) for name in names)


def mkdirs(uri: str | os.PathLike) -> None:
    """Makes a directory and its parents, if they are not there yet."""
    if is_local(uri):
        os.makedirs(local_path(uri), exist_ok=True)
    else:
        _manager().mkdirs(str(uri))


def rename(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Moves a file or a directory inside one file system. Locally this is one atomic step, which replaces a file.

    Object stores copy and delete: there, commit by writing one small file last.
    """
    if is_local(source) != is_local(target):
        raise HmoeError(f"cannot rename {source} to {target}: they are on different file systems; copy instead")
    if is_local(source):
        os.replace(local_path(source), local_path(target))
    else:
        _manager().mv(str(source), str(target))


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
            files, inner = filesystem(path)
            return files.open(inner, mode, **({} if "b" in mode else {"encoding": "utf-8"}))

        def _exists(self, path: str, **options: Any) -> bool:
            files, inner = filesystem(path)
            return files.exists(inner)

        def _isfile(self, path: str, **options: Any) -> bool:
            files, inner = filesystem(path)
            return files.isfile(inner)

        def _isdir(self, path: str, **options: Any) -> bool:
            files, inner = filesystem(path)
            return files.isdir(inner)

        def _ls(self, path: str, **options: Any) -> list[str]:
            files, inner = filesystem(path)
            return [os.path.basename(name.rstrip("/")) for name in files.ls(inner, detail=False)]

        def _mkdirs(self, path: str, **options: Any) -> None:
            files, inner = filesystem(path)
            files.makedirs(inner, exist_ok=True)

        def _rm(self, path: str, **options: Any) -> None:
            files, inner = filesystem(path)
            files.rm(inner, recursive=True)

        def _mv(self, src_path: str, dst_path: str, **options: Any) -> bool:
            files, inner = filesystem(src_path)
            files.mv(inner, filesystem(dst_path)[1], recursive=True)
            return True

    manager = PathManager()
    manager.register_handler(FsspecHandler())
    return manager
