"""A finished run -> an estimate of how sure it is: fitted, saved beside its checkpoints, opened again, judged.

::

    RUN/uncertainty/laplace-step_000001000.npz    a kind, the checkpoint it belongs to, its options and sums

Towers of kind sngp and bootstrap are trained with the run; the other kinds need nothing of it.
"""

import hashlib
import io as memory
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module

from hmoe_rec import io
from hmoe_rec.batch import Batch
from hmoe_rec.config import RunConfig
from hmoe_rec.model import HMoE
from hmoe_rec.object_store import StorageError
from hmoe_rec.progress import progress_bar
from hmoe_rec.sharding.process import Process, process_group
from hmoe_rec.training.checkpoint import Checkpoint, read_checkpoint
from hmoe_rec.training.evaluate import (
    device_of,
    evaluation_reader,
    find_checkpoint,
    load_for_evaluation,
    open_run,
    read_run_config,
)
from hmoe_rec.training.learned import Examples, ReadExamples, learned_from
from hmoe_rec.training.task import TrainTask
from hmoe_rec.types import CheckpointError, ConfigError
from hmoe_rec.uncertainty import KINDS
from hmoe_rec.uncertainty.estimates import (
    BootstrapHeads,
    Ensemble,
    Estimate,
    LastLayer,
    MCDropout,
    RowLaplace,
    has_dropout,
)
from hmoe_rec.uncertainty.posterior import LastLayerPosterior
from hmoe_rec.uncertainty.rows import RowPosterior, eligible

P = ParamSpec("P")
R = TypeVar("R")
TOWERS_OF = {  # kinds that need towers of some kind
    "laplace": ("mlp",),
    "row_laplace": ("mlp", "sngp"),
    "sngp": ("sngp",),
    "bootstrap": ("bootstrap",),
}
LAST_LAYER = ("laplace", "row_laplace", "sngp")  # kinds that read the training data
OPTIONS_OF = {  # kind -> options of a fit
    "laplace": ("data", "prior_precision"),
    "row_laplace": ("data", "prior_precision", "ids", "row_variance"),
    "sngp": ("data", "prior_precision"),
    "bootstrap": (),
    "mc_dropout": ("samples",),
    "ensemble": ("members",),
}


@dataclass(frozen=True)
class Fitted:
    """What `fit_uncertainty` saves.

    Attributes:
        options: `prior_precision` (and `ids`, `row_variance`: a number, or by field where it was chosen), or `samples`
            and `seed`, or `members`: pairs (run directory, checkpoint).
        sums: name -> sum over the examples.
        examples: rows that it was fitted on.
    """

    kind: str
    checkpoint: str
    fingerprint: str
    options: Mapping[str, Any]
    sums: Mapping[str, np.ndarray] = field(default_factory=dict)
    examples: int = 0


