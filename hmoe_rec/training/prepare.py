"""What a run learns from its data before the first step: statistics of numbers, ids per example, frozen vectors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hmoe_rec import io
from hmoe_rec.config import ResolvedData, RunConfig, load_config, prepare_data
from hmoe_rec.config.encoding import numbers_to_fit
from hmoe_rec.data.pooling import mean_ids
from hmoe_rec.data.schema import Schema, load_schema
from hmoe_rec.data.statistics import fit_statistics, to_dict
from hmoe_rec.data.vectors import read_vectors
from hmoe_rec.encoding.frozen import FrozenVectors
from hmoe_rec.encoding.similarity import Similarities
from hmoe_rec.progress import progress_bar
from hmoe_rec.sharding.process import Process
from hmoe_rec.training.checkpoint import Checkpoint
from hmoe_rec.types import CheckpointError


def with_statistics(config: RunConfig, data: ResolvedData, process: Process) -> RunConfig:
    """The configuration with statistics for every number whose encoder needs them, so that they travel with the run.

    A run that is resumed keeps those that it was trained with. One process fits, the others wait for it.

    Raises:
        DataError: a value in the training data that cannot be right.
    """
    missing = numbers_to_fit(config)
    if not missing:
        return config
    before = io.join(config.train.run_dir, "config.yaml")
    if config.train.resume and io.exists(before):
        known = load_config(before).data.statistics
        if isinstance(known, dict) and set(missing) <= set(known):
            return _with(config, known)
    fitted = [_fit(data.train, data.schema, missing) if process.rank == 0 else None]
    if process.world_size > 1:
        dist.broadcast_object_list(fitted, src=0)
    return _with(config, fitted[0] or {})


def _fit(uris: tuple[str, ...], schema: Schema, names: list[str]) -> dict:
    with progress_bar("statistics of numbers") as progress:
        return to_dict(fit_statistics(uris, schema, names=names, progress=progress))


def _with(config: RunConfig, statistics: dict) -> RunConfig:
    known = config.data.statistics if isinstance(config.data.statistics, dict) else {}
    return config.model_copy(update={"data": config.data.model_copy(update={"statistics": {**statistics, **known}})})


def with_pooling(config: RunConfig, data: ResolvedData, process: Process) -> RunConfig:
    """The configuration with measured ids per example, where it asks for them and a plan is made from them.

    A run that is resumed keeps those that it was planned with. One process measures, the others wait for it.

    Raises:
        DataError: a file that cannot be read.
    """
    if not config.sharding.measure_pooling or config.sharding.plan != "auto":
        return config
    before = io.join(config.train.run_dir, "config.yaml")
    if config.train.resume and io.exists(before):
        known = load_config(before).sharding
        if not known.measure_pooling:
            return _with_pooling(config, known.pooling)
    measured = [measured_pooling(config, data) if process.rank == 0 else None]
    if process.world_size > 1:
        dist.broadcast_object_list(measured, src=0)
    return _with_pooling(config, measured[0] or {})


def with_pooling_here(config: RunConfig) -> RunConfig:
    """The same for a plan that this process alone makes, of any kind."""
    if not config.sharding.measure_pooling:
        return config
    return _with_pooling(config, measured_pooling(config, prepare_data(config, progress=True)))


def measured_pooling(config: RunConfig, data: ResolvedData) -> dict[str, float]:
    """Mean ids of an example in each field that some set embeds, on a sample of the training data, with a bar."""
    used = {name for s in config.layout().sets for name in s.fields or config.features.field_names}
    with progress_bar("ids per example") as progress:
        found = mean_ids(data.train, data.schema, progress=progress)
    return {name: ids for name, ids in found.items() if name in used}


def _with_pooling(config: RunConfig, measured: Mapping[str, float]) -> RunConfig:
    """What the file says counts more than what was measured; the result is not measured again."""
    sharding = config.sharding
    update = {"pooling": {**measured, **sharding.pooling}, "measure_pooling": False}
    return config.model_copy(update={"sharding": sharding.model_copy(update=update)})


def check_same_meaning(checkpoint: Checkpoint, config: RunConfig) -> None:
    """That weights mean what they meant when the checkpoint was made; their sizes are compared when they are loaded.

    Raises:
        CheckpointError: a field's mode, its salt or how it is managed has changed, or a number's scale or statistics;
            or the same fields, experts or sets of a gate stand in another order.
    """
    _check_same_order(checkpoint, config)
    saved = checkpoint.meta["config"]["data"]
    then, now = (data.get("statistics") or {} for data in (saved, config.to_dict()["data"]))
    if any(then[name] != now[name] for name in then.keys() & now.keys()):
        raise CheckpointError(
            f"{checkpoint.uri}: it was trained with other statistics of numbers (data.statistics), which would shift "
            "every bin and digit; leave data.statistics out, and those of the run are taken"
        )
    if saved.get("schema") is None:
        return
    before, schema = load_schema(saved["schema"]), config.schema_of_data
    rows, scale = "would get other rows than those they were trained in", "would be scaled in another way than before"
    _check_same(checkpoint, "ids", before.ids, schema.ids, ("mode", "salt", "managed"), rows)
    _check_same(checkpoint, "numbers", before.numbers, schema.numbers, ("transform", "mean", "std"), scale)


def _check_same(
    checkpoint: Checkpoint, kind: str, before: Sequence[Any], now: Sequence[Any], keys: Sequence[str], effect: str
) -> None:
    then = {column.name: column for column in before}
    for column in now:
        pairs = {key: (getattr(then.get(column.name, column), key), getattr(column, key)) for key in keys}
        differing = [f"{key} was {a!r} and is {b!r}" for key, (a, b) in pairs.items() if a != b]
        if differing:
            raise CheckpointError(
                f"{checkpoint.uri}: {kind} of {column.name} {effect}: {'; '.join(differing)} (schema, {kind}). Set it "
                "back, or start a run without this checkpoint"
            )


def order_of(config: RunConfig) -> dict[str, list[str]]:
    """What experts and gates tell apart by its place alone, so that weights of another order would fit in."""
    gates = {f"model.gate_inputs.{task}.sets": list(gate.sets) for task, gate in config.model.gate_inputs.items()}
    fields = [*config.features.field_names, *config.encoding.similarities]
    return {"fields of the schema": fields, "model.experts": list(config.model.experts), **gates}


def _check_same_order(checkpoint: Checkpoint, config: RunConfig) -> None:
    before = checkpoint.meta.get("order", {})
    for name, now in order_of(config).items():
        then = before.get(name, now)
        if then != now and sorted(then) == sorted(now):
            raise CheckpointError(
                f"{checkpoint.uri}: {name} were in the order {', '.join(then)} and are in the order {', '.join(now)}, "
                "in which the trained weights mean other ones. Set it back, or start a run without this checkpoint"
            )


def fill_frozen_vectors(model: nn.Module, config: RunConfig) -> None:
    """Reads the files of pre-trained vectors into the model's tables; from then on they are in its checkpoints.

    Raises:
        DataError: a file that is missing, or holds something else than the run file says.
    """
    tables = {name: rows for m in model.modules() if isinstance(m, Similarities) for name, rows in m.tables.items()}
    for table in config.encoding.frozen:
        if table.path is not None and table.name in tables:
            rows = tables[table.name]
            assert isinstance(rows, FrozenVectors), f"frozen tables hold vectors, got {type(rows)}"
            ids, vectors = read_vectors(
                table.path,
                id_column=table.id_column or table.field,
                vector_column=table.vector_column,
                num_rows=config.features.id_field(table.field).num_embeddings,
                dim=table.dim,
                name=table.name,
            )
            rows.fill(torch.from_numpy(ids), torch.from_numpy(vectors))
