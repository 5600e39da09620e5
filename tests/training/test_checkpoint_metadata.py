"""Where tensors lie in a checkpoint: what is written is read back, and no description of it runs anything."""

import io
import os
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from hmoe_rec.training.checkpoint_metadata import (
    Piece,
    Stored,
    from_json,
    from_metadata,
    from_pickle,
    to_json,
    to_metadata,
)
from hmoe_rec.types import CheckpointError

TENSORS = {
    "model.table.weight": Stored(
        torch.float16,
        (5, 4),
        (Piece((0, 0), (3, 4), "__0_0.distcp", 0, 90), Piece((3, 0), (2, 4), "__1_0.distcp", 7, 80)),
    ),
    "train.step": Stored(torch.int64, (), (Piece((), (), "__0_0.distcp", 90, 50),)),
    "empty": Stored(torch.bfloat16, (0, 6), (Piece((0, 0), (0, 6), "__0_0.distcp", 140, 40),)),
}


def test_round_trips():
    assert from_json(to_json(TENSORS)) == from_metadata(to_metadata(TENSORS)) == TENSORS


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_read_as_what_it_describes(protocol):
    assert from_pickle(pickle.dumps(to_metadata(TENSORS), protocol)) == TENSORS


def test_a_pickle_as_torch_writes_it(tmp_path):
    """With its names of keys, identifiers of the save, and the path."""
    import torch.distributed.checkpoint as dcp

    state = {"w": torch.arange(12.0).view(4, 3), "deep.b": torch.tensor(7)}
    dcp.save(dict(state), checkpoint_id=str(tmp_path), no_dist=True)
    found = from_pickle((tmp_path / ".metadata").read_bytes())
    assert {key: (t.dtype, t.size) for key, t in found.items()} == {
        key: (value.dtype, tuple(value.shape)) for key, value in state.items()
    }


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def metadata(**fields: Any) -> bytes:
    whole = to_metadata(TENSORS)
    for name, value in fields.items():
        setattr(whole, name, value)
    return pickle.dumps(whole)


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


OURS = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
TEXT = b"X" + struct.pack("<I", 1) + b"a"
HOSTILE = {
    "reduce": lambda mark: pickle.dumps(Call(os.mkdir, mark)),
    "reduce deep in it": lambda mark: metadata(planner_data={"a": [Call(os.mkdir, mark)]}),
    "as a key": lambda mark: metadata(storage_data={Call(os.mkdir, mark): 1}),
    "global": lambda mark: opcodes(b"cos\nmkdir\n", b"X" + struct.pack("<I", len(mark)) + mark.encode(), b"\x85R"),
    "inst": lambda mark: opcodes(b"(", b"X" + struct.pack("<I", len(mark)) + mark.encode(), b"ios\nmkdir\n"),
    "obj": lambda mark: opcodes(b"(", b"cos\nmkdir\n", b"X" + struct.pack("<I", len(mark)) + mark.encode(), b"o"),
    "a name with dots": lambda mark: opcodes(b"\x8c\x05torch", b"\x8c\x0cSize.__new__", b"\x93"),
    "eval of torch": lambda mark: opcodes(b"ctorch\nload\n", TEXT, b"\x85R"),
    "getattr": lambda mark: opcodes(b"cbuiltins\ngetattr\n", b"cos\nsystem\n", b"\x86R"),
    "extension registry": lambda mark: opcodes(b"\x82\x01"),
    "persistent id": lambda mark: opcodes(b"Pname\n"),
    "new object with keywords": lambda mark: opcodes(OURS, b")", b"}", b"\x92"),
    "state of a class": lambda mark: opcodes(OURS, b"N", b"}", TEXT, TEXT, b"s", b"\x86b"),
    "state of a dict": lambda mark: opcodes(b"}", b"}", TEXT, TEXT, b"s", b"b"),
    "a call of what a call gave": lambda mark: opcodes(OURS, b")\x81", b")R"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_nothing_of_it_runs(how, tmp_path):
    mark = tmp_path / "ran"
    before = dict(vars(Metadata))
    with pytest.raises((CheckpointError, ValueError)):
        from_pickle(HOSTILE[how](str(mark)))
    assert not mark.exists() and dict(vars(Metadata)) == before


def nested(levels: int) -> bytes:
    """(x, x) of (x, x) of ...: 2^levels values in `levels` instructions."""
    twice = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels))
    return b")q\x00" + twice


