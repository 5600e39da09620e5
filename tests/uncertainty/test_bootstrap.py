"""Weights of bootstrap heads: drawn by the row, whatever the batch; and what the heads learn from."""

import math

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.batch import Batch
from hmoe_rec.losses.exposure import ExposureWeights
from hmoe_rec.model import HMoE
from hmoe_rec.towers.routing import preset
from hmoe_rec.training.task import TrainTask
from hmoe_rec.types import Features, IdField
from hmoe_rec.uncertainty.bootstrap import bootstrap_weights


@pytest.mark.parametrize("draws", ["poisson", "bernoulli"])
def test_weights_have_mean_and_variance_one_and_are_independent(draws):
    weights = bootstrap_weights(torch.arange(200_000), 3, draws=draws).double()
    # standard error of a mean of variance 1 is .0022; of the variance of a Poisson(1) .004
    assert (weights.mean(0) - 1).abs().max() < 0.01 and (weights.var(0) - 1).abs().max() < 0.02
    assert (weights.T.corrcoef() - torch.eye(3)).abs().max() < 0.01
    neighbours = torch.stack([weights[:-1, 0], weights[1:, 0]]).corrcoef()[0, 1]
    assert abs(neighbours) < 0.01, "rows with consecutive ids are independent"


def test_poisson_weights_have_poisson_frequencies():
    weights = bootstrap_weights(torch.arange(200_000), 1)[:, 0].long()
    shares = torch.bincount(weights, minlength=9) / len(weights)
    for k in range(6):
        assert shares[k].item() == pytest.approx(math.exp(-1) / math.factorial(k), abs=0.005)


def test_a_row_has_its_weights_in_any_batch_and_other_seeds_other_weights():
    ids = torch.randint(-(2**62), 2**62, (50,))
    order = torch.randperm(50)
    weights = bootstrap_weights(ids, 4)
    assert torch.equal(bootstrap_weights(ids[order][:7], 4), weights[order][:7])
    assert not torch.equal(bootstrap_weights(ids, 4, seed=1), weights)
    assert torch.equal(bootstrap_weights(ids, 6)[:, :4], weights), "more heads leave the first ones as they are"


def test_every_head_minimizes_the_cross_entropy_of_its_own_examples():
    """Naive: head by head, example by example; with offsets of sampled rows and weights of repeated exposures."""
    features = Features(ids=(IdField("user", 7), IdField("item", 5)))
    layout = preset("shared_bottom", ["click", "like"], embedding_dim=4)
    model = HMoE(features, layout, expert_dim=6, tower={"kind": "bootstrap", "num_heads": 3})
    ids = KeyedJaggedTensor(["user", "item"], torch.randint(5, (10,)), lengths=torch.ones(10, dtype=torch.int32))
    labels = torch.tensor([[0.0, 1], [1, 0], [1, torch.nan], [0, 0], [1, 1]])
    weights, row_ids = torch.rand(5) + 0.5, torch.randint(10**9, (5,))
    offsets, exposures = torch.rand(5, 2), torch.arange(5, dtype=torch.int32)
    batch = Batch.of(ids, labels, weights=weights, row_ids=row_ids, offsets=offsets, exposures=exposures)
    exposure = ExposureWeights(["click", "like"], {"click": [1.0, 0.7, 0.5], "like": [0.8]})
    by_label = exposure(labels, exposures)
    task = TrainTask(model, ["click", "like"], exposure=exposure)
    loss, output = task(batch)
    heads = model.towers.heads(model.mix(batch))
    draws = bootstrap_weights(row_ids, 3)
    expected = torch.zeros(2)
    for t in range(2):
        for k in range(3):
            total = nats = 0.0
            for b in range(5):
                if not labels[b, t].isnan():
                    w, p = weights[b] * draws[b, k] * by_label[b, t], (heads[b, t, k] + offsets[b, t]).sigmoid()
                    nats = nats - w * (p.log() if labels[b, t] else (1 - p).log())
                    total = total + w
            expected[t] += nats / total / 3
    torch.testing.assert_close(loss, expected.sum())
    torch.testing.assert_close(output.logits_BT, heads.mean(2).detach() + offsets)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="row_ids"):
        task(Batch.of(ids, labels))
    task.eval()(Batch.of(ids, labels))  # evaluation takes the mean and needs none
