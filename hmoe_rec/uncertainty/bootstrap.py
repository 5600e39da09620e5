"""Row ids [B] -> example weights [B, K] of K bootstrap heads: drawn once and for all, by a hash."""

import math

import torch
from torch import Tensor

from hmoe_rec.embedding.hashing import splitmix64

_MANTISSA = (1 << 53) - 1
_POISSON = [math.exp(-1) * sum(1 / math.factorial(j) for j in range(n + 1)) for n in range(17)]  # P(weight <= n)


def bootstrap_weights(row_ids_B: Tensor, num_heads: int, *, draws: str = "poisson", seed: int = 0) -> Tensor:
    """Weights of mean 1 and variance 1, independent over rows and heads [B, K] float32.

    A row has the same weights in every epoch, batch and process, so that each head learns from one resampled log.

    Args:
        row_ids_B: int64, distinct for distinct rows (`Batch.row_ids`).
        draws: "poisson": Poisson(1), what drawing with replacement comes to for many rows; "bernoulli": 2 or 0 with
            even odds, which drops more rows.

    Source: Poisson weights for streams: Oza and Russell, "Online Bagging and Boosting", 2001; double or nothing: Owen
    and Eckles, "Bootstrapping Data Arrays of Arbitrary Order", 2012; by hash of the row: ours.
    """
    heads_K = torch.arange(1, num_heads + 1, device=row_ids_B.device)
    salts_K = splitmix64(splitmix64(heads_K) + seed)
    hashes_BK = splitmix64(splitmix64(row_ids_B).unsqueeze(1) ^ salts_K)
    uniform_BK = ((hashes_BK >> 11) & _MANTISSA).double() / (_MANTISSA + 1)
    if draws == "bernoulli":
        return (uniform_BK < 0.5).float() * 2
    steps = torch.tensor(_POISSON, dtype=torch.float64, device=row_ids_B.device)
    return torch.bucketize(uniform_BK, steps, right=True).float()
