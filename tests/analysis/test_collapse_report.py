"""Spectra of a run's tables: read in chunks by any number of processes they are those of the whole tables."""

import json
from pathlib import Path

import pytest
import torch
from small_run import make_log, run_file

from hmoe_rec.analysis import spectra
from hmoe_rec.analysis.collapse_report import RunSpectra, TableSpectrum, collapse_section, spectra_of_run
from hmoe_rec.analysis.opening import data_of, join_names
from hmoe_rec.analysis.report import write_section
from hmoe_rec.analysis.row_counts import row_counts
from hmoe_rec.config import resolve_config
from hmoe_rec.config.tables import places_of_tables
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.sharding.process import process_group
from hmoe_rec.training.checkpoint import read_checkpoint, read_unsharded
from hmoe_rec.training.checkpoint_access import open_checkpoint
from hmoe_rec.training.checkpoint_rows import StoredTensors
from hmoe_rec.training.evaluate import read_run_config
from hmoe_rec.training.trainer import train
from hmoe_rec.types import CheckpointError, ConfigError

ROWS, D = 50, 6
EXPERTS = {
    "set1_dcn": {"kind": "dcnv2", "set": "set1", "num_layers": 1},
    "set__2_dcn": {"kind": "dcnv2", "set": "set__2", "num_layers": 1, "rank": 5},
    "set__2_parts": {"kind": "gwpfm", "set": "set__2", "num_parts": 2},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("collapse")
    make_log(folder)
    given = run_file(folder, max_steps=6)
    cells = dict.fromkeys(EXPERTS, "train")
    given["model"] = {
        "sets": {"set1": {"dim": 4}, "set__2": {"dim": 8}},
        "experts": EXPERTS,
        "routes": {"click": cells, "like": cells},
        "expert_dim": 7,
    }
    train(resolve_config(given))
    return folder / "run"


def tables_of(run: Path) -> dict[str, torch.Tensor]:
    weights = read_unsharded(read_checkpoint(open_checkpoint(str(run)).uri), prefix="model.")
    return {n.split(".")[-2]: w.double() for n, w in weights.items() if "embedding_bags" in n or ".embeddings." in n}


def stripes(stored, fields, world_size: int, **options) -> list[spectra.FieldGrams]:
    """What `world_size` processes find, added up."""
    parts = [
        list(spectra.field_grams(stored, fields, rank=r, world_size=world_size, **options)) for r in range(world_size)
    ]
    return [
        spectra.FieldGrams(
            sum(g.raw for g in of), sum(g.normalized for g in of), sum(g.sum_C for g in of), sum(g.weighted for g in of)
        )
        for of in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_chunks_and_processes_add_up_to_the_table(run, monkeypatch, world_size):
    monkeypatch.setattr(spectra, "CHUNK_ROWS", 7)
    stored, tables = StoredTensors(open_checkpoint(str(run))), tables_of(run)
    config = read_run_config(str(run))
    places = places_of_tables(config.layout().sets, config.features)
    fields = spectra.field_tables(stored, places, lambda field: field != "city")
    assert sorted((f.name, len(f.tables)) for f in fields) == [
        ("city", 1),
        ("city", 1),
        ("item_id", 2),
        ("user_id", 2),
    ]
    counts = {name: torch.arange(len(t), dtype=torch.float64) for name, t in tables.items()}
    for f, g in zip(fields, stripes(stored, fields, world_size, counts=counts), strict=True):
        side_by_side = torch.cat([tables[t.name] for t in f.tables.values()], 1)
        torch.testing.assert_close(g.raw, side_by_side.T @ side_by_side, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(g.sum_C, side_by_side.sum(0), rtol=1e-10, atol=1e-14)
        for s, t in f.tables.items():
            own, table = f.columns(s), tables[t.name]
            unit = torch.nn.functional.normalize(table, eps=1e-300)
            torch.testing.assert_close(g.normalized[own, own], unit.T @ unit, rtol=1e-10, atol=1e-12)
            weighted = table.T @ (table * torch.arange(len(table))[:, None])
            torch.testing.assert_close(g.weighted[own, own], weighted, rtol=1e-10, atol=1e-12)


def test_spectra_of_a_run_are_those_of_its_tables(run):
    with process_group() as process:
        found = spectra_of_run(str(run), process)
    tables = tables_of(run)
    assert len(found.tables) == len(tables) == 6
    for t in found.tables:
        values = torch.linalg.svdvals(tables[f"{t.embedding_set}__{t.field}"])
        torch.testing.assert_close(t.values, values, rtol=1e-7, atol=1e-9)
        assert t.abundance == pytest.approx(float(values.sum() / values[0]))


def test_sub_embeddings_are_the_tables_seen_through_the_projection(run):
    with process_group() as process:
        found = spectra_of_run(str(run), process).sub_embeddings
    weights = read_unsharded(read_checkpoint(open_checkpoint(str(run)).uri), prefix="model.")
    tables = tables_of(run)
    full = next(w for n, w in weights.items() if n.endswith("set1_dcn.interaction.layers.0.weight")).double()
    down = next(w for n, w in weights.items() if n.endswith("set__2_dcn.interaction.layers.0.0.weight")).double()
    up = next(w for n, w in weights.items() if n.endswith("set__2_dcn.interaction.layers.0.1.weight")).double()
    for expert, weight, dim in (("set1_dcn", full, 4), ("set__2_dcn", up @ down, 8)):
        content = found[expert]
        # The set's fields begin with the pooled ones (user, city), then the target of the behaviors (item).
        assert content["fields"] == content["towards"] == ["user_id", "city", "item_id"]
        for i, name in enumerate(content["fields"]):
            for j in range(3):
                block = weight[j * dim : (j + 1) * dim, i * dim : (i + 1) * dim]
                values = torch.linalg.svdvals(tables[f"{content['set']}__{name}"] @ block.T)
                assert content["information_abundance"][i][j] == pytest.approx(
                    float(values.sum() / values[0]), rel=1e-5
                )
    parts = found["set__2_parts"]
    values = torch.linalg.svdvals(tables["set__2__city"][:, 4:])
    assert parts["information_abundance"][1][1] == pytest.approx(float(values.sum() / values[0]))


def test_row_counts_are_those_of_the_ids(run):
    config = read_run_config(str(run))
    uris = data_of(config)
    with process_group() as process:
        counts = row_counts(config, process, uris)
    batch = next(BatchReader(ParquetSource(uris, config.schema_of_data), global_batch_size=300, shuffle=False).epoch(0))
    users = torch.bincount(batch.sparse["user_id"].values().long(), minlength=37).double()
    items = torch.cat([batch.sparse[k].values().long() for k in ("item_id", "hist_item_id")])
    for s in ("set1", "set__2"):
        assert torch.equal(counts[f"{s}__user_id"], users)
        assert torch.equal(counts[f"{s}__item_id"], torch.bincount(items, minlength=23).double())
        assert counts[f"{s}__city"].sum() == 300
    assert not torch.equal(counts["set1__city"], counts["set__2__city"])  # every set has its own hash


def test_report(run, tmp_path):
    with process_group() as process:
        config = read_run_config(str(run))
        counts = row_counts(config, process, data_of(config))
        found = [spectra_of_run(str(run), process, name=n, counts=lambda _: counts) for n in ("first", "second")]
    section = collapse_section(found, weighted=True)
    write_section(section, str(tmp_path))
    content = json.loads((tmp_path / "collapse.json").read_text())
    assert len(content["numbers"]["tables"]) == 12 and len(content["plots"]) == 8
    pairs = {r["field"]: r for r in content["numbers"]["relations"]["first"]}
    assert set(pairs) == {"user_id"} and 0 < pairs["user_id"]["cka"] < 1  # items: too few rows; city: hashed apart
    assert len(pairs["user_id"]["canonical_correlations"]) == 4
    assert "first, set1 (4 wide)" in section.summary[0]


@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_table_without_a_spectrum_is_told_and_in_no_mean(tmp_path, all_of_them):
    values = torch.tensor([3.0, 2, 1], dtype=torch.float64)
    nothing = torch.full_like(values, float("nan"))
    tables = [TableSpectrum("run", "s", name, 50, v, v, 2.9, None) for name, v in (("a", values), ("b", nothing))]
    section = collapse_section([RunSpectra("run", 1, tables[1:] if all_of_them else tables)])
    write_section(section, str(tmp_path))
    assert "s__b" in section.warnings[0] and "s__a" not in section.warnings[0]
    assert section.tables[0].rows[0][4] == ("nan" if all_of_them else "2.00")


def test_a_pair_of_sets_is_one_pair_in_whatever_order_a_checkpoint_has_them():
    relations = [
        {"sets": s, "cka": c, "canonical_correlations": [c]} for s, c in ((["b", "a"], 0.2), (["a", "b"], 0.4))
    ]
    values = torch.tensor([3.0, 2, 1], dtype=torch.float64)
    table = TableSpectrum("run", "a", "id", 50, values, values, 2.9, None)
    tables = collapse_section([RunSpectra("run", 1, [table], relations)]).tables
    assert tables[-1].rows == [["a", "b", "2", "0.300", "0.300"]]


def test_a_run_that_is_none_and_names(tmp_path, run):
    with process_group() as process:
        with pytest.raises(ConfigError, match="not a run directory"):
            spectra_of_run(str(tmp_path), process)
        with pytest.raises(CheckpointError, match="no checkpoint '999'"):
            spectra_of_run(str(run), process, checkpoint="999")
    assert join_names(["a/x", "b/y/"]) == ["x", "y"] and join_names(["a/x", "b/x"]) == ["a/x", "b/x"]
    assert join_names(["r", "r"]) == ["r (1)", "r (2)"]
