"""A resolved configuration -> the model, its training step, its plan: each made from plain arguments."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec.distributed.types import ShardingPlan

from hmoe_rec.config import RunConfig
from hmoe_rec.kinds import resolve
from hmoe_rec.losses import LOSSES, WEIGHTINGS
from hmoe_rec.losses.base import Loss
from hmoe_rec.losses.exposure import ExposureWeights
from hmoe_rec.losses.weighting import TaskWeighting
from hmoe_rec.model import HMoE
from hmoe_rec.sharding.planner import PlannedModel, make_plan, plan_for
from hmoe_rec.sharding.process import Process
from hmoe_rec.sharding.row_cache import forget_cached_rows
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.sharding.topology import Cluster, cluster_of
from hmoe_rec.suggest import listing
from hmoe_rec.training.optimizer import Optimizers, Schedule, attach_table_optimizer
from hmoe_rec.training.task import TrainTask


def build_model(config: RunConfig, *, table_device: torch.device | None = None) -> HMoE:
    """The servable model. Dense parameters are drawn from torch's global generator on the default device.

    Args:
        table_device: where the tables live; `torch.device("meta")` before sharding; None = CPU.
    """
    model = config.model
    return HMoE(
        config.features,
        config.layout(),
        expert_dim=model.expert_dim,
        gate_hidden=model.gate.hidden,
        tower={"kind": model.tower.kind, **model.tower.options},
        dropout=model.dropout,
        two_logits=[task for task, losses in build_losses(config).items() if any(loss.two_logits for loss in losses)],
        encoding=config.encoding,
        device=table_device,
        table_precision=config.table_precisions(),
    )


def build_losses(config: RunConfig) -> dict[str, list[Loss]]:
    """Task -> what it minimizes, where that is chosen."""
    return {task: [build_loss(part) for part in parts] for task, parts in config.train.losses.items()}


def build_loss(part: Mapping[str, Any]) -> Loss:
    """part: {kind, option, ...} as a run file has it."""
    return resolve(part["kind"], LOSSES)(**_options(part))


def build_weighting(config: RunConfig, *, distributed: bool) -> TaskWeighting:
    part, given = config.train.task_weighting, config.train.task_weights
    task_weights = [given.get(task, 1.0) for task in config.tasks]
    return resolve(part["kind"], WEIGHTINGS)(task_weights, distributed, **_options(part))


def _options(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "kind"}


def build_sharded(
    config: RunConfig, process: Process, plan: ShardingPlan | None = None, *, replicas: int | None = None
) -> nn.Module:
    """The training step under DistributedModelParallel; the same parameters whatever the plan and the world size.

    Args:
        plan: made for `unsharded` and this job; None = the one that the configuration asks for.
        replicas: groups of processes that each hold all tables; None = sharding.replicas.
    """
    train = config.train
    torch.manual_seed(train.seed)
    with torch.device(process.device):
        model = build_model(config, table_device=torch.device("meta"))
        task = TrainTask(
            model,
            config.tasks,
            losses=build_losses(config),
            weighting=build_weighting(config, distributed=process.world_size > 1),
            precision=train.precision,
            device_type=process.device.type,
            distributed=process.world_size > 1,
            decorrelation=train.decorrelation,
            surgery=train.gradient_surgery,
            log_negative_gradients=train.log_negative_gradients,
            exposure=exposure_weights(config),
        )
    _attach_optimizer(config, model)
    sharding = config.sharding
    replicas = sharding.replicas if replicas is None else replicas
    if plan is None:
        plan = make_plan(
            task,
            kind=sharding.plan,
            world_size=process.world_size,
            local_world_size=process.local_world_size,
            device_type=process.device.type,
            batch_size=max(1, train.global_batch_size // process.world_size),
            cluster=None if sharding.topology is None else cluster_of(sharding.topology),
            constraints=sharding.rules(),
            communication=sharding.communication,
            gradient_communication=sharding.gradient_communication,
            reserved=sharding.reserved,
            seconds=sharding.seconds,
            replicas=replicas,
        )
    return shard_model(
        task,
        plan=plan,
        device=process.device,
        seed=train.seed,
        std=config.model.embedding_init_std,
        communication=sharding.communication,
        gradient_communication=sharding.gradient_communication,
        replicas=replicas,
    )


def _attach_optimizer(config: RunConfig, model: nn.Module) -> None:
    """To the tables."""
    train = config.train
    attach_table_optimizer(
        model, kind=train.embedding_optimizer, lr=train.embedding_learning_rate, eps=train.embedding_eps
    )


def exposure_weights(config: RunConfig) -> ExposureWeights | None:
    """Of a run whose weights are fitted; None where positives have none."""
    fitted = config.train.exposure.fitted
    if not fitted:
        return None
    return ExposureWeights(config.tasks, {task: np.atleast_1d(f["weights"]).tolist() for task, f in fitted.items()})


def unsharded(config: RunConfig, device_type: str) -> nn.Module:
    """The training step on the meta device, the tables' optimizer attached: what plans are made for."""
    with torch.device("meta"):
        model = build_model(config, table_device=torch.device("meta"))
        # As in training, so that the tables have the names and paths that a run will look for in a plan file.
        task = TrainTask(model, config.tasks, device_type=device_type)
    _attach_optimizer(config, model)
    return task


