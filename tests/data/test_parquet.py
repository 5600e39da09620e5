import itertools

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hmoe_rec.data import parquet as parquet_module
from hmoe_rec.data import source as source_module
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.types import ConfigError, DataError, SchemaError


def batches(source, epoch=0, start_step=0, **options):
    options = {"global_batch_size": 16, "lanes": 8, "shuffle_rows": 40, **options}
    return list(BatchReader(source, **options).epoch(epoch, start_step))


def same(rows, others):
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key in row:
            assert row[key] == pytest.approx(other[key], nan_ok=True, rel=1e-6), key


def test_reads_what_a_loop_over_rows_reads(write, schema, table, expected, as_rows):
    log = table(53)
    source = ParquetSource(write(log, row_group_size=9), schema)
    read = batches(source, shuffle=False)
    assert [len(b) for b in read] == [16, 16, 16, 5]
    same([row for b in read for row in as_rows(b)], expected(log))
    for b in read:
        assert b.sparse.keys() == list(schema.features().sparse_keys)
        assert b.sparse.values().dtype == torch.int64  # because city and words are hashed
        assert b.sparse.lengths().dtype == torch.int32
        assert b.sparse.stride() == len(b)
        assert b.ages.keys() == ["history"]
        assert b.ages.values().dtype == b.numbers.dtype == b.vectors.dtype == b.labels.dtype == torch.float32


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_shuffled_rows_are_the_same_rows(write, schema, table, expected, as_rows, num_workers):
    log = table(101)
    source = ParquetSource(write(log, row_group_size=13), schema)
    pairs = batches(source, shuffle=True, num_workers=num_workers, carry=["row"])
    order = [n for _, carried in pairs for n in carried["row"].to_pylist()]
    assert sorted(order) == list(range(101)) and order != list(range(101))
    naive = expected(log)
    same([row for b, _ in pairs for row in as_rows(b)], [naive[n] for n in order])


def test_a_single_valued_log_is_int32_with_lengths_one(write):
    columns = {"a": [3, 1, 4, 1, 5], "b": [2, 6, 5, 3, 5], "y": [0, 1, 0, 1, 1]}
    schema = {"ids": [{"name": "a", "num_embeddings": 7}, {"name": "b", "num_embeddings": 8}], "tasks": [{"name": "y"}]}
    source = ParquetSource(write(columns), load(schema))
    (batch,) = batches(source, shuffle=False)
    assert batch.sparse.values().dtype == torch.int32
    assert batch.sparse.values().tolist() == columns["a"] + columns["b"]
    assert batch.sparse.lengths().tolist() == [1] * 10
    assert batch.ages is None
    assert batch.numbers.shape == (5, 0) and batch.vectors.shape == (5, 0) and batch.labels.shape == (5, 1)
    assert batch.weights.tolist() == [1.0] * 5 and batch.groups.tolist() == [0] * 5


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 11])
@pytest.mark.parametrize(
    "options", [{}, {"start_step": 2}, {"drop_last": True}, {"lanes": 1}, {"lanes": 5, "num_workers": 0}]
)
def test_ranks_together_read_what_one_reads(write, schema, table, as_rows, shuffle, world_size, options):
    source = ParquetSource(write(table(75), row_group_size=10), schema)
    alone = batches(source, epoch=1, shuffle=shuffle, **options)
    of_ranks = dict(epoch=1, shuffle=shuffle, world_size=world_size, **options)
    ranks = [batches(source, rank=r, **of_ranks) for r in range(world_size)]
    for step, whole in enumerate(alone):
        same([row for rank in ranks for row in as_rows(rank[step])], as_rows(whole))
        assert torch.equal(torch.cat([rank[step].row_ids for rank in ranks]), whole.row_ids)
        assert {rank[step].share for rank in ranks} == {max(len(rank[step]) for rank in ranks)}


def test_rows_of_other_ranks_are_not_decoded(write, schema, table, monkeypatch):
    source = ParquetSource(write(table(400), row_group_size=50), schema)
    decoded = []
    original = parquet_module.to_rows
    monkeypatch.setattr(
        parquet_module, "to_rows", lambda t, *given, **options: decoded.append(len(t)) or original(t, *given, **options)
    )
    for shuffle in (False, True):
        for rank in range(3):
            decoded.clear()
            taken = sum(len(b) for b in batches(source, shuffle=shuffle, rank=rank, world_size=3, shuffle_rows=160))
            # In part twice, where lanes meet in a row group.
            assert taken <= sum(decoded) <= 1.5 * taken


