"""Runs of `Rows` -> one `Batch`: the only place where numpy becomes torch. Each value is copied once, into its place.

Batch.sparse is laid out feature-major: all ids of the first key, example by example, then those of the second, ...
"""

from collections.abc import Sequence

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.batch import Batch
from hmoe_rec.data.rows import Layout, Rows, join_optional, join_present


def make_batch(parts: Sequence[Rows], layout: Layout, share: int = 0) -> Batch:
    """The rows of all parts, in their order; without parts an empty batch. share: see `Batch`."""
    parts = parts or [layout.empty()]

    def joined(name: str) -> torch.Tensor:
        arrays = [getattr(p, name) for p in parts]
        return torch.from_numpy(np.concatenate(arrays))  # a copy also of one part, which other batches may share

    return Batch(
        sparse=_sparse(parts, layout),
        ages=_ages(parts, layout),
        numbers=joined("numbers"),
        vectors=joined("vectors"),
        labels=joined("labels"),
        weights=joined("weights"),
        groups=joined("groups"),
        files=tuple(dict.fromkeys(str(origin) for p in parts for origin in p.origins)),
        longest=_longest(parts, layout),
        offsets=_optional([p.offsets for p in parts]),
        exposures=_optional([p.exposures for p in parts]),
        row_ids=joined("row_ids"),
        share=share,
    )


def _optional(arrays: Sequence[np.ndarray | None]) -> torch.Tensor | None:
    joined = join_optional(arrays)
    return None if joined is None else torch.from_numpy(joined)


def _sparse(parts: Sequence[Rows], layout: Layout) -> KeyedJaggedTensor:
    size = sum(len(p) for p in parts)
    single = np.empty((len(layout.single), size), layout.dtype)
    _fill(single, [p.single for p in parts])
    present = join_present(parts)
    if not layout.jagged and present is None:
        return _kjt(layout.keys, single.reshape(-1), torch.ones(single.size, dtype=torch.int32), size)

    lengths = np.empty((len(layout.keys), size), np.int32)
    pieces: list[list[np.ndarray]] = [[] for _ in layout.keys]
    for i, key in enumerate(layout.single):
        lengths[key] = 1 if present is None else present[i]
        pieces[key] = [single[i] if present is None else single[i][present[i]]]
    for i, columns in enumerate(layout.jagged):
        bags = [p.jagged[i] for p in parts]
        lengths[columns[0]] = np.concatenate([np.diff(bag.offsets) for bag in bags])
        for column, key in enumerate(columns):
            lengths[key] = lengths[columns[0]]
            pieces[key] = [bag.columns[column][bag.offsets[0] : bag.offsets[-1]] for bag in bags]
    values = np.concatenate([piece for of_key in pieces for piece in of_key])
    return _kjt(layout.keys, values, torch.from_numpy(lengths.reshape(-1)), size)


def _ages(parts: Sequence[Rows], layout: Layout) -> KeyedJaggedTensor | None:
    if not layout.timed:
        return None
    lengths, values = [], []
    for _, i in layout.timed:
        bags = [p.jagged[i] for p in parts]
        lengths += [np.diff(bag.offsets) for bag in bags]
        values += [bag.ages[bag.offsets[0] : bag.offsets[-1]] for bag in bags if bag.ages is not None]
    names = tuple(name for name, _ in layout.timed)
    in_order = torch.from_numpy(np.concatenate(lengths).astype(np.int32))
    return _kjt(names, np.concatenate(values), in_order, sum(len(p) for p in parts))


def _longest(parts: Sequence[Rows], layout: Layout) -> tuple[int, ...]:
    """Per sequence, the most behaviors of a row; the sequences stand behind the bags."""
    first = len(layout.jagged) - len(layout.schema.sequences)
    places = range(first, len(layout.jagged))
    return tuple(max(int(np.diff(p.jagged[i].offsets).max(initial=0)) for p in parts) for i in places)


def _kjt(keys: tuple[str, ...], values: np.ndarray, lengths: torch.Tensor, size: int) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(keys=list(keys), values=torch.from_numpy(values), lengths=lengths, stride=size)


def _fill(target: np.ndarray, parts: Sequence[np.ndarray]) -> None:
    start = 0
    for part in parts:
        target[:, start : start + part.shape[1]] = part
        start += part.shape[1]
