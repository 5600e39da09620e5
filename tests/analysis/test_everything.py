"""All analyses in one page; what a run does not allow is told; and what people get wrong, command by command."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from gloo import run_ranks
from numbers_of_sections import leaves
from small_run import SCHEMA, make_log, run_file

from hmoe_rec import cli
from hmoe_rec.analysis.everything import analyze_all
from hmoe_rec.config import resolve_config
from hmoe_rec.sharding.process import process_group
from hmoe_rec.training.trainer import train

ANALYSES = ("fields", "correlation", "collapse", "transfer", "entanglement", "gates", "calibration")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """stem: two tasks and a sequence; plain: one task, no sequence; empty: a run without a checkpoint."""
    folder = tmp_path_factory.mktemp("everything")
    make_log(folder)
    train(resolve_config(run_file(folder, "stem", max_steps=5)))
    content = run_file(folder, "plain", max_steps=5)
    content["data"]["schema"] = SCHEMA | {"sequences": [], "tasks": SCHEMA["tasks"][:1]}
    content["model"]["preset"] = "single"
    train(resolve_config(content))
    shutil.copytree(folder / "stem", folder / "empty")
    shutil.rmtree(folder / "empty" / "checkpoints")
    pq.write_table(pq.read_table(folder / "test.parquet").slice(0, 0), folder / "no_rows.parquet")
    pq.write_table(pq.read_table(folder / "test.parquet").drop_columns(["item_id"]), folder / "no_item.parquet")
    return folder


def analyze(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        cli.main(["analyze", *arguments])
    return int(done.value.code or 0)


def outcomes(out: Path) -> dict[tuple[str, str], str | None]:
    found = json.loads((out / "all.json").read_text())["numbers"]["outcomes"]
    return {(o["analysis"], o["run"]): o["reason"] for o in found}


@pytest.mark.slow
def test_all_of_two_runs_in_one_page(runs, tmp_path, capsys):
    assert analyze("all", str(runs / "stem"), str(runs / "plain"), "--out", str(tmp_path), "--by", "price") == 0
    streams = capsys.readouterr()
    found = outcomes(tmp_path)
    assert {name for name, _ in found} == set(ANALYSES) and len(found) == 4 + 2 * 3
    left_out = {key: reason for key, reason in found.items() if reason}
    assert set(left_out) == {("correlation", ""), ("entanglement", "plain")}
    assert "no behavior sequence" in left_out["correlation", ""] and "two tasks" in left_out["entanglement", "plain"]
    for reason in left_out.values():
        assert reason in streams.out and reason in streams.err and reason in (tmp_path / "all.json").read_text()
    assert "[1/10] fields" in streams.err and "[10/10] calibration of plain" in streams.err
    page = (tmp_path / "report.html").read_text()
    for title in ("Overview", "Gates: stem", "Gates: plain", "Calibration: plain", "Dimensional collapse"):
        assert title.split(":")[0] in page and title.split(": ")[-1] in page, title
    assert page.index('<div id="all">') < page.index('<div id="fields">') < page.index('<div id="gates--plain">')
    # A command of its own replaces its section of the page, and no other.
    assert analyze("collapse", str(runs / "stem"), "--out", str(tmp_path)) == 0
    assert (tmp_path / "report.html").read_text().count("Dimensional collapse</h2>") == 1


def test_all_of_one_run(runs, tmp_path):
    assert analyze("all", str(runs / "plain"), "--rows", "200", "--out", str(tmp_path)) == 0
    left_out = {name for (name, _), reason in outcomes(tmp_path).items() if reason}
    assert left_out == {"correlation", "entanglement", "transfer"}
    assert (tmp_path / "gates.json").exists() and (tmp_path / "calibration_reliability.png").exists()


def numbers_of(rank: int, world_size: int, runs: list[str]) -> dict[str, str]:
    with process_group() as process:
        return {s.name: json.dumps(s.numbers) for s in analyze_all(runs, process) if s.name != "all"}


@pytest.mark.slow
def test_four_processes_find_the_same(runs):
    given = [str(runs / "stem"), str(runs / "plain")]
    alone, together = numbers_of(0, 1, given), run_ranks(4, numbers_of, given)
    assert all(found == together[0] for found in together[1:])
    assert alone.keys() == together[0].keys()
    for name in alone:
        one, many = leaves(json.loads(alone[name])), leaves(json.loads(together[0][name]))
        assert one.keys() == many.keys()
        # Scores differ in their last bits, which may swap a pair at the edge of a percentile; counts and Gram matrices
        # are the same.
        tolerance = 1e-10 if name in ("fields", "collapse") else 1e-3
        for key in one:
            assert many[key] == pytest.approx(one[key], rel=tolerance, abs=tolerance, nan_ok=True), (name, key)


# --------------------------------------------------------------------------------------------------------- wrong inputs

BY_RUN = ("calibration", "collapse --weighted", "entanglement", "gates", "transfer", "correlation", "all")
READ_DATA = ("calibration", "collapse --weighted", "entanglement", "gates", "transfer", "correlation")
WRONG = [
    *((f"{command} {{}}/nowhere", "nowhere: not a run directory", "give the train.run_dir") for command in BY_RUN),
    *((f"{command} {{}}/empty", "empty/checkpoints: no checkpoint 'best'", "of a saved step") for command in BY_RUN),
    *((f"{c} {{}}/stem --checkpoint 77", "no checkpoint '77'", "number of a saved step") for c in BY_RUN),
    *((f"{c} {{}}/stem --data {{}}/nothing.parquet", "nothing.parquet", "no such file") for c in READ_DATA),
    *((f"{c} {{}}/stem --data {{}}/no_rows.parquet", "no_rows.parquet", "0 rows") for c in READ_DATA),
    *((f"{c} {{}}/stem --data {{}}/no_item.parquet", "no_item.parquet", "item_id") for c in READ_DATA),
    ("fields {}/nowhere", "nowhere", "no such file"),
    ("fields {}/stem --data {}/no_rows.parquet", "no_rows.parquet", "0 rows"),
    ("fields {}/stem --data {}/no_item.parquet", "no_item.parquet", "item_id"),
    ("correlation {}/plain", "correlation: the run has no behavior sequence", "schema: sequences"),
    ("correlation {}/stem --task clik", "unknown task 'clik'", "click"),
    ("correlation {}/stem --column hist_category", "unknown behavior column 'hist_category'", "hist_item_id"),
    ("correlation {}/stem --slots day", "--slots day", "position or age"),
    ("entanglement {}/plain", "entanglement: needs two tasks", "['click']"),
    ("entanglement {}/stem --tasks click,lik", "unknown task 'lik'", "like"),
    ("entanglement {}/stem --tasks click", "--tasks click", "two names with a comma"),
    ("entanglement {}/stem --item itm", "itm", "item_id"),
    ("entanglement {}/stem --rule guess", "--rule guess", "scores, labels, rates"),
    ("transfer {}/plain", "transfer: needs two tasks", "give a run with both first"),
    ("transfer {}/stem --tasks click,lik", "unknown task 'lik'", "like"),
    ("transfer {}/stem --field itm", "unknown id field 'itm'", "item_id"),
    ("gates {}/stem --by citty", "column citty", "city"),
    ("gates {}/stem --by hist_item_id", "--by hist_item_id: holds lists", "one value per row"),
    ("calibration {}/stem --by citty", "column citty", "city"),
    ("calibration {}/stem --counts city", "--counts city: 'city", "no number; expected a column of counts"),
    ("calibration {}/stem --frequency itm", "--frequency itm: unknown id field 'itm'", "item_id"),
    ("calibration {}/stem --by graph", "--by graph: holds lists", "one value per row"),
    ("all {}/stem --by citty", "column citty", "city"),
]


@pytest.mark.parametrize(("command", "where", "remedy"), WRONG, ids=[w[0].replace("{}/", "") for w in WRONG])
def test_what_people_get_wrong(runs, tmp_path, capsys, command, where, remedy):
    arguments = command.replace("{}", str(runs)).split()
    assert analyze(*arguments, "--out", str(tmp_path)) == 2
    message = capsys.readouterr().err
    assert message.count("hmoe-rec: error: ") == 1 and "Traceback" not in message
    assert where in message and remedy in message
    assert not (tmp_path / "report.html").exists()
