"""A trained model -> estimates of its logits: `Batch` in, `Moments` out. All in evaluation mode, without gradients.

On several processes the model's tables are sharded, so that every process must call an estimate equally often.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from hmoe_rec.batch import Batch
from hmoe_rec.model import HMoE
from hmoe_rec.towers.bootstrap import BootstrapTowers
from hmoe_rec.uncertainty.moments import Moments, over_samples
from hmoe_rec.uncertainty.posterior import LastLayerPosterior, logistic_curvature
from hmoe_rec.uncertainty.rows import RowPosterior, slopes


class Estimate(Protocol):
    def __call__(self, batch: Batch, /) -> Moments: ...


class LastLayer:
    """The model's logit, and the variance that follows from the posterior of the towers' last layers.

    Of towers of kind mlp this is last-layer Laplace, of kind sngp it is SNGP. Fast: one forward pass, and P^2 products
    an example.
    """

    def __init__(self, model: HMoE, posterior: LastLayerPosterior) -> None:
        self.model, self.posterior = model, posterior

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Moments:
        mixed = self.model.mix(batch)
        mean_BT = self.model.towers(mixed).float()
        return Moments(mean_BT, self.posterior.variance(self.features(mixed)).float())

    @torch.no_grad()
    def learn(self, batch: Batch, weights: torch.Tensor | None = None) -> None:
        """Adds the examples of a batch to the posterior. weights: in the loss, [B] or [B, T]; None = the batch's."""
        mixed = self.model.mix(batch)
        curvature_BT = curvature(self.model.towers(mixed), batch, weights)
        self.posterior.update(self.features(mixed), curvature_BT)

    @torch.no_grad()
    def features(self, mixed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        towers = self.model.towers
        assert hasattr(towers, "features"), f"{type(towers).__name__} has no last layer"
        return towers.features(mixed)  # type: ignore[operator]


class RowLaplace(LastLayer):
    """The model's logit; the variance of the towers' last layers and of the rows of ids together.

    A forward pass and, for each task, a backward pass through the dense part.
    """

    def __init__(self, model: HMoE, posterior: LastLayerPosterior, rows: RowPosterior) -> None:
        super().__init__(model, posterior)
        self.rows = rows

    def __call__(self, batch: Batch) -> Moments:
        found = slopes(self.model, batch)
        variance_BT = self.posterior.variance(self.features(found.mixed)) + self.rows.variance(batch, found)
        return Moments(found.logits_BT, variance_BT.float())

    def learn(self, batch: Batch, weights: torch.Tensor | None = None) -> None:
        found = slopes(self.model, batch)
        curvature_BT = curvature(found.logits_BT, batch, weights)
        self.posterior.update(self.features(found.mixed), curvature_BT)
        self.rows.update(batch, found, curvature_BT)


class BootstrapHeads:
    """Mean and variance over the heads of towers of kind bootstrap. One forward pass."""

    def __init__(self, model: HMoE) -> None:
        assert isinstance(model.towers, BootstrapTowers), f"towers are {type(model.towers).__name__}"
        self.model, self.towers = model, model.towers

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Moments:
        return over_samples(self.towers.heads(self.model.mix(batch)), 2)


class MCDropout:
    """Mean and variance over forward passes with other units dropped; a pass per sample.

    Args:
        samples: passes, >= 2.
        seed: of the masks, which are the same in every batch.

    Source: Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016, arXiv 1506.02142.
    """

    def __init__(self, model: HMoE, *, samples: int = 16, seed: int = 0) -> None:
        self.model, self.samples, self.seed = model, samples, seed

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Moments:
        devices = [batch.weights.device] if batch.weights.is_cuda else []
        with torch.random.fork_rng(devices), _dropping(self.model):
            torch.manual_seed(self.seed)
            return over_samples(torch.stack([self.model(batch) for _ in range(self.samples)]), 0)


class Ensemble:
    """Mean and variance over models that were trained apart, or checkpoints of one; all are in memory.

    Source: Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
    NeurIPS 2017, arXiv 1612.01474. Ours: the spread of logits, where the paper averages probabilities.
    """

    def __init__(self, models: Sequence[Callable[[Batch], torch.Tensor]]) -> None:
        self.models = tuple(models)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Moments:
        return over_samples(torch.stack([model(batch).float() for model in self.models]), 0)


def curvature(logits_BT: torch.Tensor, batch: Batch, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Of the loss of the batch's rows by their logits [B, T]; rows that were sampled have offsets in it."""
    shifted_BT = logits_BT if batch.offsets is None else logits_BT + batch.offsets
    return logistic_curvature(shifted_BT, batch.labels, batch.weights if weights is None else weights)


def has_dropout(model: nn.Module) -> bool:
    """Whether any unit would be dropped."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())


@contextmanager
def _dropping(model: nn.Module) -> Generator[None, None, None]:
    """Dropout as in training, all else as in evaluation."""
    layers = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    was = [layer.training for layer in layers]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer, training in zip(layers, was, strict=True):
            layer.train(training)
