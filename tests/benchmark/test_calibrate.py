"""A small calibration on two processes: what it measures, and a topology file that the planner takes."""

import json

import pytest
from gloo import run_ranks
from planning import bags_model
from rich.console import Console
from small_run import run_file

from hmoe_rec.benchmark.calibrate import Calibration, CalibrationSettings, calibrate, settings_of
from hmoe_rec.benchmark.topology_file import print_calibration, topology_yaml
from hmoe_rec.config import resolve_config
from hmoe_rec.sharding.planner import plan_for
from hmoe_rec.sharding.prices import PARTS_PRICED, TERMS
from hmoe_rec.sharding.topology import cluster_of

TINY = CalibrationSettings(
    widths=(8,), rows=((9, 20, 3000, 4000),), loads=((4, 1), (300, 3)), sequence_loads=((4, 1),),
    messages=(64, 1 << 14), repeats=2,
)  # fmt: skip


def measure(rank: int, world_size: int) -> Calibration:
    done: list[tuple[int, int]] = []
    found = calibrate(TINY, "cpu", progress=lambda *x: done.append(x))
    assert (done[-1] == (4, 4)) if rank == 0 else not done
    return found


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return run_ranks(2, measure)[0]


@pytest.mark.slow
def test_measurements(calibration):
    cluster, fit = calibration.cluster, calibration.fit
    assert (cluster.device, cluster.world_size, cluster.nodes) == ("cpu", 2, 1)
    assert {x.kind for x in calibration.exchanges} == {"all_to_all", "reduce_scatter", "all_gather", "all_reduce"}
    assert all(x.ms > 0 for x in calibration.exchanges) and len(calibration.exchanges) == 8
    assert len(calibration.updates) == 2 and all(x.ms > 0 for x in calibration.updates)
    assert len(calibration.lookups) == 2 * 2 + 2 * 1
    assert all(x.ms["forward"] > 0 and x.bandwidth > 0 for x in calibration.lookups)
    assert set(fit.error) == set(PARTS_PRICED) and min(fit.count.values()) >= 2
    prices = [getattr(getattr(cluster.prices, part), term) for part in PARTS_PRICED for term in TERMS]
    assert min(prices) >= 0 and max(prices) > 0
    random = [x.bandwidth for x in calibration.lookups if x.pooled and x.batch_size == 4]
    assert min(random) <= cluster.ddr_bandwidth <= max(random)
    assert cluster.kernel_overhead_ms == cluster.prices.forward.call_ms and calibration.copies["within memory"] > 0


@pytest.mark.slow
def test_the_file_is_a_topology_that_plans_differ_under(calibration, tmp_path):
    path = tmp_path / "here.yaml"
    path.write_text(topology_yaml(calibration, "here"))
    read = cluster_of(str(path))
    assert read.name == "here" and read.world_size == 2
    for part in PARTS_PRICED:
        given = vars(getattr(calibration.cluster.prices, part))
        assert vars(getattr(read.prices, part)) == pytest.approx(given, rel=1e-3)
    module = bags_model({"s__a": (4000, 16), "s__b": (3000, 16)})
    ours, named = (plan_for(module, c, kind="row_wise").prediction.critical_ms for c in (read, cluster_of("cpu")))
    assert ours > 0 and ours != named
    assert "reduce_scatter" in path.read_text() and "measurements" in path.read_text()


@pytest.mark.slow
def test_it_is_printed_and_is_json(calibration):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    print_calibration(calibration, console)
    text = console.export_text()
    for word in ("copy within memory", "16.0 KiB", "4 pooled", "4 sequences", "backward_unpooled", "rows at random"):
        assert word in text
    content = json.loads(json.dumps(calibration.to_dict()))
    assert content["schema"] == "hmoe_rec.calibration" and len(content["exchanges"]) == 8
    assert content["cluster"]["prices"]["forward"]["call_ms"] == calibration.cluster.kernel_overhead_ms


def test_sizes_of_a_run(tmp_path):
    content = run_file(tmp_path, embedding_optimizer="adagrad") | {"sharding": {"pooling": {"hist_item_id": 3.2}}}
    found = settings_of(resolve_config(content), 2)
    assert (found.widths, found.optimizer) == ((8,), "adagrad")
    assert found.rows == ((37, 23, 41) * 3, (23, 23, 37, 41, 41))  # of three sets; every second one of them
    assert found.sequence_loads == ((20, 1), (80, 1), (20, 3), (80, 3)) and found.loads == (
        (20, 1),
        (80, 1),
        (20, 4),
        (80, 4),
    )
    content["model"] |= {"embedding_dim": 1 << 24}
    huge = settings_of(resolve_config(content), 2)
    assert huge.rows[0] == (4,) * 9  # a GiB would be less than that, but rows must do for two processes
