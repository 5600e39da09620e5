"""A checkpoint's tables, read in chunks of rows -> their Gram matrices, of any size, on any number of processes.

No table is ever held: a chunk of rows goes through memory, and what stays is a matrix as wide as the tables. Of several
processes each reads every so many-th chunk, and the matrices are added up.

A *field* is looked up in a table per embedding set. Where row r means the same id in all of them, their columns are put
side by side, so that one matrix also says how the sets relate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hmoe_rec.metrics.spectrum import gram
from hmoe_rec.progress import Progress
from hmoe_rec.training.checkpoint_rows import StoredTable, StoredTensors

CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class FieldTables:
    """Tables whose row r is the same id.

    Attributes:
        name: the field.
        tables: embedding set -> its table.
    """

    name: str
    tables: Mapping[str, StoredTable]

    @property
    def rows(self) -> int:
        return next(iter(self.tables.values())).rows

    def columns(self, embedding_set: str) -> slice:
        """Its columns among those of all sets side by side."""
        start = 0
        for name, table in self.tables.items():
            if name == embedding_set:
                return slice(start, start + table.dim)
            start += table.dim
        raise KeyError(embedding_set)


@dataclass(frozen=True)
class FieldGrams:
    """Gram matrices of a field's tables side by side, float64 [C, C].

    Attributes:
        raw: of the rows as they are.
        normalized: of rows of length 1, per set (the blocks on the diagonal; the rest is not filled).
        weighted: of rows times the root of how often they occur in the data; None where that was not counted.
        sum_C: the sum over rows.
    """

    raw: Tensor
    normalized: Tensor
    sum_C: Tensor
    weighted: Tensor | None = None

    def centered(self, rows: int) -> Tensor:
        """The raw one of tables whose columns have mean 0."""
        return self.raw - torch.outer(self.sum_C, self.sum_C) / rows


def field_tables(
    stored: StoredTensors, places: Mapping[str, tuple[str, str]], same_rows: Callable[[str], bool]
) -> list[FieldTables]:
    """The fields of a checkpoint.

    Args:
        places: table -> its set and field (`places_of_tables`); a table that is not there is a field by itself.
        same_rows: field -> row r of all its tables is the same id. Not so where every set hashes with a salt of its
            own; such a field appears once per set.
    """
    fields: dict[tuple[str, str], dict[str, StoredTable]] = {}
    for name, table in stored.tables().items():
        embedding_set, field = places.get(name, ("", name))
        fields.setdefault((field, "" if same_rows(field) else embedding_set), {})[embedding_set] = table
    return [FieldTables(field, tables) for (field, _), tables in fields.items()]


def field_grams(
    stored: StoredTensors,
    fields: Sequence[FieldTables],
    *,
    counts: Mapping[str, Tensor] | None = None,
    rank: int = 0,
    world_size: int = 1,
    total: Callable[[Tensor], Tensor] | None = None,
    progress: Progress | None = None,
) -> Iterator[FieldGrams]:
    """Of one field after the other.

    Args:
        counts: table -> [rows] how often each row occurs in the data.
        rank, world_size: this process reads chunks rank, rank + world_size, ...
        total: adds up a tensor over all processes; needed where there are several.
        progress: is called with the rows done and all rows.

    Raises:
        CheckpointError: a file is damaged.
    """
    all_rows, done = sum(f.rows for f in fields), 0
    for field in fields:
        width = sum(table.dim for table in field.tables.values())
        parts = torch.zeros(3, width, width, dtype=torch.float64)
        sum_C = torch.zeros(width, dtype=torch.float64)
        starts = list(range(0, field.rows, CHUNK_ROWS))
        for start in starts[rank::world_size]:
            rows = min(CHUNK_ROWS, field.rows - start)
            chunk = torch.cat(
                [stored.read(t.key, (start, 0), (rows, t.dim)) for t in field.tables.values()], 1
            ).double()
            parts[0] += gram(chunk)
            sum_C += chunk.sum(0)
            for name, table in field.tables.items():
                own = field.columns(name)
                parts[1, own, own] += gram(chunk[:, own], normalize_rows=True)
                if counts is not None:
                    parts[2, own, own] += gram(chunk[:, own] * counts[table.name][start : start + rows, None].sqrt())
            if progress is not None:
                progress(min(all_rows, done + start + rows), all_rows)
        done += field.rows
        if total is not None:
            parts, sum_C = total(parts), total(sum_C)
        yield FieldGrams(parts[0], parts[1], sum_C, parts[2] if counts is not None else None)
