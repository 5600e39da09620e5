"""The promises of a loss: masks, weights, extremes; and the naive sum."""

import math

import torch

from hmoe_rec.losses.bce import bce

NAN = float("nan")


def test_equals_a_loop_with_missing_labels_and_weights():
    logits = torch.randn(5, 2, dtype=torch.float64)
    labels = torch.tensor([[1, 0], [0, NAN], [1, 1], [NAN, 0], [0, 1]], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0], dtype=torch.float64)
    for t, loss in enumerate(bce(logits, labels, weights).tolist()):
        total = weight = 0.0
        for z, y, w in zip(logits[:, t].tolist(), labels[:, t].tolist(), weights.tolist(), strict=True):
            if not math.isnan(y):
                p = 1 / (1 + math.exp(-z))
                total -= w * (y * math.log(p) + (1 - y) * math.log(1 - p))
                weight += w
        assert math.isclose(loss, total / weight, rel_tol=1e-5)


def test_a_task_without_a_label_costs_nothing_and_has_zero_gradient():
    logits = torch.randn(4, 2, requires_grad=True)
    loss = bce(logits, torch.tensor([[1.0, NAN]] * 4), torch.ones(4))
    loss.sum().backward()
    assert loss[1] == 0 and (logits.grad[:, 1] == 0).all() and (logits.grad[:, 0] != 0).all()


def test_extreme_logits_and_one_class_are_finite():
    logits = torch.tensor([[50.0], [-50.0], [80.0]], requires_grad=True)
    loss = bce(logits, torch.zeros(3, 1), torch.ones(3))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


def test_an_example_of_weight_zero_does_not_count():
    logits, labels = torch.randn(5, 2), torch.randint(0, 2, (5, 2)).float()
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    keep = weights > 0
    torch.testing.assert_close(bce(logits, labels, weights), bce(logits[keep], labels[keep], weights[keep]))


def test_empty_batch():
    assert torch.equal(bce(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0)), torch.zeros(3))


def test_parts_with_a_common_total_add_up_to_the_whole():
    logits, labels, weights = torch.randn(7, 2), torch.randint(0, 2, (7, 2)).float(), torch.rand(7) + 0.1
    labels[0, 1] = NAN
    whole = bce(logits, labels, weights)
    total = torch.stack([weights.sum(), weights[1:].sum()]) / 2
    halves = [bce(logits[a], labels[a], weights[a], total_T=total) for a in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole)
