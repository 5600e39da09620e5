"""A checkpoint -> what it holds, from its manifest and metadata: a record that a person or a program can read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hmoe_rec import io
from hmoe_rec.progress import Progress
from hmoe_rec.training.checkpoint import Checkpoint
from hmoe_rec.training.checkpoint_access import open_checkpoint, tags_of, verify_files_of
from hmoe_rec.training.checkpoint_rows import StoredTable, StoredTensors


@dataclass(frozen=True)
class TensorRecord:
    """A tensor in a checkpoint.

    Attributes:
        bytes: of its values.
        pieces: into which it is cut.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    pieces: int


@dataclass(frozen=True)
class TableRecord:
    """An embedding table in a checkpoint.

    Attributes:
        module: path of the collection that holds it.
        dtype: "float32" or "float16".
        bytes: of its values, without the optimizer's.
        pieces: into which its weight is cut.
        column_blocks: widths of the blocks of columns; one if it is not cut by columns.
        files: that hold a piece of the weight.
        states: of its optimizer.
    """

    name: str
    module: str
    rows: int
    dim: int
    dtype: str
    bytes: int
    pieces: int
    column_blocks: tuple[int, ...]
    files: int
    states: tuple[TensorRecord, ...]


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint holds.

    Attributes:
        world_size: processes that wrote it.
        bytes: of all files.
        tables: in the order of their names.
        dense: parameters and buffers of the model outside the tables.
        parts: top-level part ("model", "optimizer", "per_rank", ...) -> bytes of its tensors.
        tags: such as "best".
        verified: the files' SHA-256 were compared with the manifest's; False = only their sizes.
        problems: what is wrong with the files, one sentence each.
        config: what the run's configuration says in a few words; empty where it was not saved.
        meta: all that was saved beside the tensors.
    """

    uri: str
    step: int
    world_size: int
    files: int
    bytes: int
    tables: tuple[TableRecord, ...]
    dense: tuple[TensorRecord, ...]
    parts: Mapping[str, int]
    tags: tuple[str, ...]
    verified: bool
    problems: tuple[str, ...]
    config: Mapping[str, Any]
    meta: Mapping[str, Any] = field(repr=False)


def inspect(
    uri: str, checkpoint: str = "latest", *, verify_files: bool = False, progress: Progress | None = None
) -> CheckpointReport:
    """What a checkpoint holds, from its manifest and metadata.

    Args:
        uri, checkpoint: see `open_checkpoint`.
        verify_files: also read every file and compare its SHA-256.

    Raises:
        CheckpointError: there is no such checkpoint, or its manifest or metadata is damaged. Other damage is told in
            `problems`.
    """
    found = open_checkpoint(uri, checkpoint)
    problems = _wrong_sizes(found)
    if verify_files:
        problems = [p for p, _ in verify_files_of(found, sorted(found.files), progress) if p is not None]
    stored = StoredTensors(found)
    tables = stored.tables()
    of_tables = {t.key for t in tables.values()}
    parts: dict[str, int] = {}
    for key in stored.forms:
        part = key.split(".")[0]
        parts[part] = parts.get(part, 0) + stored.bytes_of(key)
    return CheckpointReport(
        uri=found.uri,
        step=found.step,
        world_size=found.world_size,
        files=len(found.files),
        bytes=sum(f["size"] for f in found.files.values()),
        tables=tuple(_table_record(stored, tables[name]) for name in sorted(tables)),
        dense=tuple(
            _tensor_record(stored, key, key.removeprefix("model."))
            for key in sorted(stored.forms)
            if key.startswith("model.") and key not in of_tables
        ),
        parts=parts,
        tags=tags_of(found),
        verified=verify_files,
        problems=tuple(problems),
        config=_summary(found.meta.get("config")),
        meta=found.meta,
    )


def _table_record(stored: StoredTensors, table: StoredTable) -> TableRecord:
    weight = _tensor_record(stored, table.key, table.name)
    return TableRecord(
        name=table.name,
        module=table.module,
        rows=table.rows,
        dim=table.dim,
        dtype=weight.dtype,
        bytes=weight.bytes,
        pieces=weight.pieces,
        column_blocks=tuple(width for _, width in table.blocks),
        files=len(stored.files_of([table.key])),
        states=tuple(_tensor_record(stored, key, state) for state, key in sorted(table.states.items())),
    )


def _tensor_record(stored: StoredTensors, key: str, name: str) -> TensorRecord:
    form = stored.forms[key]
    dtype = str(form.properties.dtype).removeprefix("torch.")
    return TensorRecord(name, tuple(form.size), dtype, stored.bytes_of(key), len(form.chunks))


def _wrong_sizes(checkpoint: Checkpoint) -> list[str]:
    found = io.sizes(checkpoint.uri)
    result = []
    for name, digest in sorted(checkpoint.files.items()):
        if name not in found:
            result.append(f"{io.join(checkpoint.uri, name)}: not there; the checkpoint is incomplete, use another one")
        elif found[name] != digest["size"]:
            result.append(
                f"{io.join(checkpoint.uri, name)}: {found[name]} bytes, expected {digest['size']}; the file is "
                "damaged, use another checkpoint"
            )
    return result


def _summary(config: Any) -> dict[str, Any]:
    """Of a run's configuration as the trainer saves it; whatever else was saved is passed over."""

    def section(*path: str) -> Any:
        value = config
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    sets, experts, routes = section("model", "sets"), section("model", "experts"), section("model", "routes")
    told = {
        "preset": section("model", "from_preset") or section("model", "preset"),
        "tasks": list(routes) if isinstance(routes, Mapping) else None,
        "sets": {name: s.get("dim") for name, s in sets.items()} if isinstance(sets, Mapping) else None,
        "experts": {name: e.get("kind") for name, e in experts.items()} if isinstance(experts, Mapping) else None,
        "table precision": section("model", "table_precision"),
        "table precisions": section("model", "table_precisions"),
        "table optimizer": section("train", "embedding_optimizer"),
        "batch size": section("train", "global_batch_size"),
        "plan": section("sharding", "plan"),
        "train data": section("data", "train"),
        "run": section("train", "run_dir"),
    }
    return {name: value for name, value in told.items() if value}
