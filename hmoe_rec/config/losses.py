"""`train.losses` and `train.task_weighting` of a run file -> what is wrong with them, one line each."""

from collections.abc import Mapping, Sequence
from typing import Any

from hmoe_rec.config.parts import check_part
from hmoe_rec.config.sections import TrainConfig
from hmoe_rec.data.schema import Schema
from hmoe_rec.kinds import resolve
from hmoe_rec.losses import LOSSES, USER, WEIGHTINGS
from hmoe_rec.suggest import unknown


def loss_problems(train: TrainConfig, tasks: Sequence[str], schema: Schema | None, tower: str = "mlp") -> list[str]:
    """
    Args:
        tower: kind of the towers.
        schema: None = not known, so that the groups of `within` are not checked.
    """
    problems = []
    for task, parts in train.losses.items():
        place = f"train.losses.{task}"
        if task not in tasks:
            problems.append(f"{place}: {unknown('task', task, tasks)}")
        if not parts:
            problems.append(f"{place}: none given; expected at least one, such as [bce] (or leave the task out)")
        for i, part in enumerate(parts):
            found = check_part(part, LOSSES, ()) or _class_problems(part, tower)
            if not found and schema is not None and part.get("within") is not None:
                found = [f".within: {problem}" for problem in _group_problems(part["within"], schema)]
            problems += [f"{place}.{i}{problem}" for problem in found]
    sizes: tuple[Any, ...] = ([1.0] * len(tasks), False)
    problems += [f"train.task_weighting{line}" for line in check_part(train.task_weighting, WEIGHTINGS, sizes)]
    return problems


def _class_problems(part: Mapping[str, Any], tower: str) -> list[str]:
    if tower != "mlp" and getattr(resolve(part["kind"], LOSSES), "two_logits", False):
        return [f".kind: {part['kind']} needs two logits per task, which only towers of kind mlp have, not {tower}"]
    return []


def _group_problems(name: str, schema: Schema) -> list[str]:
    """A group is the user, or the value of an id field that has one value."""
    if name == USER:
        return [] if schema.user_key else ["'user' is the schema's user_key, and it has none; name a column there"]
    ids = {field.name: field for field in schema.features().ids}
    if name not in ids:
        return [unknown("id field", name, [USER, *ids])]
    if ids[name].multi_valued:
        return [f"{name} is a list; expected 'user' or an id field with one id per example"]
    return []
