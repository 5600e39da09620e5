"""Pre-trained vectors from Parquet: every form of a list column, and what a user reads when a file is wrong."""

import math

import numpy as np
import pyarrow as pa
import pytest

from hmoe_rec.data.vectors import peek_dim, read_vectors
from hmoe_rec.types import DataError

IDS = [4, 0, 7]
VECTORS = [[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]]
OPTIONS = {"id_column": "item", "num_rows": 9, "dim": 2, "name": "graph"}


def message(path: str, **options) -> str:
    with pytest.raises(DataError) as error:
        read_vectors(path, **{**OPTIONS, **options})
    return str(error.value)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32(), 2),
        pa.list_(pa.float64(), 2),
        pa.list_(pa.float32()),
        pa.large_list(pa.float64()),
        pa.list_(pa.float16()),
    ],
    ids=str,
)
@pytest.mark.parametrize("id_kind", [pa.int16(), pa.uint64(), pa.dictionary(pa.int8(), pa.int32())], ids=str)
def test_every_form(write, kind, id_kind):
    vectors = [np.float16(v) for v in VECTORS] if kind.value_type == pa.float16() else VECTORS
    path = write({"item": pa.array(IDS, id_kind), "vector": pa.array(vectors, kind)})
    ids, vectors = read_vectors(path, **OPTIONS)
    assert ids.dtype == np.int64 and ids.tolist() == IDS
    assert vectors.dtype == np.float32 and vectors.tolist() == VECTORS
    assert peek_dim(path) == peek_dim(path, vector_column="vector") == 2


def test_integers_and_tensors(write):
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.array(VECTORS, np.float32))
    path = write({"item": IDS, "codes": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int8())), "t": tensors})
    assert read_vectors(path, **OPTIONS, vector_column="codes")[1].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert read_vectors(path, **OPTIONS, vector_column="t")[1].tolist() == VECTORS
    assert peek_dim(path, vector_column="t") == 2


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 2), pa.list_(pa.float32())], ids=str)
def test_a_null_vector_is_left_out(write, kind):
    vectors = [None, VECTORS[0], None, VECTORS[1], VECTORS[2], None]
    path = write({"item": [1, *IDS[:1], 2, *IDS[1:], 3], "vector": pa.array(vectors, kind)})
    ids, found = read_vectors(path, **OPTIONS)
    assert ids.tolist() == IDS and found.tolist() == VECTORS
    assert peek_dim(path) == 2


def test_row_groups_files_and_pieces(write, tmp_path, monkeypatch):
    monkeypatch.setattr("hmoe_rec.data.vectors.ROWS_AT_ONCE", 7)
    order, vectors = np.random.permutation(40), np.random.randn(40, 3).astype(np.float32)
    for part in range(2):
        rows = slice(part * 20, part * 20 + 20)
        columns = {"item": order[rows], "vector": pa.array(vectors[rows].tolist(), pa.list_(pa.float32(), 3))}
        write(columns, f"parts/part-{part}.parquet", row_group_size=9)
    ids, found = read_vectors(str(tmp_path / "parts"), **{**OPTIONS, "num_rows": 40, "dim": 3})
    assert ids.tolist() == order.tolist() and (found == vectors).all()


def test_what_is_not_there(write, tmp_path):
    path = write({"item": IDS, "vector": VECTORS, "more": VECTORS, "text": ["a", "b", "c"]})
    assert "no such file" in message(str(tmp_path / "other.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    assert "not a Parquet file, or damaged" in message(str(tmp_path / "bad.parquet"))
    assert "column itm (ids of frozen table graph): missing; there are: item" in message(path, id_column="itm")
    assert "did you mean 'item'?" in message(path, id_column="itm")
    assert "did you mean 'vector'?" in message(path, vector_column="vectr")
    assert "2 list columns (vector, more) for frozen table graph" in message(path)
    assert "column text is string; expected a list of numbers" in message(path, vector_column="text")
    assert "column text is string; expected integers" in message(path, id_column="text", vector_column="vector")
    words = write({"item": IDS, "words": [["a"], ["b"], ["c"]]}, "words.parquet")
    assert "column words is list<element: string>; expected a list of numbers" in message(words)
    none = write({"item": pa.array([], pa.int32()), "vector": pa.array([], pa.list_(pa.float32()))}, "none.parquet")
    assert "0 rows; expected the vectors of frozen table graph" in message(none)
    with pytest.raises(DataError, match="no vector in any row"):
        peek_dim(none)


@pytest.mark.parametrize(
    "row, vector, text",
    [
        (1, [1.0], "row 1 (row group 0), column vector: got '1 values', expected 2 (dim of frozen table graph)"),
        (2, [1.0, math.nan], "row 2 (row group 0), column vector: got nan, expected finite values"),
        (2, [None, 1.0], "row 2 (row group 0), column vector: got None, expected finite values"),
        (2, [1e39, 1.0], "row 2 (row group 0), column vector: got 1e+39, expected finite values"),
    ],
)
def test_wrong_vectors(write, row, vector, text):
    vectors = [None, *VECTORS[1:]]  # the row that a message names counts those without a vector
    vectors[row] = vector
    assert text in message(write({"item": IDS, "vector": vectors}))


def test_a_wrong_width_of_all(write):
    path = write({"item": IDS, "vector": pa.array(VECTORS, pa.list_(pa.float32(), 2))})
    assert "got '2 values', expected 3 (dim of frozen table graph); set dim" in message(path, dim=3)


@pytest.mark.parametrize(
    "ids, text",
    [
        ([4, None, 7], "row 1 (row group 0), column item: got None, expected an id"),
        ([4, 9, 11], "column item: 2 of 3 ids are outside the vocabulary of frozen table graph, such as 9; expected 0"),
        ([4, -1, 7], "column item: 1 of 3 ids are outside the vocabulary of frozen table graph, such as -1"),
        ([4, 2**64 - 1, 7], "1 of 3 ids are outside the vocabulary"),
        ([4, 7, 4], "1 of 2 ids have more than one vector, such as 4; expected one row per id of frozen table graph"),
    ],
)
def test_wrong_ids(write, ids, text):
    kind = pa.uint64() if max(x or 0 for x in ids) > 2**63 else pa.int64()
    assert text in message(write({"item": pa.array(ids, kind), "vector": VECTORS}))


@pytest.mark.data
def test_kuairand(data_dir):
    folder = data_dir / "kuairand_pure"
    if not folder.is_dir():
        pytest.skip(f"no KuaiRand-Pure: {folder} is not a folder")
    for source, count in {"graph_emb": 6824, "twotower": 7583}.items():
        path = str(folder / f"item_embeddings_{source}.parquet")
        assert peek_dim(path) == 64
        ids, vectors = read_vectors(path, id_column="video_id", num_rows=7583, dim=64, name=source)
        assert ids.shape == (count,) and vectors.shape == (count, 64)
        assert (np.linalg.norm(vectors, axis=1) > 0).all()


def test_a_vector_without_elements_says_nothing_of_the_width(write):
    vectors = pa.array([None, [], [0.5, 1.0, 2.0]], pa.list_(pa.float32()))
    assert peek_dim(write({"item": IDS, "vector": vectors})) == 3
