"""The objective of tasks: composition, what is reported, groups, and several processes against one."""

import pytest
import torch
from gloo import run_ranks
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.batch import Batch
from hmoe_rec.kinds import resolve
from hmoe_rec.losses import LOSSES
from hmoe_rec.losses.base import Examples, Loss
from hmoe_rec.losses.bce import bce
from hmoe_rec.training.objective import Objective, groups_of
from hmoe_rec.types import HASH_OF_MISSING

NAN = float("nan")
SIZE = 12


def make(kind: str, **options) -> Loss:
    return resolve(kind, LOSSES)(**options)


def global_batch(rows: slice = slice(None)) -> tuple[torch.Tensor, Batch]:
    """Levels [B, T, 2] and a batch of two tasks; the ids are a request (some have none) and another field before it."""
    generator = torch.Generator().manual_seed(4)
    levels = torch.randn(SIZE, 2, 2, generator=generator)
    labels = torch.randint(0, 2, (SIZE, 2), generator=generator).float()
    labels[3, 0] = labels[10, 1] = NAN
    request = [[7], [7], [8], [], [7], [8], [2**40], [8], [7], [], [2**40], [8]][rows]
    lengths = torch.tensor([1] * len(request) + [len(r) for r in request])
    values = torch.tensor([0] * len(request) + [x for r in request for x in r])
    sparse = KeyedJaggedTensor(keys=["other", "request"], values=values, lengths=lengths)
    weights = torch.rand(SIZE, generator=generator) + 0.5
    batch = Batch.of(sparse, labels[rows], weights=weights[rows])
    groups = torch.tensor([1, 1, 2, 2, -5, -5, 1, 2, -5, 1, 2, 2])[rows]
    return levels[rows], Batch(**{**vars(batch), "groups": groups})


def test_a_task_without_losses_has_cross_entropy_and_that_is_what_is_reported():
    levels, batch = global_batch()
    logits = levels[..., 1] - levels[..., 0]
    losses = {
        "b": [make("bce", weight=0.7, positive_weight=0.1), make("pair", weight=0.3), make("pair", within="user")]
    }
    objective = Objective(["a", "b"], losses, False)
    found = objective(logits, None, batch)
    expected = bce(logits, batch.labels, batch.weights)
    torch.testing.assert_close(found.bce_T, expected)
    assert objective.names == ["b/bce", "b/pair", "b/pair_2"] and torch.equal(found.losses_T[0], expected[0])
    parts = [
        loss.mean(Examples.of(logits[:, 1] + loss.offset, batch.labels[:, 1], batch.weights, groups))
        for loss, groups in zip(losses["b"], (None, None, batch.groups), strict=True)
    ]
    torch.testing.assert_close(found.terms_K, torch.stack(parts))
    torch.testing.assert_close(found.losses_T[1], 0.7 * parts[0] + 0.3 * parts[1] + parts[2])
    spelled_out = Objective(["a", "b"], {"a": [make("bce")]}, False)(logits, None, batch)
    torch.testing.assert_close(spelled_out.losses_T, expected)
    evaluated = objective.eval()(logits, None, batch)
    assert torch.equal(evaluated.bce_T, found.bce_T) and torch.equal(evaluated.losses_T, found.bce_T)


def test_a_batch_of_one_class_teaches_a_task_of_pairs_nothing():
    levels, batch = global_batch()
    logits = levels[..., 1] - levels[..., 0]
    batch = Batch(**{**vars(batch), "labels": batch.labels * 0})
    losses = {"b": [make("pair"), make("list", within="request")]}
    assert Objective(["a", "b"], losses, False)(logits, None, batch).present_T.tolist() == [1, 0]
    with_bce = {"a": [make("pair")], "b": [make("pair"), make("bce")]}
    assert Objective(["a", "b"], with_bce, False)(logits, None, batch).present_T.tolist() == [0, 1]
    assert Objective(["a", "b"], losses, False).eval()(logits, None, batch).present_T.tolist() == [1, 1]


def test_examples_without_a_request_are_compared_with_nobody():
    levels, batch = global_batch()
    groups, has = groups_of(batch, "request")
    assert has.tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1]
    assert groups[has > 0].tolist() == [7, 7, 8, 7, 8, 2**40, 8, 7, 2**40, 8]
    logits = levels[..., 1].clone().requires_grad_()
    objective = Objective(["a", "b"], {"a": [make("list", within="request")]}, False)
    objective(logits, None, batch).losses_T[0].backward()
    assert (logits.grad[[3, 9], 0] == 0).all() and (logits.grad[:, 0] != 0).sum() > 4


def test_examples_of_nobody_are_compared_with_nobody():
    levels, batch = global_batch()
    groups = torch.where(batch.groups == -5, HASH_OF_MISSING, batch.groups)
    logits = levels[..., 1].clone().requires_grad_()
    objective = Objective(["a", "b"], {"a": [make("pair", within="user")]}, False)
    objective(logits, None, Batch(**{**vars(batch), "groups": groups})).losses_T[0].backward()
    assert (logits.grad[batch.groups == -5] == 0).all() and (logits.grad[:, 0] != 0).sum() > 4