BOMBS = {
    "place in the memo": opcodes(b"Nr\xff\xff\xff\xff"),
    "length of a text": opcodes(b"\x8d" + struct.pack("<Q", 1 << 62) + b"abc"),
    "length of bytes": opcodes(b"\x96" + struct.pack("<Q", 1 << 40)),
    "length of a frame": opcodes(b"\x95" + struct.pack("<Q", 1 << 62), b"N"),
    "nested tuples as a key": opcodes(b"}", nested(60), b"Ns"),
    "nested tuples as a file": pickle.dumps(to_metadata(TENSORS), 2)
    .replace(b"\x80\x02", b"\x80\x02" + nested(60) + b"r\xff\xff\x00\x00", 1)
    .replace(b"X\x0c\x00\x00\x00__0_0.distcp", b"j\xff\xff\x00\x00"),
    "many marks": opcodes(b"(" * 100_000),
    "no end": OURS,
    "nothing": b"",
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_small_file_takes_neither_memory_nor_time(what):
    import resource

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises((CheckpointError, ValueError, KeyError, IndexError)):
        from_pickle(BOMBS[what])
    assert time.perf_counter() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_one_list_of_pieces_does_not_stand_for_many_tensors():
    whole = to_metadata(TENSORS)
    form = whole.state_dict_metadata["model.table.weight"]
    whole.state_dict_metadata = {"model.table.weight": form} | {f"more.{i}": form for i in range(100)}
    with pytest.raises(ValueError, match="more pieces than places|no place in a file"):
        from_pickle(pickle.dumps(whole))


def changed(**given: Any) -> dict[str, Stored]:
    piece = Piece((0, 0), (5, 4), "__0_0.distcp", 0, 90)
    values = {name: given.get(name, getattr(piece, name)) for name in ("offsets", "sizes", "file", "begin", "length")}
    return {"w": Stored(torch.float32, given.get("size", (5, 4)), (Piece(**values),))}


WRONG = [
    {"offsets": (1, 0)},
    {"sizes": (5, 5)},
    {"sizes": (5,)},
    {"offsets": (-1, 0)},
    {"begin": -1},
    {"length": 1 << 70},
    {"begin": 1.0},
    {"begin": True},
    {"size": (5, "4")},
]


@pytest.mark.parametrize("given", WRONG, ids=str)
def test_pieces_that_cannot_be(given):
    with pytest.raises((ValueError, TypeError)):
        from_json(to_json(changed(**given)))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "x\0y"])
def test_files_of_other_directories(name):
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        from_json(to_json(changed(file=name)))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        from_pickle(pickle.dumps(to_metadata(changed(file=name))))


def test_transformed_bytes_are_refused():
    whole = to_metadata(TENSORS)
    for place in whole.storage_data.values():
        place.transform_descriptors = ["zstd"]
    with pytest.raises(ValueError, match="transformed"):
        from_pickle(pickle.dumps(whole))


def test_a_payload_that_calls_something_is_refused(tmp_path: Path):
    """What `torch.save` wrote is a pickle in an archive; weights_only takes tensors alone."""
    from hmoe_rec.training.checkpoint_rows import _load, _Piece

    file = io.BytesIO()
    torch.save(Call(os.mkdir, str(tmp_path / "ran")), file)
    with pytest.raises(ValueError, match="could run code"):
        _load(file, _Piece("", (), (), 0, len(file.getvalue())))
    assert not (tmp_path / "ran").exists()
