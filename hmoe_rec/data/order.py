"""Row counts, a seed and a step -> which rows make which batch. Pure arithmetic, the same on every rank.

An epoch is one sequence of rows: the row groups one after another, in file order or permuted by (seed, epoch). A row's
place in it is its *position*. Two ways lead from positions to batches:

    FileOrder   global batch k = positions [kB, (k+1)B).
    LaneOrder   the sequence is cut into lanes, and every global batch takes a share of every lane, one after another,
                so that distant rows meet; inside a lane consecutive blocks are permuted.

Either way a global batch is a sequence of n rows, and rank r of W takes rows [n r / W, n (r + 1) / W) of it, rounded
down: shares differ by one row at most, what W ranks take side by side is what one rank takes, and every rank makes the
same number of steps. A lane may be shared by neighboring ranks, each of which reads it and decodes its own rows.
A *block* is what is prepared at once, of the rank's own rows: in LaneOrder those of a permuted run of a lane, in
FileOrder its part of one step.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

ROWS_AHEAD = 1 << 16  # of FileOrder: rows of all ranks whose chunks are prepared before they are due
GROUPS, BLOCKS = 1, 2  # first word of the random streams, so that no two of them coincide
MIN_LANES, MAX_LANES, ROWS_PER_LANE = 8, 128, 8192


@dataclass(frozen=True)
class Take:
    """Rows [start, stop) of a block's `size` go into a batch."""

    lane: int
    block: int
    start: int
    stop: int
    size: int


