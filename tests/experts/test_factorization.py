"""Factorization machines and their relatives against sums over pairs in plain loops; sizes and costs in closed form."""

from functools import partial
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hmoe_rec.experts.bank import ExpertBank
from hmoe_rec.experts.cin import CINExpert, CompressedInteractions, CrossesAndDeep
from hmoe_rec.experts.fm import FactorizationMachine, FMExpert, pair_places
from hmoe_rec.experts.fmfm import FieldMatrixedFM, FmFMExpert, MatrixedInnerProducts
from hmoe_rec.experts.fwfm import FieldWeightedFM, FwFMExpert, WeightedInnerProducts
from hmoe_rec.experts.gwpfm import GroupWeightedPartFM
from hmoe_rec.experts.ipnn import FieldsAndProducts, InnerProducts, IPNNExpert

B, F, D, H = 5, 4, 6, 7
P = F * (F - 1) // 2

EXPERTS = [
    (FMExpert, {}),
    (FwFMExpert, {}),
    (FwFMExpert, {"output": "pairs"}),
    (FmFMExpert, {}),
    (FmFMExpert, {"output": "pairs"}),
    (IPNNExpert, {}),
    (IPNNExpert, {"embeddings": False}),
    (CINExpert, {"layers": (5, 3)}),
    (CINExpert, {"layers": (2,), "relu": False, "deep": (9, 8), "hidden": (11,)}),
]


@pytest.fixture(params=EXPERTS, ids=lambda case: " ".join([case[0].__name__, *map(str, case[1].items())]))
def build(request):
    kind, options = request.param
    return partial(kind, F, D, H, **options)


@pytest.fixture
def expert(build):
    return build()


def examples() -> torch.Tensor:
    return torch.randn(B, F, D, dtype=torch.float64)


def assert_exact(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def pair_terms(x: torch.Tensor, term) -> torch.Tensor:
    """term(p, e_i, e_j) of every example and pair i < j, one by one: [B, P, ...]."""
    pairs = list(combinations(range(x.shape[1]), 2))
    return torch.stack([torch.stack([term(p, row[i], row[j]) for p, (i, j) in enumerate(pairs)]) for row in x])


class TestEveryOption:
    def test_shape_and_width(self, expert):
        x = torch.randn(B, F, D)
        assert expert(x).shape == (B, H)
        assert expert.interaction(x).shape == (B, expert.mlp.widths[0])

    def test_empty_batch(self, expert):
        assert expert(torch.randn(0, F, D)).shape == (0, H)

    def test_examples_are_independent(self, expert):
        x = torch.randn(B, F, D)
        torch.testing.assert_close(expert(x)[2:3], expert(x[2:3]))

    def test_gradient_reaches_every_field_and_parameter(self, expert):
        x = torch.randn(9 * B, F, D, requires_grad=True)
        of_fields, *of_parameters = torch.autograd.grad(expert(x).sum(), [x, *expert.parameters()])
        assert (of_fields.abs().sum((0, 2)) > 0).all()
        assert all(gradient.abs().sum() > 0 for gradient in of_parameters)

    def test_gradients_equal_finite_differences(self, expert):
        interaction = expert.interaction.double()
        # Away from the bends of ReLU, where a finite difference sees both sides.
        x = (examples()[:2].abs() + 0.1).requires_grad_()
        assert torch.autograd.gradcheck(interaction, (x,))

    def test_traces_and_compiles_without_a_graph_break(self, expert):
        x = torch.randn(B, F, D)
        assert torch.equal(torch.fx.symbolic_trace(expert)(x), expert(x))
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(expert, fullgraph=True, backend="eager")(x), expert(x))

    def test_bf16(self, expert):
        x = torch.randn(B, F, D)
        with torch.autocast("cpu", torch.bfloat16):
            out = expert(x)
        torch.testing.assert_close(out.float(), expert(x), atol=0.1, rtol=0.1)

    def test_is_built_without_memory(self, build):
        with torch.device("meta"):
            expert = build()
            assert expert(torch.empty(B, F, D)).shape == (B, H)
        assert all(p.is_meta for p in expert.parameters())


