"""Criteo: the TSV, gzipped or not, and the Parquet form; bins; time order; ids that tell the same values apart."""

import gzip
import math
from pathlib import Path

import convert_criteo
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from convert_criteo import CATEGORIES, NAMES, NUMBERS, hex_ids, log_square_bin

from hmoe_rec.data.schema import load_schema
from hmoe_rec.types import DataError

SPLITS = ("train", "validation", "test")


def make_rows(num_rows: int = 90) -> list[dict]:
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(num_rows):
        row = {"label": int(rng.integers(2))}
        row |= {n: None if rng.random() < 0.2 else int(rng.integers(-2, 3000)) for n in NUMBERS}
        row |= {n: None if rng.random() < 0.2 else int(rng.integers(1, 8)) * 0x1234567 for n in CATEGORIES}
        rows.append(row)
    return rows


def to_tsv(rows: list[dict]) -> bytes:
    def text(name: str, value: int | None) -> str:
        return "" if value is None else f"{value:08x}" if name in CATEGORIES else str(value)

    return "".join("\t".join(text(n, row[n]) for n in NAMES) + "\n" for row in rows).encode()


def convert(source: Path, out: Path, row_group_rows: int = 32) -> dict[str, pa.Table]:
    convert_criteo.convert(source, out, (0.7, 0.1), 1_000_000, row_group_rows)
    return {name: pq.read_table(out / f"{name}.parquet") for name in SPLITS}


def test_all_forms_give_the_same_tables(tmp_path):
    rows = make_rows()
    (tmp_path / "train.txt").write_bytes(to_tsv(rows))
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped/train.txt.gz").write_bytes(gzip.compress(to_tsv(rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    plain = convert(tmp_path / "train.txt", tmp_path / "a")
    for i, source in enumerate((tmp_path / "zipped", tmp_path / "train.parquet", tmp_path)):
        other = convert(source, tmp_path / f"out{i}")
        assert all(other[name].equals(plain[name]) for name in SPLITS)
    assert [t.num_rows for t in plain.values()] == [63, 9, 18]
    joined = pa.concat_tables(plain.values())
    assert joined["row"].to_pylist() == list(range(90))
    for name in ("label", *NUMBERS, *CATEGORIES):
        assert joined[name].to_pylist() == [row[name] for row in rows]
    schema = load_schema(tmp_path / "a/schema.yaml")
    for column in schema.ids:
        values = joined[column.source]
        assert column.missing == "own_row"
        assert column.mode == "hash" or 0 <= pc.min(values).as_py() <= pc.max(values).as_py() < column.num_embeddings


def test_small_blocks_change_nothing(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_bytes(to_tsv(make_rows()).rstrip(b"\n"))
    whole = convert(tmp_path / "train.txt", tmp_path / "a")
    monkeypatch.setattr(convert_criteo, "BLOCK_BYTES", 1700)
    blocks = convert(tmp_path / "train.txt", tmp_path / "b")
    assert all(whole[name].equals(blocks[name]) for name in SPLITS)
    assert (tmp_path / "a/schema.yaml").read_text() == (tmp_path / "b/schema.yaml").read_text()
    metadata = pq.read_metadata(tmp_path / "b/train.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [32, 31]


def test_log_square_bins_against_the_formula():
    values = [-7.0, -3.0, -1.0, 0.0, 1.0, 2.0, 3.0, 8.0, 1382.0, 2e9]
    naive = [math.floor(math.log(v) ** 2) if v > 2 else max(v - 2, -5) for v in values]
    assert log_square_bin(np.array([*values, np.nan])).tolist() == [int(b) + 5 for b in naive] + [-1]


def test_hex_ids():
    path = Path("train.txt")
    assert hex_ids(pa.array(["68fd1e64", None, "", "ff"]), "C1", path).to_pylist() == [0x68FD1E64, None, None, 255]
    with pytest.raises(DataError, match="column C1 holds '68fd1e6g', expected up to 8 hexadecimal digits"):
        hex_ids(pa.array(["68fd1e6g"]), "C1", path)


def test_distinct_ids_are_counted_in_bounded_memory():
    statistics = convert_criteo.Statistics()
    table = pa.table(
        {n: np.arange(5000) * 0x9E3779B9 % (1 << 20) for n in CATEGORIES} | {n: [1.0] * 5000 for n in NUMBERS}
    )
    statistics.add(table)
    statistics.add(table)
    assert statistics.distinct() == pytest.approx(5000, rel=0.01)


def test_errors_say_where(tmp_path):
    with pytest.raises(DataError, match="no train.txt"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "train.txt").write_text("0\t1\t2\n")
    with pytest.raises(DataError, match="train.txt: not Criteo's form, which is label, I1..I13, C1..C26"):
        convert(tmp_path, tmp_path / "out")
    pq.write_table(pa.table({"label": [1], "I1": [2]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="other.parquet: no column I2, I3"):
        convert(tmp_path / "other.parquet", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.data
def test_real_log(data_dir, tmp_path):
    tables = convert(data_dir / "criteo_dac80k", tmp_path, 8192)
    assert [t.num_rows for t in tables.values()] == [56_000, 8_000, 16_000]
    assert pc.mean(pa.concat_tables(tables.values())["label"]).as_py() == pytest.approx(0.2245, abs=1e-4)


@pytest.mark.data
def test_original_text_and_parquet_form_tell_the_same_values_apart(data_dir, tmp_path):
    """The Parquet form's 20-bit ids are a function of column and text; only a few texts share one."""
    text = pq.read_table(data_dir / "criteo_dac80k/first8000_original_text.parquet")
    rows = text.num_rows
    lines = ["\t".join("" if v is None else str(v) for v in row.values()) for row in text.select(NAMES).to_pylist()]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    pq.write_table(pq.read_table(data_dir / "criteo_dac80k/train.parquet").slice(0, rows), tmp_path / "train.parquet")
    from_text = pa.concat_tables(convert(tmp_path / "train.txt", tmp_path / "a", 8192).values())
    from_ids = pa.concat_tables(convert(tmp_path / "train.parquet", tmp_path / "b", 8192).values())
    assert from_text.select(["label", *NUMBERS]).equals(from_ids.select(["label", *NUMBERS]))
    merged = 0
    for name in CATEGORIES:
        pairs = set(zip(from_text[name].to_pylist(), from_ids[name].to_pylist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs})
        merged += len(pairs) - len({b for _, b in pairs})
    assert merged < 100
