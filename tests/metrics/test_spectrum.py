"""Singular values and information abundance: exact cases, bounds, and what random tables are known to give."""

import numpy as np
import pytest
import torch

from hmoe_rec.metrics import spectrum
from hmoe_rec.metrics.spectrum import gram, information_abundance, singular_values

ROWS, D = 9, 4

CRITEO_CARDINALITIES = (
    "49 101 126 45 223 118 84 76 95 9 30 40 75 1458 555 193949 138801 306 19 11970 634 4 42646 5178 192773 3175 27 "
    "11422 181075 11 4654 2032 5 189657 18 16 59697 86 45571"
)


def abundance(table: torch.Tensor, *, normalize_rows: bool = False) -> float:
    return information_abundance(singular_values(gram(table, normalize_rows=normalize_rows))).item()


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_exact_cases():
    assert abundance(torch.eye(8)) == 8
    assert abundance(torch.outer(torch.arange(1.0, 8), torch.tensor([1.0, -2, 3]))) == pytest.approx(1, abs=1e-6)
    assert information_abundance(torch.tensor([2.0, 1, 1])) == 2
    rotation_1, rotation_2 = torch.linalg.qr(double(ROWS, 3))[0], torch.linalg.qr(double(3, 3))[0]
    assert abundance(rotation_1 @ torch.diag(torch.tensor([2.0, 1, 1]).double()) @ rotation_2) == pytest.approx(2)


def test_equals_the_singular_value_decomposition():
    for table in (double(ROWS, D), double(ROWS, D) * torch.tensor([1, 1e-1, 1e-2, 1e-3]), torch.randn(ROWS, D)):
        expected = torch.linalg.svdvals(table.double())
        torch.testing.assert_close(singular_values(gram(table)), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 3, D])
def test_lies_between_one_and_the_rank(rank):
    for _ in range(5):
        value = abundance(double(ROWS, rank) @ double(rank, D))
        assert 1 - 1e-9 <= value <= rank + 1e-6


def test_a_table_that_is_not_finite_has_no_spectrum_and_leaves_others_theirs():
    tables = torch.randn(3, ROWS, D)
    tables[1, 2, 3], tables[2, 0, 0] = torch.nan, torch.inf
    values = singular_values(torch.stack([gram(t) for t in tables]))
    torch.testing.assert_close(values[0], singular_values(gram(tables[0])))
    assert values[1:].isnan().all() and information_abundance(values).isnan().tolist() == [False, True, True]


def test_does_not_see_scale_and_rotation():
    table = double(ROWS, D)
    turned = torch.linalg.qr(double(ROWS, ROWS))[0] @ table @ torch.linalg.qr(double(D, D))[0]
    assert abundance(1e-3 * table) == pytest.approx(abundance(table), rel=1e-10)
    assert abundance(turned) == pytest.approx(abundance(table), rel=1e-10)


@pytest.mark.parametrize("normalize_rows", [False, True])
def test_chunks_and_row_shards_add_up(normalize_rows, monkeypatch):
    table = torch.randn(ROWS, D)
    table[3] = 0
    rows = table.double()
    lengths = rows.norm(dim=1, keepdim=True)
    expected = torch.where(lengths > 0, rows / lengths, 0) if normalize_rows else rows
    monkeypatch.setattr(spectrum, "CHUNK_ROWS", 2)
    whole = gram(table, normalize_rows=normalize_rows)
    torch.testing.assert_close(whole, expected.T @ expected)
    shards = [gram(shard, normalize_rows=normalize_rows) for shard in (table[:0], table[:5], table[5:])]
    torch.testing.assert_close(sum(shards), whole)


def test_normalized_rows_all_count_alike():
    table, lengths = double(ROWS, D), 10 ** torch.linspace(-20, 20, ROWS).double().unsqueeze(1)
    assert abundance(table * lengths) < 1.001  # the longest row is all that is left
    whole, scaled = gram(table, normalize_rows=True), gram(table * lengths, normalize_rows=True)
    torch.testing.assert_close(scaled, whole)
    assert whole.trace() == pytest.approx(ROWS)


def test_small_values_survive_float32_tables():
    """1e-5 of the top is below what a Gram matrix in float32 resolves (3e-4)."""
    table = torch.linalg.qr(double(ROWS, D))[0] * torch.tensor([1.0, 1e-1, 1e-3, 1e-5])
    torch.testing.assert_close(singular_values(gram(table))[-1].item(), 1e-5, rtol=1e-4, atol=0)
    values = singular_values(gram(table.float()))
    torch.testing.assert_close(values, torch.linalg.svdvals(table), rtol=1e-2, atol=0)