@pytest.mark.parametrize("drop_last", [False, True])
def test_rows_until_a_step_are_those_of_the_batches(write, schema, table, drop_last):
    reader = BatchReader(ParquetSource(write(table(75)), schema), global_batch_size=16, drop_last=drop_last)
    sizes = [len(batch) for epoch in range(2) for batch in reader.epoch(epoch)]
    assert [reader.rows_until(step) for step in range(len(sizes) + 1)] == [
        sum(sizes[:n]) for n in range(len(sizes) + 1)
    ]


def test_a_rank_without_rows_gets_an_empty_batch(write, schema, table):
    source = ParquetSource(write(table(17)), schema)
    for shuffle in (False, True):
        last = batches(source, shuffle=shuffle, rank=0, world_size=8)[1]
        assert len(last) == 0
        assert last.sparse.keys() == list(schema.features().sparse_keys)
        assert last.sparse.values().dtype == torch.int64 and last.sparse.lengths().dtype == torch.int32
        assert last.sparse.stride() == 0 and last.ages.stride() == 0
        assert last.labels.shape == (0, 2) and last.vectors.shape == (0, 5)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_going_on_at_any_step_equals_the_uninterrupted_order(write, schema, table, as_rows, shuffle, num_workers):
    source = ParquetSource(write(table(61), row_group_size=7), schema)
    whole = batches(source, epoch=2, shuffle=shuffle)
    for start in range(len(whole) + 1):
        rest = batches(source, epoch=2, start_step=start, shuffle=shuffle, num_workers=num_workers)
        assert len(rest) == len(whole) - start
        for batch, other in zip(rest, whole[start:], strict=True):
            same(as_rows(batch), as_rows(other))
            assert batch.files == other.files


def test_epochs_differ_and_repeat(write, schema, table):
    source = ParquetSource(write(table(61), row_group_size=7), schema)
    reader = BatchReader(source, global_batch_size=16, carry=["row"])

    def order(epoch):
        return [n for _, t in reader.epoch(epoch) for n in t["row"].to_pylist()]

    assert order(0) == order(0) != order(1)
    assert reader.steps_per_epoch == 4 and reader.num_rows == 61


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_large_row_groups_are_streamed(write, schema, table, as_rows, expected, monkeypatch, num_workers, shuffle):
    log = table(90)
    whole = batches(ParquetSource(write(log, row_group_size=45), schema), shuffle=shuffle)
    monkeypatch.setattr(source_module, "MAX_GROUP_ROWS", 20)
    monkeypatch.setattr(source_module, "CHUNK_ROWS", 6)
    source = ParquetSource(write(log, row_group_size=45), schema)
    assert len(source.chunks(source.row_groups[0])) == 8
    streamed = batches(source, shuffle=shuffle, num_workers=num_workers)
    for batch, other in zip(streamed, whole, strict=True):
        same(as_rows(batch), as_rows(other))
    resumed = batches(source, shuffle=shuffle, start_step=3, num_workers=num_workers)
    for batch, other in zip(resumed, whole[3:], strict=True):
        same(as_rows(batch), as_rows(other))


def test_without_labels_their_columns_need_not_exist(write, schema, table):
    log = table(20).drop_columns(["click", "is_buy", "w"])
    source = ParquetSource(write(log), schema, columns=schema.read_columns(with_labels=False))
    (pair, _) = batches(source, shuffle=False, with_labels=False, carry=schema.keys)
    batch, carried = pair
    assert batch.labels.isnan().all() and batch.weights.tolist() == [1.0] * 16
    assert carried.to_pydict() == {"row": list(range(16))}
    with pytest.raises(SchemaError, match="column click: missing"):
        BatchReader(source, global_batch_size=16)


def test_carried_columns_have_one_type_in_all_files(write, table):
    schema = load({"ids": [{"name": "a", "num_embeddings": 9, "mode": "hash"}], "tasks": [{"name": "y"}]})
    first = {"a": ["x", "y"], "y": [0, 1], "k": pa.array([1, 2], pa.int8())}
    second = {"a": pa.array(["z", "x"]).dictionary_encode(), "y": [0, 1], "k": pa.array([2**40, 3])}
    source = ParquetSource([write(first, "1.parquet"), write(second, "2.parquet")], schema)
    for world_size in (1, 8):
        options = dict(shuffle=False, global_batch_size=3, carry=["a", "k"], world_size=world_size)
        tables = [t for rank in range(world_size) for _, t in batches(source, rank=rank, **options)]
        assert {t.schema for t in tables} == {pa.schema([("a", pa.string()), ("k", pa.int64())])}
    whole = pa.concat_tables([t for _, t in batches(source, shuffle=False, carry=["a", "k"])])
    assert whole.to_pydict() == {"a": ["x", "y", "z", "x"], "k": [1, 2, 2**40, 3]}
    (_, named_twice) = next(iter(batches(source, shuffle=False, carry=["k", "a", "k"])))
    assert named_twice.column_names == ["k", "a"]
    text = write({**second, "k": ["2", "3"]}, "3.parquet")
    with pytest.raises(SchemaError, match="column k: is int8, string in different files"):
        batches(ParquetSource([*source.files[:1], text], schema), shuffle=False, carry=["k"])


