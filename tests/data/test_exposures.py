"""Exposures counted as a dict counts them: in blocks, over files, from day to day, and after a stop."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hmoe_rec import io
from hmoe_rec.data import exposures as module
from hmoe_rec.data.exposures import ExposureCounter, SketchCounter, count_exposures, exposure_counts
from hmoe_rec.data.schema import load_schema
from hmoe_rec.data.source import ParquetSource
from hmoe_rec.types import ConfigError, DataError, SchemaError


def naive(keys) -> list[int]:
    seen: Counter = Counter()
    found = []
    for key in keys:
        found.append(seen[key])
        seen[key] += 1
    return found


@pytest.mark.parametrize("distinct", [3, 200, 10**9])
def test_counter_equals_a_dict_over_blocks_of_any_size(distinct):
    rng = np.random.default_rng(0)
    keys = rng.integers(0, distinct, 3000).astype(np.uint64)
    counter, found, start = ExposureCounter(), [], 0
    for size in (0, 1, 5, 500, 20, 20, 20, 434, 2000):
        found += counter.count(keys[start : start + size]).tolist()
        start += size
    assert start == 3000 and found == naive(keys.tolist())
    assert counter.num_keys == len(set(keys.tolist()))
    again, seen = ExposureCounter(*counter.arrays().values()), Counter(keys.tolist())
    assert again.count(np.unique(keys)).tolist() == [seen[key] for key in sorted(seen)]


def test_runs_stay_few_and_the_state_is_twelve_bytes_a_key():
    counter = ExposureCounter()
    for start in range(0, 100_000, 1000):
        counter.count(np.arange(start, start + 1000, dtype=np.uint64))
        assert len(counter._runs) <= 2 + np.log2(1 + start / 1000)
    assert sum(a.nbytes for a in counter.arrays().values()) == 12 * 100_000


def test_a_sketch_never_counts_too_few_and_seldom_too_many():
    keys = (np.random.default_rng(1).zipf(1.3, 20_000) % 5000).astype(np.uint64)
    sketch = SketchCounter(1 << 14)
    found = np.concatenate([sketch.count(block) for block in np.array_split(keys, 7)])
    over = found - np.array(naive(keys.tolist()))
    assert over.min() >= 0 and (over > 2 * len(keys) / (1 << 14)).mean() < 2**-4
    assert sketch.table.nbytes == 4 * 4 * (1 << 14)
    small = SketchCounter(16)
    assert (small.count(keys) >= naive(keys.tolist())).all(), "and a small one counts too many"
    with pytest.raises(ConfigError, match="power of 2"):
        SketchCounter(1000)


# ---------------------------------------------------------------------------------------------------------------- files


def day(n: int, rows: int = 150) -> pa.Table:
    """Rows of one day in the order of time; users and items repeat, some items are null."""
    rng = np.random.default_rng(n)
    items = pa.array([f"item {i}" for i in rng.integers(0, 5, rows)], mask=rng.random(rows) < 0.1)
    return pa.table(
        {"user": rng.integers(0, 9, rows), "item": items, "t": 1000 * n + np.sort(rng.integers(0, 999, rows))}
    )


@pytest.fixture
def days(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    for n in (1, 2, 3):
        (folder / f"day={n}").mkdir(parents=True)
        pq.write_table(day(n), folder / f"day={n}" / "part-0.parquet", row_group_size=40)
    return folder


EXPECTED = naive([tuple(row.values()) for n in (1, 2, 3) for row in day(n).drop_columns(["t"]).to_pylist()])


def written(out: Path) -> list[int]:
    files = sorted(out.glob("day=*/part-0.parquet"))
    return [x for file in files for x in pq.read_table(file, partitioning=None)["shown_before"].to_pylist()]


def test_writes_the_same_files_with_one_more_column(days, tmp_path):
    done = count_exposures(str(days), ["user", "item"], str(tmp_path / "out"), time="t")
    assert (done.rows, len(done.files), done.skipped) == (450, 3, 0)
    assert written(tmp_path / "out") == EXPECTED and max(EXPECTED) > 5
    for n in (1, 2, 3):
        copy = pq.read_table(tmp_path / "out" / f"day={n}" / "part-0.parquet", partitioning=None)
        assert copy.drop_columns(["shown_before"]).equals(day(n))
    assert pq.ParquetFile(tmp_path / "out" / "day=1" / "part-0.parquet").num_row_groups == 4
    assert len(list((tmp_path / "out").rglob("*.parquet"))) == 4, "three files and the state"


@pytest.mark.parametrize("sketch_width", [None, 1 << 16])
def test_tomorrow_goes_on_where_today_ended(days, tmp_path, sketch_width):
    out, options = str(tmp_path / "out"), {"time": "t", "sketch_width": sketch_width}
    (days / "day=3").rename(tmp_path / "later")
    count_exposures(str(days), ["user", "item"], out, **options)
    (tmp_path / "later").rename(days / "day=3")
    done = count_exposures(str(days), ["user", "item"], out, **options)
    assert (done.rows, done.skipped) == (150, 2) and written(tmp_path / "out") == EXPECTED
    assert count_exposures(str(days), ["user", "item"], out, **options).rows == 0


@pytest.mark.parametrize("save_rows", [1, 10**9])
def test_a_call_that_was_cut_short_is_made_again(days, tmp_path, monkeypatch, save_rows):
    out = str(tmp_path / "out")
    rename, calls = io.rename, []

    def dies(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(module.io, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        count_exposures(str(days), ["user", "item"], out, save_rows=save_rows)
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob(".unfinished-part*"))
    done = count_exposures(str(days), ["user", "item"], out)
    assert done.skipped == (1 if save_rows == 1 else 0) and written(tmp_path / "out") == EXPECTED


def test_a_file_without_rows_is_counted_too(tmp_path):
    for name, rows in (("a", 0), ("b", 5)):
        pq.write_table(day(1, rows), tmp_path / f"{name}.parquet")
        count_exposures(str(tmp_path / f"{name}.parquet"), ["user"], str(tmp_path / "out"))
    assert count_exposures(str(tmp_path / "[ab].parquet"), ["user"], str(tmp_path / "out")).skipped == 2


def test_works_on_other_file_systems(tmp_path):
    with io.open("memory://log/a.parquet", "wb") as file:
        pq.write_table(day(1), file)
    count_exposures("memory://log", ["user", "item"], "memory://counted", time="t")
    with io.open("memory://counted/a.parquet", "rb") as file:
        assert pq.read_table(file)["shown_before"].to_pylist() == EXPECTED[:150]
    assert count_exposures("memory://log", ["user", "item"], "memory://counted", time="t").skipped == 1


def test_mistakes_are_told(days, tmp_path):
    out = str(tmp_path / "out")
    files = [str(days / f"day={n}" / "part-0.parquet") for n in (1, 2, 3)]
    with pytest.raises(DataError, match="another file part-0.parquet; give the directory"):
        count_exposures(files[:2], ["user"], out)
    reverse = [str(days / "day=2"), str(days / "day=1*")]
    with pytest.raises(
        DataError, match=r"part-0.parquet, row 0, column t: 1\d* after 2\d*; expected rows in the order"
    ):
        count_exposures(reverse, ["user"], out, time="t")
    with pytest.raises(SchemaError, match="column session: missing; there are: user, item, t"):
        count_exposures(files[0], ["session"], out)
    with pytest.raises(SchemaError, match="column t is there already"):
        count_exposures(files[0], ["user"], out, column="t")
    with pytest.raises(DataError, match="is the file that is read"):
        count_exposures(str(days), ["user"], str(days))
    clock = pa.array([0] * 150, pa.time64("us"))
    pq.write_table(day(4).append_column("clock", clock), tmp_path / "clock.parquet")
    with pytest.raises(SchemaError, match=r"column clock: is time64\[us\]; expected integers, timestamps or dates"):
        count_exposures(str(tmp_path / "clock.parquet"), ["user"], out, time="clock")
    count_exposures(str(days / "day=2"), ["user"], out)
    with pytest.raises(DataError, match="is not the part-0.parquet that was counted"):
        count_exposures(str(days / "day=3"), ["user"], out)
    with pytest.raises(DataError, match=r"keys was \['user'\] and is \['item'\]"):
        count_exposures(str(days / "day=2"), ["item"], out)
    pq.write_table(day(0), days / "day=2" / "late.parquet")
    with pytest.raises(DataError, match="late.parquet: comes before part-0.parquet, which was counted already"):
        count_exposures(str(days / "day=2"), ["user"], out)


def test_what_a_log_says_of_exposures(tmp_path):
    rng = np.random.default_rng(0)
    rows = 900
    click = pa.array((rng.random(rows) < 0.4).astype("i1"), mask=rng.random(rows) < 0.2)
    table = pa.table(
        {"item": rng.integers(0, 4, rows), "k": rng.integers(0, 6, rows), "click": click, "like": [0] * rows}
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=200)
    schema = load_schema(
        {"ids": [{"name": "item", "num_embeddings": 4}], "tasks": [{"name": "click"}, {"name": "like"}]}
    )
    source = ParquetSource(str(tmp_path / "x.parquet"), schema)
    found = exposure_counts(source, schema, "k", max_exposures=4)
    shares = [exposure_counts(source, schema, "k", max_exposures=4, rank=r, world_size=2) for r in range(2)]
    assert (shares[0] + shares[1] == found).all() and shares[0].sum() > 0 < shares[1].sum()
    k, y = np.minimum(table["k"].to_numpy(), 3), np.array(table["click"].to_pylist(), dtype=float)
    assert found[0, 0, 0].tolist() == [int(((k == i) & ~np.isnan(y)).sum()) for i in range(4)]
    assert found[1, 0, 0].tolist() == [int(((k == i) & (y == 1)).sum()) for i in range(4)]
    assert found[0, 1, 0].sum() == rows and found[1, 1].sum() == 0
    by_item = exposure_counts(source, schema, "k", strata=["item"], max_exposures=4)
    assert (by_item.sum(2) == found.sum(2)).all() and (by_item[0, 0].sum(1) > 0).sum() == 4
    bad = table.set_column(1, "k", pa.array([-1] * rows))
    pq.write_table(bad, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="row 0 .* column k: got -1.*hmoe-rec data exposures"):
        exposure_counts(source, schema, "k")
