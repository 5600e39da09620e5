"""Plans place every value once, are the same everywhere, survive a file, and belong to one model and one job."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from gloo import run_ranks
from hand_plans import place
from planning import bags_model
from tiny_model import BAGS, ROWS, TinyModel, apply_table_optimizer, batch_of
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import DataType

from hmoe_rec.embedding.initialization import initialize_tables
from hmoe_rec.sharding.constraints import HOST_TYPES, Constraint, Constraints
from hmoe_rec.sharding.options import fills
from hmoe_rec.sharding.plan_file import (
    check_plan,
    diff_plans,
    load_plan,
    plan_from_dict,
    plan_to_dict,
    read_plan,
    save_plan,
)
from hmoe_rec.sharding.planner import KINDS, make_plan, plan_for, sharders
from hmoe_rec.sharding.topology import NAMED
from hmoe_rec.types import PlanError

CPU = torch.device("cpu")

# Widths that cut by columns (8, 16) and one that does not (6); rows that fill 4 shards and some that do not (3).
MIXED = {"s__a": (40, 8), "s__b": (3, 8), "t__a": (17, 16), "u__a": (50, 6)}


def model_of(bags: dict = MIXED) -> TinyModel:
    model = TinyModel(bags=bags)
    apply_table_optimizer(model)
    return model


def plan_of(kind: str, world_size: int = 4, model: TinyModel | None = None, local: int | None = None) -> ShardingPlan:
    return make_plan(
        model or model_of(), kind=kind, world_size=world_size, local_world_size=local or world_size, device_type="cpu"
    )


def types_of(plan: ShardingPlan) -> dict[str, str]:
    return {table: p["sharding_type"] for tables in plan_to_dict(plan).values() for table, p in tables.items()}


@pytest.mark.parametrize(("world_size", "local"), [(4, 2), (8, 2), (6, 3), (3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_for_several_machines_keep_to_their_borders(kind: str, world_size: int, local: int) -> None:
    model = model_of(MIXED | {"t__w": (64, 64)})
    plan = plan_of(kind, world_size, model, local)
    check_plan(plan, model, world_size=world_size, local_world_size=local if world_size % local == 0 else None)
    if kind in HOST_TYPES and world_size % local == 0:
        assert types_of(plan)["t__w"] == kind
        assert types_of(plan)["s__h"] == ("column_wise" if kind == "table_column_wise" else "row_wise")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_pass_the_check_and_are_deterministic(kind: str, world_size: int) -> None:
    model = model_of()
    plan = plan_of(kind, world_size, model)
    check_plan(plan, model, world_size=world_size)
    assert plan_to_dict(plan) == plan_to_dict(plan_of(kind, world_size))
    kernels = {p["compute_kernel"] for tables in plan_to_dict(plan).values() for p in tables.values()}
    assert kernels == {"dense" if kind == "data_parallel" else "fused"}
    replicated = {t for t, found in types_of(plan).items() if found == "data_parallel"}
    assert replicated == ({*MIXED, *ROWS} if kind == "data_parallel" else set())


def test_kinds_do_what_they_say() -> None:
    assert set(types_of(plan_of("table_wise")).values()) == {"table_wise"}
    rows = types_of(plan_of("row_wise"))
    assert rows == {t: "table_wise" if t == "s__b" else "row_wise" for t in [*MIXED, *ROWS]}
    columns = plan_to_dict(plan_of("column_wise"))
    assert len(columns["ebc"]["t__a"]["shards"]) == 4 and len(columns["ebc"]["s__a"]["shards"]) == 2
    assert columns["ebc"]["u__a"]["sharding_type"] == "table_wise"
    assert "column_wise" not in types_of(plan_of("auto")).values()


def test_table_wise_balances_bytes() -> None:
    model = model_of({f"t{i}": (rows, 8) for i, rows in enumerate([100, 90, 80, 70, 60, 50, 40, 30])})
    load = [0] * 4
    for tables in plan_to_dict(plan_of("table_wise", 4, model)).values():
        for p in tables.values():
            load[p["shards"][0]["rank"]] += p["shards"][0]["sizes"][0]
    assert max(load) - min(load) <= 30


def test_fills() -> None:
    for rows in range(1, 40):
        for shards in range(1, 9):
            block = -(-rows // shards)
            sizes = [max(0, min(block, rows - i * block)) for i in range(shards)]
            assert fills(rows, shards) == all(sizes), (rows, shards)


def test_auto_for_two_cuda_machines_is_made_without_a_gpu() -> None:
    bags = {f"s__{i}": (4_000_000 + i, 64) for i in range(20)}
    plan = make_plan(
        model_of(bags), kind="auto", world_size=16, local_world_size=8, device_type="cuda", batch_size=2048
    )
    check_plan(plan, model_of(bags), world_size=16)


def test_auto_says_what_to_do_when_nothing_fits() -> None:
    model = model_of({"huge": (10**12, 128)})
    with pytest.raises(
        PlanError, match="no sharding plan for 2 processes .*it does not fit\n.*need 469\\.\\d TiB at least"
    ):
        plan_of("auto", 2, model)


def outputs_here(rank: int, world_size: int, communication: str) -> list[float]:
    model = model_of(BAGS)
    plan = make_plan(model, kind="row_wise", world_size=world_size, local_world_size=world_size, device_type="cpu")
    sharded = DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders(communication))
    initialize_tables(sharded, seed=1, std=1.0)
    ids, _ = batch_of(0, rank, world_size)
    return sharded(ids).tolist()


@pytest.mark.slow
def test_vectors_may_travel_in_half_precision() -> None:
    exact, half = (torch.tensor(run_ranks(2, outputs_here, c)) for c in ("fp32", "fp16"))
    assert not torch.equal(exact, half)
    torch.testing.assert_close(exact, half, rtol=0, atol=2e-2)


def plan_here(rank: int, world_size: int) -> dict:
    return plan_to_dict(plan_of("auto", world_size))


def test_auto_is_the_same_on_all_ranks() -> None:
    first, second = run_ranks(2, plan_here)
    assert first == second


def fail_here(rank: int, world_size: int) -> str:
    with pytest.raises(PlanError) as error:
        plan_of("auto", world_size, model_of({"huge": (10**12, 128)}))
    return str(error.value)


def test_auto_fails_on_all_ranks() -> None:
    first, second = run_ranks(2, fail_here)
    assert first == second and "no sharding plan" in first


# Files.


@pytest.mark.parametrize("kind", KINDS)
def test_file_round_trip(tmp_path: Path, kind: str) -> None:
    model, path = model_of(), str(tmp_path / "plan.json")
    plan = plan_of(kind, 2, model)
    save_plan(plan, model, path, world_size=2, local_world_size=2)
    assert plan_to_dict(plan_of(path, 2, model)) == plan_to_dict(plan)
    cuda = load_plan(path, model, world_size=2, local_world_size=2, device_type="cuda")
    assert plan_to_dict(cuda) == plan_to_dict(plan)
    spec = cuda.plan["ebc"]["s__a"].sharding_spec
    assert spec is None if kind == "data_parallel" else "cuda:" in str(spec.shards[0].placement)


def saved(tmp_path: Path, change=None) -> str:
    model, path = model_of(), tmp_path / "plan.json"
    save_plan(plan_of("row_wise", 2, model), model, str(path), world_size=2, local_world_size=2)
    if change:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return str(path)


def set_in(*keys):
    """A change of a plan file: the last of `keys` is the value."""

    def change(content: dict) -> None:
        for key in keys[:-2]:
            content = content[key]
        content[keys[-2]] = keys[-1]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("schema", "x"), "expected a JSON object with schema"),
        (set_in("version", 3), "version 3"),
        (set_in("world_size", 8), "plan for 8 processes, this job has 2"),
        (set_in("tables", "ebc", "s__a", [41, 8]), "'s__a' has 41 rows x 8 in the plan, 40 x 8 in the model"),
        (lambda c: c["tables"]["ebc"].pop("s__a"), "table 's__a' of module 'ebc' is missing"),
        (lambda c: c["tables"]["ebc"].update(s__z=[5, 8]), "table 's__z' of module 'ebc' is not in the model"),
        (lambda c: c["plan"]["ebc"].pop("s__a"), "table 's__a' of module 'ebc' is missing"),
        (lambda c: c.pop("plan"), "damaged plan: KeyError"),
        (set_in("plan", "ebc", "s__a", 5), "damaged plan: TypeError"),
        (
            set_in("plan", "ebc", "s__a", "sharding_type", "sideways"),
            "sharding type 'sideways'; expected one of table_wise",
        ),
        (
            set_in("plan", "ebc", "s__a", "sharding_type", "data_parallel"),
            "data_parallel takes kernel 'dense' and no sh",
        ),
        (set_in("plan", "ebc", "s__a", "compute_kernel", "dense"), "kernel 'dense'; expected one of fused"),
        (set_in("data_types", "ebc", "s__a", "fp16"), "'s__a' is fp16 in the plan, fp32 in the model"),
        (set_in("plan", "ec", "s__h", "sharding_type", "table_row_wise"), "'s__h': sharding type 'table_row_wise'"),
        (set_in("plan", "ebc", "s__a", "shards", []), "no shards"),
        (set_in("plan", "ebc", "s__a", "shards", 0, "rank", 7), "shard on rank 7, but ranks are 0 to 1"),
        (set_in("plan", "ebc", "s__a", "shards", 0, "rank", 1), "row_wise takes one shard per process"),
        (
            set_in("plan", "ebc", "s__a", "shards", 1, "sizes", [19, 8]),
            "do not cover 40 rows x 8 columns exactly once",
        ),
        (set_in("plan", "ebc", "s__a", "shards", 1, "sizes", [0, 8]), "is empty"),
        (set_in("plan", "ebc", "s__a", "sharding_type", "table_wise"), "table_wise takes one shard, got 2"),
        (set_in("plan", "ebc", "s__a", "cache_load_factor", 9), "cache_load_factor 9; expected a share"),
    ],
)
def test_a_plan_file_that_does_not_fit_is_refused(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(saved(tmp_path, change), 2)


def test_a_plan_for_other_machines_is_refused_where_it_matters(tmp_path: Path) -> None:
    path = saved(tmp_path, set_in("plan", "ebc", "s__a", "sharding_type", "table_row_wise"))
    with pytest.raises(PlanError, match="for 2 processes per machine, here are 1"):
        plan_of(path, 2, local=1)
    plan_of(saved(tmp_path), 2, local=1)


@pytest.mark.parametrize(("first", "rows"), [((0, 7), (7, 33)), ((20, 0), (20, 20))])
def test_row_blocks_that_torchrec_would_look_up_wrongly_are_refused(tmp_path: Path, first, rows) -> None:
    shards = [{"rank": r, "sizes": [rows[r], 8], "offsets": [first[r], 0]} for r in range(2)]
    path = saved(tmp_path, set_in("plan", "ebc", "s__a", "shards", shards))
    with pytest.raises(
        PlanError, match="'s__a': row_wise takes blocks of 20 rows in the order of the processes; shard"
    ):
        plan_of(path, 2)


def test_what_is_no_plan_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such kind and no such file; did you mean 'row_wise'"):
        plan_of("row_wize")
    for text, message in (("{", "not a JSON file"), ("[]", "expected a JSON object, got a list")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(PlanError, match=message):
            plan_of(str(tmp_path / "bad.json"))


def test_dense_kernels_are_for_replicated_fp32_tables_only() -> None:
    for generator, data_type, message in (
        (table_wise(0, None, "dense"), DataType.FP32, "kernel 'dense'; expected one of"),
        (data_parallel(), DataType.FP16, "takes fp32 tables only, this one is fp16"),
        (data_parallel(), DataType.FP32, None),
    ):
        model = bags_model({"s__a": (40, 8)}, data_type=data_type)
        plan = construct_module_sharding_plan(model["ebc"], {"s__a": generator}, None, 1, 1, "cpu")
        with pytest.raises(PlanError, match=message) if message else nullcontext():
            check_plan(ShardingPlan({"ebc": plan}), model, world_size=1)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"x": (12, 4), "y": (16,)}, "table 'x' of 'ec' has column blocks of widths 12, 4: TorchRec cuts all"),
        (
            {"x": (8, 8), "y": (4, 4, 4, 4)},
            "'y' of 'ec' has column blocks of widths 4, 4, 4, 4 and those of table 'x' are 8",
        ),
        ({"x": (8, 8), "y": (8, 8)}, None),
        ({"x": (4, 4, 4, 4), "y": None}, None),
    ],
)
def test_column_blocks_of_sequences_must_have_one_width(widths: dict, message: str | None) -> None:
    """TorchRec 1.8 ends with "Split sizes doesn't match", or writes out of bounds."""
    model = bags_model({}, {"x": (19, 16), "y": (22, 16)})

    def generator(rows: int, cut: tuple[int, ...] | None):
        shards = [(i, (0, sum((cut or ())[:i])), (rows, width)) for i, width in enumerate(cut or ())]
        return place("column_wise", shards) if cut else table_wise(0, compute_kernel="fused")

    generators = {name: generator(rows, widths[name]) for name, rows in (("x", 19), ("y", 22))}
    plan = construct_module_sharding_plan(model["ec"], generators, EmbeddingCollectionSharder(), 4, 4, "cpu")
    with pytest.raises(PlanError, match=message) if message else nullcontext():
        check_plan(ShardingPlan({"ec": plan}), model, world_size=4)


# Files with a prediction, and comparing them.


def planned_file(tmp_path: Path, name: str, kind: str = "auto", **constraints) -> str:
    model, path = model_of(), str(tmp_path / name)
    cluster = NAMED["cpu"].with_nodes(2)
    plan_for(model, cluster, kind=kind, constraints=Constraints(**constraints)).save(model, path)
    return path


def test_a_plan_file_carries_its_prediction(tmp_path: Path) -> None:
    model, cluster = model_of(), NAMED["cpu"].with_nodes(2)
    planned = plan_for(model, cluster)
    planned.save(model, str(tmp_path / "plan.json"))
    file = read_plan(str(tmp_path / "plan.json"))
    assert file.prediction == planned.prediction and (file.world_size, file.local_world_size) == (4, 2)
    assert file.plan == plan_to_dict(planned.plan) and file.tables["ebc"]["s__a"] == (40, 8)
    assert plan_to_dict(plan_of(str(tmp_path / "plan.json"), 4, model, 2)) == file.plan


def test_the_first_version_is_still_read(tmp_path: Path) -> None:
    def old(content: dict) -> None:
        content["version"] = 1
        del content["prediction"]

    path = saved(tmp_path, old)
    assert read_plan(path).prediction is None
    assert types_of(plan_of(path, 2)) == types_of(plan_of("row_wise", 2))


def test_the_cache_survives_the_file(tmp_path: Path) -> None:
    model, path = model_of(), str(tmp_path / "plan.json")
    cached = Constraints({"s__a": Constraint(kernels=("fused_uvm_caching",), cache_load_factor=0.5)})
    plan_for(model, NAMED["h100x8"], constraints=cached).save(model, path)
    plan = load_plan(path, model, world_size=8, local_world_size=8, device_type="cuda")
    assert plan.plan["ebc"]["s__a"].cache_params.load_factor == 0.5
    assert plan.plan["ebc"]["s__b"].cache_params is None


def test_a_damaged_prediction_is_refused(tmp_path: Path) -> None:
    path = Path(planned_file(tmp_path, "plan.json"))
    content = json.loads(path.read_text())
    del content["prediction"]["ranks"][0]["hbm"]
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="damaged plan: TypeError"):
        read_plan(str(path))


def test_equal_plans_do_not_differ(tmp_path: Path) -> None:
    file = read_plan(planned_file(tmp_path, "a.json"))
    assert diff_plans(file, file) == []


def test_differences_say_what_changed(tmp_path: Path) -> None:
    first = read_plan(planned_file(tmp_path, "a.json", "table_wise"))
    second = read_plan(planned_file(tmp_path, "b.json", "row_wise"))
    found = diff_plans(first, second)
    assert {(d.table, d.what) for d in found if d.table == "s__a"} == {("s__a", "sharding type"), ("s__a", "shards")}
    assert "s__a: sharding type: table_wise -> row_wise" in map(str, found)
    assert {d.what for d in found if d.table == "s__b"} <= {"processes"}  # too few rows: whole in both
    whole = {d.what: d for d in found if d.table is None}
    assert "predicted ms of the busiest process" in whole and "world size" not in whole
    assert whole["predicted ms of the busiest process"].first == pytest.approx(first.prediction.critical_ms, abs=1e-4)


def test_moved_and_missing_tables_and_other_jobs_are_differences(tmp_path: Path) -> None:
    first = read_plan(planned_file(tmp_path, "a.json", tables={"s__a": Constraint(types=("table_wise",), ranks=(0,))}))
    second = read_plan(planned_file(tmp_path, "b.json", tables={"s__a": Constraint(types=("table_wise",), ranks=(3,))}))
    moved = [d for d in diff_plans(first, second) if d.table == "s__a"]
    assert [(d.what, d.first, d.second) for d in moved] == [("processes", [0], [3])]
    other = model_of({"s__a": (41, 8)})
    save_plan(plan_of("row_wise", 2, other), other, str(tmp_path / "c.json"), world_size=2, local_world_size=2)
    found = {(d.table, d.what) for d in diff_plans(first, read_plan(str(tmp_path / "c.json")))}
    assert {(None, "world size"), ("s__b", "only in one"), ("s__a", "size")} <= found


def test_columns_cut_otherwise_are_a_difference(tmp_path: Path) -> None:
    model = model_of({"s__a": (40, 16)})
    files = []
    for width in (4, 8):
        plan = plan_to_dict(plan_of("column_wise", 2, model))
        first, second = plan["ebc"]["s__a"]["shards"]
        first["sizes"], second["sizes"], second["offsets"] = [40, width], [40, 16 - width], [0, width]
        files.append(str(tmp_path / f"{width}.json"))
        cut = plan_from_dict(plan, local_world_size=2, device_type="cpu")
        save_plan(cut, model, files[-1], world_size=2, local_world_size=2)
    (found,) = diff_plans(*map(read_plan, files))
    assert str(found) == "s__a: sizes: [[40, 4], [40, 12]] -> [[40, 8], [40, 8]]"


def test_shards_outside_their_machine_are_refused() -> None:
    model = model_of()
    plan = plan_of("table_row_wise", 4, model, 2)
    check_plan(plan, model, world_size=4, local_world_size=2)
    with pytest.raises(PlanError, match="table_row_wise with shards on ranks .* not those of one machine"):
        check_plan(plan, model, world_size=4, local_world_size=4)


# Jobs and clusters.


def test_a_topology_of_another_device_is_refused() -> None:
    with pytest.raises(PlanError, match="'h100x8' is for cuda, this job runs on cpu"):
        make_plan(model_of(), kind="auto", world_size=2, local_world_size=2, device_type="cpu", cluster=NAMED["h100x8"])


def test_a_plan_for_another_cluster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="plan for 4 processes, this job has 8"):
        plan_for(model_of(), NAMED["h100x8"], kind=planned_file(tmp_path, "a.json"))


def test_replica_groups_plan_for_one_group() -> None:
    model, cluster = model_of(), NAMED["h100x8"].with_nodes(6)
    planned = plan_for(model, cluster, replicas=3, sync_every=10)
    assert planned.cluster.world_size == 16 and planned.prediction.planner["replicas"] == 3
    assert any("2D parallel: 3 groups of 16 processes" in note for note in planned.prediction.notes)
    with pytest.raises(PlanError, match="replicas: 4; expected a divisor of the 6 machines"):
        plan_for(model, cluster, replicas=4)
