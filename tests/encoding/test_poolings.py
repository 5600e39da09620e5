"""The promises of every pooling of a behavior sequence, and each against a naive loop."""

import math

import pytest
import torch

from hmoe_rec.encoding import POOLINGS
from hmoe_rec.encoding.dense import ProjectedVectors, ScalarNumbers
from hmoe_rec.layers import resolve

B, L, D = 5, 4, 6


@pytest.fixture(params=sorted(POOLINGS))
def pooling(request):
    return resolve(request.param, POOLINGS)(D)


def inputs():
    lengths = torch.tensor([0, 1, 4, 2, 3])
    mask = torch.arange(L) < lengths[:, None]
    behaviors = torch.randn(B, L, D) * mask[..., None]
    return behaviors, torch.randn(B, D), mask, lengths


class TestContract:
    def test_shape_and_empty_sequence_is_zero(self, pooling):
        behaviors, target, mask, _ = inputs()
        out = pooling(behaviors, target, mask)
        assert out.shape == (B, D) and (out[0] == 0).all() and (out[1:].abs().sum(1) > 0).all()

    def test_gradients_are_finite_with_an_empty_sequence(self, pooling):
        behaviors, target, mask, _ = inputs()
        behaviors.requires_grad_(), target.requires_grad_()
        pooling(behaviors, target, mask).square().sum().backward()
        assert behaviors.grad.isfinite().all()
        assert target.grad is None or target.grad.isfinite().all()
        assert behaviors.grad[2].abs().sum() > 0

    def test_padding_does_not_matter(self, pooling):
        behaviors, target, mask, _ = inputs()
        longer = torch.cat([behaviors, torch.zeros(B, 3, D)], 1)
        wider = torch.cat([mask, torch.zeros(B, 3, dtype=torch.bool)], 1)
        torch.testing.assert_close(pooling(longer, target, wider), pooling(behaviors, target, mask))

    def test_examples_are_independent(self, pooling):
        behaviors, target, mask, _ = inputs()
        alone = pooling(behaviors[3:4], target[3:4], mask[3:4])
        torch.testing.assert_close(pooling(behaviors, target, mask)[3:4], alone)

    def test_empty_batch_and_trace(self, pooling):
        traced = torch.fx.symbolic_trace(pooling)
        assert traced(torch.zeros(0, L, D), torch.zeros(0, D), torch.zeros(0, L, dtype=torch.bool)).shape == (0, D)


def test_mean_equals_a_loop():
    behaviors, target, mask, lengths = inputs()
    out = resolve("mean", POOLINGS)(D)(behaviors, target, mask)
    for i, n in enumerate(lengths.tolist()):
        expected = behaviors[i, :n].mean(0) if n else torch.zeros(D)
        torch.testing.assert_close(out[i], expected)


def test_target_attention_equals_a_loop():
    behaviors, target, mask, lengths = inputs()
    out = resolve("target_attention", POOLINGS)(D)(behaviors, target, mask)
    for i, n in enumerate(lengths.tolist()):
        scores = [math.exp(float(behaviors[i, j] @ target[i]) / math.sqrt(D)) for j in range(n)]
        expected = sum((s / sum(scores) * behaviors[i, j] for j, s in enumerate(scores)), torch.zeros(D))
        torch.testing.assert_close(out[i], expected)


class TestNumbers:
    def test_equals_the_formula_and_missing_has_a_vector_of_its_own(self):
        encoder = ScalarNumbers(3, D)
        torch.nn.init.normal_(encoder.bias), torch.nn.init.normal_(encoder.missing)
        x = torch.tensor([[1.5, float("nan"), -2.0]])
        out = encoder(x)[0]
        torch.testing.assert_close(out[0], 1.5 * encoder.weight[0] + encoder.bias[0])
        torch.testing.assert_close(out[1], encoder.missing[1])
        torch.testing.assert_close(out[2], -2.0 * encoder.weight[2] + encoder.bias[2])

    def test_a_missing_value_gives_no_nan_gradient(self):
        encoder = ScalarNumbers(2, D)
        encoder(torch.tensor([[float("nan"), 1.0]])).sum().backward()
        assert all(p.grad.isfinite().all() for p in encoder.parameters())
        assert (encoder.weight.grad[0] == 0).all() and (encoder.missing.grad[1] == 0).all()


def test_vectors_are_projected_one_by_one():
    encoder = ProjectedVectors([3, 2], D)
    x = torch.randn(B, 5)
    out = encoder(x)
    assert out.shape == (B, 2, D)
    torch.testing.assert_close(out[:, 1], encoder.projections[1](x[:, 3:]))
