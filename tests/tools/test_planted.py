"""What was planted is found; scripts of the analyses' results: counts against loops, spectra against whole tables."""

import json
import math
from pathlib import Path

import abundance
import findings
import genre_lags
import large_spectrum
import numpy as np
import planted
import presets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

from hmoe_rec.analysis.correlation import BehaviorCounts, Examples, mutual_information, pearson, positions_of
from hmoe_rec.analysis.report import ORDER, ReportTable, Section, new_figure
from hmoe_rec.data.synthetic import ensure_synthetic
from hmoe_rec.training.checkpoint_rows import StoredTensors

ROOT = Path(__file__).resolve().parents[2]


def log_of(tmp_path: Path, size: float) -> dict:
    return planted.log_of(tmp_path / "log", 1, 30_000, {"history": size}, num_categories=6)


def measured(log: dict, targets: list[int], categories: list[int], slots: int) -> torch.Tensor:
    """From the labels of the log's file."""
    arguments = {k: v for k, v in log.items() if k != "dir"}
    table = pq.read_table(ensure_synthetic(log["dir"], **arguments).train)
    lists = table["hist_category_id"].combine_chunks()
    lengths = torch.tensor(lists.value_lengths().to_numpy())
    counts = BehaviorCounts(torch.tensor(targets), torch.tensor(categories), slots)
    target, clicks = (torch.tensor(table[name].to_numpy()) for name in ("category_id", "click"))
    values = torch.tensor(lists.flatten().to_numpy())
    counts.update(Examples(target, values, lengths, positions_of(lengths), clicks))
    return counts.information()


class TestPlantedCorrelation:
    def test_what_is_measured_is_what_was_planted(self, tmp_path):
        targets, categories, slots = [0, 2], [0, 1, 2, 3, 5], 4
        log = log_of(tmp_path, 1.8)
        truth = planted.true_information(planted.world_of(log), targets, categories, slots, 40_000)
        found = measured(log, targets, categories, slots)
        scores = planted.agreement(found, truth, [0, 2])
        assert scores["pearson"] > 0.95 and scores["own"] > 0.95 and scores["mae"] < 0.03 and scores["along"] > 0.5
        weights = planted.planted_weights(planted.world_of(log), targets, categories, slots)
        assert all(pearson(t, w.square()) > 0.9 for t, w in zip(truth, weights, strict=True))

    def test_without_an_effect_there_is_no_information(self, tmp_path):
        world = planted.world_of(log_of(tmp_path, 0.0))
        assert planted.true_information(world, [0, 2], [0, 1], 3, 5_000).abs().max() < 1e-9

    def test_weights_are_kinship_times_decay(self, tmp_path):
        world = planted.world_of(log_of(tmp_path, 1.8))
        found = planted.planted_weights(world, [1], [1, 4, 0], 3)
        tau = float(world.decay[1])
        assert found[0, 0].tolist() == pytest.approx([math.exp(-p / tau) for p in range(3)])
        torch.testing.assert_close(found[0, 1], 0.4 * found[0, 0])  # (1 + 6 / 2) mod 6 = 4 is the related category
        assert not found[0, 2].any()

    def test_a_map_without_positions_does_not_move(self):
        flat = torch.rand(2, 4, 1).expand(-1, -1, 5)
        scores = planted.agreement(flat, torch.rand(2, 4, 5), [0, 1])
        assert scores["along"] == 0 == scores["own"]

    @pytest.mark.slow
    def test_command(self, tmp_path, monkeypatch):
        monkeypatch.chdir(ROOT)
        options = ["--seeds", "1", "--rows", "3000", "--truth-rows", "5000", "--out", str(tmp_path)]
        result = CliRunner().invoke(planted.app, ["correlation", *options])
        assert result.exit_code == 0, result.output
        scores = json.loads((tmp_path / "planted_correlation.json").read_text())["numbers"]["1"]
        assert scores["DIN: attention of click"]["along"] == 0 < scores["TIM: attention of click"]["along"]
        assert (tmp_path / "planted_correlation_maps.png").stat().st_size > 5000


class TestPlantedInterests:
    @pytest.mark.slow
    def test_command(self, tmp_path, monkeypatch):
        monkeypatch.chdir(ROOT)
        options = ["--seeds", "1", "--rows", "3000", "--conflicts", "0.5", "--out", str(tmp_path)]
        result = CliRunner().invoke(planted.app, ["interests", *options])
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "planted_interests.json").read_text())["numbers"]["0.5"]["1"]
        assert list(found["shared_bottom"]["sets"]) == ["shared"]
        assert set(found["stem"]["sets"]) == {"shared", "click", "like"}
        assert "| 0.5 | stem |" in (tmp_path / "planted_interests.md").read_text()

    def test_separation_does_not_care_which_is_nearer(self):
        assert planted.separation({"c1_nearer": 0.2}) == planted.separation({"c1_nearer": 0.8}) == 0.8

    def test_a_set_that_serves_one_task_does_not_serve_both(self):
        shared = {"positives_nearer": {"shared": {"click": 0.82, "like": 0.52}}}
        own = {"positives_nearer": {"click": {"click": 0.8, "like": 0.5}, "like": {"click": 0.5, "like": 0.25}}}
        assert planted.served(shared) == 0.52 and planted.served(own) == 0.75


