"""A run's directory belongs to one run at a time."""

import pytest
from gloo import run_ranks
from small_run import make_log, run_file

from hmoe_rec import io, lock
from hmoe_rec.config import resolve_config
from hmoe_rec.lock import NAME, Lock, locked
from hmoe_rec.sharding.process import process_group
from hmoe_rec.training import trainer
from hmoe_rec.training.run_dir import owned_run_dir
from hmoe_rec.training.trainer import train
from hmoe_rec.types import ConfigError, LockError


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
