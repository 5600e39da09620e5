"""MovieLens-1M: both forms give the same tables; histories end before the candidate; leave one out; negatives."""

from pathlib import Path

import convert_movielens
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hmoe_rec.data.schema import load_schema
from hmoe_rec.types import DataError

SPLITS = ("train", "validation", "test")
MOVIES = {
    2: ("Jumanji (1995)", "Adventure|Children's"),
    5: ("Amélie (2001)", "Comedy"),
    6: ("Heat (1995)", "Action|Crime|Thriller"),
    9: ("No year", "Drama|Comedy"),
    11: ("2001: A Space Odyssey (1968)", "Drama"),
    14: ("Alien (1979)", "Action|Horror"),
    15: ("Big (1988)", "Comedy"),
}
USERS = {1: ("F", 1, 10, "48067"), 3: ("M", 25, 4, "55117-01"), 4: ("M", 56, 10, "02460")}
SEQUENCES = {1: [6, 14, 2, 5], 3: [15, 6, 9, 2, 11], 4: [9, 5, 6]}  # 1 and 3 can get each other's training movies


def write_public(folder: Path) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for user, movies in SEQUENCES.items():
        # The last two of user 3 share a time; the file's order is theirs. The file itself is not in time order.
        times = [978300000 + 60 * i for i in range(len(movies))]
        if user == 3:
            times[-1] = times[-2]
        rows = [f"{user}::{m}::4::{t}" for m, t in zip(movies, times, strict=True)]
        lines += rows[2:] + rows[:2]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n")
    users = [f"{u}::{g}::{a}::{o}::{z}" for u, (g, a, o, z) in USERS.items()]
    (folder / "users.dat").write_text("\n".join(users) + "\n")
    movies = [f"{m}::{title}::{genres}" for m, (title, genres) in MOVIES.items()]
    (folder / "movies.dat").write_text("\n".join(movies) + "\n", encoding="latin-1")
    return folder


def write_parquet_form(folder: Path) -> Path:
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"user_id": list(SEQUENCES), "movie_seq": list(SEQUENCES.values())}),
                   folder / "sequences.parquet")  # fmt: skip
    users = zip(("gender", "age", "occupation", "zip"), zip(*USERS.values(), strict=True), strict=True)
    pq.write_table(pa.table({"user_id": list(USERS)} | {n: list(v) for n, v in users}), folder / "users.parquet")
    titles, genres = zip(*MOVIES.values(), strict=True)
    table = pa.table({"movie_id": list(MOVIES), "title": list(titles), "genres": list(genres)})
    pq.write_table(table, folder / "movies.parquet")
    return folder


def convert(source: Path, out: Path, latest: int | None = None, negatives: int = 2) -> dict[str, pa.Table]:
    convert_movielens.convert(source, out, 3, negatives, latest, 7, 8)
    return {name: pq.read_table(out / f"{name}.parquet") for name in SPLITS}


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> tuple[Path, dict[str, pa.Table]]:
    folder = tmp_path_factory.mktemp("movielens")
    return folder / "out", convert(write_public(folder / "ml-1m"), folder / "out")


def test_both_forms_give_the_same_tables(public, tmp_path):
    tables = convert(write_parquet_form(tmp_path / "form"), tmp_path / "out")
    assert all(tables[name].equals(public[1][name]) for name in SPLITS)
    assert (tmp_path / "out/schema.yaml").read_text() == (public[0] / "schema.yaml").read_text()


def test_history_ends_before_the_candidate(public):
    genres = sorted({g for _, names in MOVIES.values() for g in names.split("|")})
    for table in public[1].values():
        for row in table.to_pylist():
            movies, position = SEQUENCES[row["user_id"]], row["position"]
            start = max(0, position - 3)
            assert row["hist_movie_id"] == movies[start:position]
            assert row["hist_position"] == list(range(start, position))
            firsts = [genres.index(MOVIES[m][1].split("|")[0]) for m in movies[start:position]]
            assert row["hist_main_genre"] == firsts
            assert row["genres"] == [genres.index(g) for g in MOVIES[row["movie_id"]][1].split("|")]


def test_leave_one_out(public):
    for name, wanted in (
        ("train", lambda n: range(1, n - 2)),
        ("validation", lambda n: [n - 2]),
        ("test", lambda n: [n - 1]),
    ):
        positives = {(r["user_id"], r["position"], r["movie_id"]) for r in public[1][name].to_pylist() if r["watched"]}
        assert positives == {(u, p, s[p]) for u, s in SEQUENCES.items() for p in wanted(len(s))}


def test_negatives_were_never_watched(public):
    for table in public[1].values():
        rows = table.to_pylist()
        for row in rows:
            assert row["watched"] == (row["movie_id"] in SEQUENCES[row["user_id"]])
        assert sum(r["watched"] for r in rows) * 3 == len(rows)


def test_latest_limits_training_only(tmp_path, public):
    tables = convert(write_public(tmp_path / "ml-1m"), tmp_path / "out", latest=1, negatives=0)
    assert [(r["user_id"], r["position"]) for r in tables["train"].to_pylist()] == [(1, 1), (3, 2)]
    assert tables["test"].num_rows == len(USERS)


def test_years_come_from_titles(public):
    for row in pa.concat_tables(public[1].values()).to_pylist():
        assert row["year"] == {2: 1995, 5: 2001, 6: 1995, 9: None, 11: 1968, 14: 1979, 15: 1988}[row["movie_id"]]


def test_schema_fits_the_files(public):
    schema = load_schema(public[0] / "schema.yaml")
    assert schema.features().targets == {"hist_movie_id": "movie_id", "hist_main_genre": "main_genre"}
    for table in public[1].values():
        for column in schema.ids:
            values = pc.list_flatten(table[column.source]) if column.pooling else table[column.source]
            assert pc.max(values).as_py() < column.num_embeddings
            assert values.null_count == 0 or column.missing == "own_row"


def test_errors_say_where(tmp_path):
    with pytest.raises(DataError, match="holds neither ratings.dat .* nor sequences.parquet"):
        convert(tmp_path, tmp_path / "out")
    source = write_public(tmp_path / "ml-1m")
    (source / "users.dat").write_text("1::F::1::10\n")
    with pytest.raises(DataError, match="users.dat: line 1 is '1::F::1::10', expected user_id::gender::age"):
        convert(source, tmp_path / "out")
    (source / "users.dat").write_text("1::F::1::10::48067\n")
    with pytest.raises(DataError, match="user 3 has events but no line among the users"):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.data
@pytest.mark.slow
def test_real_sequences(data_dir, tmp_path):
    convert_movielens.convert(data_dir / "ml1m_order", tmp_path, 50, 1, 5, 1, 8192)
    tables = {name: pq.read_table(tmp_path / f"{name}.parquet") for name in SPLITS}
    assert [t.num_rows for t in tables.values()] == [2 * 5 * 6040, 2 * 6040, 2 * 6040]
    assert all(np.mean(t["watched"].to_numpy()) == 0.5 for t in tables.values())
