"""Kinds of plans and plan files -> plans that this job can run, and what each topology predicts for them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import torch.distributed as dist
from torch import nn
from torchrec.distributed.types import ShardingPlan

from hmoe_rec.benchmark.batches import Traffic
from hmoe_rec.config import RunConfig
from hmoe_rec.sharding.constraints import SEPARATOR, Constraints
from hmoe_rec.sharding.estimate import predict, read_tables
from hmoe_rec.sharding.plan_file import check_plan, plan_from_dict, plan_to_dict
from hmoe_rec.sharding.planner import cluster_of_job, plan_for
from hmoe_rec.sharding.prediction import PlanPrediction
from hmoe_rec.sharding.process import Process
from hmoe_rec.sharding.topology import Cluster, cluster_of
from hmoe_rec.training.build import unsharded
from hmoe_rec.types import HmoeError, PlanError


@dataclass(frozen=True)
class Candidate:
    """A plan to try.

    Attributes:
        given: a kind (`planner.KINDS`) or the path of a plan file.
        plan: as `plan_to_dict` gives it; None where there is an error.
        predictions: topology -> prediction.
    """

    name: str
    given: str
    plan: Mapping[str, Mapping[str, Any]] | None = None
    predictions: Mapping[str, PlanPrediction] = field(default_factory=dict)
    error: str | None = None

    def for_torchrec(self, process: Process) -> ShardingPlan:
        assert self.plan is not None, self.error
        local = process.local_world_size
        return plan_from_dict(self.plan, local_world_size=local, device_type=process.device.type)

    @property
    def shardings(self) -> dict[str, int]:
        """Sharding type -> tables, the most frequent first."""
        tables = [table for tables in (self.plan or {}).values() for table in tables.values()]
        return dict(Counter(table["sharding_type"] for table in tables).most_common())


def names_of(given: Sequence[str]) -> list[str]:
    """Short names: of files without folder and ending, as long as they differ.

    Raises:
        PlanError: one is given twice.
    """
    short = [PurePosixPath(x).stem if x.endswith(".json") else x for x in given]
    names = [long if short.count(name) > 1 else name for name, long in zip(short, given, strict=True)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise PlanError(f"plans: {', '.join(twice)} given twice; give each plan once")
    return names


def clusters_of(given: Sequence[str | Mapping[str, Any]], process: Process) -> dict[str, Cluster]:
    """Name -> cluster of this job's size; this machine's figures where nothing is given.

    Raises:
        PlanError: not a topology, or one for another kind of device.
    """
    found: dict[str, Cluster] = {}
    for topology in given or [None]:
        cluster = None if topology is None else cluster_of(topology)
        here = cluster_of_job(cluster, process.world_size, process.local_world_size, process.device.type)
        name = here.name if here.name not in found else f"{here.name} ({len(found) + 1})"
        found[name] = replace(here, name=name)
    return found


def make_candidates(
    config: RunConfig, given: Sequence[str], clusters: Mapping[str, Cluster], traffic: Traffic, process: Process
) -> list[Candidate]:
    """Every plan or why there is none, the same on all processes. The first cluster is the one that `auto` plans for.

    A collective call: the first process plans, and all take its plans.
    """
    made: list[Any] = [None]
    if process.rank == 0:
        made = [[_make(config, n, g, clusters, traffic) for n, g in zip(names_of(given), given, strict=True)]]
    if process.world_size > 1:
        dist.broadcast_object_list(made, src=0)
    return made[0]


def _make(config: RunConfig, name: str, given: str, clusters: Mapping[str, Cluster], traffic: Traffic) -> Candidate:
    sharding, cluster = config.sharding, next(iter(clusters.values()))
    module = unsharded(config, cluster.device)
    constraints = _with_traffic(sharding.rules(), traffic, module, cluster)
    options: dict[str, Any] = {
        "batch_size": max(1, config.train.global_batch_size // cluster.world_size),
        "communication": sharding.communication,
        "gradient_communication": sharding.gradient_communication,
        "reserved": sharding.reserved,
    }
    try:
        planned = plan_for(module, cluster, kind=given, constraints=constraints, seconds=sharding.seconds, **options)
        check_plan(planned.plan, module, world_size=cluster.world_size, local_world_size=cluster.ranks_per_node)
        predictions = {
            n: predict(module, planned.plan, other, constraints=constraints, **options) for n, other in clusters.items()
        }
    except HmoeError as error:
        return Candidate(name, given, error=str(error))
    return Candidate(name, given, plan_to_dict(planned.plan), predictions)


def _with_traffic(constraints: Constraints, traffic: Traffic, module: nn.Module, cluster: Cluster) -> Constraints:
    """What was counted in the batches, where the run file says nothing."""
    tables, _ = read_tables(module, Constraints(), cluster)
    names = {name.split(SEPARATOR, 1)[-1] for table in tables for name in (table.name, *table.feature_names)}
    counted = {key: ids for key, ids in traffic.ids.items() if key in names and ids > 0}
    return replace(constraints, pooling={**counted, **constraints.pooling}, distinct=traffic.distinct)