def fit_uncertainty(
    run_dir: str,
    kind: str,
    *,
    checkpoint: str = "best",
    data: str | Sequence[str] | None = None,
    prior_precision: float | None = None,
    ids: Sequence[str] | None = None,
    row_variance: float | None = None,
    samples: int | None = None,
    members: Sequence[str] = (),
    device: str | None = None,
) -> dict[str, Any]:
    """Makes an estimate for a run's checkpoint and saves it; laplace, row_laplace and sngp read the training data once.

    Args:
        kind: one of `hmoe_rec.uncertainty.KINDS`.
        data: labelled files to fit on; None = what the checkpoint has learned from (`hmoe_rec.training.learned`): the
            rows of data.train up to its step, the windows of a followed run, and what that one began with.
        prior_precision: of a last layer, > 0; the larger, the smaller the variance of what is not known; None = 1.
        ids: of row_laplace, id fields whose rows count; None = all with one id per example.
        row_variance: of row_laplace, > 0: times the prior variance of a row's entries that the tables show; None = by
            field, where the data are likeliest.
        samples: of mc_dropout, passes of each example, >= 2; None = 16.
        members: of ensemble, further runs, each a directory or DIRECTORY@CHECKPOINT; the run itself is the first. What
            "best" and "latest" mean is settled now.
        device: see `device_of`.

    Returns:
        {"file": ..., "checkpoint": directory, "examples": rows over all processes, "notes": what a person should know
        of these rows, "row_variance": what was given or chosen, of row_laplace only}.

    Raises:
        ConfigError: a kind that does not fit the run's towers or its dropout, options of another kind, or members of
            other data or of one and the same checkpoint.
        CheckpointError: no such checkpoint, or it is not known what it has learned from.
        DataError: what it has learned from is not there any more as it was.
    """
    config = read_run_config(run_dir)
    _check_kind(config, kind, run_dir)
    given = {"data": data, "prior_precision": prior_precision, "ids": ids, "row_variance": row_variance}
    given |= {"samples": samples, "members": members or None}
    _check_given(kind, {name: value for name, value in given.items() if value is not None})
    options: dict[str, Any] = {}
    if kind in LAST_LAYER:
        options = {"prior_precision": 1.0 if prior_precision is None else prior_precision}
    if kind == "row_laplace":
        options |= {"ids": None if ids is None else list(ids), "row_variance": row_variance}
    elif kind == "mc_dropout":
        options = {"samples": 16 if samples is None else samples, "seed": 0}
    with process_group(device_of(config, device)) as process:
        run = open_run(run_dir, config)
        sharded, found = load_for_evaluation(run, process, checkpoint)
        if kind == "mc_dropout":
            _check_dropout(hmoe_of(sharded), run_dir)
        elif kind == "ensemble":
            options = {"members": _members(members, config, found)}
        fitted, notes = Fitted(kind, found.uri, fingerprint(found), options), []
        if kind in LAST_LAYER:
            examples, notes = _examples(run_dir, config, found, process, data)
            fitted = _fit_sums(fitted, hmoe_of(sharded.eval()), config, process, examples)
        path = path_of(run_dir, kind, found)
        process.first(lambda: _save(path, fitted, found))
    chosen = {name: fitted.options[name] for name in ("row_variance",) if name in fitted.options}
    return {"file": path, "checkpoint": found.uri, "examples": fitted.examples, "notes": notes, **chosen}


def open_estimate(
    run_dir: str, config: RunConfig, process: Process, kind: str, checkpoint: str
) -> tuple[Estimate, Checkpoint]:
    """The estimate of a kind for a run's checkpoint; its models are in evaluation mode. A collective call.

    Raises:
        ConfigError: a kind that does not fit the run's towers, or that is not fitted yet.
        CheckpointError: no such checkpoint, or fitted for another one.
    """
    _check_kind(config, kind, run_dir)
    run = open_run(run_dir, config)
    sharded, found = load_for_evaluation(run, process, checkpoint)
    model = hmoe_of(sharded.eval())
    fitted = _load(run_dir, kind, found)
    if kind == "bootstrap":
        return _autocast(BootstrapHeads(model), config, process), found
    if kind == "mc_dropout":
        _check_dropout(model, run_dir)
        options = {} if fitted is None else fitted.options
        return _autocast(MCDropout(model, **options), config, process), found
    assert fitted is not None, f"{kind} is fitted"
    if kind == "ensemble":
        others = [_load_member(run_dir, checkpoint, process) for run_dir, checkpoint in fitted.options["members"]]
        return Ensemble([_autocast(model, config, process), *others]), found
    last_layer = _last_layer(model, process, fitted.options)
    try:
        _load_sums(last_layer, fitted.sums)
    except (KeyError, RuntimeError) as error:
        path = path_of(run_dir, kind, found)
        raise CheckpointError(f"{path}: its sums do not fit ({error}); it is of another version, fit again") from error
    return _autocast(last_layer, config, process), found


def hmoe_of(sharded: nn.Module) -> HMoE:
    """The model inside of the sharded training step."""
    task = get_unwrapped_module(sharded)
    assert isinstance(task, TrainTask) and isinstance(task.model, HMoE), type(task)
    return task.model


