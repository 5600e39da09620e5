"""Gates and routes: exact zeros, stops by autograd, every way to combine against a loop."""

import pytest
import torch

from hmoe_rec.towers.gate import COMBINES, Mixture
from hmoe_rec.towers.layout import GateInput, Routing
from hmoe_rec.towers.tower import Towers

B, E, H, F, D = 5, 3, 7, 4, 6
CELLS = (("train", "read", "none"), ("read", "train", "train"))
GATES = (GateInput(("x",)), GateInput(("x", "y"), "sum"))


def mixture(combine: str = "gate", cells=CELLS, gates=GATES) -> Mixture:
    return Mixture(
        Routing(("a", "b"), ("e1", "e2", "e3"), cells, gates, combine), {"x": F * D, "y": F * D}, H, hidden=(8,)
    )


def fields():
    return {"x": torch.randn(B, F, D), "y": torch.randn(B, F, D)}


def naive(m: Mixture, weights_TBE: torch.Tensor, h_EBH: torch.Tensor) -> list[torch.Tensor]:
    return [sum(weights_TBE[t, :, e : e + 1] * h_EBH[e] for e in range(E)) for t in range(2)]


@pytest.mark.parametrize("combine", ["gate", "mean", "sum", "weighted_sum"])
def test_equals_a_loop(combine):
    m, x, h = mixture(combine), fields(), torch.randn(E, B, H)
    if combine == "gate":
        w = m.weights(x)
        torch.testing.assert_close(w.sum(2), torch.ones(2, B))
    else:
        value = {"mean": [1 / 2, 1 / 3], "sum": [1.0, 1.0], "weighted_sum": [1.0, 1.0]}[combine]
        reach = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
        w = (reach * torch.tensor(value)[:, None])[:, None].expand(2, B, E)
    assert (w[0, :, 2] == 0).all()
    for ours, expected in zip(m(x, h), naive(m, w, h), strict=True):
        torch.testing.assert_close(ours, expected)


def test_concat_puts_reachable_experts_side_by_side():
    m, h = mixture("concat"), torch.randn(E, B, H)
    a, b = m(fields(), h)
    assert m.out_dims == [2 * H, 3 * H]
    assert torch.equal(a, torch.cat([h[0], h[1]], 1)) and torch.equal(b, torch.cat([h[0], h[1], h[2]], 1))


@pytest.mark.parametrize("combine", COMBINES)
def test_only_trained_cells_get_gradient(combine):
    m, x = mixture(combine), fields()
    for t in range(2):
        h = torch.randn(E, B, H, requires_grad=True)
        m(x, h)[t].square().sum().backward()
        per_expert = h.grad.abs().sum((1, 2))
        assert [bool(g > 0) for g in per_expert] == [cell == "train" for cell in CELLS[t]]


def test_stopping_never_changes_values():
    stopped, free = mixture(), mixture(cells=tuple(tuple(c.replace("read", "train") for c in row) for row in CELLS))
    free.load_state_dict(stopped.state_dict())
    x, h = fields(), torch.randn(E, B, H)
    torch.testing.assert_close(stopped(x, h), free(x, h))


def test_gate_of_a_task_learns_from_that_task_only():
    m, x, h = mixture(), fields(), torch.randn(E, B, H)
    m(x, h)[0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in m.gates["a"].parameters())
    assert all(p.grad is None or (p.grad == 0).all() for p in m.gates["b"].parameters())


def test_one_reachable_expert_needs_no_gate():
    m = mixture(cells=(("train", "none", "none"), ("none", "train", "train")))
    h = torch.randn(E, B, H)
    assert list(m.gates) == ["b"] and torch.equal(m(fields(), h)[0], h[0])


def test_mean_equals_a_gate_with_equal_logits():
    gate, mean = mixture("gate"), mixture("mean")
    for p in gate.parameters():
        torch.nn.init.zeros_(p)
    x, h = fields(), torch.randn(E, B, H)
    torch.testing.assert_close(gate(x, h), mean(x, h))


def test_weighted_sum_starts_as_the_sum():
    x, h = fields(), torch.randn(E, B, H)
    torch.testing.assert_close(mixture("weighted_sum")(x, h), mixture("sum")(x, h), rtol=0, atol=0)


@pytest.mark.parametrize("combine", COMBINES)
def test_a_none_route_has_weight_exactly_0(combine):
    """Task a cannot reach e3: not a bit of its mixture changes, whatever e3 says and its weights are."""
    m, x, h = mixture(combine), fields(), torch.randn(E, B, H)
    before, reached = m(x, h)
    h[2] = 1e30 * torch.randn(B, H)
    if combine == "weighted_sum":
        torch.nn.init.constant_(m.weight_TE[:, 2], 1e6)
    after, changed = m(x, h)
    assert torch.equal(before, after) and not torch.equal(reached, changed)
    if combine == "gate":
        assert (m.weights(x)[0, :, 2] == 0).all() and (m.weights(x)[1] > 0).all()


def test_a_sum_of_sets_of_different_widths():
    routing = Routing(("a",), ("e1", "e2"), (("train", "train"),), (GateInput(("x", "y"), "sum"),))
    with pytest.raises(ValueError, match=r"different widths \[24, 12\]; use combine: concat"):
        Mixture(routing, {"x": 24, "y": 12}, H)


@pytest.mark.parametrize("batched", [False, True])
def test_towers_equal_every_tower_by_itself(batched, monkeypatch):
    monkeypatch.setattr("hmoe_rec.layers.batching_pays", lambda x: batched)
    towers = Towers(("a", "b"), (H, H), hidden=(9,))
    mixed = [torch.randn(B, H), torch.randn(B, H)]
    expected = torch.cat([towers.towers["a"](mixed[0]), towers.towers["b"](mixed[1])], 1)
    torch.testing.assert_close(towers(mixed), expected)
