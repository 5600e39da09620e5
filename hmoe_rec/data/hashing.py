"""Strings -> stable 64-bit ids.

The id of a string is XXH64 (seed 0) of its UTF-8 bytes, read as a signed 64-bit integer: the same on every machine, in
every release, and easy to compute in another language. An integer that is to be hashed stays as it is: the model
mixes all 64-bit ids with a salt per embedding set.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


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
