import errno
import os
import sys
from io import StringIO

import pytest

from hmoe_rec import io
from hmoe_rec.types import HmoeError


@pytest.fixture(params=["local", "file", "memory", "s3"])
def folder(request, tmp_path) -> str:
    name = f"{tmp_path}/one"
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket').uri}/one"
    return {"local": name, "file": f"file://{name}", "memory": f"memory://{name.strip('/')}"}[request.param]


def test_round_trip_of_all_operations(folder):
    assert not io.exists(folder)
    io.mkdirs(io.join(folder, "a", "b"))
    io.mkdirs(io.join(folder, "a", "b"))
    io.write_text(io.join(folder, "a", "b", "z"), "")
    assert io.isdir(io.join(folder, "a")) and not io.isfile(io.join(folder, "a"))
    with io.open(io.join(folder, "a", "x.txt"), "w") as file:
        file.write("größer")
    with io.open(io.join(folder, "a", "y.bin"), "wb") as file:
        file.write(b"\x00\xff")
    assert io.ls(io.join(folder, "a")) == ["b", "x.txt", "y.bin"]
    assert io.isfile(io.join(folder, "a", "x.txt")) and not io.isdir(io.join(folder, "a", "x.txt"))
    with io.open(io.join(folder, "a", "x.txt")) as file:
        assert file.read() == "größer"
    assert io.sizes(io.join(folder, "a")) == {"x.txt": 8, "y.bin": 2}
    with io.open(io.join(folder, "a", "y.bin"), "rb") as file:
        assert (file.seek(1), file.read(), file.seek(0), file.read(1)) == (1, b"\xff", 0, b"\x00")
    io.rm(io.join(folder, "a", "x.txt"))
    assert not io.exists(io.join(folder, "a", "x.txt"))
    io.rm(io.join(folder, "a"))
    assert not io.exists(io.join(folder, "a", "y.bin"))


def test_rename_replaces_a_local_file(tmp_path):
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    io.rename(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "new" and io.ls(tmp_path) == ["old"]


def test_text_is_written_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    io.mkdirs(folder)
    io.write_text(tmp_path / "made" / "on the way" / "x", "a")
    for text in ("a", "é"):
        io.write_text(io.join(folder, "x"), text)
        assert io.open(io.join(folder, "x")).read() == text and io.ls(folder) == ["x"]

    class FullDisk(StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "kept").write_text("old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(io, "_open_local", lambda path, *mode, **options: open(path, "w").close() or FullDisk())
        io.write_text(tmp_path / "kept", "new")
    assert (tmp_path / "kept").read_text() == "old" and not [
        n for n in os.listdir(tmp_path) if "kept" in n and n != "kept"
    ]


def test_glob_gives_what_can_be_opened(folder):
    for name in ("p/1.parquet", "p/q/2.parquet", "p/3.txt"):
        io.mkdirs(io.join(folder, name).rsplit("/", 1)[0])
        with io.open(io.join(folder, name), "w") as file:
            file.write(name)
    for pattern, names in [("p/*.parquet", ["p/1.parquet"]), ("p/**/*.parquet", ["p/1.parquet", "p/q/2.parquet"])]:
        found = io.glob(io.join(folder, pattern))
        assert [io.open(uri).read() for uri in found] == names
    assert io.glob(io.join(folder, "p/*.csv")) == []
    assert [io.open(uri).read() for uri in io.find(folder)] == ["p/1.parquet", "p/3.txt", "p/q/2.parquet"]


def test_find_follows_links_to_directories_and_visits_each_once(tmp_path):
    for name in ("log/day1/a", "elsewhere/b"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    links = {"day2": "../elsewhere", "latest": "day1", "day1/up": ".."}
    for name, target in links.items():
        (tmp_path / "log" / name).symlink_to(target)
    log = str(tmp_path / "log")
    assert io.find(log) == [f"{log}/day1/a", f"{log}/day2/b"]


def test_filesystem_is_what_arrow_takes(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    io.mkdirs(folder)
    files, path = io.filesystem(io.join(folder, "t.parquet"))
    pq.write_table(pa.table({"a": [1, 2]}), path, filesystem=files)
    assert pq.read_table(path, filesystem=files)["a"].to_pylist() == [1, 2]


def test_an_unknown_scheme_is_not_a_local_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for act in (io.open, io.exists, io.isfile, io.isdir, io.ls, io.glob, io.find, io.mkdirs, io.rm, io.filesystem):
        with pytest.raises(HmoeError, match="s4://bucket/x: unknown scheme 's4'"):
            act("s4://bucket/x")
    with pytest.raises(HmoeError, match="unknown scheme 'memoryy'; did you mean memory://"):
        io.exists("memoryy://x")
    assert io.ls(tmp_path) == []


def test_a_missing_package_is_named(monkeypatch):

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(HmoeError, match=r's3://bucket/x: .*pip install "hmoe-rec\[s3\]"'):
        io.exists("s3://bucket/x")


def test_missing_files_and_remote_paths_where_local_ones_are_due(tmp_path):
    for uri in (f"{tmp_path}/none", "memory://none/none"):
        with pytest.raises(FileNotFoundError):
            io.open(uri, "rb").close()
        with pytest.raises(FileNotFoundError):
            io.rm(uri)
    with pytest.raises(HmoeError, match="remote URI"):
        io.local_path("memory://a/b")
    for names in ((f"{tmp_path}/a", "memory://a"), ("memory://a/b", "memory://a/c")):
        with pytest.raises(HmoeError, match="nothing can be renamed"):
            io.rename(*names)


def test_schemes_can_be_added(monkeypatch):
    monkeypatch.setattr(io, "SCHEMES", dict(io.SCHEMES))
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Other(MemoryFileSystem):
        protocol = "other"
        store: dict = {}

    fsspec.register_implementation("other", Other, clobber=True)
    with pytest.raises(HmoeError):
        io.exists("other://a")
    io.register_scheme("other")
    with io.open("other://a/b", "w") as file:
        file.write("1")
    assert io.ls("other://a") == ["b"]
    io._manager.cache_clear()


def test_join():
    assert io.join("s3://a/b/", "c", "/d") == "s3://a/b/c/d"
    assert io.join("x/y", "z") == "x/y/z"


def test_importing_it_is_light():
    import subprocess

    code = "import sys, hmoe_rec.io; assert not {'fsspec', 'iopath', 'torch', 'pyarrow'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)
