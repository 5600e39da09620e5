"""What a store answers, as the user reads it; files that appear whole or not at all. Against a real S3 server."""

import logging

import pytest

from hmoe_rec import io, object_store
from hmoe_rec.object_store import StorageError


@pytest.fixture
def impatient(monkeypatch):
    """The clients below ours try once, and ours does not wait."""
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(object_store, "WAITS", (0.0, 0.0))


@pytest.mark.parametrize(
    ("method", "act", "operation", "action"),
    [
        ("PUT", lambda uri: io.write_text(f"{uri}/x", "1"), "PutObject", "s3:PutObject"),
        ("GET", lambda uri: io.ls(f"{uri}/a"), "ListObjectsV2", "s3:ListBucket"),
        ("HEAD", lambda uri: io.exists(f"{uri}/a"), "HeadObject", "s3:GetObject"),
        ("POST", lambda uri: io.rm(f"{uri}/a"), "DeleteObjects", "s3:DeleteObject"),
        ("GET", lambda uri: io.open(f"{uri}/a/b", "rb").read(), "GetObject", "s3:GetObject"),
    ],
)
def test_a_refusal_says_bucket_and_action_and_what_to_check(bucket, impatient, method, act, operation, action):
    io.write_text(f"{bucket.uri}/a/b", "1")
    bucket.spoil(method, "", 403, times=9)
    with pytest.raises(StorageError) as refused:
        act(bucket.uri)
    name = bucket.uri.removeprefix("s3://")
    for part in (f"bucket '{name}' refused {operation} (403", f"{action} on", "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL"):
        assert part in str(refused.value)


def test_a_refused_deletion_in_an_answer_of_success_is_seen(bucket, monkeypatch):
    """A bulk deletion is answered 200 with the keys that it has not deleted, which s3fs passes over."""
    import s3fs

    async def nothing(self, paths, **options):
        return []

    io.write_text(f"{bucket.uri}/a/b", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "_bulk_delete", nothing)
    with pytest.raises(StorageError, match="cannot be removed; check that the credentials may delete"):
        io.rm(f"{bucket.uri}/a")


@pytest.mark.parametrize("act", [io.mkdirs, io.isdir, io.exists, lambda uri: io.write_text(f"{uri}/x", "1")])
def test_a_missing_bucket_is_told_and_not_made(bucket, act):
    with pytest.raises(StorageError, match="there is no bucket 'no-such-one' .*make it first"):
        act("s3://no-such-one/a")
    with pytest.raises(StorageError, match="no bucket"):  # and still is not there
        io.mkdirs("s3://no-such-one/a")


def test_missing_credentials_and_stores_that_do_not_answer_are_told(bucket, impatient, monkeypatch, tmp_path):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="cannot be reached .*AWS_ENDPOINT_URL.*given up after 3 tries"):
        io.exists(f"{bucket.uri}/a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        io.exists(f"{bucket.uri}/a")


@pytest.mark.parametrize("status", [500, 503])
def test_what_passes_is_tried_again_and_told_and_ends(bucket, impatient, caplog, status):
    bucket.spoil("PUT", "x", status, times=2)
    with caplog.at_level(logging.WARNING, object_store.__name__):
        io.write_text(f"{bucket.uri}/x", "1")
    assert len(caplog.messages) == 2 and all(f"answered PutObject with {status}" in m for m in caplog.messages)
    assert io.open(f"{bucket.uri}/x").read() == "1"
    bucket.spoil("PUT", "x", status, times=1e9)
    before = len(bucket.requests)
    with pytest.raises(StorageError, match=f"{status} .*given up after 3 tries"):
        io.write_text(f"{bucket.uri}/x", "2")
    assert len(bucket.requests) - before == 3
    bucket.heal()
    assert io.open(f"{bucket.uri}/x").read() == "1"


def test_a_slow_answer_is_told(bucket, monkeypatch, caplog):
    monkeypatch.setattr(object_store, "SLOW_SECONDS", 0.05)
    bucket.spoil("PUT", "x", "slow", seconds=0.5)
    with caplog.at_level(logging.WARNING, object_store.__name__):
        io.write_text(f"{bucket.uri}/x", "1")
    assert caplog.messages == [f"{bucket.uri}/x: still waiting after 0.05 s"]


def test_an_answer_that_is_cut_is_read_again(bucket):
    io.write_bytes(f"{bucket.uri}/x", bytes(range(250)) * 40)
    bucket.spoil("GET", "x", "cut", times=2)
    assert io.open(f"{bucket.uri}/x", "rb").read() == bytes(range(250)) * 40
    assert bucket.requests.count(("GET", f"/{bucket.uri.removeprefix('s3://')}/x?")) >= 3


@pytest.fixture(params=["memory", "s3"])
def folder(request) -> str:
    return f"{request.getfixturevalue('bucket').uri}/one" if request.param == "s3" else "memory://whole_files"


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_file_whose_writer_fails_does_not_appear(folder, mode):
    for act in (io.open, io.replacing):
        with pytest.raises(KeyboardInterrupt), act(f"{folder}/new", mode) as file:
            file.write("half" if mode == "w" else b"half")
            raise KeyboardInterrupt
        assert not io.exists(f"{folder}/new")


def test_a_large_file_whose_writer_fails_leaves_no_parts_and_the_old_one(bucket, monkeypatch):
    import boto3
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "default_block_size", 5 << 20)
    io.write_text(f"{bucket.uri}/x", "old")
    with pytest.raises(KeyboardInterrupt), io.open(f"{bucket.uri}/x", "wb") as file:
        for _ in range(3):
            file.write(bytes(5 << 20))
        raise KeyboardInterrupt
    assert io.open(f"{bucket.uri}/x").read() == "old"
    name = bucket.uri.removeprefix("s3://")
    assert any(method == "POST" and "uploads" in path for method, path in bucket.requests)
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket=name)


def test_a_file_that_is_forgotten_does_not_appear(bucket):
    file = io.open(f"{bucket.uri}/x", "wb")
    file.write(b"half")
    del file
    assert not io.exists(f"{bucket.uri}/x")


def test_what_others_write_is_seen(bucket):
    import boto3

    io.write_text(f"{bucket.uri}/a/1", "")
    assert io.ls(f"{bucket.uri}/a") == ["1"] and not io.exists(f"{bucket.uri}/a/2")
    boto3.client("s3").put_object(Bucket=bucket.uri.removeprefix("s3://"), Key="a/2", Body=b"")
    assert io.ls(f"{bucket.uri}/a") == ["1", "2"] and io.exists(f"{bucket.uri}/a/2")
    assert [uri.rpartition("/")[2] for uri in io.find(f"{bucket.uri}/a")] == ["1", "2"]


def test_only_one_creates_a_file(folder, tmp_path):
    for place in (folder, str(tmp_path)):
        assert io.create_text(f"{place}/x", "mine") and not io.create_text(f"{place}/x", "yours")
        assert io.open(f"{place}/x").read() == "mine"


def test_a_store_without_conditions_is_asked_before(bucket, impatient):
    for text in ("mine", "yours"):  # the first answer is to the condition
        bucket.spoil("PUT", "x", 500)
        assert io.create_text(f"{bucket.uri}/x", text) == (text == "mine")
        bucket.heal()
    assert io.open(f"{bucket.uri}/x").read() == "mine"
