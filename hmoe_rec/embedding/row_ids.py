"""Batch.sparse -> the rows that one TorchRec collection looks up: fields picked, repeated per set, hashed."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.embedding.hashing import hashed_rows, salt_of
from hmoe_rec.embedding.tables import table_name
from hmoe_rec.types import Features, IdField

_CACHED = 1 << 15  # ids


class RowIds(nn.Module):
    """Picks, repeats per set, and (hashed fields) hashes the ids that one TorchRec collection looks up.

    Having no parameters and depending on the batch alone, it can be run ahead of the step together with the exchange of
    the rows: TorchRec's pipelines do so if they are made with `pipeline_postproc` (training/loop.py). Every (set,
    field) has a salt of its own, so that ids which collide in one set are apart in another; with `IdField.salt` "field"
    all sets share one. It is applied here, after the raw ids have come with the batch once and before processes
    exchange them: the sets' rows differ, so that each has to be sent to its own owner whatever is hashed where. Rows
    leave as int32 where they fit, which halves what is exchanged.

    Managed fields come with rows from `ManagedIds`; negative numbers are ids without a row of their own, which are
    hashed into the shared rows at the end of the table.
    """

    salt: Tensor
    rows: Tensor
    first: Tensor

    def __init__(self, features: Features, wanted: Sequence[tuple[str, str]]) -> None:
        """wanted: (set, key of Batch.sparse) in the order of the features that the collection looks up."""
        super().__init__()
        keys = list(features.sparse_keys)
        fields = [features.id_field(features.targets.get(key, key)) for _, key in wanted]
        self.input_keys = keys
        self.keys = [table_name(s, key) for s, key in wanted]
        self.positions = [keys.index(key) for _, key in wanted]
        self.any_hashed = any(f.hashed for f in fields)
        self._hashes = [_Hash.of(s, f) if f.hashed else None for (s, _), f in zip(wanted, fields, strict=True)]
        # Decided by the tables alone: all processes must send one type.
        self._dtype = torch.int32 if all(f.num_rows < 1 << 31 for f in fields) else torch.int64
        for name in ("salt", "rows", "first"):
            values = [getattr(h, name) if h is not None else 0 for h in self._hashes]
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        # The key order of the first batch is frozen inside TorchRec: another order would train the wrong tables.
        if sparse.keys() != self.input_keys:
            raise ValueError(f"Batch.sparse has keys {sparse.keys()}, expected exactly {self.input_keys} in this order")
        if self.positions != list(range(len(self.input_keys))):
            sparse = sparse.permute(self.positions)
        if not self.any_hashed:
            values = sparse.values().to(self._dtype)
        else:
            values = self._run_by_run(sparse) if sparse.values().device.type == "cpu" else self._at_once(sparse)
        return KeyedJaggedTensor(
            keys=self.keys,
            values=values,
            lengths=sparse.lengths(),
            length_per_key=sparse.length_per_key(),
            stride=sparse.stride(),
        )

    def _run_by_run(self, sparse: KeyedJaggedTensor) -> Tensor:
        """For a CPU: keys of one kind and length together, as many as its cache holds through all operations."""
        lengths, begin = sparse.length_per_key(), 0
        result = sparse.values().new_empty(sparse.values().shape, dtype=self._dtype)
        for first, last in self._runs(lengths):
            end = begin + (last - first) * lengths[first]
            ids = sparse.values()[begin:end].view(last - first, lengths[first])
            kind = self._hashes[first]
            if kind is not None:
                salt, rows, start = (x[first:last, None] for x in (self.salt, self.rows, self.first))
                hashed = hashed_rows(ids, salt, rows)
                ids = torch.where(ids < 0, hashed + start, ids) if kind.first else hashed
            result[begin:end] = ids.view(-1)
            begin = end
        return result

    def _runs(self, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
        first = 0
        kinds = [None if h is None else h.first > 0 for h in self._hashes]
        for i in range(1, len(lengths) + 1):
            full = (i - first + 1) * lengths[first] > _CACHED
            if i == len(lengths) or full or (kinds[i], lengths[i]) != (kinds[first], lengths[first]):
                yield first, i
                first = i

    def _at_once(self, sparse: KeyedJaggedTensor) -> Tensor:
        """For a GPU: few kernels, however many keys."""
        values = sparse.values()
        counts = sparse.lengths().view(len(self.keys), -1).sum(1)
        key = torch.repeat_interleave(counts, output_size=values.numel())
        rows, first = self.rows.to(values.device)[key], self.first.to(values.device)[key]
        hashed = hashed_rows(values, self.salt.to(values.device)[key], rows.clamp(min=1)) + first
        wanted = (rows > 0) & ((first == 0) | (values < 0))
        return torch.where(wanted, hashed, values).to(self._dtype)


class _Hash(NamedTuple):
    """Where ids go: to rows [first, first + rows); of a managed field (first > 0) those that have no row."""

    salt: int
    rows: int
    first: int

    @classmethod
    def of(cls, set_name: str, field: IdField) -> "_Hash":
        salt = salt_of(set_name if field.salt == "set" else "", field.name)
        if field.managed is None:
            return cls(salt, field.num_embeddings, 0)
        return cls(salt, field.managed.shared_rows, field.num_embeddings)
