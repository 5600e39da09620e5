import subprocess
import sys

import pytest
import yaml

from hmoe_rec.data.schema import Schema, load_schema
from hmoe_rec.types import Features, IdField, NumberField, SchemaError, SequenceField, VectorField


def test_features_are_what_the_model_needs(schema):
    assert schema.features() == Features(
        ids=(
            IdField("user", 50),
            IdField("city", 9, hashed=True, missing_row=True),
            IdField("device", 7),
            IdField("tags", 11, pooling="mean", multi_valued=True),
            IdField("item", 40, missing_row=True),
            IdField("words", 13, hashed=True, multi_valued=True),
        ),
        sequences=(
            SequenceField("history", (("hist_item", "item"), ("hist_city", "city")), has_ages=True, max_length=4),
            SequenceField("likes", (("liked", "user"),)),
        ),
        numbers=(NumberField("price", "log1p", 0.5, 2.0), NumberField("delta", "slog")),
        vectors=(VectorField("emb", 3), VectorField("emb2", 2)),
    )
    assert schema.task_names == ("click", "buy")
    assert schema.id_column("city").source == "city_name"


def test_read_columns_are_all_that_a_batch_needs(schema):
    inputs = ["user", "city_name", "device", "tags", "item", "words", "hist_item", "hist_city", "hist_time", "time"]
    inputs += ["liked", "price", "delta_cents", "emb", "emb2"]
    assert schema.read_columns(with_labels=False) == tuple(inputs)
    assert schema.read_columns() == (*inputs, "click", "is_buy", "w")  # user is the user key too, but read once


def test_yaml_round_trip(schema, tmp_path):
    text = schema.to_yaml()
    assert "  - {name: user, num_embeddings: 50}\n" in text
    (tmp_path / "s.yaml").write_text(text)
    assert load_schema(tmp_path / "s.yaml") == schema == load_schema(str(tmp_path / "s.yaml")) == load_schema(schema)
    assert load_schema(schema.to_dict()) == schema
    assert Schema.model_validate(yaml.safe_load(text)) == schema
    minimal = load_schema({"ids": [{"name": "a", "num_embeddings": 3}], "tasks": [{"name": "y"}], "keys": ["no", "1"]})
    assert load_schema(yaml.safe_load(minimal.to_yaml())) == minimal  # "no" and "1" stay strings


def test_can_be_made_of_parts(schema):
    parts = {name: getattr(schema, name) for name in Schema.model_fields}
    assert Schema(**parts) == schema
    with pytest.raises(ValueError, match="name already used"):
        Schema(**{**parts, "numbers": [*schema.numbers, schema.numbers[0]]})


def test_is_frozen(schema):
    with pytest.raises(Exception, match="frozen"):
        schema.weight = "x"


def problems(given) -> list[str]:
    with pytest.raises(SchemaError) as error:
        load_schema(given, where="s.yaml")
    head, *lines = str(error.value).split("\n")
    assert head == f"s.yaml: {len(lines)} problem(s)"
    return [line.strip() for line in lines]


