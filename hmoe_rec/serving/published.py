"""Publications of a training job -> its weights, kept up to date by small steps. NumPy, no torch."""

import hashlib
import io as bytes_io
import zipfile
from collections.abc import Mapping

import numpy as np
from numpy.lib import format as npy

from hmoe_rec import io
from hmoe_rec.training.publication import DENSE, Publication, latest, read_publication
from hmoe_rec.types import CheckpointError, ConfigError


class PublishedWeights:
    """Follows a directory of publications.

    Args:
        uri: what `train.publish.to` named.

    Attributes:
        arrays: name -> array; tables [rows, D], `...managed.FIELD.ids` [rows] the id that a row belongs to.
            bfloat16 comes as its bits, in int16.
        current: the publication that they are from; None before the first `update`.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.arrays: dict[str, np.ndarray] = {}
        self.current: Publication | None = None

    def update(self) -> list[Publication]:
        """Applies what is new; -> the publications applied, oldest first.

        Files are compared with their checksums before any array is touched, one publication at a time.

        Raises:
            CheckpointError: no publications, a damaged or missing file, or a delta that is not the next one. The arrays
                are then those of `current`.
        """
        number, base = latest(self.uri)
        begin = self._next(number, base)
        applied = []
        for n in range(begin, number + 1):
            found = read_publication(self.uri, n, base)
            parent = self.current if n != base else None
            if found.kind == "delta" and (parent is None or found.content["parent"] != parent.sha256):
                raise CheckpointError(
                    f"{found.uri}: does not follow publication {n - 1} that is here; start from a base"
                )
            self._apply(found)
            self.current = found
            applied.append(found)
        return applied

    def _next(self, number: int, base: int) -> int:
        """The publication to begin with: the one after `current`, or the base where that is not of this sequence."""
        here = self.current
        if here is None or not base <= here.number <= number:
            return base
        # The directory may have been emptied and filled by another run.
        there = read_publication(self.uri, here.number, base)
        return here.number + 1 if there.sha256 == here.sha256 else base

    def _apply(self, found: Publication) -> None:
        """Verified and read first, then written."""
        files = {name: _read_verified(found, name) for name in sorted(found.content["files"])}
        if found.kind == "base":
            self.arrays = {
                name: np.zeros(form["shape"], form["dtype"]) for name, form in found.content["arrays"].items()
            }
        for block in found.content["blocks"]:
            parts = files[block["file"]]
            values, target = parts[f"{block['entry']}.values"], self.arrays[block["array"]]
            rows = parts.get(f"{block['entry']}.rows")
            chosen = slice(block["first"], block["first"] + len(values)) if rows is None else rows
            if target.ndim == 1:
                target[chosen] = values
            else:
                target[chosen, block["column"] : block["column"] + values.shape[1]] = values
        for name, values in files.get(DENSE, {}).items():
            self.arrays[name] = values


def _read_verified(found: Publication, name: str) -> dict[str, np.ndarray]:
    with io.open(io.join(found.uri, name), "rb") as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != found.content["files"][name]["sha256"]:
        raise CheckpointError(f"{found.uri}/{name}: SHA-256 differs from the manifest's; publish a new base")
    try:
        with np.load(bytes_io.BytesIO(content), allow_pickle=False) as parts:
            return dict(parts)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{found.uri}/{name}: not arrays of numbers ({error}); publish a new base") from error


def save_npz(arrays: Mapping[str, np.ndarray], uri: str) -> None:
    """The file has its name only when it is whole.

    Raises:
        ConfigError: the file exists, or its name does not end in .npz.
    """
    if not uri.endswith(".npz") or io.exists(uri):
        raise ConfigError(f"{uri}: give the name of a .npz file that is not there yet; nothing is overwritten")
    with io.replacing(uri, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                npy.write_array(entry, values, allow_pickle=False)
