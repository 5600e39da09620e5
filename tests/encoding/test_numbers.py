"""The promises of every encoder of numbers, and each against a naive loop in float64."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hmoe_rec.data.statistics import log_square_bins
from hmoe_rec.encoding import NUMBERS
from hmoe_rec.encoding.autodis import AutoDis
from hmoe_rec.encoding.bins import LogSquareBins, QuantileBins
from hmoe_rec.encoding.numeral import MNSE
from hmoe_rec.encoding.periodic import Periodic, PiecewiseLinear
from hmoe_rec.encoding.scalar import ScalarNumbers
from hmoe_rec.kinds import resolve
from hmoe_rec.types import NumberField, NumberStatistics

B, N, D = 5, 3, 6
OPTIONS = {MNSE: {"combine": "sum"}}  # one vector per number
NAN = float("nan")


def statistics_of(raw) -> NumberStatistics:
    raw = np.asarray(raw, np.float64)
    bins = Counter(log_square_bins(raw).astype(int).tolist())
    return NumberStatistics(
        count=raw.size,
        missing=0,
        minimum=raw.min(),
        maximum=raw.max(),
        low=float(np.quantile(raw, 0.001)),
        high=float(np.quantile(raw, 0.999)),
        integral=bool((raw == np.floor(raw)).all()),
        quantiles=tuple(np.quantile(raw, np.linspace(0, 1, 257)).tolist()),
        log_square_bins=tuple(sorted(k for k, n in bins.items() if n >= 10)),
    )


def raw_values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "price": rng.lognormal(2.0, 1.5, 640),
        "visits": np.floor(rng.exponential(9.0, 640)),
        "balance": rng.normal(0.0, 40.0, 640),
    }


TRANSFORMS = {"price": ("log1p", 2.1, 1.3), "visits": ("none", 8.5, 9.0), "balance": ("slog", 0.1, 3.2)}


def number_fields(fitted: bool = True) -> list[NumberField]:
    return [
        NumberField(name, *TRANSFORMS[name], statistics=statistics_of(raw) if fitted else None)
        for name, raw in raw_values().items()
    ]


def as_batch(number: NumberField, raw) -> torch.Tensor:
    """Raw values as the reader puts them into a batch: computed in float64, kept as float32."""
    raw = np.asarray(raw, np.float64)
    if number.transform == "log1p":
        raw = np.log1p(raw)
    elif number.transform == "slog":
        raw = np.sign(raw) * np.log1p(np.abs(raw))
    return torch.tensor(((raw - number.mean) / number.std).astype(np.float32))


def batch(rows: int = B, missing: bool = False) -> torch.Tensor:
    columns = [as_batch(number, raw_values()[number.name][:rows]) for number in number_fields()]
    numbers = torch.stack(columns, 1)
    if missing:
        numbers[0, 0] = numbers[2, 1] = numbers[3] = NAN
    return numbers


def randomized(encoder):
    """No parameter is left at zero, so that each one shows."""
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    return encoder


def make(kind: type, numbers: Sequence[NumberField], dim: int):
    return kind(numbers, dim, **OPTIONS.get(kind, {}))


@pytest.fixture(params=sorted(NUMBERS))
def encoder(request):
    return randomized(make(resolve(request.param, NUMBERS), number_fields(), D))


class TestContract:
    def test_one_vector_per_number(self, encoder):
        assert encoder.field_names == ("price", "visits", "balance")
        out = encoder(batch())
        assert out.shape == (B, N, D) and out.isfinite().all() and out.dtype == torch.float32

    def test_examples_are_independent(self, encoder):
        x = batch(missing=True)
        torch.testing.assert_close(encoder(x)[2:4], encoder(x[2:4]))

    def test_numbers_are_independent(self, encoder):
        x = batch()
        other = x.clone()
        other[:, 1] = x[:, 1].flip(0) + 3.0
        same = encoder(x) == encoder(other)
        assert same[:, [0, 2]].all() and not same[:, 1].all()

    def test_every_number_has_parameters_of_its_own(self, encoder):
        x = torch.zeros(B, N)
        out = encoder(x)[0]
        assert not torch.equal(out[0], out[1]) and not torch.equal(out[1], out[2])

    def test_a_missing_number_is_apart_from_all_values(self, encoder):
        x = batch(400)
        out, missing = encoder(x), encoder(torch.full((2, N), NAN))
        assert torch.equal(missing[0], missing[1]) and missing.isfinite().all()
        assert ((out - missing[0]).abs().sum(2) > 0).all()
        x[7, 1] = NAN
        assert torch.equal(encoder(x)[7, 1], missing[0, 1]) and torch.equal(encoder(x)[7, 0], out[7, 0])

    def test_missing_numbers_give_finite_gradients(self, encoder):
        encoder(batch(missing=True)).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in encoder.parameters())

    def test_a_missing_number_teaches_its_own_vector_only(self, encoder):
        encoder(torch.full((B, N), NAN)).sum().backward()
        touched = {name: p.grad.count_nonzero().item() for name, p in encoder.named_parameters()}
        rows = 3 if isinstance(encoder, MNSE) else 1  # one in each base
        assert sum(touched.values()) == rows * N * D, touched

    def test_every_parameter_learns(self, encoder):
        encoder(torch.cat([batch(600), batch(missing=True)])).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in encoder.parameters())

    def test_empty_batch(self, encoder):
        assert encoder(torch.zeros(0, N)).shape == (0, N, D)

    def test_values_far_away_are_finite(self, encoder):
        assert encoder(torch.tensor([[-1e6] * N, [1e6] * N])).isfinite().all()

    def test_traces(self, encoder):
        traced = torch.fx.symbolic_trace(encoder)
        for x in (batch(missing=True), batch(7)):
            assert torch.equal(traced(x), encoder(x))
        assert traced(torch.zeros(0, N)).shape == (0, N, D)

    def test_compiles_without_a_graph_break(self, encoder):
        x = batch(missing=True)
        torch.testing.assert_close(torch.compile(encoder, fullgraph=True, backend="eager")(x), encoder(x))

    def test_bf16_autocast_stays_near(self, encoder):
        x = batch(missing=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(x)
        assert out.isfinite().all()
        torch.testing.assert_close(out.float(), encoder(x), atol=0.2, rtol=0.05)

    def test_state_round_trip(self, encoder):
        other = make(type(encoder), number_fields(), D)
        other.load_state_dict(encoder.state_dict())
        x = batch(missing=True)
        assert torch.equal(other(x), encoder(x))

    def test_without_memory(self, encoder):
        with torch.device("meta"):
            shadow = make(type(encoder), number_fields(), D)
        shapes = {name: p.shape for name, p in encoder.named_parameters()}
        assert {name: p.shape for name, p in shadow.named_parameters()} == shapes
        assert shadow(torch.zeros(B, N, device="meta")).shape == (B, N, D)

    def test_one_number(self, encoder):
        alone = make(type(encoder), number_fields()[1:2], 4)
        assert alone(torch.tensor([[0.5], [NAN]])).shape == (2, 1, 4)

    def test_without_statistics_it_is_built_for_a_look(self, encoder):
        provisional = make(type(encoder), number_fields(fitted=False), D)
        assert provisional(batch(missing=True)).isfinite().all()
        if not isinstance(encoder, LogSquareBins | MNSE):  # whose sizes are those of the vocabulary and of the range
            assert [p.shape for p in provisional.parameters()] == [p.shape for p in encoder.parameters()]

    def test_a_number_without_any_value(self, encoder):
        nothing = NumberStatistics(0, 9, 0.0, 0.0, 0.0, 0.0, False, (0.0,) * 257)
        alone = make(type(encoder), [NumberField("empty", statistics=nothing)], D)
        out = alone(torch.tensor([[NAN], [0.0], [5.0]]))
        out.sum().backward()
        assert out.isfinite().all() and all(p.grad.isfinite().all() for p in alone.parameters())

    def test_vectors_start_with_a_length_of_about_one(self, encoder):
        dim = 64
        fresh = make(type(encoder), number_fields(), dim)
        lengths = fresh(batch(400)).norm(dim=2)
        assert 0.3 < lengths.square().mean().sqrt() < 2.0


class TestScalar:
    def test_equals_the_formula(self):
        encoder, x = randomized(ScalarNumbers(number_fields(), D)).double(), batch(missing=True).double()
        out = encoder(x)
        for b in range(B):
            for n in range(N):
                value = x[b, n].item()
                expected = encoder.missing[n] if math.isnan(value) else value * encoder.weight[n] + encoder.bias[n]
                torch.testing.assert_close(out[b, n], expected)


class TestQuantileBins:
    @pytest.mark.parametrize("num_bins", [2, 8, 32])
    def test_bins_are_equally_full_on_the_data_they_were_fitted_on(self, num_bins):
        for number in (number_fields()[0], number_fields()[2]):
            encoder = QuantileBins([number], D, num_bins=num_bins)
            rows = encoder.rows(as_batch(number, raw_values()[number.name]).unsqueeze(1))
            counts = torch.bincount(rows.flatten(), minlength=num_bins + 1)
            assert counts[-1] == 0 and (counts[:-1] - 640 / num_bins).abs().max() <= 1

    def test_equals_counting_edges(self):
        numbers, num_bins = number_fields(), 7
        encoder, x = QuantileBins(numbers, D, num_bins=num_bins), batch(200)
        out = encoder(x)
        for n, number in enumerate(numbers):
            raw = raw_values()[number.name]
            known = np.linspace(0, 1, 257)
            edges = as_batch(number, np.interp(np.arange(1, 7) / 7, known, np.quantile(raw, known)))
            for b in range(200):
                row = n * (num_bins + 1) + sum(x[b, n].item() >= edge for edge in edges.tolist())
                assert torch.equal(out[b, n], encoder.table[row])

    def test_a_frequent_value_has_one_bin_and_the_merged_ones_stay_empty(self):
        raw = np.concatenate([np.zeros(480), np.linspace(1.0, 2.0, 160)])
        number = NumberField("clicks", statistics=statistics_of(raw))
        rows = QuantileBins([number], D, num_bins=8).rows(as_batch(number, raw).unsqueeze(1)).flatten()
        assert len(set(rows[:480].tolist())) == 1
        # The quantiles at 1/8 to 7/8: five zeros, one between 0 and 1, one in the middle of the rest.
        assert torch.bincount(rows, minlength=9).tolist() == [0, 0, 0, 0, 0, 480, 80, 80, 0]

    def test_values_beyond_the_data_fall_into_the_outer_bins(self):
        number = number_fields()[1]
        encoder = QuantileBins([number], D, num_bins=5)
        assert encoder.rows(torch.tensor([[-1e9], [1e9], [NAN]])).flatten().tolist() == [0, 4, 5]

    def test_too_few_bins(self):
        with pytest.raises(ValueError, match="num_bins must be at least 2, got 1"):
            QuantileBins(number_fields(), D, num_bins=1)


def log_square_number(transform: str, integral: bool, vocabulary: Sequence[int] = range(-3, 60)) -> NumberField:
    scale = {"none": (40.0, 333.3), "log1p": (2.7, 1.9), "slog": (1.3, 2.1)}[transform]
    bins = tuple(vocabulary)
    found = NumberStatistics(99, 0, -1.0, 1e6, -1.0, 1e6, integral, (0.0, 1e6), log_square_bins=bins)
    return NumberField("clicks", transform, *scale, statistics=found)


class TestLogSquareBins:
    @pytest.mark.parametrize("integral", [True, False])
    @pytest.mark.parametrize("transform", ["none", "log1p", "slog"])
    def test_known_values(self, transform, integral):
        """By hand: (ln 3)^2 = 1.21, (ln 10)^2 = 5.30, (ln 100)^2 = 21.2, (ln 1000)^2 = 47.7; below 3: v - 2."""
        expected = {0: -2, 1: -1, 2: 0, 3: 1, 10: 5, 100: 21, 1000: 47}
        number = log_square_number(transform, integral)
        rows = LogSquareBins([number], D).rows(as_batch(number, list(expected)).unsqueeze(1)).flatten()
        assert [row - 3 for row in rows.tolist()] == list(expected.values())

    @pytest.mark.parametrize("transform", ["none", "log1p", "slog"])
    def test_whole_numbers_equal_the_formula(self, transform):
        number = log_square_number(transform, integral=True, vocabulary=range(-2, 200))
        raw = np.concatenate([np.arange(50_000), np.arange(50_000, 1_000_000, 997)])
        rows = LogSquareBins([number], D).rows(as_batch(number, raw).unsqueeze(1)).flatten()
        expected = [v - 2 if v <= 2 else math.floor(math.log(v) ** 2) for v in raw.tolist()]
        assert (rows - 2).tolist() == expected

    @pytest.mark.parametrize("transform", ["none", "slog"])
    def test_floats_equal_the_formula_away_from_the_edges(self, transform):
        number = log_square_number(transform, integral=False, vocabulary=range(-60, 60))
        raw = np.random.default_rng(2).normal(0.0, 15.0, 3000)
        raw = raw[np.abs(raw - np.round(raw)) > 1e-4]
        rows = LogSquareBins([number], D).rows(as_batch(number, raw).unsqueeze(1)).flatten()
        assert (rows - 60).tolist() == log_square_bins(raw).astype(int).tolist()

    def test_bins_outside_the_vocabulary_share_a_row(self):
        first, second = log_square_number("log1p", True, [0, 1, 5]), log_square_number("none", True, [-2])
        encoder = LogSquareBins([first, second], D)
        assert encoder.table.shape == (3 + 2 + 1 + 2, D)
        raw = [2, 3, 10, 0, 5, 100, 13]  # bins 0 1 5 -2 2 21 6
        rows = encoder.rows(torch.stack([as_batch(first, raw), as_batch(second, raw)], 1))
        assert rows[:, 0].tolist() == [0, 1, 2, 3, 3, 3, 3]
        assert rows[:, 1].tolist() == [6, 6, 6, 5, 6, 6, 6]
        assert encoder.rows(torch.full((1, 2), NAN)).tolist() == [[4, 7]]


class TestAutoDis:
    def test_equals_the_formula(self):
        encoder = randomized(AutoDis(number_fields(), D, num_meta=4, temperature=0.7, alpha=0.3)).double()
        x = batch(missing=True).double()
        out = encoder(x)
        for b in range(B):
            for n in range(N):
                if x[b, n].isnan():
                    torch.testing.assert_close(out[b, n], encoder.missing[n])
                    continue
                h = encoder.first_NM[n] * x[b, n]
                h = torch.where(h > 0, h, 0.01 * h)
                logits = (encoder.second_NMM[n] @ h + 0.3 * h) / 0.7
                weights = logits.exp() / logits.exp().sum()
                expected = sum(weights[m] * encoder.meta_NMD[n, m] for m in range(4))
                torch.testing.assert_close(out[b, n], expected)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_meta": 0}, "num_meta must be at least 1, got 0"),
            ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ],
    )
    def test_options_that_cannot_work(self, options, message):
        with pytest.raises(ValueError, match=message):
            AutoDis(number_fields(), D, **options)


class TestPeriodic:
    def test_equals_the_formula(self):
        encoder = randomized(Periodic(number_fields(), D, num_frequencies=4)).double()
        x = batch(missing=True).double()
        out = encoder(x)
        for b in range(B):
            for n in range(N):
                if x[b, n].isnan():
                    torch.testing.assert_close(out[b, n], encoder.missing[n])
                    continue
                angles = [2 * math.pi * c * x[b, n].item() for c in encoder.frequencies_NP[n].tolist()]
                waves = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles]).double()
                expected = (waves @ encoder.weight[n] + encoder.bias[n]).clamp(min=0)
                torch.testing.assert_close(out[b, n], expected, atol=1e-6, rtol=1e-6)

    def test_first_frequencies_lie_within_three_sigma(self):
        frequencies = Periodic(number_fields(), D, num_frequencies=500, sigma=0.25).frequencies_NP
        assert frequencies.abs().max() <= 0.75 and 0.22 < frequencies.std() < 0.27

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"num_frequencies": 0}, "num_frequencies must be at least 1"), ({"sigma": 0.0}, "sigma must be positive")],
    )
    def test_options_that_cannot_work(self, options, message):
        with pytest.raises(ValueError, match=message):
            Periodic(number_fields(), D, **options)


class TestPiecewiseLinear:
    def test_equals_the_formula(self):
        numbers = number_fields()
        encoder = randomized(PiecewiseLinear(numbers, D, num_bins=8)).double()
        x = torch.cat([batch(60, missing=True), torch.tensor([[-50.0] * N, [50.0] * N])]).double()
        out = encoder(x)
        for n, number in enumerate(numbers):
            quantiles = np.quantile(raw_values()[number.name], np.linspace(0, 1, 9))
            edges = sorted(set(as_batch(number, quantiles).tolist()))
            for b in range(len(x)):
                expected = encoder.missing[n] if x[b, n].isnan() else encoder.bias[n]
                for t in range(len(edges) - 1):
                    share = min(max((x[b, n].item() - edges[t]) / (edges[t + 1] - edges[t]), 0.0), 1.0)
                    expected = expected if x[b, n].isnan() else expected + share * encoder.weight[n, t]
                torch.testing.assert_close(out[b, n], expected, atol=1e-5, rtol=1e-5)

    def test_equal_quantiles_count_once(self):
        raw = np.concatenate([np.zeros(480), np.linspace(1.0, 2.0, 160)])
        encoder = PiecewiseLinear([NumberField("clicks", statistics=statistics_of(raw))], D, num_bins=8)
        assert encoder.left_NP.isfinite().tolist() == [[True] * 3 + [False] * 5]
        assert (encoder.width_NP > 0).all() and encoder.left_NP[0, 0] == 0
        assert encoder.left_NP[0, 2] + encoder.width_NP[0, 2] == 2

    def test_is_continuous_and_flat_outside_the_data(self):
        number = number_fields()[0]
        encoder = randomized(PiecewiseLinear([number], D, num_bins=8))
        fine = torch.linspace(-4, 6, 20_001).unsqueeze(1)
        out = encoder(fine)[:, 0]
        slope = encoder.weight.abs().max() / encoder.width_NP.min()
        assert (out[1:] - out[:-1]).abs().max() <= slope * 5.1e-4
        torch.testing.assert_close(out[0], encoder.bias[0])
        torch.testing.assert_close(out[-1], encoder.bias[0] + encoder.weight[0].sum(0))

    def test_too_few_bins(self):
        with pytest.raises(ValueError, match="num_bins must be at least 2, got 0"):
            PiecewiseLinear(number_fields(), D, num_bins=0)


def test_a_number_with_bounds_and_no_statistics_has_bins_of_equal_width():
    encoder = QuantileBins([NumberField("cosine", bounds=(-1.0, 1.0))], D, num_bins=4)
    x = torch.tensor([[-0.9], [-0.6], [-0.4], [0.1], [0.4], [0.6], [0.9]])
    rows = encoder(x)[:, 0]
    same = [torch.equal(rows[i], rows[i + 1]) for i in range(6)]
    assert same == [True, False, False, True, False, True]
