import itertools

import numpy as np
import pytest

from hmoe_rec.data.order import FileOrder, LaneOrder, Pieces, group_order

SIZES = [(1, 1), (7, 3), (10, 10), (11, 4), (53, 8), (64, 16), (100, 7), (101, 24), (257, 32)]


def positions(order, step):
    """Positions of the rows of one step, in the batch's order."""
    found = []
    for take in order.takes(step):
        start, stop = order.span(take.lane, take.block)
        permutation = order.permutation(take.lane, take.block)
        rows = np.arange(start, stop) if permutation is None else start + permutation
        found.append(rows[take.start : take.stop])
    return np.concatenate(found).tolist() if found else []


def epochs(num_rows, batch, rank=0, world_size=1, **options):
    yield FileOrder(num_rows, batch, rank=rank, world_size=world_size, **options)
    for lanes, block_rows in [(8, 5), (8, 1000), (5, 1), (16, 7)]:
        settings = dict(lanes=lanes, block_rows=block_rows, seed=3, epoch=2)
        yield LaneOrder(num_rows, batch, rank=rank, world_size=world_size, **settings, **options)


@pytest.mark.parametrize(("num_rows", "batch"), SIZES)
def test_every_row_comes_once_in_full_batches(num_rows, batch):
    for order in epochs(num_rows, batch):
        steps = [positions(order, step) for step in range(order.num_steps)]
        assert sorted(itertools.chain(*steps)) == list(range(num_rows))
        assert order.num_steps == -(-num_rows // batch)
        full = num_rows // batch
        assert all(len(rows) == batch for rows in steps[:full])


@pytest.mark.parametrize(("num_rows", "batch"), SIZES)
def test_drop_last_keeps_the_full_batches(num_rows, batch):
    for order, short in zip(epochs(num_rows, batch), epochs(num_rows, batch, drop_last=True), strict=True):
        assert short.num_steps == num_rows // batch
        for step in range(short.num_steps):
            assert positions(short, step) == positions(order, step)


@pytest.mark.parametrize(("num_rows", "batch"), SIZES)
@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
def test_ranks_side_by_side_make_the_batch_of_one(num_rows, batch, world_size):
    ranks = zip(*(epochs(num_rows, batch, rank=r, world_size=world_size) for r in range(world_size)), strict=True)
    for order, parts in zip(epochs(num_rows, batch), ranks, strict=True):
        assert {part.num_steps for part in parts} == {order.num_steps}
        for step in range(order.num_steps):
            together = list(itertools.chain(*(positions(part, step) for part in parts)))
            assert together == positions(order, step)


def test_file_order_is_the_order_of_the_files():
    order = FileOrder(23, 5)
    assert [positions(order, step) for step in range(5)] == [list(range(k, min(k + 5, 23))) for k in range(0, 23, 5)]


def test_a_batch_draws_from_all_lanes_and_lanes_end_together():
    order = LaneOrder(1000, 20, lanes=8, block_rows=16)
    for step in range(order.num_steps):
        lanes = np.searchsorted(order.bounds, positions(order, step), side="right") - 1
        assert np.bincount(lanes, minlength=8).tolist() == [3, 3, 3, 3, 2, 2, 2, 2]


def test_lanes_of_equal_shares_differ_by_one_row_at_most():
    for num_rows in range(1, 200, 7):
        lengths = np.diff(LaneOrder(num_rows, 24, lanes=8, block_rows=9).bounds)
        assert lengths.max() - lengths.min() <= 1


def test_seed_and_epoch_change_the_order_and_nothing_else_does():
    def order(seed, epoch):
        lanes = LaneOrder(500, 50, lanes=8, block_rows=10, seed=seed, epoch=epoch)
        return [positions(lanes, step) for step in range(10)], group_order(40, seed=seed, epoch=epoch, shuffle=True)

    assert order(1, 0) == order(1, 0)
    for other in [(2, 0), (1, 1)]:
        rows, groups = order(*other)
        assert rows != order(1, 0)[0]
        assert groups != order(1, 0)[1]
    assert sorted(order(1, 0)[1]) == list(range(40))
    assert group_order(4, seed=1, epoch=0, shuffle=False) == [0, 1, 2, 3]


def test_blocks_of_a_lane_are_permuted_differently():
    order = LaneOrder(800, 8, lanes=8, block_rows=50)
    permutations = {tuple(order.permutation(lane, block)) for lane in range(8) for block in range(2)}
    assert len(permutations) == 16


def test_pieces_cover_any_run_of_positions():
    rows = [3, 1, 4, 0, 5]
    chunk_of = [(c, i) for c, n in enumerate(rows) for i in range(n)]
    pieces = Pieces(rows)
    for start in range(13):
        for stop in range(start, 14):
            found = [(c, i) for c, first, end in pieces.of(start, stop) for i in range(first, end)]
            assert found == chunk_of[start:stop]
    assert [pieces.end(c) for c in range(5)] == [3, 4, 8, 8, 13]
