"""The `model` section of a run file and the data's tasks and fields -> a `Layout`, or everything that is wrong with it.

A preset is expanded into sets, experts, routes and gate inputs; what the file spells out beside it amends the preset,
name by name. The options of an expert are the keyword-only arguments of its class: a new kind needs no configuration.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hmoe_rec.config.encoding import encoding_of, encoding_problems, set_encoders
from hmoe_rec.config.parts import check_part
from hmoe_rec.config.sections import ModelConfig
from hmoe_rec.experts import EXPERTS
from hmoe_rec.kinds import resolve
from hmoe_rec.suggest import unknown
from hmoe_rec.towers import TOWERS
from hmoe_rec.towers.layout import ExpertSpec, GateInput, Layout, Routing, validate
from hmoe_rec.towers.routing import PRESETS, preset, preset_options
from hmoe_rec.types import ConfigError, EmbeddingSet, Features

if TYPE_CHECKING:
    from hmoe_rec.encoding.fields import FieldEncoder

PRESET_KEYS = tuple(dict.fromkeys(option for name in PRESETS for option in preset_options(name)))
DEFAULT_DIM = 16
Spelled = dict[str, dict[str, Any]]


def build_layout(
    model: ModelConfig, tasks: Sequence[str], fields: Sequence[str], features: Features | None
) -> tuple[Layout | None, list[str]]:
    """
    Args:
        tasks: names of the tasks, in the order of the labels.
        fields: names of all fields that an expert may see.
        features: the fields themselves; None = the schema is wrong, so that sizes are not known.

    Returns:
        The layout, and the problems, each with its path in the run file; the layout is None if there are any.
    """
    try:
        spelled = _amended(_preset_spelled(model, tasks), model)
    except ConfigError as error:
        return None, [f"model.{line}" for line in str(error).splitlines()]
    problems = _missing_parts(spelled) + _unknown_routes(spelled, tasks)
    if any(not {"kind", "set"} <= set(expert) for expert in spelled["experts"].values()):
        return None, problems
    layout = _layout(spelled, model.combine, tasks)
    problems += [f"model.{problem}" for problem in validate(layout, tasks, fields)]
    encoders: Mapping[str, FieldEncoder] = {}
    if features is not None:
        wrong = encoding_problems(model.encoding, features)
        if not wrong:
            encoders, wrong = set_encoders(encoding_of(model.encoding), features, layout)
        problems += wrong
    problems += _expert_problems(layout, encoders, model.expert_dim) + _tower_problems(model, tasks)
    return (None if problems else layout), problems


def spell_out(layout: Layout) -> dict[str, Any]:
    """The keys `sets`, `experts`, `routes` and `gate_inputs` of a run file that mean this layout."""
    routing = layout.routing
    return {
        "sets": {s.name: _without_none(dim=s.dim, fields=s.fields or None, owner=s.owner) for s in layout.sets},
        "experts": {e.name: {"kind": e.kind, "set": e.set, **e.options} for e in layout.experts},
        "routes": {
            task: {expert: cell for expert, cell in zip(routing.experts, row, strict=True) if cell != "none"}
            for task, row in zip(routing.tasks, routing.cells, strict=True)
        },
        "gate_inputs": {
            task: {"sets": gate.sets, "combine": gate.combine}
            for task, gate in zip(routing.tasks, routing.gate_inputs, strict=True)
        },
    }


def _preset_spelled(model: ModelConfig, tasks: Sequence[str]) -> Spelled:
    given = {key: value for key in PRESET_KEYS if (value := getattr(model, key)) is not None}
    if model.preset is None:
        alone = [key for key in (*given, "expert") if key != "embedding_dim" and getattr(model, key) is not None]
        if not (alone or model.sets or model.experts or model.routes):
            raise ConfigError(f"preset: missing; expected one of {', '.join(PRESETS)}, or sets, experts and routes")
        if alone:
            raise ConfigError(
                "\n".join(f"{key}: only a preset uses it; give model.preset, or remove it" for key in alone)
            )
        return {"sets": {}, "experts": {}, "routes": {}, "gate_inputs": {}}
    expert = {} if model.expert is None else {"expert": model.expert}
    return spell_out(preset(model.preset, tasks, **expert, combine=model.combine, **given))


def _amended(spelled: Spelled, model: ModelConfig) -> Spelled:
    """What the file spells out amends the preset: new names are added, known ones changed; a new kind drops options."""
    sets = {name: dict(options) for name, options in spelled["sets"].items()}
    for name, given in model.sets.items():
        sets[name] = sets.get(name, {}) | given.model_dump(include=given.model_fields_set)
        sets[name]["dim"] = sets[name].get("dim") or model.embedding_dim or DEFAULT_DIM
    experts = {name: dict(options) for name, options in spelled["experts"].items()}
    for name, given in model.experts.items():
        old = experts.get(name, {})
        if given.get("kind", old.get("kind")) != old.get("kind"):
            old = {key: value for key, value in old.items() if key == "set"}
        experts[name] = old | given
    routes = {task: dict(row) for task, row in spelled["routes"].items()}
    for task, row in model.routes.items():
        routes[task] = routes.get(task, {}) | row
    gates = spelled["gate_inputs"] | {task: gate.model_dump() for task, gate in model.gate_inputs.items()}
    return {"sets": sets, "experts": experts, "routes": routes, "gate_inputs": gates}


def _missing_parts(spelled: Spelled) -> list[str]:
    return [
        f"model.experts.{name}.{key}: missing; expected {expected}"
        for name, options in spelled["experts"].items()
        for key, expected in (("kind", f"one of {', '.join(EXPERTS)}"), ("set", "the set that it reads"))
        if key not in options
    ]


def _unknown_routes(spelled: Spelled, tasks: Sequence[str]) -> list[str]:
    """Names that a `Routing` cannot express: its columns are the experts and its gates those of its rows."""
    experts = list(spelled["experts"])
    problems = [
        f"model.routes.{task}.{expert}: {unknown('expert', expert, experts)}"
        for task, row in spelled["routes"].items()
        for expert in row
        if expert not in experts
    ]
    return problems + [
        f"model.gate_inputs.{task}: {unknown('task', task, tasks)}"
        for task in spelled["gate_inputs"]
        if task not in tasks
    ]


def _layout(spelled: Spelled, combine: Any, tasks: Sequence[str]) -> Layout:
    sets = tuple(
        EmbeddingSet(name, options["dim"], tuple(options.get("fields") or ()), options.get("owner"))
        for name, options in spelled["sets"].items()
    )
    experts = tuple(
        ExpertSpec(name, o["kind"], o["set"], {k: v for k, v in o.items() if k not in ("kind", "set")})
        for name, o in spelled["experts"].items()
    )
    rows = [t for t in tasks if t in spelled["routes"]] + [t for t in spelled["routes"] if t not in tasks]
    cells = tuple(tuple(spelled["routes"][task].get(e.name, "none") for e in experts) for task in rows)
    gates = []
    for task in rows:
        # Without a gate input: the first set that the task trains, which cannot leak gradient into another task's set.
        trained = [e.set for e in experts if spelled["routes"][task].get(e.name) == "train"]
        given = spelled["gate_inputs"].get(
            task, {"sets": trained[:1] or list(spelled["sets"])[:1], "combine": "concat"}
        )
        gates.append(GateInput(tuple(given["sets"]), given["combine"]))
    return Layout(sets, experts, Routing(tuple(rows), tuple(e.name for e in experts), cells, tuple(gates), combine))


def _expert_problems(layout: Layout, encoders: "Mapping[str, FieldEncoder]", expert_dim: int) -> list[str]:
    """One line per problem, also where a preset gives many experts the same options."""
    names: dict[str, list[str]] = {}
    for expert in layout.experts:
        for problem in _problems_of(expert, encoders.get(expert.set), expert_dim):
            names.setdefault(problem, []).append(expert.name)
    others = {problem: f" (and {', '.join(named[1:])})" if named[1:] else "" for problem, named in names.items()}
    return [f"model.experts.{named[0]}{problem}{others[problem]}" for problem, named in names.items()]


def _problems_of(expert: ExpertSpec, encoder: "FieldEncoder | None", expert_dim: int) -> list[str]:
    from hmoe_rec.assembly import expert_sizes  # imports torch

    part = {"kind": expert.kind, **expert.options}
    problems = check_part(part, EXPERTS, None)
    if problems or encoder is None:
        return problems
    try:
        sizes = expert_sizes(resolve(expert.kind, EXPERTS), encoder, expert_dim)
    except ValueError as error:
        return [f": {error}"]
    return check_part(part, EXPERTS, sizes, encoder.field_names)


def _tower_problems(model: ModelConfig, tasks: Sequence[str]) -> list[str]:
    tower = {"kind": model.tower.kind, **model.tower.options}
    sizes = (tuple(tasks), (model.expert_dim,) * len(tasks))
    return [f"model.tower{problem}" for problem in check_part(tower, TOWERS, sizes)]


def _without_none(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
