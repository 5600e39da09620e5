"""The study of sampling and exposures: its tables say what the parts do."""

import re

import pytest
import yaml
from reproduce import sampled_rows
from small_run import make_log, run_file
from typer.testing import CliRunner


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(sampled_rows.app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_exposures_without_and_with_weights():
    text = printed("exposures", "--rows", "400000", "--seeds", "1")
    error = {name: float(x) for name, x in re.findall(r"│ (none|planted|estimated) +│[^│]+│ ([\d.]+)% ", text)}
    assert error["none"] > 40 and error["planted"] < 12 and error["estimated"] < 12


def test_reading_counts_rows_of_every_rate(tmp_path):
    make_log(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_file(tmp_path)))
    text = printed("reading", str(tmp_path / "run.yaml"), "--rates", "1,0.2", "--tasks", "click", "--turns", "1")
    assert re.search(r"│ 1 +│ all", text) and re.search(r"│ 0.2 +│ \d\d\.\d%", text) and "counting beforehand" in text


@pytest.mark.slow
def test_calibration_of_every_correction():
    text = printed("calibration", "--rows", "24000", "--epochs", "2")
    assert re.search(r"all rows +│ +24,000", text) and re.search(r"logit +│ +1\d,\d{3}", text) and "weights" in text
