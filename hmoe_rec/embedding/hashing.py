"""64-bit ids -> well mixed numbers and rows, the same on every device and in every process."""

import hashlib

from torch import Tensor

from hmoe_rec.embedding.tables import table_name

_GOLDEN, _MIX1, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_POSITIVE = 0x7FFFFFFFFFFFFFFF


def salt_of(set_name: str, field: str) -> int:
    """A 63-bit salt that depends on names only, so that it is the same in every process and in serving."""
    return int.from_bytes(hashlib.blake2b(table_name(set_name, field).encode(), digest_size=8).digest(), "little") >> 1


def splitmix64(x: Tensor) -> Tensor:
    """One round of the splitmix64 finalizer on int64 (two's complement, so products wrap as in uint64)."""
    x = x + _GOLDEN
    x ^= (x >> 30) & 0x3FFFFFFFF
    x *= _MIX1
    x ^= (x >> 27) & 0x1FFFFFFFFF
    x *= _MIX2
    x ^= (x >> 31) & 0x1FFFFFFFF
    return x


def hashed_rows(ids: Tensor, salt: Tensor | int, num_rows: Tensor | int) -> Tensor:
    """Raw 64-bit ids [n] -> rows [n] in [0, num_rows): the positive half of splitmix64(id ^ salt), modulo num_rows."""
    return (splitmix64(ids ^ salt) & _POSITIVE) % num_rows
