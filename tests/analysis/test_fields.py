"""Mutual information of fields and labels: exact cases, independence, and what is planted in a log."""

import json

import numpy as np
import pytest
import torch
from gloo import run_ranks
from small_run import make_log, run_file

from hmoe_rec.analysis.fields import (
    FieldBins,
    FieldCounts,
    bins_of,
    conditional_information,
    count_fields,
    entropy,
    fields_section,
    information,
)
from hmoe_rec.analysis.report import write_section
from hmoe_rec.config import resolve_config
from hmoe_rec.sharding.process import process_group
from hmoe_rec.types import ConfigError


def test_exact_cases():
    assert entropy(torch.tensor([1.0, 1, 2])) == pytest.approx(1.5)
    assert entropy(torch.zeros(3)) == entropy(torch.zeros(3, dtype=torch.float64)) == 0
    assert information(1e6 * torch.eye(4)) == pytest.approx(2, abs=1e-4)
    assert information(torch.outer(torch.tensor([1e5, 2e5]), torch.tensor([1.0, 3]))) == pytest.approx(0, abs=1e-5)
    copy = torch.zeros(2, 2, 2)  # x = z, y = x: nothing is left of x beside z
    copy[0, 0, 0] = copy[1, 1, 1] = 1e6
    assert conditional_information(copy) == pytest.approx(0, abs=1e-6) and information(copy.sum(1)) == pytest.approx(
        1, abs=1e-4
    )
    xor = 1e5 * torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]])  # y = x xor z: all of it beside z only
    assert information(xor.sum(1)) == pytest.approx(0, abs=1e-5) and conditional_information(xor) == pytest.approx(
        1, abs=1e-3
    )


def test_the_bias_of_noise_is_taken_off():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        xzy = rng.integers(0, 12, 1200) * 6 + rng.integers(0, 3, 1200) * 2 + rng.integers(0, 2, 1200)
        joint_XZY = torch.from_numpy(np.bincount(xzy, minlength=72).reshape(12, 3, 2)).double()
        found.append((information(joint_XZY.sum(1)), conditional_information(joint_XZY)))
    for bits in np.array(found).T:  # uncorrected: 11 / (2 * 1200 ln 2) = .007 bits, and three times that
        error = bits.std(ddof=1) / len(bits) ** 0.5
        assert abs(bits.mean()) < 3 * error + 4e-4, "what is left is of the second order"
        assert bits.clip(0).mean() > 3 * error + 4e-4, "raised to 0, it would not be the noise's mean"


def test_values_become_bins():
    ids = FieldBins("item", ids=np.array([3, 5, 9]))
    there = np.array([True, True, True, False])
    assert ids.of(np.array([9, 4, 3, 0]), there).tolist() == [4, 1, 2, 0] and ids.size == 5
    number = FieldBins("price", edges=np.array([1.0, 2.0]))
    assert number.of(np.array([0.5, 1.0, 7, 0]), there).tolist() == [1, 2, 3, 0] and number.size == 4
    sample = [{"item": (np.arange(100) // 2, np.ones(100, bool)), "price": (np.arange(100.0), np.ones(100, bool))}]
    made = bins_of(sample, ["price"])
    assert [b.size for b in made] == [48, 47] and made[0].ids[0] == 0


def test_counts_are_those_of_the_examples():
    rng = np.random.default_rng(0)
    bins, labels = rng.integers(0, 3, (50, 2)), rng.integers(0, 2, (50, 2)).astype(float)
    labels[:7, 1] = np.nan
    counts = FieldCounts([3, 4], 2)
    counts.update(bins[:20], labels[:20])
    counts.update(bins[20:], labels[20:])
    for t in (0, 1):
        chosen = (bins[:, 0] == 2) & (bins[:, 1] == 1) & (labels[:, t] == 1)
        assert counts.of(0, 1, t)[2, 1, 1] == chosen.sum() == counts.of(1, 0, t)[1, 2, 1]
    assert counts.of(0, 0, 1).sum() == 43


def counted(rank: int, world_size: int, given: dict) -> str:
    config = resolve_config(given)
    with process_group() as process:
        found = fields_section(*count_fields(config, process, [given["data"]["train"]]), config.tasks, {})
    return json.dumps(found.numbers)


def test_planted_fields_are_found_and_noise_is_not(tmp_path):
    """Labels depend on user and item; city, price and the history are noise."""
    make_log(tmp_path, rows=6600)
    given = run_file(tmp_path)
    config = resolve_config(given)
    with process_group() as process:
        section = fields_section(*count_fields(config, process, [given["data"]["train"]]), config.tasks, {})
    bits = {name: x["bits"] for name, x in section.numbers["tasks"]["click"].items()}
    assert min(bits["user_id"], bits["item_id"]) > 0.03 > 0.01 > max(bits[n] for n in ("city", "price", "hist_item_id"))
    write_section(section, str(tmp_path / "out"))
    assert "lower bound" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_find_the_same(tmp_path):
    make_log(tmp_path)
    given = run_file(tmp_path)
    first, second = run_ranks(2, counted, given)
    assert first == second == counted(0, 1, given)


def test_too_many_fields(tmp_path, monkeypatch):
    make_log(tmp_path, rows=2400)
    given = run_file(tmp_path)
    monkeypatch.setattr("hmoe_rec.analysis.fields.MAX_FIELDS", 3)
    with process_group() as process, pytest.raises(ConfigError, match="5 fields are 10 pairs"):
        count_fields(resolve_config(given), process, [given["data"]["train"]])
