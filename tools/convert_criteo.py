"""Criteo display advertising (Kaggle) -> train, validation, test Parquet, and the schema that fits them.

    python tools/convert_criteo.py dac/train.txt data/criteo

The file is read in blocks, three times (lines, statistics, rows), and never held in memory.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq
import typer
from converting import (
    MISSING,
    ROW_GROUP_ROWS,
    TRANSFORMS,
    Floats,
    Ints,
    floats,
    ints,
    matching,
    progress,
    reporting_errors,
    require_columns,
    say,
    split_writer,
    write_schema,
)

from hmoe_rec.types import DataError

NUMBERS = [f"I{i}" for i in range(1, 14)]
CATEGORIES = [f"C{i}" for i in range(1, 27)]
NAMES = ["label", *NUMBERS, *CATEGORIES]
BLOCK_BYTES = 1 << 24
SKETCH_BITS = 22
SMALLEST_BIN = -5  # the bin of -3, the smallest value that Criteo's counts have
COMMENT = """Criteo display advertising, one row per impression in time order; see tools/convert_criteo.py.
I*_bin are the log-square bins of the counts I*; C* are ids to be hashed."""


def log_square_bin(values: Floats) -> Ints:
    """Bin of a count, moved to start at 0; -1 where it is missing.

    v > 2 -> floor(ln(v)^2), else v - 2 (the Criteo challenge's winners; Guo et al., On the Embedding Collapse when
    Scaling up Recommendation Models, ICML 2024, arXiv 2310.04400, uses it too). Differs: values below -3 share the
    lowest bin.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        bins = np.where(values > 2, np.floor(np.log(np.maximum(values, 1)) ** 2), values - 2)
        known = np.maximum(bins, SMALLEST_BIN) - SMALLEST_BIN
    return np.where(np.isnan(values), MISSING, np.nan_to_num(known)).astype(np.int64)


def hex_ids(column: pa.Array, name: str, path: Path) -> pa.Array:
    """Criteo's texts of up to 8 hexadecimal digits -> the number they write, so below 2^32; "" and null are null."""
    column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    known = pc.drop_null(column)
    right = pc.match_substring_regex(known, "^[0-9a-f]{1,8}$")
    if len(known) and not pc.all(right).as_py():
        wrong = known.filter(pc.invert(right))[0].as_py()
        raise DataError(f"{path}: column {name} holds {wrong!r}, expected up to 8 hexadecimal digits")
    padded = pc.utf8_lpad(pc.fill_null(column, "0"), 8, "0")
    digits = np.array(padded.to_pylist() if len(padded) == 0 else padded.to_numpy(zero_copy_only=False), dtype="S8")
    letters = digits.view(np.uint8).reshape(len(digits), 8).astype(np.int64)
    nibbles = np.where(letters >= ord("a"), letters - ord("a") + 10, letters - ord("0"))
    values = nibbles @ (16 ** np.arange(7, -1, -1, dtype=np.int64))
    return pa.array(values, mask=column.is_null().to_numpy(zero_copy_only=False))


