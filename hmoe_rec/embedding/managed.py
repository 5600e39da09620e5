"""Raw ids of managed fields -> rows, the same in all embedding sets; ids come and go, their rows start afresh.

::

    Batch.sparse ─▶ ids of a field, each once ─▶ the process of its bucket ─▶ row, or none yet ─▶ Batch.sparse with rows
                                                   └ in training: count, admit, evict ─▶ reset of rows in all tables

What is TorchRec's and what is ours: the policies are those of `torchrec.modules.mc_modules`. Its modules are not used.
They keep one map per table, so that every embedding set would have another; leave the vectors of evicted rows and their
optimizer's statistics to the next id; need row-wise tables; and bind the map to the number of processes (1.8.0: loaded
by fewer, it silently gives other rows to a fifth of the ids). Here the map is one per field, sits before the exchange
of the tables' ids, and leaves the tables to any plan; its price is an exchange of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.embedding.id_exchange import IdExchange, distinct_ids
from hmoe_rec.embedding.sharded_state import as_whole, fill_local
from hmoe_rec.embedding.slots import EMPTY, FieldRows, buckets_of
from hmoe_rec.embedding.tables import pooled_fields, sequence_targets, table_name
from hmoe_rec.types import EmbeddingSet, Features

SEEN, KNOWN, SHARED, GIVEN, EVICTED = range(5)  # columns of `totals`


class ManagedIds(nn.Module):
    """Puts rows in the place of the ids of managed fields; others pass.

    An id without a row of its own leaves as a negative number, from which `RowIds` hashes a shared row, in every set
    another. Ids are learned in training mode with gradients on, once per call; otherwise nothing changes.

    Before `place` all buckets are in this process, and rows of evicted ids are not reset.

    Args:
        features: fields of the data.
        sets: the embedding sets.

    Attributes:
        tables: table -> the managed field whose rows it holds.
        totals: [fields, 5] int64, since the beginning and of all processes: ids seen, seen with a row, seen without
            one, rows given, rows taken from another id. On the device of `place`, so that a step does not wait for it.
    """

    def __init__(self, features: Features, sets: Sequence[EmbeddingSet]) -> None:
        super().__init__()
        keys = features.sparse_keys
        owners = [features.targets.get(key, key) for key in keys]
        self.fields = tuple(f for f in features.ids if f.managed is not None)
        names = [f.name for f in self.fields]
        self.positions = {name: [i for i, owner in enumerate(owners) if owner == name] for name in names}
        self.tables = {
            table_name(s.name, name): name
            for s in sets
            for name in (*(f.name for f in pooled_fields(s, features)), *sequence_targets(s, features))
            if name in names
        }
        self.step = 0
        # On the CPU also where the model is made on another device: `place` says which.
        self._device = torch.device("cpu")
        self.totals = torch.zeros(len(names), 5, dtype=torch.int64, device=self._device)
        self._read, self._read_step = self.totals.clone(), 0  # on the CPU always
        self._exchange = IdExchange([buckets_of(f)[0] for f in self.fields])
        self._rows: list[FieldRows] | None = None
        self._evicted: list[Callable[[str, Tensor], None]] = []

    def place(self, rank: int, world_size: int, device: torch.device, reset: Callable[[str, Tensor], None]) -> None:
        """Gives this process its buckets, empty.

        Args:
            reset: called with a field's name and the rows, of the whole table, that another id has taken over; the same
                on every process.
        """
        self._device, self._rows, self._evicted = device, None, [reset]
        self.totals = self.totals.to(device)
        self._exchange = IdExchange([buckets_of(f)[0] for f in self.fields], rank, world_size)

    def watch(self, evicted: Callable[[str, Tensor], None]) -> None:
        """Calls `evicted` too, after the `reset` of `place` and with the same."""
        self._evicted.append(evicted)

    @property
    def rows(self) -> list[FieldRows]:
        """Field after field, the buckets of this process; made when they are first needed."""
        if self._rows is None:
            buckets = [self._exchange.local_buckets(i) for i in range(len(self.fields))]
            self._rows = [FieldRows(f, *b, self._device) for f, b in zip(self.fields, buckets, strict=True)]
        return self._rows

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        learn = self.training and torch.is_grad_enabled()
        parts = list(sparse.values().split(sparse.length_per_key()))
        whole = [torch.cat([parts[i] for i in at]) for at in self.positions.values()]
        found = [distinct_ids(torch.where(ids == EMPTY, EMPTY + 1, ids)) for ids in whole]
        rows = self._rows_of([x for x, _, _ in found], [n for _, _, n in found], learn=learn)
        for at, (ids, inverse, _), own in zip(self.positions.values(), found, rows, strict=True):
            values = torch.where(own >= 0, own, ids | EMPTY)[inverse]
            for i, part in zip(at, values.split([len(parts[i]) for i in at]), strict=True):
                parts[i] = part
        return KeyedJaggedTensor(
            keys=sparse.keys(),
            values=torch.cat(parts),
            lengths=sparse.lengths(),
            length_per_key=sparse.length_per_key(),
            stride=sparse.stride(),
        )

    def _rows_of(self, ids: Sequence[Tensor], times: Sequence[Tensor], *, learn: bool) -> list[Tensor]:
        buckets = [rows.bucket_of(x) for rows, x in zip(self.rows, ids, strict=True)]
        if not learn:
            return self._exchange.ask(buckets, ids, times, lambda i, x, _: self.rows[i].find(x))
        self.step += 1
        counts = torch.zeros_like(self.totals, device=self._device)
        evicted: list[Tensor] = []

        def answer(i: int, x: Tensor, n: Tensor) -> Tensor:
            done = self.rows[i].learn(x, n, self.step)
            known, shared = (n * done.known).sum(), (n * (done.rows < 0)).sum()
            figures = (n.sum(), known, shared, len(done.given), len(done.evicted))
            # Filled, not copied: a number that is copied to a device waits for it.
            counts[i] = torch.stack([x if isinstance(x, Tensor) else n.new_full((), x) for x in figures])
            evicted.append(done.evicted)
            return done.rows

        result = self._exchange.ask(buckets, ids, times, answer)
        counts, rows = self._exchange.share(counts, evicted)
        self.totals += counts
        for f, lost in zip(self.fields, rows, strict=True):
            for told in self._evicted if len(lost) else ():
                told(f.name, lost)
        return result

    def window(self) -> dict[str, dict[str, float]]:
        """Since the last call, metric -> field -> value.

        ::

            id_known_rate         of the ids seen, those that had a row before
            id_shared_rate        those that had to share one
            id_occupancy          rows that belong to an id, of all that can
            id_given_per_step     rows that ids have got
            id_evicted_per_step   of those, the ones that another id has lost
        """
        totals = self.totals.cpu().clone()
        counts = (totals - self._read).double()
        steps = max(1, self.step - self._read_step)
        self._read, self._read_step = totals, self.step
        seen = counts[:, SEEN].clamp(min=1)
        capacity = torch.tensor([math.prod(buckets_of(f)) for f in self.fields])
        values = {
            "id_known_rate": counts[:, KNOWN] / seen,
            "id_shared_rate": counts[:, SHARED] / seen,
            "id_occupancy": (totals[:, GIVEN] - totals[:, EVICTED]).double() / capacity,
            "id_given_per_step": counts[:, GIVEN] / steps,
            "id_evicted_per_step": counts[:, EVICTED] / steps,
        }
        return {name: dict(zip(self.positions, x.tolist(), strict=True)) for name, x in values.items()}

    def local_ids(self) -> dict[str, tuple[Tensor, int]]:
        """Field -> (the ids that the rows of this process belong to, sharing memory; the first of these rows)."""
        return {f.name: (r.rows.ids.view(-1), r.first * r.ways) for f, r in zip(self.fields, self.rows, strict=True)}

    # ------------------------------------------------------------------------------------------------- checkpoints

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for i, f in enumerate(self.fields):
            for name, (local, bounds) in self._parts(i).items():
                destination[f"{prefix}{f.name}.{name}"] = as_whole(local, bounds, self._exchange.rank)
        destination[f"{prefix}steps"] = torch.tensor([self.step, self._read_step])
        destination[f"{prefix}totals"] = torch.stack([self.totals.cpu(), self._read])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        missing, unexpected = args[2], args[3]
        known = set()
        for i, f in enumerate(self.fields):
            for name, (local, bounds) in self._parts(i).items():
                known.add(key := f"{prefix}{f.name}.{name}")
                if key in state_dict:
                    fill_local(local, state_dict[key], bounds[self._exchange.rank])
        known |= {f"{prefix}steps", f"{prefix}totals"}
        if known <= state_dict.keys():
            self.step, self._read_step = state_dict[f"{prefix}steps"].tolist()
            totals, self._read = (x.clone() for x in state_dict[f"{prefix}totals"].cpu())
            self.totals = totals.to(self._device)
        missing += sorted(known - state_dict.keys())
        unexpected += sorted(key for key in state_dict if key.startswith(prefix) and key not in known)

    def _parts(self, field: int) -> dict[str, tuple[Tensor, list[int]]]:
        """Name -> (values of this process, first place of every process and the end)."""
        buckets = self._exchange.bounds(field)
        return {
            name: (values, [b * ways for b in buckets]) for name, (values, ways) in self.rows[field].state().items()
        }


def managed_ids(module: nn.Module) -> ManagedIds | None:
    """Those of the model below `module`; None where no field is managed."""
    return next((m for m in module.modules() if isinstance(m, ManagedIds)), None)


def managed_tables(module: nn.Module) -> set[str]:
    """Tables below `module` whose rows are managed."""
    found = managed_ids(module)
    return set() if found is None else set(found.tables)
