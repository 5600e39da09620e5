r"""Pre-trained vectors -> further numbers [B, N] and vectors [B, V] of the example, once for all embedding sets.

A pre-trained vector lives in a space of its own; what carries over to the recommender is how near two of them are.
SimEnc takes that nearness as a number, which is then encoded as any other number:

.. math:: w = \mathrm{sim}(\text{user's vector}, \text{item's vector}), \qquad \mathrm{field} = \mathrm{MNSE}(w)

Source: Pan et al., "Ads Recommendation in a Collapsed and Entangled World", KDD 2024, arXiv 2403.00793, similarity
encoding. That sim is a cosine is second-hand; products, histories and the rule for missing vectors are ours.

A vector is a column of the batch (`Features.vectors`) or the row of an id in a frozen table. The zero vector stands
for "none": a similarity that lacks one of its vectors is missing (NaN). Nothing here has parameters or a gradient, and
all of it is float32, under autocast too, because nothing here is a matrix product. Letters of shapes: as in
`hmoe_rec.encoding.frozen`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hmoe_rec.batch import Batch
from hmoe_rec.encoding.frozen import FrozenVectors, Reader
from hmoe_rec.kinds import Kinds, resolve
from hmoe_rec.layers import can_name_module
from hmoe_rec.suggest import unknown
from hmoe_rec.types import Features, FrozenTable, IdField, NumberField, VectorField


class Similarities(nn.Module):
    """All similarities of a model: Batch -> (further numbers, further vectors).

    Args:
        features: fields of the data.
        similarities: name -> {"kind": ..., options}.
        frozen: the pre-trained vectors keyed by id.
        registry: kind -> "module:Class".

    Attributes:
        numbers: what the columns of the further numbers are.
        vectors: what lies side by side in the further vectors.
        tables: name -> `FrozenVectors`, empty until filled or loaded.

    Raises:
        ValueError: unknown names, names that are taken, options or widths that do not fit.
    """

    def __init__(
        self,
        features: Features,
        similarities: Mapping[str, Mapping[str, Any]],
        frozen: Sequence[FrozenTable],
        registry: Kinds,
    ) -> None:
        super().__init__()
        self.features = features
        self.frozen = _by_name(frozen, features)
        self.parts = tuple(_made(name, given, features, self.frozen, registry) for name, given in similarities.items())
        self.numbers = tuple(part.gives for part in self.parts if isinstance(part.gives, NumberField))
        self.vectors = tuple(part.gives for part in self.parts if isinstance(part.gives, VectorField))
        self.tables = nn.ModuleDict(
            {name: FrozenVectors(frozen_field(t, features).num_rows, t.dim) for name, t in self.frozen.items()}
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> numbers [B, N] float32 with NaN = missing, and vectors [B, V] float32 side by side."""
        reader = Reader(batch, self.features, self.frozen, cast(Mapping[str, FrozenVectors], self.tables))
        values = [(part.gives, part(reader)) for part in self.parts]
        numbers = [value_B for gives, value_B in values if isinstance(gives, NumberField)]
        vectors = [value_BV for gives, value_BV in values if isinstance(gives, VectorField)]
        return (
            torch.stack(numbers, dim=1) if numbers else batch.numbers[:, :0],
            torch.cat(vectors, dim=1) if vectors else batch.vectors[:, :0],
        )


class Similarity:
    """One further number or vector of the example. Its options are the keyword-only arguments of the constructor.

    Subclasses take (name, features, frozen tables by name, *, options), raise ValueError where these do not fit, and
    implement `__call__`.

    Attributes:
        gives: the number or the vector.
    """

    def __init__(self, gives: NumberField | VectorField) -> None:
        self.gives = gives

    def __call__(self, reader: Reader) -> Tensor:
        """-> [B] with NaN = missing for a number, [B, V] for a vector."""
        raise NotImplementedError


class Cosine(Similarity):
    """SimEnc: the cosine of two vectors, w = <a, b> / (|a| |b|), in [-1, 1].

    Args:
        of: two vectors, each a vector column or a frozen table (the vector of the example's id).

    Source: arXiv 2403.00793, similarity encoding.
    """

    def __init__(self, name: str, features: Features, frozen: Mapping[str, FrozenTable], *, of: Sequence[str]) -> None:
        super().__init__(NumberField(name, bounds=(-1.0, 1.0)))
        self.of = _two_vectors(of, features, frozen)

    def __call__(self, reader: Reader) -> Tensor:
        return cosine(reader.vector(self.of[0]), reader.vector(self.of[1]))


class Dot(Similarity):
    """The product w = <a, b> of two vectors whose lengths say something, such as those of two towers. Ours.

    Args:
        of: two vectors, each a vector column or a frozen table (the vector of the example's id).
        low, high: bounds of the product, for encoders that need them.
    """

    def __init__(
        self,
        name: str,
        features: Features,
        frozen: Mapping[str, FrozenTable],
        *,
        of: Sequence[str],
        low: float,
        high: float,
    ) -> None:
        super().__init__(NumberField(name, bounds=_bounds(low, high)))
        self.of = _two_vectors(of, features, frozen)

    def __call__(self, reader: Reader) -> Tensor:
        return dot(reader.vector(self.of[0]), reader.vector(self.of[1]))


