"""The promises of an expert, held by every kind in the dict; then each kind against its formula."""

import pytest
import torch

from hmoe_rec.experts import EXPERTS
from hmoe_rec.experts.bank import ExpertBank
from hmoe_rec.experts.dcnv2 import CrossLayers, DCNv2Expert
from hmoe_rec.experts.flat_dnn import FlatDNNExpert
from hmoe_rec.experts.gwpfm import GroupWeightedPartFM, GwPFMExpert
from hmoe_rec.layers import resolve

B, F, D, H = 5, 4, 6, 7


@pytest.fixture(params=sorted(EXPERTS))
def expert(request):
    return resolve(request.param, EXPERTS)(F, D, H)


class TestContract:
    def test_shape_and_non_negative_output(self, expert):
        out = expert(torch.randn(B, F, D))
        assert out.shape == (B, H) and (out >= 0).all() and out.count_nonzero() > 0

    def test_examples_are_independent(self, expert):
        x = torch.randn(B, F, D)
        torch.testing.assert_close(expert(x)[2:3], expert(x[2:3]))

    def test_gradient_reaches_every_field_and_parameter(self, expert):
        x = torch.randn(9 * B, F, D, requires_grad=True)
        expert(x).sum().backward()
        assert (x.grad.abs().sum((0, 2)) > 0).all()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in expert.parameters())

    def test_empty_batch(self, expert):
        assert expert(torch.randn(0, F, D)).shape == (0, H)

    def test_state_round_trip(self, expert):
        other = type(expert)(F, D, H)
        other.load_state_dict(expert.state_dict())
        x = torch.randn(B, F, D)
        assert torch.equal(other(x), expert(x))

    def test_traces(self, expert):
        x = torch.randn(B, F, D)
        assert torch.equal(torch.fx.symbolic_trace(expert)(x), expert(x))

    def test_one_width_more_than_the_last_is_hidden(self, expert):
        deeper = type(expert)(F, D, H, hidden=(11, 3))
        assert deeper(torch.randn(B, F, D)).shape == (B, H)


def test_flat_dnn_equals_its_formula():
    expert = FlatDNNExpert(F, D, H, hidden=(11,))
    x = torch.randn(B, F, D)
    first, last = expert.mlp.layers
    expected = torch.relu(last(torch.relu(first(x.reshape(B, F * D)))))
    torch.testing.assert_close(expert(x), expected)


class TestCrossLayers:
    def test_equals_the_formula(self):
        cross = CrossLayers(F * D, num_layers=3).double()
        x = torch.randn(B, F, D, dtype=torch.float64)
        expected = []
        for row in x.reshape(B, F * D):
            state = row
            for layer in cross.layers:
                state = row * (layer.weight @ state + layer.bias) + state
            expected.append(state)
        torch.testing.assert_close(cross(x), torch.stack(expected))

    def test_equals_torchrecs_cross_net(self):
        from torchrec.modules.crossnet import CrossNet

        ours, theirs = CrossLayers(F * D, num_layers=2), CrossNet(F * D, num_layers=2)
        for layer, kernel, bias in zip(ours.layers, theirs.kernels, theirs.bias, strict=True):
            layer.weight.data.copy_(kernel)
            layer.bias.data.copy_(bias.squeeze(1))
        x = torch.randn(B, F, D)
        torch.testing.assert_close(ours(x), theirs(x.flatten(1)))

    def test_zero_weights_return_the_input(self):
        cross = CrossLayers(F * D, num_layers=2)
        for parameter in cross.parameters():
            torch.nn.init.zeros_(parameter)
        x = torch.randn(B, F, D)
        assert torch.equal(cross(x), x.flatten(1))

    def test_low_rank_equals_full_with_the_product(self):
        low, full = CrossLayers(F * D, 1, rank=3), CrossLayers(F * D, 1)
        first, second = low.layers[0]
        full.layers[0].weight.data.copy_(second.weight @ first.weight)
        full.layers[0].bias.data.copy_(second.bias)
        x = torch.randn(B, F, D)
        torch.testing.assert_close(low(x), full(x), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("options", [{"num_layers": 0}, {"rank": 0}, {"rank": F * D + 1}])
    def test_sizes_that_cannot_work(self, options):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            DCNv2Expert(F, D, H, **options)


def naive_gwpfm(x, r, groups, parts, num_parts):
    """The published sum over pairs, field by field."""
    batch, num_fields, dim = x.shape
    x = x.view(batch, num_fields, num_parts, dim // num_parts)
    total = torch.zeros(batch, dim // num_parts, dtype=x.dtype)
    for i in range(num_fields):
        for j in range(i + 1, num_fields):
            total += r[groups[i], groups[j]] * x[:, i, parts[j]] * x[:, j, parts[i]]
    return total


class TestGwPFM:
    def test_worked_example(self):
        """Worked by hand: 3 fields, groups (0, 0, 1), K = 1, r = [[1, 2], [2, 3]]: 3 + 20 + 40 = 63."""
        interaction = GroupWeightedPartFM(3, 2, num_parts=2, parts=(0, 0, 1)).double()
        interaction.weight.data.copy_(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
        fields = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]], dtype=torch.float64)
        assert interaction(fields).item() == pytest.approx(63.0)

    @pytest.mark.parametrize(
        ("num_fields", "num_parts", "groups", "parts"),
        [
            (7, 3, None, None),
            (5, 5, None, None),
            (6, 2, (0, 2, 1, 1, 0, 2), (1, 0, 0, 1, 1, 0)),
            (4, 3, (0, 0, 0, 0), (2, 2, 0, 2)),
        ],
    )
    def test_fast_form_equals_the_pair_sum(self, num_fields, num_parts, groups, parts):
        interaction = GroupWeightedPartFM(num_fields, 4 * num_parts, num_parts, groups, parts).double()
        torch.nn.init.normal_(interaction.weight)
        parts = parts or [i * num_parts // num_fields for i in range(num_fields)]
        r = (interaction.weight + interaction.weight.T) / 2
        x = torch.randn(B, num_fields, 4 * num_parts, dtype=torch.float64)
        expected = naive_gwpfm(x, r, groups or parts, parts, num_parts)
        torch.testing.assert_close(interaction(x), expected, atol=1e-12, rtol=1e-12)

    def test_one_part_is_a_factorization_machine(self):
        interaction = GroupWeightedPartFM(F, D, num_parts=1).double()
        x = torch.randn(B, F, D, dtype=torch.float64)
        torch.testing.assert_close(interaction(x), (x.sum(1).square() - x.square().sum(1)) / 2)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_parts": 4}, "width 6 must be num_parts x part width, got num_parts 4"),
            ({"num_parts": 2, "parts": (0, 1)}, r"parts must name one number per field \(4\), got 2"),
            ({"num_parts": 2, "parts": (0, 1, 2, 0)}, "parts must be >= 0 and < 2"),
            ({"num_parts": 2, "groups": (0, 1, -1, 0)}, "groups must be >= 0"),
        ],
    )
    def test_partitions_that_cannot_work(self, options, message):
        with pytest.raises(ValueError, match=message):
            GwPFMExpert(F, D, H, **options)


