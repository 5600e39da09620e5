"""A run's directory belongs to one run at a time."""

import pytest
from gloo import run_ranks
from small_run import make_log, run_file

from hmoe_rec import io, lock
from hmoe_rec.config import resolve_config
from hmoe_rec.lock import NAME, Lock, locked
from hmoe_rec.serving.predictor import predict_run
from hmoe_rec.sharding.process import process_group
from hmoe_rec.training import trainer, uncertainty
from hmoe_rec.training.checkpoint_tools import export, reshard
from hmoe_rec.training.run_dir import owned_run_dir
from hmoe_rec.training.trainer import train
from hmoe_rec.training.uncertainty import fit_uncertainty
from hmoe_rec.types import CheckpointError, ConfigError, LockError


@pytest.fixture(params=["", "memory://"])
def run(request, tmp_path) -> str:
    return f"{request.param}{tmp_path}/run"


def test_the_second_is_refused_and_leaves_the_first_alone(run):
    with process_group() as process, owned_run_dir(run, process, resumes=False) as mine:
        io.write_text(io.join(run, "config.yaml"), "mine")
        for resumes in (False, True):
            with pytest.raises(LockError, match="give another train.run_dir"):
                with owned_run_dir(run, process, resumes=resumes):
                    raise AssertionError("it is taken")
        mine.check()
        assert io.ls(run) == [NAME, "config.yaml"]
    assert io.ls(run) == ["config.yaml"]


def test_what_is_there_is_moved_aside_without_its_lock(tmp_path):
    run = f"{tmp_path}/run"
    for number in range(3):
        with process_group() as process, owned_run_dir(run, process, resumes=False) as mine:
            mine.check()
            io.write_text(f"{run}/config.yaml", str(number))
    assert io.ls(tmp_path) == ["run", "run.previous-1", "run.previous-2"]
    assert [io.ls(f"{tmp_path}/{name}") for name in io.ls(tmp_path)] == [["config.yaml"]] * 3


def test_a_run_in_a_store_is_not_moved_aside(tmp_path):
    run = f"memory://{tmp_path}/run"
    io.write_text(f"{run}/config.yaml", "old")
    with process_group() as process:
        with pytest.raises(ConfigError, match="a store cannot move it aside: go on with --resume, give another"):
            with owned_run_dir(run, process, resumes=False):
                raise AssertionError("it holds a run")
        assert io.ls(run) == ["config.yaml"]
        with owned_run_dir(run, process, resumes=True):
            pass


def refused_on_all(rank: int, world_size: int, run: str) -> str:
    with process_group() as process:
        with pytest.raises(LockError) as refused, owned_run_dir(run, process, resumes=True):
            raise AssertionError("it is taken")
    return str(refused.value)


def test_all_ranks_are_told(tmp_path):
    with locked(f"{tmp_path}/{NAME}", "it"):
        first, second = run_ranks(2, refused_on_all, str(tmp_path))
    assert first == second and "is being written by process" in first


def test_a_run_that_lost_its_lock_stops_before_it_commits_and_loses_nothing(tmp_path, monkeypatch):
    make_log(tmp_path)
    content = run_file(tmp_path, checkpoint_every=5, epochs=1)
    run, saves = content["train"]["run_dir"], []
    save = trainer.Trainer._save

    def robbed(self, tags):
        saves.append(self.step)
        if self.step == 10:
            monkeypatch.setattr(lock, "_place", lambda: {"host": "other", "boot": "", "space": ""})
            io.write_text(f"{run}/{NAME}", Lock("", "")._record())
        save(self, tags)

    monkeypatch.setattr(trainer.Trainer, "_save", robbed)
    with pytest.raises(LockError, match="taken over by process .* on other"):
        train(resolve_config(content))
    assert (
        saves == [5, 10]
        and io.ls(f"{run}/checkpoints") == ["step_000000005"]
        or io.ls(f"{run}/checkpoints")
        == [
            ".tmp_step_000000010",
            "step_000000005",
        ]
    )
    monkeypatch.undo()
    io.rm(f"{run}/{NAME}")
    content["train"]["resume"] = True
    assert train(resolve_config(content))["steps"] == 13


def test_two_publishers_do_not_mix(tmp_path):
    make_log(tmp_path)
    content = run_file(tmp_path, epochs=1, publish={"to": f"{tmp_path}/public", "every": 3})
    io.mkdirs(f"{tmp_path}/public")
    with locked(f"{tmp_path}/public/{NAME}", "it"):
        with pytest.raises(LockError, match=r"train.publish.to .*public is being written by .*publish to another"):
            train(resolve_config(content))
    assert io.ls(f"{tmp_path}/run") == ["config.yaml"]  # its own lock is given back
    content["train"]["resume"] = True
    train(resolve_config(content))
    assert NAME not in io.ls(f"{tmp_path}/public") and "latest.json" in io.ls(f"{tmp_path}/public")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("trained")
    make_log(folder)
    train(resolve_config(run_file(folder, epochs=1)))
    return str(folder)


@pytest.mark.parametrize("out", ["parts", "p.parquet"])
def test_two_predictions_into_one_place_do_not_mix(trained, tmp_path, out):
    io.mkdirs(f"{tmp_path}/parts")
    arguments = (f"{trained}/run", f"{trained}/test.parquet", f"{tmp_path}/{out}")
    with locked(f"{tmp_path}/parts/{NAME}" if out == "parts" else f"{tmp_path}/.{out}.lock", "it"):
        with pytest.raises(LockError, match=rf"--out .*{out} is being written by process .*give another name"):
            predict_run(*arguments)
    predict_run(*arguments)
    assert [n for n in io.ls(tmp_path) if "lock" in n] == [] and io.exists(arguments[2])


def test_nothing_is_resharded_into_a_run_that_goes_on(trained, tmp_path):
    """Its next save would remove what it has not begun."""
    run = f"{tmp_path}/run"
    io.write_text(f"{run}/config.yaml", "")
    with locked(f"{run}/{NAME}", "it"):
        with pytest.raises(LockError, match="run .* is being written by process"):
            reshard(f"{trained}/run", f"{run}/checkpoints")
    reshard(f"{trained}/run", f"{run}/checkpoints")
    assert io.ls(f"{run}/checkpoints") == ["best.json", "best_click.json", "best_like.json", "step_000000013"]
    assert io.ls(run) == ["checkpoints", "config.yaml"]


def test_two_exports_into_one_directory_do_not_mix(trained, tmp_path):
    with locked(f"{tmp_path}/.tables.lock", "it"), pytest.raises(LockError, match="tables is being written by"):
        export(f"{trained}/run", f"{tmp_path}/tables")
    export(f"{trained}/run", f"{tmp_path}/tables")
    assert io.ls(tmp_path) == ["tables"]


def test_an_estimate_is_not_saved_for_a_checkpoint_that_was_replaced_meanwhile(trained, tmp_path, monkeypatch):
    run, fit = f"{trained}/run", uncertainty._fit_sums

    def replaced(*arguments):
        (manifest,) = io.glob(f"{run}/checkpoints/step_*/manifest.json")
        io.rename(manifest, f"{manifest}.away")
        return fit(*arguments)

    monkeypatch.setattr(uncertainty, "_fit_sums", replaced)
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        fit_uncertainty(run, "laplace")
    assert not io.exists(f"{run}/uncertainty")
    (away,) = io.glob(f"{run}/checkpoints/step_*/manifest.json.away")
    io.rename(away, away.removesuffix(".away"))
