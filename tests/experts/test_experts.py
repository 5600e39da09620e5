"""The promises of an expert, held by every kind in the dict; then each kind against its formula."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hmoe_rec.experts import EXPERTS
from hmoe_rec.experts.bank import ExpertBank
from hmoe_rec.experts.base import Expert, SideBySide
from hmoe_rec.experts.dcnv2 import CrossLayers, DCNv2Expert, MixtureCrossLayers
from hmoe_rec.experts.flat_dnn import FlatDNNExpert
from hmoe_rec.experts.gwpfm import GroupWeightedPartFM, GwPFMExpert, numbers_of_fields
from hmoe_rec.experts.sequence import SequenceExpert
from hmoe_rec.kinds import resolve
from hmoe_rec.layers import MLP, batching_pays, run_together

B, F, D, H, NUM_INTERESTS = 5, 4, 6, 7, 3
VARIANTS = [  # options that change what a kind computes
    ("dcnv2", {"rank": 3}),
    ("dcnv2", {"rank": 3, "num_experts": 2}),
    ("gwpfm", {"num_parts": 3, "groups": (0, 1, 1, 0), "parts": (2, 0, 1, 2)}),
    ("final_mlp", {"gate": False, "num_heads": 1}),
    ("masknet", {"parallel": False, "reduction_ratio": 2.0}),
    ("autoint", {"scale": True, "num_heads": 1, "attention_dim": 5}),
]


@pytest.fixture(params=[(kind, {}) for kind in sorted(EXPERTS)] + VARIANTS, ids=str)
def make(request):
    """Builds one expert after another of one kind."""
    kind, options = request.param
    expert = resolve(kind, EXPERTS)
    return partial(expert, F if expert.reads == "fields" else NUM_INTERESTS, D, H, **options)


@pytest.fixture
def expert(make):
    return make()


@pytest.fixture
def inputs(make):
    """Examples that fit the expert, [size, F or NUM_INTERESTS, D]."""
    return lambda size=B: torch.randn(size, make.args[0], D)


class TestContract:
    def test_shape_and_non_negative_output(self, expert, inputs):
        out = expert(inputs())
        assert out.shape == (B, H) and (out >= 0).all() and out.count_nonzero() > 0

    def test_examples_are_independent(self, expert, inputs):
        x = inputs()
        torch.testing.assert_close(expert(x)[2:3], expert(x[2:3]))

    def test_gradient_reaches_every_field_and_parameter(self, expert, inputs):
        x = inputs(9 * B).requires_grad_()
        expert(x).sum().backward()
        assert (x.grad.abs().sum((0, 2)) > 0).all()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in expert.parameters())

    def test_empty_batch(self, expert, inputs):
        x = inputs(0).requires_grad_()
        out = expert(x)
        out.sum().backward()
        assert out.shape == (0, H) and all((p.grad == 0).all() for p in expert.parameters())

    def test_state_round_trip(self, expert, make, inputs):
        other, x = make(), inputs()
        other.load_state_dict(expert.state_dict())
        assert torch.equal(other(x), expert(x))

    def test_traces(self, expert, inputs):
        x = inputs()
        assert torch.equal(torch.fx.symbolic_trace(expert)(x), expert(x))

    def test_compiles_without_graph_breaks(self, expert, inputs):
        torch._dynamo.reset()  # every expert has the same forward: without it they count as recompilations of one
        compiled, x = torch.compile(expert, fullgraph=True, backend="eager"), inputs()
        torch.testing.assert_close(compiled(x), expert(x))

    def test_finite_under_autocast(self, expert, inputs):
        x = inputs().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = expert(x)
        out.float().sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()
        torch.testing.assert_close(out.float(), expert(x), atol=0.1, rtol=0.1)

    def test_builds_and_runs_on_the_meta_device(self, make, inputs):
        with torch.device("meta"):
            expert = make()
        assert all(t.is_meta for t in (*expert.parameters(), *expert.buffers()))
        assert expert(inputs().to("meta")).shape == (B, H)

    def test_flops_of_the_mlp_are_those_that_torch_counts(self, expert, inputs):
        interaction = expert.interaction(inputs())
        assert counted_flops(expert.mlp, interaction) == B * (expert.flops - expert.interaction_flops)
        assert expert.interaction_flops >= 0 and expert.flops > 0

    def test_one_width_more_than_the_last_is_hidden(self, make, inputs):
        assert make(hidden=(11, 3))(inputs()).shape == (B, H)


def counted_flops(module, x) -> int:
    """Products and sums of the matmuls alone."""
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


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

    @pytest.mark.parametrize(
        ("options", "matmuls"),
        [
            ({}, F * D * F * D),
            ({"rank": 3}, 2 * F * D * 3),
            ({"rank": 3, "num_experts": 2}, F * D * (2 + 12) + 2 * 3 * 3),
        ],
    )
    def test_flops(self, options, matmuls):
        """A full matrix; U V^T; gate, V, C and U of two experts. Then x_0 times that plus x, and the gates' weights."""
        expert = DCNv2Expert(F, D, H, num_layers=2, **options)
        assert counted_flops(expert.interaction, torch.randn(B, F, D)) == 2 * B * 2 * matmuls
        weighting = 6 if "num_experts" in options else 0
        assert expert.interaction_flops == 2 * (2 * matmuls + 2 * F * D + weighting)