class TestFM:
    def test_equals_the_sum_over_pairs(self):
        x = examples()
        expected = pair_terms(x, lambda _, e_i, e_j: e_i * e_j).sum(1)
        assert_exact(FactorizationMachine(F, D)(x), expected)

    def test_order_of_fields_does_not_matter(self):
        x, fm = examples(), FactorizationMachine(F, D)
        assert_exact(fm(x[:, [2, 0, 3, 1]]), fm(x))

    def test_the_sum_over_the_width_is_the_sum_of_inner_products(self):
        x = examples()
        products = InnerProducts(F, D)(x)
        assert_exact(FactorizationMachine(F, D)(x).sum(1), products.sum(1))


class TestFwFM:
    def test_vector_equals_the_weighted_sum_over_pairs(self):
        fwfm, x = FieldWeightedFM(F, D).double(), examples()
        nn.init.normal_(fwfm.weight)
        expected = pair_terms(x, lambda p, e_i, e_j: fwfm.weight[p] * e_i * e_j).sum(1)
        assert_exact(fwfm(x), expected)

    def test_pairs_equal_the_weighted_inner_products(self):
        fwfm, x = WeightedInnerProducts(F, D).double(), examples()
        nn.init.normal_(fwfm.weight)
        assert_exact(fwfm(x), pair_terms(x, lambda p, e_i, e_j: fwfm.weight[p] * (e_i @ e_j)))

    def test_starts_as_fm(self):
        x, fm = examples(), FactorizationMachine(F, D)
        assert_exact(FieldWeightedFM(F, D).double()(x), fm(x))
        assert_exact(WeightedInnerProducts(F, D).double()(x).sum(1), fm(x).sum(1))

    def test_both_outputs_sum_to_one_number(self):
        vector, pairs, x = FieldWeightedFM(F, D).double(), WeightedInnerProducts(F, D).double(), examples()
        nn.init.normal_(vector.weight)
        pairs.weight.data.copy_(vector.weight)
        assert_exact(vector(x).sum(1), pairs(x).sum(1))


class TestFmFM:
    def test_vector_equals_the_sum_over_pairs(self):
        fmfm, x = FieldMatrixedFM(F, D).double(), examples()
        expected = pair_terms(x, lambda p, e_i, e_j: (e_i @ fmfm.weight[p]) * e_j).sum(1)
        assert_exact(fmfm(x), expected)

    def test_pairs_equal_the_projected_inner_products(self):
        fmfm, x = MatrixedInnerProducts(F, D).double(), examples()
        expected = pair_terms(x, lambda p, e_i, e_j: e_i @ fmfm.weight[p] @ e_j)
        assert_exact(fmfm(x), expected)

    def test_identity_matrices_give_fm(self):
        x, fm = examples(), FactorizationMachine(F, D)
        vector, pairs = FieldMatrixedFM(F, D).double(), MatrixedInnerProducts(F, D).double()
        for interaction in (vector, pairs):
            interaction.weight.data.copy_(torch.eye(D).expand(P, D, D))
        assert_exact(vector(x), fm(x))
        assert_exact(pairs(x), InnerProducts(F, D)(x))

    def test_scaled_identities_give_fwfm(self):
        x, r = examples(), torch.randn(P, dtype=torch.float64)
        fmfm, fwfm = FieldMatrixedFM(F, D).double(), FieldWeightedFM(F, D).double()
        fwfm.weight.data.copy_(r)
        fmfm.weight.data.copy_(r[:, None, None] * torch.eye(D))
        assert_exact(fmfm(x), fwfm(x))

    def test_matrices_start_with_the_length_of_a_field_kept(self):
        """Variance of e M: D entries of variance 1 / D."""
        weight = FieldMatrixedFM(20, 16).weight
        assert 16 * weight.var().item() == pytest.approx(1.0, rel=0.03) and abs(weight.mean().item()) < 0.01


