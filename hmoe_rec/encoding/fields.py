"""What was looked up for one embedding set, numbers and vectors -> the set's fields [B, F, D] for its experts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.encoding import NUMBERS, POOLINGS, part_of_number, part_of_sequence
from hmoe_rec.encoding.numbers import NumberEncoder
from hmoe_rec.encoding.pooling import Interest, Pooling
from hmoe_rec.encoding.vectors import ProjectedVectors
from hmoe_rec.kinds import resolve
from hmoe_rec.layers import module_dict
from hmoe_rec.types import Encoding, Features, NumberField, Part, SequenceField

Group = tuple[Part, list[int]]  # a kind with its options, and the positions of the numbers that it encodes


class Moments(NamedTuple):
    """When a sequence's behaviors were; the same for all embedding sets.

    Attributes:
        mask_BL: True where a behavior exists.
        ages_BL: seconds between behavior and exposure, zero where there is none; None where the sequence has no times.
    """

    mask_BL: Tensor
    ages_BL: Tensor | None


@torch.fx.wrap
def behavior_mask(behaviors_BLD: Tensor, lengths_B: Tensor) -> Tensor:
    """[B, L], True where a behavior exists."""
    positions_1L = torch.arange(behaviors_BLD.shape[1], device=lengths_B.device).unsqueeze(0)
    return positions_1L < lengths_B.unsqueeze(1)


@torch.fx.wrap
def padded_ages(ages: KeyedJaggedTensor | None, sequence: str, behaviors_BLD: Tensor) -> Tensor:
    """[B, L] seconds, beside the behaviors; zero where there is none."""
    if ages is None:
        raise ValueError(f"sequence {sequence!r} has times (has_ages), but the batch carries no ages; give Batch.ages")
    jagged, length = ages[sequence], behaviors_BLD.shape[1]
    return torch.ops.fbgemm.jagged_to_padded_dense(
        jagged.values().unsqueeze(1), [jagged.offsets()], [length], 0.0
    ).squeeze(2)


class SequencePooler(nn.Module):
    """Pools one behavior sequence of one set: its columns side by side [B, L, C*D], as TIM concatenates attributes."""

    def __init__(self, sequence: SequenceField, columns: Sequence[tuple[str, str]], dim: int, pooling: Pooling) -> None:
        super().__init__()
        self.name, self.dim = sequence.name, dim
        self.columns = tuple(columns)
        self.pooling = pooling

    def forward(
        self,
        behaviors: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        moments: Moments,
    ) -> Interest:
        """-> vectors [B, C*D], column after column."""
        behaviors_BLD = behaviors[self.name]
        none_BD = torch.zeros_like(behaviors_BLD[:, 0, : self.dim])
        target_BD = torch.cat([targets[t] if t in targets else none_BD for _, t in self.columns], dim=1)
        return self.pooling(behaviors_BLD, target_BD, moments.mask_BL, moments.ages_BL)


class FieldEncoder(nn.Module):
    """Puts a set's fields side by side: pooled ids, targets, pooled behaviors, numbers, vectors.

    Args:
        features: fields of the data, and the numbers and vectors that similarities add to them.
        fields: the names of the set's fields.
        pooled: names of its fields that come pooled from the lookup.
        targets: names of its id fields that come unpooled.
        dim: D.
        encoding: kinds and options of the encoders.
        with_interests: experts of the set read what the poolings say apart from the fields.

    Attributes:
        field_names: F names; a number that becomes several fields has one name for each.
        num_interests: I = 3 x behavior columns: summary, target and their product of every column.

    Raises:
        ValueError: a kind or options that cannot be built, a sequence's name that no module can have, or no field at
            all.
    """

    def __init__(
        self,
        features: Features,
        *,
        fields: Sequence[str],
        pooled: Sequence[str],
        targets: Sequence[str],
        dim: int,
        encoding: Encoding,
        with_interests: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.with_interests = dim, with_interests
        self.sequence_fields = encoding.sequence_fields
        self.targets = tuple(t for t in targets if t in fields)
        present = [(s, [pair for pair in s.columns if pair[0] in fields]) for s in features.sequences]
        poolers = {
            s.name: SequencePooler(s, columns, dim, _pooling(s, len(columns), dim, encoding))
            for s, columns in present
            if columns
        }
        self.sequences = module_dict("sequence", poolers)
        behaviors = [column for _, columns in present for column, _ in columns]
        self.num_interests = 3 * len(behaviors)
        groups = number_groups(features, fields, encoding)
        self.number_positions = [positions for _, positions in groups]
        encoders = [_number_encoder(part, [features.numbers[i] for i in positions], dim) for part, positions in groups]
        self.numbers = nn.ModuleList(encoders)
        self.all_numbers = self.number_positions == [list(range(len(features.numbers)))]
        vectors = [v for v in features.vectors if v.name in fields]
        if not encoding.vector_fields:
            vectors = [v for v in vectors if v.name in encoding.similarities]
        self.has_vectors = bool(vectors)
        if vectors:
            self.vector_columns = _columns_of(features, [v.name for v in vectors])
            self.vectors = ProjectedVectors([v.dim for v in vectors], dim)
        numbers = [name for encoder in encoders for name in encoder.field_names]
        shown = behaviors if encoding.sequence_fields else []
        self.field_names = (*pooled, *self.targets, *shown, *numbers, *(v.name for v in vectors))
        self.num_fields = len(self.field_names)
        if not self.num_fields:
            raise ValueError(
                "a set needs at least one field besides behaviors where model.encoding.sequence_fields is off"
            )

    def forward(
        self,
        pooled: Tensor | None,
        targets: Mapping[str, Tensor],
        behaviors: Mapping[str, Tensor],
        moments: Mapping[str, Moments],
        numbers_BN: Tensor,
        vectors_BV: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """-> the fields [B, F, D] in the order of `field_names`, and the interests [B, I, D] or None."""
        interests = [
            pooler(behaviors, targets, moments[name])
            for name, pooler in self.sequences.items()
            if self.sequence_fields or self.with_interests
        ]
        parts = [] if pooled is None else [pooled]
        parts += [targets[name] for name in self.targets]
        parts += [interest.field_BD for interest in interests] if self.sequence_fields else []
        for i, encoder in enumerate(self.numbers):
            chosen = numbers_BN if self.all_numbers else numbers_BN[:, self.number_positions[i]]
            parts.append(encoder(chosen).flatten(1))
        if self.has_vectors:
            chosen = vectors_BV if self.vector_columns is None else vectors_BV[:, self.vector_columns]
            parts.append(self.vectors(chosen).flatten(1))
        apart = [x for i in interests for x in (i.summary_BD, i.target_BD, i.summary_BD * i.target_BD)]
        return self._together(parts), self._together(apart) if self.with_interests else None

    def _together(self, parts: list[Tensor]) -> Tensor:
        """[B, k*D] each -> [B, sum of k, D]."""
        flat = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if torch.is_autocast_enabled(self.device_type):
            # Once here, not again in every expert and gate that reads the set.
            flat = flat.to(torch.get_autocast_dtype(self.device_type))
        return flat.unflatten(1, (-1, self.dim))

    @property
    def device_type(self) -> str:
        return "cuda" if torch.is_autocast_enabled("cuda") else "cpu"


def number_groups(features: Features, fields: Sequence[str], encoding: Encoding) -> list[Group]:
    """The set's numbers by kind and options: one encoder each."""
    groups: dict[str, Group] = {}
    for i, number in enumerate(features.numbers):
        if number.name in fields:
            part = part_of_number(number, encoding)
            groups.setdefault(repr(sorted(part.items())), (part, []))[1].append(i)
    return list(groups.values())


def _number_encoder(part: Part, numbers: Sequence[NumberField], dim: int) -> NumberEncoder:
    options = {k: v for k, v in part.items() if k != "kind"}
    with _named(f"numbers by {part['kind']}"):
        return resolve(part["kind"], NUMBERS)(numbers, dim, **options)


def _pooling(sequence: SequenceField, num_columns: int, dim: int, encoding: Encoding) -> Pooling:
    part = part_of_sequence(sequence, encoding)
    options = {k: v for k, v in part.items() if k != "kind"}
    with _named(f"sequence {sequence.name!r} by {part['kind']}"):
        return resolve(part["kind"], POOLINGS)(num_columns * dim, sequence.max_length, sequence.has_ages, **options)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Says of which part of the encoding an error speaks."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _columns_of(features: Features, names: Sequence[str]) -> list[int] | None:
    """Columns of Batch.vectors that belong to the named vectors; None = all of them."""
    if len(names) == len(features.vectors):
        return None
    columns, start = [], 0
    for v in features.vectors:
        columns += list(range(start, start + v.dim)) if v.name in names else []
        start += v.dim
    return columns
