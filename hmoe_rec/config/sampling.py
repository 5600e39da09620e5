"""`data.sampling` and `train.exposure` of a run file -> what is wrong with them, and the parts that they describe."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hmoe_rec.config.sections import SamplingConfig
from hmoe_rec.data.schema import Schema
from hmoe_rec.suggest import unknown
from hmoe_rec.towers.layout import Layout

if TYPE_CHECKING:
    from hmoe_rec.config.run import RunConfig
    from hmoe_rec.data.sampling import RowSampler


def sampler_of(given: SamplingConfig, schema: Schema) -> "RowSampler | None":
    """The sampler of a checked configuration; None where all rows are read."""
    from hmoe_rec.data.sampling import RowSampler

    if not given.active:
        return None
    tasks = schema.task_names
    return RowSampler(
        schema,
        rates=given.rates(tasks),
        slice_column=given.slices.column,
        slice_rates={value: given.rates(tasks, value) for value in given.slices.rates},
        probability=given.probability.column,
        scale=given.probability.scale,
        correction=given.correction,
        key=given.key,
        seed=given.seed,
    )


def sampling_problems(config: "RunConfig", layout: Layout) -> list[str]:
    """Tasks without a rate, and rules whose correction would not be exact; one line each."""
    given, problems = config.data.sampling, []
    places = {"negatives": given.negatives, **{f"slices.rates.{v}": rate for v, rate in given.slices.rates.items()}}
    for place, rate in places.items():
        if isinstance(rate, dict):
            problems += [f"{place}: {unknown('task', task, config.tasks)}" for task in rate if task not in config.tasks]
            missing = [task for task in config.tasks if task not in rate]
            problems += (
                [f"{place}: no rate for task {', '.join(missing)}; give 1 to keep all its negatives"] if missing else []
            )
    if given.slices.rates and given.slices.column is None:
        problems.append("slices.column: missing; name the column whose values slices.rates lists")
    if given.slices.column is not None and not given.slices.rates:
        problems.append("slices.rates: missing; give value -> rate, or leave out slices.column")
    if given.correction == "logit":
        problems += _inexact(given, config.schema_of_data, layout)
    return [f"data.sampling.{problem}" for problem in problems]


def _inexact(given: SamplingConfig, schema: Schema, layout: Layout) -> Iterator[str]:
    """Where no offset of the logit makes up for the sampling."""
    if given.probability.column is not None:
        yield "correction: logit is not exact for probability.column, which the model does not see; use weights"
    if given.slices.column is None:
        return
    fields = [c for c in schema.ids if c.source == given.slices.column and c.pooling is None and c.mode != "modulo"]
    if not fields:
        yield (
            f"correction: logit is not exact for slices.column {given.slices.column}, since no id field of the model "
            "(with one id, and not modulo) is read from it; use weights, or make it a field"
        )
    for task in layout.routing.tasks if fields else ():
        sets = {e.set for e in layout.experts if e.name in layout.routing.trained_by(task)}
        seen = [s.fields for s in layout.sets if s.name in sets]
        if not any(not names or any(f.name in names for f in fields) for names in seen):
            yield (
                f"correction: logit is not exact for task {task}, which trains no set that has "
                f"slices.column {given.slices.column} among its fields; use weights, or give it to one"
            )


def exposure_problems(config: "RunConfig") -> list[str]:
    given, problems = config.train.exposure, []
    problems += [f"tasks: {unknown('task', task, config.tasks)}" for task in given.tasks if task not in config.tasks]
    if given.clip[0] > given.clip[1]:
        problems.append(f"clip: expected the least weight first, got {list(given.clip)}")
    return [f"train.exposure.{problem}" for problem in problems]
