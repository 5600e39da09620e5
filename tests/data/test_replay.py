"""A log that appears file by file: every row once and in order, no half file under its name, nothing overwritten."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hmoe_rec import io
from hmoe_rec.data.replay import replay
from hmoe_rec.types import DataError


@pytest.fixture
def log(tmp_path):
    for i, rows in enumerate((range(0, 7), range(7, 30))):
        pq.write_table(pa.table({"id": list(rows), "tags": [[r, r] for r in rows]}), tmp_path / f"{i}.parquet")
    return [str(tmp_path / "0.parquet"), str(tmp_path / "1.parquet")]


@pytest.mark.parametrize(
    ("rows_per_file", "sizes"), [(4, [4] * 7 + [2]), (10, [10] * 3), (100, [30]), (7, [7] * 4 + [2])]
)
def test_every_row_once_and_in_order(log, tmp_path, rows_per_file, sizes):
    out, told = str(tmp_path / "out"), []
    names = replay(log, out, rows_per_file=rows_per_file, progress=lambda done, total: told.append((done, total)))
    tables = [pq.read_table(io.join(out, name)) for name in names]
    assert [len(table) for table in tables] == sizes and names == sorted(names)
    assert pa.concat_tables(tables)["id"].to_pylist() == list(range(30))
    assert sorted(io.ls(out)) == names and told[-1] == (30, 30)


def test_it_pauses_and_says_when_nothing_more_comes(log, tmp_path):
    out, pauses = str(tmp_path / "out"), []

    def sleep(seconds):
        pauses.append((seconds, len(io.ls(out))))  # whole files only

    replay(log, out, rows_per_file=12, pause_seconds=3.0, done=True, sleep=sleep)
    assert pauses == [(3.0, 1), (3.0, 2)] and "_DONE" in io.ls(out)


def test_refused(log, tmp_path):
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"id": ["a"]}), other)
    with pytest.raises(DataError, match="other columns than"):
        replay([*log, str(other)], str(tmp_path / "a"), rows_per_file=4)
    replay(log, str(tmp_path / "b"), rows_per_file=4)
    with pytest.raises(DataError, match="holds Parquet files already"):
        replay(log, str(tmp_path / "b"), rows_per_file=4)
    with pytest.raises(DataError, match="at least 1"):
        replay(log, str(tmp_path / "c"), rows_per_file=0)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "_DONE").touch()
    with pytest.raises(DataError, match="holds _DONE"):
        replay(log, str(tmp_path / "d"), rows_per_file=4)
