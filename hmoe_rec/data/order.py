"""Row counts, a seed and a step -> which rows make which batch. Pure arithmetic, the same on every rank.

An epoch is one sequence of rows: the row groups one after another, in file order or permuted by (seed, epoch). A row's
place in it is its *position*. Two ways lead from positions to batches:

    FileOrder   global batch k = positions [kB, (k+1)B); a rank takes its contiguous slice.
    LaneOrder   the sequence is cut into lanes, and every global batch takes a share of every lane, so that distant rows
                meet; inside a lane consecutive blocks are permuted. A rank owns neighboring lanes.

In both, what N ranks take side by side is what one rank takes, and every rank makes the same number of steps.
A *block* is what is prepared at once: in LaneOrder a permuted run of a lane, in FileOrder a rank's part of one step.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

ROWS_AHEAD = 1 << 16  # of FileOrder: rows of all ranks whose chunks are prepared before they are due
GROUPS, BLOCKS = 1, 2  # first word of the random streams, so that no two of them coincide


@dataclass(frozen=True)
class Take:
    """Rows [start, stop) of a block go into a batch."""

    lane: int
    block: int
    start: int
    stop: int


class FileOrder:
    """Rows in the order of the files. Blocks are numbered by the step."""

    def __init__(self, num_rows: int, batch_size: int, *, rank: int = 0, world_size: int = 1, drop_last: bool = False):
        self.num_rows, self.batch_size, self.rank, self.world_size = num_rows, batch_size, rank, world_size
        self.num_steps = _num_steps(num_rows, batch_size, drop_last)
        self.steps_ahead = max(1, ROWS_AHEAD // batch_size)

    def takes(self, step: int) -> list[Take]:
        start, stop = self.span(0, step)
        return [Take(0, step, 0, stop - start)] if stop > start else []

    def span(self, lane: int, block: int) -> tuple[int, int]:
        """Positions [start, stop) of a block."""
        first = block * self.batch_size
        n = max(0, min(self.batch_size, self.num_rows - first))
        return first + n * self.rank // self.world_size, first + n * (self.rank + 1) // self.world_size

    def permutation(self, lane: int, block: int) -> np.ndarray | None:
        """Order of the rows inside a block; None: as they are."""
        return None


class LaneOrder:
    """Rows of `lanes` distant places side by side, permuted in blocks.

    A batch takes batch_size // lanes rows of each lane, the remainder from the first ones. Lanes are as long as their
    share is large, so that all of them end in the same step.

    Args:
        lanes: at most one per row of a batch is used.
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
        lanes = min(lanes, batch_size)
        self.seed, self.epoch = seed, epoch
        self.num_steps = _num_steps(num_rows, batch_size, drop_last)
        self.shares = [batch_size // lanes + (lane < batch_size % lanes) for lane in range(lanes)]
        self.block_rows = max(block_rows, self.shares[0])
        self.bounds = [num_rows * taken // batch_size for taken in accumulate(self.shares, initial=0)]
        self.owned = range(rank * lanes // world_size, (rank + 1) * lanes // world_size)
        self.steps_ahead = self.block_rows // self.shares[0]  # one block of each lane

    def takes(self, step: int) -> list[Take]:
        found = []
        for lane in self.owned:
            length = self.bounds[lane + 1] - self.bounds[lane]
            start, stop = min(step * self.shares[lane], length), min((step + 1) * self.shares[lane], length)
            while start < stop:
                block = start // self.block_rows
                first = block * self.block_rows
                end = min(stop, first + self.block_rows)
                found.append(Take(lane, block, start - first, end - first))
                start = end
        return found

    def span(self, lane: int, block: int) -> tuple[int, int]:
        """Positions [start, stop) of a block."""
        start = self.bounds[lane] + block * self.block_rows
        return start, min(start + self.block_rows, self.bounds[lane + 1])

    def permutation(self, lane: int, block: int) -> np.ndarray:
        """Order of the rows inside a block."""
        start, stop = self.span(lane, block)
        return _generator(BLOCKS, self.seed, self.epoch, lane, block).permutation(stop - start)


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


def _num_steps(num_rows: int, batch_size: int, drop_last: bool) -> int:
    return num_rows // batch_size if drop_last else -(-num_rows // batch_size)
