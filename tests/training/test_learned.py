"""What an estimate is fitted on: the rows that its checkpoint has learned from, and no others."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broker import redis_server
from gloo import run_ranks
from small_run import SCHEMA, make_log, run_file

from hmoe_rec.config import resolve_config
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.data.schema import Schema
from hmoe_rec.training.evaluate import read_run_config
from hmoe_rec.training.evaluate_uncertainty import evaluate_uncertainty
from hmoe_rec.training.learned import training_data
from hmoe_rec.training.online import follow
from hmoe_rec.training.trainer import train
from hmoe_rec.training.uncertainty import fit_uncertainty
from hmoe_rec.types import CheckpointError, DataError

FILES, FILE_ROWS = 4, 150  # row groups of 70, 70, 10; a window is a file


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """The small log with numbers of rows; part of its training data as files that are followed."""
    folder = tmp_path_factory.mktemp("learned")
    make_log(folder)
    table = pq.read_table(folder / "train.parquet")
    table = table.append_column("row_id", pa.array(np.arange(len(table))))
    pq.write_table(table, folder / "train.parquet", row_group_size=170)
    (folder / "in").mkdir()
    for i in range(FILES):
        pq.write_table(file_of(folder, i), folder / "in" / f"part-{i}.parquet", row_group_size=70)
    return folder


def file_of(folder: Path, i: int) -> pa.Table:
    return pq.read_table(folder / "train.parquet").slice(i * FILE_ROWS, FILE_ROWS)


def sums(run: Path, checkpoint: str = "latest", data: Path | None = None, rows: int | None = None) -> dict:
    """Of a fit of laplace; rows: how many it is fitted on."""
    found = fit_uncertainty(str(run), "laplace", checkpoint=checkpoint, data=None if data is None else str(data))
    assert rows is None or found["examples"] == rows
    with np.load(found["file"]) as file:
        return {name: file[name] for name in file.files if name != "record"}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6 * np.abs(b[name]).max())


# --------------------------------------------------------------------------------------------------------------- train


def first_rows(log: Path, steps: int) -> Path:
    """A file of the rows of the first batches."""
    reader = BatchReader(
        ParquetSource(str(log / "train.parquet"), Schema.model_validate(SCHEMA), columns=[*columns(), "row_id"]),
        **{"global_batch_size": 160, "seed": 1, "shuffle_rows": 512, "carry": ["row_id"]},
    )
    ids = [x for _, (_, t) in zip(range(steps), reader.epoch(0), strict=False) for x in t["row_id"].to_pylist()]
    table = pq.read_table(log / "train.parquet").filter(pa.array(np.isin(np.arange(2000), ids)))
    pq.write_table(table, log / f"first-{steps}.parquet")
    return log / f"first-{steps}.parquet"


def columns() -> tuple[str, ...]:
    return Schema.model_validate(SCHEMA).read_columns(with_labels=True)


@pytest.fixture(scope="module")
def short(log) -> Path:
    """Seven steps of the thirteen of an epoch, a checkpoint at the third."""
    train(resolve_config(run_file(log, "short", max_steps=7, checkpoint_every=3)))
    return log / "short"


@pytest.mark.parametrize(("checkpoint", "steps"), [("latest", 7), ("3", 3)])
def test_rows_behind_the_checkpoints_step_do_not_count(log, short, checkpoint, steps):
    assert_same(sums(short, checkpoint, rows=160 * steps), sums(short, checkpoint, data=first_rows(log, steps)))


def test_rows_of_several_epochs_count_once(log):
    train(resolve_config(run_file(log, "long", max_steps=15)))
    assert_same(sums(log / "long", rows=2000), sums(log / "long", data=log / "train.parquet"))


def test_lanes_are_those_of_the_run(log):
    """Nine ranks would have made nine lanes, and other first batches."""
    content = run_file(log, "lanes", max_steps=2)
    content["data"]["lanes"] = 9
    train(resolve_config(content))
    path = log / "lanes" / "config.yaml"
    before = sums(log / "lanes")
    path.write_text(path.read_text().replace("lanes: 9", "lanes: 5"))
    assert_same(sums(log / "lanes"), before)


def test_data_that_has_changed_since_is_refused(log):
    shutil.copy(log / "train.parquet", log / "changing.parquet")
    content = run_file(log, "changed", max_steps=2)
    content["data"]["train"] = str(log / "changing.parquet")
    train(resolve_config(content))
    pq.write_table(pq.read_table(log / "changing.parquet").slice(0, 900), log / "changing.parquet")
    with pytest.raises(DataError, match="900 rows of data.train.* 2,000 when the checkpoint was made; give --data URI"):
        sums(log / "changed")


# -------------------------------------------------------------------------------------------------------------- follow


def followed(log: Path, name: str, source: object = None, **online) -> Path:
    content = run_file(log, name, keep_checkpoints=20)
    del content["train"]["epochs"]
    content["data"] = {"schema": content["data"]["schema"], "train": str(log / "test.parquet")}  # for statistics only
    content["online"] = {"follow": str(source or log / "in"), "until_idle": 0, "poll_seconds": 0.01}
    content["online"] |= {"checkpoint_windows": 1} | online
    follow(resolve_config(content))
    return log / name


@pytest.fixture(scope="module")
def stream(log) -> Path:
    return followed(log, "stream")


def test_a_followed_run_is_fitted_on_its_windows(log, stream):
    assert_same(sums(stream, rows=FILES * FILE_ROWS), sums(stream, data=log / "in"))
    assert_same(sums(stream, "2", rows=2 * FILE_ROWS), sums(stream, "2", data=two_files(log)))


def two_files(log: Path) -> Path:
    pq.write_table(pa.concat_tables([file_of(log, 0), file_of(log, 1)]), log / "two.parquet")
    return log / "two.parquet"


def test_files_that_came_later_do_not_count(log, tmp_path):
    shutil.copytree(log / "in", tmp_path / "in")
    run = followed(log, "grown", tmp_path / "in")
    pq.write_table(file_of(log, 5), tmp_path / "in" / "part-9.parquet")
    before = sums(run, rows=FILES * FILE_ROWS)
    assert_same(before, sums(run, data=log / "in"))


def test_part_of_a_file_counts_as_that_part(log):
    run = followed(log, "parts", window_rows=70)
    assert_same(sums(run, "1", rows=70), sums(run, "1", data=written(log, file_of(log, 0).slice(0, 70))))


def written(log: Path, table: pa.Table) -> Path:
    pq.write_table(table, log / "written.parquet")
    return log / "written.parquet"


def fit_rank(rank: int, world_size: int, run: str) -> dict:
    return fit_uncertainty(run, "laplace", checkpoint="latest")


@pytest.mark.slow
def test_two_ranks_fit_the_same(log, short, stream):
    for run in (short, stream):
        one = sums(run)
        found = run_ranks(2, fit_rank, str(run))
        with np.load(found[0]["file"]) as file:
            assert_same({name: file[name] for name in one}, one)


def test_what_is_gone_or_not_told_of_is_said(log, tmp_path):
    shutil.copytree(log / "in", tmp_path / "in")
    run = followed(log, "gone", tmp_path / "in")
    (tmp_path / "in" / "part-1.parquet").unlink()
    with pytest.raises(DataError, match=r"cannot be read again \(.*part-1.*\); give --data URI"):
        sums(run)
    sums(run, "1", rows=FILE_ROWS)
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(text[1:]))
    with pytest.raises(CheckpointError, match="tells of 450 rows up to step 4, and the checkpoint learned from 600"):
        sums(run)


def test_what_it_began_with_counts_too(log, short):
    run = followed(log, "began", start_from=str(short), start_checkpoint="3")
    both = pa.concat_tables([pq.read_table(first_rows(log, 3)), pq.read_table(log / "in").cast(file_of(log, 0).schema)])
    assert_same(sums(run, rows=480 + FILES * FILE_ROWS), sums(run, data=written(log, both)))
    again = followed(log, "again", start_from=str(run))
    sums(again, rows=480 + 2 * FILES * FILE_ROWS)


def test_what_it_began_with_and_cannot_be_read_is_told(log, tmp_path):
    train(resolve_config(run_file(log, "forgotten", max_steps=2)))
    run = followed(log, "orphan", start_from=str(log / "forgotten"))
    shutil.rmtree(log / "forgotten")
    found = fit_uncertainty(str(run), "laplace", checkpoint="latest")
    assert found["examples"] == FILES * FILE_ROWS
    (note,) = found["notes"]
    assert "forgotten had learned from, which the run began with, is left out" in note


def test_messages_that_were_trimmed_since_are_missed(log, tmp_path):
    with redis_server(tmp_path) as url:
        import redis

        client = redis.Redis.from_url(url)
        for i in range(3):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, file_of(log, i).schema) as writer:
                writer.write_table(file_of(log, i))
            client.xadd("events", {"rows": sink.getvalue().to_pybytes()})
        run = followed(log, "messages", f"{url}/events", window_rows=200)
        assert_same(
            sums(run, rows=3 * FILE_ROWS),
            sums(run, data=written(log, pq.read_table(log / "train.parquet").slice(0, 3 * FILE_ROWS))),
        )
        client.xtrim("events", maxlen=1)
        with pytest.raises(DataError, match="cannot be read again .*; give --data URI"):
            sums(run)


def test_what_counts_training_data_counts_what_was_learned(log, stream, short):
    """Not data.train of a followed run, which only statistics of numbers came from."""
    config = read_run_config(str(stream))
    parts = [str(log / "in" / f"part-{i}.parquet") for i in range(FILES)]
    assert training_data(config, str(stream)) == parts and training_data(config, str(stream), 2) == parts[:2]
    assert training_data(read_run_config(str(short))) == [str(log / "train.parquet")]
    fit_uncertainty(str(stream), "laplace", checkpoint="1")
    options = {"data": str(log / "in" / "part-3.parquet"), "new_ids": "user_id", "checkpoint": "1"}
    users = [set(file_of(log, i)["user_id"].to_pylist()) for i in (0, 3)]
    new = sum(user not in users[0] for user in file_of(log, 3)["user_id"].to_pylist())
    assert evaluate_uncertainty(str(stream), "laplace", **options)["metrics"]["click"]["new"] == new