@dataclass(frozen=True)
class Source:
    """One file in either form."""

    path: Path
    is_parquet: bool

    @classmethod
    def find(cls, given: Path) -> "Source":
        """`given` itself, or the first of train.txt, train.txt.gz, train.parquet in it.

        Raises:
            DataError: there is none of them.
        """
        if given.is_file():
            return cls(given, given.suffix == ".parquet")
        for name in ("train.txt", "train.txt.gz", "train.parquet"):
            for path in matching(given, name):
                return cls(path, name.endswith(".parquet"))
        raise DataError(f"{given}: no train.txt or train.txt.gz (Kaggle's) and no train.parquet (the Parquet form)")

    def num_rows(self) -> int:
        if self.is_parquet:
            return self._parquet().metadata.num_rows
        count, last = 0, b"\n"
        with pa.input_stream(str(self.path), buffer_size=BLOCK_BYTES) as stream:
            while block := stream.read(BLOCK_BYTES):
                count, last = count + block.count(b"\n"), block[-1:]
        return count + (last != b"\n")

    def blocks(self) -> Iterator[pa.Table]:
        """Tables with label, I1..I13 (float64) and C1..C26 (int64), in the file's order.

        Raises:
            DataError: a line, a column or a value is not as Criteo writes them.
        """
        try:
            for batch in self._parquet().iter_batches(1 << 16, columns=NAMES) if self.is_parquet else self._lines():
                yield self._typed(batch)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: not Criteo's form, which is label, I1..I13, C1..C26: {error}") from error

    def _parquet(self) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(self.path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: not a readable Parquet file ({error}); copy it again") from error
        require_columns(file.schema_arrow.names, NAMES, self.path)
        return file

    def _lines(self) -> Iterator[pa.RecordBatch]:
        types = {"label": pa.int8()} | dict.fromkeys(NUMBERS, pa.float64()) | dict.fromkeys(CATEGORIES, pa.string())
        yield from csv.open_csv(
            self.path,
            read_options=csv.ReadOptions(column_names=NAMES, block_size=BLOCK_BYTES),
            parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=csv.ConvertOptions(column_types=types),
        )

    def _typed(self, batch: pa.RecordBatch) -> pa.Table:
        columns = {"label": ints(batch["label"], "label", self.path)}
        if not np.isin(columns["label"], (0, 1)).all():
            raise DataError(f"{self.path}: column label holds {set(columns['label']) - {0, 1}}; expected 0 or 1")
        columns |= {name: pc.cast(batch[name], pa.float64()) for name in NUMBERS}
        for name in CATEGORIES:
            text = pa.types.is_string(batch[name].type) or pa.types.is_large_string(batch[name].type)
            columns[name] = (
                hex_ids(pc.cast(batch[name], pa.string()), name, self.path)
                if text
                else pc.cast(batch[name], pa.int64())
            )
        return pa.table(columns)


@dataclass
class Statistics:
    """What the schema needs of the training rows, gathered block by block in bounded memory."""

    count: Ints = field(default_factory=lambda: np.zeros(13, np.int64))
    total: Floats = field(default_factory=lambda: np.zeros(13))
    squares: Floats = field(default_factory=lambda: np.zeros(13))
    largest_bin: Ints = field(default_factory=lambda: np.zeros(13, np.int64))
    seen: np.ndarray = field(default_factory=lambda: np.zeros((26, 1 << SKETCH_BITS), bool))

    def add(self, table: pa.Table) -> None:
        for i, name in enumerate(NUMBERS):
            values = floats(table[name])
            x = TRANSFORMS["slog"](values[~np.isnan(values)])
            self.count[i] += len(x)
            self.total[i] += x.sum()
            self.squares[i] += np.square(x).sum()
            self.largest_bin[i] = max(self.largest_bin[i], log_square_bin(values).max(initial=0))
        for i, name in enumerate(CATEGORIES):
            ids = pc.drop_null(table[name]).to_numpy().astype(np.uint64)
            self.seen[i, (ids * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - SKETCH_BITS)] = True

    def distinct(self) -> Ints:
        """Distinct ids of each category by linear counting, about 0.1 % exact up to a few million."""
        size = self.seen.shape[1]
        empty = np.maximum(size - self.seen.sum(1), 1)
        return np.rint(-size * np.log(empty / size)).astype(np.int64)

    def numbers(self) -> list[dict[str, Any]]:
        mean = self.total / np.maximum(self.count, 1)
        std = np.sqrt(np.maximum(self.squares / np.maximum(self.count, 1) - mean**2, 0))
        return [
            {"name": name, "transform": "slog", "mean": float(f"{m:.6g}"), "std": float(f"{s or 1.0:.6g}")}
            for name, m, s in zip(NUMBERS, mean, std, strict=True)
        ]


def schema_of(statistics: Statistics, max_buckets: int) -> dict[str, Any]:
    """Twice as many buckets as ids, so that few collide; at least 1000, at most `max_buckets`."""
    buckets = np.clip(2 * statistics.distinct(), 1000, max_buckets)
    ids = [
        {"name": n, "num_embeddings": int(b), "mode": "hash", "missing": "own_row"}
        for n, b in zip(CATEGORIES, buckets, strict=True)
    ]
    ids += [
        {"name": f"{n}_bin", "num_embeddings": int(b) + 1, "missing": "own_row"}
        for n, b in zip(NUMBERS, statistics.largest_bin, strict=True)
    ]
    tasks = [{"name": "click", "label": "label"}]
    return {"ids": ids, "numbers": statistics.numbers(), "tasks": tasks, "keys": ["row"]}


def with_bins(table: pa.Table, first_row: int, largest_bin: Ints) -> pa.Table:
    """The table as it is written: with `row`, float32 counts, and bins that stay within those seen in training."""
    columns: dict[str, Any] = {"row": np.arange(first_row, first_row + table.num_rows)}
    columns["label"] = pc.cast(table["label"], pa.int8())
    columns |= {name: pc.cast(table[name], pa.float32()) for name in NUMBERS}
    for name, largest in zip(NUMBERS, largest_bin, strict=True):
        bins = np.minimum(log_square_bin(floats(table[name])), largest)
        columns[f"{name}_bin"] = pa.array(bins.astype(np.int32), mask=bins == MISSING)
    return pa.table(columns | {name: table[name] for name in CATEGORIES})


def convert(source: Path, out: Path, shares: tuple[float, float], max_buckets: int, row_group_rows: int) -> None:
    file = Source.find(source)
    num_rows = file.num_rows()
    train_stop, validation_stop = round(num_rows * shares[0]), round(num_rows * (shares[0] + shares[1]))
    stops = [0, train_stop, validation_stop, num_rows]
    bounds = dict(zip(("train", "validation", "test"), zip(stops, stops[1:], strict=False), strict=True))
    say(f"{file.path.name}: {num_rows:,} rows; " + ", ".join(f"{n} {b - a:,}" for n, (a, b) in bounds.items()))
    statistics, row = Statistics(), 0
    with progress("statistics", train_stop) as advance:
        for table in file.blocks():
            statistics.add(table.slice(0, max(0, train_stop - row)))
            row += table.num_rows
            advance(table.num_rows)
            if row >= train_stop:
                break
    clicks = dict.fromkeys(bounds, 0)
    row = 0
    with ExitStack() as stack:
        writers = {n: stack.enter_context(split_writer(out / f"{n}.parquet", row_group_rows)) for n in bounds}
        advance = stack.enter_context(progress("train, validation, test", num_rows))
        for table in file.blocks():
            table = with_bins(table, row, statistics.largest_bin)
            for name, (start, stop) in bounds.items():
                first, last = max(start - row, 0), min(stop - row, table.num_rows)
                if first < last:
                    part = table.slice(first, last - first)
                    clicks[name] += pc.sum(part["label"]).as_py()
                    writers[name](part)
            row += table.num_rows
            advance(table.num_rows)
    for name, (start, stop) in bounds.items():
        say(f"{name}: {stop - start:,} rows; click {clicks[name] / (stop - start):.4f}")
    write_schema(out / "schema.yaml", schema_of(statistics, max_buckets), COMMENT)


app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="Kaggle's train.txt(.gz), a Parquet file, or a folder with one.")],
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    train_share: Annotated[float, typer.Option(min=0.01, max=0.98, help="First part of the rows.")] = 0.7,
    validation_share: Annotated[float, typer.Option(min=0.001, max=0.9, help="After it; the rest is test.")] = 0.1,
    max_buckets: Annotated[int, typer.Option(min=1000, help="Most hash buckets of one category.")] = 1_000_000,
    row_group_rows: Annotated[int, typer.Option(min=1, help="Rows of one Parquet row group.")] = ROW_GROUP_ROWS,
) -> None:
    """Criteo's impressions to OUT/{train,validation,test}.parquet and OUT/schema.yaml, split by time order.

    Counts I1..I13 come as numbers and as ids of log-square bins, missing ones as null. Categories C1..C26 are hashed by
    the model: hexadecimal texts become the 32-bit number they write; the Parquet form holds 20-bit numbers, a one-way
    hash of column and text, and keeps them. So the two forms have other ids for the same impressions: they tell the
    same values apart (but for the few that 20 bits merge), and a model of one form does not fit the other's files. With
    45 million rows give --row-group-rows 65536.
    """
    with reporting_errors():
        if train_share + validation_share >= 1:
            raise DataError(
                f"--train-share {train_share} and --validation-share {validation_share} leave "
                "no test rows; their sum must be below 1"
            )
        convert(source, out, (train_share, validation_share), max_buckets, row_group_rows)


if __name__ == "__main__":
    app()