class TestMixtureCrossLayers:
    def test_equals_the_formula(self):
        mixture = MixtureCrossLayers(F * D, num_layers=2, rank=3, num_experts=4).double()
        x = torch.randn(B, F, D, dtype=torch.float64)
        expected = []
        for row in x.reshape(B, F * D):
            state = row
            for layer in mixture.layers:
                gates, total = (layer.gate.weight @ state).softmax(0), torch.zeros_like(row)
                for i in range(4):
                    mine = slice(3 * i, 3 * i + 3)
                    inner = layer.core_XRR[i] @ (layer.down.weight[mine] @ state).tanh()
                    total += gates[i] * row * (layer.up.weight[:, mine] @ inner.tanh() + layer.up.bias)
                state = total + state
            expected.append(state)
        torch.testing.assert_close(mixture(x), torch.stack(expected), atol=1e-12, rtol=1e-12)

    def make_both(self, num_layers: int):
        """Ours with the weights of TorchRec's."""
        from torchrec.modules.crossnet import LowRankMixtureCrossNet

        theirs = LowRankMixtureCrossNet(F * D, num_layers, num_experts=4, low_rank=3, activation=torch.tanh)
        ours = MixtureCrossLayers(F * D, num_layers, rank=3, num_experts=4)
        for i, layer in enumerate(ours.layers):
            layer.gate.weight.data.copy_(torch.cat([gate.weight for gate in theirs.gates]))
            layer.down.weight.data.copy_(theirs.V_kernels[i].flatten(0, 1))
            layer.core_XRR.data.copy_(theirs.C_kernels[i])
            layer.up.weight.data.copy_(theirs.U_kernels[i].permute(1, 0, 2).flatten(1))
            layer.up.bias.data.copy_(theirs.bias[i].squeeze(1))
        return ours, theirs

    def test_equals_torchrecs_where_layers_have_equal_gates(self):
        ours, theirs = self.make_both(num_layers=3)
        x = torch.randn(B, F, D)
        torch.testing.assert_close(ours(x), theirs(x.flatten(1)), atol=1e-5, rtol=1e-4)

    def test_torchrecs_has_one_gate_for_all_layers(self):
        ours, theirs = self.make_both(num_layers=3)
        x = torch.randn(B, F, D)
        torch.nn.init.normal_(ours.layers[1].gate.weight)
        assert not torch.allclose(ours(x), theirs(x.flatten(1)), atol=1e-3)
        assert len(theirs.gates) == 4 and sum(layer.gate.weight.numel() for layer in ours.layers) == 3 * 4 * F * D

    def test_equal_experts_are_one_expert(self):
        """The gates sum to 1."""
        many, one = (MixtureCrossLayers(F * D, 1, rank=3, num_experts=n) for n in (4, 1))
        (many,), (one,) = many.layers, one.layers
        many.down.weight.data.copy_(one.down.weight.repeat(4, 1))
        many.core_XRR.data.copy_(one.core_XRR.expand(4, 3, 3))
        many.up.weight.data.copy_(one.up.weight.repeat(1, 4))
        many.up.bias.data.copy_(one.up.bias)
        x0, x = torch.randn(2, B, F * D)
        torch.testing.assert_close(many(x0, x), one(x0, x))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_experts": 2}, r"num_experts 2 needs a rank in \[1, 24\]"),
            ({"num_experts": 0, "rank": 3}, "num_experts must be >= 1, got 0"),
            ({"num_experts": 2, "rank": 25}, r"rank must be in \[1, 24\]"),
            ({"num_experts": 2, "rank": 2, "num_layers": 0}, "num_layers must be >= 1, got 0"),
        ],
    )
    def test_sizes_that_cannot_work(self, options, message):
        with pytest.raises(ValueError, match=message):
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

    def test_flops(self):
        """C = 2 cells; the sums of cells, the own parts, the weighted pairs of cells and the weighted squares."""
        expert, num_cells, part_dim = GwPFMExpert(F, D, H, num_parts=2), 2, 3
        matmuls = 2 * num_cells * F * D + 2 * F * D + 2 * num_cells**2 * part_dim + 2 * F * part_dim
        assert counted_flops(expert.interaction, torch.randn(B, F, D)) == B * matmuls
        products_of_pairs, squares, difference_and_half = num_cells**2 * part_dim, F * part_dim, 2 * part_dim
        assert expert.interaction_flops == matmuls + products_of_pairs + squares + difference_and_half


