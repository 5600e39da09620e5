"""`train.exposure` in a run: propensities fitted to the training data, and the weights of positives that follow."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from hmoe_rec import io
from hmoe_rec.config import ResolvedData, RunConfig, load_config
from hmoe_rec.config.sections import ExposureConfig
from hmoe_rec.data.exposures import exposure_counts
from hmoe_rec.data.parquet import ParquetSource
from hmoe_rec.losses import exposure
from hmoe_rec.progress import progress_bar
from hmoe_rec.sharding.process import Process
from hmoe_rec.training.sampling import summed


def with_exposure_weights(config: RunConfig, data: ResolvedData, process: Process) -> RunConfig:
    """The configuration with the weights of positives by exposure, so that they travel with the run.

    A run that is resumed keeps those that it was trained with. Every process counts a share of the log, of which all
    rows are read, sampled or not.

    Raises:
        DataError: a value in the training data that cannot be right.
        SchemaError: a column that is missing.
    """
    given = config.train.exposure
    if given.column is None or given.fitted is not None:
        return config
    before = io.join(config.train.run_dir, "config.yaml")
    if config.train.resume and io.exists(before):
        known = load_config(before).train.exposure
        if known.model_copy(update={"fitted": None}) == given:
            return _with(config, known)
    with progress_bar("exposures") as progress:
        counts = exposure_counts(
            ParquetSource(data.train, data.schema),
            data.schema,
            given.column,
            strata=given.strata if given.propensity == "estimated" else (),
            max_exposures=given.max_exposures,
            rank=process.rank,
            world_size=process.world_size,
            progress=progress,
        )
    rows_TSK, positives_TSK = summed(counts)
    chosen = [(t, task) for t, task in enumerate(config.tasks) if task in (given.tasks or config.tasks)]
    fitted = {task: _fitted(given, rows_TSK[t], positives_TSK[t]) for t, task in chosen}
    return _with(config, given.model_copy(update={"fitted": fitted}))


def _with(config: RunConfig, section: ExposureConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"exposure": section})})


def _fitted(given: ExposureConfig, rows_SK: np.ndarray, positives_SK: np.ndarray) -> dict[str, Any]:
    """Of one task: propensity and weight by exposure, and what the weights do."""
    if isinstance(given.propensity, str):  # estimated
        propensity = exposure.estimate_propensity(
            rows_SK, positives_SK, smoothing=given.smoothing, falling=given.monotone == "falling"
        )
    else:
        propensity = _given_propensity(given.propensity, given.max_exposures)
    effect = exposure.effect_of(propensity, given.clip, rows_SK.sum(0), positives_SK.sum(0))
    weights = exposure.clipped_weights(propensity, given.clip) / (effect.mean_weight if given.normalize else 1.0)
    lists = {"propensity": tuple(map(_short, propensity)), "weights": tuple(map(_short, weights.tolist()))}
    return lists | {name: _short(value) for name, value in asdict(effect).items()}


def _given_propensity(given: dict[str, Any], exposures: int) -> list[float]:
    """By exposure, as many as are told apart."""
    (kind, value), *_ = given.items()
    if kind == "table":
        return [float(value[min(k, len(value) - 1)]) for k in range(exposures)]
    make = exposure.power_propensity if kind == "power" else exposure.once_propensity
    return make(exposures, value)


def _short(x: float) -> float:
    """Seven digits: for a file that people read."""
    return float(f"{x:.7g}")


def exposure_lines(config: RunConfig) -> Iterator[str]:
    """What a person should know when a run begins, a line per task."""
    for task, found in (config.train.exposure.fitted or {}).items():
        weights, mean = np.atleast_1d(found["weights"]), found["mean_weight"]
        shift = "which they are divided by" if config.train.exposure.normalize else "so that predictions fall"
        yield (
            f"exposures: positives of {task} weigh {weights[0]:.3f} at the first and {weights[-1]:.3f} at exposure "
            f"{len(weights)} or later; without normalization {mean:.4f} on average "
            f"(logit {found['logit_shift']:+.4f}), {shift}"
        )
