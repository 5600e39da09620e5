"""Parquet with a row per logged choice -> what another policy would have earned. Read as a stream, any size."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hmoe_rec import io
from hmoe_rec.explore.off_policy import OffPolicySums
from hmoe_rec.suggest import unknown
from hmoe_rec.types import DataError, SchemaError

ROWS = 1 << 17


@dataclass(frozen=True)
class Columns:
    """Names of columns.

    Attributes:
        reward: number.
        propensity: probability with which the logging policy showed what it showed, in (0, 1].
        target: probability with which the other policy would have shown the same, in [0, 1]; or None and
        action, target_action: what was shown and what a deterministic other policy would have shown.
        shown_value, target_value: a model's value of what was shown, and of what the other policy would show on
            average; both for DR, or none.
    """

    reward: str
    propensity: str
    target: str | None = None
    action: str | None = None
    target_action: str | None = None
    shown_value: str | None = None
    target_value: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in vars(self).values() if name is not None]


def evaluate_log(files: Sequence[str], columns: Columns, *, clip: float | None = None) -> OffPolicySums:
    """
    Args:
        files: Parquet files, paths or URIs.

    Raises:
        SchemaError: a column that is missing, or not a number.
        DataError: a file that is missing or damaged, or a value out of its range, with its file and row.
    """
    sums = OffPolicySums(clip=clip)
    for file in files:
        row = 0
        for batch in _batches(file, columns.names):
            sums.add(**_checked(batch, columns, file, row))
            row += batch.num_rows
    if not sums.sums["n"]:
        raise DataError(f"{', '.join(files)}: 0 rows; expected at least one logged choice")
    return sums


def _batches(file: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    try:
        with io.open(file, "rb") as stream:
            parquet = pq.ParquetFile(stream)
            missing = [name for name in names if name not in parquet.schema_arrow.names]
            if missing:
                raise SchemaError(f"{file}: {unknown('column', missing[0], parquet.schema_arrow.names)}")
            yield from parquet.iter_batches(batch_size=ROWS, columns=list(dict.fromkeys(names)))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error})") from None


def _checked(batch: pa.RecordBatch, columns: Columns, file: str, first_row: int) -> Mapping[str, np.ndarray]:
    def number(name: str, low: float, high: float, expected: str) -> np.ndarray:
        array = batch.column(name)
        if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):
            raise SchemaError(f"{file}: column {name!r} is {array.type}; expected a number")
        values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
        wrong = ~((values >= low) & (values <= high))  # NaN and null too
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"{file}, row {first_row + at}, column {name}: got {array[at].as_py()!r}, expected {expected}"
            )
        return values

    finite, tiny = np.finfo(np.float64).max, np.finfo(np.float64).tiny
    found = {
        "reward": number(columns.reward, -finite, finite, "a finite number"),
        "propensity": number(columns.propensity, tiny, 1.0, "a probability in (0, 1]: the choice did happen"),
    }
    if columns.target is not None:
        found["target"] = number(columns.target, 0.0, 1.0, "a probability in [0, 1]")
    else:
        found["target"] = _same(batch, str(columns.action), str(columns.target_action), file)
    for name in ("shown_value", "target_value"):
        if (column := getattr(columns, name)) is not None:
            found[name] = number(column, -finite, finite, "a finite number")
    return found


def _same(batch: pa.RecordBatch, action: str, target_action: str, file: str) -> np.ndarray:
    """1.0 where both columns hold the same value, else 0.0; null is none."""
    one, other = batch.column(action), batch.column(target_action)
    try:
        same = pc.call_function("equal", [one, other])
    except pa.ArrowException as error:
        raise SchemaError(
            f"{file}: columns {action!r} ({one.type}) and {target_action!r} ({other.type}) cannot be compared "
            f"({error}); write both as integers or both as strings"
        ) from None
    return same.fill_null(False).cast(pa.float64()).to_numpy(zero_copy_only=False)