def test_edges():
    few = singular_values(gram(double(2, D)))
    assert few.shape == (D,) and (few[2:] < 1e-7 * few[0]).all() and (few.diff() <= 0).all()
    assert information_abundance(singular_values(gram(torch.zeros(0, D)))).isnan()
    stack = torch.stack([gram(double(ROWS, D)) for _ in range(3)])
    assert information_abundance(singular_values(stack)).shape == (3,)
    parameter = torch.nn.Parameter(torch.randn(ROWS, D).bfloat16())
    assert gram(parameter).dtype == torch.float64 and not gram(parameter).requires_grad
    with pytest.raises(ValueError, match=r"must be a matrix \[rows, width\], got a tensor of shape \(9,\)"):
        gram(torch.zeros(9))


def test_gaussian_tables():
    """Singular values of a Gaussian n x d lie in sqrt(n) +- sqrt(d): nearly alike for n >> d."""
    for _ in range(3):
        assert 29.2 < abundance(torch.randn(5000, 32)) < 30.1


def test_a_little_noise_does_not_hide_a_collapse():
    """Rank 4 plus noise of .01: the noise adds about 28 x .01 / sqrt(32), the four sum up to at most 4."""
    table = torch.randn(5000, 4) @ torch.randn(4, 32) + 0.01 * torch.randn(5000, 32)
    assert 2.5 < abundance(table) < 4.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "raw", "normalized", "tolerance"), [(10, 8.00, 8.12, 0.15), (40, 26.14, 26.36, 0.4)], ids=["10", "40"]
)
def test_untrained_tables_of_the_size_of_criteo(dim, raw, normalized, tolerance):
    """What learned tables are compared with: learned ones (width 40) average 6.64, about a quarter of this."""
    sizes = [int(size) for size in CRITEO_CARDINALITIES.split()]
    assert len(sizes) == 39 and sum(sizes) == 1_086_810
    tables = [torch.randn(size, dim) for size in sizes]
    for normalize_rows, expected in ((False, raw), (True, normalized)):
        values = [abundance(table, normalize_rows=normalize_rows) for table in tables]
        assert sum(values) / len(values) == pytest.approx(expected, abs=tolerance)
        assert all(value <= min(size, dim) + 1e-5 for value, size in zip(values, sizes, strict=True))


def test_measures_of_rank():
    flat, one, mixed = torch.ones(8), torch.tensor([3.0, 0, 0]), torch.tensor([2.0, 1, 1])
    for measure in (spectrum.effective_rank, spectrum.stable_rank, spectrum.participation_ratio):
        assert measure(flat).item() == pytest.approx(8) and measure(one).item() == pytest.approx(1)
        assert 1 < measure(mixed).item() < 3
        assert torch.equal(measure(torch.stack([mixed, mixed]))[0], measure(mixed))
    assert spectrum.stable_rank(mixed).item() == pytest.approx(6 / 4)
    assert spectrum.participation_ratio(mixed).item() == pytest.approx(36 / 18)
    assert spectrum.effective_rank(mixed).item() == pytest.approx(np.exp(1.5 * np.log(2)))


@pytest.mark.parametrize("rows", [3, 7, 90])
def test_random_reference_is_what_random_tables_have(rows):
    direct = [
        float(spectrum.information_abundance(torch.linalg.svdvals(torch.randn(rows, D, dtype=torch.float64))))
        for _ in range(300)
    ]
    reference = spectrum.random_reference(rows, D, draws=300)
    assert reference == pytest.approx(np.mean(direct), abs=4 * np.std(direct) / 300**0.5 * 2**0.5)
    assert spectrum.random_reference(10**9, D) == pytest.approx(D, abs=0.01)


def test_principal_angles_and_cka():
    e, other = torch.randn(ROWS, D, dtype=torch.float64), torch.randn(ROWS, 4, dtype=torch.float64)
    rotated = e @ torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0] * 3

    def relation(a, b):
        cosines = spectrum.canonical_correlations(a.T @ a, b.T @ b, a.T @ b)
        return cosines, float(spectrum.linear_cka(a.T @ a, b.T @ b, a.T @ b))

    cosines, cka = relation(e, rotated)
    torch.testing.assert_close(cosines, torch.ones(D, dtype=torch.float64))
    assert cka == pytest.approx(1)
    cosines, cka = relation(e, other)
    expected = torch.linalg.svdvals(torch.linalg.qr(e)[0].T @ torch.linalg.qr(other)[0])
    torch.testing.assert_close(cosines, expected)
    assert cka < 0.5
    shared = torch.cat([e[:, :2], other[:, :1]], 1)  # two directions of e and one other
    torch.testing.assert_close(relation(e, shared)[0][:2], torch.ones(2, dtype=torch.float64))
    low = e[:, :1].expand(-1, 3)  # rank one: directions that are not there do not count
    assert len(relation(low, e)[0]) == 1
