"""A checkpoint's tensors, read a block at a time: however large a table or a shard is, only what is asked for is read.

torch.distributed.checkpoint stores every piece of a tensor as `torch.save` writes it, one after another in a file. The
values of a contiguous tensor lie there as they lie in memory, so that rows are a range of bytes.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from hmoe_rec.training.checkpoint import Checkpoint
from hmoe_rec.training.checkpoint_files import SafeReader, tensors_only
from hmoe_rec.training.checkpoint_metadata import PICKLED, TENSORS
from hmoe_rec.types import CheckpointError

CHUNK_BYTES = 1 << 26  # of the buffers through which tensors are streamed
_WEIGHT = re.compile(r"model\.(?:(.*)\.)?(?:embedding_bags|embeddings)\.([^.]+)\.weight")
_STATE = re.compile(r".*\b(?:embedding_bags|embeddings)\.([^.]+)\.weight\.\1\.(\w+)")


@dataclass(frozen=True)
class StoredTable:
    """An embedding table in a checkpoint.

    Attributes:
        key: of its weight.
        module: path of the collection that holds it.
        blocks: (first column, width) of the column blocks it was saved in, in order; one if it was not cut by columns.
        states: name of an optimizer state -> its key.
    """

    name: str
    module: str
    key: str
    rows: int
    dim: int
    blocks: tuple[tuple[int, int], ...]
    states: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Piece:
    """A block of a tensor, and where `torch.save` wrote it: bytes [begin, begin + length) of a file."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int
    length: int


