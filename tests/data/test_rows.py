import numpy as np
import pyarrow as pa
import pytest

from hmoe_rec.data.columns import Place, to_rows
from hmoe_rec.data.rows import Layout, Rows, join

CARRY = pa.schema([("row", pa.int64())])


@pytest.fixture
def layout(schema) -> Layout:
    return Layout(schema)


@pytest.fixture
def rows(table, layout) -> Rows:
    return to_rows(table(23), layout, Place("a.parquet", 0, 100), carry=CARRY)


def lists(jagged):
    arrays = [a.tolist() for a in jagged.arrays()]
    return [[a[i:j] for a in arrays] for i, j in zip(jagged.offsets, jagged.offsets[1:], strict=False)]


def examples(rows: Rows) -> list:
    """Rows one by one, NaN as None, so that they compare."""
    present = np.ones(rows.single.shape, bool) if rows.present is None else rows.present
    bags = [lists(j) for j in rows.jagged]
    dense = [np.where(np.isnan(x), None, x).tolist() for x in (rows.numbers, rows.vectors, rows.labels)]
    carried = rows.carry["row"].to_pylist() if rows.carry is not None else [None] * len(rows)
    return [
        (
            [id if there else None for id, there in zip(rows.single[:, i].tolist(), present[:, i], strict=True)],
            [bag[i] for bag in bags],
            [x[i] for x in dense],
            rows.weights[i].item(),
            rows.groups[i].item(),
            carried[i],
        )
        for i in range(len(rows))
    ]


def test_cut_take_and_join_keep_examples_whole(rows):
    whole = examples(rows)
    order = np.random.default_rng(1).permutation(23)
    assert examples(rows.cut(4, 9)) == whole[4:9]
    assert examples(rows.take(order)) == [whole[i] for i in order]
    assert examples(rows.cut(3, 20).take(order[order < 17])) == [whole[3 + i] for i in order if i < 17]
    assert examples(join([rows.cut(0, 5), rows.cut(5, 5), rows.cut(5, 23)])) == whole
    mixed = join([rows.cut(7, 9), rows.take(order).cut(2, 6)])
    assert examples(mixed) == whole[7:9] + [whole[i] for i in order[2:6]]


def test_joining_rows_with_and_without_missing_ids(rows, layout, table):
    full = table(40).drop_null()
    more = to_rows(full, layout, Place("b.parquet", 0, 0), carry=CARRY)
    assert more.present is None or more.present.all()
    assert examples(join([more, rows])) == examples(more) + examples(rows)


def test_a_cut_is_a_view(rows):
    part = rows.cut(2, 8)
    assert np.shares_memory(part.single, rows.single) and np.shares_memory(part.numbers, rows.numbers)
    assert rows.cut(0, 23) is rows


def test_origins_follow_cuts_and_joins(rows):
    assert [str(o) for o in rows.cut(2, 8).origins] == ["a.parquet rows 102-107"]
    joined = join([rows.cut(0, 3), rows.cut(10, 12)])
    assert [str(o) for o in joined.cut(2, 4).origins] == ["a.parquet rows 102-102", "a.parquet rows 110-110"]
    shuffled = joined.take(np.arange(5)[::-1])
    assert shuffled.cut(0, 1).origins == joined.origins  # somewhere in there
    assert rows.cut(4, 4).origins == ()


def test_no_rows(layout, rows):
    empty = layout.empty()
    assert len(empty) == 0 and empty.single.dtype == np.int64
    assert [len(j.columns) for j in empty.jagged] == [len(j.columns) for j in rows.jagged]
    assert [j.ages is None for j in empty.jagged] == [j.ages is None for j in rows.jagged]
    assert empty.numbers.shape[1:] == rows.numbers.shape[1:]
    assert empty.vectors.shape[1:] == rows.vectors.shape[1:]


def test_layout_knows_where_keys_are(layout):
    assert layout.keys[:6] == ("user", "city", "device", "tags", "item", "words")
    assert layout.single == (0, 1, 2, 4)
    assert layout.jagged == ((3,), (5,), (6, 7), (8,))
    assert layout.timed == (("history", 2),)
