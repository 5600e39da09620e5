"""Model + cluster -> sharding plan: which process holds which rows and columns of which table.

Every plan is the same on every process. It uses fused kernels only, so that every table keeps the optimizer that was
applied to it; and replicates a table only where it is told to, since somebody else must then step it (`replicated.py`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from hmoe_rec import io
from hmoe_rec.sharding.constraints import FUSED, REPLICATED, Constraints, Rule
from hmoe_rec.sharding.estimate import (
    Layouts,
    count_dense,
    layouts_found,
    layouts_of,
    layouts_to_dict,
    prediction_of,
    read_tables,
)
from hmoe_rec.sharding.options import Workload, fills
from hmoe_rec.sharding.plan_file import (
    check_plan,
    load_plan,
    plan_from_dict,
    plan_to_dict,
    save_plan,
    tables_of,
)
from hmoe_rec.sharding.prediction import PlanPrediction
from hmoe_rec.sharding.search import Failure, Progress, make_space, place_uniformly, search
from hmoe_rec.sharding.suggestions import no_plan
from hmoe_rec.sharding.topology import Cluster, this_machine, torchrec_topology
from hmoe_rec.suggest import nearest
from hmoe_rec.types import PlanError

# kind -> sharding types; a table is sharded by the first of them that is possible for it
UNIFORM = {
    "table_wise": ("table_wise",),
    "row_wise": ("row_wise", "table_wise"),
    "column_wise": ("column_wise", "table_wise"),
    "table_row_wise": ("table_row_wise", "row_wise", "table_wise"),
    "table_column_wise": ("table_column_wise", "column_wise", "table_wise"),
    "grid_shard": ("grid_shard", "table_row_wise", "row_wise", "table_wise"),
    REPLICATED: (REPLICATED, "table_wise"),
}
KINDS = ("auto", "torchrec", *UNIFORM)
COMMUNICATION = ("fp32", "fp16", "bf16")
RESERVED = 0.15  # share of the memory that plans leave to the dense part and to everything else
SECONDS = 120.0


@dataclass(frozen=True)
class PlannedModel:
    """A plan and what it will cost.

    Attributes:
        layouts: module path -> table -> where its shards are.
        predict: makes the prediction, which a job that only wants to start does not need.
    """

    cluster: Cluster
    layouts: Layouts
    predict: Callable[[], PlanPrediction]

    @cached_property
    def prediction(self) -> PlanPrediction:
        return self.predict()

    @cached_property
    def plan(self) -> ShardingPlan:
        """For TorchRec; an object per shard."""
        return _plan_of(layouts_to_dict(self.layouts), self.cluster)

    def save(self, module: nn.Module, uri: str) -> None:
        """As a plan file with the prediction in it, for `sharding.plan=...` and `read_plan`."""
        save_plan(
            self.plan,
            module,
            uri,
            world_size=self.cluster.world_size,
            local_world_size=self.cluster.ranks_per_node,
            prediction=self.prediction,
        )


def sharders(communication: str = "fp32", gradients: str | None = None) -> list[ModuleSharder[nn.Module]]:
    """TorchRec's sharders; vectors travel in `communication` precision, gradients in `gradients` (None = the same).

    Neither int8 nor fp8 is offered: TorchRec sends int8 in groups of 32 values, into which few batches divide, and
    cannot send what row-wise shards add up so; FBGEMM converts to fp8 on GPUs only.
    """
    registry = None
    gradients = gradients or communication
    if (communication, gradients) != ("fp32", "fp32"):
        config = QCommsConfig(forward_precision=CommType(communication), backward_precision=CommType(gradients))
        registry = get_qcomm_codecs_registry(config)
    return [
        EmbeddingBagCollectionSharder(qcomm_codecs_registry=registry),  # type: ignore[list-item]
        EmbeddingCollectionSharder(qcomm_codecs_registry=registry),  # type: ignore[list-item]
    ]


def plan_for(
    module: nn.Module,
    cluster: Cluster,
    *,
    kind: str = "auto",
    batch_size: int = 512,
    constraints: Constraints | None = None,
    communication: str = "fp32",
    gradient_communication: str | None = None,
    reserved: float = RESERVED,
    seconds: float = SECONDS,
    progress: Progress | None = None,
    replicas: int = 1,
    sync_every: int = 100,
    notes: tuple[str, ...] = (),
) -> PlannedModel:
    """A plan for a cluster that need not be here, and its prediction: no process group, no device, no memory needed.

    Args:
        module: unsharded, its tables on the meta device and their optimizers attached (their state takes memory).
        kind: as for `make_plan`.
        batch_size: examples per process.
        constraints: pooling factors are read from it for every kind; the rest is kept by "auto" only.
        communication, gradient_communication: precision of vectors, and of their gradients, on the way: fp32, fp16,
            bf16; None = the same.
        reserved: share of the memory that is left to the dense part, in [0, 1).
        seconds: "auto" stops looking for a better plan afterwards.
        progress: called with what is done and the share of the work that is behind, in [0, 1].
        replicas: 2D parallel: the cluster is divided into so many groups of whole machines, or of equal parts of a
            machine, each holds all tables (the plan is for one group), and tables are averaged over the groups every
            `sync_every` steps.
        notes: what the caller has to say in the prediction.

    Raises:
        PlanError: no plan fits (a `DoesNotFitError` with remedies that were tried), impossible or unknown constraints,
            an unknown kind, or a plan file for another model or cluster.
    """
    begin = time.perf_counter()
    whole, cluster = cluster, group_of(cluster, replicas)
    work = Workload(batch_size, communication, reserved, gradient_communication)
    tables, rules = read_tables(module, constraints or Constraints(), cluster)
    space = make_space(tables, rules, cluster, work)
    tried: dict[str, Any] = {"kind": kind}
    if kind == "auto":
        found = search(space, cluster, work, seconds=seconds, progress=progress)
        if isinstance(found, Failure):
            raise no_plan(space, rules, cluster, work, found, progress=progress)
        layouts = layouts_found(space, found)
        tried |= {"proposals": found.proposals, "timed_out": found.timed_out}
    else:
        layouts = _layouts_by_hand(module, kind, cluster, batch_size, seconds, _user(replicas))
    dense, planned_in = count_dense(module), time.perf_counter() - begin

    def predicted() -> PlanPrediction:
        begin, options, said = time.perf_counter(), dict(tried), list(notes)
        prediction = prediction_of(space, layouts, cluster, work, dense_parameters=dense)
        if replicas > 1:
            options |= {"replicas": replicas, "sync_every": sync_every}
            said.append(_sync_note(prediction, cluster, whole, replicas, sync_every))
        return replace(
            prediction,
            seconds=planned_in + time.perf_counter() - begin,
            planner={**prediction.planner, **options},
            notes=(*prediction.notes, *said),
        )

    return PlannedModel(cluster, layouts, predicted)


def make_plan(
    module: nn.Module,
    *,
    kind: str,
    world_size: int,
    local_world_size: int,
    device_type: str,
    batch_size: int = 512,
    cluster: Cluster | None = None,
    constraints: Constraints | None = None,
    communication: str = "fp32",
    gradient_communication: str | None = None,
    reserved: float = RESERVED,
    seconds: float = SECONDS,
    replicas: int = 1,
) -> ShardingPlan:
    """A plan for the unsharded `module` (tables may be on the meta device) and the job that is running.

    =================  ================================================================================================
    auto               table-wise, row-wise or (several machines) table-row-wise for each table, by estimated time and
                       memory (search.py), and what the constraints allow besides. Collective if there is a process
                       group of `world_size`: rank 0 plans, all take its plan.
    torchrec           the same choice, but made by TorchRec's planner; slow for many tables on many processes
    table_wise         whole tables, the largest first onto the process with the fewest bytes
    row_wise           every table cut into blocks of rows, except those too small to give every process a row
    column_wise        every table cut into column blocks whose widths are multiples of 4; narrow ones stay whole.
                       Row-wise Adagrad then keeps one statistic per row *and block*: training differs slightly.
    table_row_wise     every table cut into rows over one machine; sequences row-wise over all processes
    table_column_wise  every table cut into columns over one machine; sequences column-wise
    grid_shard         column blocks on different machines, each cut into rows there; sequences row-wise
    data_parallel      every fp32 table whole on every process: for models of small tables; others table-wise
    a path             plan file (plan_file.py) made for this model and world size
    =================  ================================================================================================

    Args:
        world_size, local_world_size: processes, and processes per machine.
        device_type: "cpu" or "cuda".
        batch_size: examples per process, for the estimates of "auto".
        cluster: memory and bandwidths for the estimates, its size is replaced by the job's; None = this machine's
            memory and typical bandwidths.
        constraints, communication, gradient_communication, reserved, seconds: as for `plan_for`.
        replicas: the plan is of one of so many groups of processes, its ranks are 0 to world_size / replicas - 1.

    Raises:
        PlanError: no plan fits, an unknown kind, or a plan file that does not belong to this model and world size.
    """
    estimated = kind in ("auto", "torchrec")
    here = cluster_of_job(cluster if estimated else None, world_size, local_world_size, device_type)
    here = group_of(here, replicas)

    def planned() -> dict[str, dict[str, dict]]:
        if kind == "torchrec":
            return plan_to_dict(_torchrec(module, here, batch_size, seconds))
        options: dict[str, Any] = {"communication": communication, "gradient_communication": gradient_communication}
        options |= {"reserved": reserved, "seconds": seconds}
        found = plan_for(module, here, batch_size=batch_size, constraints=constraints, **options)
        return layouts_to_dict(found.layouts)

    if estimated:
        plan = _plan_of(_on_rank_zero(planned, world_size), here)
    else:
        layouts = _layouts_by_hand(module, kind, here, batch_size, seconds, _user(replicas))
        plan = _plan_of(layouts_to_dict(layouts), here)
    check_plan(plan, module, world_size=here.world_size, local_world_size=here.ranks_per_node)
    return plan


def _user(replicas: int) -> str:
    return "this job" if replicas == 1 else f"each of this job's {replicas} replica groups"


def _layouts_by_hand(
    module: nn.Module, kind: str, cluster: Cluster, batch_size: int, seconds: float, user: str
) -> Layouts:
    """A kind of `UNIFORM`, TorchRec's planner, or a file."""
    if kind == "torchrec":
        return layouts_of(_torchrec(module, cluster, batch_size, seconds), module, cluster.world_size)
    if kind in UNIFORM:
        return _uniform(module, UNIFORM[kind], cluster)
    if not io.exists(kind):
        guess = nearest(kind, KINDS)
        remedy = (
            f"did you mean {guess!r}?" if guess else f"expected one of {', '.join(KINDS)}, or the path of a plan file"
        )
        raise PlanError(f"sharding plan {kind!r}: no such kind and no such file; {remedy}")
    size = {"world_size": cluster.world_size, "local_world_size": cluster.ranks_per_node}
    return layouts_of(
        load_plan(kind, module, **size, device_type=cluster.device, user=user), module, cluster.world_size
    )