def plan_model(
    config: RunConfig,
    cluster: Cluster,
    *,
    replicas: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[nn.Module, PlannedModel]:
    """The model on the meta device and a plan of its tables for a cluster that need not be here.

    Args:
        replicas: groups of processes that each hold all tables (2D parallel); None = sharding.replicas.
        progress: is called with what is done and the share of the work that is behind.

    Raises:
        PlanError: see `hmoe_rec.sharding.planner.plan_for`.
    """
    train, sharding = config.train, config.sharding
    task = unsharded(config, cluster.device)
    planned = plan_for(
        task,
        cluster,
        kind=sharding.plan,
        batch_size=max(1, train.global_batch_size // cluster.world_size),
        constraints=sharding.rules(),
        communication=sharding.communication,
        gradient_communication=sharding.gradient_communication,
        reserved=sharding.reserved,
        seconds=sharding.seconds,
        progress=progress,
        replicas=sharding.replicas if replicas is None else replicas,
        sync_every=sharding.sync_every,
        notes=_unmeasured(config),
    )
    return task, planned


def _unmeasured(config: RunConfig) -> tuple[str, ...]:
    """A note on lists of which nobody said how long they are."""
    features = config.features
    lists = (*(f.name for f in features.ids if f.multi_valued), *features.behavior_columns)
    unknown = [name for name in lists if name not in config.sharding.pooling]
    if not unknown:
        return ()
    return (
        f"lists taken for one id per example: {listing(unknown)}; sharding.measure_pooling=true measures them, or "
        "sharding.pooling says how many (hmoe-rec data pooling)",
    )


def build_optimizers(config: RunConfig, sharded: nn.Module, total_steps: int) -> Optimizers:
    train = config.train
    return Optimizers(
        sharded,
        lr=train.learning_rate,
        table_lr=train.embedding_learning_rate,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        schedule=Schedule(train.warmup_steps, total_steps, train.decay, train.min_lr_ratio),
    )


WEIGHTING = "weighting."  # names of what belongs to the training and not to the served model


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """{"tables", "dense", "total"}; tables of a sharded model are counted whole, once over all processes."""
    tables = sum(math.prod(t.size()) for name, t in model.state_dict().items() if in_table(name))
    dense = sum(p.numel() for name, p in model.named_parameters() if not in_table(name) and WEIGHTING not in name)
    return {"tables": tables, "dense": dense, "total": tables + dense}


def state_of(sharded: nn.Module) -> dict[str, dict[str, Any]]:
    """The state of a training step: "model", which is what will be served, and "weighting" of the tasks, if it has one.

    The tensors are those of the modules, so that a checkpoint can fill them in place; `load_state` takes them back.
    """
    whole = sharded.state_dict()
    weighting = {name: x for name, x in whole.items() if name.startswith(WEIGHTING)}
    model = {name: x for name, x in whole.items() if name not in weighting}
    return {"model": model} | ({"weighting": weighting} if weighting else {})


def load_state(sharded: nn.Module, state: dict[str, dict[str, Any]]) -> None:
    """state: what `state_of` gave, its tensors filled; what it lacks stays as it is."""
    forget_cached_rows(sharded)  # first: the state dict below would write cached rows over what was filled
    # A copy: DMP renames keys in what it is given.
    sharded.load_state_dict(dict(sharded.state_dict()) | state["model"] | state.get("weighting", {}))


def in_table(name: str) -> bool:
    return ".embedding_bags." in name or ".embeddings." in name
