"""A run file's nested dicts -> `RunConfig`: schema read, preset expanded, defaults filled in; or all problems at once.

::

    problems of keys and types   ->  what is wrong is left out, so that the rest can still be checked
    names across sections        ->  fields, tasks, sets, experts, routes
    options of parts             ->  against the constructors of their classes
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field, ValidationError

from hmoe_rec import kinds
from hmoe_rec.config.data import statistics_of, synthetic_schema
from hmoe_rec.config.encoding import encoding_of, with_known_widths
from hmoe_rec.config.file import apply_overrides, read_yaml, to_yaml
from hmoe_rec.config.layout import PRESET_KEYS, build_layout, spell_out
from hmoe_rec.config.losses import loss_problems
from hmoe_rec.config.online import OnlineConfig
from hmoe_rec.config.sampling import exposure_problems, sampling_problems
from hmoe_rec.config.sections import PLANS, DataConfig, ModelConfig, ShardingConfig, TrainConfig
from hmoe_rec.config.tables import precisions_of, table_names, unknown_patterns
from hmoe_rec.data.schema import Schema
from hmoe_rec.data.strict import Part, render_problem
from hmoe_rec.sharding.topology import cluster_of
from hmoe_rec.suggest import did_you_mean, listing, unknown
from hmoe_rec.towers.layout import ExpertSpec, GateInput, Layout, Routing
from hmoe_rec.types import ConfigError, EmbeddingSet, Encoding, Features, HmoeError

SECTIONS = ("data", "features", "tasks", "model", "train", "online", "sharding")


class RunConfig(Part):
    """A whole run, resolved: the schema is read and the model is spelled out. Made by `load_config`."""

    data: DataConfig = Field(default=DataConfig(), description="what to learn from")
    model: ModelConfig = Field(default=ModelConfig(), description="sets, experts, routes, towers")
    train: TrainConfig = Field(default=TrainConfig(), description="how to train")
    online: OnlineConfig = Field(default=OnlineConfig(), description="a source without end, followed as it grows")
    sharding: ShardingConfig = Field(default=ShardingConfig(), description="how to lay the tables over processes")

    @property
    def schema_of_data(self) -> Schema:
        """`data.schema`, which every resolved configuration has."""
        assert self.data.schema is not None, "a resolved configuration has a schema"
        return self.data.schema

    @property
    def features(self) -> Features:
        """With the statistics of the numbers, as far as they are fitted."""
        fitted = statistics_of(self.data.statistics)
        features = self.schema_of_data.features()
        numbers = tuple(replace(n, statistics=fitted.get(n.name)) for n in features.numbers)
        return replace(features, numbers=numbers)

    @property
    def encoding(self) -> Encoding:
        return encoding_of(self.model.encoding)

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.schema_of_data.task_names

    def table_precisions(self) -> dict[str, str]:
        """Table -> precision."""
        names = table_names(self.layout().sets, self.features)
        return precisions_of(names, self.model.table_precision, self.model.table_precisions)

    def layout(self) -> Layout:
        """Sets, experts and routes as the model takes them."""
        model = self.model
        sets = tuple(EmbeddingSet(n, s.dim or 0, s.fields or (), s.owner) for n, s in model.sets.items())
        experts = tuple(
            ExpertSpec(name, e["kind"], e["set"], {k: v for k, v in e.items() if k not in ("kind", "set")})
            for name, e in model.experts.items()
        )
        cells = tuple(tuple(model.routes[t].get(e.name, "none") for e in experts) for t in self.tasks)
        gates = tuple(GateInput(g.sets, g.combine) for g in (model.gate_inputs[t] for t in self.tasks))
        routing = Routing(self.tasks, tuple(e.name for e in experts), cells, gates, model.combine)
        return Layout(sets, experts, routing)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, defaults included; null only where it is not the default."""
        return {key: value for key, value in _plain(self).items() if key != "online" or self.online != OnlineConfig()}

    def to_yaml(self) -> str:
        """The resolved run file; `load_config` reads it back to an equal configuration."""
        return to_yaml(self.to_dict())


def load_config(path: str, overrides: Iterable[str] = (), *, allow: Iterable[str] = ()) -> RunConfig:
    """Reads a run file and sets `key.path=value` overrides in it. Relative paths start at the current directory.

    Args:
        allow: packages whose parts may be imported, see `hmoe_rec.kinds.allow`.

    Raises:
        ConfigError: with every problem, one a line: path in the file, what was given, what is expected.
    """
    kinds.allow(allow)
    content = read_yaml(path)
    problems = apply_overrides(content, overrides)
    return resolve_config(content, where=path, problems=problems)


