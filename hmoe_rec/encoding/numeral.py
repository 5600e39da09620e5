"""Numbers [B, N] -> codes [B, N] -> their digits in several bases -> vectors [B, K, D]: MNSE.

Letters of this file: K vectors, J digits of all numbers and bases, W rows of the weight, Q quantiles; n is a base.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmoe_rec.encoding.numbers import PROVISIONAL, NumberEncoder, ToRaw, batch_value
from hmoe_rec.types import NumberField, NumberStatistics

Kind = Literal["auto", "int", "affine", "slog", "quantile", "round"]
Combine = Literal["fields", "sum", "project"]
Missing = Literal["row", "zero"]
MAX_LEVELS = 2**31
HEAVY_TAIL = 10.0  # range / interquartile range; uniform 2, normal 4.6, exponential 6.3, Laplace 9, log-normal 15
# Up to here a table of all codes is faster than sums of digits. Milliseconds of a training step's forward and backward
# pass (B = 4096, N = 13, D = 16, bases 2, 3, 10, one thread), table against digits: 7 and 104 at R = 1024, 17 and 128
# at 4096, 56 and 142 at 16384, where the forward pass alone is slower and the table takes 40 MB.
MAX_FOLDED_LEVELS = 4096


def num_digits(base: int, levels: int) -> int:
    """Digits that the codes 0 .. levels - 1 take: the smallest K >= 1 with base**K >= levels."""
    count = 1
    while base**count < levels:
        count += 1
    return count


def digits(codes: Tensor, base: int, count: int) -> Tensor:
    """[...] -> [..., count]: the most significant digit first, with leading zeros."""
    powers = torch.tensor([base**k for k in reversed(range(count))], device=codes.device)
    return codes.unsqueeze(-1) // powers % base


def digit_rows(codes: Tensor, base: int, count: int) -> Tensor:
    """[...] -> [..., count]: every position has rows of its own, base * position + digit."""
    return digits(codes, base, count) + base * torch.arange(count, device=codes.device)


class Scale(NamedTuple):
    """How a number u becomes a code: floor((u - low) / span * steps + shift), cut to [0, top].

    Attributes:
        levels: R, which decides how many digits there are.
        log_scale: u = sign(v) ln(1 + |v| / log_scale); None = u is the raw value v itself, or its rank.
        whole: v is rounded to a whole number first, which repairs what float32 lost of it.
    """

    levels: int
    low: float
    span: float
    steps: int
    shift: float
    top: int
    log_scale: float | None = None
    whole: bool = False


class Quantizer(nn.Module):
    """Numbers as the batch carries them [B, N] -> codes [B, N] int64; `missing_code` for NaN and infinities.

    Computed in float64: codes of up to 31 bits would not fit float32.

    Args:
        numbers: N of them.
        resolution, quantize, low, high: see `MNSE`.

    Attributes:
        levels: R of every number; its codes are 0 .. R - 1.
        missing_code: the largest R.
    """

    low_N: Tensor
    span_N: Tensor
    steps_N: Tensor
    shift_N: Tensor
    top_N: Tensor
    whole_N: Tensor
    logs_N: Tensor
    log_scale_N: Tensor
    quantiles_NQ: Tensor
    intervals_N1: Tensor

    def __init__(
        self,
        numbers: Sequence[NumberField],
        *,
        resolution: int = 1024,
        quantize: Kind = "auto",
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        super().__init__()
        given = None if low is None or high is None else (low, high)
        scales = [_scale_of(number, resolution, quantize, given) for number in numbers]
        self.levels = tuple(s.levels for s in scales)
        self.missing_code = max(self.levels)
        self.by_rank = quantize == "quantile"
        self.any_whole = any(s.whole for s in scales)
        self.any_log = any(s.log_scale is not None for s in scales)
        self.to_raw = ToRaw(numbers)
        for name in ("low", "span", "steps", "shift", "top"):
            values = torch.tensor([float(getattr(s, name)) for s in scales], dtype=torch.float64)
            self.register_buffer(f"{name}_N", values, persistent=False)
        log_scales = torch.tensor([s.log_scale or 1.0 for s in scales], dtype=torch.float64)
        self.register_buffer("log_scale_N", log_scales, persistent=False)
        self.register_buffer("logs_N", torch.tensor([s.log_scale is not None for s in scales]), persistent=False)
        self.register_buffer("whole_N", torch.tensor([s.whole for s in scales]), persistent=False)
        if self.by_rank:
            fitted = [[batch_value(n, q) for q in _fitted(n).quantiles] for n in numbers]
            widest = max(map(len, fitted))
            # At least one infinity behind the last quantile: every finite value then lies in an interval.
            padded = [row + [math.inf] * (widest + 1 - len(row)) for row in fitted]
            self.register_buffer("quantiles_NQ", torch.tensor(padded, dtype=torch.float32), persistent=False)
            intervals = torch.tensor([[max(len(row) - 1.0, 1.0)] for row in fitted], dtype=torch.float64)
            self.register_buffer("intervals_N1", intervals, persistent=False)

    def forward(self, numbers_BN: Tensor) -> Tensor:
        u_BN = self.ranks(numbers_BN) if self.by_rank else self.values(numbers_BN)
        steps_BN = ((u_BN - self.low_N) / self.span_N * self.steps_N + self.shift_N).floor()
        codes_BN = torch.minimum(steps_BN.clamp(min=0.0), self.top_N)
        return torch.where(numbers_BN.isfinite(), codes_BN, float(self.missing_code)).long()

    def values(self, numbers_BN: Tensor) -> Tensor:
        """Raw values, through the logarithm where a number has one."""
        u_BN = self.to_raw(numbers_BN.double())
        if self.any_whole:
            u_BN = torch.where(self.whole_N, u_BN.round(), u_BN)
        if self.any_log:
            u_BN = torch.where(self.logs_N, u_BN.sign() * (u_BN.abs() / self.log_scale_N).log1p(), u_BN)
        return u_BN

    def ranks(self, numbers_BN: Tensor) -> Tensor:
        """Place among the fitted quantiles, 0 at the first and 1 at the last; a value that fills several gets the last.

        In the batch's own float32: a value that was fitted and one that is served meet bit by bit.
        """
        x_NB = numbers_BN.nan_to_num(0.0, 0.0, 0.0).float().t().contiguous()
        place_NB = (torch.searchsorted(self.quantiles_NQ, x_NB, right=True) - 1).clamp(min=0)
        start_NB = self.quantiles_NQ.gather(1, place_NB).double()
        end_NB = self.quantiles_NQ.gather(1, place_NB + 1).double()
        return ((place_NB + (x_NB.double() - start_NB) / (end_NB - start_NB)) / self.intervals_N1).t()


def _fitted(number: NumberField) -> NumberStatistics:
    """Its statistics; those of a number without any value say nothing."""
    s = number.statistics
    return s if s is not None and s.count and s.quantiles else PROVISIONAL


def _scale_of(number: NumberField, resolution: int, quantize: Kind, given: tuple[float, float] | None) -> Scale:
    """The formulas are those of `MNSE`."""
    s, known = _fitted(number), given or number.bounds
    kind = _kind_of(number, resolution, given) if quantize == "auto" else quantize
    if kind == "int":
        largest = known[1] if known else resolution - 1 if s is PROVISIONAL else s.maximum
        levels = int(min(max(largest, 0.0), MAX_LEVELS - 1)) + 1
        return Scale(levels, low=0.0, span=1.0, steps=1, shift=0.0, top=levels - 1, whole=True)
    low, high = (s.quantiles[0], s.quantiles[-1]) if kind == "quantile" else known or (s.low, s.high)
    log_scale = _log_scale(s) if kind == "slog" else None
    if log_scale is not None:
        low, high = (math.copysign(math.log1p(abs(v) / log_scale), v) for v in (low, high))
    if not high > low:
        return Scale(resolution, low=0.0, span=1.0, steps=1, shift=0.0, top=0)
    if kind == "quantile":
        low, high = 0.0, 1.0
    steps, shift = (resolution - 1, 0.5) if kind == "round" else (resolution, 0.0)
    return Scale(resolution, low, high - low, steps, shift, resolution - 1, log_scale, whole=s.integral)


def _kind_of(number: NumberField, resolution: int, given: tuple[float, float] | None) -> Kind:
    """What "auto" means for this number."""
    s = _fitted(number)
    if number.bounds is not None:
        return "round"
    if given is None and s.integral and s.minimum >= 0 and s.maximum < resolution:
        return "int"
    quarter, three_quarters = (_quantile(s, p) for p in (0.25, 0.75))
    return "slog" if s.high - s.low > HEAVY_TAIL * (three_quarters - quarter) else "affine"


def _quantile(statistics: NumberStatistics, probability: float) -> float:
    values = statistics.quantiles
    place = probability * (len(values) - 1)
    before = min(int(place), len(values) - 2)
    return values[before] + (place - before) * (values[before + 1] - values[before])


def _log_scale(statistics: NumberStatistics) -> float:
    """Below it a number is spread evenly, above it by its logarithm: 1 for counts, else a typical size of the values.

    The typical size is the median of |quantiles|, or their mean where more than half of the values are 0; so the codes
    do not depend on the number's unit.
    """
    if statistics.integral or not statistics.count:
        return 1.0
    sizes = sorted(abs(q) for q in statistics.quantiles)
    return sizes[len(sizes) // 2] or sum(sizes) / len(sizes) or 1.0


class DigitTable(NamedTuple):
    """The rows of one number in one base: `first_row` + base * position + digit, then the row of a missing value."""

    number: int
    base: int
    num_digits: int
    first_row: int

    @property
    def num_digit_rows(self) -> int:
        return self.base * self.num_digits

    @property
    def missing_row(self) -> int:
        return self.first_row + self.num_digit_rows


class DigitSums(nn.Module):
    """Sums the rows of all digits in one bag lookup, a bag per vector: codes [B, N] -> [B, K, D].

    Args:
        tables: number after number, inside it base after base.
        bags: how many tables make one vector: 1, or all bases of a number.
        missing_code: it reads the missing rows alone, or nothing without `missing_rows`.
    """

    number_J: Tensor
    power_J: Tensor
    base_J: Tensor
    row_J: Tensor
    missing_J: Tensor
    start_K: Tensor

    def __init__(self, tables: Sequence[DigitTable], bags: int, missing_code: int, missing_rows: bool) -> None:
        super().__init__()
        self.zero_row = tables[-1].missing_row + int(missing_rows)  # appended to the weight
        self.missing_code = missing_code
        columns: list[tuple[int, int, int, int, int]] = []
        starts = []
        for i, t in enumerate(tables):
            if i % bags == 0:
                starts.append(len(columns))
            for k in range(t.num_digits):
                missing = t.missing_row if missing_rows and k == 0 else self.zero_row
                columns.append((t.number, t.base ** (t.num_digits - 1 - k), t.base, t.first_row + t.base * k, missing))
        for name, values in zip(("number", "power", "base", "row", "missing"), zip(*columns, strict=True), strict=True):
            self.register_buffer(f"{name}_J", torch.tensor(values), persistent=False)
        self.register_buffer("start_K", torch.tensor(starts), persistent=False)
        self.num_ids, self.num_vectors = len(columns), len(starts)

    def forward(self, codes_BN: Tensor, weight_WD: Tensor) -> Tensor:
        code_BJ = codes_BN.index_select(1, self.number_J)
        ids_BJ = code_BJ // self.power_J % self.base_J + self.row_J
        ids_BJ = torch.where(code_BJ == self.missing_code, self.missing_J, ids_BJ)
        example_B1 = torch.ones_like(codes_BN[:, :1]).cumsum(0) - 1
        offsets_BK = example_B1 * self.num_ids + self.start_K
        # Without padding_idx, which would leave the fast kernel: the appended row is zero by itself.
        bags = F.embedding_bag(ids_BJ.flatten(), _with_zero_row(weight_WD), offsets_BK.flatten(), mode="sum")
        return bags.view(codes_BN.shape[0], self.num_vectors, weight_WD.shape[1])


class FoldedDigits(nn.Module):
    """The same as `DigitSums` for few levels: makes the vectors of all codes first, then looks each code up once.

    A table of R codes in base n is pattern @ rows, a constant matrix of zeros and ones [R + 1, n * digits + 1] times
    the rows. A number with fewer digits than the largest one has leading zeros that read a row of zeros.
    """

    position_N: Tensor

    def __init__(self, tables: Sequence[DigitTable], bags: int, missing_code: int, missing_rows: bool) -> None:
        super().__init__()
        zero_row = tables[-1].missing_row + int(missing_rows)
        self.num_numbers = 1 + tables[-1].number
        self.bases = tuple(t.base for t in tables if t.number == 0)
        self.add_bases = bags > 1
        self.num_vectors = len(tables) // bags
        codes = torch.arange(missing_code)
        for base in self.bases:
            mine = [t for t in tables if t.base == base]
            count = max(t.num_digits for t in mine)
            pattern = torch.zeros(missing_code + 1, base * count + 1)
            pattern[:missing_code].scatter_(1, digit_rows(codes, base, count), 1.0)
            pattern[missing_code, base * count] = 1.0
            # From the right: the least significant digits of all numbers share their columns of the pattern.
            left = [base * count - t.num_digit_rows for t in mine]
            rows = [
                [t.first_row + r - skip if r >= skip else zero_row for t, skip in zip(mine, left, strict=True)]
                for r in range(base * count)
            ]
            rows.append([t.missing_row if missing_rows else zero_row for t in mine])
            self.register_buffer(f"pattern_{base}", pattern, persistent=False)
            self.register_buffer(f"rows_{base}", torch.tensor(rows).flatten(), persistent=False)
        self.register_buffer("position_N", torch.arange(self.num_numbers), persistent=False)

    def forward(self, codes_BN: Tensor, weight_WD: Tensor) -> Tensor:
        ids_BN = codes_BN * self.num_numbers + self.position_N
        # index_select, not F.embedding: its backward pass takes half the time on a CPU.
        vectors = self.code_vectors(weight_WD).index_select(0, ids_BN.flatten())
        return vectors.view(codes_BN.shape[0], self.num_vectors, weight_WD.shape[1])

    def code_vectors(self, weight_WD: Tensor) -> Tensor:
        """[codes * N, bases * D], or [codes * N, D] where the bases are added."""
        rows_WD = _with_zero_row(weight_WD)
        parts = []
        for base in self.bases:
            pattern = self.get_buffer(f"pattern_{base}")
            rows = rows_WD.index_select(0, self.get_buffer(f"rows_{base}"))
            table = pattern.to(rows.dtype) @ rows.view(pattern.shape[1], -1)
            # Back from autocast's type: thousands of examples may add up in the gradient of one code.
            parts.append(table.to(weight_WD.dtype).view(-1, weight_WD.shape[1]))
        return torch.stack(parts).sum(0) if self.add_bases else torch.cat(parts, dim=1)


def _with_zero_row(weight_WD: Tensor) -> Tensor:
    return torch.cat([weight_WD, torch.zeros_like(weight_WD[:1])])


class MNSE(NumberEncoder):
    r"""Multiple Numeral Systems Encoding: a number's digits in several bases, each digit an embedding.

    .. math:: f(v) = \Big[ \sum_{k=0}^{K_n-1} X^{(n)}_{n k + \mathrm{digit}^{(n)}_k(q)} \Big]_{n \in \mathrm{bases}},
              \qquad q = \mathrm{quantize}(v) \in \{0, \dots, R - 1\}

    Digits run from the most significant one, K_n is the smallest K with n^K >= R. Every number owns a table
    X^(n) [n K_n, D] per base, all of them in one flat parameter.

    Numbers become codes by `quantize`, always from the raw value v, whatever transform the schema has:

    - "int": v rounded, cut to [0, R - 1]; R = the largest value of the training data + 1, not `resolution`.
    - "affine": floor((v - lo) / (hi - lo) * R), cut; lo, hi = the 0.1 % and 99.9 % quantiles of the training data.
    - "slog": the same on sign(v) ln(1 + |v| / s); s = 1 for whole numbers, else the median of |v|.
    - "quantile": floor(rank * R), rank in [0, 1] among the fitted quantiles, linear in the batch's value between two.
    - "round": (v - lo) / (hi - lo) * (R - 1) rounded, halves up, cut; for a range known beforehand.
    - "auto": "round" for a number with bounds; "int" for whole numbers >= 0 below `resolution`; else "slog" if hi - lo
      is more than ten times the interquartile range, else "affine".

    A range that is given (`low`, `high`; else the number's bounds) takes the place of the fitted one. Only
    "quantile" asks for statistics then; without any, "auto" with `low` and `high` is "affine", and s = 1. A number that
    is constant has code 0.

    Args:
        numbers: the numbers.
        dim: D.
        bases: numeral systems, each >= 2, all different.
        resolution: R, codes per number, in [2, 2^31].
        quantize: see above.
        low, high: raw values of the first and the last code; both or neither.
        combine: "fields": a vector per number and base, which is the paper's concatenation for an expert that flattens
            its fields; "sum": one vector per number, the bases added; "project": one per number, a linear layer
            without bias on the bases' concatenation.
        missing: NaN and infinities read a row of their own in every base ("row") or give the zero vector ("zero").

    Raises:
        ValueError: no numbers, bases, sizes or a range that cannot work, an unknown name.

    Source: arXiv 2403.00793 (KDD 2024), feature encoding; concatenation as in its second version and
    poster, the sum is its first version's. Default bases, quantization, the missing row, "project" and the
    initialization (every vector's elements start with variance 1 / D) are ours.
    """

    needs_statistics = True

    def __init__(
        self,
        numbers: Sequence[NumberField],
        dim: int,
        *,
        bases: Sequence[int] = (2, 3, 10),
        resolution: int = 1024,
        quantize: Kind = "auto",
        low: float | None = None,
        high: float | None = None,
        combine: Combine = "fields",
        missing: Missing = "row",
    ) -> None:
        super().__init__(numbers, dim)
        _check_sizes(numbers, dim, bases, resolution)
        _check_kinds(quantize=quantize, combine=combine, missing=missing)
        _check_range(low, high, quantize)
        self.quantizer = Quantizer(numbers, resolution=resolution, quantize=quantize, low=low, high=high)
        self.bases, self.combine = tuple(bases), combine
        if combine == "fields" and len(bases) > 1:
            self.field_names = tuple(f"{number.name}_base{base}" for number in numbers for base in bases)
        has_row = missing == "row"
        tables: list[DigitTable] = []
        stds: list[float] = []
        in_a_vector = len(bases) if combine == "sum" else 1
        for i, levels in enumerate(self.quantizer.levels):
            for base in bases:
                table = DigitTable(i, base, num_digits(base, levels), first_row=len(stds))
                tables.append(table)
                stds += [(dim * table.num_digits * in_a_vector) ** -0.5] * table.num_digit_rows
                stds += [(dim * in_a_vector) ** -0.5] * has_row
        self.tables = tuple(tables)
        form = FoldedDigits if self.quantizer.missing_code <= MAX_FOLDED_LEVELS else DigitSums
        self.lookup = form(tables, in_a_vector, self.quantizer.missing_code, has_row)
        self.weight = nn.Parameter(torch.randn(len(stds), dim) * torch.tensor(stds).unsqueeze(1))
        if combine == "project":
            self.projection = nn.Linear(len(bases) * dim, dim, bias=False)
            nn.init.normal_(self.projection.weight, std=(len(bases) * dim) ** -0.5)

    def forward(self, numbers_BN: Tensor) -> Tensor:
        return self.embed(self.codes(numbers_BN))

    def codes(self, numbers_BN: Tensor) -> Tensor:
        """-> [B, N] int64; the same for all embedding sets whose options agree, so that it may be computed once."""
        return self.quantizer(numbers_BN)

    def embed(self, codes_BN: Tensor) -> Tensor:
        """-> [B, K, D]."""
        vectors_BKD = self.lookup(codes_BN, self.weight)
        if self.combine != "project":
            return vectors_BKD
        return self.projection(vectors_BKD.unflatten(1, (-1, len(self.bases))).flatten(2))

    @classmethod
    def missing_statistics(cls, numbers: Sequence[NumberField], options: Mapping[str, object]) -> tuple[str, ...]:
        quantize = options.get("quantize", "auto")
        known = options.get("low") is not None or (quantize == "int" and "resolution" in options)
        return tuple(
            n.name
            for n in numbers
            if n.statistics is None and (quantize == "quantile" or not (known or n.bounds is not None))
        )


def _check_sizes(numbers: Sequence[NumberField], dim: int, bases: Sequence[int], resolution: int) -> None:
    if not numbers:
        raise ValueError("mnse: needs at least one number")
    if dim < 1:
        raise ValueError(f"mnse: the set's width must be >= 1, got {dim}")
    if not bases or min(bases) < 2 or len(set(bases)) < len(bases):
        raise ValueError(f"mnse: bases must be different whole numbers >= 2, got {list(bases)}")
    if not 2 <= resolution <= MAX_LEVELS:
        raise ValueError(f"mnse: resolution must be in [2, 2^31], got {resolution}")


def _check_kinds(**given: str) -> None:
    allowed = {"quantize": Kind, "combine": Combine, "missing": Missing}
    for name, value in given.items():
        if value not in get_args(allowed[name]):
            raise ValueError(f"mnse: {name} must be one of {', '.join(get_args(allowed[name]))}, got {value!r}")


def _check_range(low: float | None, high: float | None, quantize: Kind) -> None:
    if (low is None) != (high is None):
        raise ValueError(f"mnse: give both low and high, or neither; got low {low} and high {high}")
    if low is not None and high is not None:
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"mnse: low must be below high, both finite; got low {low} and high {high}")
        if quantize == "quantile":
            raise ValueError("mnse: quantize: quantile reads the fitted quantiles; leave out low and high")
        if quantize == "int" and low != 0:
            raise ValueError(f"mnse: quantize: int has code 0 for the number 0; give low: 0 or another kind, got {low}")