class TestIPNN:
    def test_products_equal_a_loop(self):
        x = examples()
        expected = pair_terms(x, lambda _, e_i, e_j: e_i @ e_j)
        assert_exact(InnerProducts(F, D)(x), expected)
        assert_exact(FieldsAndProducts(F, D)(x), torch.cat([x.reshape(B, F * D), expected], 1))

    def test_inputs_of_the_single_and_of_the_multi_embedding_model(self):
        """39 fields of width 10: 39 * 38 / 2 = 741 products; with 390 numbers of the fields 1,131."""
        assert InnerProducts(39, 10).out_dim == 741
        assert FieldsAndProducts(39, 10).out_dim == 1131

    def test_a_bank_does_not_take_one_form_for_the_other(self):
        """Interactions without parameters are shared between experts of one set where they are equal."""
        experts = {"both": IPNNExpert(F, D, H), "products": IPNNExpert(F, D, H, embeddings=False)}
        x = torch.randn(B, F, D)
        out = ExpertBank(experts, {"both": "x", "products": "x"})({"x": x})
        torch.testing.assert_close(out, torch.stack([expert(x) for expert in experts.values()]))


@pytest.mark.parametrize(
    "interaction",
    [
        FactorizationMachine(F, D),
        InnerProducts(F, D),
        FieldsAndProducts(F, D),
        FieldWeightedFM(F, D),
        WeightedInnerProducts(F, D),
        FieldMatrixedFM(F, D),
        MatrixedInnerProducts(F, D),
        GroupWeightedPartFM(F, D, 2, groups=[0, 1, 1, 2], parts=[0, 1, 1, 0]),
    ],
    ids=lambda interaction: type(interaction).__name__,
)
def test_what_meets_is_what_is_multiplied(interaction):
    """With all other fields 0, the interaction is the product of the two vectors, up to the size of a weight; whichever
    field is named first."""
    with torch.no_grad():
        for weight in interaction.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    interaction.requires_grad_(False)
    x = examples().float()
    factors = []
    for i, j in combinations(range(F), 2):
        alone = torch.zeros_like(x)
        alone[:, [i, j]] = x[:, [i, j]]
        said_B = interaction(alone)[:, -P:].sum(1)  # of the fields and their products, the products
        one, other = interaction.meeting(x, i, j)
        expected_B = (one * other).sum(1)
        factors.append((said_B / expected_B).mean())
        torch.testing.assert_close(said_B, factors[-1] * expected_B, rtol=1e-4, atol=1e-4)
        swapped = interaction.meeting(x, j, i)
        torch.testing.assert_close(swapped[0] * swapped[1], one * other)
    assert min(factors) > 0, "a weight below 0 has turned one of the two"
    weighted = isinstance(interaction, (FieldWeightedFM, WeightedInnerProducts, GroupWeightedPartFM))
    assert weighted or max(factors) == pytest.approx(1, rel=1e-3)
    assert not weighted or interaction.weight.min() < 0


def weights_of(cin: CompressedInteractions) -> list[torch.Tensor]:
    """w[c, i, j] of every layer: c made of vector i of the layer before and of field j."""
    weights = []
    for linear, before, width in zip(cin.weights, cin.widths_before, cin.layers, strict=True):
        w = linear.weight.unflatten(0, (-1, width))  # [shorter, c, longer]
        weights.append(w.permute(1, 0, 2) if before <= cin.num_fields else w.permute(1, 2, 0))
    return weights


def naive_cin(cin: CompressedInteractions, x: torch.Tensor, relu: bool) -> torch.Tensor:
    outputs = []
    for row in x:
        before, sums = list(row), []
        for w, bias in zip(weights_of(cin), cin.biases or [torch.zeros(c) for c in cin.layers], strict=True):
            now = []
            for c in range(w.shape[0]):
                vector = bias[c].to(row.dtype).expand(row.shape[1])
                for i, e_i in enumerate(before):
                    for j, e_j in enumerate(row):
                        vector = vector + w[c, i, j] * e_i * e_j
                now.append(vector.clamp(min=0) if relu else vector)
            sums += [vector.sum() for vector in now]
            before = now
        outputs.append(torch.stack(sums))
    return torch.stack(outputs)


