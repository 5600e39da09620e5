"""The planner's choices: never slower than one sharding type everywhere, within the memory, fast for huge models."""

import time
from dataclasses import replace

import numpy as np
import pytest
from planning import bags_model, types_in
from torchrec.modules.embedding_configs import DataType

from hmoe_rec.sharding.balance import Group, balance
from hmoe_rec.sharding.constraints import Constraint, Constraints, Rule
from hmoe_rec.sharding.options import Table, Workload
from hmoe_rec.sharding.planner import KINDS, PlannedModel, plan_for
from hmoe_rec.sharding.search import Failure, Found, make_space, search
from hmoe_rec.sharding.suggestions import DoesNotFitError
from hmoe_rec.sharding.topology import GB, NAMED, Cluster, cluster_of
from hmoe_rec.types import PlanError

H100, CPU = NAMED["h100x8"], NAMED["cpu"]
ASKED_FOR = ("column_wise", "table_column_wise", "grid_shard", "data_parallel")  # never chosen by itself


def log_uniform(count: int, smallest: float, largest: float, seed: int = 1) -> list[int]:
    draws = np.random.default_rng(seed).uniform(np.log(smallest), np.log(largest), count)
    return [int(n) for n in np.exp(draws)]


def many(count: int, sets: int = 4, largest: float = 3e7) -> dict[str, tuple[int, int]]:
    rows = log_uniform(count // sets, 1e3, largest)
    return {f"s{s}__f{i}": (n, 16 * (s % 2 + 1)) for s in range(sets) for i, n in enumerate(rows)}


def fullest(planned: PlannedModel) -> float:
    """Share of the memory of the fullest process, what is reserved included."""
    kind = planned.cluster.memory_kind
    return max(sum(getattr(r, kind).values()) for r in planned.prediction.ranks) / planned.cluster.memory_bytes


@pytest.mark.parametrize(
    "cluster",
    [H100, H100.with_nodes(4), replace(CPU, ddr_bytes=32 * GB), replace(CPU, nodes=2, ranks_per_node=4)],
    ids=["gpu", "gpus", "cpu", "cpus"],
)
@pytest.mark.parametrize("tables", [many(24), many(80, largest=3e5), {"a": (5, 8)}], ids=["few", "more", "one"])
def test_auto_is_not_slower_than_any_kind_that_fits(cluster: Cluster, tables: dict) -> None:
    model = bags_model(tables, {"s9__h": (4000, 16)})
    auto = plan_for(model, cluster, batch_size=1024)
    assert fullest(auto) <= 1.0
    assert not set(types_in(auto).values()) & set(ASKED_FOR)
    for kind in KINDS:
        if kind not in ("auto", "torchrec", *ASKED_FOR):
            other = plan_for(model, cluster, kind=kind, batch_size=1024)
            if fullest(other) <= 1.0:
                assert auto.prediction.critical_ms <= other.prediction.critical_ms * 1.001, kind


def test_small_tables_are_replicated_where_that_is_allowed_and_faster() -> None:
    bags, rows = {"s__small": (20, 16), "s__large": (10**6, 16)}, {"s__h": (30, 16)}
    model, cluster = bags_model(bags, rows), replace(CPU, nodes=2, ranks_per_node=4)
    allowed = Constraints({"*": Constraint(types=("table_wise", "row_wise", "data_parallel"))})
    planned = plan_for(model, cluster, batch_size=1024, constraints=allowed)
    assert types_in(planned) == {"s__small": "data_parallel", "s__large": "row_wise", "s__h": "data_parallel"}
    assert planned.layouts["ebc"]["s__small"].ranks.tolist() == list(range(8))
    assert planned.prediction.critical_ms < plan_for(model, cluster, batch_size=1024).prediction.critical_ms
    few = Constraints({"s__small": Constraint(types=("data_parallel",), ranks=(0, 1))})
    with pytest.raises(PlanError, match="data_parallel: takes all 8 processes, but a constraint allows 2"):
        plan_for(model, cluster, constraints=few)


def test_memory_of_replicated_tables_is_on_every_process() -> None:
    """Weights, statistics and gradient; a table that is too big says so."""
    only = Constraints({"*": Constraint(types=("data_parallel",))})
    prediction = plan_for(bags_model({"s__a": (1000, 16)}), H100, batch_size=8, constraints=only).prediction
    ids_and_vectors = 8 * 8 + 8 * 16 * 4
    for rank in prediction.ranks:
        assert (rank.hbm["tables"], rank.hbm["optimizer"]) == (64000, 4000)
        assert rank.hbm["activations"] == 64000 + ids_and_vectors
    with pytest.raises(PlanError, match="data_parallel: too big for one process"):
        plan_for(bags_model({"s__a": (10**9, 64)}), H100, constraints=only)
    half = bags_model({"s__a": (1000, 16)}, data_type=DataType.FP16)
    with pytest.raises(PlanError, match="data_parallel: takes fp32 tables only .its gradient would be summed in fp16"):
        plan_for(half, H100, constraints=only)


def test_column_blocks_of_sequences_have_one_width_in_a_collection() -> None:
    """TorchRec fails or damages its memory otherwise."""

    def widths(rows: int, **ranks: tuple[int, ...]) -> dict[str, set[int]]:
        rules = {"*": Constraint(types=("column_wise",), min_partition=4)}
        rules |= {name: Constraint(ranks=given) for name, given in ranks.items()}
        model = bags_model({}, {"s__a": (1000, 64), "s__b": (rows, 64), "s__c": (rows, 64)})
        layouts = plan_for(model, H100, constraints=Constraints(rules)).layouts["ec"]
        return {name: set(x.sizes[:, 1].tolist()) for name, x in layouts.items()}

    assert widths(2000) == dict.fromkeys(("s__a", "s__b", "s__c"), {8})
    assert widths(2000, s__a=(0, 1, 2, 3)) == dict.fromkeys(("s__a", "s__b", "s__c"), {16})
    with pytest.raises(PlanError, match="(?s)'s__a'.*column_wise: other tables of this collection have blocks of 8"):
        widths(7 * 10**8, s__a=(0, 1))  # the large ones fit as 4 or 8 blocks, two processes hold 2


def test_auto_is_not_slower_than_torchrecs_planner() -> None:
    model, cluster = bags_model(many(60)), H100.with_nodes(2)
    auto, theirs = (plan_for(model, cluster, kind=kind, batch_size=1024) for kind in ("auto", "torchrec"))
    assert auto.prediction.critical_ms <= theirs.prediction.critical_ms * 1.001


def test_row_wise_is_chosen_on_cpu() -> None:
    """TorchRec's own planner does not offer it there."""
    cluster = replace(CPU, ddr_bytes=GB)
    planned = plan_for(bags_model({"s__a": (24 * 10**6, 16)}), cluster)  # by memory: it fits into two processes
    assert types_in(planned) == {"s__a": "row_wise"}
    hot = Constraints({"s__hot": Constraint(pooling_factor=100.0)})
    planned = plan_for(bags_model({"s__hot": (10**5, 16), "s__b": (10**5, 16)}), cluster, constraints=hot)
    assert types_in(planned)["s__hot"] == "row_wise"  # by time: one process would do nearly all the work
    planned = plan_for(bags_model({}, {"s__a": (24 * 10**6, 16)}), cluster)
    assert types_in(planned) == {"s__a": "row_wise"}


def test_the_machines_memory_is_used_where_it_is_allowed_and_needed() -> None:
    small = replace(H100, hbm_bytes=GB)
    tables = {f"s__f{i}": (4 * 10**6, 64) for i in range(12)}  # 12 x 0.95 GB, 8 processes x 0.85 GB
    with pytest.raises(DoesNotFitError):
        plan_for(bags_model(tables), small, batch_size=4096)
    cached = Constraints({"*": Constraint(kernels=("fused", "fused_uvm_caching"), cache_load_factor=0.1)})
    planned = plan_for(bags_model(tables), small, batch_size=4096, constraints=cached)
    kernels = [x.kernel for x in planned.layouts["ebc"].values()]
    assert 0 < kernels.count("fused_uvm_caching") < 12 and fullest(planned) <= 1.0
    assert sum(r.ddr["tables"] for r in planned.prediction.ranks) == kernels.count("fused_uvm_caching") * 1024 * 10**6


def test_progress_and_time_limit() -> None:
    seen: list[tuple[str, float]] = []
    model = bags_model(many(80))
    planned = plan_for(model, H100.with_nodes(8), progress=lambda text, done: seen.append((text, done)))
    assert seen and all(0 <= done <= 1 for _, done in seen) and not planned.prediction.planner["timed_out"]
    short = plan_for(model, H100.with_nodes(8), seconds=1e-9)
    assert short.prediction.planner["timed_out"] and fullest(short) <= 1.0


def test_tables_that_differ_in_name_only_are_priced_once() -> None:
    tables = [Table("ebc", f"t{i}", 1000, 16, feature_names=(f"t{i}",)) for i in range(50)]
    space = make_space(tables, {t.name: Rule() for t in tables}, H100, Workload())
    assert len({id(o) for options in space.options for o in options}) == len(space.options[0])


def test_the_first_plan_is_enough_to_see_that_there_is_one() -> None:
    tables = [Table("ebc", f"t{i}", 10**6, 16) for i in range(20)]
    rules = {t.name: Rule() for t in tables}
    space = make_space(tables, rules, H100, Workload())
    found, best = search(space, H100, Workload(), first=True), search(space, H100, Workload())
    assert isinstance(found, Found) and isinstance(best, Found) and best.ms <= found.ms
    tiny = replace(H100, hbm_bytes=10**6)
    assert isinstance(search(make_space(tables, rules, tiny, Workload()), tiny, Workload(), first=True), Failure)


def ads_tables(count: int, sigma: float, hot: bool = False) -> list[Table]:
    """A terabyte in four sets: rows of log-normal size; hot: a fifth of the fields have up to 50 ids."""
    rng = np.random.default_rng(1)
    rows, dims = np.exp(rng.normal(0, sigma, count // 4)), (32, 64, 64, 128)
    ids = np.where(rng.random(len(rows)) < 0.2, rng.integers(2, 50, len(rows)), 1) if hot else np.ones(len(rows))
    rows = np.maximum(10_000, rows * 1e12 / (4 * sum(dims) * rows.sum())).astype(int)
    return [
        Table("ebc", f"s{s}__f{i}", int(rows[i]), dims[s], ids=float(ids[i]))
        for s in range(4)
        for i in range(len(rows))
    ]


def found_on(nodes: int, tables: list[Table]) -> tuple[Found, float]:
    """The plan, and the load of its busiest process over the mean."""
    cluster, work = H100.with_nodes(nodes), Workload(1024)
    found = search(make_space(tables, {t.name: Rule() for t in tables}, cluster, work), cluster, work)
    assert isinstance(found, Found)
    busy = np.zeros(cluster.world_size)
    for option, ranks in zip(found.options, found.ranks, strict=True):
        busy[ranks] += option.shard_ms
    return found, float(busy.max() / busy.mean())


def test_tables_without_room_do_not_cut_all_the_others() -> None:
    """88 % of the memory: whole tables leave no room for the last ones; cutting all 200 would take 5.7 ms."""
    found, _ = found_on(2, ads_tables(200, 2.0))
    types = [o.sharding_type for o in found.options]
    assert 0 < len(types) - types.count("table_wise") < 20 and found.ms < 4


def test_tables_change_places_where_memory_decided_before() -> None:
    """88 % of the memory, and times that sizes say nothing of: by the largest first, 1.059."""
    found, imbalance = found_on(2, ads_tables(400, 1.5, hot=True))
    assert {o.sharding_type for o in found.options} == {"table_wise"} and imbalance < 1.02


@pytest.mark.parametrize("width", [1, 2])
def test_exchanges_lower_the_highest_load_and_keep_the_books(width: int) -> None:
    rng = np.random.default_rng(width)
    slots = np.arange(8).reshape(-1, width)
    tables, ms, size = np.arange(30), rng.uniform(1, 9, 30), rng.uniform(1, 9, (30, 2))
    start = rng.integers(0, len(slots), 30)

    def books(slot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        busy, held = np.zeros(8), np.zeros((2, 8))
        for i, s in enumerate(slot):
            busy[slots[s]] += ms[i]
            held[:, slots[s]] += size[i][:, None]
        return busy, held

    busy, held = books(start)
    capacity = held.max() + 5  # the fullest slot can take one table more, or none
    free, before = capacity - held, busy.max()
    group = Group(tables, slots, start.copy(), ms, size)
    balance(busy, free, [group], time.perf_counter() + 60)
    now, held = books(group.slot)
    np.testing.assert_allclose(busy, now)
    np.testing.assert_allclose(free, capacity - held)
    assert free.min() >= 0 and busy.max() < 0.8 * before and busy.max() < 1.05 * busy.mean()
    again = busy.max()
    balance(busy, free, [Group(tables, slots, group.slot, ms, size)], time.perf_counter() + 60)
    assert busy.max() == again, "it stopped where nothing helps"


# It does not fit: what is missing, who is responsible, and what was tried.


def error_of(model, cluster: Cluster, constraints: Constraints | None = None, batch_size: int = 64) -> DoesNotFitError:
    with pytest.raises(DoesNotFitError) as caught:
        plan_for(model, cluster, constraints=constraints, batch_size=batch_size)
    return caught.value


def test_what_is_missing_and_what_makes_it_fit() -> None:
    small = replace(H100, hbm_bytes=GB)
    error = error_of(bags_model({f"s{i % 2}__f{i}": (4 * 10**6, 64) for i in range(15)}), small)
    text = str(error)
    assert (
        "no sharding plan for 8 processes (1 x 8, 1.0 GiB of hbm each, 870.4 MiB of it usable): it does not fit" in text
    )
    assert "6.8 GiB are usable" in text and "too little" in text and "per process" in text
    assert error.missing_bytes > 15 * 4 * 10**6 * 65 * 4 - 8 * 0.85 * GB
    assert "largest tables: s0__f0 976.6 MiB" in text and error.largest[0] == ("s0__f0", 1024 * 10**6)
    fits = [s for s in error.suggestions if s.fits]
    assert fits and all(s.ms for s in fits) and list(error.suggestions[: len(fits)]) == fits
    what = [s.what for s in fits]
    assert "3 nodes instead of 1 (24 processes)" in what, what
    assert any("fused_uvm_caching] for all tables" in w and "tables use it" in w for w in what)
    assert "what makes it fit, each tried by the planner:\n    1. " in text


def test_suggestions_hold_when_they_are_followed() -> None:
    tables = {f"s{i % 2}__f{i}": (4 * 10**6, 64) for i in range(14)}
    small = replace(H100, hbm_bytes=GB)
    error = error_of(bags_model(tables), small)
    nodes = next(int(s.what.split()[0]) for s in error.suggestions if s.fits and "nodes instead" in s.what)
    assert fullest(plan_for(bags_model(tables), small.with_nodes(nodes), batch_size=64)) <= 1.0
    with pytest.raises(DoesNotFitError):
        plan_for(bags_model(tables), small.with_nodes(nodes - 1), batch_size=64)
    for narrow in (s for s in error.suggestions if s.what == "all sets half as wide"):
        halved = bags_model({name: (rows, dim // 2) for name, (rows, dim) in tables.items()})
        if narrow.fits:
            plan_for(halved, small, batch_size=64)
        else:
            error_of(halved, small)


def test_a_constraint_that_makes_it_too_big_is_named() -> None:
    small = replace(H100, hbm_bytes=GB)
    whole = Constraints({"s__big": Constraint(types=("table_wise",))})
    error = error_of(bags_model({"s__big": (8 * 10**6, 64), "s__b": (1000, 64)}), small, whole)
    text = str(error)
    assert "table 's__big' (1.9 GiB) has no way to be sharded" in text
    assert "table_wise: too big for one process" in text and "row_wise: excluded by a constraint: types table_w" in text
    assert "types: allow row_wise and table_row_wise for s__big" in [s.what for s in error.suggestions if s.fits]


def test_room_in_sum_but_not_for_a_shard_is_said() -> None:
    small = replace(H100, hbm_bytes=GB)
    whole = Constraints({"s": Constraint(types=("table_wise",))})
    error = error_of(bags_model({f"s__f{i}": (2 * 10**6, 64) for i in range(9)}), small, whole)
    assert error.missing_bytes == 0
    assert "found no room as table_wise: a shard takes 496." in str(error)


def test_rules_that_leave_nothing_are_not_called_too_little_memory() -> None:
    never = Constraints({"s__a": Constraint(types=("grid_shard",))})
    with pytest.raises(PlanError, match="(?s)no sharding type is allowed.*'s__a'.*columns cannot be cut") as caught:
        plan_for(bags_model({"s__a": (100, 8)}), H100, constraints=never)
    assert not isinstance(caught.value, DoesNotFitError)


# Scale.


def terabytes(amount: float, count: int, sets: int = 4, dim: int = 64) -> dict[str, tuple[int, int]]:
    """Tables of 1e4 to 1e9 rows before scaling, in equal sets: names differ, sizes repeat."""
    rows = np.array(log_uniform(count // sets, 1e4, 1e9))
    scale = amount * 1e12 / (rows.sum() * dim * 4 * sets)
    return {f"s{s}__f{i}": (max(8192, int(n * scale)), dim) for s in range(sets) for i, n in enumerate(rows)}


def test_a_terabyte_on_512_processes_takes_seconds() -> None:
    model, cluster = bags_model(terabytes(1, 200)), cluster_of("h100x8", 64)
    begin = time.perf_counter()
    planned = plan_for(model, cluster, batch_size=2048)
    assert time.perf_counter() - begin < 20
    assert fullest(planned) <= 1.0 and planned.prediction.imbalance < 3


@pytest.mark.slow
def test_ten_terabytes_on_128_nodes_take_less_than_a_minute() -> None:
    model, cluster = bags_model(terabytes(10, 2000)), cluster_of("h100x8", 128)
    begin = time.perf_counter()
    planned = plan_for(model, cluster, batch_size=2048)
    assert time.perf_counter() - begin < 60
    assert fullest(planned) <= 1.0
    assert sum(r.hbm["tables"] for r in planned.prediction.ranks) == pytest.approx(10e12, rel=0.01)
    assert set(types_in(planned).values()) <= {"table_wise", "table_row_wise", "row_wise"}
    assert len(planned.plan.plan["ebc"]) == 2000
