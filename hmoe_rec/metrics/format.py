"""{task: {metric: value}} -> a table for the console, or values that JSON can hold."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

Results = Mapping[str, Mapping[str, float]]

COLUMNS = ("auc", "gauc", "logloss", "ne", "calibration", "label_mean", "examples")
# Short, so that a table fits into 80 columns.
HEADERS = {"calibration": "calib.", "label_mean": "labels", "prediction_mean": "predicted", "gauc_users": "users"}
FORMATS: dict[str, Callable[[float], str]] = {
    "auc_error_bound": "{:.0e}".format,
    "gauc_users": "{:,.0f}".format,
    "calibration": "{:.3f}".format,
    "examples": "{:,.0f}".format,
}


def metrics_table(
    results: Results,
    references: Mapping[str, Results] | None = None,
    *,
    columns: Sequence[str] = COLUMNS,
    title: str | None = None,
) -> Table:
    """A row per task, under it a dim row per reference that knows the task.

    Args:
        results: what `TaskMetrics.compute` gave. Columns that no row has a value for are left out.
        references: name -> results to compare with, such as {"best possible": {"click": {"auc": 0.81}}}; any metrics.
        columns: metrics to show, in this order.
        title: a line above the table.
    """
    references = references or {}
    rows = [
        (name, style, results_of[task])
        for task in results
        for name, style, results_of in (
            (task, None, results),
            *((f"  {name}", "dim", reference) for name, reference in references.items()),
        )
        if task in results_of
    ]
    columns = [c for c in columns if any(not math.isnan(_value(row, c)) for _, _, row in rows)]
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("task", no_wrap=True)
    for column in columns:
        table.add_column(HEADERS.get(column, column.replace("_", " ")), justify="right")
    for name, style, row in rows:
        table.add_row(name, *(_cell(c, _value(row, c)) for c in columns), style=style)
    return table


def json_safe(value: Any) -> Any:
    """Nested dicts and lists -> the same with null for nan and the infinities, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _value(row: Mapping[str, float], column: str) -> float:
    value = row.get(column)
    return math.nan if value is None else value


def _cell(column: str, value: float) -> str:
    return "-" if math.isnan(value) else FORMATS.get(column, "{:.4f}".format)(value)
