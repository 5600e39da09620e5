"""What a directory of publications looks like: written by training, read by whoever serves. No torch.

::

    directory/
        latest.json                   {"number": 12, "base": 10}; replaced last
        000010-base/                  all rows
            manifest.json             arrays, blocks, size and SHA-256 of every file, SHA-256 of the parent's manifest
            rank-0.npz ...            rows and ids, a file per process
            dense.npz                 everything else
        000011-delta/                 what changed since 000010: rows, and arrays of dense.npz
        000012-delta/

Arrays are named as in the model's state dict. A base holds all rows; a delta those that may have changed since the
publication before it. What is not in a table is all in a base; in a delta those arrays that have changed.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hmoe_rec import io
from hmoe_rec.types import CheckpointError

SCHEMA, VERSION = "hmoe_rec.publication", 1
LATEST, MANIFEST, DENSE = "latest.json", "manifest.json", "dense.npz"


@dataclass(frozen=True)
class Publication:
    """One directory.

    Attributes:
        number: 0, 1, ... in the order of time.
        kind: "base" or "delta".
        base: number of the base that it builds on, or is.
        step: of the training that it was made after.
        sha256: of the manifest.
        content: the manifest.
    """

    uri: str
    number: int
    kind: str
    base: int
    step: int
    sha256: str
    content: Mapping[str, Any] = field(repr=False)

    @property
    def bytes(self) -> int:
        return sum(f["size"] for f in self.content["files"].values())

    @property
    def rows(self) -> int:
        """Rows and ids that it holds, over all arrays."""
        return sum(block["count"] for block in self.content["blocks"])


def latest(uri: str) -> tuple[int, int]:
    """(number of the newest publication, number of its base).

    Raises:
        CheckpointError: there is none.
    """
    path = io.join(uri, LATEST)
    try:
        with io.open(path, "r") as file:
            content = json.load(file)
        return int(content["number"]), int(content["base"])
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{uri}: no {LATEST}: nothing was published here (train.publish.to)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}; publish a new base") from error


def publications(uri: str) -> Iterator[Publication]:
    """From the newest base to the newest delta, as `PublishedWeights` applies them; manifests only."""
    number, base = latest(uri)
    for n in range(base, number + 1):
        yield read_publication(uri, n, base)


def directory_of(uri: str, number: int, kind: str) -> str:
    return io.join(uri, f"{number:06d}-{kind}")


def digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_publication(uri: str, number: int, base: int) -> Publication:
    """The publication of that number, which builds on `base` or is it.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    kind = "base" if number == base else "delta"
    directory = directory_of(uri, number, kind)
    try:
        with io.open(io.join(directory, MANIFEST), "r") as file:
            content = json.load(file)
        given = content.pop("sha256")
        found = Publication(
            directory, content["number"], content["kind"], content["base"], content["step"], given, content
        )
        schema, names = (content["schema"], content["version"]), list(content["files"])
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{directory}: missing; publish a new base") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory}/{MANIFEST}: damaged: {error}; publish a new base") from error
    if schema != (SCHEMA, VERSION) or given != digest_of(content) or (found.number, found.kind) != (number, kind):
        raise CheckpointError(f"{directory}/{MANIFEST}: damaged, or of another version; publish a new base")
    if not all(io.is_file_name(name) for name in names):
        raise CheckpointError(f"{directory}/{MANIFEST}: names a file outside of {directory}; do not use it")
    return found
