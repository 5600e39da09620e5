"""What a person and a JSON reader get to see."""

import io
import json
import math

from rich.console import Console

from hmoe_rec.metrics import json_safe, metrics_table

RESULTS = {
    "click": {"auc": 0.81234, "gauc": math.nan, "calibration": 1.0012, "examples": 1234567.0},
    "like": {"auc": math.nan, "gauc": math.nan, "calibration": math.nan, "examples": 0.0},
}


def printed(*args, **options) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(metrics_table(*args, **options))
    return console.export_text()


def row_of(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if name in line).split()


def test_table_shows_each_task_and_leaves_out_columns_without_values():
    text = printed(RESULTS, title="validation")
    assert row_of(text, "click") == ["click", "0.8123", "1.001", "1,234,567"]
    assert row_of(text, "like") == ["like", "-", "-", "0"]
    assert "validation" in text and "gauc" not in text


def test_references_stand_under_their_task():
    lines = printed(RESULTS, {"best possible": {"click": {"auc": 0.82}}}).splitlines()
    under_click = next(i for i, line in enumerate(lines) if "click" in line) + 1
    assert "best possible" in lines[under_click] and "0.8200" in lines[under_click]
    assert sum("best possible" in line for line in lines) == 1


def test_metrics_can_be_chosen():
    text = printed({"click": {"auc": 0.5, "auc_error_bound": 2.9e-6}}, columns=["auc_error_bound"])
    assert "3e-06" in text and "0.5000" not in text


def test_json_has_null_for_what_is_not_a_number():
    given = {"click": {"auc": math.nan, "ne": 0.5, "logloss": math.inf}, "list": [math.nan, 1, None, "x", (True,)]}
    safe = json_safe(given)
    assert safe == {"click": {"auc": None, "ne": 0.5, "logloss": None}, "list": [None, 1, None, "x", [True]]}
    assert json.loads(json.dumps(safe, allow_nan=False)) == safe
