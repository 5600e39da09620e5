"""TIM: behaviors pooled by what they are and by how long ago they were, both seen from the target.

Letters of this file: A attention heads, K width of a head, R rows of a temporal table.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from hmoe_rec.encoding.pooling import MASKED, Attention, Interest, MeanPooling, Pooling

INIT_STD = 0.1  # of temporal tables: between that of ids, which learn faster, and that of other dense weights


class TIM(Pooling):
    r"""Temporal Interest Module: target-aware attention and target-aware values, both with temporal encodings.

    .. math:: \tilde e_i = e_i + P[f(X_i)], \qquad \tilde v = v + P[0], \qquad
              u = \sum_i \mathrm{softmax}_i(\langle \tilde e_i, \tilde v \rangle / \sqrt d)\, (\tilde e_i * \tilde v)

    f is the behavior's position, counted from the most recent, or the bucket of its age; slot 0 is the target's. A
    behavior counts for what it is (the product with the target) as much as for when it was, and the two meet: the same
    behavior may say more an hour ago than a year ago. An empty history gives the zero vector.

    Computed without any [B, L, D] tensor beside the behaviors, as

    .. math:: \langle \tilde e_i, \tilde v \rangle = \langle e_i, \tilde v \rangle + (P \tilde v)[f(X_i)], \qquad
              u = s * \tilde v

    .. math:: s = \sum_i a_i \tilde e_i = \sum_i a_i e_i + \sum_k \Big(\sum_{i: f(X_i) = k} a_i\Big) P[k]

    As an `Interest`: field u, summary s, target v~.

    Args:
        clock: "position", "time", "both" (the sum of a row of each table) or "none"; "auto" = "time" where the sequence
            has times, else "position".
        num_buckets: time buckets; older behaviors share the last one. In [1, 64].
        bucket_seconds: bucket b holds ages of (2^(b-1) - 1) to (2^b - 1) times this, in seconds; > 0.
        representation: "sum" leaves out the product with the target in the values: field = summary.
        attention: False = all weights are 1 / (number of behaviors).
        projections: logits from W_Q v~ and W_K e~_i, values (W_U v~) * (W_V e~_i): s is then the weighted sum of the
            W_V e~_i, and the target W_U v~ (v~ itself with representation "sum").
        num_heads: each has weights of its own for its share of the width; more than one needs projections.
        post_attention: "affine_dense" = s through a learned scale and shift, then a linear layer; starts as "none".

    Raises:
        ValueError: a clock that reads times which the sequence does not have; heads that do not divide the width, or
            have no use; an option out of its range.

    Source: Zhou et al., "Temporal Interest Network for User Response Prediction", WWW 2024, arXiv 2308.08487. The
    public code has "affine_dense", the formula has not. The projections are known from a talk and from third parties.
    Time buckets, the zero for an empty history and the form without products are ours.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        has_ages: bool,
        *,
        clock: Literal["auto", "position", "time", "both", "none"] = "auto",
        num_buckets: int = 32,
        bucket_seconds: float = 60.0,
        representation: Literal["product", "sum"] = "product",
        attention: bool = True,
        num_heads: int = 1,
        projections: bool = False,
        post_attention: Literal["none", "affine_dense"] = "none",
    ) -> None:
        super().__init__(dim, max_length, has_ages)
        _check_names(clock, representation, post_attention)
        if clock in ("time", "both") and not has_ages:
            raise ValueError(
                f"clock {clock!r} reads the behaviors' times, but the sequence has none; give it `times` and "
                "`exposure_time` in the schema, or choose clock: position"
            )
        if not (1 <= num_buckets <= 64 and bucket_seconds > 0):
            raise ValueError(
                f"num_buckets must be in [1, 64] and bucket_seconds > 0, got {num_buckets} and {bucket_seconds}"
            )
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide the width {dim}, got {num_heads}")
        if num_heads > 1 and not (projections and attention):
            raise ValueError(
                f"num_heads {num_heads} needs projections: true and attention: true; or choose num_heads: 1"
            )
        if clock == "auto":
            clock = "time" if has_ages else "position"
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.num_buckets, self.bucket_seconds = num_buckets, bucket_seconds
        self.representation, self.attends, self.projects = representation, attention, projections
        if not attention:
            self.attention_is = MeanPooling.attention_is
        rows = {"position": max_length + 1, "time": num_buckets + 1}
        self.clocks = [name for name in rows if clock in (name, "both")]
        self.tables = nn.ParameterDict({name: torch.empty(rows[name], dim) for name in self.clocks})
        # Only what has an effect on the field is built: a parameter without a gradient would stop data parallelism.
        if projections and attention:
            self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        if projections:
            self.value = nn.Linear(dim, dim, bias=False)
        self.projects_target = projections and representation == "product"
        if self.projects_target:
            self.target_value = nn.Linear(dim, dim, bias=False)
        self.has_dense = post_attention == "affine_dense"
        if self.has_dense:
            self.scale, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
            self.dense = nn.Linear(dim, dim)
        self._initialize()

    def _initialize(self) -> None:
        for table in self.tables.values():
            nn.init.normal_(table, std=INIT_STD)
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear) and name != "dense":
                nn.init.xavier_uniform_(layer.weight)
        if self.has_dense:
            nn.init.eye_(self.dense.weight)
            nn.init.zeros_(self.dense.bias)

    def forward(self, behaviors_BLD: Tensor, target_BD: Tensor, mask_BL: Tensor, ages_BL: Tensor | None) -> Interest:
        slots = self.slots(mask_BL, ages_BL)
        # Positions beyond L do not occur: with a long table and short histories most of its rows are not needed.
        tables = {k: self.tables[k][: behaviors_BLD.size(1) + 1] if k == "position" else self.tables[k] for k in slots}
        slots = {name: slots_BL.unsqueeze(1).expand(-1, self.num_heads, -1) for name, slots_BL in slots.items()}
        v_BD = self._with_slot_0(target_BD)
        mask_B1L = mask_BL.unsqueeze(1)
        if self.attends:
            q_BAD = self._queries(v_BD)
            logits_BAL = torch.bmm(q_BAD, behaviors_BLD.transpose(1, 2))
            for name, table_RD in tables.items():
                logits_BAL = logits_BAL + (q_BAD @ table_RD.T).gather(2, slots[name])
            weights_BAL = logits_BAL.masked_fill(~mask_B1L, MASKED).softmax(2) * mask_B1L
        else:
            weights_BAL = mask_B1L.to(v_BD.dtype) / mask_B1L.sum(2, keepdim=True).clamp(min=1)
        sum_BAD = torch.bmm(weights_BAL, behaviors_BLD)
        for name, table_RD in tables.items():
            per_slot_BAR = weights_BAL.new_zeros(v_BD.size(0), self.num_heads, table_RD.size(0))
            sum_BAD = sum_BAD + per_slot_BAR.scatter_add(2, slots[name], weights_BAL) @ table_RD
        s_BD = self._after_attention(self._values(sum_BAD), mask_BL)
        if self.projects_target:
            v_BD = self.target_value(v_BD)
        return Interest(s_BD * v_BD if self.representation == "product" else s_BD, s_BD, v_BD)

    def slots(self, mask_BL: Tensor, ages_BL: Tensor | None) -> dict[str, Tensor]:
        """The rows [B, L] that the behaviors have in each temporal table ("position", "time"); 0 at padding."""
        slots: dict[str, Tensor] = {}
        if "position" in self.clocks:
            slots["position"] = positions(mask_BL, self.max_length)
        if "time" in self.clocks:
            assert ages_BL is not None, "a sequence with times came without ages"
            slots["time"] = time_buckets(ages_BL, self.num_buckets, self.bucket_seconds) * mask_BL
        return slots

    def attention(
        self,
        behaviors_BLD: Tensor,
        target_BD: Tensor,
        mask_BL: Tensor,
        ages_BL: Tensor | None,
        *,
        dims: slice = slice(None),
    ) -> Attention:
        """Logits and value norms of every behavior, as the paper's correlation of behaviors and targets reads them.

        Args:
            dims: only these columns of the width take part, such as the category's half.

        Raises:
            ValueError: some columns of projected vectors.
        """
        if self.projects and dims != slice(None):
            raise ValueError("dims: projections mix the columns of the width; choose all of them")
        v_BD = self._with_slot_0(target_BD)
        e_BLD = behaviors_BLD
        for name, slots_BL in self.slots(mask_BL, ages_BL).items():
            e_BLD = e_BLD + self.tables[name][slots_BL]
        logits_BL = torch.zeros_like(mask_BL, dtype=v_BD.dtype)
        if self.attends:
            logits_BL = torch.einsum("bad,bld->bal", self._queries(v_BD)[..., dims], e_BLD[..., dims]).mean(1)
        values_BLD = self.value(e_BLD) if self.projects else e_BLD
        if self.representation == "product":
            values_BLD = values_BLD * (self.target_value(v_BD) if self.projects else v_BD).unsqueeze(1)
        return Attention(logits_BL * mask_BL, values_BLD[..., dims].norm(dim=2) * mask_BL)

    def _with_slot_0(self, target_BD: Tensor) -> Tensor:
        for name in self.clocks:
            target_BD = target_BD + self.tables[name][0]
        return target_BD

    def _queries(self, v_BD: Tensor) -> Tensor:
        """[B, A, D]: logits are their inner products with e~, so that no behavior has to be projected."""
        if not self.projects:
            return v_BD.unsqueeze(1) / math.sqrt(self.dim)
        heads = (self.num_heads, self.head_dim)
        q_BAK = self.query(v_BD).unflatten(1, heads)
        return torch.einsum("bak,akd->bad", q_BAK, self.key.weight.unflatten(0, heads)) / math.sqrt(self.head_dim)

    def _values(self, sum_BAD: Tensor) -> Tensor:
        """Every head's sum of e~ -> s; the projection is linear, so it may follow the sum."""
        if not self.projects:
            return sum_BAD.squeeze(1)
        weight_AKD = self.value.weight.unflatten(0, (self.num_heads, self.head_dim))
        return torch.einsum("bad,akd->bak", sum_BAD, weight_AKD).flatten(1)

    def _after_attention(self, s_BD: Tensor, mask_BL: Tensor) -> Tensor:
        if not self.has_dense:
            return s_BD
        return self.dense(s_BD * self.scale + self.shift) * mask_BL.any(1, keepdim=True)  # shift and bias are not 0


def positions(mask_BL: Tensor, max_length: int) -> Tensor:
    """The most recent behavior has 1, the one before it 2, ..., `max_length` at most; 0 where there is no behavior."""
    num_later_BL = mask_BL.sum(1, keepdim=True) - mask_BL.cumsum(1)
    return (num_later_BL + 1).clamp(max=max_length) * mask_BL


def time_buckets(ages_BL: Tensor, num_buckets: int, bucket_seconds: float) -> Tensor:
    r"""1 + min(num_buckets - 1, floor(log2(1 + age / bucket_seconds))); a negative age counts as 0."""
    # frexp has the exact exponent of x = m 2^k, 1/2 <= m < 1: k = 1 + floor(log2 x). A rounded log2 errs at the edges.
    ages_BL = ages_BL.clamp(0.0, bucket_seconds * 2.0**num_buckets)
    return torch.frexp(1.0 + ages_BL / bucket_seconds).exponent.clamp(1, num_buckets).long()


def _check_names(clock: str, representation: str, post_attention: str) -> None:
    for name, value, known in (
        ("clock", clock, ("auto", "position", "time", "both", "none")),
        ("representation", representation, ("product", "sum")),
        ("post_attention", post_attention, ("none", "affine_dense")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
