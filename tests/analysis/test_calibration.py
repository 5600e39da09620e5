"""Reliability and slices: equal to sums over examples, added up over processes; and the report of a run."""

import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from gloo import run_ranks
from small_run import make_log, run_file

from hmoe_rec.analysis.calibration import ScoreSlices, _verdict, analyze_calibration, slicing_of, slicing_of_counts
from hmoe_rec.analysis.opening import opened
from hmoe_rec.analysis.report import write_section
from hmoe_rec.analysis.row_counts import id_counts
from hmoe_rec.config import resolve_config
from hmoe_rec.metrics.auc import exact_auc
from hmoe_rec.training.trainer import train
from hmoe_rec.types import ConfigError

T, G, ROWS = 2, 3, 5000


def examples():
    logits = torch.randn(ROWS, T) - 1
    labels = (torch.rand(ROWS, T) < logits.sigmoid()).float()
    labels[torch.rand(ROWS, T) < 0.1] = float("nan")
    return torch.randint(-1, G, (ROWS,)), logits, labels, torch.rand(ROWS).round(decimals=1)


def test_figures_are_those_of_the_examples():
    slices, logits, labels, weights = examples()
    found = ScoreSlices(G, T)
    for rows in torch.arange(ROWS).split(777):
        found.update(slices[rows], logits[rows], labels[rows], weights[rows])
    for group, t in ((0, 0), (2, 1), (None, 1)):
        known = ~labels[:, t].isnan() & (weights > 0) & (slices >= 0 if group is None else slices == group)
        z, y, w = logits[known, t].double(), labels[known, t].double(), weights[known].double()
        figures = found.figures(group, t)
        assert figures.examples == known.sum()
        mean = (w * y).sum() / w.sum()
        nats = -(y * torch.nn.functional.logsigmoid(z) + (1 - y) * torch.nn.functional.logsigmoid(-z))
        expected = [mean, (w * z.sigmoid()).sum() / w.sum(), (w * nats).sum() / w.sum()]
        got = [figures.label_mean, figures.prediction_mean, figures.logloss]
        np.testing.assert_allclose(got, expected, rtol=1e-9)
        assert figures.calibration == pytest.approx(figures.prediction_mean / figures.label_mean)
        assert figures.auc == pytest.approx(exact_auc(z, y, w), abs=1e-4)
        bins = found.bins(group, t, 7)
        assert sum(b.examples for b in bins) == pytest.approx(float(w.sum()))
        assert [b.prediction_mean for b in bins] == sorted(b.prediction_mean for b in bins)
        assert max(b.examples for b in bins) < 1.1 * float(w.sum()) / 7


def test_a_calibrated_model_is_seen_as_one_and_a_shifted_one_is_not():
    logits = torch.randn(40_000, 1)
    labels, weights, all_of_them = (torch.rand(40_000, 1) < logits.sigmoid()).float(), torch.ones(40_000), 0
    right, wrong = ScoreSlices(1, 1), ScoreSlices(1, 1)
    slices = torch.zeros(40_000, dtype=torch.int64)
    right.update(slices, logits, labels, weights)
    wrong.update(slices, logits + 0.5, labels, weights)
    calm, loud = right.figures(all_of_them, 0), wrong.figures(all_of_them, 0)
    assert abs(calm.prediction_mean - calm.label_mean) < calm.error and loud.calibration > 1.15
    assert right.expected_calibration_error(0, 0) < 0.015 < 0.08 < wrong.expected_calibration_error(0, 0)


def test_nothing_and_one_class():
    empty = ScoreSlices(2, 1)
    empty.update(torch.tensor([0]), torch.zeros(1, 1), torch.tensor([[float("nan")]]), torch.ones(1))
    assert empty.bins(None, 0) == [] and empty.figures(0, 0).examples == 0
    assert _verdict(empty.figures(0, 0)) == "no label"
    empty.update(torch.tensor([1]), torch.zeros(1, 1), torch.tensor([[0.0]]), torch.ones(1))
    broken = ScoreSlices(1, 1)
    broken.update(
        torch.zeros(3, dtype=torch.int64), torch.tensor([[0.0], [np.nan], [1]]), torch.eye(3)[:, :1], torch.ones(3)
    )
    assert np.isnan([broken.figures(0, 0).auc, broken.figures(0, 0).logloss]).all()
    one = empty.figures(1, 0)
    assert np.isnan(one.calibration) and np.isnan(one.auc) and one.logloss == pytest.approx(np.log(2))


