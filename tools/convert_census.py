"""Census-Income KDD (UCI) -> train, validation, test Parquet for two tasks, and the schema that fits them.

python tools/convert_census.py census-income data/census
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import typer
from converting import (
    MISSING,
    ROW_GROUP_ROWS,
    Column,
    Floats,
    Ints,
    bucket,
    codes,
    floats,
    ints,
    label_rates,
    locate,
    matching,
    number_entry,
    quantile_edges,
    read_parquet,
    reporting_errors,
    say,
    sorted_vocabulary,
    write_rows,
    write_schema,
    write_vocabularies,
)

from hmoe_rec.types import DataError

NUM_BUCKETS = 32
TASKS = ("income_50k", "never_married")
NUMBERS = ["age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp", "weeks_worked"]
# In the order of UCI's files, which have no header; a last column says whether the income is above 50,000.
COLUMNS = [
    "age", "class_worker", "det_ind_code", "det_occ_code", "education", "wage_per_hour", "hs_college", "marital_stat",
    "major_ind_code", "major_occ_code", "race", "hisp_origin", "sex", "union_member", "unemp_reason",
    "full_or_part_emp", "capital_gains", "capital_losses", "stock_dividends", "tax_filer_stat", "region_prev_res",
    "state_prev_res", "det_hh_fam_stat", "det_hh_summ", "instance_weight", "mig_chg_msa", "mig_chg_reg",
    "mig_move_reg", "mig_same", "mig_prev_sunbelt", "num_emp", "fam_under_18", "country_father", "country_mother",
    "country_self", "citizenship", "own_or_self", "vet_question", "vet_benefits", "weeks_worked", "year",
]  # fmt: skip
NOT_INPUTS = ["marital_stat", "instance_weight"]  # the first is the answer of never_married
CATEGORIES = [c for c in COLUMNS if c not in NUMBERS + NOT_INPUTS]
COMMENT = """Census-Income KDD (UCI), one row per person; made by tools/convert_census.py, which explains it.
marital_stat is left out: it holds the label never_married. instance_weight is in the file, never an input."""


def read_public(path: Path) -> pa.Table:
    """UCI's census-income.data or .test -> the columns and both labels; "?" is null."""
    text = {name: pa.string() for name in [*COLUMNS, "income"]}
    try:
        table = csv.read_csv(
            path,
            read_options=csv.ReadOptions(column_names=list(text)),
            convert_options=csv.ConvertOptions(column_types=text, strings_can_be_null=False),
        )
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not UCI's file of {len(text)} values a line: {error}") from error
    trimmed = {name: pc.utf8_trim_whitespace(table[name]) for name in text}
    income = trimmed.pop("income")
    known = pc.is_in(income, pa.array(["- 50000.", "50000+."]))
    if not pc.all(known).as_py():
        wrong = income.filter(pc.invert(known))[0].as_py()
        raise DataError(f"{path}: the last column holds {wrong!r}, expected '- 50000.' or '50000+.'")
    columns = {name: pc.if_else(pc.equal(v, "?"), pa.scalar(None, pa.string()), v) for name, v in trimmed.items()}
    for name in [*NUMBERS, "instance_weight"]:
        try:
            columns[name] = pc.cast(columns[name], pa.float64())
        except pa.ArrowException as error:
            raise DataError(f"{path}: column {name} ({COLUMNS.index(name)}): {error}; expected numbers") from error
    labels = {
        "income_50k": pc.equal(income, "50000+."),
        "never_married": pc.equal(trimmed["marital_stat"], "Never married"),
    }
    return pa.table(columns | {name: pc.cast(label, pa.int8()) for name, label in labels.items()})


def read_source(source: Path) -> tuple[pa.Table, pa.Table]:
    """UCI's training and test part, from either form.

    Raises:
        DataError: neither form is there, or it is damaged.
    """
    if matching(source, "census-income.data"):
        say("public release: census-income.data, census-income.test")
        return (
            read_public(locate(source, "census-income.data", "UCI's training part")),
            read_public(locate(source, "census-income.test", "UCI's test part")),
        )
    if matching(source, "train.parquet"):
        say("Parquet form: train.parquet, test.parquet")
        wanted = [*COLUMNS, *TASKS]
        return (
            read_parquet(locate(source, "train.parquet", "UCI's training part"), wanted),
            read_parquet(locate(source, "test.parquet", "UCI's test part"), wanted),
        )
    raise DataError(
        f"{source}: holds neither census-income.data (the public release, unpacked) nor train.parquet (the "
        "Parquet form); give the folder of one of them"
    )


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.cast(column, pa.string())


