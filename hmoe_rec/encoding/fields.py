"""What was looked up for one embedding set, numbers and vectors -> the set's fields [B, F, D] for its experts."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hmoe_rec.encoding.dense import ProjectedVectors, ScalarNumbers
from hmoe_rec.types import Features, SequenceField


class SequencePooler(nn.Module):
    """Pools one behavior sequence of one set: its columns side by side [B, L, C*D], as TIM concatenates attributes."""

    def __init__(self, sequence: SequenceField, columns: Sequence[tuple[str, str]], pooling: nn.Module) -> None:
        super().__init__()
        self.columns = tuple(columns)
        self.max_length = sequence.max_length
        self.pooling = pooling

    def forward(self, behaviors: Mapping[str, Tensor], targets: Mapping[str, Tensor], lengths_B: Tensor) -> Tensor:
        """-> [B, C*D], column after column."""
        behaviors_BLD = torch.cat([behaviors[column] for column, _ in self.columns], dim=2)
        target_BD = torch.cat(
            [targets[t] if t in targets else torch.zeros_like(behaviors[c][:, 0]) for c, t in self.columns], dim=1
        )
        positions_1L = torch.arange(self.max_length, device=lengths_B.device).unsqueeze(0)
        return self.pooling(behaviors_BLD, target_BD, positions_1L < lengths_B.unsqueeze(1))


class FieldEncoder(nn.Module):
    """Puts a set's fields side by side: pooled ids, targets, pooled behaviors, numbers, vectors.

    Args:
        features: fields of the data.
        fields: the names of the set's fields.
        pooled: names of its fields that come pooled from the lookup.
        targets: names of its id fields that come unpooled.
        dim: D.
        pooling: makes a pooling module for a given width.
    """

    def __init__(
        self,
        features: Features,
        *,
        fields: Sequence[str],
        pooled: Sequence[str],
        targets: Sequence[str],
        dim: int,
        pooling,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.targets = tuple(t for t in targets if t in fields)
        self.number_positions = [i for i, name in enumerate(features.numbers) if name in fields]
        self.all_numbers = len(self.number_positions) == len(features.numbers)
        self.has_vectors = any(v.name in fields for v in features.vectors)
        present = [(s, [pair for pair in s.columns if pair[0] in fields]) for s in features.sequences]
        self.sequences = nn.ModuleDict(
            {s.name: SequencePooler(s, columns, pooling(len(columns) * dim)) for s, columns in present if columns}
        )
        behaviors = [column for _, columns in present for column, _ in columns]
        numbers = [features.numbers[i] for i in self.number_positions]
        vectors = [v for v in features.vectors if v.name in fields]
        if numbers:
            self.numbers = ScalarNumbers(len(numbers), dim)
        if vectors:
            self.vector_columns = _columns_of(features, [v.name for v in vectors])
            self.vectors = ProjectedVectors([v.dim for v in vectors], dim)
        self.field_names = (*pooled, *self.targets, *behaviors, *numbers, *(v.name for v in vectors))
        self.num_fields = len(self.field_names)

    def forward(
        self,
        pooled: Tensor | None,
        targets: Mapping[str, Tensor],
        behaviors: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor],
        numbers_BN: Tensor,
        vectors_BV: Tensor,
    ) -> Tensor:
        """-> [B, F, D], fields in the order of `field_names`."""
        parts = [] if pooled is None else [pooled]
        parts += [targets[name] for name in self.targets]
        for name, pooler in self.sequences.items():
            parts.append(pooler(behaviors, targets, lengths[name]))
        if self.number_positions:
            chosen = numbers_BN if self.all_numbers else numbers_BN[:, self.number_positions]
            parts.append(self.numbers(chosen).flatten(1))
        if self.has_vectors:
            chosen = vectors_BV if self.vector_columns is None else vectors_BV[:, self.vector_columns]
            parts.append(self.vectors(chosen).flatten(1))
        flat = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if torch.is_autocast_enabled(self.device_type):
            # Once here, not again in every expert and gate that reads the set.
            flat = flat.to(torch.get_autocast_dtype(self.device_type))
        return flat.unflatten(1, (self.num_fields, self.dim))

    @property
    def device_type(self) -> str:
        return "cuda" if torch.is_autocast_enabled("cuda") else "cpu"


def _columns_of(features: Features, names: Sequence[str]) -> list[int] | None:
    """Columns of Batch.vectors that belong to the named vectors; None = all of them."""
    if len(names) == len(features.vectors):
        return None
    columns, start = [], 0
    for v in features.vectors:
        columns += list(range(start, start + v.dim)) if v.name in names else []
        start += v.dim
    return columns
