"""Posteriors of last layers against closed forms, autograd and other orders; test_rows.py adds up processes."""

import pytest
import torch

from hmoe_rec.uncertainty.logistic import BayesianLogistic
from hmoe_rec.uncertainty.posterior import LastLayerPosterior, logistic_curvature

B, P, LAMBDA = 50, 4, 0.7


def features(seed: int = 0, rows: int = B) -> torch.Tensor:
    return torch.randn(rows, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_of_gaussian_labels_it_is_bayesian_linear_regression():
    """Closed form: covariance = noise^2 (F^T F + lambda noise^2 I)^-1."""
    noise, f_BP, new_BP = 0.3, features(), features(1, 5)
    posterior = LastLayerPosterior([P], prior_precision=LAMBDA)
    posterior.update([f_BP], torch.full((B, 1), 1 / noise**2))
    covariance = noise**2 * torch.linalg.inv(f_BP.T @ f_BP + LAMBDA * noise**2 * torch.eye(P))
    expected_B = torch.tensor([float(x @ covariance @ x) for x in new_BP], dtype=torch.float64)
    torch.testing.assert_close(posterior.variance([new_BP])[:, 0], expected_B)


def test_of_logistic_labels_it_is_the_hessian_of_the_loss():
    f_BP, w_P, weights_B = features(), torch.randn(P).double(), torch.rand(B).double()
    labels_B1 = torch.randint(2, (B, 1)).double()
    labels_B1[3] = torch.nan

    def loss(w_P: torch.Tensor) -> torch.Tensor:
        nats_B = torch.nn.functional.binary_cross_entropy_with_logits(
            f_BP @ w_P, labels_B1[:, 0].nan_to_num(0.0), reduction="none"
        )
        return (nats_B * weights_B * ~labels_B1[:, 0].isnan()).sum() + LAMBDA / 2 * w_P.square().sum()

    posterior = LastLayerPosterior([P], prior_precision=LAMBDA)
    posterior.update([f_BP], logistic_curvature((f_BP @ w_P).unsqueeze(1), labels_B1, weights_B))
    torch.testing.assert_close(posterior.precision(0), torch.autograd.functional.hessian(loss, w_P))


def test_twelve_coin_flips():
    """f = 1, lambda = 1, p = 1/2: precision 1 + 12 / 4, variance 1/4."""
    posterior = LastLayerPosterior([1])
    posterior.update([torch.ones(12, 1)], logistic_curvature(torch.zeros(12, 1), torch.ones(12, 1), torch.ones(12)))
    assert posterior.variance([torch.ones(1, 1)]).item() == pytest.approx(0.25)


def test_the_order_of_examples_and_the_cut_into_batches_do_not_matter():
    f_BP, c_B2 = features(), torch.rand(B, 2).double()
    whole, pieces = LastLayerPosterior([P, P - 1]), LastLayerPosterior([P, P - 1])
    whole.update([f_BP, f_BP[:, 1:]], c_B2)
    for rows in torch.randperm(B).split(7):
        pieces.update([f_BP[rows], f_BP[rows, 1:]], c_B2[rows])
    for t in range(2):
        torch.testing.assert_close(pieces.precision(t), whole.precision(t), rtol=1e-13, atol=1e-13)
    again = LastLayerPosterior([P, P - 1])
    again.load_state_dict(whole.state_dict())
    torch.testing.assert_close(again.variance([f_BP, f_BP[:, 1:]]), whole.variance([f_BP, f_BP[:, 1:]]))


def test_what_is_old_fades():
    posterior = LastLayerPosterior([P])
    for step in range(3):
        posterior.update([features(step)], torch.ones(B, 1), decay=0.5)
    grams = [features(step).T @ features(step) for step in range(3)]
    torch.testing.assert_close(posterior.sums[0], grams[0] / 4 + grams[1] / 2 + grams[2])


def test_the_prior_is_all_there_is_without_examples():
    variance = LastLayerPosterior([P], prior_precision=4.0).variance([features(rows=5)])
    torch.testing.assert_close(variance[:, 0], features(rows=5).square().sum(1) / 4)
    with pytest.raises(ValueError, match="prior_precision must be positive"):
        LastLayerPosterior([P], prior_precision=0.0)


def test_features_that_are_copies_of_each_other_leave_a_posterior():
    """Ten copies of one feature: those are one feature of ten times the square, the prior is next to nothing."""
    one_B1 = features(rows=1000)[:, :1] * 1e3
    copies, alone = LastLayerPosterior([10], prior_precision=1e-10), LastLayerPosterior([1], prior_precision=1e-10)
    copies.update([one_B1.expand(1000, 10)], torch.ones(1000, 1))
    alone.update([one_B1 * 10**0.5], torch.ones(1000, 1))
    expected = alone.variance([one_B1[:5] * 10**0.5])
    torch.testing.assert_close(copies.variance([one_B1[:5].expand(5, 10)]), expected, rtol=1e-3, atol=1e-12)


# ----------------------------------------------------------------------------------------------- logistic regression


def test_logistic_regression_finds_the_mode_and_its_curvature():
    f_BP, labels_B = features(), (torch.rand(B) < 0.3).double()
    learner = BayesianLogistic(P, prior_precision=LAMBDA)
    learner.update(f_BP, labels_B)

    def loss(w_P: torch.Tensor) -> torch.Tensor:
        nats = torch.nn.functional.binary_cross_entropy_with_logits(f_BP @ w_P, labels_B, reduction="sum")
        return nats + LAMBDA / 2 * w_P.square().sum()

    w_P = learner.mean.clone().requires_grad_()
    assert torch.autograd.grad(loss(w_P), w_P)[0].abs().max() < 1e-7
    hessian = torch.autograd.functional.hessian(loss, learner.mean)
    torch.testing.assert_close(learner.precision, hessian)
    mean_5, variance_5 = learner.moments(features(1, 5))
    torch.testing.assert_close(mean_5, features(1, 5) @ learner.mean)
    expected = [float(x @ torch.linalg.inv(hessian) @ x) for x in features(1, 5)]
    assert variance_5.tolist() == pytest.approx(expected)


def test_the_posterior_before_is_the_prior_of_the_next_batch():
    """A batch without examples changes nothing; after two halves the mode minimizes prior' + second half."""
    f_BP, labels_B = features(), (features(3)[:, 0] > 0).double()
    learner = BayesianLogistic(P)
    learner.update(f_BP[:20], labels_B[:20])
    before, precision = learner.mean.clone(), learner.precision.clone()
    learner.update(f_BP[:0], labels_B[:0])
    torch.testing.assert_close(learner.mean, before)
    learner.update(f_BP[20:], labels_B[20:])
    p_B = (f_BP[20:] @ learner.mean).sigmoid()
    gradient_P = precision @ (learner.mean - before) + f_BP[20:].T @ (p_B - labels_B[20:])
    assert gradient_P.abs().max() < 1e-7


def test_a_weight_that_is_forgotten_starts_again_and_the_others_keep_what_they_know():
    learner = BayesianLogistic(P, prior_precision=LAMBDA)
    learner.update(features(), (features(3)[:, 0] > 0).double())
    mean, covariance = learner.mean.clone(), torch.linalg.inv(learner.precision)
    learner.forget(torch.tensor([2]))
    others = torch.tensor([0, 1, 3])
    assert learner.mean[2] == 0 and learner.covariance()[2, 2] == pytest.approx(1 / LAMBDA)
    torch.testing.assert_close(learner.mean[others], mean[others])
    torch.testing.assert_close(torch.linalg.inv(learner.precision)[others][:, others], covariance[others][:, others])
    assert learner.covariance()[2, others].abs().max() == 0
