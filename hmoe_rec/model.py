"""HMoE: the rooms in the order of the paper's figure; Batch in, logits [B, T] out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.assembly import field_encoder, make_expert, make_similarities, make_towers, with_similarities
from hmoe_rec.batch import Batch
from hmoe_rec.embedding.lookup import MultiEmbedding, SetVectors
from hmoe_rec.embedding.tables import Precision
from hmoe_rec.encoding.fields import FieldEncoder, Moments, behavior_mask, padded_ages
from hmoe_rec.experts.bank import ExpertBank
from hmoe_rec.layers import module_dict
from hmoe_rec.towers.bootstrap import BootstrapTowers
from hmoe_rec.towers.gate import Mixture
from hmoe_rec.towers.layout import Layout
from hmoe_rec.towers.tower import Towers
from hmoe_rec.types import Encoding, Features


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
        tower: their kind and its options, such as {"kind": "bootstrap", "num_heads": 8}; None = mlp.
        dropout: in the towers; an expert has its own option.
        two_logits: tasks whose tower has a logit per class (for the loss JRC); what is served is their difference.
        encoding: kinds and options of the encoders of numbers, behavior sequences and similarities.
        device: where the tables live; `torch.device("meta")` before sharding. The rest lives on the default device.
        table_precision: fp32 or fp16; or table (`set__field`) -> precision, missing = fp32.

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
        tower: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        two_logits: Sequence[str] = (),
        encoding: Encoding | None = None,
        device: torch.device | None = None,
        table_precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        encoding = encoding or Encoding()
        self.similarities = make_similarities(features, encoding)
        features = with_similarities(features, self.similarities)
        self.features, self.layout = features, layout
        self.embedding = MultiEmbedding(features, layout.sets, device=device, precision=table_precision)
        encoders = {s.name: field_encoder(features, s, encoding, layout.experts) for s in layout.sets}
        self.encoders = module_dict("set", encoders)
        experts = {spec.name: make_expert(spec, encoders[spec.set], expert_dim) for spec in layout.experts}
        self.sequence_sets = _first_sets(features, encoders)
        self.experts = ExpertBank(experts, {spec.name: spec.set for spec in layout.experts})
        gate_dims = {name: encoder.num_fields * encoder.dim for name, encoder in encoders.items()}
        self.mixture = Mixture(layout.routing, gate_dims, expert_dim, hidden=gate_hidden)
        tower = {"kind": "mlp", "hidden": tower_hidden, "dropout": dropout, **(tower or {})}
        self.towers = make_towers(tower, layout.routing.tasks, self.mixture.out_dims, two_logits)

    def forward(self, batch: Batch) -> Tensor:
        """-> logits [B, T], tasks in the order of the routing."""
        fields, h_EBH = self.represent(batch)
        return self.classify(fields, h_EBH)

    def represent(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """-> set -> its fields [B, F, D], and what the experts make of them [E, B, H]."""
        fields, interests = self.encode(batch)
        return fields, self.experts(fields, interests)

    def classify(self, fields: dict[str, Tensor], h_EBH: Tensor) -> Tensor:
        """-> logits [B, T]."""
        return self.towers(self.mixture(fields, h_EBH))

    def levels(self, fields: dict[str, Tensor], h_EBH: Tensor) -> Tensor:
        """-> the logits of both classes [B, T, 2]; their difference is what `classify` gives."""
        assert isinstance(self.towers, Towers), f"{type(self.towers).__name__} have one logit per task"
        return self.towers.levels(self.mixture(fields, h_EBH))

    def heads(self, fields: dict[str, Tensor], h_EBH: Tensor) -> Tensor:
        """-> the logits of every head of bootstrap towers [B, T, K]; their mean is what `classify` gives."""
        assert isinstance(self.towers, BootstrapTowers), f"{type(self.towers).__name__} have one head per task"
        return self.towers.heads(self.mixture(fields, h_EBH))

    def mix(self, batch: Batch) -> list[Tensor]:
        """-> what each task's tower gets, [T] of [B, H]."""
        return self.mixture(*self.represent(batch))

    def encode(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Set -> its fields [B, F, D], and set -> its interests [B, I, D] where an expert reads them."""
        vectors = self.embedding(batch.sparse, batch.longest)
        moments = self._moments(batch, vectors)
        numbers_BN, vectors_BV = batch.numbers, batch.vectors
        if self.similarities is not None:
            more_numbers, more_vectors = self.similarities(batch)
            numbers_BN = torch.cat([numbers_BN, more_numbers], 1)
            vectors_BV = torch.cat([vectors_BV, more_vectors], 1)
        fields: dict[str, Tensor] = {}
        interests: dict[str, Tensor] = {}
        for name, encoder in self.encoders.items():
            v = vectors[name]
            fields[name], apart = encoder(v.pooled, v.targets, v.behaviors, moments, numbers_BN, vectors_BV)
            if apart is not None:
                interests[name] = apart
        return fields, interests

    def _moments(self, batch: Batch, vectors: Mapping[str, SetVectors]) -> dict[str, Moments]:
        """Of each sequence, once for all sets."""
        keys = self.features.sparse_keys
        moments: dict[str, Moments] = {}
        for s in self.features.sequences:
            if s.name in self.sequence_sets:
                behaviors_BLD = vectors[self.sequence_sets[s.name]].behaviors[s.name]
                lengths_B = _lengths(batch.sparse, keys.index(s.columns[0][0]), len(keys))
                ages_BL = padded_ages(batch.ages, s.name, behaviors_BLD) if s.has_ages else None
                moments[s.name] = Moments(behavior_mask(behaviors_BLD, lengths_B), ages_BL)
        return moments


def _first_sets(features: Features, encoders: Mapping[str, FieldEncoder]) -> dict[str, str]:
    """Sequence -> the first set that embeds it; behaviors are padded to one length in all of them."""
    return {
        s.name: next(name for name, encoder in encoders.items() if s.name in encoder.sequences)
        for s in features.sequences
        if any(s.name in encoder.sequences for encoder in encoders.values())
    }


def _lengths(sparse: KeyedJaggedTensor, position: int, num_keys: int) -> Tensor:
    """[B]; all columns of a sequence have one length."""
    return sparse.lengths().view(num_keys, -1)[position]
