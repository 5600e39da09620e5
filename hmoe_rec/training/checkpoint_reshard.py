"""A checkpoint -> the same one cut for other processes, halved, or without its optimizer. One process does it.

Loading cuts by itself: any number of processes takes any checkpoint. This is for what loading cannot do:

- many processes are to load what few have written: a process reads whole pieces, so that 128 of them would each read
  the one piece of 80 GB that a single process wrote. Resharded, each reads a file of its own;
- few, large files in place of very many, before they go to an object store;
- half the size for serving: tables in fp16, without the optimizer.

Tensors are streamed through buffers of `chunk_bytes`; neither a table nor a shard is ever held.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from hmoe_rec import io
from hmoe_rec.progress import Progress
from hmoe_rec.suggest import nearest
from hmoe_rec.training.checkpoint import Checkpoint, read_checkpoint
from hmoe_rec.training.checkpoint_access import committed, open_checkpoint, owning_run_of, tags_of, verified_first
from hmoe_rec.training.checkpoint_files import MANIFEST, HashingFiles, write_json, write_manifest, write_tensors
from hmoe_rec.training.checkpoint_metadata import from_metadata
from hmoe_rec.training.checkpoint_rows import CHUNK_BYTES, StoredTable, StoredTensors
from hmoe_rec.training.checkpoint_state import PER_RANK
from hmoe_rec.types import CheckpointError, PlanError

SMALL_TABLE = 1 << 20  # bytes; smaller tables are not cut
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class _Shard:
    """Rows [row, row + rows) and columns [column, column + width) of a table, for the file of one process."""

    rank: int
    row: int
    rows: int
    column: int
    width: int


@dataclass(frozen=True)
class _Block:
    """A piece of a tensor to be written.

    Attributes:
        widths: for a row statistic whose column blocks change: widths of the blocks it was saved in; its offset is then
            the row.
    """

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    row: int = 0
    widths: tuple[int, ...] = ()


def reshard(
    source: str,
    target: str,
    *,
    checkpoint: str = "latest",
    world_size: int | None = None,
    plan: str | None = None,
    precision: Literal["fp32", "fp16"] | None = None,
    with_optimizer: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> Checkpoint:
    """Writes a checkpoint anew, cut for other processes; values are the same to the bit.

    Without a plan every table is cut into `world_size` equal blocks of rows, a file each, as row_wise does; small
    tables and cuts of columns stay as they are. With a plan the pieces are its shards. Where it cuts columns in another
    way than the checkpoint, row-wise Adagrad's statistics are converted as loading converts them (row_statistics.py).

    Args:
        source, checkpoint: see `open_checkpoint`.
        target: a directory of checkpoints, such as RUN/checkpoints; gets a directory for the step. Tags are kept.
        world_size: files to write; None = as many as wrote the source, or as the plan has processes.
        plan: a plan file made for this model.
        precision: of the tables; None = as they are. Rounding to fp16 is to the nearest.
        with_optimizer: False: the model and the rest only, for evaluation, serving, or another optimizer.
        chunk_bytes: largest piece that is written, and size of the buffers, of which there are three.

    Returns:
        The new checkpoint. Random states and other tensors of single processes are in it only if their number stays.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, the step is in `target` already, or a value that fp16 cannot
            hold. Nothing is left behind.
        PlanError: a plan for another model or number of processes.
        LockError: a run writes into its directory of checkpoints, `target`.
    """
    found = open_checkpoint(source, checkpoint)
    stored = StoredTensors(found)
    tables = stored.tables()
    shards: dict[str, list[_Shard]] | None = None
    if plan is not None:
        planned_size, shards = _read_plan(plan, tables)
        if world_size not in (None, planned_size):
            raise PlanError(f"{plan}: plan for {planned_size} processes, but world_size is {world_size}; leave one out")
        world_size = planned_size
    world_size = found.world_size if world_size is None else world_size
    if world_size < 1 or chunk_bytes < 1:
        raise CheckpointError(f"world_size and chunk_bytes must be at least 1, got {world_size} and {chunk_bytes}")
    keys = [
        key
        for key in stored.forms
        if (with_optimizer or not _is_optimizer(key))
        and (world_size == found.world_size or not key.startswith(f"{PER_RANK}."))
    ]
    dtypes = {t.key: PRECISIONS[precision] for t in tables.values()} if precision else {}
    files = _assign(stored, tables, keys, shards, world_size, chunk_bytes)
    target_uri = io.join(target, f"step_{found.step:09d}")
    if io.isdir(target) and any(name.startswith(f"step_{found.step:09d}") for name in io.ls(target)):
        raise CheckpointError(f"{target}: step {found.step} is there already; give another directory")
    meta = _new_meta(found, plan, precision, with_optimizer)
    report = verified_first(stored, keys, progress)
    with owning_run_of(target), committed(target_uri, MANIFEST) as unfinished:
        writer = _Writer(unfinished, stored, dtypes, chunk_bytes, report)
        for rank in range(world_size):
            writer.write(f"__{rank}_0.distcp", files[rank])
        digests = writer.finish()
        content = {"step": found.step, "world_size": world_size, "meta": meta, "files": digests}
        write_manifest(unfinished, content)
    for tag in tags_of(found):
        write_json(io.join(target, f"{tag}.json"), {"directory": f"step_{found.step:09d}"})
    return read_checkpoint(target_uri)


def _is_optimizer(key: str) -> bool:
    return key.split(".")[0].startswith("optim")


def _new_meta(found: Checkpoint, plan: str | None, precision: str | None, with_optimizer: bool) -> dict[str, Any]:
    meta = json.loads(json.dumps(found.meta))
    model = meta.get("config", {}).get("model") if isinstance(meta.get("config"), dict) else None
    if precision is not None and isinstance(model, dict) and "table_precision" in model:
        model["table_precision"] = precision
        model.pop("table_precisions", None)
    meta["resharded"] = {
        "source": found.uri,
        "world_size": found.world_size,
        "plan": plan,
        "precision": precision,
        "with_optimizer": with_optimizer,
    }
    return meta


def _read_plan(uri: str, tables: Mapping[str, StoredTable]) -> tuple[int, dict[str, list[_Shard]]]:
    """(processes, table -> its shards, none if it is replicated) of a plan file, which must be for these tables."""
    from hmoe_rec.sharding.plan_file import read_plan  # loads TorchRec, which nothing else here needs

    file = read_plan(uri)
    world_size = file.world_size
    try:
        planned = {
            table: [
                _Shard(int(s["rank"]), *map(int, (s["offsets"][0], s["sizes"][0], s["offsets"][1], s["sizes"][1])))
                for s in entry["shards"]
            ]
            for members in file.plan.values()
            for table, entry in members.items()
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise PlanError(f"{uri}: damaged plan: {type(error).__name__} {error}; make it again") from error
    missing, extra = sorted(tables.keys() - planned.keys()), sorted(planned.keys() - tables.keys())
    if missing or extra:
        which = f"table {missing[0]!r} of the checkpoint is not in it" if missing else ""
        near = nearest(missing[0], extra) if missing and extra else None
        hint = f" (it has {near!r})" if near else ""
        which = f"{which}{hint}" or f"table {extra[0]!r} is not in the checkpoint"
        raise PlanError(f"{uri}: plan of another model: {which}; make a plan for this model")
    replicated = {
        table
        for members in file.plan.values()
        for table, entry in members.items()
        if entry["sharding_type"] == "data_parallel"
    }
    for name, shards in planned.items():
        table = tables[name]
        if name in replicated and not shards:
            continue
        if not _tiles(shards, table) or not all(0 <= s.rank < world_size for s in shards):
            raise PlanError(
                f"{uri}: the shards of table {name!r} do not cover {table.rows} rows x {table.dim} columns exactly "
                f"once on {world_size} processes; make a plan for this model"
            )
    return world_size, planned


def _tiles(shards: Sequence[_Shard], table: StoredTable) -> bool:
    """Whether blocks of columns lie side by side, and in each of them blocks of rows one below another."""
    from hmoe_rec.sharding.plan_file import is_partition

    columns: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for s in shards:
        if s.rows <= 0 or s.width <= 0:
            return False
        columns.setdefault((s.column, s.column + s.width), []).append((s.row, s.row + s.rows))
    return is_partition(columns, table.dim) and all(is_partition(rows, table.rows) for rows in columns.values())


def _assign(
    stored: StoredTensors,
    tables: Mapping[str, StoredTable],
    keys: Sequence[str],
    planned: Mapping[str, list[_Shard]] | None,
    world_size: int,
    chunk_bytes: int,
) -> list[list[_Block]]:
    """Process -> the blocks of its file."""
    files: list[list[_Block]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    kept = set(keys)
    of_tables = {key for t in tables.values() for key in (t.key, *t.states.values())}

    def add(rank: int, blocks: Sequence[_Block]) -> None:
        files[rank] += blocks
        load[rank] += sum(math.prod(b.sizes) * stored.forms[b.key].properties.dtype.itemsize for b in blocks)

    for name, table in sorted(tables.items(), key=lambda item: (-item[1].rows * item[1].dim, item[0])):
        if planned is not None:
            # All processes will read a replicated table whole: it is one piece of one file.
            shards = planned[name] or [_Shard(load.index(min(load)), 0, table.rows, 0, table.dim)]
        elif table.rows < world_size or stored.bytes_of(table.key) < SMALL_TABLE:
            lightest = load.index(min(load))
            shards = [_Shard(lightest, 0, table.rows, column, width) for column, width in table.blocks]
        else:
            shards = [
                _Shard(rank, row, min(rows, table.rows - row), column, width)
                for rows in [-(-table.rows // world_size)]
                for rank, row in enumerate(range(0, table.rows, rows))
                for column, width in table.blocks
            ]
        for key in sorted({table.key, *table.states.values()} & kept):
            for shard in shards:
                add(shard.rank, _blocks_of(stored, table, key, shard, shards, chunk_bytes))
    for key in sorted(kept - of_tables, key=lambda key: (-stored.bytes_of(key), key)):
        add(load.index(min(load)), _whole(stored, key, chunk_bytes))
    return files


def _blocks_of(
    stored: StoredTensors, table: StoredTable, key: str, shard: _Shard, shards: Sequence[_Shard], chunk_bytes: int
) -> list[_Block]:
    """What a shard of a table holds of its weight, or of a state of its optimizer."""
    size = tuple(stored.forms[key].size)
    itemsize = stored.forms[key].properties.dtype.itemsize
    if size == (table.rows, table.dim):
        steps = _steps(shard.row, shard.rows, shard.width * itemsize, chunk_bytes)
        return [_Block(key, (row, shard.column), (rows, shard.width)) for row, rows in steps]
    if stored.is_row_statistic(table, key):
        blocks = sorted({(s.column, s.width) for s in shards})
        first = blocks.index((shard.column, shard.width)) * table.rows
        widths = () if blocks == list(table.blocks) else tuple(width for _, width in table.blocks)
        # float64 is what a statistic is averaged in.
        steps = _steps(shard.row, shard.rows, 2 * 8 * len(widths) or itemsize, chunk_bytes)
        return [_Block(key, (first + row,), (rows,), row, widths) for row, rows in steps]
    if shard != shards[0]:
        return []
    return _whole(stored, key, chunk_bytes)


def _whole(stored: StoredTensors, key: str, chunk_bytes: int) -> list[_Block]:
    size = tuple(stored.forms[key].size)
    if not size:
        return [_Block(key, (), ())]
    row_bytes = math.prod(size[1:]) * stored.forms[key].properties.dtype.itemsize
    steps = _steps(0, size[0], row_bytes, chunk_bytes)
    return [_Block(key, (row, *[0] * (len(size) - 1)), (rows, *size[1:])) for row, rows in steps]


def _steps(begin: int, count: int, row_bytes: int, chunk_bytes: int) -> list[tuple[int, int]]:
    """[begin, begin + count) in steps of at most `chunk_bytes`, as (first, how many)."""
    step = max(1, chunk_bytes // max(1, row_bytes))
    return [(first, min(step, begin + count - first)) for first in range(begin, begin + count, step)] or [(begin, 0)]


class _Writer:
    """Writes the files of a checkpoint as torch.distributed.checkpoint does, one block in memory at a time."""

    def __init__(
        self,
        uri: str,
        stored: StoredTensors,
        dtypes: Mapping[str, torch.dtype],
        chunk_bytes: int,
        report: Callable[[int], None],
    ) -> None:
        self.uri, self.stored, self.dtypes, self.chunk_bytes = uri, stored, dtypes, chunk_bytes
        self.report = report
        self.fs = HashingFiles(uri)
        self.forms: dict[str, TensorStorageMetadata] = {}
        self.storage: dict[MetadataIndex, _StorageInfo] = {}
        self._sizes: dict[str, int] = {}

    def write(self, name: str, blocks: Sequence[_Block]) -> None:
        if not blocks:
            return
        with self.fs.create_stream(self.fs.concat_path(self.fs.path, name), "wb") as stream:
            for block in blocks:
                begin = stream.tell()
                values = self._values(block)
                torch.save(values, stream)
                self._note(block, values.dtype, _StorageInfo(name, begin, stream.tell() - begin))
                self.report(values.nbytes)
            if io.is_local(self.uri):
                os.fsync(stream.fileno())

    def finish(self) -> dict[str, dict[str, Any]]:
        """Writes the metadata; -> the digests of all files."""
        for key, length in self._sizes.items():
            self.forms[key].size = torch.Size((length, *self.forms[key].size[1:]))
        metadata = Metadata(dict(self.forms), storage_data=self.storage)
        write_tensors(self.fs, from_metadata(metadata), sync=io.is_local(self.uri))
        return self.fs.digests

    def _values(self, block: _Block) -> Tensor:
        if block.widths:
            return self._converted(block)
        values = self.stored.read(block.key, block.offsets, block.sizes, self.chunk_bytes)
        dtype = self.dtypes.get(block.key)
        if dtype is None or dtype == values.dtype:
            return values
        result = values.to(dtype)
        if not torch.equal(result.isfinite(), values.isfinite()):
            raise CheckpointError(
                f"{block.key}: has values up to {values.abs().nan_to_num(0, 0).max().item():g}, which {dtype} cannot "
                "hold; keep the precision"
            )
        return result

    def _converted(self, block: _Block) -> Tensor:
        """A row statistic under other column blocks: the average by width of those that it was saved in."""
        table_rows = self.stored.forms[block.key].size[0] // len(block.widths)
        rows, row = block.sizes[0], block.row
        saved = [
            self.stored.read(block.key, (b * table_rows + row,), (rows,), self.chunk_bytes)
            for b in range(len(block.widths))
        ]
        widths = torch.tensor(block.widths, dtype=torch.float64)
        whole = (torch.stack(saved).double() * widths[:, None]).sum(0) / widths.sum()
        return whole.to(saved[0].dtype)

    def _note(self, block: _Block, dtype: torch.dtype, place: _StorageInfo) -> None:
        form = self.forms.setdefault(
            block.key,
            TensorStorageMetadata(TensorProperties(dtype=dtype), self.stored.forms[block.key].size, []),
        )
        form.chunks.append(ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes)))
        self.storage[MetadataIndex(block.key, torch.Size(block.offsets))] = place
        if block.offsets:
            self._sizes[block.key] = max(self._sizes.get(block.key, 0), block.offsets[0] + block.sizes[0])
