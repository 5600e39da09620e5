"""A sharded model trains like one process, and what would silently train something else is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo import run_ranks
from tiny_model import BAGS, ROWS, TinyModel, apply_table_optimizer, batch_of, full, optimizer_of, train
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

from hmoe_rec.embedding.initialization import initialize_tables
from hmoe_rec.sharding.planner import make_plan
from hmoe_rec.sharding.process import choose_device, process_group
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.types import ConfigError, HmoeError, PlanError

CPU = torch.device("cpu")
STEPS = range(20)


def losses_of(rank: int, world_size: int, kind: str) -> tuple:
    model = TinyModel()
    apply_table_optimizer(model)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    plan = make_plan(model, kind=kind, world_size=world_size, local_world_size=local, device_type="cpu")
    model = shard_model(model, plan=plan, device=CPU, seed=5)
    losses = torch.tensor(train(model, optimizer_of(model), STEPS, rank, world_size))
    dist.all_reduce(losses)
    return (losses / world_size).tolist(), {key: full(value) for key, value in model.state_dict().items()}


def unsharded_losses() -> tuple:
    """The reference: one process, dense gradients, RowWiseAdagrad written out."""
    model = TinyModel(CPU)
    initialize_tables(model, seed=5)
    tables = [*model.ebc.parameters(), *model.ec.parameters()]
    moments = [torch.zeros(p.shape[0], 1) for p in tables]
    adam = torch.optim.Adam(model.mlp.parameters(), lr=0.01)
    losses = []
    for step in STEPS:
        ids, labels = batch_of(step, 0, 1)
        model.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(ids), labels)
        loss.backward()
        adam.step()
        with torch.no_grad():
            for p, moment in zip(tables, moments, strict=True):
                moment += p.grad.square().mean(1, keepdim=True)
                p -= 0.1 * p.grad / (moment.sqrt() + 1e-8)
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize(("world_size", "kind"), [(1, "auto"), (2, "row_wise")])
def test_losses_are_those_of_one_process(world_size: int, kind: str) -> None:
    check_losses(world_size, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "kind"),
    [
        (1, "table_wise"),
        (1, "row_wise"),
        (2, "table_wise"),
        (2, "auto"),
        (4, "table_wise"),
        (4, "row_wise"),
        (4, "auto"),
    ],
)
def test_more_plans_have_the_losses_of_one_process(world_size: int, kind: str) -> None:
    check_losses(world_size, kind)


def check_losses(world_size: int, kind: str) -> None:
    wanted, _ = unsharded_losses()
    for losses, _ in run_ranks(world_size, losses_of, kind):
        assert losses == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_two_machines_of_two_processes_have_the_losses_of_one_process() -> None:
    wanted, _ = unsharded_losses()
    assert run_ranks(4, losses_of, "auto", local_world_size=2)[0][0] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_row_wise_training_with_a_table_smaller_than_the_job() -> None:
    """A table of 3 rows over 4 processes leaves one an empty shard, beside which other tables trained wrong values."""
    assert BAGS["s__b"][0] == 3
    wanted, tables = unsharded_losses()
    losses, whole = run_ranks(4, losses_of, "row_wise")[0]
    assert losses == pytest.approx(wanted, abs=1e-5)
    for key in tables:
        torch.testing.assert_close(whole[key], tables[key], rtol=1e-3, atol=1e-4)


# Refusals, in a group of one process.


def refusal(model: TinyModel, **options) -> str:
    with process_group("cpu") as process:
        plan = options.get("plan") or make_plan(
            model, kind="table_wise", world_size=1, local_world_size=1, device_type="cpu"
        )
        with pytest.raises(PlanError) as error:
            shard_model(model, plan=plan, device=process.device)
    assert not dist.is_initialized()
    return str(error.value)


def test_a_table_without_an_optimizer_is_refused() -> None:
    """TorchRec would train it by SGD with learning rate 0.01 and not say so."""
    assert "ebc.embedding_bags.s__a.weight has no optimizer" in refusal(TinyModel())


def test_two_optimizers_on_a_table_are_refused() -> None:
    model = TinyModel()
    apply_table_optimizer(model)
    apply_table_optimizer(model)
    assert "has 2 optimizers (RowWiseAdagrad, RowWiseAdagrad)" in refusal(model)


def test_an_optimizer_that_needs_a_gpu_is_refused_on_cpu() -> None:
    model = TinyModel()
    apply_table_optimizer(model, torch.optim.Adam)
    assert "fused Adam needs a GPU" in refusal(model)


def test_tables_with_memory_are_refused() -> None:
    model = TinyModel(CPU)
    apply_table_optimizer(model)
    assert "build the tables on torch.device('meta')" in refusal(model)


def test_a_device_given_as_string_is_refused() -> None:
    model = TinyModel()
    model.ec = EmbeddingCollection(
        tables=[
            EmbeddingConfig(name=t, feature_names=[t], num_embeddings=n, embedding_dim=d) for t, (n, d) in ROWS.items()
        ],
        device="meta",  # type: ignore[arg-type]
    )
    apply_table_optimizer(model)
    assert "pass torch.device('meta')" in refusal(model)


def test_a_dense_parameter_without_memory_is_refused() -> None:
    model = TinyModel()
    apply_table_optimizer(model)
    model.mlp.to("meta")
    assert "mlp.0.weight is on the meta device" in refusal(model)


def test_a_width_that_fbgemm_does_not_take() -> None:
    model = TinyModel(bags={"s__a": (40, 10)}, rows={"s__h": (23, 8)})
    apply_table_optimizer(model)
    plan = make_plan(model, kind="table_wise", world_size=1, local_world_size=1, device_type="cpu")
    with process_group("cpu"), pytest.raises(PlanError, match="s__a.weight is 10 wide: .* choose 8 or 12"):
        shard_model(model, plan=plan, device=torch.device("cpu"))


def test_no_process_group_is_refused() -> None:
    model = TinyModel()
    plan = make_plan(model, kind="table_wise", world_size=1, local_world_size=1, device_type="cpu")
    with pytest.raises(PlanError, match="no process group"):
        shard_model(model, plan=plan, device=CPU)


def empty_shard(rank: int, world_size: int) -> str:
    model = TinyModel()
    apply_table_optimizer(model)
    plan = make_plan(model, kind="table_wise", world_size=world_size, local_world_size=world_size, device_type="cpu")
    generators = {t: row_wise() if t == "s__b" else table_wise(0) for t in BAGS}
    plan.plan["ebc"] = construct_module_sharding_plan(model.ebc, generators, None, world_size, world_size, "cpu")
    with pytest.raises(PlanError) as error:
        shard_model(model, plan=plan, device=CPU)
    return str(error.value)


def test_an_empty_shard_is_refused() -> None:
    assert "table 's__b': the shard of rank 3 is empty" in run_ranks(4, empty_shard)[0]


def test_a_process_group_that_exists_is_left_alone() -> None:
    with process_group("cpu") as outer:
        with process_group("cpu") as inner:
            assert (inner.rank, inner.world_size) == (outer.rank, outer.world_size) == (0, 1)
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_the_group_is_destroyed_when_the_block_fails() -> None:
    with pytest.raises(KeyError), process_group("cpu"):
        raise KeyError("x")
    assert not dist.is_initialized()


def test_incomplete_launcher_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="environment has RANK but not WORLD_SIZE"), process_group("cpu"):
        pass


RESTARTED = """
import os, sys
import torch
import torch.distributed as dist
from hmoe_rec.sharding.process import choose_device, process_group

