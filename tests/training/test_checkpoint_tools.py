"""What one plan saved, any other loads to the bit; and the tools that look at, cut and export what is on disk."""

import importlib.util
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gloo import run_ranks
from hand_plans import ALL_KINDS, BAGS, ROWS, TABLES, hand_plan, one_kind, shards_of
from rewritten import change_metadata
from tiny_model import TinyModel, apply_table_optimizer, batch_of, optimizer_of
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from hmoe_rec.sharding.plan_file import SCHEMA, VERSION, save_plan
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.training import checkpoint_reshard, row_statistics
from hmoe_rec.training.checkpoint import CheckpointManager, read_checkpoint, read_unsharded
from hmoe_rec.training.checkpoint_metadata import PICKLED, TENSORS
from hmoe_rec.training.checkpoint_rows import StoredTensors
from hmoe_rec.training.checkpoint_state import flatten
from hmoe_rec.training.checkpoint_tools import export, inspect, open_checkpoint, reshard
from hmoe_rec.types import CheckpointError, PlanError

CPU = torch.device("cpu")
OPTIMIZERS = {"rowwise": RowWiseAdagrad, "adagrad": torch.optim.Adagrad}
CUTS = ("table_wise", "row_wise", "column_wise", "data_parallel")
KINDS = {**{kind: one_kind(kind) for kind in CUTS}, "all": ALL_KINDS}
BAD_BYTE = 0x10


def local_of(world_size: int) -> int:
    """Processes per machine, so that kinds that go by machine cut something."""
    return max(1, world_size // 2)


def sharded(world_size: int, kind: str, optimizer: str, seed: int = 1) -> tuple[Any, Any]:
    model = TinyModel(bags=BAGS, rows=ROWS)
    apply_table_optimizer(model, OPTIMIZERS[optimizer])
    plan = hand_plan(model, KINDS[kind], world_size, local_of(world_size))
    model = shard_model(model, plan=plan, device=CPU, seed=seed)
    return model, optimizer_of(model)


def train(model: Any, both: Any, rank: int, world_size: int) -> None:
    for step in range(2):
        ids, labels = batch_of(step, rank, world_size, tables=TABLES)
        both.zero_grad()
        F.binary_cross_entropy_with_logits(model(ids), labels).backward()
        both.step()


def state_of(model: Any, both: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optim": both.state_dict()}


def local_pieces(tensor: Tensor) -> list[tuple[Tensor, tuple[slice, ...]]]:
    """(values that this process holds, where they are in the whole)."""
    if not isinstance(tensor, ShardedTensor):
        return [(tensor, (slice(None),) * tensor.dim())]
    return [
        (
            s.tensor,
            tuple(slice(o, o + n) for o, n in zip(s.metadata.shard_offsets, s.metadata.shard_sizes, strict=True)),
        )
        for s in tensor.local_shards()
    ]


def differing(state: dict[str, Any], whole: dict[str, Tensor]) -> list[str]:
    """Names of this process's tensors that are not those of the whole state, to the bit."""
    return [
        key
        for key, tensor in flatten(state).items()
        for values, where in local_pieces(tensor)
        if not torch.equal(values.view(-1), whole[key][where].reshape(-1))
    ]


def save_all(rank: int, world_size: int, folder: str, kinds: list[str], optimizers: list[str]) -> list[str]:
    """Trains and saves under every kind; -> names whose stored bits are not those in memory."""
    wrong = []
    for optimizer in optimizers:
        for kind in kinds:
            model, both = sharded(world_size, kind, optimizer)
            train(model, both, rank, world_size)
            uri = f"{folder}/{optimizer}-{world_size}-{kind}"
            own = {"random": torch.full((3,), rank)}
            found = CheckpointManager(uri).save(
                2, state_of(model, both), per_rank=own, meta={"kind": kind}, tags=["best"]
            )
            wrong += differing(state_of(model, both), read_unsharded(found))
    return wrong


def load_all(
    rank: int, world_size: int, folder: str, sources: list[str], kinds: list[str], optimizer: str = "rowwise"
) -> tuple[int, list[str]]:
    """Every source into every kind; -> (pairs, what is not equal to the bit to the source)."""
    wrong = []
    found = {source: open_checkpoint(f"{folder}/{optimizer}-{source}") for source in sources}
    stored = {source: read_unsharded(checkpoint) for source, checkpoint in found.items()}
    for kind in kinds:
        model, both = sharded(world_size, kind, optimizer, seed=99)
        for source in sources:
            state = state_of(model, both)
            for tensor in flatten(state).values():
                for values, _ in local_pieces(tensor):
                    values.detach().fill_(float("nan"))
            CheckpointManager(folder).load_into(state, found[source])
            whole = as_cut_by(stored[source], found[source], state)
            wrong += [f"{optimizer} {source} -> {kind}: {key}" for key in differing(state, whole)]
    return len(sources) * len(kinds), wrong


def as_cut_by(whole: dict[str, Tensor], found: Any, state: dict[str, Any]) -> dict[str, Tensor]:
    """The rule for row-wise Adagrad's statistics, written out, where columns are cut in another way now."""
    flat, result = flatten(state), dict(whole)
    for table in StoredTensors(found).tables().values():
        key, weight = table.states["momentum1"], flat[table.key]
        if key in flat and whole[key].dim() == 1:
            now = [(0, table.dim)]  # replicated
            if isinstance(weight, ShardedTensor):
                now = sorted({(s.shard_offsets[1], s.shard_sizes[1]) for s in weight.metadata().shards_metadata})
            if now != list(table.blocks):
                mean = torch.zeros(table.rows, dtype=torch.float64)
                for statistics, (_, width) in zip(whole[key].split(table.rows), table.blocks, strict=True):
                    mean += statistics.double() * width
                result[key] = (mean / table.dim).float().repeat(len(now))
    return result


def save_and_load_all(rank: int, world_size: int, folder: str, kinds: list[str]) -> tuple[int, list[str]]:
    wrong = save_all(rank, world_size, folder, kinds, ["rowwise"])
    pairs, more = load_all(rank, world_size, folder, [f"{world_size}-{kind}" for kind in kinds], kinds)
    return pairs, wrong + more


@pytest.mark.slow
def test_two_processes_load_every_kind_into_every_kind(tmp_path: Path) -> None:
    kinds = list(CUTS)
    assert run_ranks(2, save_and_load_all, str(tmp_path), kinds, local_world_size=1) == [(16, [])] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "kinds"), [("rowwise", ["row_wise", "all"]), ("adagrad", ["all"])])
