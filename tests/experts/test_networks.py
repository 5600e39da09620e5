"""Networks of papers against their formulas in plain loops; then multi-embedding against one wide embedding."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hmoe_rec.experts import EXPERTS
from hmoe_rec.experts.autoint import AutoIntExpert, InteractingLayer, InteractingLayers
from hmoe_rec.experts.bank import ExpertBank
from hmoe_rec.experts.dcnv2 import CrossLayers, DCNv2Expert
from hmoe_rec.experts.final_mlp import BilinearFusion, FinalMLPExpert, GatedStream
from hmoe_rec.experts.flat_dnn import FlatDNNExpert
from hmoe_rec.experts.masknet import FieldNorm, MaskBlock, MaskNetExpert, ParallelMaskBlocks, SerialMaskBlocks
from hmoe_rec.experts.sequence import SequenceExpert
from hmoe_rec.kinds import resolve
from hmoe_rec.towers.gate import Mixture
from hmoe_rec.towers.routing import preset

B, F, D, H = 5, 4, 6, 7
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def examples(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def matmul_flops(module: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


class TestFinalMLP:
    def test_a_gated_stream_equals_the_formula(self):
        stream = GatedStream(F * D, (11,), (3,), dropout=0.0).double()
        x = examples(B, F * D)
        (first, last), (layer,) = stream.gate.layers, stream.mlp.layers
        for row, out in zip(x, stream(x), strict=True):
            logits = last(torch.relu(first(row)))
            weighed = torch.stack([2 / (1 + (-g).exp()) * v for g, v in zip(logits, row, strict=True)])
            torch.testing.assert_close(out, torch.relu(layer(weighed)), **EXACT)

    def test_a_gate_that_says_nothing_is_no_gate(self):
        gated, plain = (GatedStream(F * D, (11,), hidden, dropout=0.0).double() for hidden in ((), None))
        plain.mlp.load_state_dict(gated.mlp.state_dict())
        for parameter in gated.gate.parameters():
            nn.init.zeros_(parameter)
        x = examples(B, F * D)
        torch.testing.assert_close(gated(x), plain(x), **EXACT)

    @pytest.mark.parametrize("num_heads", [1, 2, 4])
    def test_the_fusion_equals_the_formula(self, num_heads):
        first_dim, second_dim, out_dim = 12, 8, 3
        fusion = BilinearFusion(first_dim, second_dim, out_dim, num_heads).double()
        o1, o2 = examples(B, first_dim), examples(B, second_dim)
        i, k = first_dim // num_heads, second_dim // num_heads
        w3 = fusion.pairs.weight.view(out_dim, num_heads, i, k)
        expected = examples(B, out_dim)
        for b in range(B):
            for z in range(out_dim):
                logit = fusion.first.bias[z] + fusion.first.weight[z] @ o1[b] + fusion.second.weight[z] @ o2[b]
                for j in range(num_heads):
                    logit = logit + o1[b, j * i : j * i + i] @ w3[z, j] @ o2[b, j * k : j * k + k]
                expected[b, z] = logit
        torch.testing.assert_close(fusion(o1, o2), expected, **EXACT)

    def test_flops(self):
        """Matmuls: two gates, two streams, the fusion. Element by element: 2 sigmoid * x, and o_1 with o_2 per head."""
        expert = FinalMLPExpert(F, D, H, stream1=(12,), stream2=(11, 8), gate_hidden=(3,), num_heads=2, fusion_dim=5)
        width, products = F * D, 12 * 8 // 2
        gates, streams = 2 * 2 * (width * 3 + 3 * width), 2 * (width * 12 + width * 11 + 11 * 8)
        fusion = 2 * (12 + 8 + products) * 5
        assert matmul_flops(expert.interaction, torch.randn(B, F, D)) == B * (gates + streams + fusion)
        assert expert.interaction_flops == gates + streams + fusion + 2 * 2 * width + products + 2 * 5

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"stream1": ()}, "stream1 must have at least one layer"),
            ({"stream2": (12, 10)}, "num_heads must be >= 1 and divide the last width of stream2, 10, got 8"),
            ({"num_heads": 0}, "num_heads must be >= 1 and divide the last width of stream1, 128, got 0"),
            ({"fusion_dim": 0}, "fusion_dim must be >= 1, got 0"),
        ],
    )
    def test_sizes_that_cannot_work(self, options, message):
        with pytest.raises(ValueError, match=message):
            FinalMLPExpert(F, D, H, **options)


def naive_layer_norm(x, scale, shift, epsilon=1e-5):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return torch.stack([(v - mean) / (variance + epsilon).sqrt() for v in x]) * scale + shift


def naive_mask_block(block: MaskBlock, x, v):
    """Of one example."""
    wide, narrow = block.mask.layers
    mask = narrow.weight @ torch.relu(wide.weight @ x + wide.bias) + narrow.bias
    hidden = block.hidden.weight @ (mask * v)
    return torch.relu(naive_layer_norm(hidden, block.norm.weight, block.norm.bias))


def with_random_parameters(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


class TestMaskNet:
    def test_every_field_is_normalized_by_itself(self):
        norm = with_random_parameters(FieldNorm(F, D))
        x = examples(B, F, D)
        for b in range(B):
            for f in range(F):
                expected = naive_layer_norm(x[b, f], norm.scale_FD[f], norm.shift_FD[f])
                torch.testing.assert_close(norm(x)[b, f], expected, **EXACT)

    def test_parallel_blocks_equal_the_formula(self):
        blocks = with_random_parameters(ParallelMaskBlocks(F, D, num_blocks=3, block_dim=9, reduction_ratio=1.5))
        x = examples(B, F, D)
        normal = blocks.norm(x).flatten(1)
        rows = [
            torch.cat([naive_mask_block(block, x[b].flatten(), normal[b]) for block in blocks.blocks]) for b in range(B)
        ]
        torch.testing.assert_close(blocks(x), torch.stack(rows), **EXACT)

    def test_serial_blocks_equal_the_formula(self):
        blocks = with_random_parameters(SerialMaskBlocks(F, D, num_blocks=3, block_dim=9, reduction_ratio=1.5))
        x = examples(B, F, D)
        normal = blocks.norm(x).flatten(1)
        for b, out in enumerate(blocks(x)):
            v = normal[b]
            for block in blocks.blocks:
                v = naive_mask_block(block, x[b].flatten(), v)
            torch.testing.assert_close(out, v, **EXACT)

    def test_the_mask_is_as_wide_as_what_it_masks(self):
        first, second = SerialMaskBlocks(F, D, num_blocks=2, block_dim=9, reduction_ratio=2.0).blocks
        assert first.mask.widths == (F * D, 2 * F * D, F * D) and second.mask.widths == (F * D, 18, 9)

    def test_a_mask_of_ones_leaves_a_plain_layer(self):
        block = MaskBlock(F * D, 3, 9, reduction_ratio=1.0).double()
        nn.init.zeros_(block.mask.linear(1).weight), nn.init.ones_(block.mask.linear(1).bias)
        x, v = examples(B, F * D), examples(B, 3)
        expected = nn.functional.layer_norm(v @ block.hidden.weight.T, (9,)).relu()
        torch.testing.assert_close(block(x, v), expected, **EXACT)

    @pytest.mark.parametrize("parallel", [True, False])
    def test_flops(self, parallel):
        expert = MaskNetExpert(F, D, H, parallel=parallel, num_blocks=2, block_dim=9, reduction_ratio=2.0)
        in_dims = (F * D, F * D if parallel else 9)
        matmuls = sum(2 * (F * D * 2 * n + 2 * n * n + n * 9) for n in in_dims)
        assert matmul_flops(expert.interaction, torch.randn(B, F, D)) == B * matmuls
        assert expert.interaction_flops == matmuls + sum(in_dims)

    @pytest.mark.parametrize("options", [{"num_blocks": 0}, {"block_dim": 0}, {"reduction_ratio": 0.0}])
    @pytest.mark.parametrize("parallel", [True, False])
    def test_sizes_that_cannot_work(self, parallel, options):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            MaskNetExpert(F, D, H, parallel=parallel, **options)


class TestAutoInt:
    @pytest.mark.parametrize("scale", [False, True])
    def test_equals_the_formula(self, scale):
        num_heads, a = 2, 3
        layer = InteractingLayer(D, num_heads, a, scale).double()
        x = examples(B, F, D)
        query, key, value, residual = layer.projections.weight.view(4, num_heads, a, D)
        expected = examples(B, F, num_heads * a)
        for b in range(B):
            for m in range(F):
                heads = []
                for h in range(num_heads):
                    logits = [(query[h] @ x[b, m]) @ (key[h] @ x[b, k]) for k in range(F)]
                    powers = [(z / math.sqrt(a) if scale else z).exp() for z in logits]
                    attended = sum(p / sum(powers) * (value[h] @ x[b, k]) for k, p in enumerate(powers))
                    heads.append(torch.relu(attended + residual[h] @ x[b, m]))
                expected[b, m] = torch.cat(heads)
        torch.testing.assert_close(layer(x), expected, **EXACT)

    def test_the_order_of_the_fields_does_not_matter_to_a_field(self):
        layers = InteractingLayers(F, D, num_layers=3, num_heads=2, attention_dim=3, scale=False).double()
        x, order = examples(B, F, D), torch.tensor([2, 0, 3, 1])
        moved = layers(x[:, order]).unflatten(1, (F, -1))
        torch.testing.assert_close(moved, layers(x).unflatten(1, (F, -1))[:, order], **EXACT)

    def test_without_queries_every_field_gets_the_mean(self):
        layer = InteractingLayer(D, 2, 3, False).double()
        query, _, value, residual = layer.projections.weight.view(4, 6, D)
        nn.init.zeros_(query.data)
        x = examples(B, F, D)
        expected = ((x @ value.T).mean(1, keepdim=True) + x @ residual.T).relu()
        torch.testing.assert_close(layer(x), expected, **EXACT)

    def test_gradients_are_right(self):
        layers = InteractingLayers(F, D, num_layers=2, num_heads=2, attention_dim=3, scale=False).double()
        assert torch.autograd.gradcheck(layers, examples(2, F, D).requires_grad_())

    def test_flops(self):
        """Per layer: four projections, the logits, the weighted values; and the sum with the residual."""
        expert, width = AutoIntExpert(F, D, H, num_layers=2, num_heads=2, attention_dim=3), 6
        matmuls = sum(2 * F * in_dim * 4 * width + 2 * 2 * F * F * width for in_dim in (D, width))
        assert matmul_flops(expert.interaction, torch.randn(B, F, D)) == B * matmuls
        assert expert.interaction_flops == matmuls + 2 * F * width

    @pytest.mark.parametrize("option", ["num_layers", "num_heads", "attention_dim"])
    def test_sizes_that_cannot_work(self, option):
        with pytest.raises(ValueError, match=f"{option} must be >= 1, got 0"):
            AutoIntExpert(F, D, H, **{option: 0})


def test_the_sequence_expert_is_an_mlp_on_its_interests():
    expert = SequenceExpert(3, D, H, hidden=(11,)).double()
    summary, target = examples(B, D), examples(B, D)
    first, last = expert.mlp.layers
    expected = torch.relu(last(torch.relu(first(torch.cat([summary, target, summary * target], 1)))))
    torch.testing.assert_close(expert(torch.stack([summary, target, summary * target], 1)), expected, **EXACT)
    assert SequenceExpert.reads == "interests" and expert.flops == 2 * (3 * D * 11 + 11 * H)


class TestMultiEmbedding:
    """Guo et al., "On the Embedding Collapse when Scaling up Recommendation Models", arXiv 2310.04400."""

    def test_linear_sets_equal_one_wide_set(self):
        """Appendix: without the non-linearity, M sets are one set of width M*K with block-diagonal crosses."""
        num_sets, num_layers = 2, 3
        sets = [examples(B, F, D) for _ in range(num_sets)]
        crosses = [CrossLayers(F * D, num_layers).double() for _ in range(num_sets)]
        head = examples(F * D)
        expected = sum(cross(x) for cross, x in zip(crosses, sets, strict=True)) / num_sets @ head

        wide = CrossLayers(F * num_sets * D, num_layers).double()
        for depth, layer in enumerate(wide.layers):
            weight, bias = torch.zeros(F, num_sets, D, F, num_sets, D), torch.zeros(F, num_sets, D)
            weight, bias = weight.double(), bias.double()
            for m, cross in enumerate(crosses):
                weight[:, m, :, :, m] = cross.layers[depth].weight.view(F, D, F, D)
                bias[:, m] = cross.layers[depth].bias.view(F, D)
            layer.weight.data.copy_(weight.view(F * num_sets * D, -1))
            layer.bias.data.copy_(bias.flatten())
        wide_head = (head.view(F, 1, D) / num_sets).expand(F, num_sets, D).flatten()
        torch.testing.assert_close(wide(torch.cat(sets, 2)) @ wide_head, expected, atol=1e-10, rtol=1e-10)

    @pytest.mark.parametrize("kind", ["flat_dnn", "dcnv2"])
    def test_one_set_is_a_single_embedding(self, kind):
        """The presets "multi_embedding" with one set and the mean, and "single": same outputs, same parameters."""
        outputs, parameters = [], []
        x = examples(B, F, D)
        for name, options in (("multi_embedding", {"num_sets": 1, "combine": "mean"}), ("single", {})):
            layout = preset(name, ["click"], expert={"kind": kind}, **options)
            (spec,) = layout.experts
            torch.manual_seed(1)
            bank = ExpertBank({spec.name: resolve(spec.kind, EXPERTS)(F, D, H)}, {spec.name: spec.set}).double()
            mixture = Mixture(layout.routing, {spec.set: F * D}, H).double()
            (mixed,) = mixture({spec.set: x}, bank({spec.set: x}))
            outputs.append(mixed)
            parameters.append(sum(p.numel() for p in (*bank.parameters(), *mixture.parameters())))
        assert torch.equal(*outputs) and parameters[0] == parameters[1]


class PaperNetwork(nn.Module):
    """The paper's networks on Criteo: per set an interaction, Linear, batch norm, ReLU; their mean; 400 -> 400 -> 1."""

    def __init__(self, experts: list) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.norms = nn.ModuleList(nn.BatchNorm1d(400) for _ in experts)
        self.head = nn.Sequential(nn.Linear(400, 400), nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, 1))

    def forward(self, sets: list) -> torch.Tensor:
        first_layers = [
            expert.mlp.layers[0](expert.interaction(x)) for expert, x in zip(self.experts, sets, strict=True)
        ]
        hidden = [norm(x).relu() for norm, x in zip(self.norms, first_layers, strict=True)]
        return self.head(sum(hidden) / len(hidden))


