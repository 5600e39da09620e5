import itertools

import numpy as np
import pytest

from hmoe_rec.data.order import FileOrder, LaneOrder, Pieces, default_lanes, group_order

SIZES = [(1, 1), (7, 3), (10, 10), (11, 4), (53, 8), (64, 16), (100, 7), (101, 24), (257, 32)]


def positions(order, step):
    """Positions of the rows of one step, in the batch's order."""
    found = []
    for take in order.takes(step):
        start, stop = order.span(take.lane, take.block)
        picks = order.picks(take.lane, take.block)
        rows = np.arange(start, stop) if picks is None else start + picks
        assert len(rows) == take.size
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
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", range(2, 12))
def test_ranks_side_by_side_make_the_batch_of_one_and_none_has_two_rows_more(num_rows, batch, world_size, drop_last):
    split = [dict(rank=r, world_size=world_size, drop_last=drop_last) for r in range(world_size)]
    ranks = zip(*(epochs(num_rows, batch, **of_rank) for of_rank in split), strict=True)
    for order, parts in zip(epochs(num_rows, batch, drop_last=drop_last), ranks, strict=True):
        assert {part.num_steps for part in parts} == {order.num_steps}
        for step in range(order.num_steps):
            shares = [positions(part, step) for part in parts]
            whole = positions(order, step)
            assert list(itertools.chain(*shares)) == whole
            assert max(map(len, shares)) == -(-len(whole) // world_size) == parts[0].largest_share(step)
            assert min(map(len, shares)) == len(whole) // world_size
        for part in parts:
            own = sorted(itertools.chain(*(positions(part, step) for step in range(part.num_steps))))
            for start, stop in ((0, num_rows), (num_rows // 3, num_rows // 2)):
                assert (start + np.flatnonzero(part.wanted(start, stop))).tolist() == [
                    p for p in own if start <= p < stop
                ]


@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_blocks_hold_the_rows_of_their_rank_and_are_used_up(world_size):
    for num_rows, batch in SIZES:
        for orders in zip(
            *(epochs(num_rows, batch, rank=r, world_size=world_size) for r in range(world_size)), strict=True
        ):
            for order in orders:
                taken, sizes = {}, {}
                for take in itertools.chain(*map(order.takes, range(order.num_steps))):
                    key = take.lane, take.block
                    assert take.start == taken.get(key, 0)
                    taken[key], sizes[key] = take.stop, take.size
                assert taken == sizes


def test_the_order_is_the_one_that_saved_runs_have_read():
    # Steps 0 and 12 of the order as it was when whole lanes were dealt to the ranks.
    order = LaneOrder(101, 8, lanes=8, block_rows=4, seed=3, epoch=2)
    assert [positions(order, step) for step in (0, 12)] == [
        [2, 14, 26, 38, 50, 66, 77, 91],
        [24, 49, 62, 87, 100],
    ]


def test_lanes_by_default_depend_on_the_batch_alone():
    assert [default_lanes(n) for n in (1, 4096, 65536, 73728, 131072, 1 << 22)] == [8, 8, 8, 9, 16, 128]


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
    permutations = {tuple(order.picks(lane, block)) for lane in range(8) for block in range(2)}
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
