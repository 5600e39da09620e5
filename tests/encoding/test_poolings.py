"""The promises of every pooling of a behavior sequence, then those without time, each against a naive loop."""

import math

import pytest
import torch

from hmoe_rec.encoding import POOLINGS
from hmoe_rec.encoding.din import DIN
from hmoe_rec.encoding.pooling import MeanPooling, TargetAttention
from hmoe_rec.encoding.sasrec import SASRec
from hmoe_rec.kinds import resolve

B, L, D, MAX_LENGTH = 5, 4, 6, 9
LENGTHS = [0, 1, 4, 2, 3]
EMPTY, FULL = 0, 2


@pytest.fixture(params=[False, True], ids=["without times", "with times"])
def has_ages(request):
    return request.param


@pytest.fixture(params=sorted(POOLINGS))
def pooling(request, has_ages):
    return resolve(request.param, POOLINGS)(D, MAX_LENGTH, has_ages)


def batch(has_ages, dtype=torch.float32):
    """Behaviors, target, mask and ages as `FieldEncoder` gives them: oldest first, zeros behind the latest."""
    mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    behaviors = torch.randn(B, L, D, dtype=dtype) * mask[..., None]
    ages = (1e6 * torch.rand(B, L, dtype=dtype)).sort(1, descending=True).values * mask
    return behaviors, torch.randn(B, D, dtype=dtype), mask, ages if has_ages else None


def each(inputs, change):
    """The same change of all inputs that are there."""
    return [None if x is None else change(x) for x in inputs]


def longer(inputs, extra):
    """The same batch with more padding."""
    behaviors, target, mask, ages = inputs
    pad = torch.nn.functional.pad
    return (
        pad(behaviors, (0, 0, 0, extra)),
        target,
        pad(mask, (0, extra)),
        None if ages is None else pad(ages, (0, extra)),
    )


class TestContract:
    def test_shapes_and_an_empty_history_is_zero(self, pooling, has_ages):
        field, summary, target = pooling(*batch(has_ages))
        assert field.shape == summary.shape == target.shape == (B, D)
        for x in (field, summary):
            assert (x[EMPTY] == 0).all() and (x[1:].abs().sum(1) > 0).all()
        assert target[EMPTY].abs().sum() > 0

    def test_gradients_are_finite_and_reach_every_behavior_and_parameter(self, pooling, has_ages):
        behaviors, target, mask, ages = batch(has_ages)
        behaviors.requires_grad_(), target.requires_grad_()
        field = pooling(behaviors, target, mask, ages).field_BD
        (field * torch.randn(B, D)).sum().backward()
        assert behaviors.grad.isfinite().all() and (target.grad is None or target.grad.isfinite().all())
        assert torch.equal(behaviors.grad.abs().sum(2)[FULL] > 0, mask[FULL])
        # From the field alone: data parallelism waits for a gradient of every parameter.
        assert all(p.grad is not None and p.grad.isfinite().all() for p in pooling.parameters())

    def test_gradients_of_a_batch_of_empty_histories_are_finite(self, pooling, has_ages):
        behaviors, target, mask, ages = each(batch(has_ages), torch.zeros_like)
        behaviors.requires_grad_()
        pooling(behaviors, target, mask, ages).field_BD.sum().backward()
        assert behaviors.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in pooling.parameters())

    def test_padding_does_not_matter(self, pooling, has_ages):
        inputs = batch(has_ages)
        torch.testing.assert_close(tuple(pooling(*longer(inputs, 3))), tuple(pooling(*inputs)))

    def test_examples_are_independent(self, pooling, has_ages):
        inputs = batch(has_ages)
        alone = pooling(*each(inputs, lambda x: x[3:4]))
        torch.testing.assert_close(tuple(x[3:4] for x in pooling(*inputs)), tuple(alone))

    @pytest.mark.parametrize("places", [L, 0])
    def test_empty_batch_and_no_place_at_all(self, pooling, has_ages, places):
        traced = torch.fx.symbolic_trace(pooling)
        no_rows = each(batch(has_ages), lambda x: x[:0])
        assert traced(*no_rows).field_BD.shape == (0, D)
        behaviors, target, mask, ages = batch(has_ages)
        nothing = pooling(behaviors[:, :0], target, mask[:, :0], None if ages is None else ages[:, :0])
        assert (nothing.field_BD == 0).all() and nothing.summary_BD.shape == (B, D)

    def test_traces(self, pooling, has_ages):
        traced = torch.fx.symbolic_trace(pooling)
        for inputs in (batch(has_ages), longer(batch(has_ages), 2)):
            torch.testing.assert_close(tuple(traced(*inputs)), tuple(pooling(*inputs)))

    def test_compiles_without_a_break_for_any_length(self, pooling, has_ages):
        torch._dynamo.reset()
        compiled = torch.compile(pooling, fullgraph=True, backend="eager")
        for inputs in (batch(has_ages), longer(batch(has_ages), 2)):
            torch.testing.assert_close(tuple(compiled(*inputs)), tuple(pooling(*inputs)))

    def test_bf16_autocast(self, pooling, has_ages):
        inputs = batch(has_ages)
        with torch.autocast("cpu", torch.bfloat16):
            low = pooling(*inputs)
        for x, expected in zip(low, pooling(*inputs), strict=True):
            torch.testing.assert_close(x.float(), expected, atol=0.05, rtol=0.05)
        assert (low.field_BD[EMPTY] == 0).all()
        if low.field_BD.requires_grad:
            low.field_BD.sum().backward()
        assert all(p.grad.isfinite().all() for p in pooling.parameters())

    def test_state_round_trip(self, pooling, has_ages):
        other = type(pooling)(D, MAX_LENGTH, has_ages)
        other.load_state_dict(pooling.state_dict())
        inputs = batch(has_ages)
        assert all(torch.equal(x, y) for x, y in zip(other(*inputs), pooling(*inputs), strict=True))

    def test_is_built_on_the_meta_device(self, pooling, has_ages):
        with torch.device("meta"):
            part = type(pooling)(D, MAX_LENGTH, has_ages)
        assert all(p.is_meta for p in part.parameters())


