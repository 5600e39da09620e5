"""An Arrow IPC stream that somebody else wrote -> a table, after its headers have said how much memory that takes.

A compressed buffer begins with the number of bytes that it becomes (int64, -1: it is not compressed), and Arrow takes
that much before it looks further: 66 kB of zstd may be 2 GiB of zeros. The headers are flatbuffers; those fields that
say where the buffers lie are read here (Message.fbs of Arrow's format; numbers are positions of fields in it).
"""

import struct
from collections.abc import Iterator

import pyarrow as pa

MOST_BYTES = 1 << 30  # of a message's buffers, decompressed
MOST_ROWS = 1 << 22  # of a message: columns of nulls may claim any number of rows in a few bytes
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


def read_table(body: bytes) -> pa.Table:
    """
    Raises:
        ValueError, pa.ArrowException, OSError: it is damaged, or larger than a message may be.
    """
    size = decompressed_bytes(body)
    if size > MOST_BYTES:
        raise ValueError(f"{size:,} bytes once decompressed; a message holds at most {MOST_BYTES:,}")
    table = pa.ipc.open_stream(body).read_all()
    if table.num_rows > MOST_ROWS:
        raise ValueError(f"{table.num_rows:,} rows; a message holds at most {MOST_ROWS:,}")
    return table


def decompressed_bytes(body: bytes) -> int:
    """Of all buffers, by what the headers claim; nothing is decompressed.

    Raises:
        ValueError, pa.ArrowException, OSError: they are damaged.
    """
    try:
        return sum(map(_buffer_bytes, pa.ipc.MessageReader.open_stream(body)))
    except struct.error as error:
        raise ValueError(f"damaged headers of an Arrow stream: {error}") from None


def _buffer_bytes(message: pa.ipc.Message) -> int:
    header = _Table.root(message.metadata)
    kind, batch = header.number(1, "<B"), header.table(2)
    if kind == _DICTIONARY_BATCH and batch is not None:
        batch = batch.table(1)
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH) or batch is None:
        return 0
    compressed = batch.table(3) is not None
    total = 0
    for start, length in batch.pairs(2):
        claimed = struct.unpack_from("<q", message.body, start)[0] if compressed and length else -1
        if start < 0 or length < 0 or claimed < -1:
            raise ValueError(f"a buffer at {start} of {length} bytes claims to hold {claimed}")
        total += length if claimed == -1 else claimed
    return total


class _Table:
    """A flatbuffer's table: at its place stands how far before it the list of its fields' places is."""

    def __init__(self, data: pa.Buffer, place: int) -> None:
        self._data, self._place = data, place
        self._fields = place - self._at("<i", place)
        self._size = self._at("<H", self._fields)

    @classmethod
    def root(cls, data: pa.Buffer) -> "_Table":
        return cls(data, struct.unpack_from("<I", data, 0)[0])

    def number(self, field: int, form: str) -> int:
        """0 where it is left out."""
        place = self._where(field)
        return 0 if place is None else self._at(form, place)

    def table(self, field: int) -> "_Table | None":
        place = self._where(field)
        return None if place is None else _Table(self._data, place + self._at("<I", place))

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """A list of two int64 each."""
        place = self._where(field)
        if place is None:
            return
        place += self._at("<I", place)
        for i in range(self._at("<I", place)):
            yield struct.unpack_from("<qq", self._data, place + 4 + 16 * i)

    def _where(self, field: int) -> int | None:
        place = 4 + 2 * field
        offset = self._at("<H", self._fields + place) if place < self._size else 0
        return self._place + offset if offset else None

    def _at(self, form: str, place: int) -> int:
        if place < 0:
            raise struct.error(f"a place before the beginning: {place}")
        return struct.unpack_from(form, self._data, place)[0]
