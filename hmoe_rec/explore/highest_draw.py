"""Means and standard deviations of independent normal draws [B, A] -> the probability that each one is the highest.

Letters of shapes: B requests, A candidates, N nodes of a quadrature, Q nodes of a cell.
"""

import numpy as np
import torch
from torch import Tensor

_REACH = 9.0  # standard deviations around a mean beyond which a draw is not followed: 1e-19 of its mass
_CELL = 1.0  # width of a cell, in standard deviations of the narrowest draw that still moves there
_CELL_NODES = 8
_ELEMENTS = 1 << 19  # of [B, N, A] at once: 4 MiB a tensor, which stays in the cache


def probability_of_highest(mean_BA: Tensor, std_BA: Tensor) -> Tensor:
    r"""P(candidate a has the highest of the draws N(m_b, s_b^2), b = 1..A), float64; rows sum to 1.

    .. math:: \pi(a) = \int \frac1{s_a} \varphi\Big(\frac{x - m_a}{s_a}\Big) \prod_{b \ne a}
              \Phi\Big(\frac{x - m_b}{s_b}\Big)\, dx

    by Gauss-Legendre cells that all candidates of a request share, so that the work is N A and not N A^2 a request; a
    candidate without deviation is a step, several of them at one mean share its part evenly. Below
    x_0 = max(m_b - 9 s_b) some candidate is surely higher. Above it the integrand moves at x no faster than the least
    s_b among those with m_b + 9 s_b > x, and cells are as narrow as that: N grows with the logarithm of the ratio of
    the deviations, whatever it is. Compared with closed forms and simulations the relative error is below 1e-5.

    Waits for the device once per chunk of requests (N depends on the data).

    Args:
        mean_BA: -inf = there is no such candidate; every request has one that exists.
        std_BA: >= 0, finite.
    """
    rows = max(1, _ELEMENTS // (mean_BA.shape[1] * 256))
    chunks = zip(mean_BA.double().split(rows), std_BA.double().split(rows), strict=True)
    return torch.cat([_of_chunk(m, s) for m, s in chunks]) if len(mean_BA) else torch.zeros_like(mean_BA).double()


def _of_chunk(mean_BA: Tensor, std_BA: Tensor) -> Tensor:
    random_BA = (std_BA > 0) & (mean_BA > -torch.inf)
    lowest_B1 = (mean_BA - _REACH * std_BA).amax(1, keepdim=True)
    # Centred, so that narrow draws far from 0 lose no digits; what is not random takes part as a step at most.
    mean_BA = mean_BA - lowest_B1
    narrow_BA = torch.where(random_BA, std_BA, 1.0)
    x_BN, weight_BN = _nodes(torch.where(random_BA, mean_BA, -torch.inf), narrow_BA)
    z_BNA = (x_BN.unsqueeze(2) - torch.where(random_BA, mean_BA, 0.0).unsqueeze(1)) / narrow_BA.unsqueeze(1)
    # log Phi; z >= -9 here, where erfc has all its digits, and takes a third of the time of log_ndtr.
    below_BNA = (torch.special.erfc(z_BNA * -(0.5**0.5)) / 2).log().masked_fill(~random_BA.unsqueeze(1), 0.0)
    highest_BNA = (below_BNA.sum(2, keepdim=True) - below_BNA - z_BNA.square() / 2).exp() * weight_BN.unsqueeze(2)
    found_BA = highest_BNA.sum(1) / narrow_BA / (2 * np.pi) ** 0.5 * random_BA
    # The best step stands at x_0 = 0 or lower; it is the highest where every random draw is below it.
    step_BA = (mean_BA == 0) & (std_BA == 0)
    z_BA = torch.where(random_BA, -mean_BA / narrow_BA, torch.inf)
    none_above_B1 = torch.special.log_ndtr(z_BA).sum(1, keepdim=True).exp()
    found_BA = found_BA + step_BA * none_above_B1 / step_BA.sum(1, keepdim=True).clamp(min=1)
    return found_BA / found_BA.sum(1, keepdim=True)


def _nodes(mean_BA: Tensor, narrow_BA: Tensor) -> tuple[Tensor, Tensor]:
    """Places above 0 and their weights [B, N]: cells of equal width in u(x), the integral of 1 / (least deviation of
    the draws that reach beyond x)."""
    ends_BA, order_BA = (mean_BA + _REACH * narrow_BA).clamp(min=0.0).sort(1, descending=True)
    finest_BA = (1 / narrow_BA.gather(1, order_BA)).masked_fill(ends_BA == 0, 0.0).cummax(1).values
    # From the right: between ends k + 1 and k the draws 0..k are on their way.
    widths_BA = ends_BA - torch.cat([ends_BA[:, 1:], torch.zeros_like(ends_BA[:, :1])], 1)
    paced_BA = (widths_BA * finest_BA).flip(1)
    u_BA = torch.cat([torch.zeros_like(paced_BA[:, :1]), paced_BA.cumsum(1)], 1)
    x_BA = torch.cat([torch.zeros_like(ends_BA[:, :1]), ends_BA.flip(1)], 1)
    cells = max(1, int(torch.ceil(u_BA[:, -1].max() / _CELL)))
    places, weights = (torch.from_numpy(a).to(mean_BA) for a in np.polynomial.legendre.leggauss(_CELL_NODES))
    steps = torch.linspace(0, 1, cells + 1, dtype=mean_BA.dtype, device=mean_BA.device)
    edges_BN = _interpolated(u_BA[:, -1:] * steps, u_BA, x_BA)
    low_BN1, width_BN1 = edges_BN[:, :-1].unsqueeze(2), edges_BN.diff(dim=1).unsqueeze(2)
    return (low_BN1 + width_BN1 * (places + 1) / 2).flatten(1), (width_BN1 * weights / 2).flatten(1)


def _interpolated(at_BN: Tensor, u_BA: Tensor, x_BA: Tensor) -> Tensor:
    """x at u, linear between ascending known pairs."""
    place_BN = torch.searchsorted(u_BA, at_BN.contiguous(), right=True).clamp(1, u_BA.shape[1] - 1)
    u0, u1, x0, x1 = (t.gather(1, p) for t in (u_BA, x_BA) for p in (place_BN - 1, place_BN))
    share_BN = ((at_BN - u0) / (u1 - u0).clamp(min=torch.finfo(u_BA.dtype).tiny)).clamp(0, 1)
    return x0 + share_BN * (x1 - x0)