class TestCIN:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("relu", [True, False])
    @pytest.mark.parametrize("layers", [(3, 2), (5, 3), (1,), (F, F, 8)])
    def test_equals_the_formula(self, layers, relu, bias):
        cin, x = CompressedInteractions(F, D, layers, relu=relu, bias=bias).double(), examples()
        assert_exact(cin(x), naive_cin(cin, x, relu))

    def test_it_is_the_convolution_of_public_code(self):
        """Layer by layer: all products laid out, then nn.Conv1d of kernel 1 with its bias."""
        cin, x = CompressedInteractions(F, D, (3, 5)).double(), examples()
        now, sums = x, []
        for w, bias in zip(weights_of(cin), cin.biases, strict=True):
            convolution = nn.Conv1d(w[0].numel(), len(w), 1).double()
            convolution.weight.data.copy_(w.flatten(1).unsqueeze(2))
            convolution.bias.data.copy_(bias)
            assert convolution.bias.numel() == len(w), "a bias per map"
            products = torch.einsum("bid,bjd->bijd", now, x).flatten(1, 2)
            now = torch.relu(convolution(products))
            sums.append(now.sum(2))
        assert_exact(cin(x), torch.cat(sums, 1))

    def test_a_state_without_biases_is_read_with_bias_off_only(self):
        old, x = CINExpert(F, D, H, layers=(3, 2), bias=False), examples().float()
        read = CINExpert(F, D, H, layers=(3, 2), bias=False)
        read.load_state_dict(old.state_dict())
        assert_exact(read(x), old(x))
        with pytest.raises(RuntimeError, match="biases.0"):
            CINExpert(F, D, H, layers=(3, 2)).load_state_dict(old.state_dict())

    def test_one_layer_that_counts_every_pair_once_is_fm(self):
        cin, x = CompressedInteractions(F, D, (1,), relu=False, bias=False).double(), examples()
        next(cin.parameters()).data.copy_(torch.ones(F, F).triu(1))
        assert_exact(cin(x).squeeze(1), FactorizationMachine(F, D)(x).sum(1))

    def test_every_layer_raises_the_degree_by_one(self):
        cin, x = CompressedInteractions(F, D, (3, 3, 3), relu=False, bias=False).double(), examples()
        for layer in range(3):
            part = slice(3 * layer, 3 * layer + 3)
            assert_exact(cin(2 * x)[:, part], 2 ** (layer + 2) * cin(x)[:, part])

    def test_weights_start_as_a_convolutions_of_kernel_one(self):
        torch.manual_seed(1)
        cin = CompressedInteractions(20, D, (30, 8))
        for w, bound in zip(weights_of(cin), [(20 * 20) ** -0.5, (30 * 20) ** -0.5], strict=True):
            assert w.abs().max() <= bound and w.abs().max().item() == pytest.approx(bound, rel=0.01)
        for b, bound in zip(cin.biases, [1 / 20, (30 * 20) ** -0.5], strict=True):
            assert 0.5 * bound < b.abs().max() <= bound

    def test_deep_is_a_plain_network_beside_it(self):
        expert, x = CINExpert(F, D, H, layers=(3,), deep=(9, 8)).double(), examples()
        assert isinstance(expert.interaction, CrossesAndDeep)
        first, last = expert.interaction.deep.layers
        deep = torch.relu(last(torch.relu(first(x.reshape(B, F * D)))))
        expected = torch.cat([naive_cin(expert.interaction.crosses, x, relu=True), deep], 1)
        assert_exact(expert.interaction(x), expected)


