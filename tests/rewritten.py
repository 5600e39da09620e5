"""Checkpoints that were changed after they were saved, with a manifest that fits, as an attacker would."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hmoe_rec.training.checkpoint_files import read_manifest, write_manifest
from hmoe_rec.training.checkpoint_metadata import PICKLED, TENSORS, from_json, from_metadata, to_json, to_metadata


def resign(directory: str | Path) -> None:
    """The manifest of the files as they are now."""
    content = read_manifest(str(directory))
    files = {p.name: p.read_bytes() for p in Path(directory).iterdir() if p.name != "manifest.json"}
    content["files"] = {n: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files.items()}
    write_manifest(str(directory), content)


def describe_by(directory: str | Path, content: bytes, name: str = PICKLED) -> None:
    """Another description of the tensors, in place of tensors.json."""
    (Path(directory) / TENSORS).unlink()
    (Path(directory) / name).write_bytes(content)
    resign(directory)


def change_metadata(directory: str | Path, change: Callable[[Any], Any] = lambda metadata: None, name: str = PICKLED):
    """Changes torch's metadata of the tensors. `name`: the file that it goes to; .metadata is what torch writes."""
    metadata = to_metadata(from_json((Path(directory) / TENSORS).read_bytes()))
    change(metadata)
    content = pickle.dumps(metadata) if name == PICKLED else to_json(from_metadata(metadata))
    describe_by(directory, content, name)
