"""The nouns that travel between the rooms, the letters that name tensor shapes, and the errors a user may meet.

Nothing here imports torch, so that the command line and the configuration can use it at once. The record that carries
tensors is `hmoe_rec.batch.Batch`.

Letters at the end of a tensor's name give its shape::

    B  examples of the (local) batch      F  fields an expert sees      D  width of an embedding set
    E  experts                            H  output width of an expert  T  tasks
    N  numbers                            L  behaviors of a sequence    S  embedding sets
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MISSING_LABEL = float("nan")
HASH_OF_MISSING = -0x61C8864680B583EB  # the 64-bit id that stands for "no value" in a hashed field with its own row


class HmoeError(ValueError):
    """A mistake in what was given to us. The command line prints it without a traceback.

    HmoeError
    ├── ConfigError      a run file or an override
    ├── SchemaError      a schema, or files that do not fit it
    ├── DataError        a value in a file
    ├── CheckpointError  a checkpoint that is missing, damaged, or of another model
    ├── PlanError        a sharding plan that cannot be made or does not fit
    ├── LockError        a directory that another process writes
    └── TrainingError    a run that cannot go on (a loss that is not finite)
    """


class ConfigError(HmoeError):
    pass


class SchemaError(HmoeError):
    pass


class DataError(HmoeError):
    pass


class CheckpointError(HmoeError):
    pass


class PlanError(HmoeError):
    pass


class LockError(HmoeError):
    pass


class TrainingError(HmoeError):
    pass


@dataclass(frozen=True)
class ManagedRows:
    """How a field's ids get rows of their own, and lose them.

    Attributes:
        evict: whose row a new id takes when all are taken: "lru" = the one not seen for longest; "lfu" = the one seen
            least often; "distance_lfu" = the least (times seen) / (steps since it was last seen + 1) ** decay.
        min_count: times an id must have been seen before it gets a row.
        shared_rows: further rows of the table; ids without a row of their own are hashed into them.
        ways: rows among which one id can be; each such group is managed by itself.
        waiting: per row, ids without a row that are remembered and counted.
        decay: of distance_lfu.
    """

    evict: str = "lru"
    min_count: int = 1
    shared_rows: int = 1
    ways: int = 32
    waiting: int = 1
    decay: float = 1.0


@dataclass(frozen=True)
class IdField:
    """One id feature of an example: a single id or a bag of ids.

    Attributes:
        name: the field's name, unique among all fields.
        num_embeddings: ids that the vocabulary holds, or buckets that ids are hashed into.
        hashed: ids arrive as raw 64-bit values; the model hashes or manages them.
        salt: of the hash: "set" = every embedding set has its own, so that ids which collide in one set are apart in
            another; "field" = one for all sets.
        managed: ids arrive raw as if hashed, and the live ones get rows of their own, the same in all sets.
        pooling: "sum" or "mean" over the ids of a bag.
        missing_row: the table has one more row, which stands for a missing value (ids that are not hashed only).
        multi_valued: a bag of any number of ids; False: at most one id per example.
    """

    name: str
    num_embeddings: int
    hashed: bool = False
    pooling: str = "sum"
    missing_row: bool = False
    multi_valued: bool = False
    salt: str = "set"
    managed: ManagedRows | None = None

    @property
    def num_rows(self) -> int:
        if self.managed is not None:
            return self.num_embeddings + self.managed.shared_rows
        return self.num_embeddings + (1 if self.missing_row and not self.hashed else 0)


@dataclass(frozen=True)
class SequenceField:
    """A user's behaviors, oldest first: one or more id columns of equal length.

    Attributes:
        name: the sequence's name.
        columns: pairs (behavior column, id field whose table it shares: its target).
        has_ages: the batch carries the seconds between each behavior and the exposure.
        max_length: behaviors kept, the latest ones.
    """

    name: str
    columns: tuple[tuple[str, str], ...]
    has_ages: bool = False
    max_length: int = 50


@dataclass(frozen=True)
class NumberStatistics:
    """What the training data says of a number, in raw values: fitted once, saved with the run (`hmoe-rec data fit`).

    Attributes:
        count: values that are there.
        missing: values that are not.
        minimum, maximum: over all values.
        low, high: the 0.1 % and the 99.9 % quantile.
        integral: all values are whole numbers.
        quantiles: at equally spaced probabilities from 0 to 1.
        log_square_bins: the log-square bins that at least ten values fall into, ascending.
    """

    count: int
    missing: int
    minimum: float
    maximum: float
    low: float
    high: float
    integral: bool
    quantiles: tuple[float, ...]
    log_square_bins: tuple[int, ...] = ()


@dataclass(frozen=True)
class NumberField:
    """A number of the example, as the batch carries it: (transform(raw) - mean) / std.

    Attributes:
        transform: "none", "log1p" or "slog" = sign(x) log(1 + |x|).
        bounds: the least and the largest raw value, where they are known beforehand (a cosine: -1, 1).
        statistics: None = not fitted.
    """

    name: str
    transform: str = "none"
    mean: float = 0.0
    std: float = 1.0
    bounds: tuple[float, float] | None = None
    statistics: NumberStatistics | None = None


@dataclass(frozen=True)
class VectorField:
    """A pre-trained vector that comes with the example."""

    name: str
    dim: int


@dataclass(frozen=True)
class Features:
    """All that the model needs to know of the data. Field order: ids, behavior columns, numbers, vectors."""

    ids: tuple[IdField, ...]
    sequences: tuple[SequenceField, ...] = ()
    numbers: tuple[NumberField, ...] = ()
    vectors: tuple[VectorField, ...] = ()

    @property
    def sparse_keys(self) -> tuple[str, ...]:
        """Keys of `Batch.sparse`, always in this order."""
        return tuple(f.name for f in self.ids) + self.behavior_columns

    @property
    def behavior_columns(self) -> tuple[str, ...]:
        return tuple(column for sequence in self.sequences for column, _ in sequence.columns)

    @property
    def targets(self) -> dict[str, str]:
        """Behavior column -> the id field whose table it shares."""
        return {column: target for sequence in self.sequences for column, target in sequence.columns}

    @property
    def field_names(self) -> tuple[str, ...]:
        """Every field an expert may see."""
        return (*self.sparse_keys, *(n.name for n in self.numbers), *(v.name for v in self.vectors))

    def id_field(self, name: str) -> IdField:
        return next(f for f in self.ids if f.name == name)


@dataclass(frozen=True)
class EmbeddingSet:
    """A named group of tables, one per field, all of one width.

    Attributes:
        dim: D, the width.
        fields: names of the fields it embeds; empty = all.
        owner: the task it belongs to (STEM), for display; None = shared.
    """

    name: str
    dim: int
    fields: tuple[str, ...] = ()
    owner: str | None = None


@dataclass(frozen=True)
class FrozenTable:
    """Pre-trained vectors keyed by the ids of a field; never trained, kept whole on every process.

    Attributes:
        field: the id field whose ids are its rows; not hashed.
        dim: width.
        path: Parquet with a row per id; None = filled by `FrozenVectors.fill`.
        id_column, vector_column: the file's columns; None = the field's name, and the one list column.
    """

    name: str
    field: str
    dim: int
    path: str | None = None
    id_column: str | None = None
    vector_column: str | None = None


Part = Mapping[str, Any]


@dataclass(frozen=True)
class Encoding:
    """How raw values become vectors of an embedding set: kinds and options of the encoders.

    Attributes:
        numbers: of every number, such as {"kind": "mnse"}.
        sequences: of every behavior sequence, such as {"kind": "tim"}.
        fields: number, sequence or similarity -> its own {"kind": ...}, in place of the two above.
        similarities: name -> {"kind": "cosine", ...}: further numbers and vectors made of pre-trained vectors.
        frozen: pre-trained vectors keyed by id.
        sequence_fields: the pooled behaviors are fields of the set; False: only experts of kind "sequence" see them.
        vector_fields: pre-trained vectors are fields through a linear layer; False: only similarities see them.
    """

    numbers: Part = field(default_factory=lambda: {"kind": "scalar"})
    sequences: Part = field(default_factory=lambda: {"kind": "mean"})
    fields: Mapping[str, Part] = field(default_factory=dict)
    similarities: Mapping[str, Part] = field(default_factory=dict)
    frozen: tuple[FrozenTable, ...] = ()
    sequence_fields: bool = True
    vector_fields: bool = True
