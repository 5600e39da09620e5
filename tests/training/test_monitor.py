"""Spectra of live tables: those of the whole tables whatever the plan; and a warning where one collapses."""

import json
from pathlib import Path

import pytest
import torch
from gloo import run_ranks
from hand_plans import ALL_KINDS, BAGS, ROWS, TABLES, hand_plan, one_kind
from small_run import make_log, run_file
from tiny_model import TinyModel, apply_table_optimizer

from hmoe_rec.config import resolve_config
from hmoe_rec.embedding.initialization import initialize_tables, local_blocks, named_collections, table_weights
from hmoe_rec.metrics.spectrum import gram, information_abundance, random_reference
from hmoe_rec.sharding import live_grams as live
from hmoe_rec.sharding.live_grams import RowSample, TableGram, live_grams
from hmoe_rec.sharding.process import process_group
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.training.monitor import CollapseMonitor, measures_of
from hmoe_rec.training.trainer import Trainer, train

MAX_ROWS, TURN = 12, 3


def test_a_sample_takes_every_so_many_th_row_and_others_at_each_turn():
    rows = torch.arange(41)
    seen: set[int] = set()
    for turn in range(12):
        sample = RowSample.of(41, MAX_ROWS, turn)
        taken, place = sample.within(rows, 0)
        assert place == 0 and len(taken) == sample.count and MAX_ROWS / 2 <= len(taken) <= MAX_ROWS
        for first in (0, 7, 13, 40):  # blocks of a row-wise plan give the same rows at their places
            part, place = sample.within(rows[first:], first)
            assert torch.equal(part, taken[place:]) or not len(part)
        seen |= set(taken.tolist())
    assert seen == set(range(41))
    assert RowSample.of(9, MAX_ROWS, 5) == RowSample(9, 1, 0) and RowSample.of(10**9, MAX_ROWS, 5).count <= MAX_ROWS


def grams_of(rank: int, world_size: int, plans: list[dict[str, str] | None], local: int) -> list[dict[str, TableGram]]:
    """Under each plan; None: every process holds all tables."""
    torch.set_num_threads(1)
    live.CHUNK_VALUES, live.REDUCED_VALUES = 40, 300  # several chunks of a table, several all-reduces
    found = []
    with process_group() as process:
        for kinds in plans:
            model: torch.nn.Module = whole_model()
            if kinds is not None:
                model = TinyModel(bags=BAGS, rows=ROWS)
                apply_table_optimizer(model)
                plan = hand_plan(model, kinds, world_size, local)
                model = shard_model(model, plan=plan, device=process.device, seed=5, std=0.1)
            found.append(live_grams(model, process, max_rows=MAX_ROWS, turn=TURN))
    return found


def whole_model() -> TinyModel:
    model = TinyModel(torch.device("cpu"), BAGS, ROWS)
    initialize_tables(model, seed=5, std=0.1)
    return model


def check(found: dict[str, TableGram]) -> None:
    tables = {name: w for _, c in named_collections(whole_model()) for name, w in table_weights(c).items()}
    assert found.keys() == tables.keys() == TABLES.keys()
    for name, table in tables.items():
        sampled, _ = RowSample.of(len(table), MAX_ROWS, TURN).within(table, 0)
        g = found[name]
        assert (g.rows, g.sampled) == (len(table), len(sampled)) and g.sampled <= MAX_ROWS < g.rows
        torch.testing.assert_close(g.gram_DD, gram(sampled), rtol=1e-10, atol=1e-14)
    measured = measures_of(found)
    for name, g in found.items():  # tables of one width are measured together
        values = torch.linalg.eigvalsh(g.gram_DD).clamp(min=0).sqrt()
        assert measured[name].information_abundance == pytest.approx(float(information_abundance(values)))
        assert measured[name].dim == TABLES[name][1]


@pytest.mark.slow
def test_two_processes_find_the_spectra_of_the_whole_tables():
    check(grams_of(0, 1, [None], 1)[0])
    plans = [*map(one_kind, ("row_wise", "column_wise", "table_wise")), None]
    for process in run_ranks(2, grams_of, plans, 2):
        for found in process:
            check(found)


@pytest.mark.slow
def test_four_processes_with_every_kind_of_shard():
    for (found,) in run_ranks(4, grams_of, [ALL_KINDS], 2, local_world_size=2):
        check(found)


# ------------------------------------------------------------------------------------------------------------- in a run


def replica_grams(rank: int, world_size: int) -> dict[str, TableGram]:
    """Two groups of one process each; the second one's tables have gone another way."""
    torch.set_num_threads(1)
    model = TinyModel(bags=BAGS, rows=ROWS)
    apply_table_optimizer(model)
    with process_group() as process:
        plan = hand_plan(model, one_kind("table_wise"), 1, 1)
        sharded = shard_model(model, plan=plan, device=process.device, seed=5 + rank, std=0.1, replicas=2)
        return live_grams(sharded, process, max_rows=MAX_ROWS, turn=TURN, replicas=2)


