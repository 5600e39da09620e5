"""Strings -> stable 64-bit ids; and values of several columns -> one number per row.

The id of a string is XXH64 (seed 0) of its UTF-8 bytes, read as a signed 64-bit integer: the same on every machine, in
every release, and easy to compute in another language. An integer that is to be hashed stays as it is: the model
mixes all 64-bit ids with a salt per embedding set.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hmoe_rec.data import fit
from hmoe_rec.types import HASH_OF_MISSING, SchemaError

if TYPE_CHECKING:
    import pyarrow as pa

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def hash_string(text: str | bytes) -> int:
    """The 64-bit id of one string."""
    import xxhash

    unsigned = xxhash.xxh64_intdigest(text.encode() if isinstance(text, str) else text)
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned


def hash_strings(array: "pa.Array") -> np.ndarray:
    """The ids of an Arrow array of strings or bytes, plain or dictionary-encoded: [n] int64, 0 where null.

    Only distinct values are hashed one by one.
    """
    import pyarrow as pa
    import xxhash

    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    if len(encoded.dictionary) == 0:
        return np.zeros(len(array), np.int64)
    distinct = encoded.dictionary
    binary = pa.large_binary() if not pa.types.is_fixed_size_binary(distinct.type) else distinct.type
    texts = (b"" if text is None else text for text in distinct.cast(binary).to_pylist())
    ids = np.fromiter(map(xxhash.xxh64_intdigest, texts), np.uint64, len(distinct)).view(np.int64)
    indices = encoded.indices
    if indices.null_count == 0:
        return ids[indices.to_numpy(zero_copy_only=False)]
    taken = ids[indices.fill_null(0).to_numpy(zero_copy_only=False)]
    taken[indices.is_null().to_numpy(zero_copy_only=False)] = 0
    return taken


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's last steps on uint64: a bijection whose bits all depend on all bits of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_rows(table: "pa.Table", columns: Sequence[str]) -> np.ndarray:
    """One uint64 per row, equal for equal values of the columns; different rows collide with probability 2^-64.

    Raises:
        SchemaError: a column that holds neither integers nor strings, dates or times.
    """
    hashes = np.zeros(table.num_rows, np.uint64)
    for name in columns:
        hashes = mix64(hashes * GOLDEN + mix64(_values(table.column(name), name).view(np.uint64) + GOLDEN))
    return hashes


def _values(column: "pa.ChunkedArray", name: str) -> np.ndarray:
    """[n] int64, HASH_OF_MISSING where null."""
    import pyarrow as pa

    array = column.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    kind = fit.plain(array.type)
    if fit.is_text(kind):
        values = hash_strings(array)
    elif fit.is_integer(kind) or pa.types.is_temporal(kind):
        array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
        if pa.types.is_temporal(kind) and kind.bit_width == 32:
            array = array.cast(pa.int32())
        array = array.cast(pa.uint64() if pa.types.is_uint64(kind) else pa.int64())
        values = array.fill_null(0).to_numpy(zero_copy_only=False).view(np.int64)
    else:
        raise SchemaError(f"column {name}: is {array.type}; expected integers, strings, dates or times as a key")
    if array.null_count:
        values = values.copy()
        values[array.is_null().to_numpy(zero_copy_only=False)] = HASH_OF_MISSING
    return values