class History(Similarity):
    r"""The mean of the behaviors' frozen vectors against the target's: SimEnc for users without a vector. Ours.

    .. math:: w = \mathrm{sim}\Big(\frac{1}{|H|} \sum_{i \in H} f(x_i), f(x_t)\Big), \qquad H = \{i : f(x_i) \neq 0\}

    Missing where no behavior has a vector, or the target has none; a cosine also where the mean is zero.

    Args:
        vectors: the frozen table f; the target is the example's id of its field.
        sequence: the behavior sequence; its column that shares the field's ids is read.
        measure: "cosine" in [-1, 1], or "dot".
        low, high: bounds of the product, for "dot" only.
    """

    def __init__(
        self,
        name: str,
        features: Features,
        frozen: Mapping[str, FrozenTable],
        *,
        vectors: str,
        sequence: str,
        measure: Literal["cosine", "dot"] = "cosine",
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        if measure not in ("cosine", "dot"):
            raise ValueError(f"measure must be 'cosine' or 'dot', got {measure!r}")
        if measure == "cosine" and (low, high) != (None, None):
            raise ValueError("low and high are for measure: dot; a cosine is in [-1, 1]")
        bounds = (-1.0, 1.0) if measure == "cosine" else _bounds(low, high)
        super().__init__(NumberField(name, bounds=bounds))
        self.measure = measure
        self.table, self.column = _table_and_column(vectors, sequence, features, frozen)

    def __call__(self, reader: Reader) -> Tensor:
        sum_BV, target_BV = reader.sum_of_behaviors(self.table, self.column), reader.vector(self.table)
        if self.measure == "cosine":
            return cosine(sum_BV, target_BV)
        number_B = reader.number_of_behaviors(self.table, self.column)
        mean_B = (sum_BV * target_BV).sum(1) / number_B  # 0 / 0 = NaN: no behavior has a vector
        return torch.where((target_BV != 0).any(1), mean_B, float("nan"))


class Tiers(Similarity):
    r"""SimTier: how many behaviors are how near to the target, as a vector.

    .. math:: h_k = \log\big(1 + |\{i : \cos(f(x_i), f(x_t)) \in \mathrm{tier}_k\}|\big)

    Tiers are equal parts of [-1, 1], each with its lower bound, the last one with both. A behavior without a vector is
    in none; all is 0 where the target has no vector.

    Args:
        vectors: the frozen table f; the target is the example's id of its field.
        sequence: the behavior sequence; its column that shares the field's ids is read.
        num_tiers: parts of [-1, 1].

    Source: Sheng et al., "Enhancing Taobao Display Advertising with Multimodal Representations", CIKM 2024,
    arXiv 2407.19467, SimTier. There the plain counts go into the MLP; the logarithm (counts grow with the history) and
    the linear layer that follows here are ours.
    """

    def __init__(
        self,
        name: str,
        features: Features,
        frozen: Mapping[str, FrozenTable],
        *,
        vectors: str,
        sequence: str,
        num_tiers: int = 10,
    ) -> None:
        if num_tiers < 1:
            raise ValueError(f"num_tiers must be >= 1, got {num_tiers}")
        super().__init__(VectorField(name, num_tiers))
        self.num_tiers = num_tiers
        self.table, self.column = _table_and_column(vectors, sequence, features, frozen)

    def __call__(self, reader: Reader) -> Tensor:
        _, example_J, first_B = reader.behaviors(self.column)
        cosines_J = reader.cosines_of_behaviors(self.table, self.column)
        return _histogram(cosines_J, example_J, first_B, self.num_tiers).log1p()


class Vector(Similarity):
    """The frozen vector of the example's id as it is: the baseline that SimEnc is compared with.

    Args:
        of: the frozen table.
    """

    def __init__(self, name: str, features: Features, frozen: Mapping[str, FrozenTable], *, of: str) -> None:
        if of not in frozen:
            raise ValueError(f"of: {unknown('frozen table', of, frozen)}")
        frozen_field(frozen[of], features)
        super().__init__(VectorField(name, frozen[of].dim))
        self.of = of

    def __call__(self, reader: Reader) -> Tensor:
        return reader.vector(self.of)


@torch.fx.wrap
def _histogram(cosines_J: Tensor, example_J: Tensor, first_B: Tensor, num_tiers: int) -> Tensor:
    """[B, num_tiers]: cosines in each of equal parts of [-1, 1]; NaN counts nowhere."""
    tier_J = ((cosines_J + 1.0) * (num_tiers / 2)).nan_to_num(0.0).long().clamp(0, num_tiers - 1)
    counts = torch.zeros(len(first_B) * num_tiers, device=cosines_J.device)
    # Sums of ones are exact, so their order does not matter.
    counts = counts.index_add(0, example_J * num_tiers + tier_J, (~cosines_J.isnan()).to(torch.float32))
    return counts.view(len(first_B), num_tiers)


def cosine(a_BV: Tensor, b_BV: Tensor) -> Tensor:
    """[B] in [-1, 1]; NaN where either is the zero vector (0 / 0)."""
    norms_a_B, norms_b_B = torch.linalg.vector_norm(a_BV, dim=1), torch.linalg.vector_norm(b_BV, dim=1)
    # Divided one after the other: the product of two small lengths may be 0.
    return ((a_BV * b_BV).sum(1) / norms_a_B / norms_b_B).clamp(-1.0, 1.0)


def dot(a_BV: Tensor, b_BV: Tensor) -> Tensor:
    """[B]; NaN where either is the zero vector."""
    known_B = (a_BV != 0).any(1) & (b_BV != 0).any(1)
    return torch.where(known_B, (a_BV * b_BV).sum(1), float("nan"))


def frozen_field(table: FrozenTable, features: Features) -> IdField:
    """The id field whose ids are the rows of a frozen table.

    Raises:
        ValueError: no such field, a hashed one, or one with several ids per example.
    """
    fields = {f.name: f for f in features.ids}
    if table.field not in fields:
        raise ValueError(f"frozen table {table.name!r}: {unknown('id field', table.field, fields)}")
    field = fields[table.field]
    if field.hashed:
        raise ValueError(
            f"frozen table {table.name!r}: the ids of field {field.name!r} are hashed, so they are no rows of a table "
            "of vectors; use mode: vocabulary"
        )
    if field.multi_valued:
        raise ValueError(
            f"frozen table {table.name!r}: field {field.name!r} holds several ids per example; expected a field with "
            "one (a bag's vectors can be a behavior sequence)"
        )
    return field


def _by_name(frozen: Sequence[FrozenTable], features: Features) -> dict[str, FrozenTable]:
    tables: dict[str, FrozenTable] = {}
    for table in frozen:
        if table.name in tables:
            raise ValueError(f"frozen table {table.name!r}: there are two of this name; rename one")
        if table.name in (v.name for v in features.vectors):
            raise ValueError(f"frozen table {table.name!r}: there is a vector column of this name; rename one")
        if not can_name_module(table.name):
            raise ValueError(f"frozen table {table.name!r}: this cannot be the name of a module; rename it")
        tables[table.name] = table
    return tables


def _made(
    name: str,
    given: Mapping[str, Any],
    features: Features,
    frozen: Mapping[str, FrozenTable],
    registry: Kinds,
) -> Similarity:
    options = {key: value for key, value in given.items() if key != "kind"}
    try:
        if name in features.field_names:
            raise ValueError("there is a field of this name; rename the similarity")
        if "kind" not in given:
            raise ValueError(f"kind: missing; expected one of {', '.join(registry)}, or 'package.module:Class'")
        return resolve(given["kind"], registry)(name, features, frozen, **options)
    except ValueError as error:
        raise ValueError(f"similarity {name!r}: {error}") from error


def _two_vectors(of: Sequence[str], features: Features, frozen: Mapping[str, FrozenTable]) -> tuple[str, str]:
    dims = {v.name: v.dim for v in features.vectors} | {name: table.dim for name, table in frozen.items()}
    if isinstance(of, str) or len(of) != 2 or of[0] == of[1]:
        raise ValueError(f"of: expected the names of two vectors, such as [user_vector, item_vector], got {of!r}")
    for name in of:
        if name not in dims:
            raise ValueError(f"of: {unknown('vector column or frozen table', name, dims)}")
        if name in frozen:
            frozen_field(frozen[name], features)
    a, b = of
    if dims[a] != dims[b]:
        raise ValueError(f"of: {a!r} has width {dims[a]} and {b!r} has {dims[b]}; only vectors of one space compare")
    return a, b


def _table_and_column(
    vectors: str, sequence: str, features: Features, frozen: Mapping[str, FrozenTable]
) -> tuple[str, str]:
    """The frozen table and the sequence's behavior column that holds ids of its field."""
    if vectors not in frozen:
        raise ValueError(f"vectors: {unknown('frozen table', vectors, frozen)}")
    sequences = {s.name: s for s in features.sequences}
    if sequence not in sequences:
        raise ValueError(f"sequence: {unknown('sequence', sequence, sequences)}")
    field = frozen_field(frozen[vectors], features).name
    columns = [column for column, target in sequences[sequence].columns if target == field]
    if len(columns) != 1:
        raise ValueError(
            f"sequence: {sequence!r} has {len(columns)} columns of ids of {field!r}, the field of frozen table "
            f"{vectors!r}; expected one"
        )
    return vectors, columns[0]


def _bounds(low: float | None, high: float | None) -> tuple[float, float]:
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low and high must be the bounds of the product, low < high, got low: {low}, high: {high}")
    return float(low), float(high)