@pytest.mark.parametrize(
    ("kind", "order_matters"),
    [("mean", False), ("target_attention", False), ("din", False), ("tim", True), ("sasrec", True)],
)
def test_who_sees_the_order(kind, order_matters):
    pooling = resolve(kind, POOLINGS)(D, MAX_LENGTH, False)
    behaviors, target, mask, _ = batch(False)
    swapped = behaviors.clone()
    swapped[FULL, [0, 3]] = behaviors[FULL, [3, 0]]
    before, after = (pooling(x, target, mask, None).field_BD for x in (behaviors, swapped))
    assert torch.allclose(before, after, atol=1e-6) != order_matters


@pytest.mark.parametrize(
    ("kind", "reads_target"),
    [("mean", False), ("sasrec", False), ("target_attention", True), ("din", True), ("tim", True)],
)
def test_who_sees_the_target(kind, reads_target):
    pooling = resolve(kind, POOLINGS)(D, MAX_LENGTH, False)
    behaviors, target, mask, _ = batch(False)
    before, after = (pooling(behaviors, t, mask, None).field_BD for t in (target, -target))
    assert torch.equal(before, after) != reads_target


def test_mean_equals_a_loop():
    behaviors, target, mask, _ = batch(False)
    out = MeanPooling(D, MAX_LENGTH, False)(behaviors, target, mask, None)
    for i, n in enumerate(LENGTHS):
        expected = behaviors[i, :n].mean(0) if n else torch.zeros(D)
        torch.testing.assert_close(out.field_BD[i], expected)
    assert out.summary_BD is out.field_BD and out.target_BD is target


def test_target_attention_equals_a_loop():
    behaviors, target, mask, _ = batch(False)
    out = TargetAttention(D, MAX_LENGTH, False)(behaviors, target, mask, None)
    for i, n in enumerate(LENGTHS):
        scores = [math.exp(float(behaviors[i, j] @ target[i]) / math.sqrt(D)) for j in range(n)]
        expected = sum((s / sum(scores) * behaviors[i, j] for j, s in enumerate(scores)), torch.zeros(D))
        torch.testing.assert_close(out.field_BD[i], expected)
    assert out.summary_BD is out.field_BD and out.target_BD is target


