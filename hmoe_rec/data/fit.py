"""A schema and a file's Arrow schema -> what does not fit: missing columns, types a role cannot take."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
from pyarrow import types as t

from hmoe_rec.data.schema import IdColumn, Schema
from hmoe_rec.suggest import nearest
from hmoe_rec.types import SchemaError


def misfits(found: pa.Schema, schema: Schema, columns: Sequence[str]) -> list[str]:
    """One line for each of `columns` that is missing, or whose type its role in the schema cannot take."""
    problems = []
    for name in columns:
        if name not in found.names:
            guess = nearest(name, found.names)
            remedy = f"did you mean {guess!r}?" if guess else f"there are: {', '.join(found.names)}"
            problems.append(f"column {name}: missing; {remedy}")
        elif found.names.count(name) > 1:
            problems.append(f"column {name}: there are {found.names.count(name)} columns of this name; rename one")
    for name, role, problem in _type_problems(found, schema):
        if name in columns and problem:
            problems.append(f"column {name} ({role}): is {found.field(name).type}; expected {problem}")
    return problems


def _type_problems(found: pa.Schema, schema: Schema) -> Iterator[tuple[str, str, str | None]]:
    def of(name: str) -> pa.DataType:
        return plain(found.field(name).type) if found.names.count(name) == 1 else pa.null()

    for c in schema.ids:
        wants = _id_problem if c.pooling is None else _bag_problem
        yield c.source, f"id field {c.name}", wants(of(c.source), c)
    for s in schema.sequences:
        for column, target in s.columns.items():
            role = f"sequence {s.name}, shares the table of {target}"
            yield column, role, _list_problem(of(column), schema.id_column(target))
        if s.times and s.exposure_time:
            yield s.times, f"times of {s.name}", _times_problem(of(s.times))
            scalar = None if _is_time(of(s.exposure_time)) else "numbers, timestamps or dates"
            yield s.exposure_time, f"exposure time of {s.name}", scalar
    for n in schema.numbers:
        yield n.source, f"number {n.name}", None if _is_number(of(n.source)) else "integers, floats or booleans"
    for v in schema.vectors:
        yield v.source, f"vector {v.name}", _vector_problem(of(v.source), v.dim)
    for task in schema.tasks:
        yield task.source, f"label of {task.name}", None if _is_number(of(task.source)) else "0, 1 or null as numbers"
    if schema.weight:
        yield schema.weight, "weight", None if _is_number(of(schema.weight)) else "numbers"
    if schema.user_key:
        fits = is_integer(of(schema.user_key)) or is_text(of(schema.user_key))
        yield schema.user_key, "user key", None if fits else "integers or strings"


def plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values: without dictionary encoding and extension."""
    while isinstance(kind, pa.DictionaryType | pa.BaseExtensionType):
        kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind.storage_type
    return kind


def decoded(kind: pa.DataType) -> pa.DataType:
    """The type without dictionary encoding."""
    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind


def common_type(name: str, kinds: Sequence[pa.DataType]) -> pa.DataType:
    """A type wide enough for a column's types in several files; dictionaries as what they stand for.

    Raises:
        SchemaError: there is none.
    """
    distinct = list(dict.fromkeys(decoded(kind) for kind in kinds))
    try:
        fields = [pa.schema([(name, kind)]) for kind in distinct]
        return pa.unify_schemas(fields, promote_options="permissive").field(0).type
    except pa.ArrowTypeError:
        types = ", ".join(map(str, distinct))
        raise SchemaError(f"column {name}: is {types} in different files; expected one type; write it alike") from None


def is_list(kind: pa.DataType) -> bool:
    return t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)


def is_text(kind: pa.DataType) -> bool:
    text = t.is_string(kind) or t.is_large_string(kind) or str(kind) in ("string_view", "binary_view")
    return text or t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind)


def is_integer(kind: pa.DataType) -> bool:
    """Integers and booleans; a column without any value has the null type and fits as well."""
    return t.is_integer(kind) or t.is_boolean(kind) or t.is_null(kind)


def _is_number(kind: pa.DataType) -> bool:
    return is_integer(kind) or t.is_floating(kind)


def _is_time(kind: pa.DataType) -> bool:
    return t.is_timestamp(kind) or t.is_date(kind) or (_is_number(kind) and not t.is_boolean(kind))


def _id_problem(kind: pa.DataType, column: IdColumn) -> str | None:
    if is_list(kind):
        return "one id per row; a list column needs pooling: sum or mean"
    return _element_problem(kind, column)


def _bag_problem(kind: pa.DataType, column: IdColumn) -> str | None:
    if not is_list(kind) and not t.is_null(kind):
        return "a list per row, since pooling is given; remove pooling for one id per row"
    return _list_problem(kind, column)


def _list_problem(kind: pa.DataType, column: IdColumn) -> str | None:
    if t.is_null(kind):
        return None
    return _element_problem(plain(kind.value_type), column) if is_list(kind) else "a list per row"


def _element_problem(kind: pa.DataType, column: IdColumn) -> str | None:
    if is_integer(kind) or (is_text(kind) and column.hashed):
        return None
    if is_text(kind):
        return f"integers, since {column.name} has mode: {column.mode}; strings need mode: hash or managed"
    return "integers (in pandas: Int64, which holds nulls), or strings with mode: hash or managed"


def _times_problem(kind: pa.DataType) -> str | None:
    if t.is_null(kind) or (is_list(kind) and _is_time(plain(kind.value_type))):
        return None
    return "a list of numbers, timestamps or dates per row"


def _vector_problem(kind: pa.DataType, dim: int) -> str | None:
    if t.is_null(kind):
        return None
    if not is_list(kind) or not _is_number(plain(kind.value_type)):
        return f"a list of {dim} floats per row"
    if t.is_fixed_size_list(kind) and kind.list_size != dim:
        return f"{dim} floats per row; set dim: {kind.list_size} in the schema, or write other vectors"
    return None