def test_every_world_size_and_kind_loads_every_other(tmp_path: Path, optimizer: str, kinds: list[str]) -> None:
    """1, 2, 4 processes x row-wise and all kinds at once (each alone: above); states of a row and of an element."""
    sizes, folder = (1, 2, 4), str(tmp_path)
    for n in sizes:
        assert not sum(run_ranks(n, save_all, folder, kinds, [optimizer], local_world_size=local_of(n)), [])
    sources = [f"{n}-{kind}" for n in sizes for kind in kinds]
    for n in sizes:
        results = run_ranks(n, load_all, folder, sources, kinds, optimizer, local_world_size=local_of(n))
        assert results == [(len(sources) * len(kinds), [])] * n


def test_as_many_column_blocks_of_other_widths_are_another_cut() -> None:
    """Statistics of columns 0 to 3 used to be loaded as those of columns 0 to 11, since their number was the same."""

    def form(size: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> TensorStorageMetadata:
        pieces = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
        return TensorStorageMetadata(TensorProperties(), torch.Size(size), pieces)

    weight, state = "model.ebc.embedding_bags.t.weight", "optim.state.tables.ebc.embedding_bags.t.weight.t.momentum1"
    saved = {
        weight: form((5, 16), ((0, 0), (5, 4)), ((0, 4), (5, 12))),
        state: form((10,), ((0,), (5,)), ((5,), (5,))),
    }
    wanted = {weight: (5, 16), state: (10,)}
    assert row_statistics.changed(saved, wanted, {weight: ((0, 4), (4, 12))}) == {}
    assert row_statistics.changed(saved, wanted, {weight: ((0, 12), (12, 4))}) == {
        state: row_statistics.Cut(5, (4, 12))
    }
    filled = torch.zeros(10)
    row_statistics.fill(filled, torch.tensor([4.0] * 5 + [8.0] * 5), row_statistics.Cut(5, (4, 12)))
    assert torch.equal(filled, torch.full((10,), 7.0))


# Tools. The checkpoint they work on was written by four processes under all kinds of plans at once.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("written"))
    run_ranks(4, save_all, folder, ["all"], list(OPTIMIZERS), local_world_size=2)
    return folder


@pytest.fixture
def source(folder: str) -> str:
    return f"{folder}/rowwise-4-all"


def small_source(folder: Path, **meta: Any) -> str:
    """A run of one process: two tables, their statistics and a dense parameter."""
    state = {"model": {"mlp.weight": torch.randn(5, 3), "mlp.bias": torch.tensor(2.0)}, "optim": {}}
    for name, (rows, dim) in {"s__a": (70, 4), "s__b": (11, 6)}.items():
        state["model"][f"ebc.embedding_bags.{name}.weight"] = torch.randn(rows, dim)
        state["optim"][f"state.tables.ebc.embedding_bags.{name}.weight.{name}.momentum1"] = torch.rand(rows)
    CheckpointManager(str(folder / "checkpoints")).save(7, state, meta=meta, tags=["best", "best_click"])
    return str(folder)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= BAD_BYTE
    path.write_bytes(content)


def everything_below(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.rglob("*"))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


# Finding and looking at one.


def test_a_checkpoint_is_found_from_where_one_stands(tmp_path: Path) -> None:
    run = small_source(tmp_path / "run")
    state = {"model": {"w": torch.ones(2)}}
    CheckpointManager(f"{run}/checkpoints").save(9, state)
    assert open_checkpoint(run).step == open_checkpoint(f"{run}/checkpoints").step == 9
    assert open_checkpoint(run, "best").step == open_checkpoint(run, "best_click").step == 7
    assert open_checkpoint(run, "7").step == open_checkpoint(f"{run}/checkpoints/step_000000007").step == 7
    with pytest.raises(CheckpointError, match="is the checkpoint of step 7, and step 9 was asked for"):
        open_checkpoint(f"{run}/checkpoints/step_000000007", "9")
    CheckpointManager(str(tmp_path / "unjudged")).save(1, state)
    assert open_checkpoint(str(tmp_path / "unjudged"), "best").step == 1
    for which in ("8", "best_like"):
        with pytest.raises(CheckpointError, match=f"no checkpoint '{which}'; expected a run directory"):
            open_checkpoint(run, which)
    with pytest.raises(CheckpointError, match="no checkpoint 'latest'"):
        open_checkpoint(str(tmp_path / "nothing"))


def test_inspect_tells_what_is_there(source: str) -> None:
    report = inspect(source, verify_files=True)
    assert (report.step, report.world_size, report.tags, report.problems) == (2, 4, ("best",), ())
    assert report.verified and report.files == 5 and report.meta == {"kind": "all"}
    assert report.bytes == sum(os.path.getsize(p) for p in Path(report.uri).iterdir() if p.name != "manifest.json")
    assert {t.name: (t.rows, t.dim) for t in report.tables} == TABLES
    by_name = {t.name: t for t in report.tables}
    assert (by_name["a"].module, by_name["x"].module) == ("ebc", "ec")
    assert [by_name[t].pieces for t in "abcdef"] == [1, 4, 4, 2, 2, 4]
    assert by_name["f"].column_blocks == (16, 16) and by_name["b"].column_blocks == (8,)
    (statistic,) = by_name["f"].states
    assert (statistic.name, statistic.shape, statistic.dtype) == ("momentum1", (82,), "float32")
    assert by_name["a"].bytes == 40 * 8 * 4 and by_name["a"].dtype == "float32" and by_name["b"].files == 4
    assert [d.name for d in report.dense] == ["mlp.0.bias", "mlp.0.weight", "mlp.2.bias", "mlp.2.weight"]
    assert report.parts["model"] == 4 * sum(r * d for r, d in TABLES.values()) + sum(d.bytes for d in report.dense)
    assert set(report.parts) == {"model", "optim", "per_rank"}


def test_inspect_summarizes_a_configuration_and_bears_any_other_meta(tmp_path: Path) -> None:
    config = {
        "model": {"from_preset": "ame", "routes": {"click": {}}, "sets": {"s": {"dim": 4}}, "table_precision": "fp32"},
        "train": {"embedding_optimizer": "adagrad"},
        "sharding": None,
    }
    report = inspect(small_source(tmp_path / "a", config=config))
    assert report.config == {
        "preset": "ame",
        "tasks": ["click"],
        "sets": {"s": 4},
        "table precision": "fp32",
        "table optimizer": "adagrad",
    }
    assert inspect(small_source(tmp_path / "b", config=3)).config == {}


def test_inspect_reads_no_tensors_unless_asked_and_tells_of_damage(tmp_path: Path) -> None:
    run = small_source(tmp_path)
    data = Path(inspect(run).uri) / "__0_0.distcp"
    flip(data)
    assert inspect(run).problems == () and not inspect(run).verified
    (problem,) = inspect(run, verify_files=True).problems
    assert "__0_0.distcp: SHA-256 differs" in problem
    data.write_bytes(data.read_bytes()[:-1])
    assert "bytes, expected" in inspect(run).problems[0]
    data.unlink()
    assert "__0_0.distcp: not there" in inspect(run).problems[0]
    assert len(inspect(run).tables) == 2


# Cut anew.


@pytest.mark.parametrize("world_size", [1, 3, 4, 8])
def test_reshard_keeps_every_bit(source: str, tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_reshard, "SMALL_TABLE", 0)
    seen: list[tuple[int, int]] = []
    found = reshard(
        source,
        str(tmp_path),
        world_size=world_size,
        chunk_bytes=200,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found == CheckpointManager(str(tmp_path)).latest() == CheckpointManager(str(tmp_path)).best()
    assert (found.step, found.world_size) == (2, world_size)
    assert found.meta["resharded"]["world_size"] == 4 and found.meta["kind"] == "all"
    assert sorted(found.files) == [*(f"__{rank}_0.distcp" for rank in range(world_size)), TENSORS]
    before = read_unsharded(open_checkpoint(source))
    if world_size != 4:
        before = {key: value for key, value in before.items() if not key.startswith("per_rank.")}
    assert_same(read_unsharded(found), before)
    stored = StoredTensors(found)
    for form in stored.forms.values():
        assert all(math.prod(chunk.sizes) * 4 <= 200 or chunk.sizes[0] == 1 for chunk in form.chunks)
    key = "model.ebc.embedding_bags.b.weight"
    assert len(stored.files_of([key])) == world_size
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_small_tables_stay_whole_and_files_are_alike(tmp_path: Path) -> None:
    state = {f"ebc.embedding_bags.t{i}.weight": torch.randn(1000 * (i + 1), 4) for i in range(12)}
    state["mlp.weight"] = torch.randn(100, 100)
    CheckpointManager(str(tmp_path / "a")).save(1, {"model": state})
    found = reshard(str(tmp_path / "a"), str(tmp_path / "b"), world_size=3)
    assert all(len(form.chunks) == 1 for form in StoredTensors(found).forms.values())
    sizes = [found.files[f"__{rank}_0.distcp"]["size"] for rank in range(3)]
    assert max(sizes) < 1.1 * min(sizes)


def load_two(rank: int, world_size: int, pairs: dict[tuple[str, str], tuple[str, str]]) -> list[str]:
    """pairs: (kind, optimizer) -> two checkpoints; -> names of the tensors that they fill with other bits."""
    wrong = []
    for (kind, optimizer), uris in pairs.items():
        model, both = sharded(world_size, kind, optimizer, seed=99)
        copies = []
        for uri in uris:
            state = state_of(model, both)
            CheckpointManager(uri).load_into(state, open_checkpoint(uri))
            copies.append([values.clone() for t in flatten(state).values() for values, _ in local_pieces(t)])
        names = [f"{kind} {key}" for key, t in flatten(state_of(model, both)).items() for _ in local_pieces(t)]
        wrong += [key for key, a, b in zip(names, *copies, strict=True) if not torch.equal(a, b)]
    return wrong


def plan_of(kind: str, world_size: int, path: Path) -> str:
    model, local = TinyModel(bags=BAGS, rows=ROWS), local_of(world_size)
    plan = hand_plan(model, KINDS[kind], world_size, local)
    save_plan(plan, model, str(path), world_size=world_size, local_world_size=local)
    return str(path)


@pytest.mark.slow
def test_reshard_by_a_plan_is_what_loading_makes_of_it(folder: str, tmp_path: Path) -> None:
    pairs = {}
    kinds = ["column_wise", "row_wise", "data_parallel"]
    for kind, optimizer in (*((kind, "rowwise") for kind in kinds), ("column_wise", "adagrad")):
        source, target = f"{folder}/{optimizer}-4-all", str(tmp_path / f"{kind}-{optimizer}")
        found = reshard(source, target, plan=plan_of(kind, 2, tmp_path / "plan.json"), chunk_bytes=100)
        assert found.world_size == 2
        pieces = StoredTensors(found)._pieces_of("model.ebc.embedding_bags.a.weight")
        if kind == "data_parallel":
            assert {(p.offsets[1], p.sizes[1]) for p in pieces} == {(0, 8)} and len({p.file for p in pieces}) == 1
            pairs[kind, optimizer] = (source, target)
            continue
        assert {(p.file, p.offsets[1], p.sizes[1]) for p in pieces} == {
            (f"__{rank}_0.distcp", column, width) for rank, (_, column), (_, width) in shards_of("a", kind, 2, 1)
        }
        pairs[kind, optimizer] = (source, target)
    assert run_ranks(2, load_two, pairs, local_world_size=1) == [[], []]


def edited(path: Path, change: Callable[[dict], Any]) -> str:
    content = json.loads(Path(plan_of("row_wise", 2, path)).read_text())
    change(content)
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["plan"]["ebc"].pop("a"), "plan of another model: table 'a' of the checkpoint is not in it"),
        (lambda c: c["plan"]["ebc"].update(new=c["plan"]["ebc"]["a"]), "table 'new' is not in the checkpoint"),
        (lambda c: c["plan"]["ebc"]["a"]["shards"].pop(), "table 'a' do not cover 40 rows x 8 columns"),
        (lambda c: c["plan"]["ebc"]["a"]["shards"][0].update(rank=2), "on 2 processes"),
        (lambda c: c["plan"]["ebc"]["a"]["shards"][0].update(sizes=[99, 8]), "do not cover"),
        (lambda c: c["plan"]["ebc"]["a"]["shards"][0].update(sizes=[1]), "damaged plan: IndexError"),
        (lambda c: c["plan"]["ebc"]["a"].update(shards=[]), "table 'a' do not cover"),
        (lambda c: c.pop("world_size"), "damaged plan: KeyError"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    source: str, tmp_path: Path, change: Callable[[dict], Any], message: str
) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match=message):
        reshard(source, str(tmp_path / "out"), plan=edited(path, change))
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_number_of_processes_is_refused(source: str, tmp_path: Path) -> None:
    plan = plan_of("row_wise", 2, tmp_path / "plan.json")
    with pytest.raises(PlanError, match="plan for 2 processes, but world_size is 4"):
        reshard(source, str(tmp_path / "out"), plan=plan, world_size=4)
    with pytest.raises(PlanError, match="none.json: no such plan file"):
        reshard(source, str(tmp_path / "out"), plan=str(tmp_path / "none.json"))