class StoredTensors:
    """The tensors of a checkpoint, by their names; opening it reads the metadata only.

    Raises:
        CheckpointError: the metadata is damaged, or asks for something else than tensors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._reader = SafeReader(checkpoint.uri)
        metadata = self._reader.read_metadata()
        self._storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.description = PICKLED if TENSORS not in checkpoint.files else TENSORS  # that file
        self.forms: dict[str, TensorStorageMetadata] = {
            key: m for key, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)
        }
        self._pieces: dict[str, list[_Piece]] = {}  # in the order of their first rows
        self._places: dict[_Piece, int | None] = {}

    def tables(self) -> dict[str, StoredTable]:
        """Table name -> what is stored of it.

        Raises:
            CheckpointError: two tables have one name.
        """
        result: dict[str, StoredTable] = {}
        for key, form in self.forms.items():
            match = _WEIGHT.fullmatch(key)
            if match is None or len(form.size) != 2:
                continue
            module, name = match[1] or "", match[2]
            if name in result:
                raise CheckpointError(f"{self.checkpoint.uri}: {key} and {result[name].key} are tables of one name")
            blocks = sorted({(chunk.offsets[1], chunk.sizes[1]) for chunk in form.chunks})
            result[name] = StoredTable(name, module, key, form.size[0], form.size[1], tuple(blocks))
        for key in self.forms:
            match = _STATE.fullmatch(key)
            if match is not None and match[1] in result and not key.startswith("model."):
                result[match[1]].states[match[2]] = key
        return result

    def is_row_statistic(self, table: StoredTable, key: str) -> bool:
        """Whether a state has one value per row and column block, block after block."""
        return tuple(self.forms[key].size) == (table.rows * len(table.blocks),)

    def files_of(self, keys: Iterable[str]) -> set[str]:
        return {piece.file for key in keys for piece in self._pieces_of(key)}

    def bytes_of(self, key: str) -> int:
        return math.prod(self.forms[key].size) * self.forms[key].properties.dtype.itemsize

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int], chunk_bytes: int = CHUNK_BYTES) -> Tensor:
        """The block of a tensor that begins at `offsets`, on the CPU.

        Beside the result it takes `chunk_bytes` of memory, however the tensor was cut.

        Raises:
            CheckpointError: a file does not hold what the metadata says, or nothing holds a part of the block.
        """
        dtype = self.forms[key].properties.dtype
        result = torch.empty(tuple(sizes), dtype=dtype)
        filled = 0
        for piece in self._overlapping(key, offsets, sizes):
            begins = [max(a, b) for a, b in zip(offsets, piece.offsets, strict=True)]
            ends = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, piece.offsets, piece.sizes, strict=True)]
            if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
                continue
            filled += math.prod(end - begin for begin, end in zip(begins, ends, strict=True))
            inside = tuple(slice(a - o, b - o) for a, b, o in zip(begins, ends, piece.offsets, strict=True))
            target = result[tuple(slice(a - o, b - o) for a, b, o in zip(begins, ends, offsets, strict=True))]
            self._fill(target, key, piece, inside, chunk_bytes)
        if filled != math.prod(sizes):
            raise CheckpointError(
                f"{self.checkpoint.uri}: {key}: {math.prod(sizes) - filled} values at {list(offsets)} are stored "
                "nowhere or twice; the checkpoint is damaged, use another one"
            )
        return result

    def _pieces_of(self, key: str) -> list[_Piece]:
        if key not in self._pieces:
            result = []
            for chunk in self.forms[key].chunks:
                info = self._storage.get(MetadataIndex(key, chunk.offsets))
                if info is None or getattr(info, "transform_descriptors", None):
                    raise CheckpointError(
                        f"{self.checkpoint.uri}: {key} at {list(chunk.offsets)}: no place in a file; the checkpoint is "
                        "damaged, use another one"
                    )
                place = (info.relative_path, tuple(chunk.offsets), tuple(chunk.sizes), info.offset, info.length)
                result.append(_Piece(*place))
            self._pieces[key] = sorted(result, key=lambda piece: piece.offsets)
        return self._pieces[key]

    def _overlapping(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[_Piece]:
        """The pieces that may hold some of these rows: few of the thousands that a large table has."""
        pieces = self._pieces_of(key)
        if not offsets or not pieces:
            return pieces
        longest = max(piece.sizes[0] for piece in pieces)
        first = bisect_right(pieces, offsets[0] - longest, key=lambda piece: piece.offsets[0])
        last = bisect_left(pieces, offsets[0] + sizes[0], key=lambda piece: piece.offsets[0])
        return pieces[first:last]

    def _fill(self, target: Tensor, key: str, piece: _Piece, inside: tuple[slice, ...], chunk_bytes: int) -> None:
        dtype = self.forms[key].properties.dtype
        try:
            with self._reader.fs.create_stream(
                self._reader.fs.concat_path(self._reader.path, piece.file), "rb"
            ) as file:
                place = self._place(file, dtype, piece)
                if place is None:
                    target.copy_(_load(file, piece)[inside])
                    return
                if not inside:
                    target.copy_(_range(file, place, 1, dtype)[0])
                    return
                row = math.prod(piece.sizes[1:])
                step = max(1, chunk_bytes // max(1, row * dtype.itemsize))
                for begin in range(inside[0].start, inside[0].stop, step):
                    end = min(begin + step, inside[0].stop)
                    values = _range(file, place + begin * row * dtype.itemsize, (end - begin) * row, dtype)
                    first = inside[0].start
                    target[begin - first : end - first].copy_(
                        values.view(end - begin, *piece.sizes[1:])[(slice(None), *inside[1:])]
                    )
        except CheckpointError:
            raise
        except Exception as error:  # torch.load on damaged bytes raises nearly anything
            raise CheckpointError(
                f"{self.checkpoint.uri}/{piece.file}: {key}: {type(error).__name__}: {error}; the file is damaged, use "
                "another checkpoint"
            ) from error

    def _place(self, file: Any, dtype: torch.dtype, piece: _Piece) -> int | None:
        """Where the values begin in the file; None where they are not contiguous."""
        if piece not in self._places:
            header = _load(file, piece, "meta")
            if tuple(header.shape) != piece.sizes or header.dtype != dtype:
                raise CheckpointError(
                    f"{self.checkpoint.uri}/{piece.file}: holds {list(header.shape)} {header.dtype} where its metadata "
                    f"has {list(piece.sizes)} {dtype}; the checkpoint is damaged, use another one"
                )
            begin = getattr(header.untyped_storage(), "_checkpoint_offset", None)
            if begin is not None and header.is_contiguous():
                begin += piece.begin + header.storage_offset() * dtype.itemsize
            else:
                begin = None
            self._places[piece] = begin
        return self._places[piece]


def _load(file: Any, piece: _Piece, device: str = "cpu") -> Tensor:
    """The tensor of a piece; on "meta" its values are not read."""
    view: Any = _create_file_view(file, piece.begin, piece.length)
    with tensors_only():
        return torch.load(view, map_location=device, weights_only=True)


def _range(file: Any, begin: int, count: int, dtype: torch.dtype) -> Tensor:
    values = torch.empty(count, dtype=dtype)
    view = bytes_of(values)
    file.seek(begin)
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise EOFError(f"the file ends {len(view) - done} bytes early")
        done += got
    return values


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    raw: Any = tensor.view(-1).view(torch.uint8).numpy()  # NumPy has no bfloat16
    return memoryview(raw)
