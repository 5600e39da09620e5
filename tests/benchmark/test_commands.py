"""The commands, in this one process: what they print and write, and mistakes that they tell."""

import json
from pathlib import Path

import pytest
import yaml
from small_run import run_file

from hmoe_rec import cli
from hmoe_rec.benchmark import calibrate as calibration
from hmoe_rec.benchmark import launch
from hmoe_rec.sharding.topology import cluster_of


@pytest.fixture
def here(tmp_path, monkeypatch):
    """-> runs the program with its processes replaced by this one; gives the exit code."""
    monkeypatch.setattr(launch, "run_processes", lambda size, function, arguments, device: function(**arguments))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_file(tmp_path, global_batch_size=40)))

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as end:
            cli.main(["bench", *(str(config) if a == "RUN" else a for a in arguments)])
        return int(end.value.code or 0)

    return run


def test_plans_are_measured(here, tmp_path, capsys):
    out, page = str(tmp_path / "bench.json"), str(tmp_path / "bench.html")
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "no.json").write_text("{}")
    plans = [
        "--plans",
        "table_wise, row_wise",
        "--plans",
        str(tmp_path / "plans"),
        "--zipf",
        "0.5",
        "--rounds",
        "2",
        "--steps",
        "2",
    ]
    assert here("plan", "RUN", "train.embedding_optimizer=sgd", *plans, "--json", out, "--html", page) == 0
    printed = capsys.readouterr().out
    assert "table_wise 9" in printed and "no: not built" in printed and "Spearman" in printed
    content = json.loads(Path(out).read_text())
    assert content["overrides"] == ["train.embedding_optimizer=sgd"] and content["world_size"] == 1
    assert content["settings"]["zipf"] == 0.5 and len(content["plans"]) == 3
    assert content["plans"][0]["ranks"][0]["memory"]["optimizer"] == 0  # sgd keeps nothing
    assert "table_wise" in Path(page).read_text()


def test_a_machine_is_measured(here, tmp_path, capsys, monkeypatch):
    small = {"rows": ((9, 300),), "loads": ((4, 1), (9, 2)), "sequence_loads": ((4, 1),)}
    settings = calibration.settings_of
    monkeypatch.setattr(calibration, "settings_of", lambda *x: calibration.replace(settings(*x), **small))
    out = str(tmp_path / "here.yaml")
    config = str(tmp_path / "run.yaml")
    assert here("calibrate", "--config", config, "--out", out, "--repeats", "1", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "Prices, fitted" in printed and "--topology" in printed
    cluster = cluster_of(out)
    assert cluster.name == "here" and cluster.prices is not None and cluster.prices.forward.call_ms >= 0
    assert "widths 8" in Path(out).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "RUN"], "which plans?"),
        (["plan", "RUN", "--plans", "auto", "--zipf", "1", "--data", "x.parquet"], "give one of them"),
        (
            ["plan", "RUN", "--plans", "auto", "--topology", "h100x8", "--zipf", "1"],
            "is for cuda, this job runs on cpu",
        ),
        (["plan", "RUN", "--plans", "auto"], "train.parquet"),
        (["calibrate", "--out", "here.json"], "ends with .yaml"),
        (["calibrate", "--device", "tpu"], "expected auto, cpu, cuda"),
    ],
)
def test_mistakes(here, capsys, arguments, message):
    assert here(*arguments) == 2
    assert message in capsys.readouterr().err
