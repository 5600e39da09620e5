"""SASRec: self-attention among the behaviors; the target has no say in it.

Letters of this file: Q places that ask, A attention heads, K width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from hmoe_rec.encoding.pooling import MASKED, Attention, Interest, Pooling
from hmoe_rec.encoding.temporal_interest import INIT_STD, positions


class SelfAttentionBlock(nn.Module):
    r"""x + attention(norm(x)), then x + relu layer and linear layer of norm(x), for the places that ask.

    Neither keys nor values are laid out: with n_i = norm(x_i), every head's logits and mixture are

    .. math:: \langle W_Q n_j + b_Q, W_K n_i \rangle = \langle W_K^T (W_Q n_j + b_Q), n_i \rangle, \qquad
              \sum_i a_i (W_V n_i + b_V) = W_V \Big(\sum_i a_i n_i\Big) + b_V

    and b_K, the same in all logits of a place, drops out of the softmax; dropout of the weights spares b_V. On a CPU
    with one head that takes half the time of the fused attention, in bf16 a fifth; only in fp32 and from four heads on
    is the fused one faster.

    Args:
        dim: D.
        num_heads: of width D / num_heads.
        dropout: in [0, 1).
    """

    def __init__(self, dim: int, *, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.factor = num_heads, (dim // num_heads) ** -0.5
        self.attention_norm, self.forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, dim), nn.Dropout(dropout)
        )

    def forward(self, asking_BQD: Tensor, x_BLD: Tensor, bias_BQL: Tensor) -> Tensor:
        """The new vectors of the places that ask, [B, Q, D].

        Args:
            asking_BQD: rows of x, or x itself.
            bias_BQL: of the logits: 0 where a place may look, `MASKED` where not; [1, Q, L] = for all examples alike.
        """
        n_BLD = self.attention_norm(x_BLD)
        asking_n_BQD = n_BLD if asking_BQD is x_BLD else self.attention_norm(asking_BQD)
        weight_3AKD, bias_3AK = (
            p.unflatten(0, (3, self.num_heads, -1)) for p in (self.query_key_value.weight, self.query_key_value.bias)
        )
        to_logits_ADK = self.factor * weight_3AKD[1].transpose(1, 2)
        q_BQAD = linear(
            asking_n_BQD,
            (to_logits_ADK @ weight_3AKD[0]).flatten(0, 1),
            (to_logits_ADK @ bias_3AK[0].unsqueeze(2)).flatten(),
        ).unflatten(2, (self.num_heads, -1))
        per_head = bias_BQL.repeat_interleave(self.num_heads, 1)
        weights = torch.baddbmm(per_head, q_BQAD.flatten(1, 2), n_BLD.transpose(1, 2)).softmax(2)  # [B, Q*A, L]
        sum_BQAD = torch.bmm(self.dropout(weights), n_BLD).unflatten(1, (-1, self.num_heads))
        mixed_BQAK = torch.einsum("bqad,akd->bqak", sum_BQAD, weight_3AKD[2]) + bias_3AK[2]
        asking_BQD = asking_BQD + self.dropout(mixed_BQAK.flatten(2))
        return asking_BQD + self.feed_forward(self.forward_norm(asking_BQD))


class SASRec(Pooling):
    """Self-attentive sequential recommendation: the latest behavior's output of causal transformer blocks.

    Positions are learned and counted from the most recent behavior. The target is not read: field = summary. An empty
    history gives the zero vector.

    Args:
        num_layers: self-attention blocks, >= 1.
        num_heads: must divide the width.
        dropout: of embeddings, attention weights and layers, in [0, 1).

    Raises:
        ValueError: a number of layers or heads, or a dropout, that cannot work.

    Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, arXiv 1808.09781, section III, with
    the last layer norm of the public code. Differs: keys and values are normed too, as the paper writes it (the public
    code norms queries only); the behaviors' vectors are not scaled by sqrt(d).
    """

    attention_is = "products of the target and what enters the blocks (SASRec has no target attention)"

    def __init__(
        self,
        dim: int,
        max_length: int,
        has_ages: bool,
        *,
        num_layers: int = 2,
        num_heads: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, max_length, has_ages)
        if num_layers < 1:
            raise ValueError(f"num_layers must be >= 1, got {num_layers}")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide the width {dim}, got {num_heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.position = nn.Parameter(torch.empty(max_length + 1, dim))  # row 0 is padding's
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(dim, num_heads=num_heads, dropout=dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.position, std=INIT_STD)

    def forward(self, behaviors_BLD: Tensor, target_BD: Tensor, mask_BL: Tensor, ages_BL: Tensor | None) -> Interest:
        positions_BL = positions(mask_BL, self.max_length)
        x_BLD = self.dropout(behaviors_BLD + embedding(positions_BL, self.position))
        # Padding lies behind the latest behavior, so the causal mask alone keeps it from every real one.
        later_1LL = x_BLD.new_full((1, x_BLD.size(1), x_BLD.size(1)), MASKED).triu(1)
        for block in self.blocks[:-1]:
            x_BLD = block(x_BLD, x_BLD, later_1LL)
        # In the last block only the latest behavior asks. A sum with one term, not an index: it is zero for an empty
        # history, of any L.
        latest_BL1 = ((mask_BL.cumsum(1) == mask_BL.sum(1, keepdim=True)) & mask_BL).unsqueeze(2)
        latest_B1D = (x_BLD * latest_BL1).sum(1, keepdim=True)
        padding_B1L = MASKED * (~mask_BL).to(x_BLD.dtype).unsqueeze(1)
        s_BD = self.norm(self.blocks[-1](latest_B1D, x_BLD, padding_B1L).squeeze(1)) * mask_BL.any(1, keepdim=True)
        return Interest(s_BD, s_BD, target_BD)

    def attention(
        self,
        behaviors_BLD: Tensor,
        target_BD: Tensor,
        mask_BL: Tensor,
        ages_BL: Tensor | None,
        *,
        dims: slice = slice(None),
    ) -> Attention:
        """Inner product of the target and of what enters the blocks, e_i + P[i].

        Ours: SASRec has no weight of a behavior that knows the target; the blocks' own attention is among behaviors.
        """
        x_BLD = (behaviors_BLD + embedding(positions(mask_BL, self.max_length), self.position))[..., dims]
        logits_BL = torch.einsum("bd,bld->bl", target_BD[:, dims], x_BLD) * self.dim**-0.5
        return Attention(logits_BL * mask_BL, x_BLD.norm(dim=2) * mask_BL)