def _plan_of(content: dict[str, dict[str, dict]], cluster: Cluster) -> ShardingPlan:
    return plan_from_dict(content, local_world_size=cluster.ranks_per_node, device_type=cluster.device)


def group_of(cluster: Cluster, replicas: int) -> Cluster:
    """One of `replicas` equal groups of neighbors: whole machines, or a part of one.

    Raises:
        PlanError: the cluster cannot be divided so.
    """
    size, local = cluster.world_size // max(1, replicas), cluster.ranks_per_node
    if replicas < 1 or cluster.world_size % replicas or (size % local and local % size):
        raise PlanError(
            f"replicas: {replicas}; expected a divisor of the {cluster.nodes} machines, or a number of groups that "
            f"divides each machine's {local} processes, so that a group is whole machines or a part of one"
        )
    return replace(cluster, nodes=max(1, size // local), ranks_per_node=min(size, local))


def _sync_note(prediction: PlanPrediction, cluster: Cluster, whole: Cluster, replicas: int, sync_every: int) -> str:
    """A ring all-reduce moves 2 (R - 1) / R of the bytes of the fullest process over its network link."""
    held = max(r.hbm["tables"] + r.hbm["optimizer"] + r.ddr["tables"] + r.ddr["optimizer"] for r in prediction.ranks)
    bandwidth = whole.inter_node_bandwidth if whole.nodes > 1 else whole.intra_node_bandwidth
    ms = 2 * (replicas - 1) / replicas * held / bandwidth * 1e3
    return (
        f"2D parallel: {replicas} groups of {cluster.world_size} processes; averaging tables and their optimizer state "
        f"takes {ms:,.0f} ms, {ms / sync_every:.3g} ms a step if done every {sync_every} steps"
    )


def cluster_of_job(cluster: Cluster | None, world_size: int, local: int, device: str) -> Cluster:
    """A cluster with the size of a job that runs, `local` processes per machine; None = this machine's figures.

    Raises:
        PlanError: it is for another kind of device.
    """
    # Machines with different numbers of processes are taken for one: nothing is then bound to a machine's borders.
    local = local if world_size % local == 0 else world_size
    if cluster is None:
        return this_machine(world_size, local, device)
    if cluster.device != device:
        raise PlanError(
            f"topology {cluster.name!r} is for {cluster.device}, this job runs on {device}: name another one, or none "
            "(sharding.topology: null) to use this machine's figures"
        )
    return replace(cluster, nodes=world_size // local, ranks_per_node=local)


def _uniform(module: nn.Module, kinds: tuple[str, ...], cluster: Cluster) -> Layouts:
    """Whatever the memory, and the largest tables first onto the processes with the fewest bytes."""
    endless = replace(cluster, hbm_bytes=2**62, ddr_bytes=2**62)
    tables, _ = read_tables(module, Constraints(), endless)
    rules = {t.name: Rule(types=kinds, min_partition=4) for t in tables}
    space = make_space(tables, rules, endless, Workload(reserved=0.0))
    return layouts_found(space, place_uniformly(space, endless, kinds, Workload(reserved=0.0)))


def _on_rank_zero(planned: Callable[[], dict], world_size: int) -> dict:
    if not (dist.is_initialized() and dist.get_world_size() == world_size):
        return planned()
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [planned()]
        except PlanError as error:
            result = [error]
    dist.broadcast_object_list(result, src=0)
    if isinstance(result[0], PlanError):
        raise result[0]
    return result[0]


def _torchrec(module: nn.Module, cluster: Cluster, batch_size: int, seconds: float) -> ShardingPlan:
    """By TorchRec's own planner, with the sharding types of "auto"."""

    # column_wise is left out because it changes row-wise Adagrad, data_parallel because it leaves the fused optimizer.
    def constraint(rows: int) -> ParameterConstraints:
        by_row = {"row_wise": cluster.world_size, "table_row_wise": cluster.ranks_per_node}
        types = ["table_wise", *(t for t, num_shards in by_row.items() if fills(rows, num_shards))]
        return ParameterConstraints(sharding_types=types, compute_kernels=[FUSED])

    planner = EmbeddingShardingPlanner(
        topology=torchrec_topology(cluster),
        batch_size=max(1, batch_size),
        constraints={t: constraint(rows) for tables in tables_of(module).values() for t, (rows, _) in tables.items()},
        storage_reservation=FixedPercentageStorageReservation(RESERVED),
        # The greedy proposers alone get stuck in poor plans of many tables; the uniform one alone misses mixed plans.
        proposer=[UniformProposer(), GreedyProposer(threshold=10), GreedyProposer(use_depth=False, threshold=10)],
        stats=NoopEmbeddingStats(),
        debug=False,
        timeout_seconds=max(1, int(seconds)),
    )
    try:
        return planner.plan(module, sharders())
    except (PlannerError, RuntimeError) as error:
        raise PlanError(
            f"TorchRec's planner found no plan for {cluster.world_size} processes: "
            f"{str(error).splitlines()[0].strip()} sharding.plan=auto says what would make it fit"
        ) from error