class TestDIN:
    @pytest.mark.parametrize("softmax", [False, True])
    @pytest.mark.parametrize("hidden", [(7,), (8, 3)])
    def test_equals_a_loop_over_the_wide_concatenation(self, softmax, hidden):
        din = DIN(D, MAX_LENGTH, False, hidden=hidden, softmax=softmax).double()
        behaviors, target, mask, _ = batch(False, torch.float64)
        unit = torch.nn.Sequential(din.first, *din.rest)
        out = din(behaviors, target, mask, None).field_BD
        for i, n in enumerate(LENGTHS):
            v = target[i]
            weights = [unit(torch.cat([e, v, e - v, e * v])) for e in behaviors[i, :n]]
            if softmax and n:
                weights = list((torch.stack(weights) / math.sqrt(D)).softmax(0))
            expected = sum((w * e for w, e in zip(weights, behaviors[i, :n], strict=True)), torch.zeros(D).double())
            torch.testing.assert_close(out[i], expected, atol=1e-12, rtol=1e-12)

    def test_without_softmax_alike_behaviors_add_up(self):
        din, target = DIN(D, MAX_LENGTH, False), torch.randn(1, D)
        once = torch.randn(1, 1, D)
        one, three = (
            din(e, target, torch.ones(e.shape[:2], dtype=torch.bool), None).field_BD
            for e in (once, once.expand(1, 3, D))
        )
        torch.testing.assert_close(three, 3 * one)

    @pytest.mark.parametrize("hidden", [(), (3, 0)])
    def test_widths_that_cannot_work(self, hidden):
        with pytest.raises(ValueError, match="hidden must hold at least one width, all >= 1, got"):
            DIN(D, MAX_LENGTH, False, hidden=hidden)


def naive_sasrec(model, behaviors, num_heads):
    """One history [n, D], n >= 1, place by place and head by head."""
    n = len(behaviors)
    x = torch.stack([behaviors[i] + model.position[n - i] for i in range(n)])
    width = D // num_heads
    for block in model.blocks:
        q, k, v = block.query_key_value(block.attention_norm(x)).split(D, dim=1)
        mixed = torch.zeros_like(x)
        for head in range(num_heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(n):
                scores = torch.stack([q[i, part] @ k[j, part] / math.sqrt(width) for j in range(i + 1)]).softmax(0)
                mixed[i, part] = sum(scores[j] * v[j, part] for j in range(i + 1))
        x = x + mixed
        x = x + block.feed_forward[3](torch.relu(block.feed_forward[0](block.forward_norm(x))))
    return model.norm(x[-1])


class TestSASRec:
    @pytest.mark.parametrize(("num_layers", "num_heads"), [(1, 1), (2, 3)])
    def test_equals_a_loop(self, num_layers, num_heads):
        model = SASRec(D, MAX_LENGTH, False, num_layers=num_layers, num_heads=num_heads).double()
        behaviors, target, mask, _ = batch(False, torch.float64)
        behaviors = torch.where(mask[..., None], behaviors, torch.randn(B, L, D, dtype=torch.float64))
        out = model(behaviors, target, mask, None)
        for i, n in enumerate(LENGTHS):
            expected = naive_sasrec(model, behaviors[i, :n], num_heads) if n else torch.zeros(D, dtype=torch.float64)
            torch.testing.assert_close(out.field_BD[i], expected, atol=1e-12, rtol=1e-12)
        assert out.summary_BD is out.field_BD and out.target_BD is target

    def test_dropout_only_in_training(self):
        model, inputs = SASRec(D, MAX_LENGTH, False, dropout=0.5), batch(False)
        assert not torch.equal(model(*inputs).field_BD, model(*inputs).field_BD)
        model.eval()
        assert torch.equal(model(*inputs).field_BD, model(*inputs).field_BD)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_heads": 4}, "num_heads must divide the width 6, got 4"),
            ({"num_heads": 0}, "num_heads must divide the width 6, got 0"),
            ({"num_layers": 0}, "num_layers must be >= 1, got 0"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ],
    )
    def test_sizes_that_cannot_work(self, options, message):
        with pytest.raises(ValueError, match=message):
            SASRec(D, MAX_LENGTH, False, **options)