class _Order:
    """What both orders know of a step."""

    def __init__(self, num_rows: int, batch_size: int, *, rank: int = 0, world_size: int = 1, drop_last: bool = False):
        self.num_rows, self.batch_size, self.rank, self.world_size = num_rows, batch_size, rank, world_size
        self.full_steps = num_rows // batch_size
        self.num_steps = self.full_steps if drop_last else -(-num_rows // batch_size)

    def largest_share(self, step: int) -> int:
        """Rows of the rank that has most of them in a step."""
        return -(-self._rows_of(step) // self.world_size)

    @property
    def takes_all(self) -> bool:
        """Every row of the epoch goes to this rank."""
        return self.world_size == 1 and self.num_steps * self.batch_size >= self.num_rows

    def _rows_of(self, step: int) -> int:
        """Of the global batch."""
        return max(0, min(self.batch_size, self.num_rows - step * self.batch_size))


class FileOrder(_Order):
    """Rows in the order of the files. Blocks are numbered by the step."""

    @property
    def steps_ahead(self) -> int:
        """Steps whose blocks are prepared before they are due."""
        return max(1, ROWS_AHEAD // self.batch_size)

    def takes(self, step: int) -> list[Take]:
        start, stop = self.span(0, step)
        return [Take(0, step, 0, stop - start, stop - start)] if stop > start else []

    def span(self, lane: int, block: int) -> tuple[int, int]:
        """Positions [start, stop) that a block is made from."""
        start, stop = _share(self._rows_of(block), self.rank, self.world_size)
        return block * self.batch_size + start, block * self.batch_size + stop

    def picks(self, lane: int, block: int) -> np.ndarray | None:
        """The block's rows among those of its span, in their order; None: all, as they are."""
        return None

    def wanted(self, start: int, stop: int) -> np.ndarray | None:
        """Which of the positions [start, stop) this rank takes, bool; None: all."""
        if self.takes_all:
            return None
        step, place = np.divmod(np.arange(start, stop), self.batch_size)
        sizes = np.where(step < self.num_steps, np.minimum(self.num_rows - step * self.batch_size, self.batch_size), 0)
        return (place >= sizes * self.rank // self.world_size) & (place < sizes * (self.rank + 1) // self.world_size)


class LaneOrder(_Order):
    """Rows of `lanes` distant places side by side, permuted in blocks.

    A batch takes batch_size // lanes rows of each lane, the remainder from the first ones. Lanes are as long as their
    share is large, so that all of them end in the same step.

    Args:
        lanes: at most one per row of a batch is used. The order depends on it.
        block_rows: rows of a lane that are permuted together, at least as many as a batch takes of it.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        lanes: int,
        block_rows: int,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ):
        super().__init__(num_rows, batch_size, rank=rank, world_size=world_size, drop_last=drop_last)
        lanes = min(lanes, batch_size)
        self.seed, self.epoch = seed, epoch
        self.shares = [batch_size // lanes + (lane < batch_size % lanes) for lane in range(lanes)]
        self.block_rows = max(block_rows, self.shares[0])
        self.bounds = [num_rows * taken // batch_size for taken in accumulate(self.shares, initial=0)]
        self.steps_ahead = self.block_rows // self.shares[0]  # steps whose blocks are prepared: one of each lane
        rests = [self._length(lane) - self.full_steps * share for lane, share in enumerate(self.shares)]
        self._own = _cut(self.shares, rank, world_size)
        # The last batch may be smaller, or left out.
        self._last = _cut(rests if self.num_steps > self.full_steps else [0] * lanes, rank, world_size)

    def takes(self, step: int) -> list[Take]:
        found = []
        for lane, (first, last) in enumerate(self._own if step < self.full_steps else self._last):
            start, stop = step * self.shares[lane] + first, step * self.shares[lane] + last
            while start < stop:
                block = start // self.block_rows
                begin, end = block * self.block_rows, min((block + 1) * self.block_rows, self._length(lane))
                before = self._own_before(lane, begin)
                counts = (self._own_before(lane, x) - before for x in (start, min(stop, end), end))
                found.append(Take(lane, block, *counts))
                start = end
        return found

    def span(self, lane: int, block: int) -> tuple[int, int]:
        """Positions [start, stop) that a block is made from."""
        start = self.bounds[lane] + block * self.block_rows
        return start, min(start + self.block_rows, self.bounds[lane + 1])

    def picks(self, lane: int, block: int) -> np.ndarray:
        """The block's rows among those of its span, in their order."""
        start, stop = self.span(lane, block)
        permutation = _generator(BLOCKS, self.seed, self.epoch, lane, block).permutation(stop - start)
        if self.takes_all:
            return permutation
        rows = np.arange(stop - start) + start - self.bounds[lane]
        step, place = np.divmod(rows, self.shares[lane])
        first, last = np.array([self._last[lane], self._own[lane]])[(step < self.full_steps).astype(int)].T
        return permutation[(place >= first) & (place < last)]

    def wanted(self, start: int, stop: int) -> np.ndarray | None:
        """Which of the positions [start, stop) this rank takes, bool; None: all."""
        if self.takes_all:
            return None
        found = np.zeros(stop - start, bool)
        position = start
        while position < stop:
            lane = bisect_right(self.bounds, position) - 1
            block = (position - self.bounds[lane]) // self.block_rows
            first, position = self.span(lane, block)
            if self._own_before(lane, self._length(lane)):
                picked = self.picks(lane, block) + (first - start)
                found[picked[(picked >= 0) & (picked < len(found))]] = True
        return found

    def _length(self, lane: int) -> int:
        return self.bounds[lane + 1] - self.bounds[lane]

    def _own_before(self, lane: int, row: int) -> int:
        """Of the first `row` rows of a lane, those of this rank."""
        steps = min(row // self.shares[lane], self.full_steps)
        first, last = self._own[lane]
        (start, stop) = (first, last) if steps < self.full_steps else self._last[lane]
        rest = row - steps * self.shares[lane]
        return steps * (last - first) + min(max(rest - start, 0), stop - start)


def default_lanes(batch_size: int) -> int:
    """Lanes where none are given, by what belongs to the run alone: one per 8,192 rows of a global batch, 8 to 128.

    So many rows are about what a device takes: jobs of many ranks have a lane per rank or more, and few lanes are read
    by several ranks; jobs of few ranks do not hold chunks of more lanes than they need.
    """
    return min(MAX_LANES, max(MIN_LANES, batch_size // ROWS_PER_LANE))


class Pieces:
    """Chunks of rows laid end to end: positions -> chunks.

    Args:
        rows: rows of each chunk, in the epoch's order.
    """

    def __init__(self, rows: list[int]):
        self.starts = [0, *accumulate(rows)]

    def of(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(chunk, first row in it, last row in it + 1) of positions [start, stop), in order."""
        found = []
        chunk = bisect_right(self.starts, start) - 1
        while start < stop:
            first, end = self.starts[chunk], min(stop, self.starts[chunk + 1])
            if end > start:
                found.append((chunk, start - first, end - first))
            start, chunk = end, chunk + 1
        return found

    def end(self, chunk: int) -> int:
        """Position after a chunk's last row."""
        return self.starts[chunk + 1]


def group_order(num_groups: int, *, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of the row groups in an epoch."""
    if not shuffle:
        return list(range(num_groups))
    return _generator(GROUPS, seed, epoch).permutation(num_groups).tolist()


def _generator(*words: int) -> np.random.Generator:
    return np.random.default_rng([word & (2**64 - 1) for word in words])


def _share(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rows [start, stop) of a global batch that are a rank's; over the ranks, of sizes that differ by one at most."""
    return num_rows * rank // world_size, num_rows * (rank + 1) // world_size


def _cut(rows: list[int], rank: int, world_size: int) -> list[tuple[int, int]]:
    """Rows of each lane in a batch, lane after lane -> those of a rank, [start, stop) in each lane's rows."""
    start, stop = _share(sum(rows), rank, world_size)
    starts = accumulate(rows, initial=0)
    return [(min(max(start - s, 0), n), min(max(stop - s, 0), n)) for s, n in zip(starts, rows, strict=False)]
