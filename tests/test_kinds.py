"""Whose code a kind may run: what the user allowed, found where it was installed, and a class of the right base."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import make_log, run_file

from hmoe_rec import cli, kinds
from hmoe_rec.config import load_config
from hmoe_rec.config.file import to_yaml
from hmoe_rec.experts import EXPERTS
from hmoe_rec.kinds import resolve
from hmoe_rec.losses import LOSSES, WEIGHTINGS
from hmoe_rec.towers import TOWERS
from hmoe_rec.types import ConfigError

LOSS = "from hmoe_rec.losses.pointwise import BCELoss\nclass Mine(BCELoss):\n    pass\n"
MARK = "import os\nopen(os.environ['SENTINEL'], 'a').write(__name__ + '\\n')\n"


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch, tmp_path):
    """And what these tests import is forgotten after them."""
    monkeypatch.setenv(kinds.VARIABLE, "")
    monkeypatch.setenv("SENTINEL", str(tmp_path / "ran"))
    before = set(sys.modules)
    kinds._offers.cache_clear()
    yield
    kinds._offers.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0].startswith("their_"):
            del sys.modules[name]


@pytest.fixture
def ran(tmp_path):
    """Whether foreign code ran."""
    return lambda: (tmp_path / "ran").exists()


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A folder that Python searches and that is not the current one."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def test_nothing_runs_that_is_not_allowed(installed, ran):
    (installed / "their_parts.py").write_text(MARK + LOSS)
    with pytest.raises(ValueError, match="'their_parts:Mine' is code of the package 'their_parts'.*--allow their"):
        resolve("their_parts:Mine", LOSSES)
    assert not ran()
    kinds.allow(["their_parts"])
    assert resolve("their_parts:Mine", LOSSES).__name__ == "Mine" and ran()


@pytest.mark.parametrize("kind", ["subprocess:run", "os:system", "builtins:eval", "importlib.metadata:version"])
def test_modules_of_python_hold_no_parts(kind):
    kinds.allow([kind.partition(":")[0]])
    with pytest.raises(ValueError, match="module of Python itself"):
        resolve(kind, LOSSES)


@pytest.mark.parametrize("kind", ["a:b:C", "a:", ":C", "../a:C", "a.:C", "a:C.D", "a b:C", "a/b:C"])
def test_a_kind_that_is_no_path(kind):
    kinds.allow(["a"])
    with pytest.raises(ValueError, match="expected 'package.module:Class'"):
        resolve(kind, LOSSES)


PACKAGE = {
    "__init__.py": "",
    "parts.py": "import os, subprocess, torch\n"
    "from torch.nn import Identity\nfrom hmoe_rec.losses.pointwise import BCELoss\n"
    "from their_other import Mine as Borrowed\nclass Plain:\n    def __init__(self): subprocess.run('x')\n"
    "def function(): raise SystemExit\ninstance = BCELoss()\n",
}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("os", "is no class but a module"),
        ("function", "is no class but a function"),
        ("instance", "is no class but a BCELoss"),
        ("Plain", "is no hmoe_rec.losses.base.Loss; derive it from that class"),
        ("Identity", "is no hmoe_rec.losses.base.Loss"),
        ("Borrowed", "was defined in 'their_other', which is not allowed"),
        ("Missing", "is not there"),
    ],
)
def test_an_allowed_package_gives_classes_of_its_own_only(installed, name, said):
    (installed / "their_package").mkdir()
    for file, text in PACKAGE.items():
        (installed / "their_package" / file).write_text(text)
    (installed / "their_other.py").write_text(LOSS)
    kinds.allow(["their_package"])
    with pytest.raises(ValueError, match=said):
        resolve(f"their_package.parts:{name}", LOSSES)


def test_a_module_reached_through_an_allowed_one_is_not_a_part_of_it(installed):
    (installed / "their_parts.py").write_text("import os\n" + LOSS)
    kinds.allow(["their_parts"])
    with pytest.raises(ValueError, match="cannot import 'their_parts.os'"):
        resolve("their_parts.os:system", LOSSES)


def test_a_package_is_not_its_namesake(installed, ran):
    (installed / "their_parts_too.py").write_text(MARK + LOSS)
    kinds.allow(["their_parts"])
    with pytest.raises(ValueError, match="--allow their_parts_too"):
        resolve("their_parts_too:Mine", LOSSES)
    assert not ran()


@pytest.mark.parametrize("registry", [EXPERTS, TOWERS, WEIGHTINGS], ids=["experts", "towers", "weightings"])
def test_a_loss_is_no_other_part(installed, registry):
    (installed / "their_parts.py").write_text(LOSS)
    kinds.allow(["their_parts"])
    with pytest.raises(ValueError, match="derive it from that class"):
        resolve("their_parts:Mine", registry)


def test_our_own_modules_need_no_permission_but_hold_parts_only():
    assert resolve("hmoe_rec.losses.pointwise:BCELoss", LOSSES) is resolve("bce", LOSSES)
    with pytest.raises(ValueError, match="is no class but a function"):
        resolve("hmoe_rec.training.trainer:train", LOSSES)


@pytest.mark.parametrize("package", ["./mine", "mine:Loss", "", "a-b", "mine."])
def test_what_is_no_package_cannot_be_allowed(package):
    with pytest.raises(ConfigError, match="expected the name of a package"):
        kinds.allow([package])


def test_whatever_a_module_raises_is_told(installed):
    (installed / "their_parts.py").write_text("raise RuntimeError('no licence')")
    kinds.allow(["their_parts"])
    with pytest.raises(ValueError, match="cannot import 'their_parts': no licence"):
        resolve("their_parts:Mine", LOSSES)


class TestTheCurrentFolder:
    """It may be a run directory that somebody else has written: what it holds is not found, even if it is allowed."""

    @pytest.mark.parametrize("how", ["empty", "absolute", "link"])
    def test_is_not_searched(self, tmp_path, monkeypatch, ran, how):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "their_helper.py").write_text(MARK + LOSS)
        (tmp_path / "link").symlink_to(folder)
        monkeypatch.chdir(folder)
        path = {"empty": "", "absolute": str(folder), "link": str(tmp_path / "link")}[how]
        monkeypatch.setattr(sys, "path", [path, *sys.path])
        kinds.allow(["their_helper"])
        with pytest.raises(ValueError, match="of the current folder is never taken.*PYTHONPATH="):
            resolve("their_helper:Mine", LOSSES)
        assert not ran() and sys.path[0] == path

    def test_what_a_program_has_imported_itself_is_there(self, tmp_path, monkeypatch):
        """Such as the module beside a user's script, started in its folder."""
        (tmp_path / "their_helper.py").write_text(LOSS)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        made = importlib.import_module("their_helper").Mine
        kinds.allow(["their_helper"])
        assert resolve("their_helper:Mine", LOSSES) is made

    def test_is_searched_where_the_user_named_it_in_full(self, tmp_path, monkeypatch):
        (tmp_path / "their_helper.py").write_text(LOSS)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        kinds.allow(["their_helper"])
        assert resolve("their_helper:Mine", LOSSES).__name__ == "Mine"

    @pytest.mark.parametrize("given", ["", ".", "lib"])
    def test_an_item_of_pythonpath_that_begins_there_does_not_count(self, tmp_path, monkeypatch, ran, given):
        (tmp_path / given).mkdir(exist_ok=True)
        (tmp_path / given / "their_helper.py").write_text(MARK + LOSS)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(tmp_path / given), *sys.path])
        monkeypatch.setenv("PYTHONPATH", given + os.pathsep + os.environ.get("PYTHONPATH", ""))
        kinds.allow(["their_helper"])
        with pytest.raises(ValueError, match="cannot import"):
            resolve("their_helper:Mine", LOSSES)
        assert not ran()

    def test_does_not_give_an_allowed_package_its_modules(self, installed, tmp_path, monkeypatch, ran):
        """their_parts imports their_helper, which is installed; the one of the current folder stands first."""
        (installed / "their_parts.py").write_text("import their_helper\n" + LOSS)
        (installed / "their_helper.py").write_text("")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "their_helper.py").write_text(MARK)
        monkeypatch.chdir(tmp_path / "run")
        monkeypatch.setattr(sys, "path", ["", *sys.path])
        kinds.allow(["their_parts"])
        resolve("their_parts:Mine", LOSSES)
        assert not ran()

    def test_python_m_leaves_it(self, tmp_path, root):
        """Also for modules of other packages and of Python: a file yaml.py in a run directory is not read for them.

        But for those that Python itself needs to find a program (runpy, pkgutil, contextlib, ...): only -P helps there.
        """
        for name in ("yaml", "typer", "numpy", "pydantic", "difflib", "dataclasses", "json", "heapq"):
            (tmp_path / f"{name}.py").write_text(MARK)
        environment = os.environ | {"PYTHONPATH": str(root)}
        command = [sys.executable, "-m", "hmoe_rec", "show", "nothing.yaml"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert "nothing.yaml: no such file" in done.stderr, done.stderr
        assert not (tmp_path / "ran").exists()


class TestWhatADistributionOffers:
    def offer(self, folder: Path, lines: str, name: str = "theirs") -> None:
        (folder / f"{name}-1.0.dist-info").mkdir(parents=True)
        (folder / f"{name}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        (folder / f"{name}-1.0.dist-info" / "entry_points.txt").write_text(f"[{kinds.GROUP}]\n{lines}\n")

    @pytest.mark.parametrize("kind", ["fast_bce", "their_parts:Mine"])
    def test_needs_no_flag(self, installed, kind):
        (installed / "their_parts.py").write_text(LOSS)
        self.offer(installed, "fast_bce = their_parts:Mine")
        assert resolve(kind, LOSSES).__module__ == "their_parts"

    def test_is_that_class_and_no_other(self, installed, ran):
        (installed / "their_parts.py").write_text(MARK + LOSS + "class Other(Mine):\n    pass\n")
        self.offer(installed, "fast_bce = their_parts:Mine")
        with pytest.raises(ValueError, match="add --allow their_parts"):
            resolve("their_parts:Other", LOSSES)
        assert not ran()

    def test_does_not_replace_ours(self, installed):
        self.offer(installed, "bce = their_parts:Mine")
        assert resolve("bce", LOSSES).__module__ == "hmoe_rec.losses.pointwise"

    def test_by_two_under_one_name(self, installed):
        self.offer(installed, "fast_bce = their_parts:Mine")
        self.offer(installed, "fast_bce = their_others:Mine", name="others")
        with pytest.raises(ValueError, match="several installed distributions.*their_"):
            resolve("fast_bce", LOSSES)

    def test_does_not_count_where_it_lies_in_the_current_folder(self, tmp_path, monkeypatch, ran):
        (tmp_path / "their_helper.py").write_text(MARK + LOSS)
        self.offer(tmp_path, "fast_bce = their_helper:Mine")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", ["", *sys.path])
        for kind in ("fast_bce", "their_helper:Mine"):
            with pytest.raises(ValueError, match="unknown kind|--allow their_helper"):
                resolve(kind, LOSSES)
        assert not ran()


def test_python_allows_with_an_argument(installed, tmp_path):
    (installed / "their_parts.py").write_text(LOSS)
    make_log(tmp_path)
    content = run_file(tmp_path, losses={"click": "their_parts:Mine"})
    (tmp_path / "run.yaml").write_text(to_yaml(content))
    said = r"run.yaml: 1 problem\n.*train.losses.click.0.kind: kind 'their_parts:Mine'.*--allow their_parts"
    with pytest.raises(ConfigError, match=said):
        load_config(str(tmp_path / "run.yaml"))
    config = load_config(str(tmp_path / "run.yaml"), allow=["their_parts"])
    assert config.train.losses["click"][0]["kind"] == "their_parts:Mine"


def test_a_run_with_an_allowed_part_asks_again_wherever_it_is_opened(installed, tmp_path, monkeypatch, capsys):
    """Permission is the command's, and nothing that a run keeps."""
    (installed / "their_parts.py").write_text(LOSS)
    make_log(tmp_path, rows=2500)
    content = run_file(tmp_path, losses={"click": "their_parts:Mine"}, max_steps=2)
    (tmp_path / "run.yaml").write_text(to_yaml(content))
    run, config = str(tmp_path / "run"), str(tmp_path / "run.yaml")
    commands = {
        "train": ["train", config],
        "resume": ["train", config, "--resume", "train.max_steps=3"],
        "evaluate": ["evaluate", run],
        "predict": ["predict", run, "--data", str(tmp_path / "test.parquet"), "--out", str(tmp_path / "out.parquet")],
    }
    for name, command in commands.items():
        monkeypatch.setenv(kinds.VARIABLE, "")
        with pytest.raises(SystemExit, match="2"):
            cli.main(command)
        assert "add --allow their_parts to the command" in capsys.readouterr().err, name
        with pytest.raises(SystemExit, match="0|None"):
            cli.main([*command, "--allow", "their_parts"])
        assert "their_parts" in os.environ[kinds.VARIABLE]  # for the processes that it starts
    assert "their_parts" not in Path(run, "report.json").read_text()


@pytest.mark.slow
def test_processes_of_a_launcher_are_allowed_by_the_command_or_by_the_environment(installed, tmp_path, root):
    (installed / "their_parts.py").write_text(LOSS)
    make_log(tmp_path, rows=2500)
    (tmp_path / "run.yaml").write_text(to_yaml(run_file(tmp_path, losses={"click": "their_parts:Mine"}, max_steps=2)))
    search = os.pathsep.join([str(root), str(installed)])
    for more, variable in ((["--allow", "their_parts"], ""), ([], "their_parts")):
        environment = os.environ | {"PYTHONPATH": search, kinds.VARIABLE: variable}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hmoe_rec", "train"]
        command += [str(tmp_path / "run.yaml"), f"train.run_dir={tmp_path}/{len(more)}", *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