def change(given, path, value):
    *path, last = path
    for key in path:
        given = given[key]
    given[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("number",), [], "number: unknown key; did you mean 'numbers'?, got []"),
        (("ids", 0, "num_embedding"), 3, "ids.0.num_embedding: unknown key; did you mean 'num_embeddings'?, got 3"),
        (("ids", 0, "num_embeddings"), 0, "ids.0.num_embeddings: Input should be greater than or equal to 1, got 0"),
        (("ids", 0, "num_embeddings"), "many", "ids.0.num_embeddings: Input should be a valid integer, unable"),
        (
            ("ids", 0, "num_embeddings"),
            2**31,
            "ids.0.num_embeddings: a field that is not hashed has at most 2147483646",
        ),
        (
            ("ids", 0, "mode"),
            "hsh",
            "ids.0.mode: Input should be 'vocabulary', 'modulo', 'hash' or 'managed', got 'hsh'",
        ),
        (("ids", 0, "managed"), {}, "ids.0.managed: is for mode: managed; remove it, got {}"),
        (("ids", 0, "mode"), "managed", "ids.0.num_embeddings: rows are managed in groups of 32 (managed.ways); give"),
        (("ids", 0, "salt"), "set", "ids.0.salt: is for mode: hash; remove it, got 'set'"),
        (("ids", 0, "missing"), "row", "ids.0.missing: Input should be 'zero' or 'own_row', got 'row'"),
        (("ids", 0, "max_length"), 4, "ids.0.max_length: is for list columns, which also need pooling"),
        (("ids", 0, "name"), "a.b", "ids.0.name: a name has letters, digits, '_' and '-' only"),
        (("ids", 1, "name"), "user", "ids.1.name: name already used at ids.0.name, got 'user'"),
        (("numbers", 0, "name"), "hist_item", "sequences.0.columns.hist_item: name already used at numbers.0.name"),
        (("vectors", 0, "dim"), 0, "vectors.0.dim: Input should be greater than or equal to 1, got 0"),
        (("numbers", 0, "std"), 0, "numbers.0.std: Input should be greater than 0, got 0"),
        (("numbers", 0, "mean"), float("nan"), "numbers.0.mean: Input should be a finite number, got nan"),
        (
            ("numbers", 0, "transform"),
            "log",
            "numbers.0.transform: Input should be 'none', 'log1p' or 'slog', got 'log'",
        ),
        (("sequences", 0, "columns", "hist_item"), "itm", "sequences.0.columns.hist_item: names no single-valued id"),
        (("sequences", 0, "columns", "hist_item"), "tags", "sequences.0.columns.hist_item: names no single-valued id"),
        (("sequences", 0, "columns"), {}, "sequences.0.columns: Dictionary should have at least 1 item"),
        (("sequences", 0, "exposure_time"), None, "sequences.0.exposure_time: needed beside times"),
        (("sequences", 0, "max_length"), 0, "sequences.0.max_length: Input should be greater than or equal to 1"),
        (("sequences", 1, "name"), "history", "sequences.1.name: name already used at sequences.0.name"),
        (("tasks", 1, "name"), "click", "tasks.1.name: name already used at tasks.0.name, got 'click'"),
        (("tasks",), [], "tasks: expected at least one, got []"),
        (("ids",), "user_id", "ids: Input should be a valid tuple, got 'user_id'"),
        (("weight",), "", "weight: String should have at least 1 character, got ''"),
    ],
)
def test_a_mistake_is_named_with_its_place(schema_dict, path, value, message):
    change(schema_dict, path, value)
    assert any(problem.startswith(message) for problem in problems(schema_dict)), problems(schema_dict)


def test_all_mistakes_come_at_once(schema_dict):
    schema_dict["ids"][0] = {"nam": "user", "num_embeddings": -1}
    schema_dict["sequences"][0]["columns"] = {"hist_item": "itemm"}
    schema_dict["vektors"] = []
    found = problems(schema_dict)
    for start in (
        "ids.0.name: Field required",
        "ids.0.nam: unknown key; did you mean 'name'?",
        "ids.0.num_embeddings: ",
        "sequences.0.columns.hist_item: names no single-valued id field; did you mean 'item'?",
        "vektors: unknown key; did you mean 'vectors'?",
        "sequences.1.columns.liked: names no",  # its target user has lost its name
    ):
        assert any(problem.startswith(start) for problem in found), (start, found)
    assert len(found) == 6


def test_files_that_are_no_schema(tmp_path):
    with pytest.raises(SchemaError, match="none.yaml: no such schema file"):
        load_schema(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("ids: [a: b")
    with pytest.raises(SchemaError, match="bad.yaml: not a YAML file"):
        load_schema(tmp_path / "bad.yaml")
    for text in ("", "- 1", "hello"):
        (tmp_path / "list.yaml").write_text(text)
        with pytest.raises(SchemaError, match="list.yaml: expected a mapping with ids, tasks"):
            load_schema(tmp_path / "list.yaml")


def test_importing_it_is_light():
    code = "import sys, hmoe_rec.data.schema; assert not {'torch', 'pyarrow', 'numpy', 'fsspec'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
