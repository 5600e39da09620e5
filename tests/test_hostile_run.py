"""A run directory of somebody else's, full of code: whatever command opens it, none of that code runs."""

import io as memory
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rewritten import describe_by, resign
from small_run import make_log, run_file

from hmoe_rec import cli, kinds
from hmoe_rec.config import resolve_config
from hmoe_rec.training.checkpoint_metadata import TENSORS, from_json, to_json
from hmoe_rec.training.publication import digest_of
from hmoe_rec.training.trainer import train

HELPER = """
import os
open(os.environ["SENTINEL"], "a").write("imported\\n")
class Loss:
    def __init__(self, *args, **options):
        open(os.environ["SENTINEL"], "a").write("called\\n")
"""
TOUCH = "import os; open(os.environ['SENTINEL'], 'a')"


class Call:
    """Pickles as a call that leaves the sentinel."""

    def __init__(self, function: Any = exec, *args: Any) -> None:
        self.call = function, args or (TOUCH,)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """log/, and a run that has been trained, published and fitted, with a plan beside it."""
    folder = tmp_path_factory.mktemp("hostile")
    make_log(folder, rows=2500)
    content = run_file(folder, max_steps=3, publish={"to": str(folder / "run" / "published")})
    train(resolve_config(content))
    assert program("uncertainty", "fit", str(folder / "run"), "--kind", "mc_dropout") == 0
    written = str(folder / "run" / "plan.json")
    assert program("plan", str(folder / "run" / "config.yaml"), "--topology", "cpu", "--out", written) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the run, which is also the current folder, and where Python searches first."""
    folder = tmp_path / "run"
    shutil.copytree(trained / "run", folder)
    (folder / "helper.py").write_text(HELPER)
    (folder / "matplotlibrc").write_text("backend: module://helper\naxes.prop_cycle: helper.Loss()\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", str(folder), *sys.path])
    monkeypatch.setenv("SENTINEL", str(tmp_path / "ran"))
    monkeypatch.setenv(kinds.VARIABLE, "")
    change_config(folder, train={"run_dir": str(folder), "publish": None})
    yield folder
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert "helper" not in sys.modules


def program(*arguments: str) -> int:
    """-> the exit code."""
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def change_config(run: Path, **sections: Any) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    for section, values in sections.items():
        content[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def checkpoint_of(run: Path) -> Path:
    return next((run / "checkpoints").glob("step_*"))


# Every command on the run in ".", and those that take a checkpoint of it.
OPENING: dict[str, tuple[str, ...]] = {
    "evaluate": ("evaluate", "."),
    "evaluate uncertainty": ("evaluate", ".", "--uncertainty", "mc_dropout"),
    "predict": ("predict", ".", "--data", "../log/test.parquet", "--out", "../out.parquet"),
    "uncertainty": ("uncertainty", "fit", ".", "--kind", "laplace"),
    "ensemble": ("uncertainty", "fit", ".", "--kind", "ensemble", "--member", "../run"),
    "resume": ("train", "config.yaml", "--resume", "train.max_steps=4"),
    "start from": ("train", "config.yaml", "--follow", "../log", "online.start_from=.", "train.run_dir=../new")
    + ("online.until_idle=0.1", "train.decay=constant", "train.early_stop=null"),
    **{f"analyze {name}": ("analyze", name, ".") for name in ("all", "calibration", "collapse", "gates")},
    "analyze correlation": ("analyze", "correlation", "."),
    "analyze entanglement": ("analyze", "entanglement", ".", "--tasks", "click,like"),
    "analyze transfer": ("analyze", "transfer", ".", "."),
}
READING: dict[str, tuple[str, ...]] = {
    "show": ("show", "config.yaml"),
    "train": ("train", "config.yaml", "train.run_dir=../new"),
    "plan": ("plan", "config.yaml", "--topology", "cpu"),
    "bench plan": ("bench", "plan", "config.yaml", "--plans", "auto"),
    "bench calibrate": ("bench", "calibrate", "--config", "config.yaml"),
    "data fit": ("data", "fit", "config.yaml"),
    "data pooling": ("data", "pooling", "config.yaml"),
    "analyze fields": ("analyze", "fields", "config.yaml"),
    "analyze fields of a run": ("analyze", "fields", "."),
}
CHECKPOINTS: dict[str, tuple[str, ...]] = {
    "inspect": ("checkpoint", "inspect", ".", "--verify"),
    "reshard": ("checkpoint", "reshard", ".", "../resharded", "--world-size", "2"),
    "export": ("checkpoint", "export", ".", "../exported", "--with-dense", "--with-optimizer"),
}


# ---------------------------------------------------------------------------------------------------------------- kinds

LOSS = {"kind": "helper:Loss"}
WAYS = {
    "train.losses.click.0": LOSS,
    "train.losses.like.0": {"kind": "subprocess:run", "args": "touch sentinel", "shell": True},
    "train.task_weighting": LOSS,
    "model.tower": LOSS,
    "model.experts.click_1": {"kind": "helper:Loss", "set": "click"},
    "model.experts.like_1": {"kind": "os:system", "set": "like", "command": "touch sentinel"},
    "model.encoding.numbers": LOSS,
    "model.encoding.sequences": LOSS,
    "model.encoding.fields.price": LOSS,
    "model.encoding.fields.history": LOSS,
    "model.encoding.similarities.near": LOSS,
}


def place(content: dict[str, Any], path: str, part: dict[str, Any]) -> None:
    *above, last = path.split(".")
    holder: Any = content
    for key in above:
        holder = holder.setdefault(key, {}) if isinstance(holder, dict) else holder[int(key)]
    if isinstance(holder, dict):
        known = holder.get(last)
        holder[last] = part | ({"set": known["set"]} if isinstance(known, dict) and "set" in known else {})


@pytest.fixture
def hostile_kinds(run) -> Path:
    content = yaml.safe_load((run / "config.yaml").read_text())
    for path, part in WAYS.items():
        if path.endswith(".0"):
            content["train"].setdefault("losses", {})[path.split(".")[2]] = [part]
        else:
            place(content, path, part)
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    return run


@pytest.mark.parametrize("command", {**OPENING, **READING})
def test_no_kind_of_it_is_imported_or_called(hostile_kinds, command, capsys):
    """Whichever part it stands for; the message names the file, every key, and the flag."""
    assert program(*{**OPENING, **READING}[command]) == 2
    told = capsys.readouterr().err
    assert "config.yaml: " in told
    for path in WAYS:
        assert f"{path}.kind: kind " in told, path
    assert "add --allow helper to the command" in told and "'subprocess:run': subprocess is a module of Python" in told


@pytest.mark.parametrize("path", WAYS)
def test_allowing_its_name_does_not_find_it_in_the_run_directory(run, path, capsys):
    content = yaml.safe_load((run / "config.yaml").read_text())
    if path.endswith(".0"):
        content["train"]["losses"] = {path.split(".")[2]: [LOSS]}
    else:
        place(content, path, dict(LOSS))
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert program("show", "config.yaml", "--allow", "helper", "--allow", "subprocess", "--allow", "os") == 2
    assert "'helper' of the current folder is never taken" in capsys.readouterr().err


@pytest.mark.parametrize("cell", ["helper:Loss", "subprocess:run"])
def test_other_names_of_a_run_file_are_no_kinds(run, cell):
    """Cells of routes, optimizers, precisions, plans, metrics: names of a list, which nothing imports."""
    keys = ("model.routes.click.click_1", "train.table_optimizer", "model.table_precision", "train.best.metric")
    for key in (*keys, "sharding.plan", "train.device", "train.decay", "train.gradient_surgery"):
        override = f"{key}={cell}"
        assert program("show", "config.yaml", override) == 2, override


# ----------------------------------------------------------------------------------------------------------- text files

YAML = ['!!python/object/apply:builtins.exec ["{0}"]', "!!python/name:helper.Loss ''", "!!python/module:helper ''"]


@pytest.mark.parametrize("text", YAML)
@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "{file}"),
        ("show", "config.yaml", "data.schema={file}"),
        ("show", "config.yaml", "data.statistics={file}"),
        ("show", "config.yaml", "sharding.pooling={file}"),
        ("plan", "config.yaml", "--topology", "{file}"),
        ("show", "config.yaml", "train.seed={text}"),
    ],
    ids=" ".join,
)
def test_yaml_with_tags_of_python_is_text(run, text, arguments):
    text = text.format(TOUCH)
    Path("given.yaml").write_text(f"a: {text}\n")
    assert program(*(a.format(file="given.yaml", text=text) for a in arguments)) == 2


def test_a_plan_file_is_json_with_names_of_a_list(run, capsys):
    plan = json.loads(Path("plan.json").read_text()) | {"world_size": 1, "local_world_size": 1}
    for table in (t for members in plan["plan"].values() for t in members.values()):
        table["sharding_type"] = table["compute_kernel"] = "helper:Loss"
    Path("plan.json").write_text(json.dumps(plan))
    change_config(run, sharding={"plan": "plan.json"})
    assert program("evaluate", ".") == 2
    assert "plan.json: " in capsys.readouterr().err
    Path("pickled.json").write_bytes(pickle.dumps(Call()))
    assert program("plan", "diff", "pickled.json", "plan.json") == 2


# ---------------------------------------------------------------------------------------------------------- checkpoints


def poison_description(run: Path) -> None:
    describe_by(checkpoint_of(run), pickle.dumps(Call()))


def poison_object(run: Path) -> None:
    """As torch.distributed.checkpoint saves what is no tensor: bytes that it would unpickle."""
    import torch.distributed.checkpoint as dcp

    folder = checkpoint_of(run)
    for file in folder.iterdir():
        if file.name != "manifest.json":
            file.unlink()
    dcp.save({"model.x": Call()}, checkpoint_id=str(folder), no_dist=True)
    resign(folder)


def poison_payload(run: Path, made: Any = None) -> None:
    """All pieces are one pickle that calls something."""
    folder, file = checkpoint_of(run), memory.BytesIO()
    if made is None:
        torch.save(Call(), file)
    else:
        made(file)
    (folder / "__0_0.distcp").write_bytes(file.getvalue())
    tensors = from_json((folder / TENSORS).read_bytes())
    size = len(file.getvalue())
    tensors = {
        key: replace(t, pieces=tuple(replace(p, begin=0, length=size) for p in t.pieces)) for key, t in tensors.items()
    }
    (folder / TENSORS).write_bytes(to_json(tensors))
    resign(folder)


def poison_program(run: Path) -> None:
    """TorchScript, which torch.load hands on to a loader of programs."""

    class Program(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    poison_payload(run, lambda file: torch.jit.save(torch.jit.script(Program()), file))


POISONS = {"description": poison_description, "object": poison_object, "payload": poison_payload} | {
    "program": poison_program
}
BY_POISON = [("description", command) for command in {**OPENING, **CHECKPOINTS}] + [
    (poison, command)
    for poison in ("object", "payload", "program")
    for command in ("evaluate", "analyze collapse", "resume", *CHECKPOINTS)
]


@pytest.mark.parametrize(("poison", "command"), BY_POISON)
def test_no_checkpoint_of_it_runs_code(run, trained, poison, command, capsys):
    (run.parent / "log").symlink_to(trained)
    POISONS[poison](run)
    code = program(*{**OPENING, **CHECKPOINTS}[command])
    told = capsys.readouterr()
    if command == "analyze all":  # tells what could not be done
        assert "could run code" in told.out + told.err
    elif not (command == "inspect" and poison in ("payload", "program")):  # reads no values
        assert code == 2 or (command == "inspect" and code == 1), told
        assert poison != "payload" or "could run code" in told.err
    assert "weights_only" not in told.err or poison == "program"  # no advice to run it


def test_what_other_packages_let_torch_load_does_not_count(run, monkeypatch):
    """torch.load(weights_only=True) calls what is on a list that any package may add to."""
    monkeypatch.setattr(torch._weights_only_unpickler, "_marked_safe_globals_set", {os.mkdir})
    poison_payload(run, lambda file: torch.save(Call(os.mkdir, str(run.parent / "ran")), file))
    assert program("evaluate", ".") == program("checkpoint", "export", ".", "../exported", "--with-dense") == 2
    assert torch.serialization.get_safe_globals() == [os.mkdir]


# -------------------------------------------------------------------------------------------- publications, fitted sums


def npz(**arrays: np.ndarray) -> bytes:
    file = memory.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def poisoned_array() -> np.ndarray:
    array = np.empty(1, object)
    array[0] = Call()
    return array


def test_no_publication_of_it_runs_code(run):
    import hashlib

    folder = next((run / "published").glob("*-base"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    for name in manifest["files"]:
        with np.load(folder / name) as parts:
            content = npz(**{key: poisoned_array() for key in parts.files})
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for form in manifest["arrays"].values():
        form["dtype"] = "O"
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest_of(manifest)}))
    assert program("publish", "list", "published") == 0
    assert program("publish", "apply", "published", "../weights.npz") == 2


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_publication_names_files_of_its_own(run, name, capsys):
    folder = next((run / "published").glob("*-base"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest["files"] = {name: {"size": 1, "sha256": "0"}}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest_of(manifest)}))
    for command in (("list", "published"), ("apply", "published", "../weights.npz")):
        assert program("publish", *command) == 2
        assert "names a file outside" in capsys.readouterr().err


def test_no_fitted_estimate_of_it_runs_code(run, capsys):
    (file,) = (run / "uncertainty").glob("*.npz")
    file.write_bytes(npz(record=poisoned_array()))
    assert program("evaluate", ".", "--uncertainty", "mc_dropout") == 2
    assert "cannot be read" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- logs


def test_no_type_that_a_file_of_rows_names_is_unpickled(run, trained):
    """Arrow's extension types of Python carried a pickle in the file's own description of its columns."""
    table = pq.read_table(trained / "test.parquet")
    named = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Call())}
    fields = [field.with_metadata(named) for field in table.schema]
    pandas = {b"pandas": json.dumps({"index_columns": ["!!python/name:os.system"]}).encode()}
    pq.write_table(table.cast(pa.schema(fields, metadata=pandas)), "log.parquet")
    assert program("evaluate", ".", "--data", "log.parquet") == 0
    assert program("data", "describe", "log.parquet") == 0


# ----------------------------------------------------------------------------------------------- the folder of Python's


@pytest.mark.slow
def test_a_whole_analysis_in_its_folder_takes_no_module_from_there(run, root):
    """Also started by `python -m`, and with pictures drawn."""
    for name in (
        "yaml",
        "typer",
        "torch",
        "torchrec",
        "pyarrow",
        "matplotlib",
        "rich",
        "pydantic",
        "fsspec",
        "sitecustomize",
    ):
        (run / f"{name}.py").write_text(HELPER)
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "hmoe_rec", "analyze", "collapse", ".", "--out", "../analysis"]
    done = subprocess.run(command, cwd=run, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert list((run.parent / "analysis").glob("*.png"))