def test_files_say_where_rows_came_from(write, schema, table):
    path = write(table(40), row_group_size=15)
    first, second, third = batches(ParquetSource(path, schema), shuffle=False)
    assert first.files == (f"{path} rows 0-14", f"{path} rows 15-15")
    assert third.files == (f"{path} rows 32-39",)
    shuffled = batches(ParquetSource(path, schema), shuffle=True)[0].files
    assert len(shuffled) == 8 and all(f.startswith(f"{path} rows ") for f in shuffled)


@pytest.mark.parametrize("shuffle", [False, True])
def test_row_groups_are_read_about_once(write, schema, table, monkeypatch, shuffle):
    source = ParquetSource(write(table(400), row_group_size=10), schema)
    read = []
    original = source_module.TableReader.plan
    monkeypatch.setattr(
        source_module.TableReader, "plan", lambda self, chunk, lane: read.append(chunk) or original(self, chunk, lane)
    )
    batches(source, shuffle=shuffle)
    assert set(read) == {c for g in source.row_groups for c in source.chunks(g)}
    assert len(read) <= 40 + 8


def test_files_of_many_lanes_stay_open(write, schema, table, monkeypatch):
    paths = [write(table(40, seed=i), f"{i:02}.parquet", row_group_size=5) for i in range(20)]
    opened = []
    original = ParquetSource.open
    monkeypatch.setattr(ParquetSource, "open", lambda self, file: opened.append(file) or original(self, file))
    monkeypatch.setattr(parquet_module, "group_order", lambda n, **_: list(range(n)))  # a lane's rows are in one file
    batches(ParquetSource(paths, schema), global_batch_size=20, lanes=20, shuffle_rows=100, num_workers=0)
    assert sorted(opened) == list(range(20))


def test_file_directory_glob_list_and_remote(write, schema, table, as_rows, expected):
    logs = [table(12, seed=1), table(5, seed=2), table(9, seed=3)]
    paths = [write(log, f"day/part-{i}.parquet") for i, log in enumerate(logs)]
    folder = paths[0].rsplit("/", 1)[0]
    write(logs[0], "day/_hidden.parquet")
    write(logs[0], "day/_temporary/0/part-9.parquet")
    naive = list(itertools.chain(*map(expected, logs)))
    memory = fsspec.filesystem("memory")
    for path in paths:
        memory.put(path, path.replace(folder, "/day"))
    local = (folder, f"file://{folder}", f"{folder}/part-*.parquet", paths)
    for uri in (*local, "memory://day", "memory://day/*.parquet"):
        source = ParquetSource(uri, schema)
        assert len(source.files) == 3
        same([row for b in batches(source, shuffle=False) for row in as_rows(b)], naive)
    nested = write(logs[1], "day/more.parquet/part-0.parquet")  # as Spark writes
    for uri in (f"{folder}/more*", f"{folder}/more.parquet"):
        assert ParquetSource(uri, schema).files == (nested,)
    assert len(ParquetSource(folder, schema).files) == 4
    assert ParquetSource(f"{folder}/more.parquet/**", schema).files == (nested,)  # the directory matches too
    assert ParquetSource(paths[::-1], schema).files == tuple(paths[::-1])
    assert ParquetSource(paths[1], schema).num_rows == 5


def test_files_of_different_integer_types_and_empty_files(write, schema, table, as_rows, expected):
    first, second = table(6, seed=1), table(8, seed=2)
    other = second.set_column(second.column_names.index("user"), "user", second["user"].cast(pa.int64()))
    nothing = first.slice(0, 0).set_column(first.column_names.index("emb"), "emb", pa.nulls(0))
    source = ParquetSource([write(first, "a.parquet"), write(nothing, "b.parquet"), write(other, "c.parquet")], schema)
    (batch,) = batches(source, shuffle=False)
    same(as_rows(batch), expected(first) + expected(second))


