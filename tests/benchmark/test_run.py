"""A whole benchmark on two processes: figures, failures that do not stop the others, reports."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gloo import run_ranks
from rich.console import Console
from small_run import make_log, run_file

from hmoe_rec.benchmark.report import print_benchmark
from hmoe_rec.benchmark.report_html import benchmark_html
from hmoe_rec.benchmark.result import KINDS, MEASURED, BenchmarkReport, PlanFigures
from hmoe_rec.benchmark.run import BenchmarkSettings, benchmark_plans
from hmoe_rec.benchmark.under_test import PlanUnderTest
from hmoe_rec.config import resolve_config
from hmoe_rec.sharding.planner import make_plan
from hmoe_rec.sharding.process import process_group
from hmoe_rec.sharding.topology import NAMED
from hmoe_rec.training.build import plan_model, unsharded
from hmoe_rec.types import ConfigError, PlanError

SMALL = {"rounds": 3, "steps": 2, "warmup": 1, "apart": 2}


def plan_files(folder: Path, config) -> tuple[str, str]:
    """One for two processes, one for three."""
    paths = []
    for world in (2, 3):
        cluster = replace(NAMED["cpu"], ranks_per_node=world)
        sharding = config.sharding.model_copy(update={"plan": "row_wise"})
        module, planned = plan_model(config.model_copy(update={"sharding": sharding}), cluster)
        paths.append(str(folder / f"plan_{world}.json"))
        planned.save(module, paths[-1])
    return paths[0], paths[1]


def bench(rank: int, world_size: int, content: dict, settings: dict) -> BenchmarkReport:
    done = []
    report = benchmark_plans(
        resolve_config(content), BenchmarkSettings(**settings), config_name="<run>", progress=lambda *x: done.append(x)
    )
    assert rank > 0 or done[-1] == (3 * len(report.built),) * 2, (done, report.failed)
    return report


def bench_quietly(rank: int, world_size: int, content: dict, settings: dict) -> BenchmarkReport:
    return benchmark_plans(resolve_config(content), BenchmarkSettings(**settings))


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, BenchmarkReport]:
    folder = tmp_path_factory.mktemp("bench")
    make_log(folder)
    content = run_file(folder, global_batch_size=60)
    good, bad = plan_files(folder, resolve_config(content))
    plans = ("table_wise", "auto", good, bad, "rwo_wise")
    topologies = ("cpu", str(folder / "slow.yaml"))
    Path(topologies[1]).write_text("{base: cpu, name: slow, ddr_bandwidth: 1e6, intra_node_bandwidth: 1e6}")
    settings = {"plans": plans, "topologies": topologies, **SMALL}
    kept = run_ranks(2, bench, content, settings)
    return {"kept": kept[0], "other rank": kept[1]}


def test_figures(reports):
    report = reports["kept"]
    assert {p.name for p in report.built} == {"table_wise", "auto", "plan_2"} and report.kept
    medians = [p.median_ms for p in report.built]
    assert medians == sorted(medians) and report.ratio(report.built[0]) == 1.0
    tables = sum((n * 8 + n) * 4 for n in (37, 23, 41)) * 3  # three sets; row-wise Adagrad keeps a number a row
    for plan in report.built:
        assert [len(steps) for steps in plan.rounds] == [2, 2, 2] and min(plan.steps) > 0
        assert plan.spread_ms[0] <= plan.median_ms <= plan.p90_ms
        assert sum(r.memory["tables"] + r.memory["optimizer"] for r in plan.ranks) == tables
        assert all(set(r.ms) == set(MEASURED) and set(r.sent) == set(KINDS) for r in plan.ranks)
        assert sum(plan.shardings.values()) == 9 and plan.sent_bytes > 0 and plan.exchange_ms > 0
        assert report.table_ms(plan) == plan.median_ms - report.dense_ms
        assert report.examples_per_second(plan) == pytest.approx(60 / (plan.median_ms / 1e3))
        slow, fast = (plan.predictions[name].critical_ms for name in ("slow", "cpu"))
        assert slow > 10 * fast
    assert len(report.dense_rounds) == 3 and 0 < report.dense_ms
    assert report.topologies == ("cpu", "slow")
    assert {"row_wise": 9} == next(p for p in report.built if p.name == "plan_2").shardings
    assert reports["other rank"].to_dict() == report.to_dict()


def test_what_cannot_be_built_is_reported_and_the_others_go_on(reports):
    errors = {p.name: p.error or "" for p in reports["kept"].failed}
    assert set(errors) == {"plan_3", "rwo_wise"}
    assert "plan for 3 processes, this job has 2" in errors["plan_3"]
    assert "did you mean 'row_wise'" in errors["rwo_wise"]


def test_ids_of_the_data_are_counted(reports):
    ids = reports["kept"].settings["ids_per_example"]
    assert ids["user_id"] == 1.0 and 1.0 < ids["hist_item_id"] < 3.0


@pytest.mark.slow
def test_one_by_one_gives_the_same_kind_of_figures(tmp_path):
    settings = {"plans": ("row_wise", "table_wise"), "zipf": 1.1, "together": False, **SMALL}
    report = run_ranks(2, bench, run_file(tmp_path, global_batch_size=60), settings)[0]
    assert not report.kept and {p.name for p in report.built} == {"row_wise", "table_wise"}
    assert all([len(steps) for steps in p.rounds] == [2, 2, 2] for p in report.built)
    assert report.topologies == ("this machine (cpu)",)


@pytest.mark.slow
@pytest.mark.parametrize("zipf", [None, 1.0])
def test_a_batch_that_does_not_divide_by_the_processes(tmp_path, zipf):
    make_log(tmp_path)
    settings = {"plans": ("row_wise", "table_wise"), "zipf": zipf, **SMALL}
    report = run_ranks(2, bench, run_file(tmp_path, global_batch_size=61), settings)[0]
    assert {p.name for p in report.built} == {"row_wise", "table_wise"} and not report.failed


def test_memory_of_replicated_tables_and_precision_of_gradients(tmp_path):
    settings = {"plans": ("data_parallel",), "zipf": 1.1, "rounds": 1, "steps": 1, "apart": 1}
    content = run_file(tmp_path, global_batch_size=60) | {"sharding": {"gradient_communication": "fp16"}}
    report = run_ranks(1, bench_quietly, content, settings)[0]
    ((rank,), (predicted,)) = report.built[0].ranks, report.built[0].predictions.values()
    assert rank.memory["optimizer"] == predicted.ranks[0].ddr["optimizer"] == sum((37, 23, 41)) * 4 * 3
    assert predicted.planner["gradient_communication"] == "fp16"


def test_replica_groups_are_refused(tmp_path):
    content = run_file(tmp_path) | {"sharding": {"replicas": 2}}
    with pytest.raises(ConfigError, match="sharding.replicas: 2; the benchmark measures plans of one group"):
        bench_quietly(0, 2, content, {"plans": ("row_wise",), "zipf": 1.1})


def test_errors_of_predictions_by_hand():
    report = hand_made()
    found = report.agreement("t")
    # Dense 10; tables measured 10 and 30, predicted 15 and 20.
    assert found.table_error == {"a": pytest.approx(0.5), "b": pytest.approx(-1 / 3)}
    assert found.step_error == {"a": pytest.approx(0.25), "b": pytest.approx(-0.25)}
    assert found.mean_table_error == pytest.approx((0.5 + 1 / 3) / 2) and found.mean_step_error == pytest.approx(0.25)
    assert (found.spearman, found.kendall) == (pytest.approx(1.0), pytest.approx(1.0))
    noise = replace(report, dense_rounds=((25.0,),))
    assert noise.agreement("t").table_error["a"] is None


def hand_made() -> BenchmarkReport:
    class Predicted:
        def __init__(self, ms: float) -> None:
            self.critical_ms = ms

    plans = tuple(
        PlanFigures(name, rounds=((ms, ms),), predictions={"t": Predicted(predicted)})  # type: ignore[dict-item]
        for name, ms, predicted in (("b", 40.0, 20.0), ("a", 20.0, 15.0))
    )
    return BenchmarkReport("c", (), {}, {}, 2, 60, plans, ((10.0, 10.0),), ("t",))


def test_reports(reports):
    report = reports["kept"]
    content = json.loads(report.to_json())
    assert (content["schema"], content["version"], content["world_size"]) == ("hmoe_rec.benchmark", 1, 2)
    by_name = {p["name"]: p for p in content["plans"]}
    assert by_name["plan_3"]["error"] and len(by_name["auto"]["round_medians_ms"]) == 3
    assert by_name["auto"]["ranks"][1]["ms"]["input"] > 0 and content["host"]["torch"] == torch.__version__
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    print_benchmark(report, console)
    text = console.export_text()
    for word in ("plan_2", "row_wise 9", "x fastest", "slow: tables", "Spearman", "plan_3: not built", "Kendall"):
        assert word in text
    html = benchmark_html(report)
    assert "&lt;run&gt;" in html and "<run>" not in html and "plan_2: slow" in html and "not built" in html.lower()
    assert "http" not in re.sub(r"http-equiv", "", html) and html.count("<section") >= 7


def steps_without_tables(rank: int, world_size: int, content: dict) -> tuple[bool, bool, int, bool]:
    """-> whether the tables stayed, whether the dense part moved, exchanges of TorchRec, whether training goes on."""
    from hmoe_rec.benchmark.batches import draw_batches
    from hmoe_rec.benchmark.parts import StepParts

    config = resolve_config(content)
    with process_group("cpu") as process:
        module = unsharded(config, "cpu")
        plan = make_plan(module, kind="row_wise", world_size=2, local_world_size=2, device_type="cpu")
        made = PlanUnderTest(config, process, plan, draw_batches(config, process, 0.0, 3))
        made.keep_vectors()

        def tables() -> list[torch.Tensor]:
            state = made.sharded.state_dict()
            return [s.tensor.clone() for n, t in state.items() if "embedding" in n for s in t.local_shards()]

        def dense() -> list[torch.Tensor]:
            return [p.detach().clone() for n, p in made.sharded.named_parameters() if "tower" in n]

        before, dense_before = tables(), dense()
        parts = StepParts(made.embedding, process.device)
        parts.sent.append(parts.exchanges)  # nothing may be counted
        with parts.watching():
            times = made.dense_block(1, 2)
        stayed = all(map(torch.equal, before, tables())) and len(before) == 9
        moved = not any(map(torch.equal, dense_before, dense()))
        made.block(1, 2, 0)
        return (
            stayed,
            moved and len(times) == 2,
            sum(parts.exchanges.values()),
            not all(map(torch.equal, before, tables())),
        )


def test_a_step_without_tables_touches_none_and_exchanges_nothing(tmp_path):
    content = run_file(tmp_path, global_batch_size=60)
    assert run_ranks(2, steps_without_tables, content) == [(True, True, 0, True)] * 2


def test_no_plan_at_all_is_an_error(tmp_path):
    config = resolve_config(run_file(tmp_path))
    with pytest.raises(PlanError, match="none of the plans can be built:\n  a: .*no such file"):
        benchmark_plans(config, BenchmarkSettings(plans=("no/a.json",), zipf=1.0))
    with pytest.raises(PlanError, match="auto given twice"):
        benchmark_plans(config, BenchmarkSettings(plans=("auto", "auto"), zipf=1.0))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    make_log(tmp_path)
    config = resolve_config(run_file(tmp_path, global_batch_size=60, device="cuda"))
    settings = BenchmarkSettings(plans=("table_wise", "auto"), topologies=("h100x8",), **SMALL)
    report = benchmark_plans(config, settings)
    assert len(report.built) == 2
    for plan in report.built:
        held = plan.most_memory("tables") + plan.most_memory("optimizer")
        assert plan.most_memory("peak") >= held > 0 and min(plan.steps) > 0
        assert all(rank.ms["forward"] > 0 and rank.ms["backward"] > 0 for rank in plan.ranks)
