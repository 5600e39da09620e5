"""Model written for one device + plan -> the same model over all processes of the group."""

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan

from hmoe_rec.embedding.initialization import initialize_tables
from hmoe_rec.embedding.managed import managed_tables
from hmoe_rec.embedding.row_reset import manage_rows
from hmoe_rec.sharding.plan_file import check_plan, collections_of, data_types_of
from hmoe_rec.sharding.planner import sharders
from hmoe_rec.sharding.replicas import group_environment, group_plan
from hmoe_rec.sharding.replicated import look_up_sequences, mark, updates_of
from hmoe_rec.types import PlanError

PRECISIONS = ("fp32", "fp16")
CPU_OPTIMIZERS = ("SGD", "Adagrad", "RowWiseAdagrad")


def shard_model(
    module: nn.Module,
    *,
    plan: ShardingPlan,
    device: torch.device,
    seed: int = 0,
    std: float = 0.01,
    communication: str = "fp32",
    gradient_communication: str | None = None,
    replicas: int = 1,
) -> DistributedModelParallel:
    """Tables sharded by `plan` and filled from (seed, table, row); the rest replicated and kept equal by DDP.

    One process's dense part stays bare: there is nobody to average with. `module` is consumed: its tables are
    replaced in place. The global random state is left as it was, so that what is drawn later (dropout) does not depend
    on the plan. The tables are stepped by `table_optimizer(sharded)`, the rest by an optimizer of
    `dense_parameters(sharded)`; in the fused optimizer alone, data_parallel tables would not move.

    Args:
        module: its tables on `torch.device("meta")`, with an optimizer applied by `apply_optimizer_in_backward`;
            everything else on `device`.
        plan: from `make_plan`; with replicas, of one group.
        seed, std: of the tables, see `initialize_tables`.
        communication, gradient_communication: precision of vectors and of their gradients between processes: fp32,
            fp16, bf16; None = the same.
        replicas: groups of processes that each hold all tables (2D parallel); `replicas.Averaging` keeps them together.

    Raises:
        PlanError: the plan does not fit, a width or precision that FBGEMM does not train, a table is not on the meta
            device or has no (usable) optimizer, or a dense parameter has no memory.
    """
    if not dist.is_initialized():
        raise PlanError("no process group: call inside `with process_group(...)`, also for a single process")
    environment = ShardingEnv.from_process_group(dist.group.WORLD)  # type: ignore[arg-type]
    if replicas > 1:
        environment = group_environment(replicas, device)
    check_plan(plan, module, world_size=environment.world_size)
    _check_tables(module, device)
    _check_dense(module)
    _check_managed(module, plan)
    updates = updates_of(module, plan)
    if replicas > 1:
        plan = group_plan(plan, environment.world_size, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        sharded = DistributedModelParallel(
            module,
            env=environment,
            device=device,
            plan=plan,
            sharders=sharders(communication, gradient_communication),
            init_data_parallel=dist.get_world_size() > 1,
        )
    mark(sharded, updates)
    look_up_sequences(sharded)
    initialize_tables(sharded, seed=seed, std=std)
    manage_rows(sharded, seed=seed, std=std, device=device)
    return sharded


def _check_tables(module: nn.Module, device: torch.device) -> None:
    precisions = data_types_of(module)
    for path, collection in collections_of(module).items():
        for table, precision in precisions[path].items():
            _check_precision(f"{path}: table {table!r}", precision)
        if not isinstance(collection.device, torch.device):
            raise PlanError(
                f"{path}: built with device={collection.device!r}, a string, which TorchRec takes for a real device "
                f"later on; pass torch.device({str(collection.device)!r})"
            )
        for name, parameter in collection.named_parameters():
            if not parameter.is_meta:
                raise PlanError(
                    f"{path}.{name} is on {parameter.device}: build the tables on torch.device('meta'), so that each "
                    "process allocates its shards only"
                )
            width = parameter.shape[1]
            if width % 4:
                raise PlanError(
                    f"{path}.{name} is {width} wide: FBGEMM's kernels take widths that are multiples of 4; choose "
                    f"{width // 4 * 4 or 4} or {-(-width // 4) * 4} (model.embedding_dim, or the set's dim)"
                )
            _check_optimizer(f"{path}.{name}", getattr(parameter, "_optimizer_classes", []), device)


def _check_managed(module: nn.Module, plan: ShardingPlan) -> None:
    managed = managed_tables(module)
    for path, tables in plan.plan.items():
        for name, sharding in tables.items():  # type: ignore[attr-defined]
            if name in managed and sharding.compute_kernel == EmbeddingComputeKernel.FUSED_UVM_CACHING.value:
                raise PlanError(
                    f"{path}.{name}: kernel {sharding.compute_kernel} keeps rows in a cache, out of reach when another "
                    "id takes a row over (mode: managed); use fused or fused_uvm (sharding.constraints)"
                )


def _check_precision(table: str, precision: str) -> None:
    if precision in PRECISIONS:
        return
    why = (
        "FBGEMM's CPU kernels refuse it, and TorchRec's unsharded collections hold fp16 in its place"
        if precision == "bf16"
        else "it is for serving, FBGEMM's optimizers do not train it; quantize what is exported"
    )
    raise PlanError(f"{table} is {precision}: {why}; train in {' or '.join(PRECISIONS)}")


def _check_optimizer(name: str, classes: list[type], device: torch.device) -> None:
    if not classes:
        raise PlanError(
            f"{name} has no optimizer and would silently train by SGD with learning rate 0.01: call "
            "apply_optimizer_in_backward(...) on the tables' parameters before sharding"
        )
    if len(classes) > 1:
        raise PlanError(
            f"{name} has {len(classes)} optimizers ({', '.join(c.__name__ for c in classes)}); apply one, once"
        )
    if device.type == "cpu" and classes[0].__name__ not in CPU_OPTIMIZERS:
        raise PlanError(
            f"{name}: fused {classes[0].__name__} needs a GPU; on CPU use one of {', '.join(CPU_OPTIMIZERS)}"
        )


def _check_dense(module: nn.Module) -> None:
    tables = tuple(f"{path}." for path in collections_of(module))
    for name, parameter in module.named_parameters():
        if parameter.is_meta and not name.startswith(tables):
            raise PlanError(
                f"{name} is on the meta device: only embedding tables may be; build the rest with real memory"
            )