@pytest.mark.slow
def test_of_replica_groups_the_first_one_counts():
    for found in run_ranks(2, replica_grams):
        check(found)


def test_it_is_due_once_for_every_multiple():
    monitor = CollapseMonitor(TinyModel(torch.device("cpu")), None, every=10, max_rows=9, below=0.1)
    assert [step for step in (8, 9, 10, 11, 14, 25, 26, 47, 50) if monitor.is_due(step)] == [10, 25, 47, 50]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("monitor")
    make_log(folder)
    return folder


def watched(log: Path, name: str, **options) -> dict:
    return run_file(log, name, max_steps=6, monitor={"collapse_every": 2} | options)


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "collapse.jsonl").read_text().splitlines()]


def collapse(trainer: Trainer, name: str) -> None:
    """All rows on one line, but for a little noise."""
    for _, collection in named_collections(trainer.sharded):
        for table, weight in table_weights(collection).items():
            for values, *_ in local_blocks(table, weight) if table == name else ():
                noise = 0.001 * torch.randn(values.shape)
                values.copy_(torch.outer(torch.linspace(-1, 1, len(values)), torch.ones(values.shape[1])) + noise)


def test_a_planted_collapse_is_told_once_and_a_healthy_table_is_not(log, monkeypatch, capsys):
    train(resolve_config(watched(log, "healthy")))
    assert "collapses" not in capsys.readouterr().err
    lines = lines_of(log / "healthy")
    assert [line["step"] for line in lines] == [2, 4, 6] and len(lines[0]["tables"]) == 9
    for measures in lines[0]["tables"].values():
        assert measures["random"] == pytest.approx(random_reference(measures["sampled"], 8))
        assert 0.15 < measures["share_of_random"] < 1.1 and 1 / 8 < measures["share_of_width"] <= 1

    build = Trainer._make_monitor
    monkeypatch.setattr(Trainer, "_make_monitor", lambda self: [collapse(self, "like__user_id"), build(self)][1])
    train(resolve_config(watched(log, "planted")))
    told = capsys.readouterr().err
    assert told.count("warning: 1 of 9 tables collapses: like__user_id (information abundance 1.") == 1
    assert "embedding sets" in told and "shared__user_id" not in told
    first = lines_of(log / "planted")[0]["tables"]
    assert first["like__user_id"]["information_abundance"] < 1.3 < first["shared__user_id"]["information_abundance"]
    train(resolve_config(watched(log, "silenced", collapse_below=0.0)))
    assert "collapses" not in capsys.readouterr().err


def test_charts_are_on_tensorboard(log):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(resolve_config(watched(log, "charts")))
    board = EventAccumulator(str(log / "charts" / "tensorboard"))
    board.Reload()
    for line, event in zip(
        lines_of(log / "charts"), board.Scalars("collapse/information_abundance/shared__item_id"), strict=True
    ):
        assert event.step == line["step"]
        assert event.value == pytest.approx(line["tables"]["shared__item_id"]["information_abundance"], rel=1e-6)
    assert {"train/loss", "train/losses/click", "validation/like/auc"} <= set(board.Tags()["scalars"])


def test_off_is_off(log, monkeypatch):
    monkeypatch.setattr(CollapseMonitor, "__init__", lambda *_, **__: pytest.fail("made although it is off"))
    train(resolve_config(run_file(log, "off", max_steps=2)))
    assert not (log / "off" / "collapse.jsonl").exists()


def test_a_monitor_changes_nothing_and_a_restart_measures_as_before(log):
    train(resolve_config(run_file(log, "plain", max_steps=6)))
    content = watched(log, "again", rows=20)
    train(resolve_config(content))
    losses = [[json.loads(x)["losses"] for x in (log / n / "metrics.jsonl").open()] for n in ("plain", "again")]
    assert losses[0] == losses[1]
    before = lines_of(log / "again")
    content["train"] |= {"max_steps": 8, "resume": True}
    train(resolve_config(content))
    after = lines_of(log / "again")
    assert after[:3] == before and [line["step"] for line in after] == [2, 4, 6, 8]
    assert all(m["sampled"] <= 20 for line in after for m in line["tables"].values())


def test_what_takes_too_long_is_told(log, monkeypatch, capsys):
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr("hmoe_rec.training.monitor.time.perf_counter", lambda: float(next(times)))
    with process_group() as process:
        model = TinyModel(torch.device("cpu"))
        monitor = CollapseMonitor(model, process, every=100, max_rows=9, below=0.0)
        first = list(monitor.warnings(monitor.measure(100)))
        assert len(first) == 1 and "collapse_every=3340 takes less than 1%" in first[0]  # 10 s of 30 s
        assert not list(monitor.warnings(monitor.measure(200)))