def test_half_precision_and_no_optimizer(tmp_path: Path) -> None:
    run = small_source(tmp_path / "run", config={"model": {"table_precision": "fp32"}})
    before = read_unsharded(open_checkpoint(run))
    half = reshard(run, str(tmp_path / "half" / "checkpoints"), precision="fp16", with_optimizer=False)
    tables = [f"model.ebc.embedding_bags.{name}.weight" for name in ("s__a", "s__b")]
    wanted = {k: v.half() if k in tables else v for k, v in before.items() if not k.startswith("optim.")}
    assert_same(read_unsharded(half), wanted)
    assert half.meta["config"]["model"]["table_precision"] == "fp16"
    assert open_checkpoint(str(tmp_path / "half"), "best_click").uri == half.uri
    again = reshard(half.uri, str(tmp_path / "full"), precision="fp32")
    assert_same(read_unsharded(again), {k: v.float() for k, v in wanted.items()})


def test_values_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    weight = torch.tensor([[1.0, 70000.0], [float("nan"), 0.5]])
    CheckpointManager(str(tmp_path / "a")).save(1, {"model": {"ebc.embedding_bags.t.weight": weight}})
    with pytest.raises(CheckpointError, match=r"t.weight: has values up to 70000, which torch.float16 cannot hold"):
        reshard(str(tmp_path / "a"), str(tmp_path / "b"), precision="fp16")
    assert everything_below(tmp_path / "b") == []


