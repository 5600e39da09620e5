import numpy as np
import pyarrow as pa
import pytest

from hmoe_rec.data.hashing import hash_string, hash_strings


def test_is_xxh64_of_utf8():
    # Published test vectors of XXH64 with seed 0.
    assert hash_string("") == 0xEF46DB3751D8E999 - 2**64
    assert hash_string("abc") == 0x44BC2CF5AD770999


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), pa.string())])
def test_arrays_hash_as_their_strings_do(kind):
    texts = ["b", "äö", "", None, "b", "x" * 100]
    values = [t.encode() if t is not None and kind == pa.binary() else t for t in texts]
    hashed = hash_strings(pa.array(values, kind))
    assert hashed.dtype == np.int64
    assert hashed.tolist() == [0 if t is None else hash_string(t) for t in texts]


def test_slices_and_empty_arrays():
    array = pa.array(["a", "b", "c", "d"])
    assert hash_strings(array[2:]).tolist() == [hash_string("c"), hash_string("d")]
    assert hash_strings(array.dictionary_encode()[1:3]).tolist() == [hash_string("b"), hash_string("c")]
    assert hash_strings(array[:0]).tolist() == []
    assert hash_strings(pa.array([None, None], pa.string())).tolist() == [0, 0]
