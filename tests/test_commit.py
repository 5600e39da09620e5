import pytest

from hmoe_rec import commit, io
from hmoe_rec.types import LockError

MARK = "manifest.json"


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket').uri}/of"
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path}"


def fill(directory: str, mark: bool = True) -> None:
    io.write_text(io.join(directory, "a"), "1")
    if mark:
        io.write_text(io.join(directory, MARK), "{}")


def test_a_directory_appears_whole_or_not_at_all(folder):
    target = io.join(folder, "one")
    with pytest.raises(KeyboardInterrupt), commit.committed(target, MARK) as unfinished:
        fill(unfinished, mark=False)
        assert not commit.is_taken(target, MARK) or io.is_local(target)
        raise KeyboardInterrupt
    assert not io.exists(target) and (io.ls(folder) if io.isdir(folder) else []) == []
    with commit.committed(target, MARK) as unfinished:
        fill(unfinished)
    assert io.ls(target) == ["a", MARK] and io.ls(folder) == ["one"]
    with pytest.raises(FileExistsError, match="one exists"), commit.committed(target, MARK):
        raise AssertionError("it is there")
    assert io.ls(target) == ["a", MARK]


def test_what_a_killed_process_left_is_recognized_and_nothing_else_is_removed(folder):
    target = io.join(folder, "step_1")
    fill(commit.begin(target), mark=False)
    fill(io.join(folder, "step_2"))
    io.write_text(io.join(folder, "notes.txt"), "")
    io.write_text(io.join(folder, "other", "x"), "")
    found = commit.leftovers(folder, io.ls(folder), MARK, lambda name: name.startswith("step_"))
    assert found == [".tmp_step_1" if io.is_local(folder) else "step_1"]
    with commit.committed(target, MARK) as unfinished:
        assert [name for name in io.ls(unfinished) if name != commit.BEGUN] == []
        fill(unfinished)
    assert io.ls(target) == ["a", MARK]


def test_two_that_write_one_directory_do_not_mix(folder):
    target = io.join(folder, "one")
    with commit.committed(target, MARK) as unfinished:
        fill(unfinished, mark=False)
        with pytest.raises(LockError, match="one is being written by process .*; wait for it or stop it"):
            with commit.committed(target, MARK):
                raise AssertionError("it is taken")
        io.write_text(io.join(unfinished, MARK), "{}")
    assert io.ls(target) == ["a", MARK]


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_committed(folder, monkeypatch):
    target, rm = io.join(folder, "one"), io.rm
    fill(target)

    def dies(uri):
        if str(uri) == target:
            raise KeyboardInterrupt
        rm(uri)

    monkeypatch.setattr(commit.io, "rm", dies)
    with pytest.raises(KeyboardInterrupt):
        commit.remove(target, MARK)
    assert not commit.is_committed(target, MARK)
    monkeypatch.undo()
    commit.remove(target, MARK)
    assert not io.exists(target)