class TestGenreLags:
    def make(self, folder: Path) -> tuple[list, list, list]:
        rng = np.random.default_rng(0)
        targets = [None if i == 7 else int(x) for i, x in enumerate(rng.integers(0, 3, 200))]
        histories = [rng.integers(0, 3, rng.integers(0, 5)).tolist() for _ in targets]
        watched = [int(bool(h) and h[-1] == t) if i % 5 else i % 2 for i, (t, h) in enumerate(zip(targets, histories))]  # noqa: B905
        columns = {"main_genre": targets, "hist_main_genre": histories, "watched": watched}
        table = pa.table(columns)
        pq.write_table(table, folder / "train.parquet", row_group_size=64)
        (folder / "schema.yaml").write_text(yaml.safe_dump({"ids": [{"name": "main_genre", "num_embeddings": 3}]}))
        (folder / "vocabularies.json").write_text(json.dumps({"genre": ["Action", "Comedy", "Drama"]}))
        return targets, histories, watched

    def test_counts_equal_a_loop(self, tmp_path):
        rows = list(zip(*self.make(tmp_path), strict=True))
        files = [str(tmp_path / "train.parquet")]
        found = genre_lags.count(files, "main_genre", "hist_main_genre", "watched", 3, 2).information()
        for a in range(3):
            for c in range(3):
                for p in (1, 2):
                    of_a = [(len(h) >= p and h[-p] == c, w) for t, h, w in rows if t == a]
                    cells = [sum(hit and w == y for hit, w in of_a) for y in (1, 0)]
                    both = [sum(w == y for _, w in of_a) for y in (1, 0)]
                    expected = mutual_information(*(torch.tensor(float(x)) for x in (*cells, *both)))
                    assert found[a, c, p - 1].item() == pytest.approx(expected.item())

    def test_command(self, tmp_path, capsys):
        self.make(tmp_path)
        genre_lags.main(tmp_path, lags=2, draws=19, out=tmp_path / "out")
        numbers = json.loads((tmp_path / "out" / "genre_lags.json").read_text())["numbers"]
        assert numbers["names"] == ["Action", "Comedy", "Drama"] and sum(numbers["rows"]) == 199
        first, second = numbers["own_by_lag"]
        assert first > 0.2 > 0.05 > second  # only the latest one was planted
        assert "The own genre at lag 1" in capsys.readouterr().out


class TestLargeSpectrum:
    def test_a_table_in_pieces_has_the_spectrum_of_the_whole(self, tmp_path):
        rows, dim = 1000, 6
        checkpoint = large_spectrum.write_table(tmp_path / "table", rows, dim, piece_bytes=4 * dim * 300)
        stored = StoredTensors(checkpoint)
        assert len(stored.forms[large_spectrum.KEY].chunks) == 4
        whole = stored.read(large_spectrum.KEY, (0, 0), (rows, dim)).double()
        found = large_spectrum.spectrum(checkpoint)
        torch.testing.assert_close(found, torch.linalg.svdvals(whole), rtol=1e-9, atol=0)
        planted_values = large_spectrum.planted_values(dim) * math.sqrt(rows)
        torch.testing.assert_close(found, planted_values, rtol=0.15, atol=0)

    def test_command_cleans_up(self, tmp_path):
        large_spectrum.main(rows=2000, dim=8, folder=tmp_path / "table", keep=False, out=tmp_path / "out")
        assert not (tmp_path / "table").exists()
        numbers = json.loads((tmp_path / "out" / "large_spectrum.json").read_text())["numbers"]
        assert numbers["largest_relative_error"] < 0.1 and numbers["bytes"] == 64_000
        (tmp_path / "table").mkdir()
        with pytest.raises(large_spectrum.typer.BadParameter, match="must not exist"):
            large_spectrum.main(rows=2000, dim=8, folder=tmp_path / "table", keep=False, out=tmp_path / "out")
        assert (tmp_path / "table").exists()


def test_abundance_in_one_line():
    assert abundance.named("DCN V2 multi 4x") == "4 sets of width 8"
    assert abundance.named("DCN V2 single 5x") == "1 set of width 40"
    run = {"raw": [2.0, 4.0], "random": [5.0, 7.0], "normalized": [1.0, 5.0], "random_normalized": [6.0, 6.0]}
    assert abundance.row("a", [run]) == ["a", "3.00", "50%", "1.00", "3.00", "5.00", "6.00", "50%"]
    assert len(abundance.PUBLISHED) == 8


def test_a_page_has_short_names_and_every_analysis_of_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"kuairand-{name}-seed1").mkdir()
    directories = {name: tmp_path / f"kuairand-{name}-seed1" for name in ("a", "b")}
    for _ in "ab":  # again is no error
        found = presets.short_names(tmp_path / "page" / "runs", directories)
    assert [Path(f).name for f in found] == ["a", "b"]
    assert [Path(f).resolve() for f in found] == [d.resolve() for d in directories.values()]
    assert set(presets.analyses(found, "click,like", "x")) == set(ORDER) - {"fields", "all"}


def test_findings_are_written_three_times(tmp_path, capsys):
    figure, _ = new_figure(2, 2)
    table = ReportTable("Counts", ["what", "how many"], [["ids", "3"]])
    plot = [planted.Plot("p", "A picture.", figure)]
    findings.write_findings(Section("x", "Title", ["One."], [table], plot, {"a": float("nan")}), tmp_path / "out")
    written = (tmp_path / "out" / "x.md").read_text()
    assert "| what | how many |\n| --- | ---: |\n| ids | 3 |" in written and "![A picture.](x_p.png)" in written
    assert json.loads((tmp_path / "out" / "x.json").read_text())["numbers"] == {"a": None}
    assert written.strip() in capsys.readouterr().out
    assert findings.spread([1.0, 2.0, 3.0], 1) == "2.0 ±1.0" and findings.spread([1.0], 1) == "1.0"
