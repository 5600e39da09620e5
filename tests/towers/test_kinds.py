"""Towers that know how sure they are: spectral norms, random features, heads."""

import pytest
import torch
from torch import nn

from hmoe_rec.towers.bootstrap import BootstrapTowers
from hmoe_rec.towers.sngp import RandomFeatures, SNGPTowers, SpectralLinear
from hmoe_rec.towers.tower import Towers

B, H = 5, 6
TASKS = ("click", "like")


def mixed(seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(2, B, H, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("hidden", [(), (7, 3)])
def test_the_logit_of_a_tower_is_linear_in_its_features(hidden):
    plain, sngp = Towers(TASKS, [H, H], hidden=hidden), SNGPTowers(TASKS, [H, H], hidden=hidden, num_features=9).eval()
    for t, task in enumerate(TASKS):
        last = plain.towers[task].layers[-1]
        weights = torch.cat([last.weight[0], last.bias])
        torch.testing.assert_close(plain.features(mixed())[t] @ weights, plain(mixed())[:, t])
        last = sngp.towers[task].output
        torch.testing.assert_close(sngp.features(mixed())[t] @ last.weight[0] + last.bias, sngp(mixed())[:, t])


@pytest.mark.parametrize("scale", [10.0, 0.01])
def test_a_spectral_norm_stays_below_its_bound_and_smaller_ones_as_they_are(scale):
    layer = SpectralLinear(H, 7, bound=0.95)
    with torch.no_grad():
        layer.weight.mul_(scale)
        for _ in range(200):
            bounded = layer.bounded()
    true = torch.linalg.matrix_norm(layer.weight, 2).item()
    assert torch.linalg.matrix_norm(bounded, 2).item() == pytest.approx(min(true, 0.95), rel=1e-4)
    before = layer.left_O.clone()
    layer.eval().bounded()
    assert torch.equal(layer.left_O, before), "evaluation changes nothing"


def test_the_gradient_does_not_lengthen_a_weight_that_is_at_its_bound():
    """W' does not change with the length of W, so its derivative along W is 0."""
    layer = SpectralLinear(H, 7, bound=0.5)
    with torch.no_grad():
        layer.weight.mul_(20)
        for _ in range(200):
            layer.bounded()
    layer.bounded()[0].sum().backward()
    assert abs((layer.weight.grad * layer.weight).sum().item()) < 1e-5 * layer.weight.grad.norm() * layer.weight.norm()


def test_random_features_are_a_gaussian_kernel():
    h = torch.randn(B, H)
    features = RandomFeatures(H, 200_000, length_scale=1.5)(h)
    expected = torch.exp(-torch.cdist(h, h).square() / (2 * 1.5**2 * H))
    torch.testing.assert_close(features @ features.T, expected, atol=0.02, rtol=0)


def test_a_head_depends_on_its_own_weights_only_and_the_logit_is_their_mean():
    towers = BootstrapTowers(TASKS, [H, H], hidden=(7,), num_heads=3)
    heads = towers.heads(mixed())
    assert heads.shape == (B, 2, 3)
    torch.testing.assert_close(towers(mixed()), heads.mean(2))
    heads[:, 1, 2].sum().backward()
    touched = {name for name, p in towers.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and all(".like_2." in name for name in touched)
    for t, task in enumerate(TASKS):
        for k in range(3):
            head = towers.towers.towers[f"{task}_{k}"]
            assert isinstance(head, nn.Module)
            torch.testing.assert_close(head(mixed()[t])[:, 0], towers.heads(mixed())[:, t, k])


@pytest.mark.parametrize("kind", [Towers, SNGPTowers, BootstrapTowers])
def test_the_constant_of_a_logit_can_be_moved(kind):
    towers = kind(TASKS, [H, H]).eval()
    before = towers(mixed())
    towers.shift({"like": -2.0, "click": 0.5})
    torch.testing.assert_close(towers(mixed()) - before, torch.tensor([0.5, -2.0]).expand(B, 2))


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match="num_heads must be at least 2"):
        BootstrapTowers(TASKS, [H, H], num_heads=1)
    with pytest.raises(ValueError, match="draws must be one of"):
        BootstrapTowers(TASKS, [H, H], draws="none")
    with pytest.raises(ValueError, match="length_scale positive"):
        SNGPTowers(TASKS, [H, H], length_scale=0)
