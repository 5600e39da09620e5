"""Ranking losses: every formula as a loop over examples, what all losses promise, and large batches."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hmoe_rec.kinds import resolve
from hmoe_rec.losses import LOSSES, pairs
from hmoe_rec.losses.base import Examples, Loss
from hmoe_rec.losses.pairs import all_pairs, pairs_within
from hmoe_rec.losses.ranking import JRCLoss, PairLoss

NAN = float("nan")
COMPARING = ("pair", "list", "rcr", "jrc")
BETA = 0.3


def make(kind: str, **options) -> Loss:
    return resolve(kind, LOSSES)(**options)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------- naive references


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def naive(
    kind: str, z: list, y: list, w: list, group: list, levels: list, beta: float, mean_over: str, gamma: float = 2.0
) -> float:
    """Every example, every partner, in plain numbers; z, y, w, group and levels of the examples that count."""
    count = range(len(z))
    lists = [[k for k in count if group[k] == group[i]] for i in count]
    mixed = [{y[k] for k in lists[i]} == {0.0, 1.0} for i in count]
    positives, negatives = [i for i in count if y[i]], [i for i in count if not y[i]]
    b = [beta if y[i] else 1.0 for i in count]
    nats = [-math.log(sigmoid(z[i] if y[i] else -z[i])) for i in count]
    if kind == "bce":
        return sum(w[i] * b[i] * nats[i] for i in count) / sum(w)
    if kind == "focal":
        over = count if mean_over == "all" else negatives
        mean = sum(w[i] * sigmoid(z[i]) ** gamma for i in over) / sum(w[i] for i in over)
        focus = [sigmoid(-z[i]) ** gamma if y[i] else sigmoid(z[i]) ** gamma + 1 - mean for i in count]
        return sum(w[i] * b[i] * focus[i] * nats[i] for i in count) / sum(w)
    if kind == "pair":
        inside = [(i, j) for i in positives for j in negatives if group[i] == group[j]]
        total = sum(w[i] * w[j] for i, j in inside)
        return sum(w[i] * w[j] * math.log(1 + math.exp(z[j] - z[i])) for i, j in inside) / total if inside else 0.0
    if kind == "jrc":
        total = sum(w[i] for i in count if mixed[i])
        own = [[level[int(y[i])] for level in levels] for i in count]  # the column of i's class
        sums = [sum(w[k] * b[k] * math.exp(own[i][k] - own[i][i]) for k in lists[i]) for i in count]
        terms = [w[i] * b[i] * math.log(sums[i]) for i in count if mixed[i]]
        return sum(terms) / total if terms else 0.0
    score = {"list": math.exp, "rcr": sigmoid}[kind]
    counted = [i for i in positives if mixed[i]]
    terms = [-w[i] * math.log(score(z[i]) / sum(w[k] * b[k] * score(z[k]) for k in lists[i])) for i in counted]
    return sum(terms) / sum(w[i] for i in counted) if counted else 0.0


LEVELS = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = [1, 0, NAN, 1, 0, 0, 1, 1, 0]
WEIGHTS = [1.0, 2.0, 1.0, 0.5, 0.0, 1.5, 1.0, 0.7, 0.2]
GROUPS = {"one list": [0] * 9, "groups": [7, 7, 7, -4, -4, 9, 9, 3, 9]}  # -4 and 3 have one class among what counts


def examples(levels: torch.Tensor, groups: list | None) -> Examples:
    groups_B = None if groups is None else torch.tensor(groups)
    return Examples.of(levels[:, 1] - levels[:, 0], double(*LABELS), double(*WEIGHTS), groups_B, levels)


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        *((kind, "one list", {}) for kind in LOSSES),
        ("focal", "one list", {"mean_over": "all"}),
        *((kind, "groups", {}) for kind in COMPARING),
    ],
)
def test_equals_a_loop_in_value_and_gradient(kind, name, options):
    loss = make(kind, **options, **({} if kind == "pair" else {"positive_weight": BETA}))
    keep = [i for i in range(9) if not math.isnan(LABELS[i]) and WEIGHTS[i] > 0]

    def by_loop(levels: torch.Tensor) -> float:
        z = (levels[:, 1] - levels[:, 0]).tolist()
        picked = [[x[i] for i in keep] for x in (z, LABELS, WEIGHTS, GROUPS[name], levels.tolist())]
        return naive(kind, *picked, beta=BETA, mean_over=options.get("mean_over", "negatives"))

    levels = LEVELS.clone().requires_grad_()
    value = loss.mean(examples(levels, GROUPS[name] if name == "groups" else None))
    assert value.item() == pytest.approx(by_loop(LEVELS), rel=1e-9)
    (gradient,) = torch.autograd.grad(value, levels)
    for i in range(9):
        for c in (0, 1):
            step = torch.zeros_like(LEVELS)
            step[i, c] = 1e-5
            slope = (by_loop(LEVELS + step) - by_loop(LEVELS - step)) / 2e-5
            assert gradient[i, c].item() == pytest.approx(slope, abs=1e-8)


# ------------------------------------------------------------------------------------------------------- known values


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("pair", 0.537189), ("list", 0.238271), ("rcr", 0.238271), ("jrc", 0.216826)],
)
def test_combined_with_half_a_cross_entropy(kind, expected):
    """z = (0, 0), y = (1, 0), beta .1, alpha .5; cross-entropy alone is (.1 + 1) ln 2 / 2 = .381231."""
    x = Examples.of(double(0, 0), double(1, 0), levels_B2=torch.zeros(2, 2, dtype=torch.float64))
    options = {} if kind == "pair" else {"positive_weight": 0.1}
    combined = 0.5 * make("bce", positive_weight=0.1).mean(x) + 0.5 * make(kind, **options).mean(x)
    assert combined.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"), [("bce", 0.439890), ("pair", 0.220095), ("list", 0.407606), ("rcr", 0.718726)]
)
def test_three_examples_by_hand(kind, expected):
    """z = (1, -1, 0), y = (1, 0, 0): pair (softplus(-2) + softplus(-1)) / 2, list log(1 + e^-2 + e^-1), ..."""
    x = Examples.of(double(1, -1, 0), double(1, 0, 0))
    assert make(kind).mean(x).item() == pytest.approx(expected, abs=1e-6)


def test_a_negative_is_pushed_by_its_gaps_in_pair_and_by_its_probability_in_cross_entropy():
    z, y = double(0.3, -1.2, 2.0, 0.1, -0.4).requires_grad_(), double(1, 0, 1, 0, 0)
    (pair,) = torch.autograd.grad(PairLoss().mean(Examples.of(z, y)), z)
    expected = torch.stack([(z[j] - z[[0, 2]]).sigmoid().mean() / 3 for j in (1, 3, 4)])
    torch.testing.assert_close(pair[[1, 3, 4]], expected.detach())
    (bce,) = torch.autograd.grad(make("bce").mean(Examples.of(z, y)), z)
    torch.testing.assert_close(bce[1], z[1].sigmoid().detach() / 5)


def test_gamma_zero_is_cross_entropy_and_the_weights_of_negatives_are_one_on_average():
    z, y = torch.randn(50, dtype=torch.float64), (torch.rand(50) < 0.3).double()
    torch.testing.assert_close(make("focal", gamma=0.0).mean(Examples.of(z, y)), make("bce").mean(Examples.of(z, y)))
    equal = Examples.of(torch.full((4,), -1.3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(make("focal", gamma=3.0).mean(equal), make("bce").mean(equal))
    x = Examples.of(z + 2 * y, y)  # positives have larger p: with them more is subtracted
    assert make("focal", mean_over="all").mean(x) < make("focal").mean(x)


def test_negatives_weigh_one_on_average_in_a_batch_of_both_classes():
    """Of equal logits the mean takes all focus away; positives of another logit have no part in it."""
    z, y = double(2.5, -1.3, -1.3, -1.3), double(1, 0, 0, 0)
    p = z.sigmoid()
    expected = (1 - p[0]) ** 2 * -p[0].log() - (1 - p[1:]).log().sum()
    torch.testing.assert_close(make("focal").mean(Examples.of(z, y)), expected / 4)
    assert make("focal", mean_over="all").mean(Examples.of(z, y)) < expected / 4


# ------------------------------------------------------------------------------------------ what every loss promises


def random_examples(size: int, *, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 2, dtype=dtype), (torch.rand(size) < 0.4).to(dtype)


def of(levels, labels, weights=None, groups=None) -> Examples:
    return Examples.of(levels[:, 1] - levels[:, 0], labels, weights, groups, levels)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_an_example_of_weight_k_counts_as_k_examples_and_others_not_at_all(kind, grouped):
    levels, labels = random_examples(12)
    groups = torch.arange(12) % 3 if grouped else None
    times = torch.tensor([1, 3, 0, 2, 1, 1, 0, 2, 1, 4, 1, 1])
    weighted = make(kind).mean(of(levels, labels, times.double(), groups))
    copies = torch.repeat_interleave(torch.arange(12), times)
    copied = make(kind).mean(of(levels[copies], labels[copies], None, None if groups is None else groups[copies]))
    torch.testing.assert_close(weighted, copied)
    dirty, missing = levels.clone(), labels.clone()
    dirty[2], missing[6], dirty[6] = math.inf, NAN, NAN  # one of weight 0, one without a label
    torch.testing.assert_close(make(kind).mean(of(dirty, missing, times.double(), groups)), weighted)


@pytest.mark.parametrize("label", [0.0, 1.0, NAN])
@pytest.mark.parametrize("kind", LOSSES)
def test_one_class_alone_has_nothing_to_compare(kind, label):
    for groups in (None, torch.tensor([1, 1, 2, 3, 3])):
        levels = random_examples(5)[0].requires_grad_()
        value = make(kind).mean(of(levels, torch.full((5,), label, dtype=torch.float64), None, groups))
        (gradient,) = torch.autograd.grad(value, levels)
        assert gradient.isfinite().all()
        if kind in COMPARING or math.isnan(label):
            assert value == 0 and (gradient == 0).all()
        else:
            assert value > 0


@pytest.mark.parametrize("kind", LOSSES)
def test_extreme_logits_are_finite_in_float32(kind):
    levels = torch.tensor([[0.0, 80.0], [80.0, 0.0], [0.0, -80.0], [0.0, 80.0], [-80.0, 0.0]])
    for labels in (torch.tensor([1.0, 0, 1, 0, 0]), torch.tensor([0.0, 1, 0, 1, 1])):
        x = levels.clone().requires_grad_()
        value = make(kind, **({} if kind == "pair" else {"positive_weight": 1e-3})).mean(of(x, labels))
        value.backward()
        assert value.isfinite() and value.dtype == torch.float32 and x.grad.isfinite().all()


@pytest.mark.parametrize("kind", LOSSES)
def test_an_empty_batch_is_zero(kind):
    for groups in (None, torch.zeros(0, dtype=torch.int64)):
        sums = make(kind)(of(torch.zeros(0, 2), torch.zeros(0), None, groups))
        assert sums.sum == 0 and sums.total == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "bce", "weight": -1.0}, "weight must be a number >= 0, got -1.0"),
        ({"kind": "list", "positive_weight": math.inf}, "positive_weight must be a number >= 0, got inf"),
        ({"kind": "focal", "gamma": -0.5}, "gamma must be >= 0, got -0.5"),
    ],
)
def test_values_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_jrc_without_two_logits_says_so():
    with pytest.raises(ValueError, match="two logits"):
        JRCLoss()(Examples.of(double(1, 0), double(1, 0)))


# ---------------------------------------------------------------------------------------------------------- many pairs


def by_matrix(z: torch.Tensor, p: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    gaps = z.unsqueeze(0) - z.unsqueeze(1)
    return (p.unsqueeze(1) * n * torch.nn.functional.softplus(gaps, threshold=60)).sum()


@pytest.mark.parametrize(
    ("span", "tolerance"), [(0.0, 1e-12), (1e-4, 1e-12), (7.0, 1e-12), (40.0, 1e-11), (150.0, 1e-9), (400.0, 1e-6)]
)
def test_all_pairs_equal_their_matrix(span, tolerance):
    z = (span * (torch.rand(300, dtype=torch.float64) - 0.3)).requires_grad_()
    w, y = torch.rand(300, dtype=torch.float64), (torch.rand(300) < 0.2).double()
    p, n = w * y, w * (1 - y)
    ours, expected = all_pairs(z, p, n), by_matrix(z, p, n)
    assert (ours - expected).abs() <= tolerance * p.sum() * n.sum()
    (gradient,), (by_hand,) = torch.autograd.grad(ours, z), torch.autograd.grad(expected, z)
    assert (gradient - by_hand).abs().max() <= tolerance * max(p.sum(), n.sum())


def test_pairs_in_groups_do_not_depend_on_the_chunks(monkeypatch):
    z, groups = torch.randn(200, dtype=torch.float64).requires_grad_(), torch.randint(0, 5, (200,)) * 10**15
    w, y = torch.rand(200, dtype=torch.float64), (torch.rand(200) < 0.3).double()
    found = []
    for size in (1 << 20, 37):
        monkeypatch.setattr(pairs, "PAIRS_AT_A_TIME", size)
        value, total = pairs_within(z, w * y, w * (1 - y), groups)
        found.append([value, total, *torch.autograd.grad(value, z)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    one_group = pairs_within(z, w * y, w * (1 - y), torch.zeros_like(groups))[0]
    torch.testing.assert_close(one_group, all_pairs(z, w * y, w * (1 - y)), rtol=1e-9, atol=0)


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that an operator gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        self.numel = max([self.numel, *(x.numel() for x in outputs if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("kind", COMPARING)
def test_a_batch_of_65536_makes_no_matrix_of_pairs(kind):
    """16,384 positives x 49,152 negatives would be 805 million numbers."""
    levels, labels = random_examples(65536, dtype=torch.float32)
    for groups in (None, torch.randint(0, 2000, (65536,))):
        x = levels.clone().requires_grad_()
        with LargestTensor() as largest:
            make(kind).mean(of(x, labels, None, groups)).backward()
        assert largest.numel <= 2 * pairs.PAIRS_AT_A_TIME and x.grad.abs().sum() > 0