def resolve_config(
    content: Mapping[str, Any], *, where: str = "configuration", problems: Sequence[str] = ()
) -> RunConfig:
    """Nested dicts of a run file -> the resolved configuration.

    Args:
        where: what the message calls the source.
        problems: found before, to be reported with the others.

    Raises:
        ConfigError: see `load_config`.
    """
    content = {key: {} if value is None else value for key, value in deepcopy(dict(content)).items()}
    found = list(problems)
    origin = _place_schema(content, found)
    _leave_fields_out(content, found)
    _place_statistics(content, found)
    _place_pooling(content, found)
    tasks, fields = _names(content)
    config = _validate(content, origin, found)
    if config.data.tasks is not None:
        config, tasks = _chosen_tasks(config, tasks, found)
    if tasks:
        encoding = with_known_widths(config.model.encoding, found)
        config = config.model_copy(update={"model": config.model.model_copy(update={"encoding": encoding})})
        features = None if config.data.schema is None else config.features
        layout, wrong = build_layout(config.model, tasks, (*fields, *encoding.similarities), features)
        found += wrong + _unknown_tasks(config.train, tasks)
        found += loss_problems(config.train, tasks, config.data.schema, config.model.tower.kind)
        if layout is not None:
            if features is not None:
                found += unknown_patterns(table_names(layout.sets, features), config.model.table_precisions)
            config = config.model_copy(update={"model": _spelled_out(config.model, layout)})
            found += sampling_problems(config, layout) + exposure_problems(config)
    found += _data_problems(config) + _judge_problems(config) + _online_problems(config)
    found += _plan_problems(config.sharding) + _replica_problems(config)
    if found:
        found = list(dict.fromkeys(found))
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise ConfigError("\n  ".join([f"{where}: {count}", *found]))
    return config


# --------------------------------------------------------------------------------------------------------------- schema


def _place_schema(content: dict[str, Any], found: list[str]) -> str:
    """Puts the schema, wherever it is given, into data.schema as a mapping. -> what messages call its place."""
    data = content.setdefault("data", {})
    if not isinstance(data, dict):
        return "data.schema"
    top = {key: content.pop(key) for key in ("features", "tasks") if key in content}
    if top and data.get("schema") is not None:
        found += [
            f"{key}: data.schema is given too; give one of them (data.tasks chooses tasks of a schema)" for key in top
        ]
    elif top:
        features = top.get("features", {})
        if isinstance(features, dict):
            data["schema"] = features | ({"tasks": top["tasks"]} if "tasks" in top else {})
        else:
            found.append(f"features: expected a mapping with ids, sequences, numbers, vectors; got {features!r}")
        return "features"
    elif isinstance(data.get("schema"), str):
        origin = data.pop("schema")
        try:
            data["schema"] = read_yaml(origin)
        except HmoeError as error:
            found.append(f"data.schema: {error}")
        return origin
    elif data.get("schema") is None and isinstance(data.get("synthetic"), dict):
        try:
            data["schema"] = synthetic_schema(data["synthetic"]).to_dict()
        except ConfigError as error:
            found += str(error).splitlines()
    elif data.get("schema") is None:
        found.append("data.schema: missing; expected a schema file, the schema itself, or sections features and tasks")
    return "data.schema"


def _leave_fields_out(content: dict[str, Any], found: list[str]) -> None:
    """Removes the fields of data.leave_out from data.schema, so that the resolved file is complete without it."""
    data = content["data"]
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, dict) or not data.get("leave_out"):
        return
    given = data.pop("leave_out")
    patterns = [str(p) for p in (given if isinstance(given, list | tuple) else [given])]
    _, fields = _names(content)
    left = {name for name in fields if any(fnmatchcase(name, p) for p in patterns)}
    found += [
        f"data.leave_out: {unknown('field', p, fields)}" for p in patterns if not any(fnmatchcase(f, p) for f in fields)
    ]
    for section in ("ids", "numbers", "vectors"):
        if isinstance(schema.get(section), list):
            schema[section] = [p for p in schema[section] if not isinstance(p, dict) or p.get("name") not in left]
    kept = []
    for sequence in schema.get("sequences") or []:
        if isinstance(sequence, dict) and isinstance(columns := sequence.get("columns"), dict):
            sequence["columns"] = {column: target for column, target in columns.items() if column not in left}
            kept += [sequence] if sequence["columns"] else []
        else:
            kept.append(sequence)
    if "sequences" in schema:
        schema["sequences"] = kept


def _place_statistics(content: dict[str, Any], found: list[str]) -> None:
    """Puts the statistics, given as a file, into data.statistics as a mapping."""
    data = content["data"]
    given = data.get("statistics") if isinstance(data, dict) else None
    if given is None:
        return
    try:
        data["statistics"] = read_yaml(given) if isinstance(given, str) else given
        statistics_of(data["statistics"])
    except HmoeError as error:
        found += [f"data.statistics: {line}" for line in str(error).splitlines()]
        del data["statistics"]


