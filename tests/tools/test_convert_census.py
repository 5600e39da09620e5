"""Census-Income: UCI's text and the Parquet form give the same tables; no input tells a label."""

from pathlib import Path

import convert_census
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hmoe_rec.data.schema import load_schema
from hmoe_rec.types import DataError

SPLITS = ("train", "validation", "test")
VALUES = {  # what a column may hold, where it is not one of a, b, c
    "det_ind_code": [0, 7, 33],
    "det_occ_code": [2, 10, 9],
    "own_or_self": [0, 1, 2],
    "vet_benefits": [2, 0, 1],
    "year": [94, 95],
    "mig_chg_msa": ["?", "MSA to MSA", "Nonmover"],
    "marital_stat": ["Never married", "Divorced", "Widowed"],
}


def make_people(num_rows: int, seed: int, extra: str | None = None) -> list[dict]:
    rng = np.random.default_rng(seed)
    people = []
    for _ in range(num_rows):
        person = {}
        for name in convert_census.COLUMNS:
            if name in convert_census.NUMBERS:
                person[name] = int(rng.integers(90)) * int(rng.integers(2))
            elif name == "instance_weight":
                person[name] = round(float(rng.uniform(100, 3000)), 2)
            else:
                values = VALUES.get(name, ["a", "b b", "c"])
                person[name] = values[rng.integers(len(values))]
        people.append(person | {"income": ["- 50000.", "50000+."][rng.integers(2)]})
    if extra:
        people[0]["race"] = extra
    return people


def write_public(folder: Path, train: list[dict], test: list[dict]) -> Path:
    folder.mkdir(parents=True)
    for name, people in (("data", train), ("test", test)):
        text = "".join(", ".join(str(v) for v in person.values()) + "\n" for person in people)
        (folder / f"census-income.{name}").write_text(text)
    return folder


def write_parquet_form(folder: Path, train: list[dict], test: list[dict]) -> Path:
    folder.mkdir(parents=True)
    for name, people in (("train", train), ("test", test)):
        rows = [{k: None if v == "?" else v for k, v in person.items() if k != "income"} for person in people]
        for row, person in zip(rows, people, strict=True):
            row["income_50k"] = int(person["income"] == "50000+.")
            row["never_married"] = int(person["marital_stat"] == "Never married")
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


def convert(source: Path, out: Path, weighted: bool = False, row_group_rows: int = 32) -> dict[str, pa.Table]:
    convert_census.convert(source, out, 0.1, 1, weighted, row_group_rows)
    return {name: pq.read_table(out / f"{name}.parquet") for name in SPLITS}


@pytest.fixture(scope="module")
def people() -> tuple[list[dict], list[dict]]:
    return make_people(130, seed=1), make_people(47, seed=2, extra="unseen in training")


@pytest.fixture(scope="module")
def public(people, tmp_path_factory) -> tuple[Path, dict[str, pa.Table]]:
    folder = tmp_path_factory.mktemp("census")
    return folder / "out", convert(write_public(folder / "uci", *people), folder / "out")


def test_both_forms_give_the_same_tables(public, people, tmp_path):
    tables = convert(write_parquet_form(tmp_path / "form", *people), tmp_path / "out")
    # Codes are text in UCI's files and integers in the Parquet form: the same values, perhaps in another order.
    for name in SPLITS:
        assert tables[name].equals(public[1][name])
    assert (tmp_path / "out/schema.yaml").read_text() == (public[0] / "schema.yaml").read_text()


def test_split_keeps_ucis_test_part_and_draws_validation_from_training(public, people):
    rows = {name: table["row"].to_pylist() for name, table in public[1].items()}
    assert rows["test"] == list(range(130, 177))
    assert sorted(rows["train"] + rows["validation"]) == list(range(130)) and len(rows["validation"]) == 13
    everyone = people[0] + people[1]
    for name, table in public[1].items():
        assert table["income_50k"].to_pylist() == [int(everyone[r]["income"] == "50000+.") for r in rows[name]]
        married = [int(everyone[r]["marital_stat"] == "Never married") for r in rows[name]]
        assert table["never_married"].to_pylist() == married


def test_missing_and_unseen_values_are_null(public, people):
    everyone = people[0] + people[1]
    for table in public[1].values():
        for row in table.to_pylist():
            assert (row["mig_chg_msa"] is None) == (everyone[row["row"]]["mig_chg_msa"] == "?")
    assert public[1]["test"]["race"][0].as_py() is None
    assert load_schema(public[0] / "schema.yaml").id_column("race").missing == "own_row"


def test_no_input_tells_a_label(public, tmp_path, people):
    schema = load_schema(public[0] / "schema.yaml")
    assert not {"marital_stat", "instance_weight", "income_50k", "never_married"} & set(schema.features().field_names)
    assert "marital_stat" not in public[1]["train"].column_names
    assert schema.weight is None
    convert(write_public(tmp_path / "uci", *people), tmp_path / "weighted", weighted=True)
    assert load_schema(tmp_path / "weighted/schema.yaml").weight == "instance_weight"
    weights = public[1]["train"]["instance_weight"]
    assert pc.mean(weights).as_py() == pytest.approx(1.0, abs=1e-5)


def test_schema_fits_the_files(public):
    schema = load_schema(public[0] / "schema.yaml")
    for table in public[1].values():
        for column in schema.ids:
            values = table[column.source]
            assert values.null_count == len(values) or pc.max(values).as_py() < column.num_embeddings
            assert values.null_count == 0 or column.missing == "own_row"


def test_errors_say_where(people, tmp_path):
    with pytest.raises(DataError, match="holds neither census-income.data .* nor train.parquet"):
        convert(tmp_path, tmp_path / "out")
    source = write_public(tmp_path / "uci", *people)
    text = (source / "census-income.test").read_text()
    (source / "census-income.test").write_text(text.replace("50000+.", "rich", 1))
    with pytest.raises(DataError, match="census-income.test: the last column holds 'rich', expected"):
        convert(source, tmp_path / "out")
    (source / "census-income.test").unlink()
    with pytest.raises(DataError, match="no file census-income.test"):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.data
def test_real_log(data_dir, tmp_path):
    tables = convert(data_dir / "census_income_kdd", tmp_path, row_group_rows=8192)
    assert [t.num_rows for t in tables.values()] == [179_571, 19_952, 99_762]
    training = pa.concat_tables([tables["train"], tables["validation"]])
    assert pc.mean(training["income_50k"]).as_py() == pytest.approx(0.062, abs=5e-4)
    assert pc.mean(training["never_married"]).as_py() == pytest.approx(0.433, abs=6e-4)
