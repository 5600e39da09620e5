"""Batch.sparse -> the rows that one TorchRec collection looks up: fields picked, repeated per set, hashed."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.embedding.tables import table_name
from hmoe_rec.types import Features, IdField

_GOLDEN, _MIX1, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_POSITIVE = 0x7FFFFFFFFFFFFFFF


def salt_of(set_name: str, field: str) -> int:
    """A 63-bit salt that depends on names only, so that it is the same in every process and in serving."""
    return int.from_bytes(hashlib.blake2b(table_name(set_name, field).encode(), digest_size=8).digest(), "little") >> 1


def splitmix64(x: Tensor) -> Tensor:
    """One round of the splitmix64 finalizer on int64 (two's complement, so products wrap as in uint64)."""
    x = x + _GOLDEN
    x ^= (x >> 30) & 0x3FFFFFFFF
    x *= _MIX1
    x ^= (x >> 27) & 0x1FFFFFFFFF
    x *= _MIX2
    x ^= (x >> 31) & 0x1FFFFFFFF
    return x


def hashed_rows(ids: Tensor, salt: Tensor | int, num_rows: Tensor | int) -> Tensor:
    """Raw 64-bit ids [n] -> rows [n] in [0, num_rows): the positive half of splitmix64(id ^ salt), modulo num_rows."""
    return (splitmix64(ids ^ salt) & _POSITIVE) % num_rows


class RowIds(nn.Module):
    """Picks, repeats per set, and (hashed fields) hashes the ids that one TorchRec collection looks up.

    Having no parameters and depending on the batch alone, it is run ahead by TorchRec's train pipelines. Every (set,
    field) has a salt of its own, so that ids which collide in one set are apart in another; with `IdField.salt` "field"
    all sets share one. It is applied here, after the raw ids have come with the batch once and before processes
    exchange them: the sets' rows differ, so that each has to be sent to its own owner whatever is hashed where. Rows
    leave as int32 where they fit, which halves what is exchanged.
    """

    salt: Tensor
    rows: Tensor

    def __init__(self, features: Features, wanted: Sequence[tuple[str, str]]) -> None:
        """wanted: (set, key of Batch.sparse) in the order of the features that the collection looks up."""
        super().__init__()
        keys = list(features.sparse_keys)
        fields = [features.id_field(features.targets.get(key, key)) for _, key in wanted]
        self.input_keys = keys
        self.keys = [table_name(s, key) for s, key in wanted]
        self.positions = [keys.index(key) for _, key in wanted]
        self.any_hashed = any(f.hashed for f in fields)
        self._hashes = [_hash_of(s, f) if f.hashed else None for (s, _), f in zip(wanted, fields, strict=True)]
        # Decided by the tables alone: all processes must send one type.
        self._dtype = torch.int32 if all(f.num_rows < 1 << 31 for f in fields) else torch.int64
        salts, rows = zip(*((0, 0) if h is None else h for h in self._hashes), strict=True) if wanted else ((), ())
        self.register_buffer("salt", torch.tensor(salts, dtype=torch.int64), persistent=False)
        self.register_buffer("rows", torch.tensor(rows, dtype=torch.int64), persistent=False)

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        # The key order of the first batch is frozen inside TorchRec: another order would train the wrong tables.
        if sparse.keys() != self.input_keys:
            raise ValueError(f"Batch.sparse has keys {sparse.keys()}, expected exactly {self.input_keys} in this order")
        if self.positions != list(range(len(self.input_keys))):
            sparse = sparse.permute(self.positions)
        values = sparse.values()
        if self.any_hashed:
            values = self._key_by_key(sparse) if values.device.type == "cpu" else self._at_once(sparse)
        return KeyedJaggedTensor(
            keys=self.keys,
            values=values,
            lengths=sparse.lengths(),
            length_per_key=sparse.length_per_key(),
            stride=sparse.stride(),
        )

    def _key_by_key(self, sparse: KeyedJaggedTensor) -> Tensor:
        """For a CPU: a key's ids stay in its cache through all operations."""
        result = sparse.values().new_empty(sparse.values().shape, dtype=self._dtype)
        parts = zip(sparse.values().split(sparse.length_per_key()), result.split(sparse.length_per_key()), strict=True)
        for (ids, out), h in zip(parts, self._hashes, strict=True):
            out.copy_(ids if h is None else hashed_rows(ids, *h))
        return result

    def _at_once(self, sparse: KeyedJaggedTensor) -> Tensor:
        """For a GPU: few kernels, however many keys."""
        values = sparse.values()
        counts = sparse.lengths().view(len(self.keys), -1).sum(1)
        key = torch.repeat_interleave(counts, output_size=values.numel())
        rows = self.rows.to(values.device)[key]
        hashed = hashed_rows(values, self.salt.to(values.device)[key], rows.clamp(min=1))
        return torch.where(rows > 0, hashed, values).to(self._dtype)


def _hash_of(set_name: str, field: IdField) -> tuple[int, int]:
    """(salt, number of rows)."""
    return salt_of(set_name if field.salt == "set" else "", field.name), field.num_embeddings
