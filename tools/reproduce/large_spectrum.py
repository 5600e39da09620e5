"""The spectrum of a table that does not fit into memory: a checkpoint of any size, its spectrum, time and peak memory.

    python tools/reproduce/large_spectrum.py --rows 50000000 --dim 64 --folder /tmp/large_table

Rows are drawn chunk by chunk with planted singular values and written as torch.distributed.checkpoint does; then the
analysis reads them back as it reads any run's checkpoint. What was written is removed again.
"""

import math
import resource
import shutil
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from findings import write_findings
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from hmoe_rec.analysis.report import ReportTable, Section
from hmoe_rec.analysis.spectra import CHUNK_ROWS, field_grams, field_tables
from hmoe_rec.metrics.spectrum import information_abundance, random_reference, singular_values
from hmoe_rec.training.checkpoint import Checkpoint
from hmoe_rec.training.checkpoint_metadata import TENSORS, from_metadata, to_json
from hmoe_rec.training.checkpoint_rows import StoredTensors

KEY = "model.embedding.ebc.embedding_bags.shared__id.weight"
PIECE_BYTES = 1 << 25  # small, so that the peak is that of the analysis


def planted_values(dim: int) -> torch.Tensor:
    """Falling by a factor of 100 over the width."""
    return torch.logspace(0, -2, dim, dtype=torch.float64)


def write_table(folder: Path, rows: int, dim: int, piece_bytes: int = PIECE_BYTES) -> Checkpoint:
    """rows x dim float32 in one file, a piece of rows in memory at a time: Gaussian columns times planted values."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    piece_rows = max(1, piece_bytes // (4 * dim))
    scale_D = planted_values(dim).float()
    form = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size((rows, dim)), [])
    places: dict[MetadataIndex, _StorageInfo] = {}
    with open(folder / "__0_0.distcp", "wb") as file:
        for start in range(0, rows, piece_rows):
            piece = torch.randn(min(piece_rows, rows - start), dim, generator=generator).mul_(scale_D)
            begin, offsets = file.tell(), torch.Size((start, 0))
            torch.save(piece, file)
            form.chunks.append(ChunkStorageMetadata(offsets, piece.shape))
            places[MetadataIndex(KEY, offsets)] = _StorageInfo("__0_0.distcp", begin, file.tell() - begin)
    (folder / TENSORS).write_bytes(to_json(from_metadata(Metadata({KEY: form}, storage_data=places))))
    return Checkpoint(str(folder), 0, 1)


def spectrum(checkpoint: Checkpoint) -> torch.Tensor:
    """The singular values of the checkpoint's only table, as `analyze collapse` finds them."""
    stored = StoredTensors(checkpoint)
    (grams,) = field_grams(stored, field_tables(stored, {}, lambda field: True))
    return singular_values(grams.raw)


def peak_bytes() -> int:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(
    rows: Annotated[int, typer.Option(help="Rows of the table.")] = 50_000_000,
    dim: Annotated[int, typer.Option(help="Its width.")] = 64,
    folder: Annotated[Path, typer.Option(help="Where the table is written; must not exist.")] = Path(
        "runs/large_table"
    ),
    keep: Annotated[bool, typer.Option("--keep", help="Do not remove it.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the findings.")] = Path("runs/large_spectrum"),
) -> None:
    """Write a large table, read its spectrum, say how long it took and how much memory."""
    size = 4 * rows * dim
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if folder.exists() or free < 1.1 * size:
        raise typer.BadParameter(f"{folder}: must not exist and needs {1.1 * size / 1e9:.1f} GB, {free / 1e9:.1f} free")
    before = peak_bytes()
    try:
        began = time.perf_counter()
        checkpoint = write_table(folder, rows, dim, min(PIECE_BYTES, max(4 * dim, size // 8)))
        written, peak_of_writing = time.perf_counter() - began, peak_bytes()
        began, began_cpu = time.perf_counter(), time.process_time()
        values = spectrum(checkpoint)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    error = float((values / (planted_values(dim) * math.sqrt(rows)) - 1).abs().max())
    numbers = {
        "rows": rows,
        "dim": dim,
        "bytes": size,
        "seconds_writing": written,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "threads": torch.get_num_threads(),
        "peak_bytes_before": before,
        "peak_bytes_writing": peak_of_writing,
        "peak_bytes": peak_bytes(),
        "chunk_bytes": 8 * CHUNK_ROWS * dim,
        "information_abundance": float(information_abundance(values)),
        "of_a_random_table": random_reference(rows, dim),
        "largest_relative_error": error,
        "singular_values": values.tolist(),
    }
    gib = 1 << 30
    header = ["rows", "width", "table", "spectrum", "CPU time", "rows per second", "peak memory", "before", "error"]
    line = [
        f"{rows:,}",
        str(dim),
        f"{size / 1e9:.2f} GB",
        f"{seconds:.1f} s",
        f"{cpu_seconds:.1f} s",
        f"{rows / seconds:,.0f}",
        f"{peak_bytes() / gib:.2f} GiB",
        f"{before / gib:.2f} GiB",
        f"{error:.1e}",
    ]
    miss = 1 / math.sqrt(2 * rows)
    summary = [
        f"Chunks of {CHUNK_ROWS:,} rows, {torch.get_num_threads()} thread(s); writing took {written:.0f} s.",
        f"Error: against the planted singular values, which the draw itself misses by about {miss:.0e}.",
    ]
    table = ReportTable("Raw and row-normalized spectrum in one pass over the checkpoint", header, [line], left=0)
    write_findings(Section("large_spectrum", "Spectrum of a large table", summary, [table], (), numbers), out)


if __name__ == "__main__":
    typer.run(main)