class TestBank:
    def bank(self) -> ExpertBank:
        experts = {
            "a": FlatDNNExpert(F, D, H, hidden=(11,)),
            "b": DCNv2Expert(F, D, H),
            "c": FlatDNNExpert(F, D, H, hidden=(11,)),
            "d": GwPFMExpert(F, D, H),
            "e": torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(F * D, H)),
            "f": FlatDNNExpert(F, D, H, hidden=(11,)),
        }
        return ExpertBank(experts, {"a": "x", "b": "y", "c": "x", "d": "x", "e": "y", "f": "y"})

    @pytest.mark.parametrize("batched", [False, True])
    def test_equals_every_expert_by_itself(self, batched, monkeypatch):
        monkeypatch.setattr("hmoe_rec.layers.batching_pays", lambda: batched)
        bank, fields = self.bank(), {"x": torch.randn(B, F, D), "y": torch.randn(B, F, D)}
        expected = torch.stack([e(fields[s]) for e, s in zip(bank.experts.values(), bank.sets, strict=True)])
        torch.testing.assert_close(bank(fields), expected)

    def test_batched_and_looped_gradients_are_equal(self, monkeypatch):
        bank, fields = self.bank(), {"x": torch.randn(B, F, D), "y": torch.randn(B, F, D)}
        gradients = []
        for batched in (False, True):
            monkeypatch.setattr("hmoe_rec.layers.batching_pays", lambda batched=batched: batched)
            bank.zero_grad()
            bank(fields).square().sum().backward()
            gradients.append([p.grad.clone() for p in bank.parameters()])
        torch.testing.assert_close(gradients[0], gradients[1])

    def test_an_interaction_without_parameters_is_computed_once_per_set(self, monkeypatch):
        calls = []
        flatten = torch.nn.Flatten.forward
        monkeypatch.setattr(torch.nn.Flatten, "forward", lambda self, x: calls.append(1) or flatten(self, x))
        self.bank()({"x": torch.randn(B, F, D), "y": torch.randn(B, F, D)})
        assert len(calls) == 3  # a and c share x; f reads y; e is a part of its own


def test_a_part_from_elsewhere_is_found_by_its_path():
    assert resolve("hmoe_rec.experts.dcnv2:DCNv2Expert", EXPERTS) is DCNv2Expert


@pytest.mark.parametrize("kind", ["dcnv3", "no.such.module:Class", "hmoe_rec.experts.dcnv2:Nothing"])
def test_unknown_kind(kind):
    with pytest.raises(ValueError, match=kind.split(":")[0]):
        resolve(kind, EXPERTS)
