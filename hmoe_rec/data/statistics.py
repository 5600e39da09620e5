"""Parquet files -> what they say of every number: `NumberStatistics`, and its plain form for YAML and JSON.

No torch: the numbers' columns are read one chunk at a time, and nothing but the sample is kept.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError

from hmoe_rec.data.columns import Place, _floats, _number, _plain_array
from hmoe_rec.data.hashing import GOLDEN, mix64
from hmoe_rec.data.schema import NumberColumn, Schema
from hmoe_rec.data.source import ParquetSource, TableReader
from hmoe_rec.data.strict import Part, render_problem
from hmoe_rec.suggest import unknown
from hmoe_rec.types import ConfigError, NumberStatistics, SchemaError

NUM_QUANTILES = 257  # at 0, 1/256, ..., 1: the edges of 2, 4, ... 256 equally full bins are among them
LOW, HIGH = 0.001, 0.999
MIN_OCCURRENCES = 10
LEAST_BIN, GREATEST_BIN = -(1 << 16), 1 << 13  # log-square bins that are counted; raw values from -65,534 to e^90
DIGITS = 7

Progress = Callable[[int, int], None]


def fit_statistics(
    uris: str | Sequence[str],
    schema: Schema,
    *,
    names: Iterable[str] | None = None,
    max_values: int = 2_000_000,
    progress: Progress | None = None,
) -> dict[str, NumberStatistics]:
    """One pass over the numbers of training files.

    Counts, extremes, `integral` and log-square bins are exact. Quantiles are exact for a number with at most
    `max_values` values; of more, a uniform sample of that size gives them: the values in the rows whose position
    (counted over all files) hashes lowest, so the same files in the same order always give the same. Quantiles are
    rounded to 7 digits. A number without any value has count 0, and 0 wherever a value belongs.

    Args:
        uris: files, directories or patterns, local or remote.
        names: numbers to fit; all of the schema where not given.
        max_values: values kept of each number, about 20 bytes each.
        progress: is called with the rows done and all rows after every chunk.

    Raises:
        ConfigError: max_values < 1.
        DataError: no such file, a damaged one, or a value that no batch may hold, such as an infinite one.
        SchemaError: an unknown name, or a column that is missing or of a type that does not fit.
    """
    if max_values < 1:
        raise ConfigError(f"max_values: expected at least 1, got {max_values}")
    numbers = _chosen(schema, names)
    if not numbers:
        return {}
    columns = list(dict.fromkeys(n.source for n in numbers))
    source = ParquetSource(uris, schema, columns=columns)
    counts = {n.name: _Counts(max_values) for n in numbers}
    done = 0
    with TableReader(source, columns) as tables:
        for chunk in (chunk for group in source.row_groups for chunk in source.chunks(group)):
            table = tables.plan(chunk, lane=0)()
            place = Place(source.files[chunk.group.file], chunk.group.index, chunk.first_row)
            hashes = _hashes(done, chunk.num_rows)
            for number in numbers:
                counts[number.name].add(_raw(table.column(number.source), number, place), hashes)
            done += chunk.num_rows
            if progress:
                progress(done, source.num_rows)
    return {name: counted.statistics() for name, counted in counts.items()}


def log_square_bins(raw: np.ndarray) -> np.ndarray:
    """floor((ln v)^2) for v > 2, else floor(v - 2) (arXiv 2310.04400, preprocessing), as float64."""
    return np.floor(np.where(raw > 2, np.log(np.maximum(raw, 2)) ** 2, raw - 2))


def to_dict(statistics: Mapping[str, NumberStatistics]) -> dict[str, dict[str, Any]]:
    """Plain dicts and lists; `from_dict` reads them back to equal statistics."""
    return {
        name: {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(found).items()}
        for name, found in statistics.items()
    }


def from_dict(given: Mapping[str, Any], *, where: str = "statistics") -> dict[str, NumberStatistics]:
    """What `to_dict` gave, perhaps by way of a file.

    Args:
        where: what the messages call the source.

    Raises:
        SchemaError: with every problem: a key that is missing or unknown, a value that cannot be.
    """
    if not isinstance(given, Mapping):
        raise SchemaError(f"{where}: expected a mapping with a number's name per key; got {type(given).__name__}")
    found, problems = {}, []
    for name, one in given.items():
        if not isinstance(one, Mapping):
            problems.append(
                f"{name}: expected a mapping with {', '.join(_Written.model_fields)}, got a {type(one).__name__}"
            )
            continue
        try:
            found[str(name)] = NumberStatistics(**_Written.model_validate(one).model_dump())
        except ValidationError as invalid:
            problems += [render_problem({**e, "loc": (name, *e["loc"])}) for e in invalid.errors()]
    if problems:
        remedy = "correct it, or fit the statistics again"
        raise SchemaError("\n  ".join([f"{where}: {len(problems)} problem(s); {remedy}", *problems]))
    return found


class _Written(Part):
    """A `NumberStatistics` as it stands in a file."""

    count: int = Field(ge=0)
    missing: int = Field(ge=0)
    minimum: float
    maximum: float
    low: float
    high: float
    integral: bool
    quantiles: tuple[float, ...] = Field(min_length=2)
    log_square_bins: tuple[int, ...] = ()

    @classmethod
    def _cross_problems(cls, given):
        for low, high in (("minimum", "maximum"), ("low", "high")):
            if (pair := _numbers([given.get(low), given.get(high)])) and pair[0] > pair[1]:
                yield (low,), f"expected at most {high} ({pair[1]})", pair[0]
        quantiles, bins = _numbers(given.get("quantiles")), _numbers(given.get("log_square_bins"))
        for i in range(1, len(quantiles)):
            if quantiles[i] < quantiles[i - 1]:
                yield ("quantiles", i), f"expected at least the one before ({quantiles[i - 1]})", quantiles[i]
        for i in range(1, len(bins)):
            if bins[i] <= bins[i - 1]:
                yield ("log_square_bins", i), f"expected more than the one before ({bins[i - 1]})", bins[i]


def _numbers(given: Any) -> list[float]:
    """The list, if it is one and holds nothing but numbers; else no numbers: what is wrong is reported elsewhere."""
    right = isinstance(given, list | tuple) and all(isinstance(x, int | float) for x in given)
    return list(given) if right else []


class _Counts:
    """What is known of one number so far."""

    def __init__(self, max_values: int) -> None:
        self._rows = self._count = 0
        self._minimum, self._maximum, self._integral = np.inf, -np.inf, True
        self._bins = np.zeros(GREATEST_BIN - LEAST_BIN + 1, np.int64)
        self._sample = _Sample(max_values)

    def add(self, raw: np.ndarray, hashes: np.ndarray) -> None:
        """Values, NaN where missing, and the hashes of their rows."""
        self._rows += len(raw)
        valid = ~np.isnan(raw)
        if not valid.all():
            raw, hashes = raw[valid], hashes[valid]
        if not len(raw):
            return
        self._count += len(raw)
        self._minimum, self._maximum = min(self._minimum, raw.min()), max(self._maximum, raw.max())
        self._integral = self._integral and bool((raw == np.floor(raw)).all())
        bins = log_square_bins(raw)
        bins = bins[(bins >= LEAST_BIN) & (bins <= GREATEST_BIN)].astype(np.int64) - LEAST_BIN
        self._bins += np.bincount(bins, minlength=len(self._bins))
        self._sample.add(raw, hashes)

    def statistics(self) -> NumberStatistics:
        missing = self._rows - self._count
        if not self._count:
            return NumberStatistics(0, missing, 0.0, 0.0, 0.0, 0.0, False, (0.0,) * NUM_QUANTILES)
        minimum, maximum = float(self._minimum), float(self._maximum)
        wanted = np.concatenate([np.linspace(0.0, 1.0, NUM_QUANTILES), [LOW, HIGH]])
        found = [_rounded(q, maximum - minimum) for q in np.quantile(self._sample.values(), wanted).tolist()]
        *quantiles, low, high = [min(max(q, minimum), maximum) for q in found]
        quantiles[0], quantiles[-1] = minimum, maximum  # the sample may lack them
        bins = np.flatnonzero(self._bins >= MIN_OCCURRENCES) + LEAST_BIN
        return NumberStatistics(
            self._count, missing, minimum, maximum, low, high, self._integral, tuple(quantiles), tuple(bins.tolist())
        )


class _Sample:
    """The values with the smallest hashes, at most `size` of them."""

    def __init__(self, size: int) -> None:
        self._size, self._limit = size, np.iinfo(np.uint64).max
        self._values, self._hashes = np.empty(0), np.empty(0, np.uint64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_waiting = 0

    def add(self, values: np.ndarray, hashes: np.ndarray) -> None:
        near = hashes <= self._limit
        self._waiting.append((values[near], hashes[near]))
        self._num_waiting += len(self._waiting[-1][0])
        if self._num_waiting > self._size // 4:  # rarely: each cut looks at all that is kept
            self._cut()

    def values(self) -> np.ndarray:
        self._cut()
        return self._values

    def _cut(self) -> None:
        self._values = np.concatenate([self._values, *(values for values, _ in self._waiting)])
        self._hashes = np.concatenate([self._hashes, *(hashes for _, hashes in self._waiting)])
        self._waiting, self._num_waiting = [], 0
        if len(self._values) > self._size:
            kept = np.argpartition(self._hashes, self._size - 1)[: self._size]
            self._values, self._hashes = self._values[kept], self._hashes[kept]
            self._limit = self._hashes.max()


def _chosen(schema: Schema, names: Iterable[str] | None) -> list[NumberColumn]:
    if names is None:
        return list(schema.numbers)
    by_name = {number.name: number for number in schema.numbers}
    wanted = list(dict.fromkeys([names] if isinstance(names, str) else names))
    problems = [unknown("number", name, by_name) for name in wanted if name not in by_name]
    if problems:
        raise SchemaError("; ".join(problems))
    return [by_name[name] for name in wanted]


def _raw(column: pa.ChunkedArray, number: NumberColumn, place: Place) -> np.ndarray:
    """float64 as they stand in the file, NaN where null; what no batch may hold is an error here too."""
    array = _plain_array(column)
    _number(array, number, place)
    return _floats(array)


def _hashes(first: int, count: int) -> np.ndarray:
    """The hash of each of `count` positions (SplitMix64, a bijection: no two are equal)."""
    return mix64(np.arange(first + 1, first + 1 + count, dtype=np.uint64) * GOLDEN)


def _rounded(x: float, span: float) -> float:
    """To 7 digits of the number or, where that is finer, of the span of all; whole numbers stay as they are."""
    size = min(abs(x), span)
    if x.is_integer() or size == 0.0:
        return x
    return round(x, DIGITS - 1 - math.floor(math.log10(size)))