class TestNamedPartitions:
    NAMES = ("user", "price_base2", "price_base3", "price_base10", "city", "price_basement")
    NUMBERS = (0, 1, 1, 1, 0, 2)

    @pytest.mark.parametrize(
        "partition",
        [
            (0, 1, 1, 1, 0, 2),
            [["user", "city"], ["price"], ["price_basement"]],
            [["city", "user"], ["price_base10", "price_base2", "price_base3"], ["price_basement"]],
            {"price_basement": 2, "price": 1, "user": 0, "city": 0},
        ],
        ids=["numbers", "lists", "lists with encodings", "mapping"],
    )
    def test_three_ways_to_write_one_partition(self, partition):
        expert = GwPFMExpert(6, D, H, num_parts=3, groups=partition, parts=partition, field_names=self.NAMES)
        expected = GwPFMExpert(6, D, H, num_parts=3, groups=self.NUMBERS, parts=self.NUMBERS)
        expected.load_state_dict(expert.state_dict())
        x = torch.randn(B, 6, D)
        assert torch.equal(expert(x), expected(x))

    def test_an_encoding_named_on_its_own_leaves_the_others_to_the_number(self):
        groups = {"price": 0, "price_base10": 1, "user": 2, "city": 2, "price_basement": 2}
        assert numbers_of_fields("groups", groups, self.NAMES) == [2, 0, 0, 1, 2, 2]

    @pytest.mark.parametrize(
        ("partition", "message"),
        [
            ([["user", "cty"], ["price", "price_basement"]], "groups: unknown field 'cty'; known: user.*mean 'city'"),
            ([["user"], ["price"]], "groups must name every field of the set once; missing: city, price_basement"),
            (
                {"user": 0, "price": 1, "city": 0},
                "groups must name every field of the set once; missing: price_basement",
            ),
            ([["user", "city"], ["city", "price", "price_basement"]], "groups names field 'city' twice"),
            (["user", "price"], "groups must be numbers, lists of field names, or names -> numbers; got 'user'"),
            ([["user"], 1], "groups must be numbers, lists of field names, or names -> numbers; got 1"),
            ([0, 1], r"groups must name one number per field \(6\), got 2"),
        ],
    )
    def test_partitions_that_cannot_work(self, partition, message):
        with pytest.raises(ValueError, match=f"gwpfm: {message}"):
            GwPFMExpert(6, D, H, groups=partition, field_names=self.NAMES)

    def test_more_lists_than_parts(self):
        lists = [["user"], ["price"], ["city", "price_basement"]]
        with pytest.raises(ValueError, match=r"parts must be >= 0 and < 2 \(num_parts\), got \[0, 1, 1, 1, 2, 2\]"):
            GwPFMExpert(6, D, H, num_parts=2, parts=lists, field_names=self.NAMES)

    def test_names_where_the_fields_have_none(self):
        with pytest.raises(ValueError, match="parts names fields, but their names are not known here"):
            GwPFMExpert(F, D, H, parts=[["a", "b"], ["c", "d"]])


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
        monkeypatch.setattr("hmoe_rec.layers.batching_pays", lambda x: batched)
        bank, fields = self.bank(), {"x": torch.randn(B, F, D), "y": torch.randn(B, F, D)}
        expected = torch.stack([e(fields[s]) for e, s in zip(bank.experts.values(), bank.sets, strict=True)])
        torch.testing.assert_close(bank(fields), expected)

    def test_batched_and_looped_gradients_are_equal(self, monkeypatch):
        bank, fields = self.bank(), {"x": torch.randn(B, F, D), "y": torch.randn(B, F, D)}
        gradients = []
        for batched in (False, True):
            monkeypatch.setattr("hmoe_rec.layers.batching_pays", lambda x, batched=batched: batched)
            bank.zero_grad()
            bank(fields).square().sum().backward()
            gradients.append([p.grad.clone() for p in bank.parameters()])
        torch.testing.assert_close(gradients[0], gradients[1])

    def test_batching_looks_at_the_tensor_not_the_machine(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        x = torch.randn(B, F)
        assert not batching_pays(x)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            assert batching_pays(x)

        class Both(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = MLP(F, (3,)), MLP(F, (3,))

            def forward(self, x):
                return run_together([self.a, self.b], [x, x])

        calls = [node for node in torch.fx.Tracer().trace(Both()).nodes if node.op == "call_module"]
        assert len(calls) > 2, "in a trace the loop is taken, whatever the device will be"
        with torch.autocast("cpu", torch.bfloat16):
            assert batching_pays(x)

    def test_a_fixed_interaction_is_computed_once_per_set(self, monkeypatch):
        calls = []
        flatten = SideBySide.forward
        monkeypatch.setattr(SideBySide, "forward", lambda self, x: calls.append(1) or flatten(self, x))
        self.bank()({"x": torch.randn(B, F, D), "y": torch.randn(B, F, D)})
        assert len(calls) == 2  # a and c share x; f reads y; e is a part of its own

    def test_options_of_an_interaction_written_elsewhere_count(self):
        """It has no parameters, and its repr does not say its option."""

        class Power(torch.nn.Module):
            def __init__(self, exponent: int) -> None:
                super().__init__()
                self.exponent = exponent

            def forward(self, fields_BFD: torch.Tensor) -> torch.Tensor:
                return fields_BFD.flatten(1) ** self.exponent

        experts = {name: Expert(Power(k), F * D, H) for name, k in (("one", 1), ("two", 2))}
        fields = torch.randn(B, F, D)
        expected = torch.stack([e(fields) for e in experts.values()])
        torch.testing.assert_close(ExpertBank(experts, dict.fromkeys(experts, "x"))({"x": fields}), expected)

    def test_interests_of_a_set_are_not_taken_for_its_fields(self):
        """Both interactions only flatten, and both experts read set x."""
        fields, interests = torch.randn(B, F, D), torch.randn(B, NUM_INTERESTS, D)
        experts = {"a": FlatDNNExpert(F, D, H), "b": SequenceExpert(NUM_INTERESTS, D, H)}
        bank = ExpertBank(experts, {"a": "x", "b": "x"})
        expected = torch.stack([experts["a"](fields), experts["b"](interests)])
        torch.testing.assert_close(bank({"x": fields}, {"x": interests}), expected)


def test_a_part_from_elsewhere_is_found_by_its_path():
    assert resolve("hmoe_rec.experts.dcnv2:DCNv2Expert", EXPERTS) is DCNv2Expert


@pytest.mark.parametrize("kind", ["dcnv3", "no.such.module:Class", "hmoe_rec.experts.dcnv2:Nothing"])
def test_unknown_kind(kind):
    with pytest.raises(ValueError, match=kind.split(":")[0]):
        resolve(kind, EXPERTS)
