"""A checkpoint is whole or not there, is what was saved, runs no code, and fits any world size and any plan."""

import json
import logging
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo import RankError, run_ranks
from rewritten import change_metadata, describe_by, resign
from tiny_model import TinyModel, apply_table_optimizer, full, optimizer_of, train
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from hmoe_rec import io
from hmoe_rec.sharding.planner import make_plan
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.training import checkpoint_files
from hmoe_rec.training.checkpoint import CheckpointManager, read_checkpoint, read_unsharded
from hmoe_rec.training.checkpoint_state import flatten
from hmoe_rec.types import CheckpointError


def state_of(step: int) -> dict:
    return {
        "model": {"w": torch.full((5, 3), float(step)), "b": torch.arange(4.0)},
        "train": {"step": torch.tensor(step)},
    }


def blank() -> dict:
    return {"model": {"w": torch.zeros(5, 3), "b": torch.zeros(4)}, "train": {"step": torch.tensor(0)}}


def steps_of(uri: Path) -> list[str]:
    return sorted(name for name in os.listdir(uri) if name.startswith("step_"))


# One process, without a process group.


@pytest.mark.parametrize("scheme", ["", "file://", "memory://checkpoint_round_trip"])
def test_round_trip(tmp_path: Path, scheme: str) -> None:
    uri = f"{scheme}{tmp_path}"
    own = torch.arange(7)
    CheckpointManager(uri).save(3, state_of(3), per_rank={"rng": own}, meta={"epoch": 1, "metrics": {"auc": 0.5}})
    manager = CheckpointManager(uri)
    found = manager.latest()
    assert found is not None and (found.step, found.world_size) == (3, 1)
    assert found.meta == {"epoch": 1, "metrics": {"auc": 0.5}}
    loaded, rng = blank(), torch.zeros(7, dtype=torch.int64)
    assert manager.load_into(loaded, found, per_rank={"rng": rng})
    for key, tensor in flatten(state_of(3)).items():
        assert torch.equal(flatten(loaded)[key], tensor), key
    assert torch.equal(rng, own)
    part = {"model": blank()["model"]}
    assert not manager.load_into(part, found)
    assert torch.equal(part["model"]["w"], state_of(3)["model"]["w"])
    assert torch.equal(read_unsharded(found, ["model.b"])["model.b"], torch.arange(4.0))
    assert set(read_unsharded(found, prefix="model.")) == {"w", "b"}


def test_empty_directory_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointManager(str(tmp_path / "none")).latest() is None
    assert CheckpointManager(str(tmp_path / "none")).best() is None


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    manager = CheckpointManager(str(tmp_path), keep=2)
    for step in range(1, 7):
        manager.save(step, state_of(step), tags=["best"] if step == 2 else [])
    assert steps_of(tmp_path) == ["step_000000002", "step_000000005", "step_000000006"]
    assert manager.best().step == 2
    manager.save(7, state_of(7), tags=["best"])
    assert steps_of(tmp_path) == ["step_000000006", "step_000000007"]
    assert manager.best().step == 7
    assert manager.at_step(6).step == 6 and manager.at_step(5) is None


@pytest.mark.parametrize("scheme", ["", "memory://checkpoint_again"])
def test_a_step_saved_again_replaces_the_older_one(tmp_path: Path, scheme: str) -> None:
    manager = CheckpointManager(f"{scheme}{tmp_path}")
    manager.save(4, state_of(1), meta={"validated": False})
    manager.save(4, state_of(2), meta={"validated": True}, tags=["best"])
    found = manager.latest()
    assert found.meta == {"validated": True} and found == manager.best()
    assert read_unsharded(found, ["train.step"])["train.step"] == 2
    if not scheme:
        assert steps_of(tmp_path) == ["step_000000004.1"]


