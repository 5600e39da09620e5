"""The scripts behind the README's comparisons: paired differences, settings that resolve, small runs of each."""

import math
import shlex
import statistics
from pathlib import Path

import compare
import experiments
import hashing
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import unseen_numbers
import widths
from typer.testing import CliRunner

from hmoe_rec.config import load_config, resolve_config

ROOT = Path(__file__).resolve().parents[2]


class TestCompare:
    def test_differences_are_paired(self):
        """A shift that all seeds share is certain, however much the seeds differ."""
        base, values = [0.70, 0.80, 0.75], [0.701, 0.801, 0.751]
        assert compare.paired(values, base) == "+10.0 ±0.0"
        values = [0.701, 0.803, 0.755]
        error = statistics.stdev([10.0, 30.0, 50.0]) / math.sqrt(3)
        assert compare.paired(values, base) == f"+30.0 ±{error:.1f}"

    def test_a_run_is_known_by_all_that_decides_it(self, tmp_path):
        names = {
            compare.run_dir(tmp_path, config, setting, seed, overrides)
            for config in ("a.yaml", "b.yaml")
            for setting in ("model.preset=mmoe", "model.preset=stem")
            for seed in (1, 2)
            for overrides in ((), ("train.epochs=2",))
        }
        assert len(names) == 16

    def test_a_finished_run_is_not_run_again(self, tmp_path):
        (tmp_path / "report.json").write_text('{"test": {}}')
        assert compare.train("no such file", tmp_path, "", 1, (), 1) == {"test": {}}

    def test_a_run_that_fails_says_why(self, tmp_path):
        with pytest.raises(RuntimeError, match="nothing.yaml: no such file"):
            compare.train("nothing.yaml", tmp_path / "run", "", 1, (), 1)


@pytest.fixture
def at_root(tmp_path, monkeypatch) -> Path:
    """A folder with the run files, and the vectors that one of the experiments reads."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data" / "kuairand").mkdir(parents=True)
    for name in ("graph_emb", "twotower"):
        vectors = pa.FixedSizeListArray.from_arrays(np.ones(8, "f4"), 4)
        table = pa.table({"video_id": [1, 2], "embedding": vectors})
        pq.write_table(table, tmp_path / "data" / "kuairand" / f"item_embeddings_{name}.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestExperiments:
    @pytest.mark.parametrize("name", sorted(experiments.EXPERIMENTS))
    def test_every_setting_resolves_and_differs(self, name, at_root):
        experiment = experiments.EXPERIMENTS[name]
        resolved = [
            load_config(experiment.config, [*experiment.overrides, *shlex.split(setting)])
            for setting in experiment.settings.values()
        ]
        texts = {config.to_yaml() for config in resolved}
        assert len(texts) == len(experiment.settings) >= 3 and len(experiment.seeds) >= 3
        assert len({(c.train.epochs, c.train.learning_rate, c.train.global_batch_size) for c in resolved}) == 1

    def test_listing(self):
        app = experiments.typer.Typer()
        app.command()(experiments.main)
        result = CliRunner().invoke(app, [])
        assert result.exit_code == 0 and all(name in result.output for name in experiments.EXPERIMENTS)

    def test_a_comparison_prints_levels_and_paired_differences(self, at_root, monkeypatch, capsys):
        level = {"tim": 0.72, "mean": 0.62}

        def train(config, directory, setting, seed, overrides, threads):
            label = setting.rsplit("=", 1)[1] if "{" not in setting else "tim"
            metrics = {"auc": level[label] + seed / 1000, "logloss": 0.5}
            reference = {"test": {"click": {"auc": 0.7278, "logloss": 0.5}}}
            return {"test": {"click": metrics}, "parameters": {"dense": 3, "tables": 5}, "reference": reference}

        monkeypatch.setattr(compare, "train", train)
        experiments.main("synthetic-sequences", seeds="1,2,3", only="tim,mean", out=at_root)
        printed = capsys.readouterr().out
        assert "test auc minus that of tim: mean ± standard error over 3 seeds in 1e-4" in printed
        assert "-1000.0 ±0.0" in printed and "0.7220 ±10" in printed
        assert "best possible on this test data, click: AUC 0.7278" in printed


class TestWidths:
    def test_single_and_multi_have_the_same_number_of_embedding_values(self, at_root):
        labels = widths.settings(["DNN"], [1, 3])
        assert list(labels) == ["DNN single 1x", "DNN single 3x", "DNN multi 3x"]
        values = {}
        for label, setting in labels.items():
            config = load_config("configs/criteo.yaml", [*widths.COMMON, *shlex.split(setting)])
            values[label] = sum(s.dim for s in config.layout().sets)
            assert len(config.layout().experts) == len(config.layout().sets)
        assert values == {"DNN single 1x": 8, "DNN single 3x": 24, "DNN multi 3x": 24}


def test_unseen_numbers(tmp_path):
    """A row per value knows nothing of values without examples; digits do."""
    world = unseen_numbers.make_world(1, 0.3)
    figures = {}
    for name in ("mnse", "id per value"):
        encoder = unseen_numbers.make_encoder(name, world.number, 1)
        figures[name] = unseen_numbers.judge(world, unseen_numbers.learned_logits(world, encoder, 200, 1))
    assert figures["id per value"]["auc unseen"] < 0.6 < 0.8 < figures["mnse"]["auc unseen"]
    assert abs(figures["mnse"]["auc seen"] - figures["id per value"]["auc seen"]) < 0.05


class TestHashing:
    @pytest.mark.parametrize("rules", [hashing.SALTS, hashing.STREAM], ids=["salts", "stream"])
    def test_settings_differ_in_how_ids_become_rows_alone(self, rules, tmp_path):
        ids = [{"name": "ad", "num_embeddings": 30_000}, {"name": "page", "num_embeddings": 50, "keep": True}]
        found = {}
        for label, (num_sets, rule) in rules.items():
            fields = hashing.with_rows(ids, rule, 1024)
            config = resolve_config(hashing.small_run(tmp_path, fields, num_sets, 1))
            ad, page = config.features.ids
            assert page.num_rows == 50 and sum(s.dim for s in config.layout().sets) == hashing.WIDTH
            assert ad.num_rows == (30_000 if label == "a row per id" else 1024)
            found[label] = (num_sets, ad)
        assert len(set(found.values())) == len(rules)

    @pytest.mark.slow
    def test_managed_ids_learn_a_stream_of_more_ids_than_rows(self, tmp_path):
        """Far better than modulo, and nearly as well as a row for every id."""
        ids = hashing.stream_log(tmp_path, 50_000, 1, ads=8_000, alive=500)
        ne = {}
        for label in ("modulo", "managed, lru", "a row per id"):
            num_sets, rule = hashing.STREAM[label]
            fields = hashing.with_rows(ids, rule, 1024)
            content = hashing.small_run(tmp_path, fields, num_sets, 1, shuffle=False)
            ne[label] = hashing.result_of(content, progressive=True)["click"]["ne"]
        assert ne["managed, lru"] < ne["modulo"] - 0.01
        assert ne["managed, lru"] < ne["a row per id"] + 0.002
