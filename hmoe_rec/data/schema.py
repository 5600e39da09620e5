"""A YAML text or a dict -> `Schema`: which column of a file is which input, label or key of the model.

::

    ids:
      - {name: user_id, num_embeddings: 27300}
      - {name: city, column: city_name, num_embeddings: 5000, mode: hash, missing: own_row}
      - {name: ad_id, num_embeddings: 100000, mode: managed, managed: {evict: lru, min_count: 2}}
      - {name: tags, num_embeddings: 70, pooling: mean}                     a list column: a bag of ids
    sequences:
      - name: history
        columns: {hist_video_id: video_id}                                  list column: id field whose table it shares
        times: hist_time_s
        exposure_time: time_s
        max_length: 50
    numbers:
      - {name: duration, column: duration_ms, transform: log1p, mean: 9.1, std: 1.2}
    vectors:
      - {name: graph_emb, dim: 64}
    tasks:
      - {name: click, label: is_click}
    weight: instance_weight
    user_key: user_id
    keys: [user_id, video_id]
    time: time_ms

Every mistake in it is reported at once, each with its path, its value and the nearest valid name. No torch, no Arrow.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from hmoe_rec.data.strict import Part, hint, render_problem
from hmoe_rec.types import Features, IdField, ManagedRows, NumberField, SchemaError, SequenceField, VectorField

INT32_ROWS = 2**31 - 2  # ids that are not hashed travel as int32, and one row may stand for "missing"
HASHED = ("hash", "managed")  # modes whose ids are any integers or strings

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Column = Annotated[str, Field(min_length=1)]


class Managed(Part):
    """How the ids of a field of mode managed get rows of their own, and lose them; see `hmoe_rec.types.ManagedRows`.

    Attributes:
        evict: whose row a new id takes when all are taken: "lru": the one not seen for longest; "lfu": the one seen
            least often; "distance_lfu": the least (times seen) / (steps since then + 1) ** decay.
        min_count: times an id must have been seen before it gets a row.
        shared_rows: further rows, into which ids without one of their own are hashed (null = an eighth of
            num_embeddings).
        ways: rows among which an id can be.
        waiting: per row, ids without a row that are remembered and counted (unless lru with min_count 1, which needs
            none).
        decay: exponent of distance_lfu.
    """

    evict: Literal["lru", "lfu", "distance_lfu"] = "lru"
    min_count: int = Field(default=1, ge=1)
    shared_rows: int | None = Field(default=None, ge=1)
    ways: int = Field(default=32, ge=1, le=256)
    waiting: int = Field(default=1, ge=1, le=16)
    decay: float = Field(default=1.0, ge=0)


class IdColumn(Part):
    """One id field.

    Attributes:
        name: the field's name in the model.
        column: the file's column; the name where not given.
        num_embeddings: size of the vocabulary, or number of buckets.
        mode: "vocabulary": 0 <= id < num_embeddings is checked; "modulo": id % num_embeddings; "hash": any integer or
            string, hashed into num_embeddings buckets by the model; "managed": any integer or string, and the live
            ones have one of num_embeddings rows for themselves.
        managed: of mode managed: who gets a row, and who loses it.
        salt: of mode hash: "set": every embedding set hashes with its own, so that ids which collide in one set are
            apart in another; "field": one for all sets.
        missing: what a null is: "zero" = no id, so a zero vector; "own_row" = a row that stands for "missing".
        pooling: "sum" or "mean" for a list column (a bag of ids); not given = one id per example.
        max_length: ids kept of a bag, the first ones.
    """

    name: Name
    column: Column | None = None
    num_embeddings: int = Field(ge=1)
    mode: Literal["vocabulary", "modulo", "hash", "managed"] = "vocabulary"
    missing: Literal["zero", "own_row"] = "zero"
    pooling: Literal["sum", "mean"] | None = None
    max_length: int | None = Field(default=None, ge=1)
    salt: Literal["set", "field"] = "set"
    managed: Managed | None = None

    @classmethod
    def _cross_problems(cls, given):
        rows = given.get("num_embeddings")
        if given.get("mode") not in HASHED and isinstance(rows, int) and rows > INT32_ROWS:
            yield ("num_embeddings",), f"a field that is not hashed has at most {INT32_ROWS} rows; use mode: hash", rows
        if given.get("max_length") is not None and given.get("pooling") is None:
            yield ("max_length",), "is for list columns, which also need pooling: sum or mean", given["max_length"]
        for key, mode in (("salt", "hash"), ("managed", "managed")):
            if given.get(key) is not None and given.get("mode") != mode:
                yield (key,), f"is for mode: {mode}; remove it", given[key]
        if given.get("mode") == "managed" and isinstance(rows, int):
            managed = given.get("managed")
            ways = managed.get("ways", 32) if isinstance(managed, Mapping) else getattr(managed, "ways", 32)
            if isinstance(ways, int) and 1 <= ways < rows and rows % ways:
                near = f"{rows // ways * ways} or {-(-rows // ways) * ways}"
                yield ("num_embeddings",), f"rows are managed in groups of {ways} (managed.ways); give {near}", rows

    @property
    def source(self) -> str:
        return self.column or self.name

    @property
    def hashed(self) -> bool:
        """Ids travel as raw 64-bit values."""
        return self.mode in HASHED

    def field(self) -> IdField:
        return IdField(
            name=self.name,
            num_embeddings=self.num_embeddings,
            hashed=self.hashed,
            pooling=self.pooling or "sum",
            missing_row=self.missing == "own_row",
            multi_valued=self.pooling is not None,
            salt=self.salt,
            managed=self._managed() if self.mode == "managed" else None,
        )

    def _managed(self) -> ManagedRows:
        m = self.managed or Managed()
        shared = m.shared_rows or max(1, self.num_embeddings // 8)
        return ManagedRows(m.evict, m.min_count, shared, m.ways, m.waiting, m.decay)


class SequenceColumns(Part):
    """A behavior sequence: list columns of equal lengths, oldest first.

    Attributes:
        columns: list column -> id field whose table, mode and treatment of nulls it shares.
        times: list column, when each behavior happened; numbers in `time_unit`, or Arrow timestamps or dates.
        exposure_time: scalar column, when the example was shown; age = exposure_time - times.
        max_length: behaviors kept, the latest ones.
    """

    name: Name
    columns: dict[Name, str] = Field(min_length=1)
    times: Column | None = None
    exposure_time: Column | None = None
    time_unit: Literal["s", "ms"] = "s"
    max_length: int = Field(default=50, ge=1)

    @classmethod
    def _cross_problems(cls, given):
        for one, other in (("times", "exposure_time"), ("exposure_time", "times")):
            if given.get(one) is not None and given.get(other) is None:
                yield (other,), f"needed beside {one}: an age is exposure_time - times", None

    def field(self) -> SequenceField:
        return SequenceField(self.name, tuple(self.columns.items()), self.times is not None, self.max_length)


class NumberColumn(Part):
    """One number: (transform(x) - mean) / std. slog(x) = sign(x) log(1 + |x|). A null is NaN in the batch."""

    name: Name
    column: Column | None = None
    transform: Literal["none", "log1p", "slog"] = "none"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)

    @property
    def source(self) -> str:
        return self.column or self.name

    def field(self) -> NumberField:
        return NumberField(self.name, self.transform, self.mean, self.std)


class VectorColumn(Part):
    """One list column of `dim` floats, such as a pre-trained embedding. A null is the zero vector."""

    name: Name
    column: Column | None = None
    dim: int = Field(ge=1)

    @property
    def source(self) -> str:
        return self.column or self.name


class Task(Part):
    """One label column with 0, 1 or null (= not known, masked out of loss and metrics)."""

    name: Name
    label: Column | None = None

    @property
    def source(self) -> str:
        return self.label or self.name


class Schema(Part):
    """Which column is what.

    Attributes:
        weight: column with each example's weight (>= 0) in loss and metrics.
        user_key: column with whatever groups examples for GAUC and losses within a user; a null belongs to no group.
        keys: columns carried to the predictions' file.
        time: column with the time of the event.
    """

    ids: tuple[IdColumn, ...]
    sequences: tuple[SequenceColumns, ...] = ()
    numbers: tuple[NumberColumn, ...] = ()
    vectors: tuple[VectorColumn, ...] = ()
    tasks: tuple[Task, ...]
    weight: Column | None = None
    user_key: Column | None = None
    keys: tuple[Column, ...] = ()
    time: Column | None = None

    @classmethod
    def _cross_problems(cls, given):
        for section in ("ids", "tasks"):
            if section in given and not given[section]:
                yield (section,), "expected at least one", given[section]
        yield from _duplicate_names(given)
        single = [p["name"] for _, p in _parts(given, "ids") if "name" in p and p.get("pooling") is None]
        for i, sequence in _parts(given, "sequences"):
            columns = sequence.get("columns")
            for column, target in columns.items() if isinstance(columns, Mapping) else ():
                if target not in single:
                    known = f"{hint(target, single)} (an id field without pooling whose table it shares)"
                    yield ("sequences", i, "columns", column), f"names no single-valued id field{known}", target

    def features(self) -> Features:
        """All that the model needs to know of the data."""
        return Features(
            ids=tuple(c.field() for c in self.ids),
            sequences=tuple(s.field() for s in self.sequences),
            numbers=tuple(n.field() for n in self.numbers),
            vectors=tuple(VectorField(v.name, v.dim) for v in self.vectors),
        )

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def id_column(self, name: str) -> IdColumn:
        return next(c for c in self.ids if c.name == name)

    def read_columns(self, with_labels: bool = True) -> tuple[str, ...]:
        """Columns of the file that make a Batch, each once; without labels also without weight and user key."""
        columns = [c.source for c in self.ids]
        for s in self.sequences:
            columns += [*s.columns, *(c for c in (s.times, s.exposure_time) if c)]
        columns += [c.source for c in (*self.numbers, *self.vectors)]
        if with_labels:
            columns += [t.source for t in self.tasks] + [c for c in (self.weight, self.user_key) if c]
        return tuple(dict.fromkeys(columns))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts without what equals a default; `load_schema` reads it back to an equal schema."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_yaml(self) -> str:
        """One line per field; `load_schema` reads it back to an equal schema."""
        lines = []
        for key, value in self.to_dict().items():
            if isinstance(value, list) and isinstance(value[0], dict):
                lines += [f"{key}:", *(f"  - {_flow(part)}" for part in value)]
            else:
                lines.append(_flow({key: value})[1:-1])
        return "\n".join(lines) + "\n"


def load_schema(given: "str | Path | Mapping[str, Any] | Schema", *, where: str | None = None) -> Schema:
    """A schema from a YAML file (path or URI), a dict or a schema.

    Args:
        where: what the messages call the source; the path, or "schema", where not given.

    Raises:
        SchemaError: the file is missing or is no YAML mapping, or with every problem of the schema, one a line.
    """
    if isinstance(given, Schema):
        return given
    if isinstance(given, str | Path):
        where, given = where or str(given), _read_yaml(str(given))
    where = where or "schema"
    if not isinstance(given, Mapping):
        raise SchemaError(f"{where}: expected a mapping with ids, tasks, ...; got {type(given).__name__}")
    try:
        return Schema.model_validate(dict(given))
    except ValidationError as invalid:
        problems = [render_problem(e) for e in invalid.errors()]
        raise SchemaError("\n  ".join([f"{where}: {len(problems)} problem(s)", *problems])) from None


def _read_yaml(uri: str) -> Any:
    import yaml

    from hmoe_rec import io

    try:
        with io.open(uri, "r") as file:
            return yaml.safe_load(file)
    except FileNotFoundError:
        raise SchemaError(f"{uri}: no such schema file") from None
    except yaml.YAMLError as bad:
        raise SchemaError(f"{uri}: not a YAML file: {bad}") from None


def _parts(given: Mapping[str, Any], section: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    found = given.get(section)
    for i, part in enumerate(found if isinstance(found, list | tuple) else ()):
        part = part.model_dump() if isinstance(part, Part) else part
        if isinstance(part, Mapping):
            yield i, part


def _duplicate_names(given: Mapping[str, Any]) -> Iterator[tuple[tuple, str, Any]]:
    """Field names (ids, behavior columns, numbers, vectors) share one space; sequences and tasks have their own."""
    fields = [((s, i, "name"), p.get("name")) for s in ("ids", "numbers", "vectors") for i, p in _parts(given, s)]
    for i, sequence in _parts(given, "sequences"):
        columns = sequence.get("columns")
        fields += [(("sequences", i, "columns", c), c) for c in (columns if isinstance(columns, Mapping) else ())]
    sequences, tasks = ([((s, i, "name"), p.get("name")) for i, p in _parts(given, s)] for s in ("sequences", "tasks"))
    for space in (fields, sequences, tasks):
        seen: dict[Any, tuple] = {}
        for loc, name in space:
            if isinstance(name, str) and name in seen:
                yield loc, f"name already used at {'.'.join(map(str, seen[name]))}", name
            elif isinstance(name, str):
                seen[name] = loc


def _flow(part: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(part, default_flow_style=True, sort_keys=False, width=10**6).strip()
