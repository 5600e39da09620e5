"""The scripts on losses: the synthetic gradients, logs with rarer positives, the cost of each technique."""

import json
from pathlib import Path
from statistics import mean

import compare
import numpy as np
import pyarrow.parquet as pq
import pytest
import ranking_gradients
import sparse_positives
import techniques as bench
import yaml
from small_run import make_log, run_file

from hmoe_rec.config import load_config


class TestGradients:
    """N 4096, 1049 positives, beta .1, alpha .5; the values are those of the closed form, within 15 %."""

    @pytest.mark.parametrize(
        ("kind", "expected"), [(None, 7.4e-6), ("pair", 4.8e-5), ("list", 1.5e-4), ("rcr", 1.4e-4)]
    )
    def test_on_negatives(self, kind, expected):
        batches = [ranking_gradients.draw(seed) for seed in (1, 2, 3)]
        found = [ranking_gradients.on_negatives(batch, kind, beta=0.1, alpha=0.5) for batch in batches]
        assert mean(found) == pytest.approx(expected, rel=0.15)
        by_hand = [ranking_gradients.by_hand(batch, kind, beta=0.1, alpha=0.5) for batch in batches]
        assert found == pytest.approx(by_hand, rel=1e-6)

    def test_order_and_table(self, tmp_path, capsys):
        ranking_gradients.main(seeds="1", picture=tmp_path / "gradients.png")
        assert "list" in capsys.readouterr().out and (tmp_path / "gradients.png").read_bytes().startswith(b"\x89PNG")
        batch = ranking_gradients.draw(1)
        values = {
            k: ranking_gradients.on_negatives(batch, k, beta=0.1, alpha=0.5) for k in (None, "pair", "list", "rcr")
        }
        assert values[None] < values["pair"] < min(values["list"], values["rcr"])

    def test_the_logits_are_calibrated(self):
        """The weighted mean of the probabilities is the weighted rate, 3.33 %."""
        batch = ranking_gradients.draw(1)
        weights = 1 - 0.9 * batch.labels_B
        rate = (weights * batch.labels_B).sum() / weights.sum()
        assert rate.item() == pytest.approx(0.0333, abs=2e-4)
        assert ((weights * batch.logits_B.sigmoid()).sum() / weights.sum() / rate).item() == pytest.approx(
            1.0, abs=0.05
        )


@pytest.fixture
def config(tmp_path) -> str:
    make_log(tmp_path)
    content = run_file(tmp_path, max_steps=2)
    content["data"]["tasks"] = ["click"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "run.yaml")


class TestSparsePositives:
    def test_weights_bring_positives_down_to_the_rate(self, config, tmp_path):
        resolved = load_config(config)
        share = sparse_positives.positive_share(resolved)
        beta = sparse_positives.beta_for(0.033, share)
        overrides = sparse_positives.weighted_data(resolved, beta, tmp_path / "sparse")
        again = load_config(config, overrides)
        table = pq.read_table(again.data.train[0])
        ours, given = table[sparse_positives.WEIGHT].to_numpy(), table["weight"].to_numpy()
        clicks = table["click"].to_numpy()
        np.testing.assert_allclose(ours, given * np.where(clicks == 1, beta, 1.0), rtol=1e-6)
        assert beta * share / (beta * share + 1 - share) == pytest.approx(0.033)
        assert again.schema_of_data.weight == sparse_positives.WEIGHT and again.tasks == ("click",)

    def test_a_rate_above_the_logs_own(self):
        with pytest.raises(sparse_positives.typer.BadParameter, match="made rarer only"):
            sparse_positives.beta_for(0.5, 0.2)

    def test_every_loss_resolves(self, config):
        for loss in sparse_positives.LOSSES.values():
            assert load_config(config, [f"train.losses={{click: {loss}}}"]).train.losses["click"]

    def test_tables_and_picture(self, config, tmp_path, monkeypatch, capsys):
        level = {"bce": 0.70, "pair": 0.71}

        def pretend(config, directory: Path, setting, seed, overrides, threads):
            directory.mkdir(parents=True)
            label = "pair" if "pair" in setting else "bce"
            lines = [{"step": s, "negative_gradient": {"click": s * level[label]}} for s in (1, 2)]
            (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return {"test": {"click": {"auc": level[label] + seed / 1000, "logloss": 0.1}}}

        monkeypatch.setattr(compare, "train", pretend)
        sparse_positives.main(
            config, rates="0.1,1", losses="bce,pair", seeds="1,2", out=tmp_path / "out", picture=tmp_path / "sparse.png"
        )
        printed = " ".join(capsys.readouterr().out.split())  # titles are broken to the table's width
        assert "10.0% positive" in printed and printed.count("+100.0 ±0.0") == 2 and "1.05e+00" in printed
        assert (tmp_path / "sparse.png").read_bytes().startswith(b"\x89PNG")


class TestCost:
    def test_every_technique_is_a_run_file(self, config):
        content = yaml.safe_load(Path(config).read_text())
        content["data"]["tasks"] = ["click", "like"]
        Path(config).write_text(yaml.safe_dump(content))
        found = bench.techniques(load_config(config))
        assert {"bce", "pair", "jrc within user", "pcgrad", "dwa", "sngp towers"} <= set(found)
        for overrides in found.values():
            load_config(config, overrides)

    @pytest.mark.slow
    def test_two_techniques_take_turns(self, config, capsys):
        bench.main(config, only="bce,pair,bootstrap towers,ids managed", rounds=2)
        printed = capsys.readouterr().out
        assert "over bce" in printed and all(name in printed for name in ("pair", "bootstrap towers", "ids managed"))
