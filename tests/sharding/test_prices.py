"""Clusters with a price list: formulas by hand, the planner's use of them, and files that are refused."""

from dataclasses import replace

import pytest
import yaml
from planning import bags_model

from hmoe_rec.sharding.constraints import DENSE, FUSED, REPLICATED, UVM, Constraints
from hmoe_rec.sharding.estimate import predict, read_tables
from hmoe_rec.sharding.options import Table, Workload, fixed_ms, shard_cost, shared_ms
from hmoe_rec.sharding.planner import make_plan, plan_for
from hmoe_rec.sharding.prediction import PARTS
from hmoe_rec.sharding.prices import PARTS_PRICED, Price, Prices, prices_of
from hmoe_rec.sharding.topology import NAMED, cluster_of
from hmoe_rec.types import PlanError

PRICES = Prices(
    input=Price(0.5, id_ns=10, byte_ns=2),
    input_cut=Price(0.7, id_ns=20, byte_ns=3),
    forward=Price(0.1, id_ns=30, row_ns=40, vector_ns=50, byte_ns=0.5),
    backward=Price(0.2, id_ns=60, row_ns=70, vector_ns=80, byte_ns=0.25),
    forward_unpooled=Price(0.3, id_ns=5),
    backward_unpooled=Price(0.4, row_ns=4000),
    all_to_all=Price(0.6, byte_ns=1),
    reduce_scatter=Price(0.8, byte_ns=4),
    all_gather=Price(0.9, byte_ns=5),
)
CPU = replace(NAMED["cpu"], prices=PRICES)  # two processes
B = 100


def cost(kind: str, table: Table, rows: int, columns: int, **work) -> dict[str, float]:
    return dict(zip(PARTS, shard_cost(table, kind, FUSED, rows, columns, CPU, Workload(B, **work)).ms, strict=True))


def test_pooled_tables_by_hand():
    """3 ids an example in 1 feature of a table of 1000 rows x 16, of which a quarter differ."""
    table = Table("ebc", "t", 1000, 16, ids=3.0, vectors=1.0, distinct=0.25)
    ids, vectors = 3 * 2 * B, 2 * B  # of both processes' examples
    cells, received = 4 * 16 * (ids + vectors), 4 * ids + 4 * 2 * B
    assert cost("table_wise", table, 1000, 16) == pytest.approx(
        {
            "input_all_to_all": (10 * ids + 2 * received) / 1e6,
            "prefetch": 0,
            "lookup_forward": (30 * ids + 40 * ids / 4 + 50 * vectors + cells / 2) / 1e6,
            "output_all_to_all": 4 * 16 * vectors / 1e6,
            "gradient_all_to_all": 4 * 16 * vectors / 1e6,
            "lookup_backward": (60 * ids + 70 * ids / 4 + 80 * vectors + cells / 4) / 1e6,
            "optimizer": 0,  # in lookup_backward
        }
    )
    half = cost("row_wise", table, 500, 16)  # half of the ids, the sums of all vectors
    assert half["input_all_to_all"] == pytest.approx((20 * ids / 2 + 3 * (4 * ids / 2 + 4 * 2 * B)) / 1e6)
    assert half["output_all_to_all"] == pytest.approx(4 * 4 * 16 * vectors / 1e6)
    assert half["gradient_all_to_all"] == pytest.approx(5 * 4 * 16 * vectors / 1e6)
    assert cost("table_wise", table, 1000, 16, communication="fp16")["output_all_to_all"] == 2 * 16 * vectors / 1e6


def test_sequences_have_prices_of_their_own():
    table = Table("ec", "t", 50, 16, pooled=False, ids=3.0, vectors=3.0, distinct=0.25)
    ms = cost("row_wise", table, 25, 16)
    assert ms["lookup_forward"] == pytest.approx(5 * 300 / 1e6)
    assert ms["lookup_backward"] == pytest.approx(4000 * 25 / 1e6)  # no more rows than there are
    assert ms["output_all_to_all"] == pytest.approx(4 * 16 * 300 / 1e6)


def test_rows_of_evenly_drawn_ids_where_nothing_is_known():
    table = Table("ec", "t", 500, 16, pooled=False, ids=2.0, vectors=2.0)
    expected = 500 * (1 - (1 - 1 / 500) ** 400)  # of 400 draws from 500 rows
    assert cost("table_wise", table, 500, 16)["lookup_backward"] == pytest.approx(4000 * expected / 1e6, rel=2e-3)