def test_tensors_of_every_form_survive(tmp_path: Path) -> None:
    """Transposed, empty, without dimensions, of three dimensions, and of dtypes that NumPy does not know."""
    state = {
        "transposed": torch.randn(6, 9).t(),
        "part": torch.randn(9, 9)[2:5, 1:7],
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "cube": torch.randn(5, 3, 2, dtype=torch.float64),
        "brain": torch.randn(7, 2).bfloat16(),
        "flags": torch.tensor([True, False, True]),
    }
    CheckpointManager(str(tmp_path / "a")).save(1, {"model": state})
    found = reshard(str(tmp_path / "a"), str(tmp_path / "b"), world_size=2, chunk_bytes=16)
    assert_same(read_unsharded(found, prefix="model."), state)
    loaded = {key: torch.zeros_like(value) for key, value in state.items()}
    CheckpointManager(str(tmp_path / "b")).load_into({"model": loaded}, found)
    assert_same(loaded, state)


def test_remote_checkpoints(source: str) -> None:
    uri = "memory://checkpoint_tools"
    found = reshard(source, f"{uri}/a", world_size=2)
    again = reshard(f"{uri}/a", f"{uri}/b", world_size=3)
    assert_same(read_unsharded(found), read_unsharded(again))
    assert inspect(f"{uri}/b", verify_files=True).problems == () and inspect(f"{uri}/b").tags == ("best",)
    written = export(f"{uri}/b", f"{uri}/out", tables="a")
    assert list(written.files) == ["a.safetensors"]
    with pytest.raises(CheckpointError, match="exists"):
        export(f"{uri}/b", f"{uri}/out")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    run = small_source(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="step 7 is there already; give another directory"):
            reshard(run, f"{run}/checkpoints", world_size=2)
    export(run, str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="out exists; nothing is overwritten"):
        export(run, str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="must be at least 1, got 0"):
        reshard(run, str(tmp_path / "other"), world_size=0)


