"""Run files: what they become, what is said about every mistake, and that a resolved one reads back equal."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from hmoe_rec import kinds
from hmoe_rec.config import RunConfig, load_config, prepare_data, resolve_config
from hmoe_rec.config.data import synthetic_dir
from hmoe_rec.config.file import apply_overrides, parse_yaml, to_yaml
from hmoe_rec.towers.routing import PRESETS, preset
from hmoe_rec.types import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))

SCHEMA: dict[str, Any] = {
    "ids": [
        {"name": "user", "num_embeddings": 7},
        {"name": "item", "num_embeddings": 11, "mode": "hash"},
    ],
    "sequences": [{"name": "history", "columns": {"hist_item": "item"}, "max_length": 5}],
    "numbers": [{"name": "price"}],
    "tasks": [{"name": "click"}, {"name": "like"}],
}
FIELDS = ("user", "item", "hist_item", "price")


def run_file(**sections: Any) -> dict[str, Any]:
    """A sound run file, with sections or keys of sections replaced."""
    content: dict[str, Any] = {
        "data": {"train": "train.parquet", "validation": "validation.parquet", "schema": SCHEMA},
        "model": {"preset": "stem", "embedding_dim": 6, "expert": {"kind": "flat_dnn", "hidden": [5]}, "expert_dim": 4},
    }
    for section, keys in sections.items():
        content[section] = {**content.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return content


SPELLED_OUT = {
    "preset": None,
    "expert": None,
    "embedding_dim": None,
    "expert_dim": 4,
    "sets": {"s": {"dim": 6}, "u": {"dim": 4, "fields": ["user", "price"]}},
    "experts": {"e": {"kind": "dcnv2", "set": "s", "num_layers": 1}, "f": {"kind": "flat_dnn", "set": "u"}},
    "routes": {"click": {"e": "train", "f": "read"}, "like": {"f": "train"}},
}


def spelled_out(**keys: Any) -> dict[str, Any]:
    return run_file(model={**SPELLED_OUT, **keys})


def problems(content: dict[str, Any], *overrides: str) -> list[str]:
    """The lines of the error without the first, which counts them."""
    with pytest.raises(ConfigError) as error:
        resolve_config(content, problems=apply_overrides(content, overrides))
    head, *lines = str(error.value).split("\n  ")
    assert head == f"configuration: {len(lines)} problem{'s' * (len(lines) != 1)}"
    return lines


# ------------------------------------------------------------------------------------------------------ what it becomes


def test_a_preset_becomes_what_the_preset_is():
    config = resolve_config(run_file())
    expected = preset("stem", ["click", "like"], embedding_dim=6, expert={"kind": "flat_dnn", "hidden": [5]})
    assert config.layout() == expected
    assert config.tasks == ("click", "like")
    assert config.features.field_names == FIELDS
    assert (config.model.preset, config.model.from_preset) == (None, "stem")


def test_a_layout_can_be_spelled_out():
    layout = resolve_config(spelled_out()).layout()
    assert [(s.name, s.dim, s.fields) for s in layout.sets] == [("s", 6, ()), ("u", 4, ("user", "price"))]
    assert [(e.name, e.kind, e.set, e.options) for e in layout.experts] == [
        ("e", "dcnv2", "s", {"num_layers": 1}),
        ("f", "flat_dnn", "u", {}),
    ]
    assert layout.routing.cells == (("train", "read"), ("none", "train"))


def test_a_gate_without_input_sees_the_first_set_that_its_task_trains():
    layout = resolve_config(spelled_out(gate_inputs={"click": {"sets": ["s", "u"]}})).layout()
    assert [gate.sets for gate in layout.routing.gate_inputs] == [("s", "u"), ("u",)]


def test_what_is_spelled_out_beside_a_preset_amends_it():
    content = run_file(
        model={
            "sets": {"extra": {}},
            "experts": {
                "click_1": {"hidden": [3]},
                "like_1": {"kind": "dcnv2"},
                "x": {"kind": "dcnv2", "set": "extra"},
            },
            "routes": {"click": {"like_1": "none", "x": "train"}},
        }
    )
    layout = resolve_config(content).layout()
    assert [(e.name, e.kind, e.set, e.options) for e in layout.experts] == [
        ("click_1", "flat_dnn", "click", {"hidden": [3]}),
        ("like_1", "dcnv2", "like", {}),  # another kind: the old kind's options are gone
        ("shared_1", "flat_dnn", "shared", {"hidden": [5]}),
        ("x", "dcnv2", "extra", {}),
    ]
    assert layout.routing.cells == (("train", "none", "train", "train"), ("read", "train", "train", "none"))
    assert layout.sets[-1].dim == 6  # model.embedding_dim


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_reads_back_equal(name, tmp_path):
    config = resolve_config(run_file(model={"preset": name}))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = load_config(str(tmp_path / "config.yaml"))
    assert again == config
    assert again.layout() == config.layout()


def test_values_that_are_not_defaults_read_back_equal(tmp_path):
    train = {
        "clip_norm": None,
        "early_stop": {"metric": "logloss", "task": "like"},
        "task_weights": {"like": 2},
        "max_steps": 3,
        "embedding_eps": 1e-12,
    }
    config = resolve_config(spelled_out(combine="mean", gate={"hidden": [3]}) | {"train": train})
    assert config.train.clip_norm is None and config.model.combine == "mean"
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_several_kinds_and_short_forms():
    config = resolve_config(run_file(model={"expert": ["dcnv2", {"kind": "flat_dnn", "hidden": []}]}))
    assert [e.kind for e in config.layout().experts] == ["dcnv2", "flat_dnn"] * 3
    encoding = resolve_config(run_file(model={"encoding": {"numbers": "mnse"}})).model.encoding
    assert encoding.numbers == {"kind": "mnse"}
    assert config.data.train == ("train.parquet",)
    assert resolve_config(run_file(data={"train": ["a", "b"]})).data.train == ("a", "b")


def test_precisions_by_table_set_field_or_pattern_the_later_one_counts(tmp_path):
    given = {"click": "fp16", "like__*": "fp16", "item": "fp32", "like__item": "fp16"}
    config = resolve_config(run_file(model={"table_precisions": given}))
    half = {table for table, precision in config.table_precisions().items() if precision == "fp16"}
    assert half == {"click__user", "like__user", "like__item"}
    assert set(config.table_precisions()) == {
        f"{s}__{f}" for s in ("click", "like", "shared") for f in ("user", "item")
    }
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert load_config(str(tmp_path / "run.yaml")) == config
    every = resolve_config(run_file(model={"table_precision": "fp16"})).table_precisions()
    assert set(every.values()) == {"fp16"}


def test_the_tables_of_the_configuration_are_those_of_the_model():
    from hmoe_rec.training.build import build_model, in_table

    given = {"click": "fp16", "like__item": "fp16"}
    for config in (resolve_config(run_file(model={"table_precisions": given})), resolve_config(spelled_out())):
        dtypes = {name.split(".")[-2]: p.dtype for name, p in build_model(config).named_parameters() if in_table(name)}
        assert {
            t: "fp16" if dtype.itemsize == 2 else "fp32" for t, dtype in dtypes.items()
        } == config.table_precisions()


def test_the_schema_is_a_file_inline_or_sections_of_its_own(tmp_path):
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    by_file = resolve_config(run_file(data={"schema": str(tmp_path / "schema.yaml")}))
    content = run_file(data={"schema": None}) | {
        "features": {key: value for key, value in SCHEMA.items() if key != "tasks"},
        "tasks": SCHEMA["tasks"],
    }
    assert by_file == resolve_config(run_file()) == resolve_config(content)


def test_an_empty_section_is_a_section_of_defaults():
    assert resolve_config(run_file() | {"train": None, "sharding": None}) == resolve_config(run_file())


def test_null_takes_a_list_of_files_away():
    assert resolve_config(run_file(data={"validation": None})).data.validation == ()


def test_tasks_of_the_schema_can_be_chosen():
    config = resolve_config(run_file(data={"tasks": ["like"]}, model={"preset": "single"}))
    assert config.tasks == ("like",) and config.layout().routing.table().count("\n") == 2
    assert resolve_config(run_file(data={"tasks": ["like", "click"]})).tasks == ("like", "click")


def test_a_configuration_is_frozen_and_leaves_what_it_was_given_alone():
    content = run_file()
    config = resolve_config(content)
    assert content == run_file()
    with pytest.raises(ValueError):
        config.train.seed = 3  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------ overrides


def test_overrides_reach_any_depth_and_are_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_file(model={"expert": [{"kind": "flat_dnn"}, {"kind": "dcnv2"}]})))
    config = load_config(
        str(path),
        [
            "train.learning_rate=1e-4",
            "train.early_stop={metric: ne, patience: 3}",
            "train.clip_norm=null",
            "train.shuffle=false",
            "train.run_dir=runs/a=b",
            "model.tower.hidden=[9, 8]",
            "model.expert.1.num_layers=3",
            "model.experts.like_2.rank=2",
        ],
    )
    assert config.train.learning_rate == 1e-4 and config.train.clip_norm is None and config.train.shuffle is False
    assert (config.train.early_stop.metric, config.train.early_stop.patience) == ("ne", 3)
    assert config.train.run_dir == "runs/a=b" and config.model.tower.hidden == (9, 8)
    options = {e.name: e.options for e in config.layout().experts}
    assert options["click_2"] == {"num_layers": 3} and options["like_2"] == {"num_layers": 3, "rank": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed", "override 'train.seed': expected key.path=value"),
        ("=3", "override '=3': expected key.path=value"),
        ("train..seed=3", "override 'train..seed=3': expected key.path=value"),
        ("data.train.x=3", "override 'data.train.x=3': data.train is 'train.parquet', which has no key 'x'"),
        ("data.schema.ids.2.name=x", "data.schema.ids is a list; expected a position from 0 to 1, not '2'"),
        ("data.schema.ids.a.name=x", "data.schema.ids is a list; expected a position from 0 to 1, not 'a'"),
        ("train.task_weights={a", "override 'train.task_weights={a', line 1:"),
        ("train.max_step=3", "train.max_step: unknown key; did you mean 'max_steps'?"),
        ("trian.seed=3", "trian: unknown section 'trian'; .*did you mean 'train'"),
        ("train.seed=x", "train.seed: .*valid integer.*got 'x'"),
    ],
)
def test_wrong_overrides_are_told(override, message):
    (line,) = problems(run_file(), override)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(line)


# ----------------------------------------------------------------------------------------------------------- YAML files


def test_numbers_of_yaml_1_2_are_numbers():
    assert parse_yaml("[1e-3, 2E5, 1.5e+2, -1e9, e5, 1e]", "x") == [1e-3, 2e5, 150.0, -1e9, "e5", "1e"]


def test_anchors_can_be_merged():
    text = "a: &a {x: 1}\nb: &b {<<: *a, x: 2, y: 3}\nc: [{<<: *b, y: 4}]"
    assert parse_yaml(text, "x") == {"a": {"x": 1}, "b": {"x": 2, "y": 3}, "c": [{"x": 2, "y": 4}]}


@pytest.mark.parametrize("key", ["x", "rate"])  # PyYAML 6.0.4 tells texts of one letter from longer ones
@pytest.mark.parametrize(
    ("merge", "value"), [("<<: [*a, *b]", 1), ("<<: [*b, *a]", 2), ("<<: [*a, *b], KEY: 3", 3), ("KEY: 3, <<: *b", 3)]
)
def test_of_merged_anchors_the_first_wins_and_own_keys_win_over_both(key, merge, value):
    text = f"a: &a {{KEY: 1}}\nb: &b {{KEY: 2, z: 5}}\nc: {{{merge}}}\nd: *b".replace("KEY", key)
    content = parse_yaml(text, "x")
    assert content["c"] == {key: value, "z": 5}
    assert content["d"] == {key: 2, "z": 5}


def test_only_mappings_can_be_merged():
    with pytest.raises(ConfigError, match="run.yaml, line 2: '<<' takes a mapping or a list of mappings"):
        parse_yaml("a: &a 1\nb: {<<: [*a], y: 2}", "run.yaml")


def test_texts_that_look_like_numbers_read_back_as_texts():
    content = {"a": "1e5", "b": {"1e3": ["2E-4", 1e-5]}}
    assert parse_yaml(to_yaml(content), "x") == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {seed: 1}\nmodel: {}\ntrain: {}", "run.yaml, line 3: key 'train' is given twice"),
        ("train: [", "run.yaml, line 1: "),
        ("- train", "run.yaml: holds a list; expected a mapping"),
    ],
)
def test_files_that_are_no_run_files(text, message, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(str(tmp_path / "run.yaml"))
    assert message in str(error.value)


def test_a_missing_file_names_the_one_beside_it(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(ConfigError, match="no such file; did you mean '.*quickstart.yaml'"):
        load_config(str(tmp_path / "quikstart.yaml"))
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(str(tmp_path / "binary.yaml"))


def test_long_mappings_take_several_lines_and_read_back():
    content = {"a": {"b": {f"key_{i}": "train" for i in range(40)}, "c": [{"x": "y" * 60}, {"x": "z" * 60}], "d": None}}
    text = to_yaml(content)
    assert yaml.safe_load(text) == content
    assert max(map(len, text.splitlines())) <= 120


# ---------------------------------------------------------------------------------------------------- mistakes

HAS_EXPERT = {"e": {"kind": "dcnv2", "set": "s", "num_layers": 1}}

MISTAKES = [
    (run_file(train={"sed": 1}), "train.sed: unknown key; did you mean 'seed'?"),
    (run_file(train={"seed": "x"}), "train.seed: Input should be a valid integer"),
    (run_file(train={"seed": -1}), "train.seed: Input should be greater than or equal to 0, got -1"),
    (run_file(train={"precision": "bf61"}), "train.precision: .*got 'bf61'; did you mean 'bf16'?"),
    (run_file(train={"learning_rate": float("nan")}), "train.learning_rate: .*finite number"),
    (run_file(train={"epochs": 0}), "train.epochs: .*greater than 0"),
    (run_file(train={"best": {"task": "clik"}}), "train.best.task: unknown task 'clik'; .*did you mean 'click'?"),
    (run_file(train={"early_stop": {"task": "clik"}}), "train.early_stop.task: unknown task 'clik'"),
    (run_file(train={"early_stop": {"metric": "acu"}}), "train.early_stop.metric: .*did you mean 'auc'?"),
    (run_file(train={"best": {"metric": "gauc"}}), "train.best.metric: gauc needs groups; set `user_key:`"),
    (run_file(train={"early_stop": {"metric": "gauc"}}), "train.early_stop.metric: gauc needs groups"),
    (run_file(train={"early_stop": {}}, data={"validation": []}), "train.early_stop: needs data.validation"),
    (run_file(train={"task_weights": {"clik": 1}}), "train.task_weights: unknown task 'clik'"),
    (run_file(sharding={"plan": "rowwise"}), "sharding.plan: unknown plan 'rowwise'; .*did you mean 'row_wise'?"),
    (run_file(data={"train": []}), "data.train: missing"),
    (run_file(data={"schema": None}), "data.schema: missing"),
    (run_file(data={"schema": "nowhere/schema.yaml"}), "data.schema: nowhere/schema.yaml: no such file"),
    (run_file(data={"schema": {**SCHEMA, "ids": [{"name": "u"}]}}), "data.schema.ids.0.num_embeddings: "),
    (run_file(features={"ids": []}), "features: data.schema is given too"),
    (run_file(data={"tasks": ["clik"]}), "data.tasks: unknown task 'clik'"),
    (run_file(data={"tasks": []}), "data.tasks: none given"),
    (run_file(data={"synthetic": {}, "schema": None}), "data.train: data.synthetic makes it"),
    (run_file(data=[1]), "data: Input should be a valid dictionary"),
    (run_file(model={"preset": "stme"}), "model.preset: unknown preset 'stme'; .*did you mean 'stem'?"),
    (run_file(model={"num_sets": 3}), "model.num_sets: preset stem does not have it"),
    (run_file(model={"preset": None}), "model.expert: only a preset uses it"),
    (run_file(model={"preset": None, "expert": None}), "model.preset: missing; expected one of single, "),
    (run_file(model={"preset": "stem_al", "main_task": "clik"}), "model.main_task: unknown task 'clik'"),
    (run_file(model={"expert": {"kind": "flat_dn"}}), "model.experts.click_1.kind: .*did you mean 'flat_dnn'"),
    (run_file(model={"expert": {"kind": 3}}), "model.experts.click_1.kind: 3 given; expected one of"),
    (run_file(model={"expert": {"kind": "no_such_package:Expert"}}), "click_1.kind: .*add --allow no_such_package"),
    (
        run_file(model={"expert": {"kind": "dcnv2", "num_layer": 2}}),
        r"model.experts.click_1.num_layer: .*did you mean 'num_layers'\? \(and like_1, shared_1\)",
    ),
    (
        run_file(model={"expert": {"kind": "dcnv2", "num_layers": 0}}),
        "model.experts.click_1: num_layers must be >= 1, got 0",
    ),
    (run_file(model={"expert": {"kind": "dcnv2", "num_layers": 3.0}}), "click_1.num_layers: .*integer, got 3.0"),
    (run_file(train={"losses": {"click": [{"kind": "bce", "weight": "1"}]}}), "click.0.weight: .*number, got '1'"),
    (run_file(train={"losses": {"click": 5}}), "train.losses.click: Input should be a valid tuple, got 5"),
    (run_file(model={"expert": 5}), "model.expert: Input should be a valid tuple, got 5"),
    (run_file(data={"leave_out": 5}), "data.leave_out: unknown field '5'"),
    (run_file(model={"expert": {"kind": "dcnv2", "num_layers": "two"}}), "num_layers: .*valid integer.*got 'two'"),
    (run_file(model={"expert": {"kind": "dcnv2", "rank": 99}}), r"model.experts.click_1: rank must be in \[1, 24\]"),
    (run_file(model={"expert": {"kind": "gwpfm", "num_parts": 4}}), "gwpfm: the set's width 6 .*num_parts 4"),
    (
        run_file(model={"encoding": {"sequences": {"kind": "max"}}}),
        "model.encoding.sequences.kind: unknown kind 'max'",
    ),
    (run_file(model={"expert_dim": 0}), "model.expert_dim: .*greater than 0"),
    (run_file(model={"dropout": 1.0}), "model.dropout: .*less than 1"),
    (run_file(model={"sets": {"click": {"dmi": 3}}}), "model.sets.click.dmi: unknown key; did you mean 'dim'?"),
    (run_file(model={"sets": {"new": {"dim": 3}}}), "model.sets.new: no expert reads it"),
    (run_file(model={"sets": {1: {"dim": 3}}}), "model.sets.1"),
    (
        spelled_out(sets={"s": {"fields": ["usr"]}, "u": {}}),
        "model.sets.s.fields: unknown field 'usr'; .*did you mean 'user'",
    ),
    (
        spelled_out(experts=HAS_EXPERT | {"f": {"kind": "flat_dnn", "set": "su"}}),
        "model.experts.f.set: unknown set 'su'",
    ),
    (spelled_out(experts=HAS_EXPERT | {"f": {"kind": "flat_dnn"}}), "model.experts.f.set: missing; expected the set"),
    (spelled_out(routes={**SPELLED_OUT["routes"], "clik": {"e": "train"}}), "model.routes.clik: unknown task 'clik'"),
    (
        spelled_out(routes={**SPELLED_OUT["routes"], "like": {"f": "train", "g": "read"}}),
        "model.routes.like.g: unknown expert 'g'",
    ),
    (spelled_out(routes={"click": {"e": "train", "f": "train"}}), "model.routes.like: missing"),
    (
        spelled_out(routes={"click": {"e": "train", "f": "read"}, "like": {"f": "read"}}),
        "model.routes.like: trains no expert",
    ),
    (spelled_out(routes={"click": {"e": "train"}, "like": {"e": "train"}}), "model.routes: no task trains expert 'f'"),
    (spelled_out(routes={"click": {"e": "trian", "f": "train"}, "like": {"e": "train"}}), "unknown cell 'trian'"),
    (spelled_out(gate_inputs={"lik": {"sets": "s"}}), "model.gate_inputs.lik: unknown task 'lik'"),
    (spelled_out(gate_inputs={"like": {"sets": "x"}}), "model.gate_inputs.like.sets: unknown set 'x'"),
    (spelled_out(gate_inputs={"like": {"sets": ["s", "u"], "combine": "sum"}}), "a sum needs sets of one width"),
    (spelled_out(sets={"s.x": {}, "s": {}, "u": {}}), "model.sets.s.x: names of sets become names of tables"),
    (run_file(model={"table_precisions": {"usr": "fp16"}}), "table_precisions: 'usr' matches no .*did you mean 'user'"),
    (run_file(model={"table_precision": "int8"}), "model.table_precision: .*int8 is for serving, it is not trained"),
    (run_file(model={"table_precisions": {"user": "bf16"}}), "model.table_precisions.user: Input should be 'fp32' or"),
]


@pytest.mark.parametrize(("content", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_told_with_its_place(content, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config(content)


def test_names_that_pytorch_has_taken_are_told():
    taken = ": this cannot be the name of a module; rename it"
    sequence = {"name": "items", "columns": {"hist": "item"}, "max_length": 3}
    tasks = [{"name": "type"}, {"name": "like"}]
    content = run_file(data={"schema": {**SCHEMA, "sequences": [sequence], "tasks": tasks}})
    assert set(problems(content)) == {
        f"model.sets.type{taken}",
        f"model.encoding: sequence 'items'{taken}",
        f"model.tower: task 'type'{taken}",
    }
    parts = spelled_out(
        sets={"keys": {"dim": 6}},
        experts={"train": {"kind": "flat_dnn", "set": "keys"}},
        routes={"click": {"train": "train"}, "like": {"train": "train"}},
    )
    assert problems(parts) == [f"model.sets.keys{taken}", f"model.experts.train{taken}"]


def test_all_mistakes_are_told_at_once():
    content = spelled_out(
        sets={"s": {"dim": 5, "fields": ["usr", "item"]}, "u": {"dim": 4}},
        experts={"e": {"kind": "gwpfm", "set": "s"}, "f": {"kind": "flat_dnn", "set": "x", "hiden": [3]}},
        routes={"click": {"e": "train"}, "lik": {"f": "train"}},
        dropuot=0.5,
    ) | {"train": {"max_step": 3, "seed": "one"}, "shardign": {}}
    lines = problems(content, "train.best.task=clik", "oops")
    for part in (
        "override 'oops'",
        "shardign: unknown section",
        "train.max_step",
        "train.seed:",
        "model.dropuot",
        "model.sets.s.fields",
        "model.sets.u: no expert reads it",
        "model.experts.f.set",
        "model.routes.lik: unknown task",
        "model.routes.like: missing",
        "model.experts.e: gwpfm: the set's width 5",
        "model.experts.f.hiden",
        "train.best.task",
    ):
        assert sum(part in line for line in lines) == 1, (part, lines)


def test_mistakes_of_a_schema_file_name_the_file_and_hide_no_others(tmp_path):
    wrong = {**SCHEMA, "ids": [{"name": "user", "num_embedings": 7}, SCHEMA["ids"][1]], "tasks": [{"nam": "click"}]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(wrong))
    lines = problems(run_file(data={"schema": str(tmp_path / "s.yaml"), "tran": "x"}))
    assert f"{tmp_path}/s.yaml: ids.0.num_embedings: unknown key; did you mean 'num_embeddings'?, got 7" in lines
    assert any(line.startswith("data.tran: unknown key; did you mean 'train'?") for line in lines)


def test_mistakes_in_sections_of_their_own_name_them():
    content = run_file(data={"schema": None}) | {"features": {"ids": [{"nam": "u"}]}, "tasks": [{"lable": "x"}]}
    text = "\n".join(problems(content))
    assert "features.ids.0.nam: unknown key" in text and "tasks.0.lable: unknown key" in text


def test_an_expert_written_elsewhere_is_checked_like_ours(tmp_path, monkeypatch):
    (tmp_path / "package_of_theirs.py").write_text(
        "from hmoe_rec.experts.flat_dnn import FlatDNNExpert\n"
        "class Theirs(FlatDNNExpert):\n"
        "    def __init__(self, num_fields: int, dim: int, out_dim: int, *, depth: int):\n"
        "        super().__init__(num_fields, dim, out_dim, hidden=[7] * depth)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(kinds.VARIABLE, "package_of_theirs")
    config = resolve_config(run_file(model={"expert": {"kind": "package_of_theirs:Theirs", "depth": 2}}))
    assert config.layout().experts[0].options == {"depth": 2}
    with pytest.raises(ConfigError, match="click_1.depth: missing; package_of_theirs:Theirs needs it"):
        resolve_config(run_file(model={"expert": "package_of_theirs:Theirs"}))
    with pytest.raises(ConfigError, match="click_1.depht: unknown option.*did you mean 'depth'"):
        resolve_config(run_file(model={"expert": {"kind": "package_of_theirs:Theirs", "depth": 1, "depht": 2}}))


# ---------------------------------------------------------------------------------------------------- the synthetic log

SMALL = {"rows": 300, "validation_rows": 100, "test_rows": 100, "num_users": 20, "num_items": 30}


def synthetic_run(directory: Path, **arguments: Any) -> RunConfig:
    given = {"dir": str(directory), **SMALL, **arguments}
    return resolve_config({"data": {"synthetic": given}, "model": {"preset": "mmoe", "num_experts": 2}})


def test_a_synthetic_log_is_made_once_and_fits_its_schema(tmp_path):
    from hmoe_rec.data.schema import load_schema

    config = synthetic_run(tmp_path)
    assert not list(tmp_path.iterdir()), "resolving writes nothing"
    data = prepare_data(config)
    assert load_schema(Path(data.train[0]).parent / "schema.yaml") == data.schema == config.schema_of_data
    assert set(data.truth["test"]) == set(config.tasks)
    made = Path(data.train[0]).stat().st_mtime_ns
    assert prepare_data(config) == data and Path(data.train[0]).stat().st_mtime_ns == made


@pytest.mark.parametrize("rows", [2e2, "200"])
def test_rows_of_a_synthetic_log_may_be_written_as_a_float_or_a_text(tmp_path, rows):
    config = synthetic_run(tmp_path, rows=rows)
    assert synthetic_dir(config.data.synthetic) == synthetic_dir(synthetic_run(tmp_path, rows=200).data.synthetic)
    assert pq.ParquetFile(prepare_data(config).train[0]).metadata.num_rows == 200


def test_other_arguments_get_another_directory(tmp_path):
    one, other = synthetic_run(tmp_path), synthetic_run(tmp_path, seed=2)
    assert synthetic_dir(one.data.synthetic) != synthetic_dir(other.data.synthetic)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row": 3}, "data.synthetic.row: unknown key 'row'; .*did you mean 'rows'?"),
        ({"seed": "x"}, "data.synthetic.seed: .*valid integer"),
        ({"rows": 0}, "data.synthetic: rows .*>= 1, got 0"),
    ],
)
def test_wrong_arguments_of_the_synthetic_log(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        synthetic_run(tmp_path, **arguments)


# ------------------------------------------------------------------------------------------------------------ our files


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads_and_reads_back_equal(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(f"configs/{name}")
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(str(tmp_path / "again.yaml")) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_says_what_it_is_and_how_to_run_it(name):
    head = [line for line in (ROOT / "configs" / name).read_text().splitlines()[:8] if line.startswith("#")]
    assert len(head) >= 2 and any(f"configs/{name}" in line for line in head)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_on_kuairand_by_one_override(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/kuairand.yaml", [f"model.preset={name}"])
    assert config.model.from_preset == name


# -------------------------------------------------------------------------------------------------- sampling, exposures


def sampled(train: dict[str, Any] | None = None, **sampling: Any) -> dict[str, Any]:
    return run_file(data={"sampling": sampling}, train=train or {})


def test_sampling_and_exposure_read_back_equal_from_yaml_and_json():
    import json

    rates = {3: 0.1, "x": {"click": 0.5, "like": 1}}
    exposure = {
        "column": "k",
        "propensity": {"table": [1, 1.5]},
        "fitted": {"click": {"weights": [1, 0.5], "mean_weight": 0.7}},
    }
    config = resolve_config(sampled({"exposure": exposure}, negatives=0.2, slices={"column": "user", "rates": rates}))
    assert config.data.sampling.active and config.data.sampling.rates(config.tasks, "3") == {"click": 0.1, "like": 0.1}
    for content in (yaml.safe_load(config.to_yaml()), json.loads(json.dumps(config.to_dict()))):
        again = resolve_config(content)
        assert (again.data.sampling, again.train.exposure) == (config.data.sampling, config.train.exposure)
    assert not resolve_config(run_file()).data.sampling.active


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"negatives": 0}, "negatives: expected a share in (0, 1], or {task: share, ...}, got 0"),
        ({"slices": {"column": "user", "rates": {1: {"click": 3}}}}, "slices.rates.1: expected a share in (0, 1]"),
        ({"negatives": {"click": 0.1}}, "negatives: no rate for task like; give 1 to keep all its negatives"),
        ({"negatives": {"click": 0.1, "like": 1, "lik": 1}}, "negatives: unknown task 'lik'"),
        ({"slices": {"rates": {1: 0.5}}}, "slices.column: missing"),
        ({"slices": {"column": "user"}}, "slices.rates: missing"),
        (
            {"correction": "logit", "probability": {"column": "p"}},
            "correction: logit is not exact for probability.column",
        ),
        (
            {"correction": "logit", "slices": {"column": "city", "rates": {1: 0.5}}},
            "correction: logit is not exact for slices",
        ),
    ],
)
def test_a_sampling_that_is_wrong_or_has_no_exact_correction_is_told(sampling, expected):
    assert any(line.startswith(f"data.sampling.{expected}") for line in problems(sampled(**sampling)))


def test_a_slice_that_a_task_does_not_see_has_no_exact_offset():
    sampling = {"correction": "logit", "slices": {"column": "user", "rates": {1: 0.5}}}
    sets = {"s": {"dim": 6}, "u": {"dim": 4, "fields": ["price"]}}
    routes = {"click": {"e": "train"}, "like": {"e": "read", "f": "train"}}
    content = spelled_out(sets=sets, routes=routes)
    resolve_config(content)
    content["data"]["sampling"] = sampling
    (line,) = problems(content)
    assert line.startswith("data.sampling.correction: logit is not exact for task like, which trains no set that has")
    content["data"]["sampling"] = sampling | {"correction": "weights"}
    resolve_config(content)


@pytest.mark.parametrize(
    ("exposure", "expected"),
    [
        ({"tasks": "clik"}, "tasks: unknown task 'clik'; known: click, like; did you mean 'click'?"),
        *(
            (
                {"propensity": given},
                "propensity: expected estimated, {power: a number >= 0}, {once: a number in (0, 1]}",
            )
            for given in ("guessed", {"power": 1, "once": 0.1}, {"once": 2}, {"table": 2}, {"table": []}, {"powr": 1})
        ),
        ({"clip": [1, 0.1]}, "clip: expected the least weight first"),
    ],
)
def test_exposures_that_are_wrong_are_told(exposure, expected):
    (line,) = problems(run_file(train={"exposure": exposure}))
    assert line.startswith(f"train.exposure.{expected}")
