"""Batch.sparse -> vectors of every embedding set. The only reader of TorchRec's output keys."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from hmoe_rec.embedding.managed import ManagedIds
from hmoe_rec.embedding.row_ids import RowIds
from hmoe_rec.embedding.tables import (
    Precision,
    check_names,
    fields_of,
    keys_of_target,
    pooled_fields,
    pooled_tables,
    sequence_tables,
    sequence_targets,
    table_name,
)
from hmoe_rec.types import EmbeddingSet, Features


@torch.fx.wrap
def _regroup(kt: KeyedTensor, groups: list[list[str]]) -> list[Tensor]:
    # Keys, not positions: sharding reorders the outputs.
    width = dict(zip(kt.keys(), kt.length_per_key(), strict=True))
    if kt.keys() == [key for group in groups for key in group]:
        return list(kt.values().split([sum(width[key] for key in group) for group in groups], dim=1))  # views
    if kt.values().is_cuda:
        return KeyedTensor.regroup([kt], groups)
    parts = dict(zip(kt.keys(), kt.values().split(kt.length_per_key(), dim=1), strict=True))
    return [torch.cat([parts[key] for key in group], dim=1) for group in groups]


@torch.fx.wrap
def _padded(columns: list[JaggedTensor], max_length: int, longest: tuple[int, ...] = (), sequence: int = 0) -> Tensor:
    """C columns [sum of lengths, D] of equal lengths -> [B, L, C*D], zeros behind the last row.

    L is the batch's longest where it is known. The columns are put side by side before they are padded: one pass.
    """
    length = max(1, min(max_length, longest[sequence])) if longest else max_length
    values = columns[0].values() if len(columns) == 1 else torch.cat([c.values() for c in columns], dim=1)
    return torch.ops.fbgemm.jagged_to_padded_dense(values, [columns[0].offsets()], [length], 0.0)


@dataclass
class SetVectors:
    """What one embedding set says of a batch.

    Attributes:
        pooled: [B, number of pooled fields * D], field after field; None without pooled fields.
        targets: id field -> [B, D]; a missing id gives zeros.
        behaviors: sequence -> [B, L, C*D], its columns side by side, padded with zeros to the batch's longest of the
            sequence, or to the sequence's max_length where that is not known.
    """

    pooled: Tensor | None
    targets: dict[str, Tensor]
    behaviors: dict[str, Tensor]


class MultiEmbedding(nn.Module):
    """Every field looked up in every embedding set: one pooled collection, one unpooled collection per width.

    However many sets there are, a sharded step makes one exchange of pooled ids and one of pooled vectors. Separate
    tables, not one wide table sliced afterwards: under row-wise Adagrad these differ (a row's statistic would couple
    the sets).

    Args:
        features: fields of the data.
        sets: the embedding sets; widths may differ.
        device: where tables live; `torch.device("meta")` before sharding.
        precision: of the tables: fp32 or fp16; or table (`set__field`) -> precision, missing = fp32.

    Raises:
        SchemaError: names that TorchRec cannot carry, or an unknown precision.
        ValueError: a sequence's target that holds several ids per example.

    Source: Guo et al., "On the Embedding Collapse when Scaling up Recommendation Models", ICML 2024 (arXiv 2310.04400);
    layout of tables: ours.
    """

    def __init__(
        self,
        features: Features,
        sets: Sequence[EmbeddingSet],
        *,
        device: torch.device | None = None,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        check_names(sets, features)
        for column, target in features.targets.items():
            if features.id_field(target).multi_valued:
                raise ValueError(
                    f"behavior column {column!r}: its target {target!r} holds several ids; it must hold one"
                )
        # A torch.device, never a string: EmbeddingCollection compares it with torch.device("meta").
        device = torch.device("cpu") if device is None else torch.device(device)
        self.features, self.sets = features, tuple(sets)
        pooled = pooled_tables(sets, features, precision)
        self.managed = ManagedIds(features, sets) if any(f.managed for f in features.ids) else None
        self._groups = {s.name: [table_name(s.name, f.name) for f in pooled_fields(s, features)] for s in sets}
        self._pooled_sets = [s.name for s in sets if self._groups[s.name]]
        if pooled:
            self.ebc = EmbeddingBagCollection(tables=pooled, device=device)
            self.ebc_ids = RowIds(features, [(s.name, f.name) for s in sets for f in pooled_fields(s, features)])
        self._unpooled: dict[int, list[tuple[str, str]]] = {}
        for dim, tables in sequence_tables(sets, features, precision).items():
            self.add_module(f"ec_{dim}", EmbeddingCollection(tables=tables, device=device))
            self._unpooled[dim] = [
                (s.name, key)
                for s in sets
                if s.dim == dim
                for target in sequence_targets(s, features)
                for key in keys_of_target(s, target, features)
            ]
            self.add_module(f"ec_{dim}_ids", RowIds(features, self._unpooled[dim]))
        present = {s.name: fields_of(s, features) for s in sets}
        self._targets = [(s, name) for s in sets for name in sequence_targets(s, features) if name in present[s.name]]
        self._columns = [
            (s, i, [table_name(s.name, column) for column, _ in sequence.columns if column in present[s.name]])
            for s in sets
            for i, sequence in enumerate(features.sequences)
        ]

    def forward(self, sparse: KeyedJaggedTensor, longest: tuple[int, ...] = ()) -> dict[str, SetVectors]:
        """Ids -> vectors. longest: see `Batch.longest`.

        Of a sequence that has more than `max_length` behaviors the first ones are read. The readers of `hmoe_rec.data`
        leave the latest ones over; a loader of one's own has to.
        """
        if self.managed is not None:
            sparse = self.managed(sparse)
        vectors: dict[str, SetVectors] = {s.name: SetVectors(None, {}, {}) for s in self.sets}
        if self._pooled_sets:
            groups = _regroup(self.ebc(self.ebc_ids(sparse)), [self._groups[name] for name in self._pooled_sets])
            for i, name in enumerate(self._pooled_sets):
                vectors[name].pooled = groups[i]
        rows = {dim: getattr(self, f"ec_{dim}")(getattr(self, f"ec_{dim}_ids")(sparse)) for dim in self._unpooled}
        for s, name in self._targets:
            vectors[s.name].targets[name] = _padded([rows[s.dim][table_name(s.name, name)]], 1).squeeze(1)
        for s, i, keys in self._columns:
            if keys:
                sequence, columns = self.features.sequences[i], [rows[s.dim][key] for key in keys]
                vectors[s.name].behaviors[sequence.name] = _padded(columns, sequence.max_length, longest, i)
        return vectors
