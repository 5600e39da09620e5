"""A checkpoint's tables -> files that other programs read: safetensors, npz or npy, streamed.

::

    target/
        set1__user_id.safetensors    weight [rows, D], and with the optimizer momentum1 [rows]; row = id
        dense.safetensors            the model's parameters outside the tables, if asked for
        export.json                  what it was made of, and size and SHA-256 of every file; written last
"""

import fnmatch
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from hmoe_rec import io
from hmoe_rec.progress import Progress
from hmoe_rec.suggest import unknown
from hmoe_rec.training.checkpoint_access import check_is_free, committed, open_checkpoint, verified_first
from hmoe_rec.training.checkpoint_files import HashingFiles, write_json
from hmoe_rec.training.checkpoint_rows import CHUNK_BYTES, StoredTable, StoredTensors, bytes_of
from hmoe_rec.types import CheckpointError

MARK = "export.json"
SCHEMA, VERSION = "hmoe_rec.export", 1
# https://github.com/huggingface/safetensors#format
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        uri: the directory.
        files: name -> {"size", "sha256", "tensors": {name: shape}}.
        bytes: of all files.
    """

    uri: str
    step: int
    files: dict[str, dict[str, Any]]
    bytes: int


@dataclass(frozen=True)
class _Array:
    """A tensor of a file: its form, and its values in row-major order, a chunk at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[], Iterator[Tensor]]