def test_what_was_not_measured_keeps_its_formula():
    table, gpu = Table("ebc", "t", 1000, 16), NAMED["h100x8"]
    for cluster, kernel in ((gpu, UVM), (gpu.with_nodes(2), FUSED)):
        plain = shard_cost(table, "table_wise", kernel, 1000, 16, cluster, Workload(B))
        priced = shard_cost(table, "table_wise", kernel, 1000, 16, replace(cluster, prices=PRICES), Workload(B))
        same = {part for part, a, b in zip(PARTS, plain.ms, priced.ms, strict=True) if a == b}
        lookups = {"lookup_forward", "lookup_backward"}
        exchanges = {"input_all_to_all", "output_all_to_all", "gradient_all_to_all"}
        assert (lookups if kernel == UVM else exchanges) <= same
        assert not (exchanges if kernel == UVM else lookups) & same


def test_replicated_tables_by_hand():
    """1000 rows of 16 values: 64,000 bytes."""
    table, gpu = Table("ebc", "t", 1000, 16), NAMED["h100x8"]
    prices = replace(PRICES, all_reduce=Price(0.7, byte_ns=6), update=Price(0.9, byte_ns=7))
    plain, measured, two_machines = (
        dict(zip(PARTS, shard_cost(table, REPLICATED, DENSE, 1000, 16, c, Workload(B)).ms, strict=True))
        for c in (gpu, replace(gpu, prices=prices), replace(gpu.with_nodes(2), prices=prices))
    )
    assert measured == plain | {"gradient_all_to_all": 64_000 * 6 / 1e6, "optimizer": 64_000 * 7 / 1e6}
    assert two_machines["optimizer"] == measured["optimizer"]  # what goes between machines was not measured
    assert two_machines["gradient_all_to_all"] > plain["gradient_all_to_all"]
    cluster = replace(gpu, prices=prices, kernel_overhead_ms=0.5)
    assert not shared_ms(table, REPLICATED, cluster, Workload(B)).any()
    everyone, holders = fixed_ms(REPLICATED, True, cluster)
    assert dict(zip(PARTS, everyone, strict=True)) == dict.fromkeys(PARTS, 0.0) | {
        "gradient_all_to_all": 0.7,
        "optimizer": 0.9,
    }
    assert holders.sum() == 2 * 0.5


def test_fixed_costs_are_paid_once_for_a_collection_and_type():
    tables = {"s__a": (400, 16), "s__b": (300, 16), "s__c": (7, 16)}
    module = bags_model(tables, {"s__h": (90, 32)})
    plan = make_plan(module, kind="table_wise", world_size=2, local_world_size=2, device_type="cpu")
    free = replace(CPU, prices=Prices(**{p: replace(getattr(PRICES, p), call_ms=0) for p in PARTS_PRICED}))
    with_calls, without = (predict(module, plan, cluster, batch_size=B).ranks for cluster in (CPU, free))
    paid = [{part: a.ms[part] - b.ms[part] for part in PARTS} for a, b in zip(with_calls, without, strict=True)]
    sequences = next(r for r in range(2) if paid[r]["lookup_forward"] > 0.35)
    for rank, ms in enumerate(paid):
        also = rank == sequences
        assert ms["input_all_to_all"] == pytest.approx(2 * 0.5) and ms["output_all_to_all"] == pytest.approx(2 * 0.6)
        assert ms["lookup_forward"] == pytest.approx(0.1 + 0.3 * also)
        assert ms["lookup_backward"] == pytest.approx(0.2 + 0.4 * also)
    found = plan_for(module, CPU, batch_size=B)
    assert found.prediction.critical_ms <= min(
        plan_for(module, CPU, kind=kind, batch_size=B).prediction.critical_ms for kind in ("table_wise", "row_wise")
    )


def test_counted_rows_reach_the_tables():
    module = bags_model({"s__a": (400, 16), "s__b": (300, 16)})
    tables, _ = read_tables(module, Constraints(distinct={"a": 0.5, "s__b": 0.25, "other": 0.1}), CPU)
    assert {t.name: t.distinct for t in tables} == {"s__a": 0.5, "s__b": 0.25}


def test_a_file_with_prices(tmp_path):
    path = tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump(CPU.to_dict() | {"name": "here"}))
    assert cluster_of(str(path)) == replace(CPU, name="here") and cluster_of(str(path), 3).prices == PRICES


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "prices: expected a mapping"),
        ({"forward": {"id_ns": -1}}, "prices.forward.id_ns: expected a number of at least 0, got -1"),
        ({"forward": {"id_ms": 1}}, "prices.forward.id_ms: unknown term 'id_ms'.* did you mean 'id_ns'"),
        ({"forwards": {}}, "prices.forwards: unknown part 'forwards'.* did you mean 'forward'"),
        ({"input": 3}, "prices.input: expected a mapping"),
        ({"input": {"call_ms": True}}, "prices.input.call_ms: expected a number"),
        ({"input": {}}, "prices: missing: input_cut, forward, backward, "),
    ],
)
def test_wrong_prices_are_refused(given, message: str):
    with pytest.raises(PlanError, match=message):
        cluster_of({"base": "cpu", "prices": given})


def test_no_prices():
    problems: list[str] = []
    assert prices_of(None, problems) is None and not problems
