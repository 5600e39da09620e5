"""An Arrow stream that somebody else wrote: how much memory it claims is known before it is taken."""

import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hmoe_rec.data import arrow_message
from hmoe_rec.data.arrow_message import decompressed_bytes, read_table


def ipc(table: pa.Table, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue().to_pybytes()


def some_table() -> pa.Table:
    return pa.table(
        {
            "user": np.arange(19),
            "city": pa.array([f"c{i % 3}" for i in range(19)]).dictionary_encode(),
            "history": pa.array([list(range(i)) for i in range(19)]),
            "price": pa.array([None if i % 4 else i / 2 for i in range(19)], pa.float64()),
        }
    )


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_or_not_it_claims_the_same(compression):
    table = some_table()
    plain, packed = decompressed_bytes(ipc(table)), decompressed_bytes(ipc(table, compression))
    assert packed == pytest.approx(plain, abs=400)  # buffers are padded to 8 bytes in one of them
    assert plain > table.nbytes * 0.9
    assert read_table(ipc(table, compression)).equals(table)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_few_bytes_that_become_many_are_refused_before_they_do(compression, monkeypatch):
    monkeypatch.setattr(arrow_message, "MOST_BYTES", 1 << 20)
    body = ipc(pa.table({"x": pa.ListArray.from_arrays([0, 1 << 21], pa.array(np.zeros(1 << 21, "i8")))}), compression)
    before = pa.total_allocated_bytes()
    monkeypatch.setattr(pa.ipc, "open_stream", lambda body: pytest.fail("it is read"))
    with pytest.raises(ValueError, match=r"16,777,\d+ bytes once decompressed; a message holds at most 1,048,576"):
        read_table(body)
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_buffer_that_claims_more_than_there_is_memory_is_refused():
    values, size = np.arange(1 << 12) % 5, struct.pack("<q", 8 << 12)
    body = bytearray(ipc_whole(values))
    assert body.count(size) >= 1
    place = body.rindex(size)
    for claimed in (1 << 40, 1 << 62, -2):
        body[place : place + 8] = struct.pack("<q", claimed)
        with pytest.raises(ValueError, match=r"once decompressed|claims to hold -2"):
            read_table(bytes(body))


def ipc_whole(values: Any) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"x": values})
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_damaged_headers_are_refused_and_nothing_else():
    draw, body, refused = np.random.default_rng(3), ipc(some_table(), "zstd"), 0
    for _ in range(600):
        mutant = bytearray(body)
        for place in draw.integers(0, len(body), 3):
            mutant[place] ^= 1 << draw.integers(8)
        try:
            assert decompressed_bytes(bytes(mutant)) >= 0
        except (ValueError, pa.ArrowException, OSError):
            refused += 1
    assert 20 < refused < 600
