"""(seed, table, row, column) -> a random value, each drawn by itself: for rows that are reset one at a time.

`initialization.py` draws blocks of rows from one generator, which is faster; but one row of it costs a whole block.
"""

import hashlib
import math

import torch
from torch import Tensor

from hmoe_rec.embedding.hashing import splitmix64

_COLUMN_BITS = 16  # widths up to 65,536
_UNIT = 1.0 / (1 << 53)


def row_values(
    seed: int, table: str, rows: Tensor, columns: range, *, std: float, distribution: str = "normal"
) -> Tensor:
    """[len(rows), len(columns)] float32 of mean 0, on the device of `rows`.

    A counter-based generator: splitmix64 of key and counter gives uniform bits, and for the normal distribution Box and
    Muller's formula sqrt(-2 ln u) cos(2 pi v), in float64.

    Args:
        rows: int64, numbers in the whole table.
        columns: of the whole table.
        distribution: "normal", or "uniform" in +- std * sqrt(3).
    """
    digest = hashlib.blake2b(f"{seed}/{table}/rows".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    column = torch.arange(columns.start, columns.stop, device=rows.device)
    bits = splitmix64(((rows.long().unsqueeze(1) << _COLUMN_BITS) | column) ^ key)
    u = _uniform(bits)
    if distribution == "uniform":
        return ((2 * u - 1) * (std * math.sqrt(3))).float()
    return (torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * math.pi * _uniform(splitmix64(~bits))) * std).float()


def _uniform(bits: Tensor) -> Tensor:
    """In (0, 1), from the upper 53 bits."""
    return (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) * _UNIT
