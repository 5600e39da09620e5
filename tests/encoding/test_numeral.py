"""MNSE against the paper's worked example, a naive loop, and Python formulas of every way to make codes of numbers."""

import math
from dataclasses import replace

import pytest
import torch

from hmoe_rec.encoding import numeral
from hmoe_rec.encoding.numbers import batch_value
from hmoe_rec.encoding.numeral import MNSE, DigitSums, FoldedDigits, digit_rows, digits, num_digits
from hmoe_rec.types import NumberField, NumberStatistics

B, N, D, BASES = 5, 4, 6, (2, 3, 10)
NAN, INF = float("nan"), float("inf")


def statistics(values, *, integral=False, num_quantiles=9):
    """What would be fitted to these values; low and high are their ends."""
    values = sorted(float(v) for v in values)
    places = [i / (num_quantiles - 1) * (len(values) - 1) for i in range(num_quantiles)]
    quantiles = tuple(
        values[int(p)] + (p - int(p)) * (values[min(int(p) + 1, len(values) - 1)] - values[int(p)]) for p in places
    )
    return NumberStatistics(
        len(values), 0, values[0], values[-1], values[0], values[-1], integral=integral, quantiles=quantiles
    )


def four_numbers():
    """Counts, even values with negatives, a heavy tail behind log1p, and a cosine: N = 4 with unequal R."""
    return (
        NumberField("clicks", statistics=statistics(range(41), integral=True)),
        NumberField("slope", mean=0.5, std=2.0, statistics=statistics([i / 10 - 3 for i in range(61)])),
        NumberField("price", transform="log1p", mean=3.0, std=1.7, statistics=statistics([1.5**i for i in range(30)])),
        NumberField("cosine", bounds=(-1.0, 1.0)),
    )


def batch(numbers, *raw_rows):
    """Raw values as the reader makes a batch of them."""
    rows = [
        [batch_value(n, v) if math.isfinite(v) else v for n, v in zip(numbers, row, strict=True)] for row in raw_rows
    ]
    return torch.tensor(rows, dtype=torch.float32)


def some_rows(numbers):
    return batch(
        numbers,
        (0.0, -3.5, 0.0, -1.0),
        (7.0, 0.0, 12.5, 0.0),
        (40.0, 2.9, 1e5, 1.0),
        (NAN, NAN, INF, NAN),
        (99.0, 8.0, 1e9, 0.123),
    )


def one_code(value, **options):
    """The code of one raw value of a number without a transform."""
    number = NumberField("x", bounds=options.pop("bounds", None), statistics=options.pop("fitted", None))
    return int(MNSE([number], D, **options).codes(torch.tensor([[value]])))