def export(
    source: str,
    target: str,
    *,
    format: Literal["safetensors", "npz", "npy"] = "safetensors",
    checkpoint: str = "latest",
    tables: str | Sequence[str] = "*",
    with_optimizer: bool = False,
    with_dense: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> Export:
    """Writes a file per table; row r of an array is id r (after hashing, where the field is hashed).

    ============  =====================================================================================================
    safetensors   any program that reads the format, also partly and from several processes; keeps every dtype
    npy           one array per file, `{table}.npy` and `{table}.momentum1.npy`: `np.load(..., mmap_mode="r")` opens
                  tables that are larger than the memory
    npz           all arrays of a table in one file, not compressed
    ============  =====================================================================================================

    Args:
        source, checkpoint: see `open_checkpoint`.
        target: a directory that is not there yet.
        tables: names with * and ?, such as "set1__*"; several of them are added up.
        with_optimizer: also the optimizer's states. Row-wise Adagrad's is [rows], or [rows, blocks] where the table was
            cut into blocks of columns.
        with_dense: also one file, `dense`, of the model's other parameters and buffers.
        chunk_bytes: size of the buffers.

    Raises:
        CheckpointError: no such checkpoint or table, a damaged one, a dtype that the format does not know, or a
            target that exists. Nothing is left behind.
    """
    if format not in ("safetensors", "npz", "npy"):
        raise CheckpointError(unknown("format", format, ("safetensors", "npz", "npy")))
    found = open_checkpoint(source, checkpoint)
    check_is_free(target, MARK)
    stored = StoredTensors(found)
    present = stored.tables()
    chosen = _chosen(found.uri, sorted(present), [tables] if isinstance(tables, str) else list(tables))
    contents: dict[str, list[_Array]] = {}
    keys: list[str] = []
    for name in chosen:
        states = present[name].states if with_optimizer else {}
        keys += [present[name].key, *states.values()]
        contents[name] = [_array(stored, present[name].key, "weight", chunk_bytes)]
        contents[name] += [_state(stored, present[name], state, chunk_bytes) for state in sorted(states)]
    if with_dense:
        of_tables = {t.key for t in present.values()}
        dense = [key for key in sorted(stored.forms) if key.startswith("model.") and key not in of_tables]
        keys += dense
        contents["dense"] = [_array(stored, key, key.removeprefix("model."), chunk_bytes) for key in dense]
    for name, arrays in contents.items():
        _check_dtypes(found.uri, name, arrays, format)
    report = verified_first(stored, keys, progress)
    with committed(target, MARK) as unfinished:
        fs = HashingFiles(unfinished)
        files: dict[str, dict[str, Any]] = {}
        for file, arrays in _files(contents, format):
            with fs.create_stream(fs.concat_path(fs.path, file), "wb") as stream:
                _WRITERS[format](stream, arrays, report)
            files[file] = {**fs.digests[file], "tensors": {a.name: list(a.shape) for a in arrays}}
        content = {"source": found.uri, "step": found.step, "world_size": found.world_size, "format": format}
        write_json(io.join(unfinished, MARK), {"schema": SCHEMA, "version": VERSION, **content, "files": files})
    return Export(target, found.step, files, sum(f["size"] for f in files.values()))


def _chosen(uri: str, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    result: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching and names:
            raise CheckpointError(f"{uri}: {unknown('table', pattern, names)}")
        result.update(matching)
    return sorted(result)


def _array(stored: StoredTensors, key: str, name: str, chunk_bytes: int) -> _Array:
    form = stored.forms[key]
    shape, dtype = tuple(form.size), form.properties.dtype

    def chunks() -> Iterator[Tensor]:
        if not shape:
            yield stored.read(key, (), ())
            return
        step = max(1, chunk_bytes // max(1, math.prod(shape[1:]) * dtype.itemsize))
        for row in range(0, shape[0], step):
            rows = min(step, shape[0] - row)
            yield stored.read(key, (row, *[0] * (len(shape) - 1)), (rows, *shape[1:]), chunk_bytes)

    return _Array(name, shape, dtype, chunks)


def _state(stored: StoredTensors, table: StoredTable, state: str, chunk_bytes: int) -> _Array:
    """A state in the order of the rows, also where it is stored block of columns after block of columns."""
    key, blocks = table.states[state], len(table.blocks)
    if blocks == 1 or not stored.is_row_statistic(table, key):
        return _array(stored, key, state, chunk_bytes)
    dtype = stored.forms[key].properties.dtype

    def chunks() -> Iterator[Tensor]:
        step = max(1, chunk_bytes // (2 * blocks * dtype.itemsize))
        for row in range(0, table.rows, step):
            rows = min(step, table.rows - row)
            parts = [stored.read(key, (b * table.rows + row,), (rows,), chunk_bytes) for b in range(blocks)]
            yield torch.stack(parts, 1)

    return _Array(state, (table.rows, blocks), dtype, chunks)


def _check_dtypes(uri: str, name: str, arrays: Sequence[_Array], format: str) -> None:
    for array in arrays:
        if array.dtype not in _SAFETENSORS or (format != "safetensors" and array.dtype == torch.bfloat16):
            raise CheckpointError(f"{uri}: {name} {array.name} is {array.dtype}, which {format} does not know")


def _files(contents: dict[str, list[_Array]], format: str) -> Iterator[tuple[str, list[_Array]]]:
    for name, arrays in contents.items():
        if format != "npy":
            yield f"{name}.{format}", arrays
            continue
        for array in arrays:
            yield f"{name}.npy" if array.name == "weight" else f"{name}.{array.name}.npy", [array]


# ------------------------------------------------------------------------------------------------------------- formats


def _copy(stream: Any, array: _Array, report: Callable[[int], None]) -> None:
    for values in array.chunks():
        stream.write(bytes_of(values.contiguous()))
        report(values.nbytes)


def _write_safetensors(stream: Any, arrays: Sequence[_Array], report: Callable[[int], None]) -> None:
    """Eight bytes of length, a JSON header padded with spaces, then all values without a gap."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for array in arrays:
        end = begin + math.prod(array.shape) * array.dtype.itemsize
        header[array.name] = {
            "dtype": _SAFETENSORS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)))
    stream.write(text)
    for array in arrays:
        _copy(stream, array, report)


def _write_npy(stream: Any, arrays: Sequence[_Array], report: Callable[[int], None]) -> None:
    (array,) = arrays
    dtype = np.dtype(str(array.dtype).removeprefix("torch."))
    npy.write_array_header_1_0(
        stream, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": array.shape}
    )
    _copy(stream, array, report)


def _write_npz(stream: Any, arrays: Sequence[_Array], report: Callable[[int], None]) -> None:
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for array in arrays:
            with archive.open(f"{array.name}.npy", "w", force_zip64=True) as inner:
                _write_npy(inner, [array], report)


_WRITERS = {"safetensors": _write_safetensors, "npz": _write_npz, "npy": _write_npy}
