"""Embedding set x field -> TorchRec table configs. The only maker of table names."""

from collections.abc import Mapping, Sequence

from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType

from hmoe_rec.types import EmbeddingSet, Features, IdField, SchemaError

SEPARATOR = "__"
_POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}
PRECISIONS = {"fp32": DataType.FP32, "fp16": DataType.FP16}
Precision = str | Mapping[str, str]  # of all tables, or by table: missing ones are fp32


def table_name(set_name: str, field: str) -> str:
    """Also the name of the feature that is looked up in it, so that TorchRec never renames an output key."""
    return f"{set_name}{SEPARATOR}{field}"


def precision_of(table: str, precision: Precision) -> DataType:
    """
    Raises:
        SchemaError: a precision in which tables are not trained.
    """
    name = precision if isinstance(precision, str) else precision.get(table, "fp32")
    if name not in PRECISIONS:
        raise SchemaError(f"table {table!r}: precision {name!r}; tables are trained in {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def fields_of(embedding_set: EmbeddingSet, features: Features) -> tuple[str, ...]:
    """The set's fields, in the order of `Features.field_names`."""
    if not embedding_set.fields:
        return features.field_names
    return tuple(f for f in features.field_names if f in embedding_set.fields)


def sequence_targets(embedding_set: EmbeddingSet, features: Features) -> tuple[str, ...]:
    """Id fields whose table behavior columns of this set share; their rows come from the unpooled collection."""
    present = fields_of(embedding_set, features)
    shared = {target for column, target in features.targets.items() if column in present}
    return tuple(f.name for f in features.ids if f.name in shared)


def keys_of_target(embedding_set: EmbeddingSet, target: str, features: Features) -> tuple[str, ...]:
    """Keys of Batch.sparse that are looked up in a target's table: itself, where the set has it, then behaviors."""
    present = fields_of(embedding_set, features)
    keys = (target, *(column for column, t in features.targets.items() if t == target))
    return tuple(key for key in keys if key in present)


def pooled_fields(embedding_set: EmbeddingSet, features: Features) -> tuple[IdField, ...]:
    present, targets = fields_of(embedding_set, features), sequence_targets(embedding_set, features)
    return tuple(f for f in features.ids if f.name in present and f.name not in targets)


def check_names(sets: Sequence[EmbeddingSet], features: Features) -> None:
    """TorchRec stumbles over ".", "@" and "/" in table names, and two tables of one name would be one table.

    Raises:
        SchemaError: a name with such a character, or two tables of one name.
    """
    seen: dict[str, tuple[str, str]] = {}
    for name in [s.name for s in sets] + list(features.field_names):
        if not name or any(c in name for c in "./@ "):
            raise SchemaError(
                f"name {name!r}: names of sets and fields become table names; '.', '/', '@', ' ' are not allowed"
            )
    for s in sets:
        for field in fields_of(s, features):
            name = table_name(s.name, field)
            if name in seen:
                raise SchemaError(
                    f"table {name!r} would be made twice, for (set, field) {seen[name]} and {(s.name, field)}; "
                    "rename one of them"
                )
            seen[name] = (s.name, field)


def pooled_tables(
    sets: Sequence[EmbeddingSet], features: Features, precision: Precision = "fp32"
) -> list[EmbeddingBagConfig]:
    """Tables of the one EmbeddingBagCollection: every pooled field of every set."""
    return [
        EmbeddingBagConfig(
            name=table_name(s.name, f.name),
            feature_names=[table_name(s.name, f.name)],
            embedding_dim=s.dim,
            num_embeddings=f.num_rows,
            pooling=_POOLING[f.pooling],
            data_type=precision_of(table_name(s.name, f.name), precision),
        )
        for s in sets
        for f in pooled_fields(s, features)
    ]


def sequence_tables(
    sets: Sequence[EmbeddingSet], features: Features, precision: Precision = "fp32"
) -> dict[int, list[EmbeddingConfig]]:
    """Width -> tables of the unpooled EmbeddingCollection of that width (TorchRec allows one width a collection)."""
    tables: dict[int, list[EmbeddingConfig]] = {}
    for s in sets:
        for target in sequence_targets(s, features):
            config = EmbeddingConfig(
                name=table_name(s.name, target),
                feature_names=[table_name(s.name, key) for key in keys_of_target(s, target, features)],
                embedding_dim=s.dim,
                num_embeddings=features.id_field(target).num_rows,
                data_type=precision_of(table_name(s.name, target), precision),
            )
            tables.setdefault(s.dim, []).append(config)
    return tables
