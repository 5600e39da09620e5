"""The program as a person runs it: help that teaches, errors without tracebacks, and what each command prints."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from rich.console import Console
from small_run import make_log
from small_run import run_file as small_run

from hmoe_rec import cli, kinds
from hmoe_rec.config import resolve_config
from hmoe_rec.config.encoding import numbers_to_fit
from hmoe_rec.sharding.process import process_group
from hmoe_rec.show import dense_sizes, print_config, print_keys, set_size
from hmoe_rec.training.build import build_sharded
from hmoe_rec.training.trainer import train
from hmoe_rec.types import ConfigError, DataError, EmbeddingSet, Features, IdField, SequenceField

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    ["train"],
    ["evaluate"],
    ["predict"],
    ["show"],
    ["plan", "make"],
    ["plan", "diff"],
    ["bench", "plan"],
    ["bench", "calibrate"],
    ["checkpoint", "inspect"],
    ["checkpoint", "reshard"],
    ["checkpoint", "export"],
    ["publish", "list"],
    ["publish", "apply"],
    ["uncertainty", "fit"],
    ["explore", "ope"],
    ["keys"],
    ["doctor"],
    ["data", "describe"],
    ["data", "fit"],
    ["data", "pooling"],
    ["data", "exposures"],
    ["data", "replay"],
    ["data", "synth"],
    ["analyze", "all"],
    ["analyze", "calibration"],
    ["analyze", "collapse"],
    ["analyze", "correlation"],
    ["analyze", "entanglement"],
    ["analyze", "fields"],
    ["analyze", "gates"],
    ["analyze", "transfer"],
)  # fmt: skip

RUN_FILE = {
    "data": {
        "train": "train.parquet",
        "schema": {
            "ids": [{"name": "user", "num_embeddings": 7}, {"name": "item", "num_embeddings": 11}],
            "sequences": [{"name": "history", "columns": {"hist_item": "item"}, "max_length": 5}],
            "numbers": [{"name": "price"}],
            "tasks": [{"name": "click"}, {"name": "like"}],
        },
    },
    "model": {"preset": "stem", "embedding_dim": 6, "expert": {"kind": "flat_dnn", "hidden": [5]}, "expert_dim": 4},
}


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hmoe_rec", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN_FILE))
    return str(path)


def run_here(*arguments: str) -> int:
    """Runs the program in this process; -> its exit code."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    return int(end.value.code or 0)


# ----------------------------------------------------------------------------------------------------------------- help


def test_help_answers_at_once():
    """Half a second is promised; the best of three, with room for a busy machine."""
    took = []
    for _ in range(3):
        began = time.perf_counter()
        done = program("--help")
        took.append(time.perf_counter() - began)
        assert done.returncode == 0 and "train" in done.stdout
    assert min(took) < 1.5, took


def test_help_loads_nothing_heavy():
    heavy = ("torch", "pydantic", "pyarrow", "numpy", "rich")
    code = f"import sys, hmoe_rec.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_an_example(command, capsys):
    assert run_here(*command, "--help") == 0
    assert f"hmoe-rec {' '.join(command)}" in capsys.readouterr().out


def test_what_reads_a_run_or_a_run_file_takes_allow():
    """Every command with such an argument, and no other."""
    reading = {"config", "run", "runs"}
    for command in COMMANDS:
        found: Any = typer.main.get_command(cli.app)
        for name in command:
            found = found.commands[name]
        names = {parameter.name for parameter in found.params}
        assert ("allow" in names) == bool(names & reading), command


def test_allow_is_kept_for_the_process_and_told_where_it_is_wrong(run_file, monkeypatch, capsys):
    monkeypatch.setenv(kinds.VARIABLE, "one_package")
    cli.app(["show", run_file, "--yaml", "--allow", "two", "--allow", "three.parts"], standalone_mode=False)
    assert os.environ[kinds.VARIABLE] == "one_package,two,three.parts"
    assert run_here("show", run_file, "--allow", "./here") == 2
    assert "--allow ./here: expected the name of a package" in capsys.readouterr().err


def test_without_a_command_the_help_is_shown(capsys):
    assert run_here() == 2
    streams = capsys.readouterr()
    assert "Commands:" in streams.out + streams.err


