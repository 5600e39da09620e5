"""An embedding table -> its singular values -> how many directions it uses.

    ia = information_abundance(singular_values(gram(table)))

The three steps are apart because of tables that lie on several processes: row shards have Gram matrices that add up,
so each process takes `gram` of its own rows, the D x D matrices are all-reduced, and the rest follows everywhere.
`hmoe_rec.analysis.spectra` does so for the tables of a checkpoint, `hmoe_rec.sharding.live_grams` in training.
"""

import math

import torch
from torch import Tensor

CHUNK_ROWS = 1 << 16


@torch.no_grad()
def gram(table: Tensor, *, normalize_rows: bool = False) -> Tensor:
    """G = E^T E in float64: rows x D -> [D, D], on the table's device.

    Rows are read in chunks, so that no float64 copy of a large table is made.

    Args:
        table: all rows of a table, or a row shard. Not a column shard: G holds the products of all pairs of columns.
        normalize_rows: every row is divided by its length first (a row of zeros stays). The paper takes E as it is;
            its official notebook normalizes.

    Raises:
        ValueError: a table that is not a matrix.

    Source: ours; float64 because in float32 singular values below 3e-4 of the largest would be lost, and here below
    about 1e-8 of it.
    """
    if table.dim() != 2:
        raise ValueError(f"table must be a matrix [rows, width], got a tensor of shape {tuple(table.shape)}")
    total_DD = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64, device=table.device)
    for rows in table.split(CHUNK_ROWS):
        rows = rows.double()
        if normalize_rows:
            rows = torch.nn.functional.normalize(rows, eps=torch.finfo(torch.float64).tiny)
        total_DD.addmm_(rows.T, rows)
    return total_DD


def singular_values(gram_DD: Tensor) -> Tensor:
    """The singular values [D] of E, descending, from G = E^T E: roots of its eigenvalues.

    Eigenvalues that rounding made negative count as 0. A table of fewer than D rows gets zeros at the end, one with a
    value that is not finite nothing but NaN.
    """
    finite = gram_DD.isfinite().all(-1).all(-1, keepdim=True)
    values = torch.linalg.eigvalsh(torch.where(finite.unsqueeze(-1), gram_DD, 0.0)).clamp(min=0).sqrt().flip(-1)
    return torch.where(finite, values, torch.nan)


def information_abundance(singular_values: Tensor) -> Tensor:
    r"""IA(E) over the last dimension; NaN for a table of zeros.

    .. math:: \mathrm{IA}(E) = \sum_k s_k / \max_k s_k, \qquad 1 \le \mathrm{IA} \le \mathrm{rank}(E) \le D

    1 = all rows on one line (full collapse), D = all directions alike.

    Source: arXiv 2310.04400, definition of information abundance.
    """
    return singular_values.sum(-1) / singular_values.amax(-1)


def effective_rank(singular_values: Tensor) -> Tensor:
    r"""exp of the entropy of s / sum(s), over the last dimension; in [1, rank]; NaN for a table of zeros.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    p = singular_values / singular_values.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


def stable_rank(singular_values: Tensor) -> Tensor:
    r"""\|E\|_F^2 / \|E\|_2^2 over the last dimension; in [1, rank]; NaN for a table of zeros."""
    return singular_values.square().sum(-1) / singular_values.amax(-1).square()


def participation_ratio(singular_values: Tensor) -> Tensor:
    r"""(sum of s^2)^2 / sum of s^4 over the last dimension; in [1, rank]; NaN for a table of zeros."""
    energy = singular_values.square()
    return energy.sum(-1).square() / energy.square().sum(-1)


def random_reference(rows: int, dim: int, *, draws: int = 8, seed: int = 0, normalize_rows: bool = False) -> float:
    """Mean information abundance of Gaussian tables of that shape: what no training at all would give.

    For many rows the Gram matrix is drawn directly, by Bartlett's decomposition of the Wishart distribution, so that
    a table of 10^9 rows costs as much as one of D rows.

    Args:
        normalize_rows: of tables whose rows have length 1; by rows, at most 20,000 of them, since there the abundance
            depends on the number of rows no longer.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        if normalize_rows or rows <= dim:
            table = torch.randn(min(rows, 20_000), dim, generator=generator, dtype=torch.float64)
            values = singular_values(gram(table, normalize_rows=normalize_rows))
        else:
            degrees = rows - torch.arange(dim, dtype=torch.float64)
            factor = torch.randn(dim, dim, generator=generator, dtype=torch.float64).tril(-1)
            chi = torch._standard_gamma(degrees / 2, generator=generator).mul(2).sqrt()
            values = torch.linalg.svdvals(factor + torch.diag(chi))
        found.append(float(information_abundance(values)))
    return math.fsum(found) / draws


def canonical_correlations(gram_AA: Tensor, gram_BB: Tensor, cross_AB: Tensor) -> Tensor:
    """Cosines, descending, of the principal angles between the column spaces of two tables of the same rows.

    1 = a direction that both tables have, 0 = one that only one of them has. min(A, B) of them; directions whose
    singular value is below 1e-6 of the largest do not count, and give fewer.

    Args:
        gram_AA, gram_BB: E_1^T E_1 and E_2^T E_2.
        cross_AB: E_1^T E_2.

    Source: Bjorck and Golub, "Numerical methods for computing angles between linear subspaces", 1973.
    """
    return torch.linalg.svdvals(_whitener(gram_AA).T @ cross_AB @ _whitener(gram_BB)).clamp(max=1.0)


def linear_cka(gram_AA: Tensor, gram_BB: Tensor, cross_AB: Tensor) -> Tensor:
    r"""\|E_1^T E_2\|_F^2 / (\|E_1^T E_1\|_F \|E_2^T E_2\|_F) in [0, 1]; the tables centered by the caller.

    1 = the same up to rotation and scale.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, arXiv 1905.00414.
    """
    return cross_AB.square().sum() / (gram_AA.norm() * gram_BB.norm())


def _whitener(gram_DD: Tensor) -> Tensor:
    """V diag(1/s) over the directions that are there: E V diag(1/s) has orthonormal columns."""
    values, vectors = torch.linalg.eigh(gram_DD)
    there = values > 1e-12 * values[-1].clamp(min=1e-300)
    return vectors[:, there] / values[there].sqrt()