def test_columns_without_any_value_are_missing_everywhere(write, schema, table):
    log = table(6)
    for name in ("user", "tags", "price", "emb", "liked", "is_buy"):
        log = log.set_column(log.column_names.index(name), name, pa.nulls(6))
    more = table(3)
    (batch,) = batches(ParquetSource([write(log, "a.parquet"), write(more, "b.parquet")], schema), shuffle=False)
    for key in ("user", "tags", "liked"):
        assert batch.sparse[key].lengths()[:6].tolist() == [0] * 6
    assert batch.numbers[:6, 0].isnan().all() and batch.labels[:6, 1].isnan().all()
    assert batch.vectors[:6, :3].abs().sum() == 0


def test_an_error_comes_up_at_its_step_and_threads_end(write, schema, table):
    import threading

    log = table(60)
    users = log["user"].to_pylist()
    users[37] = 50
    path = write(log.set_column(1, "user", pa.array(users)), row_group_size=10)
    for num_workers in (0, 1, 3):
        iterator = BatchReader(
            ParquetSource(path, schema), global_batch_size=10, shuffle=False, num_workers=num_workers
        ).epoch(0)
        assert [len(next(iterator)) for _ in range(3)] == [10, 10, 10]
        with pytest.raises(DataError, match="row 37.*column user: got 50, expected an id < 50"):
            next(iterator)
        assert not [t for t in threading.enumerate() if t.name.startswith("hmoe-data")]


def test_closing_ends_the_threads(write, schema, table):
    import threading

    iterator = BatchReader(ParquetSource(write(table(60)), schema), global_batch_size=4, num_workers=2).epoch(0)
    next(iterator)
    assert [t for t in threading.enumerate() if t.name.startswith("hmoe-data")]
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("hmoe-data")]


def test_batches_do_not_share_memory(write):
    schema = load({"ids": [{"name": "a", "num_embeddings": 9}], "numbers": [{"name": "x"}], "tasks": [{"name": "y"}]})
    source = ParquetSource(write({"a": [1, 2], "x": [0.5, 0.25], "y": [0, 1]}), schema)
    reader = BatchReader(source, global_batch_size=2, shuffle=False)
    for _ in range(2):
        (batch,) = reader.epoch(0)
        assert batch.numbers.tolist() == [[0.5], [0.25]] and batch.sparse.values().tolist() == [1, 2]
        batch.numbers.zero_()
        batch.sparse.values().zero_()


def test_numbers_out_of_range_are_refused(write, schema, table):
    source = ParquetSource(write(table(9)), schema)
    for wrong in ({"global_batch_size": 0}, {"lanes": 0}, {"shuffle_rows": 0}, {"rank": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            BatchReader(source, **{"global_batch_size": 4, **wrong})


@pytest.mark.data
def test_criteo(data_dir):
    path = data_dir / "criteo_dac80k" / "train.parquet"
    columns = [f"C{i}" for i in range(1, 27)]
    given = {
        "ids": [{"name": c, "num_embeddings": 2**20, "missing": "own_row" if c == "C3" else "zero"} for c in columns],
        "numbers": [{"name": f"I{i}", "transform": "slog"} for i in range(1, 14)],
        "tasks": [{"name": "click", "label": "label"}],
    }
    source = ParquetSource(str(path), load(given))
    table = pq.read_table(path)
    whole = batches(source, global_batch_size=4096, shuffle=False)
    assert sum(len(b) for b in whole) == source.num_rows == 80000
    assert torch.cat([b.labels for b in whole]).mean().item() == pytest.approx(0.2245, abs=1e-3)
    lengths = torch.cat([b.sparse.lengths().view(26, -1) for b in whole], 1).sum(1)
    assert lengths.tolist() == [80000 if c == "C3" else 80000 - table[c].null_count for c in columns]
    for c in ("C1", "C26"):
        read = torch.cat([b.sparse[c].values() for b in whole]).numpy()
        np.testing.assert_array_equal(read, table[c].drop_null().to_numpy())
    nans = sum(int(b.numbers.isnan().sum()) for b in whole)
    assert nans == sum(table[f"I{i}"].null_count for i in range(1, 14))
    rows = [n for _, t in batches(source, global_batch_size=4096, carry=["row"]) for n in t["row"].to_pylist()]
    assert sorted(rows) == sorted(table["row"].to_pylist())


def load(given):
    from hmoe_rec.data.schema import load_schema

    return load_schema(given)
