"""Predicted memory and time: equal to TorchRec's estimators where they should be, and sums of their parts."""

from dataclasses import replace
from importlib import metadata

import pytest
import torch
from planning import META, bags_model
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator, get_partition_by_type
from torchrec.distributed.planner.types import ParameterConstraints, Shard, ShardingOption
from torchrec.modules.embedding_configs import DataType

from hmoe_rec.sharding.constraints import (
    CACHING,
    DENSE,
    FUSED,
    KERNELS,
    POOLED_TYPES,
    SHARDED_TYPES,
    UNPOOLED_TYPES,
    UVM,
    Constraint,
    Constraints,
    Rule,
)
from hmoe_rec.sharding.estimate import predict, read_tables
from hmoe_rec.sharding.options import Table, Workload, sent_bytes, shard_cost, ways
from hmoe_rec.sharding.planner import KINDS, make_plan, plan_for, sharders
from hmoe_rec.sharding.prediction import PARTS, PlanPrediction
from hmoe_rec.sharding.topology import GB, NAMED, cluster_of, torchrec_topology
from hmoe_rec.types import PlanError

H100 = NAMED["h100x8"]
TORCHREC = tuple(int(part) for part in metadata.version("torchrec").split(".")[:2])
BATCH = 96


def torchrec_shard(module, path, table, kind, kernel, size, cluster, ids, communication="fp32") -> Shard:
    """One shard with the perf and storage of TorchRec's default estimators."""
    enumerator = EmbeddingEnumerator(
        torchrec_topology(cluster),
        batch_size=BATCH,
        constraints={table: ParameterConstraints(pooling_factors=[ids], sharding_types=["table_wise"])},
    )
    enumerator.enumerate(module, sharders(communication))
    weight = dict(module[path].named_parameters())
    option = ShardingOption(
        name=table,
        tensor=next(p for name, p in weight.items() if name.split(".")[-2] == table),
        module=(path, module[path]),
        input_lengths=[ids],
        batch_size=BATCH,
        sharding_type=kind,
        partition_by=get_partition_by_type(kind),
        compute_kernel=kernel,
        shards=[Shard(size=list(size), offset=[0, 0])],
    )
    enumerator.populate_estimates([option])
    return option.shards[0]