def naive(encoder, codes_BN, missing="row"):
    """Number by number, base by base, digit by digit, from the formula alone. -> [B, N, bases, D]."""
    missing_row = missing == "row"
    out = torch.zeros(codes_BN.shape[0], codes_BN.shape[1], len(encoder.bases), D, dtype=encoder.weight.dtype)
    for b, row in enumerate(codes_BN.tolist()):
        start = 0
        for i, code in enumerate(row):
            levels = encoder.quantizer.levels[i]
            for j, base in enumerate(encoder.bases):
                count = next(k for k in range(1, 99) if base**k >= levels)
                if code == encoder.quantizer.missing_code:
                    if missing_row:
                        out[b, i, j] = encoder.weight[start + base * count]
                else:
                    for k in range(count):
                        digit = (code // base ** (count - 1 - k)) % base
                        out[b, i, j] += encoder.weight[start + base * k + digit]
                start += base * count + missing_row
    return out


class TestDigits:
    def test_worked_example_of_the_paper(self):
        """51 = 110011 in base 2 and 001220 in base 3, the most significant digit first."""
        code = torch.tensor(51)
        assert digits(code, 2, 6).tolist() == [1, 1, 0, 0, 1, 1]
        assert digits(code, 3, 6).tolist() == [0, 0, 1, 2, 2, 0]
        assert digit_rows(code, 2, 6).tolist() == [1, 3, 4, 6, 9, 11]
        assert digit_rows(code, 3, 6).tolist() == [0, 3, 7, 11, 14, 15]

    @pytest.mark.parametrize(
        ("levels", "counts", "num_rows"),
        [(10**3, (10, 7, 3), 71), (10**6, (20, 13, 6), 139), (2**31, (31, 20, 10), 222)],
    )
    def test_sizes_and_round_trip(self, levels, counts, num_rows):
        assert tuple(num_digits(n, levels) for n in BASES) == counts
        codes = torch.cat([torch.tensor([0, 1, levels - 1]), torch.randint(0, levels, (50,))])
        for base, count in zip(BASES, counts, strict=True):
            powers = torch.tensor([base**k for k in reversed(range(count))])
            assert torch.equal((digits(codes, base, count) * powers).sum(-1), codes)
        encoder = MNSE([NumberField("x", bounds=(0, 1))], D, resolution=levels, missing="zero")
        assert encoder.weight.shape == (num_rows, D)
        assert MNSE([NumberField("x", bounds=(0, 1))], D, resolution=levels).weight.shape == (num_rows + 3, D)

    def test_positions_have_rows_of_their_own(self):
        """In base 3, 5 = "12" and 7 = "21": a table shared by the positions could not tell them apart."""
        encoder = MNSE([NumberField("x")], D, bases=(3,), quantize="int", resolution=9)
        five, seven = encoder.embed(torch.tensor([[5], [7]]))
        assert not torch.allclose(five, seven)

    def test_distances_of_the_several_bases(self):
        """Mean over the bases of the share of digits that differ, R = 1024: worst neighbors, growth with gaps."""

        def distances(bases, gap):
            codes = torch.arange(1024)
            shares = [
                (digits(codes[gap:], n, num_digits(n, 1024)) != digits(codes[:-gap], n, num_digits(n, 1024)))
                .double()
                .mean(-1)
                for n in bases
            ]
            return torch.stack(shares).mean(0)

        gaps = (1, 4, 16, 64, 256)
        binary, all_bases = ([distances(bases, g).mean().item() for g in gaps] for bases in ((2,), BASES))
        assert distances((2,), 1).max() == 1.0 and distances((2,), 1).argmax() == 511
        assert distances(BASES, 1).max().item() == pytest.approx((1 + 0.4 + 1 / 7) / 3)
        assert distances(BASES, 1).argmax() == 999
        assert all(a < b for a, b in zip(all_bases, all_bases[1:], strict=False))
        assert all_bases == pytest.approx([0.23, 0.31, 0.41, 0.47, 0.53], abs=0.01)
        assert binary == sorted(binary, reverse=True) and binary[-1] == pytest.approx(1.333 / 10, abs=1e-3)


class TestCodes:
    def test_cosines(self):
        """SimEnc: q = round((w + 1) / 2 * (R - 1)); R = 1024."""
        encoder = MNSE([NumberField("w", bounds=(-1.0, 1.0))], D)
        w = torch.tensor([[-1.0], [0.0], [1.0], [NAN], [-1.2], [0.3]])
        assert encoder.codes(w).flatten().tolist() == [0, 512, 1023, 1024, 0, round(1.3 / 2 * 1023)]

    @pytest.mark.parametrize("value", [-5.0, -2.0, -1.99, 0.0, 0.7, 2.9999, 3.0, 44.0])
    def test_affine(self, value):
        fitted = statistics([-2, 0, 1, 3])
        expected = min(max(math.floor((value + 2) / 5 * 1024), 0), 1023)
        assert one_code(value, quantize="affine", fitted=fitted) == expected
        assert one_code(value, quantize="affine", low=-2.0, high=3.0) == expected

    @pytest.mark.parametrize("value", [-1e6, -40.0, -3.0, 0.0, 0.5, 7.0, 900.0, 1e6])
    @pytest.mark.parametrize("integral", [True, False])
    def test_slog(self, value, integral):
        """Whole numbers are rounded and have scale 1; others the median of |quantiles|, here 3."""
        fitted = statistics([-40, -3, 0, 2, 900], integral=integral, num_quantiles=5)
        scale, v = (1.0, round(value)) if integral else (3.0, value)

        def f(x):
            return math.copysign(math.log1p(abs(x) / scale), x)

        expected = math.floor((f(v) - f(-40)) / (f(900) - f(-40)) * 100)
        assert one_code(value, quantize="slog", resolution=100, fitted=fitted) == min(max(expected, 0), 99)

    def test_slog_does_not_depend_on_the_unit(self):
        values = [0.0] * 20 + [1.3**i for i in range(19)]
        for x in (0.0, 1.0, 5.0, 100.0):
            seconds, hours = (
                one_code(x * u, quantize="slog", fitted=statistics([v * u for v in values])) for u in (1.0, 2**-12)
            )
            assert seconds == hours

    @pytest.mark.parametrize(("value", "expected"), [(-3, 0), (0, 0), (6.6, 7), (40, 40), (41, 40), (1e30, 40)])
    def test_int(self, value, expected):
        assert one_code(float(value), quantize="int", fitted=statistics(range(41), integral=True)) == expected
        assert one_code(float(value), quantize="int", low=0, high=40) == expected
        assert one_code(float(value), quantize="int", resolution=41) == expected

    @pytest.mark.parametrize("transform", ["none", "log1p", "slog"])
    def test_whole_numbers_come_back_from_the_batch(self, transform):
        """Whatever float32 lost of them: each of 0 .. 3000 keeps a code of its own."""
        numbers = [NumberField("x", transform, mean=4.321, std=1.234)]
        encoder = MNSE(numbers, D, quantize="int", resolution=3001)
        assert torch.equal(
            encoder.codes(batch(numbers, *((float(v),) for v in range(3001)))).flatten(), torch.arange(3001)
        )

    @pytest.mark.parametrize("transform", ["none", "slog"])
    @pytest.mark.parametrize("value", [-9.0, -4.0, -2.0, 0.0, 0.31, 1.0, 2.5, 6.0, 7.0])
    def test_quantile(self, value, transform):
        """Linear between two quantiles; a value that fills several quantiles gets the last one's rank."""
        quantiles = (-4.0, 0.0, 0.0, 0.0, 1.0, 1.5, 6.0)
        numbers = [
            NumberField("x", transform, 0.3, 1.7, statistics=replace(statistics([0]), quantiles=quantiles)),
            NumberField("y", statistics=replace(statistics([0]), quantiles=(0.0, 2.0))),
        ]
        q, v = ([batch_value(numbers[0], x) for x in xs] for xs in (quantiles, [value]))
        place = max((i for i in range(7) if quantiles[i] <= value), default=0)
        part = (v[0] - q[place]) / (q[place + 1] - q[place]) if place < 6 else 0.0
        expected = min(max(math.floor((place + part) / 6 * 100), 0), 99)
        codes = MNSE(numbers, D, quantize="quantile", resolution=100).codes(batch(numbers, (value, 1.0), (NAN, INF)))
        assert codes.tolist() == [[expected, 50], [100, 100]]

    def test_quantile_spreads_any_distribution_evenly(self):
        x = torch.randn(1000).exp()
        number = NumberField("x", statistics=statistics(x.tolist(), num_quantiles=101))
        counts = MNSE([number], D, quantize="quantile", resolution=10).codes(x[:, None]).flatten().bincount()
        assert counts.tolist() == pytest.approx([100] * 10, abs=3)

    @pytest.mark.parametrize("quantize", ["affine", "slog", "quantile", "round", "int", "auto"])
    def test_a_constant_number_has_code_0(self, quantize):
        fitted = statistics([0.0, 0.0])
        assert [one_code(v, quantize=quantize, fitted=fitted) for v in (0.0, -8.0, 3.7)] == [0, 0, 0]

    @pytest.mark.parametrize("quantize", ["affine", "slog", "quantile", "round", "int", "auto"])
    def test_a_number_without_any_value(self, quantize):
        """The training data had only missing ones."""
        fitted = NumberStatistics(0, 9, NAN, NAN, NAN, NAN, integral=True, quantiles=())
        assert 0 <= one_code(0.5, quantize=quantize, fitted=fitted) < 1024
        assert one_code(NAN, quantize=quantize, fitted=fitted) == 1024

    def test_missing_and_infinite_values(self):
        numbers = four_numbers()
        x = torch.tensor([[NAN, INF, -INF, NAN], [INF, NAN, NAN, -INF]])
        for quantize in ("auto", "affine"):
            codes = MNSE(numbers, D, quantize=quantize).codes(x)
            assert (codes == 1024).all()

    @pytest.mark.parametrize(
        ("number", "kind"),
        [
            (NumberField("x", bounds=(0, 5), statistics=statistics(range(6), integral=True)), "round"),
            (NumberField("x", statistics=statistics(range(1024), integral=True)), "int"),
            (NumberField("x", statistics=statistics(range(1025), integral=True)), "affine"),
            (NumberField("x", statistics=statistics(range(-3, 9), integral=True)), "affine"),
            (NumberField("x", statistics=statistics([i / 7 for i in range(99)])), "affine"),
            (NumberField("x", statistics=statistics([2.0**i for i in range(20)])), "slog"),
            (NumberField("x", statistics=statistics([0.0] * 90 + [1.5] * 10)), "slog"),
            (NumberField("x"), "affine"),
        ],
    )
    def test_auto(self, number, kind):
        auto, named = MNSE([number], D).quantizer, MNSE([number], D, quantize=kind).quantizer
        x = torch.linspace(-3, 2000, 999)[:, None]
        assert torch.equal(auto(x), named(x)) and auto.levels == named.levels
        others = [k for k in ("int", "affine", "slog", "round") if k != kind]
        assert not all(torch.equal(auto(x), MNSE([number], D, quantize=k).codes(x)) for k in others)

    def test_a_given_range_takes_the_place_of_the_fitted_one(self):
        number = NumberField("x", bounds=(0, 10), statistics=statistics(range(5)))
        assert one_code(5.0, bounds=(0, 10), quantize="affine", resolution=10) == 5
        x = torch.tensor([[5.0]])
        assert MNSE([number], D, quantize="affine", low=0, high=20, resolution=100).codes(x).item() == 25

    def test_which_statistics_are_missing(self):
        numbers = four_numbers()
        bare = [replace(n, statistics=None) for n in numbers]
        assert MNSE.needs_statistics and MNSE.missing_statistics(numbers, {}) == ()
        assert MNSE.missing_statistics(bare, {}) == ("clicks", "slope", "price")
        assert MNSE.missing_statistics(bare, {"low": 0, "high": 1}) == ()
        assert MNSE.missing_statistics(bare, {"quantize": "int", "resolution": 99}) == ()
        assert MNSE.missing_statistics(bare, {"quantize": "int"}) == ("clicks", "slope", "price")  # R from the data
        assert MNSE.missing_statistics(bare, {"quantize": "quantile"})[-1] == "cosine"
        assert MNSE(bare, D)(torch.rand(B, N)).isfinite().all()

    def test_codes_of_31_bits_are_exact(self):
        """float32 could not tell the last codes apart."""
        encoder = MNSE([NumberField("x", bounds=(0, 1))], D, resolution=2**31)
        x = torch.tensor([[0.0], [2**-31], [0.75], [1.0], [9.0], [NAN]])
        last = 2**31 - 1
        assert encoder.codes(x).flatten().tolist() == [0, 1, round(0.75 * last), last, last, 2**31]
        torch.testing.assert_close(encoder(x)[:, :, None].transpose(1, 2), naive(encoder, encoder.codes(x)))


FORMS = [
    {},
    {"resolution": 5000},
    {"bases": (10,)},
    {"bases": (7, 2), "missing": "zero"},
    {"resolution": 10**6, "missing": "zero"},
]


class TestVectors:
    @pytest.mark.parametrize("options", FORMS, ids=str)
    def test_fields_and_sum_equal_the_naive_loop(self, options):
        numbers = four_numbers()
        x = some_rows(numbers)
        for combine in ("fields", "sum"):
            encoder = MNSE(numbers, D, combine=combine, **options).double()
            expected = naive(encoder, encoder.codes(x), options.get("missing", "row"))
            expected = expected.flatten(1, 2) if combine == "fields" else expected.sum(2)
            torch.testing.assert_close(encoder(x), expected, atol=1e-12, rtol=0)
            assert len(encoder.field_names) == expected.shape[1]

    @pytest.mark.parametrize("options", FORMS, ids=str)
    def test_project_is_a_linear_layer_on_the_concatenation(self, options):
        numbers = four_numbers()
        encoder = MNSE(numbers, D, combine="project", **options).double()
        x = some_rows(numbers)
        concatenated = naive(encoder, encoder.codes(x), options.get("missing", "row")).flatten(2)
        torch.testing.assert_close(encoder(x), concatenated @ encoder.projection.weight.T)

    def test_names(self):
        numbers = four_numbers()[:2]
        assert MNSE(numbers, D, bases=(2, 10)).field_names == (
            "clicks_base2",
            "clicks_base10",
            "slope_base2",
            "slope_base10",
        )
        for options in ({"bases": (3,)}, {"combine": "sum"}, {"combine": "project"}):
            assert MNSE(numbers, D, **options).field_names == ("clicks", "slope")

    @pytest.mark.parametrize("missing", ["row", "zero"])
    @pytest.mark.parametrize("combine", ["fields", "sum"])
    def test_both_forms_are_equal_with_their_gradients(self, combine, missing):
        numbers = four_numbers()
        encoder = MNSE(numbers, D, combine=combine, missing=missing).double()
        other = MNSE(numbers, D, combine=combine, missing=missing).double()
        assert isinstance(encoder.lookup, FoldedDigits)
        code, bags = encoder.quantizer.missing_code, 3 if combine == "sum" else 1
        other.lookup = DigitSums(encoder.tables, bags, code, missing == "row")
        other.weight.data.copy_(encoder.weight)
        codes = torch.stack([torch.randint(0, levels, (99,)) for levels in encoder.quantizer.levels], 1)
        codes[::7] = code
        first, second = encoder.embed(codes), other.embed(codes)
        torch.testing.assert_close(first, second, atol=1e-10, rtol=0)
        weights = torch.randn_like(first)
        (first * weights).sum().backward(), (second * weights).sum().backward()
        torch.testing.assert_close(encoder.weight.grad, other.weight.grad, atol=1e-10, rtol=0)

    def test_the_form_follows_the_levels(self):
        number = NumberField("x", bounds=(0, 1))
        bound = numeral.MAX_FOLDED_LEVELS
        assert isinstance(MNSE([number], D, resolution=bound).lookup, FoldedDigits)
        assert isinstance(MNSE([number], D, resolution=bound + 1).lookup, DigitSums)

    @pytest.mark.parametrize("resolution", [1000, 5000])
    def test_gradients_reach_only_the_rows_that_were_read(self, resolution):
        number = NumberField("x")
        encoder = MNSE([number], D, bases=(10, 2), quantize="int", resolution=resolution)
        encoder.embed(torch.tensor([[7], [resolution]])).sum().backward()
        rows = encoder.weight.grad.abs().sum(1).nonzero().flatten().tolist()
        tens, twos = (num_digits(n, resolution) for n in (10, 2))
        seven = digit_rows(torch.tensor(7), 10, tens).tolist() + [10 * tens]
        binary = [*digit_rows(torch.tensor(7), 2, twos).tolist(), 2 * twos]
        assert rows == seven + [10 * tens + 1 + r for r in binary]

    def test_a_missing_value_reads_its_row_alone_or_nothing(self):
        numbers = four_numbers()
        x = torch.full((1, N), NAN)
        with_row, without = MNSE(numbers, D), MNSE(numbers, D, missing="zero")
        rows = [t.missing_row for t in with_row.tables]
        assert torch.equal(with_row(x)[0], with_row.weight[rows]) and (without(x) == 0).all()
        without(x).sum().backward()
        assert (without.weight.grad == 0).all()

    @pytest.mark.parametrize("combine", ["fields", "sum", "project"])
    @pytest.mark.parametrize("value", [0.3, NAN])
    def test_vectors_start_with_variance_1_over_the_width(self, combine, value):
        numbers = [NumberField(f"x{i}", bounds=(0, 1)) for i in range(300)]
        vectors = MNSE(numbers, 50, combine=combine)(torch.full((1, 300), value))
        assert vectors.std().item() == pytest.approx(50**-0.5, rel=0.05)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bases": ()}, "bases must be different"),
            ({"bases": (2, 2)}, "bases must be different"),
            ({"bases": (1,)}, r"whole numbers >= 2, got \[1\]"),
            ({"resolution": 1}, r"resolution must be in \[2, 2\^31\], got 1"),
            ({"quantize": "floor"}, "quantize must be one of auto, int"),
            ({"combine": "cat"}, "combine must be one of fields, sum, project, got 'cat'"),
            ({"missing": None}, "missing must be one of row, zero"),
            ({"low": 1.0}, "both low and high"),
            ({"low": 1.0, "high": 1.0}, "low must be below high"),
            ({"quantize": "quantile", "low": 0.0, "high": 1.0}, "leave out low and high"),
            ({"quantize": "int", "low": -3.0, "high": 9.0}, "int has code 0 for the number 0; give low: 0"),
        ],
    )
    def test_options_that_cannot_work(self, options, message):
        with pytest.raises(ValueError, match=message):
            MNSE(four_numbers(), D, **options)


