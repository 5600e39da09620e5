"""Names, kinds and sizes -> the parts of a model: what the rooms need to be told of each other."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hmoe_rec.embedding.tables import fields_of, pooled_fields, sequence_targets
from hmoe_rec.encoding import NUMBERS, SIMILARITIES, part_of_number
from hmoe_rec.encoding.fields import FieldEncoder
from hmoe_rec.encoding.similarity import Similarities
from hmoe_rec.experts import EXPERTS
from hmoe_rec.kinds import resolve
from hmoe_rec.towers import TOWERS
from hmoe_rec.towers.layout import ExpertSpec
from hmoe_rec.types import EmbeddingSet, Encoding, Features, NumberField


def make_similarities(features: Features, encoding: Encoding) -> Similarities | None:
    """
    Raises:
        ValueError: a kind or options that cannot be built.
    """
    if not encoding.similarities:
        return None
    return Similarities(features, encoding.similarities, encoding.frozen, SIMILARITIES)


def with_similarities(features: Features, similarities: Similarities | None) -> Features:
    """The fields of the data, and the numbers and vectors that similarities add."""
    if similarities is None:
        return features
    numbers, vectors = features.numbers + similarities.numbers, features.vectors + similarities.vectors
    return replace(features, numbers=numbers, vectors=vectors)


def needs_statistics(number: NumberField, encoding: Encoding) -> bool:
    """Its encoder cannot be built rightly without `NumberField.statistics`."""
    options = dict(part_of_number(number, encoding))
    return bool(resolve(options.pop("kind"), NUMBERS).missing_statistics([number], options))


def field_encoder(
    features: Features, s: EmbeddingSet, encoding: Encoding, experts: Sequence[ExpertSpec]
) -> FieldEncoder:
    """Of one embedding set; features with similarities.

    Raises:
        ValueError: a kind or options that cannot be built.
    """
    kinds = [resolve(spec.kind, EXPERTS) for spec in experts if spec.set == s.name]
    return FieldEncoder(
        features,
        fields=fields_of(s, features),
        pooled=[f.name for f in pooled_fields(s, features)],
        targets=sequence_targets(s, features),
        dim=s.dim,
        encoding=encoding,
        with_interests=any(_reads_interests(kind) for kind in kinds),
    )


def expert_sizes(kind: type, encoder: FieldEncoder, expert_dim: int) -> tuple[int, int, int]:
    """What an expert of this kind gets as its positional arguments: fields (or interests) of its set, D and H.

    Raises:
        ValueError: the kind reads interests, and the set has no behavior sequence.
    """
    if not _reads_interests(kind):
        return encoder.num_fields, encoder.dim, expert_dim
    if not encoder.num_interests:
        raise ValueError("it reads behavior sequences, and its set has none; let it read another set, or give one")
    return encoder.num_interests, encoder.dim, expert_dim


def make_expert(spec: ExpertSpec, encoder: FieldEncoder, expert_dim: int) -> nn.Module:
    kind = resolve(spec.kind, EXPERTS)
    options = dict(spec.options)
    if "field_names" in inspect.signature(kind).parameters:
        options["field_names"] = encoder.field_names
    return kind(*expert_sizes(kind, encoder, expert_dim), **options)


def make_towers(
    tower: Mapping[str, Any], tasks: Sequence[str], in_dims: Sequence[int], two_logits: Sequence[str] = ()
) -> nn.Module:
    """
    Args:
        tower: the kind and its options.
        two_logits: tasks whose tower has a logit per class.

    Raises:
        ValueError: a kind or options that cannot be built.
    """
    options = dict(tower)
    kind = resolve(options["kind"], TOWERS)
    if two_logits:
        if "two_logits" not in inspect.signature(kind).parameters:
            raise ValueError(
                f"towers of kind {options['kind']} have one logit, and a loss of {two_logits[0]} needs two"
            )
        options["two_logits"] = two_logits
    return kind(tasks, in_dims, **{name: value for name, value in options.items() if name != "kind"})


def _reads_interests(kind: type) -> bool:
    return getattr(kind, "reads", "fields") == "interests"