CASES = [(kind, pooled) for pooled in (True, False) for kind in (SHARDED_TYPES if pooled else SHARDED_TYPES[:3])]


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("ids", [0.5, 3.0])
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize(("kind", "pooled"), CASES)
def test_time_and_memory_are_torchrecs(kind: str, pooled: bool, width: int, ids: float, nodes: int) -> None:
    cluster, size = H100.with_nodes(nodes), (1000, width // 2 if "column" in kind or kind == "grid_shard" else width)
    module = bags_model(*({"s__a": (8000, width)}, None) if pooled else ({}, {"s__a": (8000, width)}))
    theirs = torchrec_shard(module, "ebc" if pooled else "ec", "s__a", kind, FUSED, size, cluster, ids)
    per_bag = min(ids, 1.0) if TORCHREC >= (1, 8) else 1.0  # an older one counts a vector for an empty bag, too
    vectors = per_bag if pooled else ids
    table = Table("ebc", "s__a", 8000, width, pooled=pooled, features=1, ids=ids, vectors=vectors)
    ours = shard_cost(table, kind, FUSED, *size, cluster, Workload(BATCH))
    ms = dict(zip(PARTS, ours.ms, strict=True))
    assert ms["lookup_forward"] == pytest.approx(theirs.perf.fwd_compute)
    assert ms["lookup_backward"] == pytest.approx(theirs.perf.bwd_compute)
    assert ms["output_all_to_all"] == pytest.approx(theirs.perf.fwd_comms)
    assert ms["gradient_all_to_all"] == pytest.approx(theirs.perf.bwd_comms)
    # TorchRec takes the optimizer's state from the whole table's width: half as much for half the columns.
    state = 4 * 1000 * (1 - size[1] / width)
    assert sum(ours.hbm) == pytest.approx(theirs.storage.hbm + state, abs=4) and sum(ours.ddr) == theirs.storage.ddr


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("pooled", [True, False])
def test_a_replicated_table(pooled: bool, nodes: int) -> None:
    """Lookups, update and memory are TorchRec's; the all-reduce by hand, and the gradient that it forgets."""
    cluster = H100.with_nodes(nodes)
    module = bags_model(*({"s__a": (8000, 64)}, None) if pooled else ({}, {"s__a": (8000, 64)}))
    theirs = torchrec_shard(module, "ebc" if pooled else "ec", "s__a", "data_parallel", DENSE, (8000, 64), cluster, 3.0)
    table = Table("ebc", "s__a", 8000, 64, pooled=pooled, ids=3.0, vectors=1.0 if pooled else 3.0)
    ours = shard_cost(table, "data_parallel", DENSE, 8000, 64, cluster, Workload(BATCH))
    ms, gradient = dict(zip(PARTS, ours.ms, strict=True)), 4 * 8000 * 64
    assert ms["lookup_forward"] == pytest.approx(theirs.perf.fwd_compute)
    assert ms["lookup_backward"] == pytest.approx(theirs.perf.bwd_compute)
    # 2 machines: 3/2 of the gradient over 8 network cards; 4: twice 3/2 of it.
    their_sum = {1: 1, 2: 1.5, 4: 3}[nodes] * gradient / (8 * 50e9) * 1e3
    assert ms["optimizer"] == pytest.approx(theirs.perf.bwd_comms - their_sum)
    by_hand = 2 * gradient / 450e9 + (2 * gradient / (8 * 50e9) if nodes > 1 else 0)
    assert ms["gradient_all_to_all"] == pytest.approx(by_hand * 1e3)
    assert ms["input_all_to_all"] == ms["output_all_to_all"] == 0
    assert sum(ours.hbm) == theirs.storage.hbm + gradient


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_as_fast_as_torchrec_says(kernel: str) -> None:
    module = bags_model({"s__a": (8000, 64)})
    theirs = torchrec_shard(module, "ebc", "s__a", "table_wise", kernel, (8000, 64), H100, 1.0)
    ours = shard_cost(Table("ebc", "s__a", 8000, 64), "table_wise", kernel, 8000, 64, H100, Workload(BATCH))
    assert ours.ms[PARTS.index("lookup_forward")] == pytest.approx(theirs.perf.fwd_compute)
    assert (sum(ours.ddr) > 0) == (kernel != FUSED)


def test_memory_of_kernels() -> None:
    table = Table("ebc", "s__a", 1000, 8, state="row")

    def memory(kernel: str):
        cost = shard_cost(table, "table_wise", kernel, 1000, 8, H100, Workload(BATCH), 0.25)
        return cost.hbm[:2], cost.ddr

    assert memory(FUSED) == ((32000, 4000), (0, 0, 0))
    assert memory(UVM) == ((0, 0), (32000, 4000, 0))
    assert memory(CACHING) == ((8000 + 1000 * (4 + 4), 0), (32000, 4000, 0))
    on_cpu = shard_cost(table, "table_wise", FUSED, 1000, 8, NAMED["cpu"], Workload(BATCH))
    assert on_cpu.hbm == (0, 0, 0) and on_cpu.ddr[:2] == (32000, 4000)


def test_half_precision_on_the_way_halves_communication_whatever_the_tables_have() -> None:
    def sent(value_bytes: int, communication: str) -> float:
        table = Table("ebc", "s__a", 1000, 64, value_bytes=value_bytes)
        cost = shard_cost(table, "table_wise", FUSED, 1000, 64, H100, Workload(BATCH, communication))
        return cost.ms[PARTS.index("output_all_to_all")]

    assert sent(4, "fp32") == sent(2, "fp32") == 2 * sent(4, "fp16") == 2 * sent(2, "bf16")
    module = bags_model({"s__a": (1000, 64)})
    for communication in ("fp32", "fp16"):
        theirs = torchrec_shard(module, "ebc", "s__a", "table_wise", FUSED, (1000, 64), H100, 1.0, communication)
        assert sent(4, communication) == pytest.approx(theirs.perf.fwd_comms)


def test_input_and_optimizer_formulas() -> None:
    """By hand: 16 processes of 96 examples, 3 ids each in one feature, 2 machines."""
    cluster = H100.with_nodes(2)
    table = Table("ebc", "s__a", 500, 64, ids=3.0, vectors=1.0)
    for kind, split in (("table_wise", 1), ("row_wise", 16), ("table_row_wise", 8)):
        ms = shard_cost(table, kind, FUSED, 500, 64, cluster, Workload(BATCH)).ms
        ids, lengths = 4 * BATCH * 3 * 16 / split, 4 * BATCH * 16
        assert ms[PARTS.index("input_all_to_all")] == pytest.approx((ids + lengths) / 50e9 * 1e3)
        touched = min(500, BATCH * 3 * 16 / split)
        assert ms[PARTS.index("optimizer")] == pytest.approx(2 * 32 * touched / 3.35e12 * 1e3)
    without = replace(table, state="none")
    assert shard_cost(without, "table_wise", FUSED, 500, 64, cluster, Workload(BATCH)).ms[-1] == 0


def test_bytes_that_are_sent() -> None:
    """By hand: 2 machines of 8, 96 examples each, 3 ids in one feature; a table of 500 x 64 and half its columns."""
    cluster, work = H100.with_nodes(2), Workload(BATCH)
    pooled, rows = Table("ebc", "a", 500, 64, ids=3.0), Table("ec", "a", 500, 64, ids=3.0, vectors=3.0, pooled=False)
    examples = 16 * BATCH

    def sent(table: Table, kind: str, columns: int = 64) -> tuple[int, ...]:
        return tuple(sent_bytes(table, kind, columns, cluster, work).values())

    vectors = examples * 64 * 4
    assert sent(pooled, "table_wise") == (examples * (3 * 4 + 4), vectors, vectors)
    assert sent(pooled, "row_wise") == (examples * (3 * 4 + 16 * 4) // 16, vectors, vectors)  # of 16 shards each
    assert sent(pooled, "column_wise", 32) == (examples * (3 * 4 + 4), vectors // 2, vectors // 2)
    assert sent(pooled, "table_row_wise") == (examples * (3 * 4 + 8 * 4) // 8, vectors * 9 // 8, vectors * 9 // 8)
    assert sent(rows, "row_wise") == (examples * (3 * 4 + 16 * 4) // 16, vectors * 3 // 16, vectors * 3 // 16)
    half = sent_bytes(pooled, "table_wise", 64, cluster, Workload(BATCH, "fp16"))
    assert half["output_all_to_all"] == vectors // 2 and half["input_all_to_all"] == examples * 16
    mixed = sent_bytes(pooled, "table_wise", 64, cluster, Workload(BATCH, "fp16", gradient_communication="fp32"))
    assert mixed == half | {"gradient_all_to_all": vectors}
    gradient = 4 * 500 * 64  # of the whole table: twice on the machine, twice an eighth of it between machines
    assert sent(pooled, "data_parallel") == (0, 0, 2 * gradient + 2 * gradient // 8)
    assert sent_bytes(pooled, "table_wise", 64, replace(H100, ranks_per_node=1), work) == {}


def test_tables_say_what_they_send_and_who_spends_most() -> None:
    module, cluster = bags_model({"s__a": (8000, 64), "s__b": (8001, 64)}), H100
    for kind in ("table_wise", "row_wise"):
        a, b = plan_for(module, cluster, kind=kind, batch_size=BATCH).prediction.tables
        shards = len(a.ranks)
        assert a.sent["output_all_to_all"] == shards * 8 * BATCH * 64 * 4
        assert a.slowest_ms == pytest.approx(sum(a.ms.values()) / shards)  # equal shards
        assert b.slowest_ms == pytest.approx(a.slowest_ms, rel=1e-3)
        other = next(way for way in a.alternatives if way.sharding_type == "column_wise")
        assert other.shards == 4 and other.ms is not None and other.ms < sum(a.ms.values())
    both = make_plan(module, kind="table_wise", world_size=1, local_world_size=1, device_type="cuda")
    alone = predict(module, both, replace(cluster, ranks_per_node=1)).tables[0]
    assert alone.sent == {} and alone.slowest_ms == pytest.approx(sum(alone.ms.values()))


def test_one_process_sends_nothing() -> None:
    alone = replace(H100, ranks_per_node=1)
    ms = dict(
        zip(PARTS, shard_cost(Table("e", "a", 99, 8), "table_wise", FUSED, 99, 8, alone, Workload()).ms, strict=True)
    )
    assert ms["input_all_to_all"] == ms["output_all_to_all"] == ms["gradient_all_to_all"] == 0 < ms["lookup_forward"]


# Ways: what is possible, and why the rest is not.


def reasons(table: Table, cluster=None, rule: Rule | None = None, reserved: float = 0.15) -> dict[str, str]:
    _, impossible = ways(table, rule or Rule(), cluster or H100.with_nodes(2), Workload(BATCH, reserved=reserved))
    return {a.sharding_type: a.impossible or "" for a in impossible}


def test_why_ways_are_impossible() -> None:
    few = reasons(Table("ebc", "a", 9, 64))
    assert few["row_wise"] == "9 rows do not give each of 16 processes a block of rows"
    assert few["table_row_wise"] == "9 rows do not give each of 8 processes a block of rows"
    assert "table_wise" not in few and "column_wise" not in few
    assert reasons(Table("ebc", "a", 999, 12))["column_wise"].startswith("12 columns cannot be cut: blocks of 16")
    sequences = reasons(Table("ec", "a", 999, 64, pooled=False))
    assert all(
        sequences[kind].startswith("not offered for sequences") for kind in POOLED_TYPES if kind not in UNPOOLED_TYPES
    )
    huge = reasons(Table("ebc", "a", 10**9, 64))
    assert huge["table_wise"].startswith(
        "too big for one process: a shard takes 242.1 GiB of hbm, 67.1 GiB of 79.0 GiB"
    )
    assert "row_wise" not in huge and "table_row_wise" not in huge
    assert reasons(Table("ebc", "a", 999, 64), H100)["table_row_wise"] == "one machine only: the same as row_wise"
    one = reasons(Table("ebc", "a", 999, 64), replace(H100, ranks_per_node=1))
    assert one["row_wise"] == "one process: the same as table_wise"


def test_columns_are_possible_but_not_chosen_unless_asked_for() -> None:
    table = Table("ebc", "a", 999, 64)
    options, _ = ways(table, Rule(), H100, Workload())
    excluded = {o.sharding_type: o.excluded for o in options if o.excluded}
    assert excluded.keys() == {"column_wise", "data_parallel"} and "row-wise Adagrad" in excluded["column_wise"]
    options, _ = ways(table, Rule(types=("column_wise",)), H100, Workload())
    assert {o.sharding_type for o in options if not o.excluded} == {"column_wise"}


# Whole predictions.

TABLES = {"s1__a": (5000, 64), "s1__b": (300, 64), "s2__a": (5000, 16), "s2__b": (7, 16)}
ROWS = {"s1__h": (900, 32)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "nodes"), [("h100x8", 2), ("cpu", 2)])
def test_parts_add_up_for_every_kind_of_plan(kind: str, name: str, nodes: int) -> None:
    module, cluster = bags_model(TABLES, ROWS), cluster_of(name, nodes)
    planned = plan_for(module, cluster, kind=kind, batch_size=BATCH)
    prediction = planned.prediction
    memory = cluster.memory_kind
    held = sum(v for r in prediction.ranks for k, v in getattr(r, memory).items() if k != "reserved")
    assert held == pytest.approx(sum(t.hbm_bytes + t.ddr_bytes for t in prediction.tables), abs=4 * cluster.world_size)
    weights = sum(getattr(r, memory)["tables"] for r in prediction.ranks)
    copies = cluster.world_size if kind == "data_parallel" else 1
    assert weights == copies * sum(4 * n * d for n, d in (TABLES | ROWS).values())
    groups = {(t.module, t.sharding_type) for t in prediction.tables}
    latency = cluster.all_to_all_latency_ms * sum(1 if kind == "data_parallel" else 5 for _, kind in groups)
    spent = sum(sum(t.ms.values()) for t in prediction.tables)
    total = sum(r.total_ms for r in prediction.ranks)
    assert spent < total and total - spent >= latency * cluster.world_size * 0.999
    assert all(set(r.ms) == set(PARTS) for r in prediction.ranks)
    assert prediction.planner["kind"] == kind and prediction.seconds > 0
    again = predict(module, planned.plan, cluster, batch_size=BATCH)
    assert (again.ranks, again.tables) == (prediction.ranks, prediction.tables)
    assert PlanPrediction.from_dict(prediction.to_dict()) == prediction


def test_tables_say_their_set_and_their_alternatives() -> None:
    prediction = plan_for(bags_model(TABLES), H100, batch_size=BATCH).prediction
    table = prediction.tables[0]
    assert (table.embedding_set, table.field, table.rows, table.dim, table.data_type) == ("s1", "a", 5000, 64, "fp32")
    others = {a.sharding_type: a for a in table.alternatives}
    assert set(others) == set(POOLED_TYPES) - {table.sharding_type}
    assert others["table_row_wise"].ms is None and others["table_row_wise"].impossible
    assert others["column_wise"].ms and "not chosen by itself" in (others["column_wise"].impossible or "")
    other = others["row_wise" if table.sharding_type == "table_wise" else "table_wise"]
    assert other.impossible is None and (other.ms or 0) > 0 and (other.hbm_bytes or 0) > 0


def test_pooling_factors_reach_the_estimate() -> None:
    module = bags_model(TABLES, ROWS)

    def ids(**given) -> dict[str, tuple[float, float]]:
        tables, _ = read_tables(module, Constraints(**given), H100)
        return {t.name: (t.ids, t.vectors) for t in tables}

    found = ids(pooling={"a": 20.0, "s2__a": 0.5, "h": 7.0}, tables={"s1__b": Constraint(pooling_factor=2.5)})
    assert found == {
        "s1__a": (20.0, 1.0),
        "s1__b": (2.5, 1.0),
        "s2__a": (0.5, 0.5),
        "s2__b": (1.0, 1.0),
        "s1__h": (7.0, 7.0),
    }
    with pytest.raises(PlanError, match="sharding.pooling:\n  unknown field 'hist'"):
        ids(pooling={"hist": 3.0})
    slow = plan_for(module, H100, constraints=Constraints(pooling={"a": 500.0})).prediction
    assert slow.critical_ms > 1.5 * plan_for(module, H100).prediction.critical_ms


@pytest.mark.parametrize(
    ("optimizer", "per_table"), [(torch.optim.SGD, 0), (torch.optim.Adagrad, 4 * 100 * 8), (torch.optim.Adam, 8 * 800)]
)
def test_optimizer_state_is_counted(optimizer: type, per_table: int) -> None:
    prediction = plan_for(bags_model({"s__a": (100, 8)}, optimizer=optimizer), H100).prediction
    assert sum(r.hbm["optimizer"] for r in prediction.ranks) == per_table


def test_half_precision_tables_take_half() -> None:
    half = plan_for(bags_model({"s__a": (100, 8)}, data_type=DataType.FP16), H100).prediction
    assert sum(r.hbm["tables"] for r in half.ranks) == 2 * 100 * 8 and half.tables[0].data_type == "fp16"
    assert sum(r.hbm["optimizer"] for r in half.ranks) == 4 * 100  # one float32 per row


def test_notes_say_what_a_person_should_know() -> None:
    module = bags_model({"s__a": (10**9, 64)})
    plan = make_plan(module, kind="table_wise", world_size=8, local_world_size=8, device_type="cuda")
    assert (
        "does not fit: the fullest process needs 254.0 GiB of hbm, it has 79.0 GiB" in predict(module, plan, H100).notes
    )
    small = replace(H100, hbm_bytes=GB // 100)
    wide = bags_model({"s__a": (100, 64)})
    wide["dense"] = torch.nn.Linear(1000, 1000, device=META)
    notes = plan_for(wide, small, batch_size=2).prediction.notes
    assert any("dense part and its optimizer take about" in n and "sharding.reserved" in n for n in notes)
    cached = Constraints({"*": Constraint(kernels=("fused_uvm_caching",))})
    notes = plan_for(bags_model({"s__a": (100, 64)}), H100, constraints=cached).prediction.notes
    assert any("prefetch time is not predicted" in n for n in notes)