# A damaged source, a full disk, a kill: an error, and nothing half-written.

TOOLS: dict[str, Callable[[str, str], Any]] = {
    "reshard": lambda source, target: reshard(source, target, world_size=2),
    "export": lambda source, target: export(source, target, with_optimizer=True, with_dense=True),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("file", ["__0_0.distcp", "__3_0.distcp", TENSORS])
def test_a_damaged_source_leaves_nothing(source: str, tmp_path: Path, tool: str, file: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    flip(copy / "step_000000002" / file)
    with pytest.raises(CheckpointError, match="SHA-256 differs|unreadable|refused|damaged"):
        TOOLS[tool](str(copy), str(tmp_path / "out"))
    assert everything_below(tmp_path / "out") == [] and not [p for p in os.listdir(tmp_path) if p.startswith(".tmp")]
    (copy / "step_000000002" / file).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        TOOLS[tool](str(copy), str(tmp_path / "out"))


KEY = "model.ebc.embedding_bags.b.weight"


def swap_places(metadata: Any) -> None:
    a, b = (next(i for i in metadata.storage_data if i.fqn.endswith(f"embedding_bags.{t}.weight")) for t in "ab")
    metadata.storage_data[a], metadata.storage_data[b] = metadata.storage_data[b], metadata.storage_data[a]


def shift(metadata: Any) -> None:
    next(v for i, v in metadata.storage_data.items() if i.fqn == KEY).offset += 8


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", [TENSORS, PICKLED])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.state_dict_metadata[KEY].chunks.pop(), "values at .* are stored nowhere or twice"),
        (lambda m: m.state_dict_metadata[KEY].chunks.append(m.state_dict_metadata[KEY].chunks[0]), "nowhere or twice"),
        (lambda m: [m.storage_data.pop(i) for i in list(m.storage_data) if i.fqn == KEY], "no place in a file"),
        (swap_places, "holds .* where its metadata has"),
        (shift, "the file is damaged"),
    ],
)
def test_metadata_that_lies_leaves_nothing(
    source: str, tmp_path: Path, tool: str, name: str, change: Callable[[Any], None], message: str
) -> None:
    if (name, message) == (TENSORS, "no place in a file"):
        pytest.skip("a piece has its place there")
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    change_metadata(copy / "step_000000002", change, name)
    with pytest.raises(CheckpointError, match=message):
        TOOLS[tool](str(copy), str(tmp_path / "out"))
    assert everything_below(tmp_path / "out") == [] and not [p for p in os.listdir(tmp_path) if p.startswith(".tmp")]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_nothing(
    source: str, tmp_path: Path, tool: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(5))

    def failing(self: StoredTensors, *args: Any) -> Tensor:
        if next(calls, None) is None:
            raise error
        return read(self, *args)

    read = StoredTensors.read
    monkeypatch.setattr(StoredTensors, "read", failing)
    wanted = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted, match="No space left|"):
        TOOLS[tool](source, str(tmp_path / "out"))
    assert everything_below(tmp_path / "out") == []
    monkeypatch.undo()
    TOOLS[tool](source, str(tmp_path / "out"))


