"""Moments over heads, masks and members; the expected probability; figures of quality against loops."""

import math

import numpy as np
import pytest
import torch
from small_batches import make_batch, make_model
from torch import nn

from hmoe_rec.metrics import exact_auc
from hmoe_rec.uncertainty.estimates import Ensemble, MCDropout, has_dropout
from hmoe_rec.uncertainty.moments import Moments, over_samples
from hmoe_rec.uncertainty.quality import UncertaintyMetrics

B, T = 5, 2


def test_the_expected_probability_is_that_of_a_gaussian_logit():
    """Against Gauss-Hermite quadrature; the approximation is good to .02."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    mean, variance = torch.meshgrid(torch.linspace(-4, 4, 9), torch.tensor([0.01, 1.0, 4.0]), indexing="ij")
    x = mean.numpy()[..., None] + np.sqrt(variance.numpy())[..., None] * nodes
    exact = (1 / (1 + np.exp(-x)) * weights).sum(-1) / weights.sum()
    np.testing.assert_allclose(Moments(mean, variance).probability_BT().numpy(), exact, atol=0.02)


def test_over_samples_is_mean_and_unbiased_variance():
    z = torch.randn(3, B, T)
    moments = over_samples(z, 0)
    for b in range(B):
        for t in range(T):
            values = z[:, b, t].tolist()
            mean = sum(values) / 3
            assert moments.mean_BT[b, t].item() == pytest.approx(mean, abs=1e-6)
            assert moments.variance_BT[b, t].item() == pytest.approx(sum((v - mean) ** 2 for v in values) / 2, rel=1e-4)


def test_an_ensemble_of_one_model_twice_is_sure_and_of_two_models_is_their_spread():
    model, batch = make_model(), make_batch(B)
    other = make_model("shared_bottom")
    assert Ensemble([model, model])(batch).variance_BT.abs().max() < 1e-12
    with torch.no_grad():
        a, b = model(batch), other(batch)
    found = Ensemble([model, other])(batch)
    torch.testing.assert_close(found.mean_BT, (a + b) / 2)
    torch.testing.assert_close(found.std_BT(), (a - b).abs() / math.sqrt(2))


def test_dropout_is_repeatable_and_leaves_the_model_and_the_random_state_as_they_were():
    model, batch = make_model(), make_batch(B)
    assert not has_dropout(model)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.4
    assert has_dropout(model)
    state = torch.get_rng_state()
    estimate = MCDropout(model, samples=5)
    first, second = estimate(batch), estimate(batch)
    assert torch.equal(first.variance_BT, second.variance_BT) and (first.variance_BT > 0).any()
    assert not any(m.training for m in model.modules()) and torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(model(batch), model(batch))


def test_figures_of_quality_are_those_of_loops():
    n = 400
    mean, variance = torch.randn(n, T), torch.rand(n, T) + 0.1
    true = mean + variance.sqrt() * torch.randn(n, T) * 1.3
    labels = (torch.rand(n, T) < true.sigmoid()).float()
    labels[:40, 1] = torch.nan
    weights, new = torch.rand(n), torch.rand(n) < 0.3
    weights[100] = 0
    metrics = UncertaintyMetrics(["click", "like"])
    for rows in torch.arange(n).split(90):
        moments = Moments(mean[rows], variance[rows])
        metrics.update(moments, labels[rows], weights[rows], true_BT=true[rows].double(), new_B=new[rows])
    for t, task in enumerate(("click", "like")):
        found = metrics.compute()[task]
        known = ~labels[:, t].isnan() & (weights > 0)
        m, v, z, y, w, is_new = (x[known] for x in (mean[:, t], variance[:, t], true[:, t], labels[:, t], weights, new))
        p = (m / (1 + math.pi * v / 8).sqrt()).sigmoid()
        nats = -(y * p.log() + (1 - y) * (1 - p).log())
        expected = {
            "examples": int(known.sum()),
            "logloss_mean_field": float((nats * w).sum() / w.sum()),
            "logloss_mean_field_new": float((nats * w)[is_new].sum() / w[is_new].sum()),
            "std": float(v.sqrt().mean()),
            "std_new": float(v[is_new].sqrt().mean()),
            "new": int(is_new.sum()),
            "coverage_90": float(((z - m).abs() <= 1.6448536270 * v.sqrt()).double().mean()),
            "error_of_true_logit": float((z - m).square().mean().sqrt()),
            "nll_of_true_logit": float(-torch.distributions.Normal(m, v.sqrt()).log_prob(z).mean()),
            "new_auc": exact_auc(v, is_new.float()),
        }
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4), name


def test_intervals_of_right_variances_cover_what_they_say():
    n = 40_000  # the standard error of a share of one half is .0025
    mean, variance = torch.randn(n, 1), torch.rand(n, 1) * 3
    true = mean + variance.sqrt() * torch.randn(n, 1)
    metrics = UncertaintyMetrics(["click"])
    metrics.update(Moments(mean, variance), torch.zeros(n, 1), torch.ones(n), true_BT=true)
    found = metrics.compute()["click"]
    for share in (50, 90, 95):
        assert found[f"coverage_{share}"] == pytest.approx(share / 100, abs=0.01)
    assert math.isnan(found["new_auc"]), "what was not given is not there"
