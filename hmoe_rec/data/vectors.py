"""A Parquet of pre-trained vectors, one row per id -> ids and vectors as arrays, checked."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hmoe_rec.data import fit
from hmoe_rec.data.columns import Place
from hmoe_rec.data.source import find_files, open_file, read_footer
from hmoe_rec.object_store import StorageError
from hmoe_rec.suggest import did_you_mean, listing
from hmoe_rec.types import DataError

ROWS_AT_ONCE = 1 << 16


def read_vectors(
    path: str, *, id_column: str, vector_column: str | None = None, num_rows: int, dim: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """All rows that have a vector; a null vector means that the id has none.

    Args:
        path: a Parquet file, a directory of them or a pattern; local or remote.
        id_column: integers.
        vector_column: lists of `dim` numbers; None = the only list column of the file.
        num_rows: ids must be in [0, num_rows).
        dim: V, width of the vectors.
        name: of the table, for messages.

    Returns:
        ids [n] int64, all different, and vectors [n, V] float32, all finite.

    Raises:
        DataError: no such file, missing or wrong columns, vectors of another width or with values that are not finite,
            ids that are null, outside the vocabulary or there twice.
    """
    ids, vectors = [np.empty(0, np.int64)], [np.empty((0, dim), np.float32)]
    for piece in _pieces(path, id_column, vector_column, name):
        valid = piece.vectors.is_valid().to_numpy(zero_copy_only=False)
        ids.append(_ids(piece, name)[valid])
        vectors.append(_vectors(piece, np.flatnonzero(valid), dim, name))
    all_ids = np.concatenate(ids)
    _check_ids(all_ids, num_rows, f"{path}, column {id_column}", name)
    return all_ids, np.concatenate(vectors)


def peek_dim(path: str, *, vector_column: str | None = None, name: str = "") -> int:
    """Width of the vectors of a file as `read_vectors` takes it: by its type, or else by its first vector.

    Raises:
        DataError: no such file, no such column, or no vector in it.
    """
    for file in find_files(path):
        found = read_footer(file).schema.to_arrow_schema()
        column = _vector_column(found, file, vector_column, name)
        kind = fit.plain(found.field(column).type)
        if pa.types.is_fixed_size_list(kind):
            return kind.list_size
        for _, batch in _batches(file, [column]):
            valid = _plain(batch.column(0)).drop_null()
            width = next((len(vector) for vector in valid if len(vector)), 0)
            if width:
                return width
    raise DataError(f"{path}: no vector in any row; expected at least one")


@dataclass(frozen=True)
class _Piece:
    """Some rows of a file."""

    place: Place
    id_column: str
    ids: pa.Array
    vector_column: str
    vectors: pa.Array


def _pieces(path: str, id_column: str, vector_column: str | None, name: str) -> Iterator[_Piece]:
    rows = 0
    for file in find_files(path):
        found = read_footer(file).schema.to_arrow_schema()
        _check_column(found, file, id_column, "ids", name)
        if not fit.is_integer(fit.plain(found.field(id_column).type)):
            remedy = "the field's ids are its rows, as with mode: vocabulary"
            raise DataError(f"{file}: column {id_column} is {found.field(id_column).type}; expected integers: {remedy}")
        column = _vector_column(found, file, vector_column, name)
        for place, batch in _batches(file, [id_column, column]):
            rows += len(batch)
            yield _Piece(place, id_column, _plain(batch.column(id_column)), column, _plain(batch.column(column)))
    if not rows:
        raise DataError(f"{path}: 0 rows; expected the vectors of {_table(name)}")


def _batches(file: str, columns: list[str]) -> Iterator[tuple[Place, pa.RecordBatch]]:
    try:
        with open_file(file) as handle:
            first = 0
            for group in range(handle.num_row_groups):
                for batch in handle.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                    yield Place(file, group, first), batch
                    first += len(batch)
    except StorageError as refused:
        raise DataError(str(refused)) from refused
    except (pa.ArrowException, OSError) as bad:
        raise DataError(f"{file}: cannot be read: {bad}; write the file again") from bad


def _check_column(found: pa.Schema, file: str, column: str, role: str, name: str) -> None:
    times = found.names.count(column)
    if times == 0:
        known = f"; there are: {listing(found.names)}{did_you_mean(column, found.names)}"
        raise DataError(f"{file}: column {column} ({role} of {_table(name)}): missing{known}")
    if times > 1:
        raise DataError(f"{file}: column {column}: there are {times} columns of this name; rename one")


def _vector_column(found: pa.Schema, file: str, column: str | None, name: str) -> str:
    if column is None:
        lists: list[str] = [c for c in found.names if fit.is_list(fit.plain(found.field(c).type))]
        if len(lists) != 1:
            raise DataError(
                f"{file}: {len(lists)} list columns ({listing(lists)}) for {_table(name)}; expected one, "
                "or say which with vector_column"
            )
        column = lists[0]
    _check_column(found, file, column, "vectors", name)
    kind = fit.plain(found.field(column).type)
    element = fit.plain(kind.value_type) if fit.is_list(kind) else pa.string()
    if not (fit.is_integer(element) or pa.types.is_floating(element)):
        raise DataError(f"{file}: column {column} is {kind}; expected a list of numbers per row, one vector each")
    return column


def _ids(piece: _Piece, name: str) -> np.ndarray:
    if piece.ids.null_count:
        row = int(np.argmax(piece.ids.is_null().to_numpy(zero_copy_only=False)))
        piece.place.fail(row, piece.id_column, None, f"an id (of {_table(name)})", "leave the row out")
    if pa.types.is_uint64(piece.ids.type):  # what does not fit is outside every vocabulary; do not let it wrap
        return np.minimum(piece.ids.to_numpy(), np.iinfo(np.int64).max).astype(np.int64)
    return piece.ids.cast(pa.int64()).to_numpy()


def _vectors(piece: _Piece, rows: np.ndarray, dim: int, name: str) -> np.ndarray:
    """[number of rows, V]; rows = those of the piece whose vector is not null."""
    lists = piece.vectors.drop_null()
    lengths = pc.call_function("list_value_length", [lists]).to_numpy(zero_copy_only=False)
    if (lengths != dim).any():
        at = int(np.argmax(lengths != dim))
        expected = f"{dim} (dim of {_table(name)})"
        remedy = "set dim to the vectors' width, or write vectors of one width"
        piece.place.fail(rows[at], piece.vector_column, f"{lengths[at]} values", expected, remedy)
    elements = _plain(lists.flatten())
    with np.errstate(over="ignore"):
        values = elements.to_numpy(zero_copy_only=False).astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        at = int(np.argmin(finite))
        remedy = "write a null vector, or leave the row out, where the vector is not known"
        expected = f"finite values of float32's range (vectors of {_table(name)})"
        piece.place.fail(rows[at // dim], piece.vector_column, elements[at], expected, remedy)
    return values.reshape(-1, dim)


def _check_ids(ids: np.ndarray, num_rows: int, where: str, name: str) -> None:
    outside = (ids < 0) | (ids >= num_rows)
    if outside.any():
        raise DataError(
            f"{where}: {outside.sum()} of {len(ids)} ids are outside the vocabulary of {_table(name)}, such as "
            f"{ids[outside][0]}; expected 0 <= id < {num_rows}; raise the field's num_embeddings, or leave them out"
        )
    distinct, counts = np.unique(ids, return_counts=True)
    if len(distinct) < len(ids):
        repeated = distinct[counts > 1]
        raise DataError(
            f"{where}: {len(repeated)} of {len(distinct)} ids have more than one vector, such as {repeated[0]}; "
            f"expected one row per id of {_table(name)}"
        )


def _plain(array: pa.Array) -> pa.Array:
    """Without extension type and dictionary."""
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    return array.dictionary_decode() if isinstance(array, pa.DictionaryArray) else array


def _table(name: str) -> str:
    return f"frozen table {name}" if name else "a frozen table"