def path_of(run_dir: str, kind: str, checkpoint: Checkpoint) -> str:
    return io.join(run_dir, "uncertainty", f"{kind}-{checkpoint.uri.rstrip('/').rpartition('/')[2]}.npz")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Differs between checkpoints of one name but other contents."""
    return hashlib.sha256(json.dumps(checkpoint.files, sort_keys=True).encode()).hexdigest()


def _examples(
    run_dir: str, config: RunConfig, found: Checkpoint, process: Process, data: str | Sequence[str] | None
) -> tuple[list[Examples], list[str]]:
    """-> what is fitted on, and what to tell of it."""
    if not data:
        return learned_from(run_dir, config, found, process)
    uris = [data] if isinstance(data, str) else data
    return [ReadExamples(config, process, evaluation_reader(uris, config.schema_of_data, config, process))], []


def _fit_sums(fitted: Fitted, model: HMoE, config: RunConfig, process: Process, examples: Sequence[Examples]) -> Fitted:
    estimate = _last_layer(model, process, fitted.options)
    learn = _autocast(estimate.learn, config, process)
    steps = sum(part.steps for part in examples)
    with progress_bar("posterior") as progress:
        for step, (batch, weights) in enumerate(chain.from_iterable(part.weighted() for part in examples), 1):
            learn(batch, weights)
            progress(step, steps)
    for part in _parts(estimate).values():
        part.reduce_()
    options = fitted.options
    if isinstance(estimate, RowLaplace) and options["row_variance"] is None:
        options = {**options, "row_variance": estimate.rows.choose_factors()}
    sums = {f"{p}.{n}": x.cpu().numpy() for p, part in _parts(estimate).items() for n, x in part.state_dict().items()}
    return replace(fitted, options=options, sums=sums, examples=sum(part.rows for part in examples))


def _autocast(function: Callable[P, R], config: RunConfig, process: Process) -> Callable[P, R]:
    """In the run's precision, so that logits are those of training and prediction (`TrainTask`)."""
    return torch.autocast(process.device.type, torch.bfloat16, enabled=config.train.precision == "bf16")(function)


def _last_layer(model: HMoE, process: Process, options: Mapping[str, Any]) -> LastLayer:
    """Without examples; sizes are those of what the towers' last layers see.

    Raises:
        ConfigError: ids that are no fields with one id per example.
    """
    mixed = [torch.zeros(1, d, device=process.device) for d in model.mixture.out_dims]
    with torch.no_grad():
        dims = [f.shape[1] for f in model.towers.features(mixed)]  # type: ignore[operator]
    posterior = LastLayerPosterior(dims, prior_precision=options["prior_precision"], device=process.device)
    if "row_variance" not in options:
        return LastLayer(model, posterior)
    ids = eligible(model) if options["ids"] is None else options["ids"]
    try:
        factor = 1.0 if options["row_variance"] is None else options["row_variance"]
        rows = RowPosterior(model, ids, factor=factor, device=process.device)
    except ValueError as error:
        raise ConfigError(f"ids: {error}") from None
    return RowLaplace(model, posterior, rows)


def _parts(estimate: LastLayer) -> dict[str, LastLayerPosterior | RowPosterior]:
    rows = {"rows": estimate.rows} if isinstance(estimate, RowLaplace) else {}
    return {"last": estimate.posterior, **rows}


def _load_sums(estimate: LastLayer, sums: Mapping[str, np.ndarray]) -> None:
    for name, part in _parts(estimate).items():
        of_part = {key.partition(".")[2]: x for key, x in sums.items() if key.partition(".")[0] == name}
        part.load_state_dict({key: torch.from_numpy(x) for key, x in of_part.items()})


# ------------------------------------------------------------------------------------------------------- checks, files


