"""Every command and example of the README runs: long trainings with a few steps, and nothing is sent to a cluster."""

import multiprocessing
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from gloo import PRELOAD, run_ranks

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SMALL = ["data.synthetic.rows=6000", "data.synthetic.validation_rows=2000", "data.synthetic.test_rows=2000"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    """One per command line, continuation lines joined, comments removed."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def small(arguments: list[str]) -> list[str]:
    """The same command on little data and for few steps; of the tests only the collection."""
    if arguments[0] == "test":
        return [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_imports.py", *arguments[1:]]
    if "experiments.py" in " ".join(arguments) and len(arguments) > 2:
        only = {"sequences": "tim", "alone": "tim", "numbers": "mnse", "simenc": "none"}[arguments[2].split("-")[-1]]
        log = SMALL if arguments[2].startswith("synthetic") else []
        return [sys.executable, *arguments[1:], "--seeds", "1", "--only", only, *log, "train.max_steps=2"]
    for script, options in STUDIES.items():
        if script in " ".join(arguments):
            return [sys.executable, *arguments[1:], *shlex.split(options)]
    if arguments[0] == "bench" or "make_plans.py" in " ".join(arguments):
        words = ["configs/quickstart.yaml" if word == "configs/benchmark.yaml" else word for word in arguments]
        if "calibrate" in words:
            return [sys.executable, "-m", "hmoe_rec", *words, "--repeats", "1"]
        program = [sys.executable, "-m", "hmoe_rec"] if words[0] == "bench" else [sys.executable]
        few = ["--rounds", "1", "--steps", "1", "--warmup", "1"] if words[0] == "bench" else []
        words = ["table_wise,auto,runs/plans/skewed.json" if "table_wise" in word else word for word in words]
        return [*program, *words[words[0] == "python" :], *few, "model.encoding.numbers=scalar"]
    if "convert_movielens.py" in " ".join(arguments) and "--help" not in arguments:
        return [sys.executable, *arguments[1:-1], "2"]
    if arguments[:2] == ["analyze", "fields"]:
        return [sys.executable, "-m", "hmoe_rec", *arguments, "--rows", "3000"]
    if arguments[0] in ("python", "torchx", "torchrun"):
        program = [sys.executable] if arguments[0] == "python" else [sys.executable, "-m", MODULES[arguments[0]]]
        return [*program, *arguments[1:]]
    extra: list[str] = SMALL if arguments[:2] == ["data", "fit"] else []
    if arguments[0] == "train":
        extra = [*SMALL, "train.max_steps=3"] if "quickstart" in arguments[1] else ["train.max_steps=3"]
    return [sys.executable, "-m", "hmoe_rec", *arguments, *extra]


STUDIES = {
    "compare.py": "--seeds 1 train.max_steps=2",
    "toy_collapse.py": "--seeds 1 --steps 20",
    "unseen_numbers.py": "--seeds 1 --steps 20",
    "widths.py": "--seeds 1 --models DNN --widths 1 train.max_steps=2",
    "ranking_gradients.py": "--seeds 1",
    "sparse_positives.py configs/kuairand.yaml": "--rates 0.033 --losses bce --seeds 1 train.max_steps=2",
    "sparse_positives.py": "--rates 0.033 --losses bce,pair --seeds 1 train.max_steps=2",
    "hashing.py synthetic": "--rows 4000 --ratios 0.25 --seeds 2",
    "hashing.py stream": "--rows 4000 --seeds 2",
    "regret.py": "--seeds 1,2 --policies 'greedy,UCB 1' --rounds 3 --requests 20",
    "uncertainty.py": "--rows 2000 --test-rows 600 --seeds 1 --kinds rows train.max_steps=2",
    "techniques.py": "--only bce,pair --rounds 1",
    "parts.py": "--rounds 1 --batch 64",
    "throughput.py": "--rows 120000 --models mmoe --precisions fp32 --rounds 1 --steps 15",
    "planted.py correlation": "--seeds 1 --rows 3000 --truth-rows 5000",
    "planted.py interests": "--seeds 1 --rows 3000 --conflicts 0.5",
    "large_spectrum.py": "--rows 100000",
    "genre_lags.py": "--split test --lags 5 --draws 0",
    "abundance.py": "--widths 1 --seeds 1 train.max_steps=2",
    "online.py": "--seeds 1 --last-hours 2 --set train.max_steps=2",
    "online_kills.py": "--moments 1 --num-hours 3 --processes 1 --at-most-seconds 0.1",
    "presets.py": "--seeds 1 --presets mmoe --only gates train.max_steps=2",
}
MODULES = {"torchx": "torchx.apps.utils", "torchrun": "torch.distributed.run"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder with the repository's files, in which the commands run in the order of the README."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "tools", "launch", "tests", "hmoe_rec", "pyproject.toml", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    return folder


REAL = ("kuairand", "census", "criteo", "movielens")


def needs_real_logs(command: str) -> bool:
    return any(name in command for name in REAL) and "--help" not in command


def run_all(chosen: list[str], clone: Path) -> None:
    """Each in a process of its own, forked from one that has the libraries: a start takes no seconds then."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "120",
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    for command in chosen:
        words = small(command.split()[1:])
        output = clone / "output.txt"
        process = context.Process(target=run_program, args=(words[1:], str(clone), environment, str(output)))
        process.start()
        process.join(240)
        if process.is_alive():
            process.kill()
        if "tools/convert_" in command and "--help" not in command:
            thin(clone / command.split()[4])
        assert process.exitcode == 0, f"{command}\n{output.read_text()[-3000:]}"


def thin(folder: Path) -> None:
    """Leaves some rows of each split, evenly spaced: the order of time stays."""
    for split, rows in (("train", 16000), ("validation", 2000), ("test", 2000)):
        for file in folder.glob(f"{split}*.parquet"):
            table = pq.read_table(file)
            pq.write_table(table.take(list(range(0, len(table), -(-len(table) // rows)))), file, row_group_size=1000)


def run_program(words: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """What `python WORDS` does: `-m module ...` or `script ...`."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.update(environment)
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, folder)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(folder, words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def ours() -> list[str]:
    """torchx commands run in tests/launch."""
    return [c for c in commands() if c.startswith("./tools/run ") and c.split()[1] != "torchx"]


@pytest.mark.slow
def test_commands_run_in_order(clone):
    chosen = [c for c in ours() if not needs_real_logs(c)]
    assert len(chosen) >= 15
    run_all(chosen, clone)


def test_every_command_is_one_that_is_tested():
    known = ("./tools/run", ".ci/run")
    assert [c for c in commands() if not c.startswith(known)] == []


def plain_example() -> dict:
    names: dict = {}
    exec(blocks("python")[0], names)
    return names


def test_example_in_a_plain_loop_learns():
    names = plain_example()
    loss = names["bce"](names["logits"], names["labels"], names["torch"].ones(64))
    assert loss.sum() < 2 * 0.6931  # better than guessing
    assert len(blocks("python")[0].strip().splitlines()) < 30


def test_parts_work_by_themselves():
    names: dict = {}
    exec(blocks("python")[1], names)
    assert names["hidden"].shape == (64, 32)
    empty = names["mask"].sum(1) == 0
    assert (names["interest"][empty] == 0).all() and names["interest"][~empty].any(1).all()


def test_the_encoding_shown_is_one_that_resolves(tmp_path):
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    from hmoe_rec.config import resolve_config

    vectors = pa.FixedSizeListArray.from_arrays(np.ones(8, "f4"), 4)
    pq.write_table(pa.table({"item_id": [1, 2], "vector": vectors}), tmp_path / "item_vectors.parquet")
    (shown,) = (yaml.safe_load(block) for block in blocks("yaml") if "encoding:" in block)
    shown["model"]["encoding"]["frozen_vectors"]["graph"]["path"] = str(tmp_path / "item_vectors.parquet")
    columns = {"viewed": "item_id"}
    schema = {
        "ids": [{"name": "item_id", "num_embeddings": 9}],
        "sequences": [{"name": "views", "columns": columns}, {"name": "likes", "columns": {"liked": "item_id"}}],
        "numbers": [{"name": "price"}, {"name": "age"}],
        "tasks": [{"name": "click"}],
    }
    resolve_config({"data": {"train": "x.parquet", "schema": schema}, "model": {"preset": "single"} | shown["model"]})


def sharded_example(rank: int, world_size: int) -> float:
    names = plain_example()
    exec(blocks("python")[2], names)
    before = names["bce"](names["logits"], names["labels"], names["torch"].ones(64)).sum()
    after = names["bce"](
        names["sharded"](names["Batch"].of(names["ids"], names["labels"])), names["labels"], names["torch"].ones(64)
    )
    return float(before - after.sum())


def test_example_with_bare_torchrec_learns_on_two_processes():
    assert all(gain > 0 for gain in run_ranks(2, sharded_example))


def test_named_files_exist():
    for path in re.findall(r"`((?:configs|tools|launch|tests|hmoe_rec)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"configs/\w+\.yaml", README):
        assert (ROOT / name).exists(), name