def _place_pooling(content: dict[str, Any], found: list[str]) -> None:
    """Puts the pooling factors, given as a file, into sharding.pooling as a mapping."""
    sharding = content.get("sharding")
    if isinstance(sharding, dict) and isinstance(given := sharding.get("pooling"), str):
        try:
            sharding["pooling"] = read_yaml(given)
        except HmoeError as error:
            found.append(f"sharding.pooling: {error}")
            del sharding["pooling"]


def _names(content: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tasks, fields) of a schema that may be wrong in other respects, in the order of `Features.field_names`."""
    data = content.get("data")
    schema = data.get("schema") if isinstance(data, dict) else None
    parts = {key: value for key, value in schema.items() if isinstance(value, list)} if isinstance(schema, dict) else {}
    named = {
        key: [str(p["name"]) for p in parts.get(key, []) if isinstance(p, dict) and "name" in p]
        for key in ("tasks", "ids", "numbers", "vectors")
    }
    columns = [p.get("columns") for p in parts.get("sequences", []) if isinstance(p, dict)]
    behaviors = [str(column) for mapping in columns if isinstance(mapping, dict) for column in mapping]
    return tuple(named["tasks"]), (*named["ids"], *behaviors, *named["numbers"], *named["vectors"])


def _chosen_tasks(config: RunConfig, tasks: Sequence[str], found: list[str]) -> tuple[RunConfig, tuple[str, ...]]:
    """The schema with the tasks of data.tasks only, in that order."""
    chosen = config.data.tasks or ()
    found += [f"data.tasks: {unknown('task', task, tasks)}" for task in chosen if task not in tasks]
    found += [] if chosen else [f"data.tasks: none given; expected some of {', '.join(tasks)}, or null for all"]
    found += [f"data.tasks: '{task}' is listed twice" for task in dict.fromkeys(chosen) if chosen.count(task) > 1]
    kept = tuple(task for task in dict.fromkeys(chosen) if task in tasks)
    schema = config.data.schema
    if schema is not None and kept:
        by_name = {task.name: task for task in schema.tasks}
        schema = schema.model_copy(update={"tasks": tuple(by_name[task] for task in kept)})
    data = config.data.model_copy(update={"schema": schema, "tasks": None})
    return config.model_copy(update={"data": data}), kept


# ------------------------------------------------------------------------------------------------------- keys and types


def _validate(content: dict[Any, Any], origin: str, found: list[str]) -> RunConfig:
    """Reports wrong keys and values, leaves them out, and goes on with the rest."""
    while True:
        try:
            return RunConfig.model_validate(content)
        except ValidationError as invalid:
            errors = invalid.errors()
        found += [_problem(error, origin) for error in errors]
        paths = [error["loc"][:-1] if error["type"] == "missing" else error["loc"] for error in errors]
        if not any([_leave_out(content, path) for path in paths]):
            for path in paths:  # such as a key that is no string: its section goes
                content.pop(path[0], None)


def _problem(error: Any, origin: str) -> str:
    """One line; keys of the schema are shown where the person wrote them."""
    loc = error["loc"]
    if error["type"] == "extra_forbidden" and len(loc) == 1:
        return f"{loc[0]}: {unknown('section', loc[0], SECTIONS)}"
    if loc[:2] == ("data", "schema") and len(loc) > 2:
        in_features = origin == "features" and loc[2] != "tasks"
        place = f"{origin}: " if origin not in ("features", "data.schema") else ""
        start = ("features",) if in_features else loc[:2] if origin == "data.schema" else ()
        return place + render_problem(dict(error) | {"loc": (*start, *loc[2:])})
    line = render_problem(error)
    names = re.findall(r"'([^']*)'", error["msg"]) if error["type"] == "literal_error" else []
    return line + did_you_mean(error["input"], names)


def _leave_out(content: Any, loc: Sequence[Any]) -> bool:
    """Removes the value at a path, if there is one. Of a list, and of the schema, all is removed."""
    holder = content
    for depth, key in enumerate(loc):
        if not isinstance(holder, dict) or key not in holder:
            return False
        child = holder[key]
        if depth == len(loc) - 1 or not isinstance(child, dict) or loc[: depth + 1] == ("data", "schema"):
            del holder[key]
            return True
        holder = child
    return False


# ------------------------------------------------------------------------------------------------ names across sections


def _unknown_tasks(train: TrainConfig, tasks: Sequence[str]) -> list[str]:
    named = [("train.best.task", train.best.task)]
    named += [("train.early_stop.task", train.early_stop.task)] if train.early_stop else []
    named += [("train.task_weights", task) for task in train.task_weights]
    return [
        f"{place}: {unknown('task', task, tasks)}" for place, task in named if task is not None and task not in tasks
    ]


def _data_problems(config: RunConfig) -> list[str]:
    data, problems = config.data, []
    if data.synthetic is not None:
        given = [split for split in ("train", "validation", "test") if getattr(data, split)]
        problems += [f"data.{split}: data.synthetic makes it; remove one of them" for split in given]
    else:
        if not data.train and config.online.follow is None:
            problems.append("data.train: missing; expected a Parquet file, directory, glob or URI (or data.synthetic)")
        if config.train.early_stop is not None and not data.validation:
            problems.append("train.early_stop: needs data.validation; give it, or set early_stop: null")
    return problems


def _judge_problems(config: RunConfig) -> list[str]:
    schema, stop = config.data.schema, config.train.early_stop
    judges = {"train.best": config.train.best} | ({} if stop is None else {"train.early_stop": stop})
    return [
        f"{place}.metric: gauc needs groups; set `user_key:` in the schema, or take auc"
        for place, judge in judges.items()
        if judge.metric == "gauc" and schema is not None and schema.user_key is None
    ]


def _online_problems(config: RunConfig) -> list[str]:
    online, train, problems = config.online, config.train, []
    if online.follow is None:
        return []
    if train.decay != "constant":
        problems.append(f"train.decay: {train.decay} needs a last step, and online.follow has none; use constant")
    if train.early_stop is not None:
        problems.append("train.early_stop: not with online.follow; set early_stop: null")
    if config.data.sampling.active:
        problems.append(
            "data.sampling: not with online.follow, which tests on every row that it trains on; leave it out"
        )
    if not config.data.train and config.data.synthetic is None:
        needing = {
            "train.exposure.column": train.exposure.column is not None and train.exposure.fitted is None,
            "sharding.measure_pooling": config.sharding.measure_pooling,
        }
        problems += [
            f"{key}: needs data.train beside online.follow, to count on" for key, is_it in needing.items() if is_it
        ]
    if online.order == "time" and config.data.schema is not None and config.data.schema.time is None:
        problems.append("online.order: time needs the schema's time column; set `time:` in the schema")
    if online.sketch_bits & (online.sketch_bits - 1):
        problems.append(f"online.sketch_bits: expected a power of two, got {online.sketch_bits}")
    return problems


def _plan_problems(sharding: ShardingConfig) -> list[str]:
    plan, problems = sharding.plan, []
    if plan not in PLANS and not plan.endswith(".json"):
        problems.append(f"sharding.plan: {unknown('plan', plan, PLANS)} (or the path of a plan, .json)")
    if sharding.topology is not None:
        try:
            cluster_of(sharding.topology)
        except HmoeError as error:
            lines = [line.strip() for line in str(error).removeprefix("topology: ").splitlines()]
            problems.append("sharding.topology: " + "; ".join(lines))
    if plan != "auto" and (sharding.constraints or sharding.together or sharding.apart):
        problems.append(f"sharding.constraints: only plan auto keeps constraints, together and apart; plan is {plan!r}")
    return problems


def _replica_problems(config: RunConfig) -> list[str]:
    """What needs one and the same row everywhere at every step, which replica groups have after an averaging only."""
    problems, schema = [], config.data.schema
    if config.sharding.replicas > 1:
        managed = [column.name for column in (schema.ids if schema else ()) if column.mode == "managed"]
        if managed:
            problems.append(
                f"sharding.replicas: groups would each give rows of {listing(managed)} (mode: managed) away; "
                "take mode: hash, or sharding.replicas: 1"
            )
        if config.train.publish is not None:
            problems.append(
                "sharding.replicas: averaging changes rows that no batch has touched, which deltas of train.publish "
                "would miss; remove train.publish, or set sharding.replicas: 1"
            )
    return problems


def _spelled_out(model: ModelConfig, layout: Layout) -> ModelConfig:
    kept = {key: value for key, value in _plain(model).items() if key not in (*PRESET_KEYS, "preset", "expert")}
    from_preset = {} if model.preset is None else {"from_preset": model.preset}
    return ModelConfig.model_validate(kept | from_preset | spell_out(layout))


def _plain(part: Part) -> dict[str, Any]:
    """A section as nested dicts, without what is empty by default."""
    content = {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if value in (None, (), {}) and value == field.default:
            continue
        content[name] = _plain_value(value)
    return content | {name: _plain_value(value) for name, value in (part.model_extra or {}).items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Schema):
        return value.to_dict()
    if isinstance(value, Part):
        return _plain(value)
    if isinstance(value, Mapping):
        return {key: _plain_value(item) for key, item in value.items()}
    return [_plain_value(item) for item in value] if isinstance(value, list | tuple) else value