# --------------------------------------------------------------------------------------------------------------- errors


def test_a_mistake_is_one_message_without_traceback(tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "data: {train: x, synthetic: {row: 3}}\nmodel: {preset: stme}\ntrain: {sed: 1}\n"
    )
    done = program("train", str(tmp_path / "bad.yaml"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"hmoe-rec: error: {tmp_path}/bad.yaml: ")
    assert "Traceback" not in done.stderr
    assert "train.sed: unknown key; did you mean 'seed'?" in done.stderr
    assert "data.synthetic.row: unknown key" in done.stderr


def test_of_several_processes_the_first_tells_what_all_find(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_here("show", "nowhere.yaml") == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert run_here("show", "nowhere.yaml") == 2
    assert capsys.readouterr().err == "hmoe-rec: error: nowhere.yaml: no such file\n"


def test_what_one_process_finds_it_tells_itself(capsys, monkeypatch):
    def fails(*_: object) -> None:
        raise DataError("part-3.parquet row 7: label 2")

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setenv("RANK", "3")
    assert run_here("train") == 2
    assert capsys.readouterr().err == "hmoe-rec: error (process 3): part-3.parquet row 7: label 2\n"


def test_a_file_that_cannot_be_written_is_a_message_too(capsys, monkeypatch):
    def fails(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/runs/x")

    monkeypatch.setattr(cli, "app", fails)
    assert run_here("predict") == 2
    assert capsys.readouterr().err == "hmoe-rec: error: [Errno 13] Permission denied: '/runs/x'\n"


def test_the_traceback_can_be_had(monkeypatch):
    monkeypatch.setenv("HMOE_REC_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        cli.main(["show", "nowhere.yaml"])


def test_an_unknown_command_or_section_is_told(capsys):
    assert run_here("trian") == 2
    assert "trian" in capsys.readouterr().err
    assert run_here("keys", "tran") == 2
    assert "unknown section 'tran'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- commands


def test_train_passes_overrides_and_resume_and_prints_the_table(run_file, capsys, monkeypatch):
    import types

    given = []
    figures = {"auc": 0.7, "logloss": 0.5, "ne": 0.9, "calibration": 1.0, "examples": 10.0}
    report = {
        "best_step": 7,
        "test": {"click": figures, "like": figures},
        "test_at_best_of_each_task": {"click": figures | {"step": 7}, "like": figures | {"step": 3, "auc": 0.75}},
        "reference": {"test": {"click": {"auc": 0.8}}},
    }

    def train(config):
        given.append(config)
        return report

    monkeypatch.setitem(sys.modules, "hmoe_rec.training.trainer", types.SimpleNamespace(train=train))
    assert run_here("train", run_file, "train.seed=5", "--resume", "model.preset=mmoe") == 0
    assert (given[0].train.seed, given[0].train.resume, given[0].model.from_preset) == (5, True, "mmoe")
    printed = capsys.readouterr().out
    assert "test data at step 7" in printed and "report.json" in printed
    assert printed.count("best possible") == 1 and printed.count("at its own best step") == 1


def test_evaluate_prints_a_table_or_json(capsys, monkeypatch):
    import types

    results = {"metrics": {"click": {"auc": 0.7, "gauc": float("nan")}}, "step": 4, "reference": None}
    calls = []

    def evaluate_run(run, **options):
        calls.append((run, options))
        return results

    monkeypatch.setitem(sys.modules, "hmoe_rec.training.evaluate", types.SimpleNamespace(evaluate_run=evaluate_run))
    given = ("--data", "new.parquet", "--checkpoint", "latest", "--device", "cpu")
    assert run_here("evaluate", "runs/x", *given, "--json") == 0
    assert calls == [("runs/x", {"data": "new.parquet", "checkpoint": "latest", "device": "cpu"})]
    assert json.loads(capsys.readouterr().out)["metrics"] == {"click": {"auc": 0.7, "gauc": None}}
    assert run_here("evaluate", "runs/x") == 0
    assert "click" in capsys.readouterr().out


def test_show_as_yaml_is_a_run_file(run_file, tmp_path, capsys):
    assert run_here("show", run_file, "model.embedding_dim=4", "--yaml") == 0
    resolved = resolve_config(yaml.safe_load(capsys.readouterr().out))
    assert resolved.model.sets["shared"].dim == 4


def test_synth_writes_a_log_and_tells_what_is_possible(tmp_path, capsys):
    arguments = ["rows=200", "validation_rows=50", "test_rows=500", "num_users=20", "num_items=30"]
    assert run_here("data", "synth", "--out", str(tmp_path / "log"), *arguments) == 0
    assert (tmp_path / "log" / "schema.yaml").exists() and "best possible AUC" in capsys.readouterr().out
    assert run_here("data", "synth", "--out", str(tmp_path / "log"), "row=3") == 2
    assert "row: unknown key 'row'" in capsys.readouterr().err


def test_synth_makes_no_directory_that_is_named_like_a_store(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_here("data", "synth", "--out", "s3://bucket/log", "rows=20") == 2
    assert "expected a path on this machine, got a remote URI" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_fit_prints_and_writes_statistics_that_a_run_takes(tmp_path, capsys):
    folder = tmp_path / "log"
    make_log(folder)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small_run(folder)))
    out = tmp_path / "statistics.yaml"
    assert run_here("data", "fit", str(tmp_path / "run.yaml"), "--out", str(out)) == 0
    printed_table = capsys.readouterr().out
    assert "price" in printed_table and "99.9 %" in printed_table and f"wrote {out}" in printed_table.replace("\n", "")
    content = small_run(folder) | {"model": RUN_FILE["model"] | {"encoding": {"numbers": "mnse"}}}
    assert numbers_to_fit(resolve_config(content)) == ["price"]
    content["data"]["statistics"] = str(out)
    config = resolve_config(content)
    assert numbers_to_fit(config) == [] and config.features.numbers[0].statistics.count > 1000


def test_pooling_is_measured_for_a_file_or_on_the_way_to_a_plan(tmp_path, capsys):
    folder = tmp_path / "log"
    make_log(folder)
    content = small_run(folder) | {
        "model": RUN_FILE["model"] | {"preset": "mmoe", "sets": {"shared": {"fields": ["item_id", "hist_item_id"]}}}
    }
    run, out, plan = (str(tmp_path / name) for name in ("run.yaml", "pooling.yaml", "plan.json"))
    Path(run).write_text(yaml.safe_dump(content))
    assert run_here("data", "pooling", run, "--out", out) == 0
    assert "hist_item_id" in capsys.readouterr().out
    lengths = pq.read_table(folder / "train.parquet")["hist_item_id"]
    mean = sum(min(len(row), 4) for row in lengths.to_pylist()) / len(lengths)  # max_length is 4
    written = yaml.safe_load(Path(out).read_text())
    assert written["hist_item_id"] == pytest.approx(mean, rel=1e-3) and written["item_id"] == 1
    make = ["plan", run, "--topology", "h100x8", "--out", plan]
    assert run_here(*make) == 0
    assert "lists taken for one id per example: hist_item_id" in capsys.readouterr().out.replace("\n", " ")
    slow = []
    for given in (f"sharding.pooling={out}", "sharding.measure_pooling=true", "sharding.pooling={}"):
        assert run_here(*make, given) == 0
        tables = json.loads(Path(plan).read_text())["prediction"]["tables"]
        slow.append(next(t["sent"] for t in tables if t["table"] == "shared__item_id"))
        assert ("lists taken" in capsys.readouterr().out) == (given == "sharding.pooling={}")
    assert slow[0] == slow[1] != slow[2]


def test_exposures_are_counted_and_counted_on(tmp_path, capsys):
    (tmp_path / "log").mkdir()
    command = ["data", "exposures", str(tmp_path / "log"), "--key", "u", "--key", "i", "--out", str(tmp_path / "out")]
    for n in (1, 2):
        pq.write_table(pa.table({"u": [1, 1, 2], "i": [n, n, 3], "t": [n, n, n]}), tmp_path / "log" / f"{n}.parquet")
        assert run_here(*command, "--time", "t", "--column", "k") == 0
        done = capsys.readouterr().out.replace("\n", "")
        assert "wrote 3 rows in 1 files" in done and f"{n - 1} counted before" in done
        assert pq.read_table(tmp_path / "out" / f"{n}.parquet")["k"].to_pylist() == [0, 1, n - 1]
    assert run_here(*command[:-2], "--out", str(tmp_path / "log")) == 2
    assert "is the file that is read" in capsys.readouterr().err


def test_plan_for_a_cluster_that_is_not_here_is_one_that_a_run_takes(run_file, tmp_path, capsys):
    first, second, page = (str(tmp_path / name) for name in ("a.json", "b.json", "plan.html"))
    assert run_here("plan", run_file, "--topology", "h100x8", "--nodes", "2", "--out", first, "--html", page) == 0
    printed_report = capsys.readouterr().out
    assert "16 ranks" in printed_report and "user" in printed_report
    assert "shared__user" in Path(page).read_text()
    topology = tmp_path / "one.yaml"
    topology.write_text("{base: cpu, ranks_per_node: 1}")
    plan = ["plan", run_file, "model.embedding_dim=8", "sharding.plan=table_wise", "--topology", str(topology), "--out"]
    assert run_here(*plan, second) == 0
    assert json.loads(Path(second).read_text())["world_size"] == 1
    capsys.readouterr()
    assert run_here("plan", "diff", first, second) == 0
    assert "world size" in capsys.readouterr().out
    assert run_here("plan", "diff", first, first, "--exit-code") == 0
    assert "equal" in capsys.readouterr().out
    assert run_here("plan", "diff", first, second, "--exit-code", "--html", page) == 1
    text = capsys.readouterr().out
    assert "before: h100x8" in text and "vectors sent" in text and "shared__user" in Path(page).read_text()
    model = RUN_FILE["model"] | {"embedding_dim": 8}  # FBGEMM takes multiples of 4
    config = resolve_config(RUN_FILE | {"model": model, "sharding": {"plan": second}})
    with process_group("cpu") as process:
        build_sharded(config, process)  # accepted as it is


def test_a_checkpoint_is_looked_at_cut_anew_and_exported(tmp_path, capsys):
    make_log(tmp_path, rows=2600)
    run = resolve_config(small_run(tmp_path, max_steps=2))
    train(run)
    capsys.readouterr()
    assert run_here("checkpoint", "inspect", run.train.run_dir, "--verify") == 0
    shown = capsys.readouterr().out
    assert "click__user_id" in shown and "step 2" in shown and "momentum1" in shown
    target = str(tmp_path / "cut" / "checkpoints")
    assert run_here("checkpoint", "reshard", run.train.run_dir, target, "--world-size", "3") == 0
    assert "(3 processes)" in capsys.readouterr().out
    assert run_here("checkpoint", "inspect", target, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["world_size"] == 3 and len(report["tables"]) == 9
    exported = tmp_path / "tables"
    assert run_here("checkpoint", "export", target, str(exported), "--format", "npy", "--tables", "like__*") == 0
    assert sorted(p.name for p in exported.glob("*.npy")) == [f"like__{f}.npy" for f in ("city", "item_id", "user_id")]
    (Path(report["uri"]) / next(iter(p.name for p in Path(report["uri"]).glob("*.distcp")))).write_bytes(b"")
    assert run_here("checkpoint", "inspect", target) == 1
    assert "damaged" in capsys.readouterr().out


def test_plan_without_a_cluster(run_file, capsys):
    assert run_here("plan", run_file) == 2
    assert "--topology" in capsys.readouterr().err


def test_libraries_get_their_environment_before_they_are_loaded():
    code = "import os; from hmoe_rec.cli import main\ntry: main(['keys', 'sharding'])\nexcept SystemExit: pass\n"
    code += "print(os.environ['OMP_WAIT_POLICY'], os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'])"
    environment = {k: v for k, v in os.environ.items() if k not in cli.ENVIRONMENT} | {"OMP_WAIT_POLICY": "ACTIVE"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "ACTIVE 1"


# ----------------------------------------------------------------------------------------------------------------- show


def printed(function, *arguments: object) -> str:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))
    function(*arguments, console)
    return console.export_text()


def test_show_prints_routes_sets_and_parts():
    text = printed(print_config, resolve_config(RUN_FILE))
    assert "click     t       r        t" in text
    assert "gate of like: sees like + shared" in text
    sets = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") == 8}
    assert [cell.strip() for cell in sets["shared"].split("│")[2:-1]] == ["-", "6", "2", "18", "108", "504 B"]
    assert [cell.strip() for cell in sets["all"].split("│")[2:-1]] == ["", "", "6", "54", "324", "1.5 KiB"]


def test_show_says_what_is_sampled_and_weighted():
    sampling = {"negatives": 0.1, "slices": {"column": "user", "rates": {3: {"click": 0.5, "like": 1.0}}}}
    content = RUN_FILE | {"data": RUN_FILE["data"] | {"sampling": sampling | {"correction": "logit"}}}
    text = printed(print_config, resolve_config(content | {"train": {"exposure": {"column": "k", "tasks": ["click"]}}}))
    assert "negatives kept of user = 3: click 0.5 (offset +0.693), like 1 (offset -0.000)" in text.replace(
        "+0.000", "-0.000"
    )
    assert "negatives kept of other rows: click 0.1 (offset +2.303), like 0.1 (offset +2.303)" in text
    assert "positives of click weigh 1 / propensity by column k, within [0.1, 1.0]" in text
    assert "sampling:" not in printed(print_config, resolve_config(RUN_FILE)).split("routes")[1]


def test_show_says_what_is_not_fitted_yet_and_what_parts_cost():
    model = RUN_FILE["model"] | {"encoding": {"numbers": "mnse", "sequences": "tim"}}
    text = printed(print_config, resolve_config(RUN_FILE | {"model": model}))
    assert "statistics of price are not fitted yet" in text
    encoders = next(line for line in text.splitlines() if "│ encoders" in line)
    assert "mnse, tim" in encoders
    experts = [line.split("│") for line in text.splitlines() if "│ click_1" in line]
    assert experts[-1][5].strip() == f"{2 * (6 * 6 * 5 + 5 * 4):,}"  # user, item, hist_item and price in three bases


def test_dense_sizes_are_those_of_the_model():
    from hmoe_rec.training.build import build_model, parameter_counts

    config = resolve_config(RUN_FILE)
    sizes = dense_sizes(config)
    assert sum(size.parameters for size in sizes.values()) == parameter_counts(build_model(config))["dense"]
    assert sizes["click_1"].parameters == (4 * 6 + 1) * 5 + (5 + 1) * 4
    assert sizes["click_1"].flops == 2 * (4 * 6 * 5 + 5 * 4)


def test_size_of_a_set_counts_each_table_once_and_the_optimizer():
    features = Features(
        ids=(IdField("user", 7), IdField("item", 10, missing_row=True), IdField("city", 5, hashed=True)),
        sequences=(SequenceField("history", (("hist_item", "item"),)),),
    )
    everything = set_size(EmbeddingSet("s", 6), features)
    assert (everything.tables, everything.rows, everything.parameters) == (3, 7 + 11 + 5, 23 * 6)
    assert everything.bytes == 23 * 6 * 4 + 23 * 4
    behaviors = set_size(
        EmbeddingSet("s", 6, ("hist_item",)), features, precisions={"s__item": "fp16"}, optimizer="adagrad"
    )
    assert (behaviors.tables, behaviors.rows, behaviors.bytes) == (1, 11, 11 * 6 * 2 + 11 * 6 * 4)
    assert set_size(EmbeddingSet("s", 6), features, optimizer="sgd").bytes == 23 * 6 * 4


def test_keys_are_all_listed_with_their_meaning():
    text = printed(print_keys, None)
    for line in (
        "  global_batch_size: 4096  # ",
        "  tower.hidden: [64]  # ",
        "  best.metric: auc  # ",
        "  plan: auto  # ",
    ):
        assert line in text
    assert "{kind: dcnv2, num_layers: 2, rank: null" in text
    for title in ("encodings of numbers:", "encodings of sequences:", "similarities:"):
        assert title in text
    assert "field_names" not in text, "what the model gives is no option"
    assert "#\n" not in text, "every key has a description"