def test_slices_by_value_and_by_quantile():
    few = slicing_of("day", [3, 1, 1, None, 3], 4)
    assert few.names == ("1", "3", "other or missing") and few.of([1, 3, 9, None]).tolist() == [0, 1, 2, 2]
    words = slicing_of("city", ["a"] * 5 + ["b"] * 3 + ["c"], 2)
    assert words.names == ("a", "b", "other or missing") and words.of(["c", "b"]).tolist() == [2, 1]
    many = slicing_of("price", list(np.linspace(0, 10, 101)), 4)
    assert many.names[0] == "below 2.5" and many.names[-2:] == ("7.5 and more", "missing")
    assert many.of([-1.0, 2.5, 9.0, float("nan"), None]).tolist() == [0, 1, 3, 4, 4]
    days = slicing_of("day", [20220408 + i for i in range(22)], 4)  # of six digits they would all be 2.02204e+07
    ends = ("20220413.2", "20220418.5", "20220423.8")
    assert days.names == (f"below {ends[0]}", *(f"[{a}, {b})" for a, b in zip(ends, ends[1:], strict=False)),
                          f"{ends[2]} and more", "missing")  # fmt: skip
    assert slicing_of("price", [Decimal(i) / 4 for i in range(41)], 4).names[0] == "below 2.5"
    skewed = slicing_of("seconds", [0] * 90 + [1649348400000 + i for i in range(20)], 4)
    assert skewed.names == ("below 0", "0 and more", "missing")
    with pytest.raises(ConfigError, match="--by tags: holds lists"):
        slicing_of("tags", [None, [1, 2]])
    with pytest.raises(ConfigError, match="no value"):
        slicing_of("empty", [None, float("nan")])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    make_log(folder)
    train(resolve_config(run_file(folder, max_steps=4)))
    return folder / "run"


def analyzed(rank: int, world_size: int, run_dir: str) -> dict:
    with opened(run_dir) as run:
        found = analyze_calibration(run, run.uris(), by=["city", "price"], counts=["time"], frequency=["user_id"])
        return dict(found.numbers)


def test_report_of_a_run(run, tmp_path):
    with opened(str(run)) as open_run:
        found = analyze_calibration(open_run, open_run.uris(), by=["city", "price"])
        with pytest.raises(ValueError, match="nowhere"):
            analyze_calibration(open_run, open_run.uris(), by=["nowhere"])
    write_section(found, str(tmp_path))
    content = json.loads((tmp_path / "calibration.json").read_text())
    click = content["numbers"]["tasks"]["click"]
    assert click["examples"] == 300 and content["source"]["step"] == 4
    by_price = content["numbers"]["slices"]["price"]["click"]
    assert sum(s["examples"] for s in by_price.values()) == 300 and by_price["missing"]["examples"] > 5
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 3 and "Calibration" in page and "http" not in page.split("<main>")[1]


def test_counts_fall_into_the_same_slices_for_every_log():
    slicing = slicing_of_counts("shown")
    assert slicing.names[:5] == ("0", "1", "2 to 4", "5 to 9", "10 to 19")
    assert slicing.names[-3:] == ("1,000 to 9,999", "10,000 and more", "missing")
    given = [0, 1, 2, 4, 5, 9, 10, 10_000, 10**9, None]
    assert [slicing.names[i] for i in slicing.of(given)] == [
        *("0", "1", "2 to 4", "2 to 4", "5 to 9", "5 to 9", "10 to 19", "10,000 and more", "10,000 and more", "missing")
    ]


def test_slices_by_how_often_training_has_an_id(run, tmp_path, monkeypatch):
    """Training data of 150 rows, in which some users are rare or new; counts merged in small pieces."""
    monkeypatch.setattr("hmoe_rec.analysis.row_counts.PENDING", 10)
    folder = run.parent
    pq.write_table(pq.read_table(folder / "train.parquet").slice(0, 150), tmp_path / "short.parquet")
    monkeypatch.setattr("hmoe_rec.analysis.calibration.training_data", lambda *_: [str(tmp_path / "short.parquet")])
    train_ids = pq.read_table(tmp_path / "short.parquet")["user_id"].to_numpy()
    test = pq.read_table(folder / "test.parquet")
    uses = np.array([(train_ids == user).sum() for user in test["user_id"].to_numpy()])
    with opened(str(run)) as open_run:
        counts = id_counts(open_run.config, open_run.process, [str(tmp_path / "short.parquet")], ["user_id"])["user_id"]
        np.testing.assert_array_equal(counts.of(test["user_id"].to_numpy()), uses)
        found = analyze_calibration(open_run, open_run.uris(), frequency=["user_id"])
    slices = found.numbers["slices"]["frequency_of_user_id"]["click"]
    clicks = test["click"].to_numpy()
    groups = {"0": uses == 0, "1": uses == 1, "2 to 4": (uses > 1) & (uses < 5), "5 to 9": (uses > 4) & (uses < 10)}
    assert sum(rows.any() for rows in groups.values()) >= 3
    for name, rows in groups.items():
        assert slices.get(name, {"examples": 0})["examples"] == rows.sum()
        if rows.any():
            weights = test["weight"].to_numpy()[rows]
            assert slices[name]["label_mean"] == pytest.approx(np.average(clicks[rows], weights=weights), rel=1e-5)
    titles = [t.caption for t in found.tables]
    assert "click by rows of its user_id in training" in titles and "like by predicted rate" in titles


@pytest.mark.slow
def test_two_processes_find_the_same(run):
    alone, (first, second) = analyzed(0, 1, str(run)), run_ranks(2, analyzed, str(run))
    assert json.dumps(first) == json.dumps(second)

    def flat(value, path=""):
        if isinstance(value, dict):
            return {k: v for key, x in value.items() for k, v in flat(x, f"{path}/{key}").items()}
        if isinstance(value, list):
            return {k: v for i, x in enumerate(value) for k, v in flat(x, f"{path}/{i}").items()}
        return {path: value}

    one, two = flat(alone), flat(first)
    assert one.keys() == two.keys()
    np.testing.assert_allclose([*one.values()], [*two.values()], atol=2e-6)