@pytest.mark.parametrize(
    ("kind", "num_sets", "dim", "expected"),
    [
        ("dnn", 1, 10, 318_801),
        ("dcnv2", 1, 10, 928_761),
        ("dcnv2", 1, 40, 10_527_441),
        ("dcnv2", 4, 10, 3_230_241),
        ("dcnv2", 1, 100, 62_578_401),
        ("dcnv2", 10, 10, 7_833_201),
    ],
)
def test_dense_parameters_of_the_paper(kind, num_sets, dim, expected):
    """39 fields, 4 cross layers, 400-400-1. One wide set grows with the square of its width, sets with their number.

    By hand, for n = 39 * dim inputs of each set: 4 (n^2 + n) for the crosses, (n + 1) 400 and 800 for the first layer
    and its batch norm; once 401 * 400 + 800 + 401 for the head.
    """
    with torch.device("meta"):
        make = {
            "dnn": lambda: FlatDNNExpert(39, dim, 400, hidden=()),
            "dcnv2": lambda: DCNv2Expert(39, dim, 400, num_layers=4),
        }
        network = PaperNetwork([make[kind]() for _ in range(num_sets)])
        logits = network([torch.empty(B, 39, dim) for _ in range(num_sets)])
    width = 39 * dim
    crosses = 4 * (width**2 + width) if kind == "dcnv2" else 0
    by_hand = num_sets * (crosses + (width + 1) * 400 + 800) + 401 * 400 + 800 + 401
    assert sum(p.numel() for p in network.parameters()) == by_hand == expected
    assert logits.shape == (B, 1)
