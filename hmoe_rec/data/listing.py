"""What stands in a directory, and which of it is done: names in memory that does not grow."""

import base64
from collections.abc import Iterable, Mapping

import xxhash

from hmoe_rec import io
from hmoe_rec.object_store import tried

REMEMBERED = 1 << 17  # names of files that are done and no longer listed
_DIGEST = 8


class Names:
    """Names of files, each as eight bytes of a hash. A million names collide with a chance of 3 in 10^8."""

    def __init__(self, packed: str = "") -> None:
        data = base64.b64decode(packed)
        self._digests = dict.fromkeys(data[i : i + _DIGEST] for i in range(0, len(data), _DIGEST))  # oldest first

    def __contains__(self, name: str) -> bool:
        return _digest(name) in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, name: str) -> None:
        self._digests[_digest(name)] = None

    def forget(self, listed: Iterable[str]) -> None:
        """Forgets the oldest names that are not listed, where there are more than REMEMBERED of them."""
        if len(self._digests) <= REMEMBERED:
            return
        kept = {_digest(name) for name in listed}
        gone = [digest for digest in self._digests if digest not in kept]
        for digest in gone[: max(0, len(gone) - REMEMBERED)]:
            del self._digests[digest]

    def packed(self) -> str:
        return base64.b64encode(b"".join(self._digests)).decode()


def _digest(name: str) -> bytes:
    return xxhash.xxh3_64_digest(name.encode())


def list_files(uri: str, now: float, before: Mapping[str, tuple[int, float]]) -> dict[str, tuple[int, float]]:
    """Name below the directory -> (size, arrival: when it was last written, or first seen); {} without directory."""
    files, root = io.filesystem(uri)
    root = root.rstrip("/")
    try:
        found = tried(uri, lambda: files.find(root, detail=True))
    except FileNotFoundError:  # no directory yet, or a file was removed meanwhile
        return dict(before)
    result = {}
    for path, about in found.items():
        name = path.removeprefix(root).lstrip("/")
        size = about.get("size") or 0
        written = about.get("mtime") or about.get("LastModified") or about.get("created")
        seconds = written.timestamp() if hasattr(written, "timestamp") else written
        result[name] = size, float(seconds) if isinstance(seconds, int | float) else before.get(name, (0, now))[1]
    return result


def is_ours(name: str) -> bool:
    return name.endswith(".parquet") and not any(part.startswith(("_", ".")) for part in name.split("/"))