with process_group("cpu") as process:
    total = torch.ones(1)
    dist.all_reduce(total)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and process.rank == 1:
        os._exit(3)
    dist.barrier()
    if process.rank == 0:
        print("sum", int(total), "attempt", os.environ["TORCHELASTIC_RESTART_COUNT"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("shared_store", [False, True])
def test_a_process_that_dies_is_restarted_by_torchrun(tmp_path: Path, root: Path, shared_store: bool) -> None:
    """Stale addresses in the launcher's store used to send restarted processes to dead ones."""
    (tmp_path / "job.py").write_text(RESTARTED)
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0" if shared_store else "1",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "job.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "sum 2 attempt 1" in done.stdout


def test_unknown_device_and_missing_gpu() -> None:
    with pytest.raises(ValueError, match="'cpu' or 'cuda', got 'gpu'"), process_group("gpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"finds no GPU here .* ask for device cpu"), process_group("cuda"):
            pass


class TestCuda:
    """What a GPU needs, on a machine that pretends to have one."""

    @pytest.fixture(autouse=True)
    def one_gpu(self, monkeypatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(dist, "is_nccl_available", lambda: True)

    def test_auto_is_cuda(self, monkeypatch) -> None:
        monkeypatch.delenv("HMOE_REC_DEVICE")
        assert [choose_device(asked) for asked in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
        with pytest.raises(ConfigError, match="device 'gpu': expected auto, cpu, cuda"):
            choose_device("gpu")

    def test_auto_is_what_the_environment_says(self, monkeypatch, default_device: str) -> None:
        assert choose_device("auto") == default_device == "cpu"  # as tests have it, also beside a GPU
        monkeypatch.setenv("HMOE_REC_DEVICE", "cuda")
        assert (choose_device("auto"), choose_device("cpu")) == ("cuda", "cpu")
        monkeypatch.setenv("HMOE_REC_DEVICE", "tpu")
        with pytest.raises(ConfigError, match="device 'tpu': expected"):
            choose_device("auto")

    def test_no_more_processes_than_devices(self, monkeypatch) -> None:
        for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "1")
        with pytest.raises(HmoeError, match=r"1 is number 1 .* which has 1 CUDA devices"), process_group("cuda"):
            pass

    def test_a_build_without_nccl_is_refused(self, monkeypatch) -> None:
        monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
        with pytest.raises(HmoeError, match="built without NCCL"), process_group("cuda"):
            pass

    @pytest.mark.parametrize("backends", ["gloo", "cpu:gloo,cuda:gloo"])
    def test_a_group_without_nccl_is_refused(self, backends) -> None:
        dist.init_process_group(backends, store=dist.HashStore(), rank=0, world_size=1)
        try:
            with process_group("cpu") as process:
                assert process.device.type == "cpu"
            with pytest.raises(HmoeError, match="make it by .*'cpu:gloo,cuda:nccl'"), process_group("cuda"):
                pass
        finally:
            dist.destroy_process_group()

    def test_a_group_with_nccl_is_used(self, monkeypatch) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        monkeypatch.setattr(dist, "get_backend_config", lambda *_: "cpu:gloo,cuda:nccl")
        try:
            with process_group("cuda") as process:
                assert process.device == torch.device("cuda", 0)
        finally:
            dist.destroy_process_group()
