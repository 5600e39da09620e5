"""HMoE: the rooms in the order of the paper's figure; Batch in, logits [B, T] out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hmoe_rec.batch import Batch
from hmoe_rec.embedding.lookup import MultiEmbedding, SetVectors
from hmoe_rec.embedding.tables import fields_of, pooled_fields, sequence_targets
from hmoe_rec.encoding import POOLINGS
from hmoe_rec.encoding.fields import FieldEncoder
from hmoe_rec.experts import EXPERTS
from hmoe_rec.experts.bank import ExpertBank
from hmoe_rec.layers import resolve
from hmoe_rec.towers.gate import Mixture
from hmoe_rec.towers.layout import Layout
from hmoe_rec.towers.tower import Towers
from hmoe_rec.types import EmbeddingSet, Features


class HMoE(nn.Module):
    """Heterogeneous mixture of experts with multi-embedding, for any number of binary tasks.

    Every field is looked up in every embedding set; each expert reads one set; a gate per task mixes what its row of
    the route table lets through; a tower per task gives one logit. Single task, shared bottom, MMoE, PLE,
    multi-embedding, STEM, AME and STEM-AL are presets of the table (`hmoe_rec.towers.routing.preset`).

    Args:
        features: fields of the data.
        layout: embedding sets, experts and routes.
        expert_dim: H, the experts' common output width.
        gate_hidden: hidden widths of the gates.
        tower_hidden: hidden widths of the towers.
        dropout: in the towers; an expert has its own option.
        sequence_pooling: kind and options of the pooling of behavior sequences.
        device: where the tables live; `torch.device("meta")` before sharding. The rest lives on the default device.
        table_precision: "fp32" or "fp16".

    Raises:
        ValueError, SchemaError: sizes, names or options that do not fit together.

    Source: Pan et al., "Ads Recommendation in a Collapsed and Entangled World", KDD 2024, arXiv 2403.00793, the
    overview figure. Gate inputs follow hmoe_rec.towers.routing, which marks what is ours.
    """

    def __init__(
        self,
        features: Features,
        layout: Layout,
        *,
        expert_dim: int = 128,
        gate_hidden: Sequence[int] = (),
        tower_hidden: Sequence[int] = (64,),
        dropout: float = 0.0,
        sequence_pooling: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        table_precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.features, self.layout = features, layout
        self.sequence_positions = _first_columns(features)
        self.embedding = MultiEmbedding(features, layout.sets, device=device, precision=table_precision)
        pooling = dict(sequence_pooling or {"kind": "mean"})
        make_pooling = resolve(pooling.pop("kind"), POOLINGS)
        encoders = {s.name: _encoder(features, s, lambda dim: make_pooling(dim, **pooling)) for s in layout.sets}
        self.encoders = nn.ModuleDict(encoders)
        sizes = {s.name: (encoders[s.name].num_fields, s.dim) for s in layout.sets}
        experts = {
            spec.name: resolve(spec.kind, EXPERTS)(*sizes[spec.set], expert_dim, **spec.options)
            for spec in layout.experts
        }
        self.experts = ExpertBank(experts, {spec.name: spec.set for spec in layout.experts})
        gate_dims = {name: num_fields * dim for name, (num_fields, dim) in sizes.items()}
        self.mixture = Mixture(layout.routing, gate_dims, expert_dim, hidden=gate_hidden)
        self.towers = Towers(layout.routing.tasks, self.mixture.out_dims, hidden=tower_hidden, dropout=dropout)

    def forward(self, batch: Batch) -> Tensor:
        """-> logits [B, T], tasks in the order of the routing."""
        vectors = self.embedding(batch.sparse)
        fields = self.encode(vectors, batch)
        h_EBH = self.experts(fields)
        return self.towers(self.mixture(fields, h_EBH))

    def encode(self, vectors: Mapping[str, SetVectors], batch: Batch) -> dict[str, Tensor]:
        """Set -> its fields [B, F, D]."""
        lengths = {
            name: _lengths(batch.sparse, position, len(self.features.sparse_keys))
            for name, position in self.sequence_positions.items()
        }
        return {
            name: encoder(v.pooled, v.targets, v.behaviors, lengths, batch.numbers, batch.vectors)
            for (name, encoder), v in zip(self.encoders.items(), vectors.values(), strict=True)
        }


def _encoder(features: Features, s: EmbeddingSet, pooling) -> FieldEncoder:
    return FieldEncoder(
        features,
        fields=fields_of(s, features),
        pooled=[f.name for f in pooled_fields(s, features)],
        targets=sequence_targets(s, features),
        dim=s.dim,
        pooling=pooling,
    )


def _first_columns(features: Features) -> dict[str, int]:
    """Sequence -> position of its first column among the keys of Batch.sparse; all its columns have one length."""
    keys = features.sparse_keys
    return {s.name: keys.index(s.columns[0][0]) for s in features.sequences}


def _lengths(sparse, position: int, num_keys: int) -> Tensor:
    return sparse.lengths().view(num_keys, -1)[position]