CONTRACT = [
    {},
    {"resolution": 5000},
    {"combine": "sum"},
    {"combine": "project"},
    {"quantize": "quantile"},
    {"missing": "zero"},
]


@pytest.fixture(params=CONTRACT, ids=str)
def build(request):
    numbers = list(four_numbers())
    numbers[3] = replace(numbers[3], statistics=statistics([-0.5, 0.0, 0.25, 0.9]))
    return lambda: MNSE(numbers, D, **request.param)


@pytest.fixture
def encoder(build):
    return build()


class TestContract:
    def test_shape_and_independence(self, encoder):
        x = some_rows(four_numbers())
        out = encoder(x)
        assert out.shape == (B, len(encoder.field_names), D) and out.isfinite().all()
        torch.testing.assert_close(out[3:4], encoder(x[3:4]))

    def test_gradients_are_finite(self, encoder):
        encoder(some_rows(four_numbers())).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in encoder.parameters())

    def test_traces_and_takes_an_empty_batch(self, encoder):
        x = some_rows(four_numbers())
        traced = torch.fx.symbolic_trace(encoder)
        assert torch.equal(traced(x), encoder(x))
        empty = traced(torch.zeros(0, N))
        assert empty.shape == (0, len(encoder.field_names), D)
        empty.sum().backward()

    def test_compiles_in_one_graph(self, encoder):
        x = some_rows(four_numbers())
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(encoder, fullgraph=True, backend="eager")(x), encoder(x))

    def test_autocast(self, encoder):
        x = some_rows(four_numbers())
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(x)
        assert out.isfinite().all()
        torch.testing.assert_close(out.float(), encoder(x), atol=0.05, rtol=0.05)

    def test_state_round_trip(self, build):
        x, first, second = some_rows(four_numbers()), build(), build()
        second.load_state_dict(first.state_dict())
        assert torch.equal(second(x), first(x))
        assert set(first.state_dict()) <= {"weight", "projection.weight"}

    def test_meta(self, build):
        with torch.device("meta"):
            encoder = build()
            assert encoder(torch.zeros(B, N)).shape == (B, len(encoder.field_names), D)
        assert all(t.is_meta for t in (*encoder.parameters(), *encoder.buffers()))
