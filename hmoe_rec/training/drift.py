"""What a stream's window shows before it is learned from -> ids that are new, and alarms where the data has drifted.

Both are ours: the papers name continued training and publish no monitoring.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hmoe_rec.batch import Batch
from hmoe_rec.embedding.hashing import splitmix64
from hmoe_rec.types import Features

SKETCH_BITS_PER_ROW = 16


class SeenIds:
    """Which ids earlier windows had, one bit each, in memory that does not grow.

    A field without hashing of at most `max_bits` rows has a bit per row: exact. Any other has a sketch: a bit per hash
    of the id. With a share f of its bits set, a new id looks known with probability f; the shares that `look` gives
    are corrected for that by 1 / (1 - f), so they are right on average until the sketch is full.

    Args:
        features: its id fields. Behaviors of sequences count as seen ids of the field whose table they share.
        max_bits: of a field; a power of two.
    """

    def __init__(self, features: Features, *, max_bits: int = 1 << 23) -> None:
        self.fields = tuple(f.name for f in features.ids)
        self._field_of = {key: self.fields.index(features.targets.get(key, key)) for key in features.sparse_keys}
        self._exact = [not f.hashed and f.num_rows <= max_bits for f in features.ids]
        sketches = [min(max_bits, 1 << (SKETCH_BITS_PER_ROW * f.num_rows - 1).bit_length()) for f in features.ids]
        rows = [f.num_rows for f in features.ids]
        self._bits = [r if exact else s for r, exact, s in zip(rows, self._exact, sketches, strict=True)]
        sizes = [-(-bits // 8) for bits in self._bits]
        self._bytes = torch.zeros(sum(sizes), dtype=torch.uint8)
        self._of_field = [part.numpy() for part in self._bytes.split(sizes)]
        self._looked_at: list[list[np.ndarray]] = [[] for _ in self.fields]

    def look(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Field -> share of its ids in these batches, of all ranks, that were not seen before.

        An id that comes twice counts twice. nan without ids. A collective call.
        """
        counts = torch.zeros(2, len(self.fields), dtype=torch.float64)
        self._looked_at = [[] for _ in self.fields]
        for batch in batches:
            ids = batch.sparse.values().split(batch.sparse.length_per_key())
            for key, values in zip(batch.sparse.keys(), ids, strict=True):
                i = self._field_of[key]
                place = self._places(i, values)
                self._looked_at[i].append(np.unique(place))
                if key in self.fields:
                    known = self._of_field[i][place >> 3] >> (place & 7).astype(np.uint8) & 1
                    counts[0, i] += len(place)
                    counts[1, i] += len(place) - int(known.sum())
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        filled = [0.0 if exact else self._fill(i) for i, exact in enumerate(self._exact)]
        shares = zip(self.fields, counts[0].tolist(), counts[1].tolist(), filled, strict=True)
        return {f: min(1.0, new / n / max(1 - full, 1e-9)) if n else math.nan for f, n, new, full in shares}

    def keep(self) -> None:
        """From now on the ids that were looked at last count as seen. A collective call."""
        for of_field, places in zip(self._of_field, self._looked_at, strict=True):
            if places:
                place = np.unique(np.concatenate(places))
                np.bitwise_or.at(of_field, place >> 3, np.left_shift(1, place & 7).astype(np.uint8))
        self._looked_at = [[] for _ in self.fields]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._bytes, op=dist.ReduceOp.BOR)

    def state_dict(self) -> dict[str, Tensor]:
        """Equal on all ranks; to load, fill the tensor in place."""
        return {"bits": self._bytes}

    def _places(self, field: int, ids: Tensor) -> np.ndarray:
        if not self._exact[field]:
            ids = splitmix64(ids.long()) & (self._bits[field] - 1)
        return ids.numpy().astype(np.int64, copy=False)

    def _fill(self, field: int) -> float:
        return float(np.bitwise_count(self._of_field[field]).sum()) / self._bits[field]


@dataclass(frozen=True)
class Limits:
    """When to ring; None = never.

    Attributes:
        calibration: the window's sum of predictions is more than so many times its sum of labels, or the reverse.
        label_rate: the window's share of positives against that of the windows before, likewise.
        unseen_ids: share of a field's ids that was never seen.
        min_positives: fewer positives, counted or expected, than this ring no alarm of the first two kinds.
    """

    calibration: float | None = 2.0
    label_rate: float | None = 2.0
    unseen_ids: float | None = 0.5
    min_positives: int = 100


@dataclass(frozen=True)
class Alarm:
    """kind: as in `Limits`. of: a task or a field."""

    kind: str
    of: str
    value: float
    limit: float

    def __str__(self) -> str:
        return f"{self.kind} of {self.of}: {self.value:.3g} (limit {self.limit:g})"


Results = Mapping[str, Mapping[str, float]]


def alarms_of(window: Results, before: Results, unseen: Mapping[str, float], limits: Limits) -> list[Alarm]:
    """
    Args:
        window: metrics of the window, predicted before it was learned from.
        before: metrics of the windows before it.
        unseen: of `SeenIds.look`.
    """
    found = []
    for task, now in window.items():
        positives, predicted = (now["examples"] * now[mean] for mean in ("label_mean", "prediction_mean"))
        expected = now["examples"] * before[task]["label_mean"]
        for kind, ratio_to, limit in (
            ("calibration", predicted, limits.calibration),
            ("label_rate", expected, limits.label_rate),
        ):
            enough = max(positives, ratio_to) >= limits.min_positives
            if limit is None or math.isnan(positives + ratio_to) or not enough:
                continue
            top, bottom = (predicted, positives) if kind == "calibration" else (positives, expected)
            value = top / bottom if bottom else math.inf
            if not 1 / limit <= value <= limit:
                found.append(Alarm(kind, task, value, limit))
    if limits.unseen_ids is not None:
        found += [
            Alarm("unseen_ids", field, share, limits.unseen_ids)
            for field, share in unseen.items()
            if share > limits.unseen_ids
        ]
    return found