def test_what_a_kill_left_is_no_checkpoint_and_does_not_matter(source: str, tmp_path: Path) -> None:
    left = tmp_path / "out" / ".tmp_step_000000002"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    assert CheckpointManager(str(tmp_path / "out")).latest() is None
    found = reshard(source, str(tmp_path / "out"), world_size=2)
    assert not left.exists() and inspect(found.uri, verify_files=True).problems == ()


# Written out.


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """As https://github.com/huggingface/safetensors#format says."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    result, end = {}, 0
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        assert begin == end, "no gaps"
        end = stop
        dtype = {"F32": np.float32, "F16": np.float16}[entry["dtype"]]
        result[name] = np.frombuffer(data[8 + length + begin : 8 + length + stop], dtype).reshape(entry["shape"])
    assert 8 + length + end == len(data), "no bytes left over"
    return result


def read_export(folder: Path, format: str, table: str) -> dict[str, np.ndarray]:
    if format == "safetensors":
        return read_safetensors(folder / f"{table}.safetensors")
    if format == "npz":
        with np.load(folder / f"{table}.npz", allow_pickle=False) as arrays:
            return dict(arrays)
    names = {p.name.removeprefix(f"{table}.").removesuffix("npy").rstrip("."): p for p in folder.glob(f"{table}*.npy")}
    return {name or "weight": np.load(p, mmap_mode="r", allow_pickle=False) for name, p in names.items()}


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("format", ["safetensors", "npz", "npy"])
def test_export_has_the_rows_in_their_order(folder: str, tmp_path: Path, format: Any, optimizer: str) -> None:
    source, target = f"{folder}/{optimizer}-4-all", tmp_path / "out"
    written = export(source, str(target), format=format, with_optimizer=True, chunk_bytes=150)
    assert written.step == 2 and written.bytes == sum(p.stat().st_size for p in target.glob("*.*[yzs]"))
    content = json.loads((target / "export.json").read_text())
    assert content["files"] == written.files and set(written.files) | {"export.json"} == set(os.listdir(target))
    whole, tables = read_unsharded(open_checkpoint(source)), StoredTensors(open_checkpoint(source)).tables()
    assert set(tables) == set(TABLES)
    for name, table in tables.items():
        arrays = read_export(target, format, name)
        assert set(arrays) == {"weight", "momentum1"}
        assert np.array_equal(arrays["weight"], whole[table.key].numpy())
        statistics = whole[table.states["momentum1"]]
        if optimizer == "rowwise" and len(table.blocks) > 1:
            statistics = statistics.view(len(table.blocks), table.rows).t()
        assert arrays["momentum1"].shape == tuple(statistics.shape)
        assert np.array_equal(arrays["momentum1"], statistics.numpy())


def test_the_library_reads_our_safetensors(source: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("safetensors") is None:
        pytest.skip("safetensors is not installed; the format is read by hand in the other tests")
    from safetensors.torch import load_file  # type: ignore[import-not-found]

    export(source, str(tmp_path / "out"), with_optimizer=True)
    for table in TABLES:
        ours = read_safetensors(tmp_path / "out" / f"{table}.safetensors")
        theirs = load_file(tmp_path / "out" / f"{table}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name].numpy()) for name in ours)


def test_export_takes_the_tables_that_are_named_and_the_dense_part(tmp_path: Path) -> None:
    run = small_source(tmp_path / "run")
    whole = read_unsharded(open_checkpoint(run), prefix="model.")
    written = export(run, str(tmp_path / "a"), tables=["s__b", "*_b"], with_dense=True)
    assert list(written.files) == ["s__b.safetensors", "dense.safetensors"]
    assert written.files["s__b.safetensors"]["tensors"] == {"weight": [11, 6]}
    dense = read_safetensors(tmp_path / "a" / "dense.safetensors")
    assert all(np.array_equal(dense[name], whole[name].numpy()) for name in ("mlp.weight", "mlp.bias"))
    half = reshard(run, str(tmp_path / "half"), precision="fp16")
    export(half.uri, str(tmp_path / "b"), format="npy")
    assert np.load(tmp_path / "b" / "s__a.npy").dtype == np.float16
    with pytest.raises(CheckpointError, match="unknown table 's__bb'; known: s__a, s__b; did you mean 's__b'"):
        export(run, str(tmp_path / "c"), tables="s__bb")
    with pytest.raises(CheckpointError, match="unknown format 'npzz'; known: safetensors, npz, npy"):
        export(run, str(tmp_path / "c"), format="npzz")  # type: ignore[arg-type]
    CheckpointManager(str(tmp_path / "brain")).save(
        1, {"model": {"ebc.embedding_bags.t.weight": torch.ones(2, 2).bfloat16()}}
    )
    with pytest.raises(CheckpointError, match="t weight is torch.bfloat16, which npz does not know"):
        export(str(tmp_path / "brain"), str(tmp_path / "c"), format="npz")
    assert not (tmp_path / "c").exists()


# Memory.

ROWS_OF_LARGE, LIMIT = 200_000, 12 << 20


def save_large(rank: int, world_size: int, uri: str) -> None:
    """One table of 51 MB, in one piece."""
    weight = (torch.arange(ROWS_OF_LARGE * 64) % 1000).float().view(-1, 64)
    CheckpointManager(uri).save(1, {"model": {"ebc.embedding_bags.t.weight": weight}})


def resident(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def use_tools(rank: int, world_size: int, uri: str, target: str, plan: str) -> dict[str, int]:
    """Tool -> bytes by which the process grew at most while it ran."""
    tools = {
        "reshard": lambda: reshard(uri, f"{target}/rows", world_size=8, chunk_bytes=1 << 20),
        "to one": lambda: reshard(f"{target}/rows", f"{target}/one", world_size=1, chunk_bytes=1 << 20),
        "by columns": lambda: reshard(uri, f"{target}/columns", plan=plan, chunk_bytes=1 << 20),
        "fp16": lambda: reshard(uri, f"{target}/half", precision="fp16", chunk_bytes=1 << 20),
        **{f: lambda f=f: export(uri, f"{target}/{f}", format=f, chunk_bytes=1 << 20) for f in ("safetensors", "npz")},
    }
    CheckpointManager(f"{target}/tiny").save(1, {"model": {"ebc.embedding_bags.t.weight": torch.ones(2, 2)}})
    reshard(f"{target}/tiny", f"{target}/tiny again")  # what is imported late and allocated once
    grew = {}
    for name, tool in tools.items():
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak
        before = resident("VmRSS:")
        tool()
        grew[name] = resident("VmHWM:") - before
    return grew


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs to reset the peak"
)
def test_tools_never_hold_a_table(tmp_path: Path) -> None:
    uri, target = str(tmp_path / "source"), str(tmp_path / "out")
    run_ranks(1, save_large, uri)
    cut = {"sharding_type": "column_wise", "compute_kernel": "fused"}
    cut["shards"] = [{"rank": r, "offsets": [0, 4 * r], "sizes": [ROWS_OF_LARGE, 4]} for r in range(16)]
    sizes = {"schema": SCHEMA, "version": VERSION, "world_size": 16, "local_world_size": 16}
    tables = {"tables": {"ebc": {"t": [ROWS_OF_LARGE, 64]}}, "plan": {"ebc": {"t": cut}}}
    (tmp_path / "plan.json").write_text(json.dumps(sizes | tables))
    (grew,) = run_ranks(1, use_tools, uri, target, str(tmp_path / "plan.json"))
    assert all(growth < LIMIT < ROWS_OF_LARGE * 64 * 4 / 4 for growth in grew.values()), grew
    for name in ("rows", "one", "columns"):
        found = read_checkpoint(f"{target}/{name}/step_000000001")
        last = StoredTensors(found).read("model.ebc.embedding_bags.t.weight", (ROWS_OF_LARGE - 1, 0), (1, 64))
        assert last[0, -1] == (ROWS_OF_LARGE * 64 - 1) % 1000