def test_an_older_step_is_refused(tmp_path: Path) -> None:
    manager = CheckpointManager(str(tmp_path))
    manager.save(9, state_of(9))
    with pytest.raises(CheckpointError, match="cannot save step 2, since step 9 is there"):
        manager.save(2, state_of(2))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": {"w": torch.ones(2), "name": "x"}}, "'model.name' is a str; only tensors"),
        ({"model": {"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}}, "'model.a.b' twice"),
        ({"per_rank": {"w": torch.ones(2)}}, "per_rank="),
    ],
)
def test_a_state_that_cannot_be_stored_is_refused(tmp_path: Path, state: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CheckpointManager(str(tmp_path)).save(1, state)


def test_meta_must_be_json_and_tags_plain_words(tmp_path: Path) -> None:
    manager = CheckpointManager(str(tmp_path))
    with pytest.raises(CheckpointError, match="meta is not JSON"):
        manager.save(1, state_of(1), meta={"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"tag '\.\./x'"):
        manager.save(1, state_of(1), tags=["../x"])


# Damage.


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    manager = CheckpointManager(str(tmp_path))
    found = manager.save(1, state_of(1))
    for file in sorted(Path(found.uri).iterdir()):
        if file.name == "manifest.json":
            continue
        content = file.read_bytes()
        for position in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            state = blank()
            with pytest.raises(CheckpointError, match=f"{file.name}: SHA-256 differs"):
                manager.load_into(state, found)
            assert torch.equal(state["model"]["w"], torch.zeros(5, 3))
            with pytest.raises(CheckpointError, match="SHA-256 differs"):
                read_unsharded(found)
        file.write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=f"{len(content) - 1} bytes, expected {len(content)}"):
            manager.load_into(blank(), found)
        file.write_bytes(content)
    manager.load_into(blank(), found)


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    manager = CheckpointManager(str(tmp_path))
    found = manager.save(1, state_of(1))
    (Path(found.uri) / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        manager.load_into(blank(), found)


@pytest.mark.parametrize("damage", ["edited", "truncated", "gone", "other"])
def test_a_damaged_manifest_is_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    manager = CheckpointManager(str(tmp_path))
    manager.save(1, state_of(1))
    newest = Path(manager.save(2, state_of(2), meta={"epoch": 17}).uri) / "manifest.json"
    text = newest.read_text()
    if damage == "gone":
        newest.unlink()
    else:
        edits = {
            "edited": text.replace("17", "18"),
            "truncated": text[:-9],
            "other": text.replace('"version": 1', '"version": 9'),
        }
        newest.write_text(edits[damage])
    with caplog.at_level(logging.WARNING):
        assert manager.latest().step == 1
    assert "passing over a checkpoint" in caplog.text and "step_000000002" in caplog.text


def test_a_half_written_directory_is_ignored_and_removed(tmp_path: Path) -> None:
    manager = CheckpointManager(str(tmp_path))
    manager.save(1, state_of(1))
    left = tmp_path / ".tmp_step_000000002"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    assert manager.latest().step == 1
    manager.save(2, state_of(2))
    assert manager.latest().step == 2
    assert not left.exists()


def test_a_half_written_remote_checkpoint_is_ignored_and_removed() -> None:
    import fsspec

    uri, files = "memory://half_written", fsspec.filesystem("memory")
    manager = CheckpointManager(uri)
    manager.save(1, state_of(1))
    manager.save(2, state_of(2))
    files.rm("/half_written/step_000000002/manifest.json")
    assert manager.latest().step == 1
    manager.save(3, state_of(3))
    assert not files.exists("/half_written/step_000000002")


# Another model.


def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(tmp_path: Path) -> None:
    manager = CheckpointManager(str(tmp_path))
    found = manager.save(1, {"model": {"tower.weight": torch.ones(5, 3), "bias": torch.ones(4)}})
    for state, message in [
        (
            {"model": {"towers.weight": torch.zeros(5, 3), "bias": torch.zeros(4)}},
            r"model.towers.weight \(it has model.tower.weight\)",
        ),
        ({"model": {"bias": torch.zeros(4)}}, "1 of its tensors are not in this model: model.tower.weight"),
        (
            {"model": {"tower.weight": torch.zeros(5, 2), "bias": torch.zeros(4)}},
            r"model.tower.weight: \[5, 3\] float32 there, \[5, 2\]",
        ),
        (
            {"model": {"tower.weight": torch.zeros(5, 3), "bias": torch.zeros(4).half()}},
            r"\[4\] float32 there, \[4\] float16 here",
        ),
    ]:
        with pytest.raises(CheckpointError, match="checkpoint of another model.*" + message):
            manager.load_into(state, found)
        assert all(not tensor.any() for tensor in flatten(state).values())


@pytest.mark.parametrize("place", ["interaction", "interaction.crosses"])
def test_a_cin_of_before_its_biases_says_how_it_is_read(tmp_path: Path, place: str) -> None:
    manager, name = CheckpointManager(str(tmp_path)), f"experts.0.{place}.biases.0"
    found = manager.save(1, {"model": {"w": torch.ones(3)}})
    with pytest.raises(CheckpointError, match=r"1 tensors are not in it.*CIN without biases.*bias: false beside"):
        manager.load_into({"model": {"w": torch.zeros(3), name: torch.zeros(2)}}, found)
    with pytest.raises(CheckpointError) as refused:
        manager.load_into({"model": {"w": torch.zeros(3), name: torch.zeros(2), "v": torch.zeros(2)}}, found)
    assert "CIN" not in str(refused.value)


def test_unknown_key_is_named(tmp_path: Path) -> None:
    found = CheckpointManager(str(tmp_path)).save(1, state_of(1))
    with pytest.raises(CheckpointError, match="no tensor 'model.ww'; nearest: model.w"):
        read_unsharded(found, ["model.ww"])


# Code in a checkpoint.


class Poison:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def test_poisoned_metadata_is_refused_without_running(tmp_path: Path) -> None:
    manager, marker = CheckpointManager(str(tmp_path / "run")), tmp_path / "executed"
    found = manager.save(1, state_of(1))
    describe_by(found.uri, pickle.dumps(Poison(str(marker))))
    found = manager.latest()
    for read in (lambda: manager.load_into(blank(), found), lambda: read_unsharded(found)):
        with pytest.raises(CheckpointError, match="asks for .*mkdir: refused"):
            read()
    assert not marker.exists()


def test_a_pickled_object_is_refused_without_running(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    manager = CheckpointManager(str(tmp_path / "run"))
    found = manager.save(1, state_of(1))
    shutil.rmtree(found.uri)
    dcp.save(
        {"model": {**state_of(1)["model"], "x": Poison(str(marker))}},
        storage_writer=FileSystemWriter(found.uri),
        no_dist=True,
    )
    checkpoint_files.write_manifest(found.uri, {"step": 1, "world_size": 1, "meta": {}, "files": {}})
    resign(found.uri)
    with pytest.raises(CheckpointError, match="'model.x' is a pickled object"):
        manager.load_into(blank(), manager.latest())
    assert not marker.exists()


def test_a_checkpoint_that_torch_described_is_read_as_ours(tmp_path: Path) -> None:
    """As our older ones are, with the pickle that torch.distributed.checkpoint writes."""
    manager = CheckpointManager(str(tmp_path / "run"))
    found, expected = manager.save(1, state_of(1)), flatten(state_of(1))
    shutil.rmtree(found.uri)
    dcp.save(dict(expected), storage_writer=FileSystemWriter(found.uri), no_dist=True)
    checkpoint_files.write_manifest(found.uri, {"step": 1, "world_size": 1, "meta": {}, "files": {}})
    resign(found.uri)
    assert sorted(manager.latest().files) == [".metadata", "__0_0.distcp"]
    state = blank()
    manager.load_into(state, manager.latest())
    read = read_unsharded(manager.latest())
    for key, tensor in flatten(state).items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0)
        torch.testing.assert_close(read[key], expected[key], rtol=0, atol=0)


def test_no_pickle_describes_the_tensors(tmp_path: Path) -> None:
    found = CheckpointManager(str(tmp_path)).save(1, state_of(1))
    assert sorted(found.files) == ["__0_0.distcp", "tensors.json"]
    assert json.loads((Path(found.uri) / "tensors.json").read_text())["schema"] == "hmoe_rec.tensors"


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "..", "", "a/b"])
def test_files_outside_of_the_directory_are_not_read(tmp_path: Path, name: str) -> None:
    """However they are named: by a manifest, by the description of the tensors, or by a tag."""
    manager = CheckpointManager(str(tmp_path / "run"))
    found = manager.save(1, state_of(1), tags=["best"])
    manifest = checkpoint_files.read_manifest(found.uri)
    checkpoint_files.write_manifest(found.uri, manifest | {"files": {name: {"size": 0, "sha256": ""}}})
    with pytest.raises(CheckpointError, match="files of this directory"):
        read_checkpoint(found.uri)
    checkpoint_files.write_manifest(found.uri, manifest)
    (tmp_path / "run" / "best.json").write_text(json.dumps({"directory": name}))
    with pytest.raises(CheckpointError, match="is no directory of this one"):
        manager.best()
    change_metadata(found.uri, lambda m: [setattr(p, "relative_path", name) for p in m.storage_data.values()])
    with pytest.raises(CheckpointError, match="names a file outside"):
        manager.load_into(blank(), read_checkpoint(found.uri))


def test_garbage_metadata_is_an_error_of_ours(tmp_path: Path) -> None:
    manager = CheckpointManager(str(tmp_path))
    found = manager.save(1, state_of(1))
    describe_by(found.uri, b"not a pickle")
    with pytest.raises(CheckpointError, match="unreadable"):
        manager.load_into(blank(), manager.latest())


def test_an_unwritable_directory_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file"):
        CheckpointManager(str(tmp_path / "file" / "run")).save(1, state_of(1))


# Several processes.


def sharded(rank: int, world_size: int, kind: str, seed: int = 1, optimizer: type | None = None):
    model = TinyModel()
    apply_table_optimizer(model, *([optimizer] if optimizer else []))
    plan = make_plan(model, kind=kind, world_size=world_size, local_world_size=world_size, device_type="cpu")
    model = shard_model(model, plan=plan, device=torch.device("cpu"), seed=seed)
    return model, optimizer_of(model)


def whole_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of model and optimizer, whole, on every rank; collective."""
    flat = flatten({"model": model.state_dict(), "optim": optimizer.state_dict()})
    names: list = [None] * dist.get_world_size()
    dist.all_gather_object(names, {key: (type(t).__name__, tuple(t.size())) for key, t in flat.items()})
    merged = {key: form for part in names for key, form in part.items()}
    result = {}
    for key in sorted(merged):
        holders = [rank for rank, part in enumerate(names) if key in part]
        shared: list = [None] * dist.get_world_size()
        if merged[key][0] == "ShardedTensor":
            local = (
                [(s.metadata.shard_offsets, s.tensor.clone()) for s in flat[key].local_shards()] if key in flat else []
            )
            dist.all_gather_object(shared, local)
            tensor = torch.full(merged[key][1], float("nan"))
            for offsets, values in (piece for part in shared for piece in part):
                tensor[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values
        else:
            dist.all_gather_object(shared, flat.get(key))
            assert all(torch.equal(shared[rank], shared[holders[0]]) for rank in holders), key
            tensor = shared[holders[0]]
        result[key] = tensor
    return result


def train_and_save(rank: int, world_size: int, uri: str, kind: str, optimizer: type | None = None) -> dict:
    model, both = sharded(rank, world_size, kind, optimizer=optimizer)
    train(model, both, range(3), rank, world_size)
    manager = CheckpointManager(uri)
    generator = torch.Generator().manual_seed(100 + rank)
    manager.save(
        3,
        {"model": model.state_dict(), "optim": both.state_dict()},
        per_rank={"rng": generator.get_state()},
        meta={"kind": kind},
    )
    return whole_state(model, both)


def load_and_train(rank: int, world_size: int, uri: str, kind: str, optimizer: type | None = None) -> tuple:
    model, both = sharded(rank, world_size, kind, seed=99, optimizer=optimizer)
    manager = CheckpointManager(uri)
    state = {"model": model.state_dict(), "optim": both.state_dict()}
    own = {"rng": torch.zeros_like(torch.Generator().get_state())}
    restored = manager.load_into(state, manager.latest(), per_rank=own)
    model.load_state_dict(dict(state["model"]))
    both.load_state_dict(state["optim"])
    if restored:
        assert torch.equal(own["rng"], torch.Generator().manual_seed(100 + rank).get_state())
    loaded = whole_state(model, both)
    losses = train(model, both, range(3, 6), rank, world_size)
    shares = [None] * world_size
    dist.all_gather_object(shares, losses)
    return restored, loaded, [sum(step) / world_size for step in zip(*shares, strict=True)], whole_state(model, both)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_another_plan_loads_the_same_bits(tmp_path: Path) -> None:
    check_reshard(str(tmp_path), (2, "table_wise"), (2, "row_wise"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((1, "table_wise"), (2, "row_wise")),
        ((2, "table_wise"), (4, "table_wise")),
        ((4, "row_wise"), (1, "auto")),
        ((4, "row_wise"), (2, "row_wise")),
    ],
)
def test_another_world_size_goes_on_from_what_was_saved(tmp_path: Path, saved: tuple, loaded: tuple) -> None:
    """All world sizes and kinds into all others are in test_checkpoint_tools.py; here training goes on as well."""
    check_reshard(str(tmp_path), saved, loaded)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded"), [((2, "column_wise"), (1, "row_wise")), ((2, "row_wise"), (4, "column_wise"))]
)
def test_elementwise_adagrad_reshards_columns_too(tmp_path: Path, saved: tuple, loaded: tuple) -> None:
    check_reshard(str(tmp_path), saved, loaded, torch.optim.Adagrad)


def check_reshard(uri: str, saved: tuple, loaded: tuple, optimizer: type | None = None) -> None:
    before = run_ranks(saved[0], train_and_save, uri, saved[1], optimizer)[0]
    restored, after, losses, _ = run_ranks(loaded[0], load_and_train, uri, loaded[1], optimizer)[0]
    assert restored == (saved[0] == loaded[0])
    assert_equal(before, after)
    losses_before = run_ranks(1, uninterrupted, "table_wise", optimizer)[0][0]
    assert losses == pytest.approx(losses_before[3:], abs=1e-5)


def uninterrupted(rank: int, world_size: int, kind: str, optimizer: type | None = None) -> tuple:
    model, both = sharded(rank, world_size, kind, optimizer=optimizer)
    losses = train(model, both, range(6), rank, world_size)
    return losses, whole_state(model, both)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_training_is_bit_equal(tmp_path: Path, world_size: int) -> None:
    losses, end = run_ranks(world_size, uninterrupted, "table_wise")[0]
    run_ranks(world_size, train_and_save, str(tmp_path), "table_wise")
    _, _, resumed, resumed_end = run_ranks(world_size, load_and_train, str(tmp_path), "table_wise")[0]
    assert_equal(end, resumed_end)
    if world_size == 1:
        assert losses[3:] == resumed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((2, "column_wise"), (1, "table_wise")),
        ((2, "table_wise"), (2, "column_wise")),
        ((2, "column_wise"), (4, "column_wise")),
    ],
)
def test_row_statistics_follow_the_column_blocks(tmp_path: Path, saved: tuple, loaded: tuple) -> None:
    uri = str(tmp_path)
    before = run_ranks(saved[0], train_and_save, uri, saved[1])[0]
    _, after, losses, _ = run_ranks(loaded[0], load_and_train, uri, loaded[1])[0]
    for key, value in before.items():
        if key.endswith("momentum1") and after[key].shape != value.shape:
            rows = before[key.split(".weight.")[0].replace("optim.state.tables", "model") + ".weight"].shape[0]
            whole = value.view(-1, rows).double().mean(0)
            assert torch.allclose(after[key].view(-1, rows).double(), whole.expand(after[key].numel() // rows, -1)), key
        else:
            assert torch.equal(after[key], value), key
    assert all(torch.isfinite(torch.tensor(losses)))


def load_other_model(rank: int, world_size: int, uri: str) -> str:
    bags = {"s__a": (40, 8), "s__bb": (3, 8), "t__a": (17, 16)}
    model = TinyModel(bags=bags)
    apply_table_optimizer(model)
    plan = make_plan(model, kind="table_wise", world_size=world_size, local_world_size=world_size, device_type="cpu")
    model = shard_model(model, plan=plan, device=torch.device("cpu"))
    before = {key: full(tensor) for key, tensor in model.state_dict().items()}
    manager = CheckpointManager(uri)
    with pytest.raises(CheckpointError) as error:
        manager.load_into({"model": model.state_dict(), "optim": optimizer_of(model).state_dict()}, manager.latest())
    assert all(torch.equal(full(tensor), before[key]) for key, tensor in model.state_dict().items())
    return str(error.value)


def test_every_rank_refuses_another_model(tmp_path: Path) -> None:
    run_ranks(2, train_and_save, str(tmp_path), "table_wise")
    messages = run_ranks(2, load_other_model, str(tmp_path))
    assert messages[0] == messages[1]
    assert "model.ebc.embedding_bags.s__bb.weight (it has model.ebc.embedding_bags.s__b.weight)" in messages[0]


def load_damaged(rank: int, world_size: int, uri: str) -> str:
    manager = CheckpointManager(uri)
    with pytest.raises(CheckpointError) as error:
        manager.load_into({}, manager.latest())
    return str(error.value)


def test_damage_in_one_rank_s_share_is_raised_by_all(tmp_path: Path) -> None:
    run_ranks(2, train_and_save, str(tmp_path), "row_wise")
    file = tmp_path / "step_000000003" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0x10
    file.write_bytes(content)
    messages = run_ranks(2, load_damaged, str(tmp_path))
    assert messages[0] == messages[1] and "__1_0.distcp: SHA-256 differs" in messages[0]


def save_with_a_bad_rank(rank: int, world_size: int, uri: str) -> str:
    with pytest.raises(CheckpointError) as error:
        CheckpointManager(uri, process_group=None).save(1, {"x": torch.ones(2) if rank == 0 else "text"})
    return str(error.value)


def test_one_rank_s_bad_state_is_raised_by_all(tmp_path: Path) -> None:
    messages = run_ranks(2, save_with_a_bad_rank, str(tmp_path))
    assert messages[0] == messages[1] and "'x' is a str" in messages[0]


# kill -9.


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function, last: int = 0):
    """`function`, which kills the process instead of being called for the time number `last`."""
    calls = iter(range(last))

    def wrapped(*args):
        return function(*args) if next(calls, None) is not None else die()

    return wrapped


def half_written(stream, data) -> int:
    stream._stream.write(memoryview(data)[:700])
    stream._stream.flush()
    die()
    return 0


CHECKPOINT = "hmoe_rec.training.checkpoint"
MOMENTS = {
    "writing": lambda patch: patch.setattr(checkpoint_files._HashingStream, "write", half_written),
    "before the manifest": lambda patch: patch.setattr(f"{CHECKPOINT}.write_manifest", dying(None)),
    "in the manifest": lambda patch: patch.setattr("hmoe_rec.io.rename", dying(None)),
    "before the rename": lambda patch: patch.setattr("hmoe_rec.io.rename", dying(io.rename, 1)),
    "before the tag": lambda patch: patch.setattr(f"{CHECKPOINT}.write_json", dying(None)),
    "before pruning": lambda patch: patch.setattr("hmoe_rec.io.rm", dying(None)),
    "in pruning": lambda patch: patch.setattr("hmoe_rec.io.rm", dying(io.rm, 1)),
}


def save_and_die(rank: int, world_size: int, uri: str, moment: str, victim: int) -> None:
    manager = CheckpointManager(uri)
    state = {"model": {"w": torch.full((1000, 30), float(rank))}}
    manager.save(1, state, tags=["best"])
    if rank == victim:
        MOMENTS[moment](pytest.MonkeyPatch())
        manager.keep = 1
    manager.save(2, state, per_rank={"r": torch.arange(900.0)}, tags=["best"])


@pytest.mark.parametrize(
    ("moment", "survivor", "best"),
    [
        ("writing", 1, 1),
        ("before the manifest", 1, 1),
        ("in the manifest", 1, 1),
        ("before the rename", 1, 1),
        ("before the tag", 2, 1),
        ("before pruning", 2, 2),
        ("in pruning", 2, 2),
    ],
)
def test_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, moment: str, survivor: int, best: int
) -> None:
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(1, save_and_die, str(tmp_path), moment, 0)
    manager = CheckpointManager(str(tmp_path))
    assert (manager.latest().step, manager.best().step) == (survivor, best)
    state = {"model": {"w": torch.ones(1000, 30)}}
    manager.load_into(state, manager.latest())
    assert not state["model"]["w"].any()
    manager.save(3, state)
    assert manager.latest().step == 3
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]


def test_kill_of_another_rank_in_a_save_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RankError):
        run_ranks(2, save_and_die, str(tmp_path), "writing", 1)
    assert CheckpointManager(str(tmp_path)).latest().step == 1
