r"""Logged choices with their propensities -> what another policy would have earned per choice, and how sure that is.

With r the reward, p the logged propensity of what was shown, and q the probability that the other policy would have
shown it, w = q / p (at most `clip`, if given)::

    IPS     mean of w r
    SNIPS   sum of w r / sum of w
    DR      mean of v + w (r - m),   m the model's value of what was shown, v = sum over candidates of q(a) m(a)

IPS and DR are unbiased where p is right and p > 0 wherever q > 0, and w is not clipped; DR stays so with any m, and is
the more exact the better m is. Clipping lowers the variance and draws the value towards 0 (IPS) or the model's (DR).
A policy whose log has p = 0 for what the other one would show (greedy, UCB) tells nothing of it.

Sources: Horvitz and Thompson 1952; SNIPS: Swaminathan and Joachims, NIPS 2015; DR: Dudik, Langford and Li, ICML 2011,
arXiv 1103.4601. Intervals: normal approximation; of SNIPS by the delta method.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Value:
    """An estimate per choice, with its standard error and 95 % interval; arrays where replications were given."""

    value: np.ndarray | float
    std_error: np.ndarray | float
    low: np.ndarray | float
    high: np.ndarray | float


class OffPolicySums:
    """Adds up batches of choices; only sums are kept, so that a log may be of any size.

    Args:
        clip: largest weight; None = as they are.
        shape: replications that are evaluated side by side; () = one log.
    """

    def __init__(self, *, clip: float | None = None, shape: tuple[int, ...] = ()) -> None:
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be positive, got {clip}")
        self.clip = clip
        names = ("n", "reward", "w", "w2", "wr", "w2r", "w2r2", "unclipped", "clipped", "dr", "dr2", "modelled")
        self.sums = {name: np.zeros(shape) for name in names}
        self.largest = np.zeros(shape)

    def add(
        self,
        reward: np.ndarray,
        propensity: np.ndarray,
        target: np.ndarray,
        *,
        shown_value: np.ndarray | None = None,
        target_value: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            reward: [..., n], leading dimensions as `shape`.
            propensity: p in (0, 1].
            target: q in [0, 1]; of a deterministic policy 1 where it would have shown the same, else 0.
            shown_value, target_value: m and v of DR; both or none.

        Raises:
            ValueError: a propensity or target out of its range.
        """
        if not bool(np.all((propensity > 0) & (propensity <= 1))):
            raise ValueError("a propensity must be in (0, 1]: a choice that could not happen was logged")
        if not bool(np.all((target >= 0) & (target <= 1))):
            raise ValueError("a target probability must be in [0, 1]")
        unclipped = target / propensity
        w = unclipped if self.clip is None else np.minimum(unclipped, self.clip)
        terms = {
            "n": np.ones_like(w), "reward": reward, "w": w, "w2": w**2, "wr": w * reward, "w2r": w**2 * reward,
            "w2r2": (w * reward) ** 2, "unclipped": unclipped, "clipped": w < unclipped,
        }  # fmt: skip
        if shown_value is not None and target_value is not None:
            dr = target_value + w * (reward - shown_value)
            terms |= {"dr": dr, "dr2": dr**2, "modelled": np.ones_like(w)}
        for name, term in terms.items():
            self.sums[name] = self.sums[name] + term.sum(-1)
        self.largest = np.maximum(self.largest, unclipped.max(-1, initial=0))

    def values(self) -> dict[str, Value]:
        """logged: the mean reward as it was; ips; snips; dr where a model's values were given."""
        s, n = self.sums, self.sums["n"]
        with np.errstate(invalid="ignore", divide="ignore"):
            snips = s["wr"] / s["w"]
            residual = s["w2r2"] - 2 * snips * s["w2r"] + snips**2 * s["w2"]
            found = {
                "ips": _with_interval(s["wr"] / n, _variance_of_mean(s["wr"], s["w2r2"], n)),
                "snips": _with_interval(snips, np.maximum(residual, 0) / s["w"] ** 2 * n / (n - 1)),
            }
            if np.all(s["modelled"] == n):
                found["dr"] = _with_interval(s["dr"] / n, _variance_of_mean(s["dr"], s["dr2"], n))
        return found

    def diagnosis(self) -> Mapping[str, np.ndarray | float]:
        """rows; logged mean reward; mean weight before clipping (1 in expectation: far off means wrong propensities);
        effective number of rows, (sum w)^2 / sum w^2; largest weight before clipping; share of clipped weights."""
        s = self.sums
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "rows": s["n"],
                "logged_reward": s["reward"] / s["n"],
                "mean_weight": s["unclipped"] / s["n"],
                "effective_rows": s["w"] ** 2 / s["w2"],
                "largest_weight": self.largest,
                "clipped": s["clipped"] / s["n"],
            }


def _variance_of_mean(total: np.ndarray, squares: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.maximum(squares / n - (total / n) ** 2, 0) / (n - 1)


def _with_interval(value: np.ndarray, variance: np.ndarray) -> Value:
    error = np.sqrt(variance)
    return Value(value, error, value - Z95 * error, value + Z95 * error)
