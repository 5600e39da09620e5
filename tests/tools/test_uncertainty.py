"""Estimates judged where the truth is known: held-out items are new, figures by hand, files of a short run."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
import uncertainty


def test_figures_by_hand():
    """Six rows, two of them with new items; a 90 % interval is 1.645 std to each side."""
    logit, std = np.zeros(6), np.array([1.0, 1.0, 2.0, 0.5, 3.0, 1.5])
    true = np.array([1.6, 1.7, 0.0, 0.0, -5.0, 1.0])  # 5 > 1.645 x 3
    label = np.array([1.0, 0.0, np.nan, 1.0, 1.0, 0.0])
    new = np.array([False, False, False, False, True, True])
    found = uncertainty.figures(logit, std, true, label, new)
    at = int(np.argmin(np.abs(uncertainty.LEVELS - 0.9)))
    assert found["coverage_known"][at] == pytest.approx(3 / 4) and found["coverage_new"][at] == 0.5
    assert found["error_known"] == pytest.approx(math.sqrt((1.6**2 + 1.7**2) / 4))
    assert found["std_new"] == 2.25 and found["logloss_known"] == pytest.approx(math.log(2))
    nats = [0.5 * math.log(2 * math.pi * s * s) + 0.5 * (t / s) ** 2 for t, s in ((-5.0, 3.0), (1.0, 1.5))]
    assert found["nll_new"] == pytest.approx(sum(nats) / 2)
    assert found["new_auc"] == pytest.approx(7 / 8), "1.5 and 3 against 1, 1, 2, .5"


def test_a_stand_in_is_known_and_of_the_same_category():
    category = np.array([0, 0, 1, 1, 2])
    instead = uncertainty.stand_ins(category, np.array([1, 2]))
    assert instead.tolist() == [0, 0, 3, 3, 4]


@pytest.mark.slow
def test_a_short_run_writes_numbers_a_table_and_a_picture(tmp_path, capsys):
    kinds = "last layer,item rows x 100,ensemble"
    small = ["train.max_steps=2", "train.global_batch_size=64"]
    uncertainty.main(rows=2000, test_rows=600, seeds="1,2", kinds=kinds, out=tmp_path, overrides=small)
    assert (tmp_path / "uncertainty.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "uncertainty.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "uncertainty.json").read_text())["kinds"]
    assert [len(content[name]) for name in kinds.split(",")] == [2, 2, 1]
    assert content["item rows x 100"][0]["std_known"] > content["last layer"][0]["std_known"]
    log = tmp_path / "log-2000-600"
    train, test = (pq.read_table(log / f"{split}.parquet") for split in ("train", "test"))
    held_out = set(pq.read_table(log / "log" / "train.parquet")["item_id"].to_pylist()) - set(
        train["item_id"].to_pylist()
    )
    assert len(held_out) > 20 and held_out & set(test["item_id"].to_pylist())
    assert not held_out & {item for items in train["hist_item_id"].to_pylist() for item in items or []}
    assert len(list((tmp_path / "runs").iterdir())) == 2, "one run of each seed"


def test_what_is_refused(tmp_path):
    for options, message in (
        ({"kinds": "laplase"}, "kind 'laplase'; expected some of last layer"),
        ({"kinds": "ensemble", "seeds": "1"}, "two seeds or more"),
    ):
        with pytest.raises(typer.BadParameter, match=message):
            uncertainty.main(out=tmp_path, **options)