def _check_kind(config: RunConfig, kind: str, run_dir: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    needed, tower = TOWERS_OF.get(kind), config.model.tower.kind
    if needed is not None and tower not in needed:
        fit = [k for k, towers in TOWERS_OF.items() if tower in towers]
        raise ConfigError(
            f"{run_dir}: kind {kind} needs towers of kind {' or '.join(needed)}, and this run's are {tower}; take kind "
            f"{' or '.join([*fit, 'ensemble'])}, or train with model.tower.kind={needed[0]}"
        )


def _check_given(kind: str, given: Mapping[str, Any]) -> None:
    """Args: given: options that are not left out."""
    if unfit := [name for name in given if name not in OPTIONS_OF[kind]]:
        own = ", ".join(OPTIONS_OF[kind]) or "none"
        raise ConfigError(f"{unfit[0]}: no option of kind {kind}, whose options are: {own}; leave it out")
    for name in ("prior_precision", "row_variance"):
        if name in given and not 0 < given[name] < math.inf:
            raise ConfigError(f"{name}: expected a finite number above 0, got {given[name]}")
    if given.get("samples", 2) < 2:
        raise ConfigError(f"samples: expected at least 2, got {given['samples']}")
    if kind == "ensemble" and "members" not in given:
        raise ConfigError("an ensemble needs at least one more run; give --member RUN or --member RUN@STEP")


def _check_dropout(model: HMoE, run_dir: str) -> None:
    if not has_dropout(model):
        raise ConfigError(f"{run_dir}: nothing to drop; kind mc_dropout needs a run with model.dropout above 0")


def _members(given: Sequence[str], config: RunConfig, first: Checkpoint) -> list[tuple[str, str]]:
    """Pairs (run directory, step); `first` is the checkpoint of the run itself. A collective call."""
    found, seen = [], {fingerprint(first)}
    for member in given:
        run_dir, _, wanted = member.partition("@")
        other = read_run_config(run_dir)
        if other.schema_of_data != config.schema_of_data:
            raise ConfigError(
                f"member {run_dir}: its data.schema differs; members of an ensemble read the same columns"
            )
        checkpoint = find_checkpoint(open_run(run_dir, other), wanted or "best")
        if fingerprint(checkpoint) in seen:
            raise ConfigError(
                f"member {member}: its checkpoint {checkpoint.uri} is in the ensemble already, and would add no "
                "spread; give another run or step"
            )
        seen.add(fingerprint(checkpoint))
        found.append((run_dir, str(checkpoint.step)))
    return found


def _load_member(run_dir: str, checkpoint: str, process: Process) -> Callable[[Batch], Tensor]:
    config = read_run_config(run_dir)
    sharded, _ = load_for_evaluation(open_run(run_dir, config), process, checkpoint)
    return _autocast(hmoe_of(sharded.eval()), config, process)


def _save(path: str, fitted: Fitted, checkpoint: Checkpoint) -> None:
    """What has this name is whole; of two that are fitted at once the last one stays.

    Raises:
        CheckpointError: a run that goes on has removed the checkpoint, or another run has its place.
    """
    if read_checkpoint(checkpoint.uri).files != checkpoint.files:
        raise CheckpointError(f"{checkpoint.uri}: is another checkpoint than when the fit began; fit again")
    record = {name: getattr(fitted, name) for name in ("kind", "checkpoint", "fingerprint", "options", "examples")}
    content = memory.BytesIO()
    arrays: dict[str, Any] = dict(fitted.sums)
    np.savez(content, record=np.frombuffer(json.dumps(record).encode(), np.uint8), **arrays)
    io.write_bytes(path, content.getvalue())


def _load(run_dir: str, kind: str, checkpoint: Checkpoint) -> Fitted | None:
    """What was fitted for this checkpoint; None where nothing is, for kinds that can do without.

    Raises:
        ConfigError: not fitted yet.
        CheckpointError: fitted for another checkpoint of that name, or a damaged file.
    """
    path = path_of(run_dir, kind, checkpoint)
    if not io.exists(path):
        if kind in ("bootstrap", "mc_dropout"):
            return None
        more = " --member OTHER_RUN" if kind == "ensemble" else ""
        raise ConfigError(
            f"{run_dir}: no {kind} estimate for step {checkpoint.step}; make it with "
            f"hmoe-rec uncertainty fit {run_dir} --kind {kind} --checkpoint {checkpoint.step}{more}"
        )
    try:
        with io.open(path, "rb") as file, np.load(memory.BytesIO(file.read()), allow_pickle=False) as content:
            record = json.loads(content["record"].tobytes())
            sums = {name: content[name] for name in content.files if name != "record"}
    except StorageError as refused:
        raise CheckpointError(str(refused)) from refused
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove it and fit again") from error
    if record["fingerprint"] != fingerprint(checkpoint):
        raise CheckpointError(f"{path}: was fitted for another checkpoint of step {checkpoint.step}; fit again")
    return Fitted(**record, sums=sums)
