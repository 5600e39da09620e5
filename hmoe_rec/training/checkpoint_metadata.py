"""Where each tensor's pieces lie in a checkpoint <-> bytes, read as data: nothing that a file names is imported.

`tensors.json`, which our checkpoints have::

    {"schema": "hmoe_rec.tensors", "version": 1, "files": ["__0_0.distcp", ...],
     "tensors": {key: {"dtype": "float32", "size": [5, 4],
                       "pieces": [[offsets, sizes, number of the file, first byte, bytes], ...]}}}

`.metadata`, which torch.distributed.checkpoint writes and our older checkpoints have, is a pickle, a program that calls
what it names. Here its opcodes are read as what it describes: a call is a record of a name and arguments, and a record
of another name than those that torch writes is refused.
"""

import json
import pickletools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from hmoe_rec import io
from hmoe_rec.types import CheckpointError

TENSORS, PICKLED = "tensors.json", ".metadata"
SCHEMA, VERSION = "hmoe_rec.tensors", 1
LARGEST = 1 << 31  # bytes of either file; 10 million pieces take less

_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_TORCH = "torch.distributed.checkpoint.metadata"
_CALLS = {
    *((_TORCH, name) for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata")),
    *((_TORCH, name) for name in ("ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *(("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout")),
    *(("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("collections", "OrderedDict")),
    *(("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),
}


@dataclass(frozen=True)
class Piece:
    """A block of a tensor, and the bytes [begin, begin + length) of a file that `torch.save` wrote it to."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    size: tuple[int, ...]
    pieces: tuple[Piece, ...]


def to_json(tensors: Mapping[str, Stored]) -> bytes:
    files = sorted({piece.file for t in tensors.values() for piece in t.pieces})
    numbers = {file: i for i, file in enumerate(files)}
    content = {
        key: {
            "dtype": str(t.dtype).removeprefix("torch."),
            "size": t.size,
            "pieces": [(p.offsets, p.sizes, numbers[p.file], p.begin, p.length) for p in t.pieces],
        }
        for key, t in tensors.items()
    }
    body = {"schema": SCHEMA, "version": VERSION, "files": files, "tensors": content}
    return json.dumps(body, separators=(",", ":")).encode()


def from_json(content: bytes) -> dict[str, Stored]:
    """
    Raises:
        ValueError: anything but what `to_json` writes.
    """
    body = json.loads(content)
    if not isinstance(body, dict) or (body.get("schema"), body.get("version")) != (SCHEMA, VERSION):
        raise ValueError(f"expected schema {SCHEMA!r}, version {VERSION}")
    files = [_file(name) for name in body["files"]]
    result = {}
    for key, t in body["tensors"].items():
        pieces = [(o, s, files[_count(number)], begin, length) for o, s, number, begin, length in t["pieces"]]
        result[key] = _stored(key, _DTYPES[t["dtype"]], t["size"], pieces)
    return result


def to_metadata(tensors: Mapping[str, Stored]) -> Metadata:
    """What torch.distributed.checkpoint loads by."""
    places, forms = {}, {}
    for key, t in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in t.pieces]
        forms[key] = TensorStorageMetadata(TensorProperties(dtype=t.dtype), torch.Size(t.size), chunks)
        for p in t.pieces:
            places[MetadataIndex(key, p.offsets)] = _StorageInfo(p.file, p.begin, p.length)
    names = {key: (key,) for key in tensors}
    return Metadata(forms, planner_data=names, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")


def from_metadata(metadata: Metadata) -> dict[str, Stored]:
    """What torch.distributed.checkpoint, in this process, has written: tensors only."""
    result = {}
    for key, form in metadata.state_dict_metadata.items():
        assert isinstance(form, TensorStorageMetadata), f"{key}: only tensors are saved"
        pieces = []
        for chunk in form.chunks:
            place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            pieces.append((chunk.offsets, chunk.sizes, place.relative_path, place.offset, place.length))
        result[key] = _stored(key, form.properties.dtype, form.size, pieces)
    return result


def from_pickle(content: bytes) -> dict[str, Stored]:
    """
    Raises:
        CheckpointError: it calls something that a description of tensors does not need, or describes other objects.
        ValueError, KeyError, ...: it is damaged.
    """
    parts = _fields(_read(content), "Metadata")
    places: dict[tuple[str, tuple[int, ...]], list[Any]] = {}
    for index, info in _pairs(parts["storage_data"]):
        at, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        if place.get("transform_descriptors"):
            raise ValueError(f"{at['fqn']}: its bytes are transformed, which is not read")
        where = [_file(place["relative_path"]), place["offset"], place["length"]]
        places[_text(at["fqn"]), () if at.get("offset") is None else _size(at["offset"])] = where
    result, pieces_left = {}, len(places)
    for key, described in _pairs(parts["state_dict_metadata"]):
        if isinstance(described, _Call) and described.name == "BytesStorageMetadata":
            raise CheckpointError(f"{key!r} is a pickled object; only tensors are read, since unpickling may run code")
        form, pieces = _fields(described, "TensorStorageMetadata"), []
        pieces_left -= len(_list(form["chunks"]))
        if pieces_left < 0:  # one list of pieces may stand for many tensors: a small file, and no end of work
            raise ValueError("there are more pieces than places: some are stored nowhere or twice")
        for chunk in _list(form["chunks"]):
            block = _fields(chunk, "ChunkStorageMetadata")
            offsets = _size(block["offsets"])
            if (_text(key), offsets) not in places:
                raise ValueError(f"{key} at {list(offsets)}: no place in a file")
            pieces.append((offsets, _size(block["sizes"]), *places[key, offsets]))
        dtype = _list(_call(form["properties"], "TensorProperties").state)[0]
        result[key] = _stored(key, _dtype(dtype), _size(form["size"]), pieces)
    return result


# -------------------------------------------------------------------------------------------------------- what is right


def _stored(key: str, dtype: torch.dtype, size: Sequence[int], pieces: Iterable[Sequence[Any]]) -> Stored:
    whole, checked = tuple(map(_count, size)), []
    for offsets, sizes, file, begin, length in pieces:
        first, count = tuple(map(_count, offsets)), tuple(map(_count, sizes))
        if not all(o + n <= of for o, n, of in zip(first, count, whole, strict=True)):
            raise ValueError(f"{key}: a piece {list(count)} at {list(first)} of {list(whole)}")
        checked.append(Piece(first, count, _file(file), _count(begin), _count(length)))
    return Stored(dtype, whole, tuple(checked))


def _file(name: Any) -> str:
    if not io.is_file_name(_text(name)):
        raise CheckpointError(f"names a file outside the checkpoint: {name!r}")
    return name


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:  # not shown: nested tuples would be without end
        raise ValueError(f"expected a number of rows or bytes, got a {type(value).__name__} that is none")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got a {type(value).__name__}")
    return value


# ----------------------------------------------------------------------------------------------- a pickle, read as data


@dataclass(frozen=True)
class _Name:
    module: str
    name: str


@dataclass(eq=False)
class _Call:
    """module.name(*args), and the state that was set in what it gave: nothing is called."""

    module: str
    name: str
    args: Any
    state: Any = None


@dataclass(eq=False)
class _Pairs:
    """A dict: its keys are not hashed, since nested ones take forever."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


class _Mark:
    pass


def _read(content: bytes) -> Any:
    """The value that a pickle describes: calls, pairs, lists, tuples and plain values."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in _PLAIN:
            stack.append(_PLAIN[name](argument))
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _ACTS:
            _ACTS[name](stack)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise CheckpointError(f"has the instruction {name}, which no description of tensors needs; do not use it")
    raise ValueError("it ends early")


def _plain(argument: Any) -> Any:
    return argument


def _global(argument: str) -> _Name:
    return _named(*argument.split(" ", 1))


def _named(module: Any, name: Any) -> _Name:
    if (module, name) in _CALLS or (module == "torch" and name in _DTYPES):
        return _Name(module, name)
    raise CheckpointError(f"asks for {module}.{name}: refused, since it could run code; do not use it")


def _stack_global(stack: list[Any]) -> None:
    name, module = _text(stack.pop()), _text(stack.pop())
    stack.append(_named(module, name))


def _calls(stack: list[Any]) -> None:
    args, called = stack.pop(), stack.pop()
    if not isinstance(called, _Name):
        raise ValueError(f"calls a {type(called).__name__}")
    stack.append(_Pairs() if called.name == "OrderedDict" else _Call(called.module, called.name, args))


def _builds(stack: list[Any]) -> None:
    state, made = stack.pop(), stack[-1]
    if not isinstance(made, _Call):
        raise CheckpointError(f"sets a state of a {type(made).__name__}: refused; do not use it")
    made.state = state


def _marked(stack: list[Any]) -> list[Any]:
    items = []
    while not isinstance(item := stack.pop(), _Mark):
        items.append(item)
    return items[::-1]


def _tuples(count: int) -> Callable[[list[Any]], None]:
    def act(stack: list[Any]) -> None:
        items = tuple(stack[len(stack) - count :])
        if len(items) < count:
            raise ValueError("takes what is not there")
        del stack[len(stack) - count :]
        stack.append(items)

    return act


def _sets(stack: list[Any], pairs: list[Any]) -> None:
    target = stack[-1]
    if not isinstance(target, _Pairs) or len(pairs) % 2:
        raise ValueError(f"sets items of a {type(target).__name__}")
    target.items += zip(pairs[::2], pairs[1::2], strict=True)


def _appends(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise ValueError(f"appends to a {type(stack[-1]).__name__}")
    stack[-1].extend(items)


def _one(stack: list[Any], count: int = 1) -> list[Any]:
    return [stack.pop() for _ in range(count)][::-1]


_PLAIN: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("NONE",), lambda _: None),
    **dict.fromkeys(("NEWTRUE",), lambda _: True),
    **dict.fromkeys(("NEWFALSE",), lambda _: False),
    **dict.fromkeys(("EMPTY_TUPLE",), lambda _: ()),
    **dict.fromkeys(("EMPTY_LIST",), lambda _: []),
    **dict.fromkeys(("EMPTY_DICT",), lambda _: _Pairs()),
    **dict.fromkeys(("MARK",), lambda _: _Mark()),
    **dict.fromkeys(("GLOBAL",), _global),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"), _plain),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _plain),
}
_ACTS: dict[str, Callable[[list[Any]], None]] = {
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _calls,
    "NEWOBJ": _calls,
    "BUILD": _builds,
    "TUPLE": lambda stack: stack.append(tuple(_marked(stack))),
    "TUPLE1": _tuples(1),
    "TUPLE2": _tuples(2),
    "TUPLE3": _tuples(3),
    "SETITEM": lambda stack: _sets(stack, _one(stack, 2)),
    "SETITEMS": lambda stack: _sets(stack, _marked(stack)),
    "APPEND": lambda stack: _appends(stack, _one(stack)),
    "APPENDS": lambda stack: _appends(stack, _marked(stack)),
}


def _call(value: Any, name: str) -> _Call:
    if not isinstance(value, _Call) or value.name != name:
        raise ValueError(f"expected a {name}, got a {getattr(value, 'name', type(value).__name__)}")
    return value


def _pairs(value: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, _Pairs):
        raise ValueError(f"expected a dict, got a {type(value).__name__}")
    return iter(value.items)


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list, got a {type(value).__name__}")
    return value


def _fields(value: Any, name: str) -> dict[str, Any]:
    return {_text(key): item for key, item in _pairs(_call(value, name).state)}


def _size(value: Any) -> tuple[int, ...]:
    """torch.Size((5, 4))"""
    (numbers,) = _list(_call(value, "Size").args)
    return tuple(map(_count, _list(numbers)))


def _dtype(value: Any) -> torch.dtype:
    if not isinstance(value, _Name) or value.name not in _DTYPES:
        raise ValueError("expected a dtype")
    return _DTYPES[value.name]