def test_a_missing_label_and_no_label_at_all():
    levels, batch = global_batch()
    labels = batch.labels.clone()
    labels[:, 1] = NAN
    batch = Batch(**{**vars(batch), "labels": labels})
    losses = {"b": [make(kind) for kind in LOSSES]}
    levels.requires_grad_()
    found = Objective(["a", "b"], losses, False)(levels[..., 1] - levels[..., 0], levels, batch)
    found.losses_T.sum().backward()
    assert found.present_T.tolist() == [1, 0] and (found.terms_K == 0).all()
    assert (levels.grad[:, 1] == 0).all() and (levels.grad[:, 0] != 0).any()


# ---------------------------------------------------------------------------------------------------- several processes

ACROSS = [
    {"kind": "focal"},
    {"kind": "focal", "mean_over": "all", "gamma": 0.5, "positive_weight": 3.0},
    *({"kind": kind, "across_ranks": True} for kind in ("pair", "list", "rcr", "jrc")),
    *({"kind": kind, "across_ranks": True, "within": "user"} for kind in ("pair", "list", "jrc")),
    {"kind": "rcr", "across_ranks": True, "within": "request", "positive_weight": 0.2},
    {"kind": "bce", "positive_weight": 0.3},
]
CUTS = {  # number of ranks -> their examples
    2: {"equal": (0, 6, 12), "unequal": (0, 3, 12), "empty": (0, 0, 12)},
    3: {"equal": (0, 4, 8, 12), "unequal": (0, 1, 7, 12), "empty": (0, 5, 5, 12)},
}


def value_and_gradient(part: dict, distributed: bool, rows: slice) -> list[torch.Tensor]:
    """Losses, terms, and the gradient by parameters that all examples share."""
    levels, batch = global_batch(rows)
    parameters = torch.tensor([[0.7, -0.2], [1.1, 0.4]], requires_grad=True)
    levels = (levels * parameters).tanh()
    part = dict(part)
    losses = {"a": [make(part.pop("kind"), **part)], "b": [make("bce"), make("pair", across_ranks=True)]}
    found = Objective(["a", "b"], losses, distributed)(levels[..., 1] - levels[..., 0], levels, batch)
    found.losses_T.sum().backward()
    return [found.bce_T.detach(), found.losses_T.detach(), found.terms_K, parameters.grad]


def on_ranks(rank: int, world_size: int) -> dict:
    levels, batch = global_batch(slice(0, 3) if rank == 0 else slice(3, None))
    local = Objective(["a", "b"], {"a": [make("pair")]}, True)(levels[..., 1], None, batch).terms_K
    return {"local": local} | {
        (i, cut): value_and_gradient(part, True, slice(*limits[rank : rank + 2]))
        for i, part in enumerate(ACROSS)
        for cut, limits in CUTS[world_size].items()
    }


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict]]:
    return {n: run_ranks(n, on_ranks) for n in CUTS}


def test_several_ranks_equal_one_on_the_whole_batch(ranks):
    for i, part in enumerate(ACROSS):
        whole = value_and_gradient(part, False, slice(None))
        assert whole[3].abs().min() > 0
        for n, results in ranks.items():
            for cut in CUTS[n]:
                means = [torch.stack(values).mean(0) for values in zip(*(r[i, cut] for r in results), strict=True)]
                wrong = [j for j, (m, w) in enumerate(zip(means, whole, strict=True)) if (m - w).abs().max() > 2e-6]
                assert not wrong, (part, n, cut, wrong)


def test_focal_exchanges_no_examples():
    objective = Objective(["a"], {"a": [make("focal")]}, True)
    assert (
        not objective.gathers and Objective(["a"], {"a": [make("focal"), make("jrc", across_ranks=True)]}, True).gathers
    )


def test_pairs_inside_of_processes_are_averaged_over_all_of_them(ranks):
    """Not the mean of two means: rank 0 has 3 examples, rank 1 has 9."""
    both = ranks[2]
    sums = []
    for rows in (slice(0, 3), slice(3, None)):
        levels, batch = global_batch(rows)
        sums.append(make("pair")(Examples.of(levels[:, 0, 1], batch.labels[:, 0], batch.weights)))
    expected = sum(s.sum for s in sums) / sum(s.total for s in sums)
    torch.testing.assert_close((both[0]["local"] + both[1]["local"]).squeeze(0) / 2, expected)


@pytest.mark.parametrize("across", [True, False])
def test_one_process_needs_no_group(across):
    levels, batch = global_batch()
    losses = {"a": [make("list", across_ranks=across)]}
    assert Objective(["a", "b"], losses, False)(levels[..., 1], None, batch).terms_K > 0