def size(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


class TestSizes:
    @pytest.mark.parametrize(
        ("interaction", "count"),
        [
            (FactorizationMachine(F, D), 0),
            (InnerProducts(F, D), 0),
            (FieldsAndProducts(F, D), 0),
            (FieldWeightedFM(F, D), P),
            (WeightedInnerProducts(F, D), P),
            (FieldMatrixedFM(F, D), P * D**2),
            (MatrixedInnerProducts(F, D), P * D**2),
            (CompressedInteractions(F, D, (5, 3)), 5 * F * F + 3 * 5 * F + 5 + 3),
            (CompressedInteractions(39, 10, (16, 16)), 16 * 39 * 39 + 16 * 16 * 39 + 2 * 16),
        ],
    )
    def test_parameters(self, interaction, count):
        assert size(interaction) == count

    @pytest.mark.parametrize(
        ("interaction", "num_sets", "count"),
        [
            (lambda: nn.Flatten(1), 1, 318_801),
            (lambda: FieldsAndProducts(39, 10), 1, 615_201),
            (lambda: FieldsAndProducts(39, 100), 1, 2_019_201),
            (lambda: InnerProducts(39, 10), 1, 459_201),
            (lambda: InnerProducts(39, 10), 10, 3_137_601),
        ],
        ids=["DNN", "IPNN", "IPNN of width 100", "ME-IPNN of one set", "ME-IPNN of ten sets"],
    )
    def test_dense_parameters_of_the_papers_networks(self, interaction, num_sets, count):
        """arXiv 2310.04400 on Criteo: per set interaction, linear 400, BN; of their mean linear 400, BN, linear 1."""
        with torch.device("meta"):
            sets = []
            for _ in range(num_sets):
                part = interaction()
                sets += [part, nn.Linear(getattr(part, "out_dim", 39 * 10), 400), nn.BatchNorm1d(400)]
            head = [nn.Linear(400, 400), nn.BatchNorm1d(400), nn.Linear(400, 1)]
        assert size(*sets, *head) == count

    def test_a_wide_set_makes_no_more_products(self):
        assert InnerProducts(39, 100).out_dim == InnerProducts(39, 10).out_dim


def matmul_flops(module: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("interaction", "matmuls", "others"),
    [
        # F D squares, 2 (F - 1) D sums; then square, difference and half.
        (FactorizationMachine(F, D), 0, F * D + 2 * (F - 1) * D + 3 * D),
        (InnerProducts(F, D), 2 * F * F * D, 0),
        (FieldsAndProducts(F, D), 2 * F * F * D, 0),
        (FieldWeightedFM(F, D), 2 * F * F * D, 2 * F * D),
        (WeightedInnerProducts(F, D), 2 * F * F * D, P),
        (FieldMatrixedFM(F, D), 2 * (F * D) ** 2, 2 * F * D),
        (MatrixedInnerProducts(F, D), 2 * P * D * D, 2 * P * D),
        # Weights meet the longer of (vectors before, fields), its result the shorter; the biases, and the sum over D.
        (
            CompressedInteractions(F, D, (5, 3)),
            2 * D * (5 * F * F + 5 * F) + 2 * D * (3 * 5 * F + 3 * F),
            D * (5 + 3) + D * (5 + 3),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_flops(interaction, matmuls, others):
    assert matmul_flops(interaction, torch.randn(B, F, D)) == B * matmuls
    assert interaction.flops == matmuls + others


def test_flops_of_an_expert_add_up():
    """CIN (2 wide, one layer), DNN 24-9, then the MLP (2 + 9)-11-7."""
    expert = CINExpert(F, D, H, layers=(2,), deep=(9,), hidden=(11,))
    matmuls = 2 * D * (2 * F * F + 2 * F) + 2 * F * D * 9 + 2 * (11 * 11 + 11 * H)
    assert matmul_flops(expert, torch.randn(B, F, D)) == B * matmuls
    assert expert.flops == matmuls + 2 * D + 2 * D  # the sum over D and the biases


def test_pairs_come_row_by_row():
    assert pair_places("fm", 4).tolist() == [4 * i + j for i, j in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FMExpert, {}, "fm: multiplies pairs of fields, so the set must have at least 2, got 1"),
        (FwFMExpert, {}, "fwfm: .* at least 2"),
        (FwFMExpert, {"output": "pairs"}, "fwfm: .* at least 2"),
        (FmFMExpert, {}, "fmfm: .* at least 2"),
        (FmFMExpert, {"output": "pairs"}, "fmfm: .* at least 2"),
        (IPNNExpert, {}, "ipnn: .* at least 2"),
        (IPNNExpert, {"embeddings": False}, "ipnn: .* at least 2"),
        (CINExpert, {"layers": ()}, r"cin: layers must name at least one width, all >= 1, got \[\]"),
        (CINExpert, {"layers": (4, 0)}, r"cin: layers .* got \[4, 0\]"),
        (CINExpert, {"deep": (4, 0)}, "widths >= 1"),
    ],
)
def test_sizes_that_cannot_work(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(1, D, H, **options)
