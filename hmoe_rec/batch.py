"""The one record that walks through all rooms: a batch of examples as tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from hmoe_rec.types import MISSING_LABEL


@dataclass(frozen=True)
class Batch(Pipelineable):
    """B examples. Nobody adds to it on the way; a stage returns something new.

    ::

        sparse   keys = id fields, then behavior columns, always all and in the schema's order (`Features.sparse_keys`):
                              example 0      example 1
            user_id           [17]           [4]
            tags              [3, 9]         []
            hist_video_id     [5, 2, 8]      [7]           oldest first

    Attributes:
        sparse: ids; int64, or int32 where no field is hashed. Ids of hashed fields are raw 64-bit values.
        ages: per sequence with times, seconds (>= 0, float32) between each behavior and the exposure; else None.
        numbers: [B, N] float32; NaN = missing.
        vectors: [B, sum of dims] float32, the vector fields side by side.
        labels: [B, T] float32 in {0, 1}; NaN = missing.
        weights: [B] float32, weight of the example in loss and metrics.
        groups: [B] int64, hash of the user key for metrics and losses within users, HASH_OF_MISSING where it is null;
            zeros without a user key.
        files: where the examples came from, for error messages.
        longest: per sequence, in the order of `Features.sequences`, the most behaviors of an example, which the
            model pads to; () = not known, so it pads to the sequence's max_length.
        offsets: [B, T] float32, added to the logits in the loss, such as -ln(rate) of sampled negatives; None = 0.
        exposures: [B] int32, how often the example's user was shown its item before; None = not known.
        row_ids: [B] int64, a number that belongs to the example in every epoch and for any number of processes
            (the name of its file and its row there); None = not known.
        share: examples of the rank that holds most of the global batch, the same number on every rank; 0 = not known.
    """

    sparse: KeyedJaggedTensor
    ages: KeyedJaggedTensor | None
    numbers: Tensor
    vectors: Tensor
    labels: Tensor
    weights: Tensor
    groups: Tensor
    files: tuple[str, ...] = ()
    longest: tuple[int, ...] = ()
    offsets: Tensor | None = None
    exposures: Tensor | None = None
    row_ids: Tensor | None = None
    share: int = 0

    @classmethod
    def of(
        cls,
        sparse: KeyedJaggedTensor,
        labels: Tensor,
        *,
        numbers: Tensor | None = None,
        vectors: Tensor | None = None,
        weights: Tensor | None = None,
        ages: KeyedJaggedTensor | None = None,
        offsets: Tensor | None = None,
        exposures: Tensor | None = None,
        row_ids: Tensor | None = None,
    ) -> "Batch":
        """For a loader of one's own: what is left out is empty, or 1 for the weights.

        Args:
            sparse: keys exactly `Features.sparse_keys`.
            labels: [B, T]; its B and device are those of the batch.
            ages: needed where a sequence has times (`SequenceField.has_ages`).
        """
        nothing, size = labels.new_empty(len(labels), 0), len(labels)
        return cls(
            sparse,
            ages,
            nothing if numbers is None else numbers,
            nothing if vectors is None else vectors,
            labels,
            labels.new_ones(size) if weights is None else weights,
            torch.zeros(size, dtype=torch.int64, device=labels.device),
            offsets=offsets,
            exposures=exposures,
            row_ids=row_ids,
        )

    def __len__(self) -> int:
        return self.weights.shape[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        def move(x):
            return x.to(device=device, non_blocking=non_blocking)

        return Batch(
            move(self.sparse),
            None if self.ages is None else move(self.ages),
            move(self.numbers),
            move(self.vectors),
            move(self.labels),
            move(self.weights),
            move(self.groups),
            self.files,
            self.longest,
            None if self.offsets is None else move(self.offsets),
            None if self.exposures is None else move(self.exposures),
            None if self.row_ids is None else move(self.row_ids),
            self.share,
        )

    def filled(self) -> "Batch":
        """Itself, or with examples at its end that change nothing, so that it has `share` of them, and one at least.

        They have no ids and no labels, and weight 0: no loss, gradient, metric or count of rows sees them. Where rows
        of a table are on several ranks, TorchRec and gloo exchange parts of equal size only; no part may be empty.
        """
        missing = max(self.share, 1) - len(self)
        if missing <= 0:
            return self

        def more(x: Tensor | None, value: float = 0) -> Any:
            return None if x is None else torch.cat([x, x.new_full((missing, *x.shape[1:]), value)])

        return Batch(
            _with_empty(self.sparse, missing),
            None if self.ages is None else _with_empty(self.ages, missing),
            more(self.numbers),
            more(self.vectors),
            more(self.labels, MISSING_LABEL),
            more(self.weights),
            more(self.groups),
            self.files,
            self.longest,
            more(self.offsets),
            more(self.exposures),
            more(self.row_ids),
            self.share,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        for x in self._tensors():
            x.record_stream(stream)

    def pin_memory(self) -> "Batch":
        return Batch(
            self.sparse.pin_memory(),
            None if self.ages is None else self.ages.pin_memory(),
            self.numbers.pin_memory(),
            self.vectors.pin_memory(),
            self.labels.pin_memory(),
            self.weights.pin_memory(),
            self.groups.pin_memory(),
            self.files,
            self.longest,
            None if self.offsets is None else self.offsets.pin_memory(),
            None if self.exposures is None else self.exposures.pin_memory(),
            None if self.row_ids is None else self.row_ids.pin_memory(),
            self.share,
        )

    def _tensors(self) -> list:
        tensors = [self.sparse, self.numbers, self.vectors, self.labels, self.weights, self.groups]
        return [*tensors, *(x for x in (self.ages, self.offsets, self.exposures, self.row_ids) if x is not None)]


def _with_empty(jagged: KeyedJaggedTensor, more: int) -> KeyedJaggedTensor:
    """With `more` examples at its end that have no values. Values lie key by key, so that they stay where they are."""
    keys = jagged.keys()
    lengths_KB = jagged.lengths().view(len(keys), jagged.stride())
    lengths = torch.cat([lengths_KB, lengths_KB.new_zeros(len(keys), more)], 1)
    return KeyedJaggedTensor(
        keys=keys, values=jagged.values(), lengths=lengths.flatten(), stride=jagged.stride() + more
    )