def split(num_train: int, num_test: int, validation_share: float, seed: int) -> dict[str, Ints]:
    """Rows of the three parts, counted over UCI's training part followed by its test part; validation is drawn."""
    order = np.random.default_rng(seed).permutation(num_train)
    held_out = np.sort(order[: int(num_train * validation_share)])
    return {
        "train": np.setdiff1d(np.arange(num_train), held_out),
        "validation": held_out,
        "test": np.arange(num_train, num_train + num_test),
    }


def build(
    everything: pa.Table, rows: dict[str, Ints], weighted: bool
) -> tuple[dict[str, Column], dict[str, Any], dict[str, pa.Array]]:
    """Columns, schema and vocabularies; categories and bucket edges are those of the training rows."""
    train = rows["train"]
    columns: dict[str, Column] = {"row": np.arange(everything.num_rows)}
    vocabularies: dict[str, pa.Array] = {}
    ids: list[dict[str, Any]] = []
    numbers: list[dict[str, Any]] = []

    def add_id(name: str, values: Ints, size: int) -> None:
        columns[name] = values
        if size > 1:
            ids.append(
                {"name": name, "num_embeddings": size} | ({"missing": "own_row"} if (values == MISSING).any() else {})
            )

    for name in CATEGORIES:
        text = as_text(everything[name])
        vocabularies[name] = sorted_vocabulary(text.take(pa.array(train)))
        add_id(name, codes(text, vocabularies[name]), len(vocabularies[name]))
    for name in NUMBERS:
        values: Floats = floats(everything[name])
        columns[name] = values
        numbers.append(number_entry(name, values[train], "none" if name in ("age", "weeks_worked") else "log1p"))
        edges = quantile_edges(values[train], NUM_BUCKETS)
        add_id(f"{name}_bucket", bucket(values, edges), len(edges) + 1)
    weight = floats(everything["instance_weight"])
    columns["instance_weight"] = weight / weight[train].mean()
    columns |= {task: ints(everything[task], task) for task in TASKS}
    schema = {"ids": ids, "numbers": numbers, "tasks": [{"name": task} for task in TASKS], "keys": ["row"]}
    return columns, schema | ({"weight": "instance_weight"} if weighted else {}), vocabularies


def convert(source: Path, out: Path, validation_share: float, seed: int, weighted: bool, row_group_rows: int) -> None:
    train, test = read_source(source)
    rows = split(train.num_rows, test.num_rows, validation_share, seed)
    everything = pa.concat_tables([train, test.cast(train.schema)])
    columns, schema, vocabularies = build(everything, rows, weighted)
    for name, chosen in rows.items():
        write_rows(out / f"{name}.parquet", columns, chosen, row_group_rows)
        say(f"{name}: {len(chosen):,} rows; {label_rates({t: np.asarray(columns[t]) for t in TASKS}, chosen)}")
    write_schema(out / "schema.yaml", schema, COMMENT)
    write_vocabularies(out / "vocabularies.json", vocabularies)


app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="Folder with census-income.data and .test, or with the Parquet form.")],
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    validation_share: Annotated[float, typer.Option(min=0.001, max=0.9, help="Of UCI's training part.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Draws the validation rows.")] = 1,
    weighted: Annotated[bool, typer.Option(help="Let the schema weigh examples by instance_weight.")] = False,
    row_group_rows: Annotated[int, typer.Option(min=1, help="Rows of one Parquet row group.")] = ROW_GROUP_ROWS,
) -> None:
    """Census-Income KDD to OUT/{train,validation,test}.parquet and OUT/schema.yaml, one row per person.

    Tasks: income_50k and never_married. marital_stat is dropped, since it holds the second label. Categories, also
    those written as numbers (industry, occupation, year ...), become ids by the training rows' values in ascending
    order; "?" and values unseen in training are null. Numbers come plain and as ids of quantile buckets.
    instance_weight is in the files, divided by its training mean, and is a weight only with --weighted. The test part
    is UCI's own.
    """
    with reporting_errors():
        convert(source, out, validation_share, seed, weighted, row_group_rows)


if __name__ == "__main__":
    app()
