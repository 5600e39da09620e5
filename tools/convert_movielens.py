"""MovieLens-1M -> next-movie examples with the movies watched before, and the schema that fits them.

python tools/convert_movielens.py ml-1m data/movielens
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
from converting import (
    MISSING,
    ROW_GROUP_ROWS,
    Column,
    Ints,
    Windows,
    bucket,
    codes,
    ints,
    locate,
    matching,
    number_entry,
    quantile_edges,
    read_parquet,
    reporting_errors,
    say,
    sorted_vocabulary,
    write_rows,
    write_schema,
    write_vocabularies,
)

from hmoe_rec.types import DataError

USER_COLUMNS = ["user_id", "gender", "age", "occupation", "zip"]
USER_CATEGORIES = ["gender", "age", "occupation", "zip3"]
FIRST_POSITION = 1  # the first movie of a user has no history and is no example
MOST_ROUNDS = 200
COMMENT = """MovieLens-1M, one row per candidate for a user's next movie; see tools/convert_movielens.py.
An age is a number of movies: 1 = the user's latest movie before this one."""


@dataclass(frozen=True)
class Source:
    """Events sorted by user and time: `user` and `movie` are flat; and the two tables of features."""

    user: Ints
    movie: Ints
    users: pa.Table
    movies: pa.Table


def read_source(source: Path) -> Source:
    """Reads either form.

    Raises:
        DataError: neither form is there, or it is damaged.
    """
    if matching(source, "ratings.dat"):
        say("public release: ratings.dat, users.dat, movies.dat")
        ratings = read_dat(locate(source, "ratings.dat", "ratings"), ["user_id", "movie_id", "rating", "time_s"])
        user, time_s = ints(ratings["user_id"], "user_id"), ints(ratings["time_s"], "time_s")
        order = np.lexsort((np.arange(len(user)), time_s, user))
        users = read_dat(locate(source, "users.dat", "users"), USER_COLUMNS)
        movies = read_dat(locate(source, "movies.dat", "movies"), ["movie_id", "title", "genres"])
        return _known(Source(user[order], ints(ratings["movie_id"], "movie_id")[order], users, movies), source)
    if matching(source, "sequences.parquet"):
        say("Parquet form: sequences.parquet, users.parquet, movies.parquet")
        table = read_parquet(locate(source, "sequences.parquet", "sequences"), ["user_id", "movie_seq"])
        table = table.sort_by("user_id").combine_chunks()
        user = ints(table["user_id"])[ints(pc.list_parent_indices(table["movie_seq"]))]
        users = read_parquet(locate(source, "users.parquet", "users"), USER_COLUMNS)
        movies = read_parquet(locate(source, "movies.parquet", "movies"), ["movie_id", "title", "genres"])
        return _known(Source(user, ints(pc.list_flatten(table["movie_seq"])), users, movies), source)
    raise DataError(
        f"{source}: holds neither ratings.dat (the public release, unpacked) nor sequences.parquet (the "
        "Parquet form); give the folder of one of them"
    )


def read_dat(path: Path, names: list[str]) -> pa.Table:
    """A MovieLens file, a::b::c in Latin-1, as text columns.

    Raises:
        DataError: a line with another number of values.
    """
    lines = path.read_text("latin-1").splitlines()
    if not lines:
        raise DataError(f"{path}: no lines; expected {'::'.join(names)}")
    parts = pc.split_pattern(pa.array(lines), "::")
    wrong = np.flatnonzero(pc.list_value_length(parts).to_numpy() != len(names))
    if len(wrong):
        raise DataError(f"{path}: line {wrong[0] + 1} is {lines[wrong[0]]!r}, expected {'::'.join(names)}")
    return pa.table({name: pc.list_element(parts, i) for i, name in enumerate(names)})


def _known(source: Source, path: Path) -> Source:
    for what, used, table in (("user", source.user, source.users), ("movie", source.movie, source.movies)):
        unknown = np.setdiff1d(used, ints(table[f"{what}_id"], f"{what}_id"))
        if len(unknown):
            raise DataError(
                f"{path}: {what} {unknown[0]} has events but no line among the {what}s; the files "
                "belong to different releases"
            )
    return source


@dataclass(frozen=True)
class Examples:
    """One row per candidate.

    Attributes:
        event: the place, among all events, of the movie that the user did watch next.
        movie: the candidate: that movie, or a negative.
        watched: 1 for that movie, 0 for a negative.
        part: 0 train, 1 validation (the last event of a user but one), 2 test (the last).
    """

    event: Ints
    movie: Ints
    watched: Ints
    part: Ints


def examples_of(source: Source, first: Ints, stop: Ints, negatives: int, latest: int | None, seed: int) -> Examples:
    """Every event with a history becomes a positive and `negatives` rows of movies that the user never watched.

    Negatives are drawn as often as movies are watched in training, so that popularity alone does not tell them. The
    last two events of a user are validation and test, whatever `latest`, the number of training positives a user has at
    most.
    """
    event = np.arange(len(source.user))
    from_end = stop - 1 - event
    part = np.where(from_end == 0, 2, np.where(from_end == 1, 1, 0))
    usable = (event - first >= FIRST_POSITION) & ((latest is None) | (from_end < 2 + (latest or 0)))
    positive = event[usable]
    rows = np.repeat(positive, 1 + negatives)
    is_positive = np.arange(len(rows)) % (1 + negatives) == 0
    movie = source.movie[rows].copy()
    drawn_for = source.user[rows[~is_positive]]
    movie[~is_positive] = _draw(source, source.movie[part == 0], drawn_for, np.random.default_rng(seed))
    return Examples(rows, movie, is_positive.astype(np.int64), part[rows])


def _draw(source: Source, pool: Ints, user: Ints, rng: np.random.Generator) -> Ints:
    """A movie from `pool` for each user that he or she never watched."""
    if not len(pool) or not len(user):
        return np.zeros(len(user), np.int64)
    width = int(source.movie.max()) + 1
    watched = np.unique(source.user * width + source.movie)
    drawn, open_rows = np.empty(len(user), np.int64), np.arange(len(user))
    for _ in range(MOST_ROUNDS):
        drawn[open_rows] = pool[rng.integers(len(pool), size=len(open_rows))]
        key = user[open_rows] * width + drawn[open_rows]
        hit = watched[np.minimum(np.searchsorted(watched, key), len(watched) - 1)] == key
        open_rows = open_rows[hit]
        if not len(open_rows):
            return drawn
    raise DataError(
        f"user {user[open_rows[0]]} has watched nearly every movie, so no negative is found; set --negatives 0 "
        "or leave the user out"
    )


def build(
    source: Source, history: int, negatives: int, latest: int | None, seed: int
) -> tuple[dict[str, Column], dict[str, Any], dict[str, pa.Array], Examples]:
    """Columns, schema, vocabularies and the rows' parts."""
    first = np.searchsorted(source.user, source.user)
    stop = np.searchsorted(source.user, source.user, side="right")
    rows = examples_of(source, first, stop, negatives, latest, seed)
    train = np.flatnonzero(rows.part == 0)
    columns: dict[str, Column] = {"user_id": source.user[rows.event], "movie_id": rows.movie}
    ids: list[dict[str, Any]] = [
        {"name": n, "num_embeddings": int(ints(t[n], n).max()) + 1}
        for n, t in (("user_id", source.users), ("movie_id", source.movies))
    ]
    vocabularies: dict[str, pa.Array] = {}

    user_row = _place(ints(source.users["user_id"], "user_id"))[source.user[rows.event]]
    for name in USER_CATEGORIES:
        text = pc.cast(source.users["zip" if name == "zip3" else name], pa.string())
        values = pc.utf8_slice_codeunits(text, 0, 3) if name == "zip3" else text
        vocabularies[name] = sorted_vocabulary(values)
        columns[name] = codes(values, vocabularies[name])[user_row]
        ids.append({"name": name, "num_embeddings": len(vocabularies[name])})

    movie_row = _place(ints(source.movies["movie_id"], "movie_id"))
    genres, main_genre, vocabularies["genre"] = _genres(source.movies)
    columns["genres"] = genres.rows(movie_row[rows.movie])
    columns["main_genre"] = main_genre[movie_row[rows.movie]]
    ids += [
        {"name": "genres", "num_embeddings": len(vocabularies["genre"]), "pooling": "mean"},
        {"name": "main_genre", "num_embeddings": len(vocabularies["genre"]), "missing": "own_row"},
    ]
    year = _title_years(source.movies)[movie_row[rows.movie]]
    edges = quantile_edges(year[train], 16)
    columns |= {"year": year, "year_bucket": bucket(year, edges)}
    ids.append({"name": "year_bucket", "num_embeddings": len(edges) + 1, "missing": "own_row"})

    start = np.maximum(first, np.arange(len(first)) - history)[rows.event]
    columns["hist_movie_id"] = Windows(start, rows.event, source.movie, pa.int32())
    columns["hist_main_genre"] = Windows(start, rows.event, main_genre[movie_row[source.movie]], pa.int32())
    columns["hist_position"] = Windows(start, rows.event, np.arange(len(first)) - first, pa.int32())
    columns |= {"position": (rows.event - first[rows.event]).astype(np.int64), "watched": rows.watched}
    schema = {
        "ids": ids, "numbers": [number_entry("year", year[train])],
        "sequences": [{"name": "history", "times": "hist_position", "exposure_time": "position", "max_length": history,
                       "columns": {"hist_movie_id": "movie_id", "hist_main_genre": "main_genre"}}],
        "tasks": [{"name": "watched"}], "user_key": "user_id", "keys": ["user_id", "movie_id", "position"],
        "time": "position",
    }  # fmt: skip
    return columns, schema, vocabularies, rows


def _place(ids: Ints) -> Ints:
    table = np.full(int(ids.max()) + 1, MISSING)
    table[ids] = np.arange(len(ids))
    return table


def _genres(movies: pa.Table) -> tuple[Windows, Ints, pa.Array]:
    """Bag of genres and first genre of each movie, and what the codes stand for."""
    texts = pc.cast(movies["genres"], pa.string()).combine_chunks()
    lists = pc.split_pattern(pc.fill_null(texts, ""), "|")
    flat, parent = pc.list_flatten(lists), ints(pc.list_parent_indices(lists))
    known = pc.not_equal(flat, "").to_numpy(zero_copy_only=False)
    flat, parent = flat.filter(pa.array(known)), parent[known]
    vocabulary = sorted_vocabulary(flat)
    code = codes(flat, vocabulary)
    stop = np.cumsum(np.bincount(parent, minlength=len(texts)))
    start = np.concatenate([[0], stop[:-1]])
    main = np.where(stop > start, np.append(code, MISSING)[start], MISSING)
    return Windows(start, stop, code, pa.int32()), main, vocabulary


def _title_years(movies: pa.Table) -> np.ndarray:
    """Year at the end of each title, as in "Heat (1995)"; NaN where there is none."""
    found = [re.search(r"\((\d{4})\)\s*$", title or "") for title in movies["title"].to_pylist()]
    return np.array([float(match[1]) if match else np.nan for match in found])


def convert(
    source: Path, out: Path, history: int, negatives: int, latest: int | None, seed: int, row_group_rows: int
) -> None:
    columns, schema, vocabularies, rows = build(read_source(source), history, negatives, latest, seed)
    for part, name in enumerate(("train", "validation", "test")):
        chosen = np.flatnonzero(rows.part == part)
        write_rows(out / f"{name}.parquet", columns, chosen, row_group_rows)
        say(f"{name}: {len(chosen):,} rows; watched {rows.watched[chosen].mean():.4f}")
    write_schema(out / "schema.yaml", schema, COMMENT)
    write_vocabularies(out / "vocabularies.json", vocabularies)


app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="Folder with ratings.dat etc., or with the Parquet form.")],
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    history: Annotated[int, typer.Option(min=1, help="Movies of a user's past that an example carries.")] = 50,
    negatives: Annotated[int, typer.Option(min=0, help="Movies never watched, drawn for every one that was.")] = 1,
    latest: Annotated[int | None, typer.Option(min=1, help="Keep only a user's latest training positives.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the negatives.")] = 1,
    row_group_rows: Annotated[int, typer.Option(min=1, help="Rows of one Parquet row group.")] = ROW_GROUP_ROWS,
) -> None:
    """MovieLens-1M to OUT/{train,validation,test}.parquet and OUT/schema.yaml: will the user watch this movie next?

    A user's events in time order (ties in the file's order); ratings are not used. Every event but the first is a
    positive with the movies before it as its history, oldest first, and gets negatives: movies the user never watched,
    drawn by their popularity in training. Leave one out: a user's last event is test, the one before it validation.
    hist_position and position count events, so ages are lags: the Parquet form has no time stamps. Genres are a bag of
    ids; the first genre is also an id of its own, which the history's genres share; the year is from the title.
    """
    with reporting_errors():
        convert(source, out, history, negatives, latest, seed, row_group_rows)


if __name__ == "__main__":
    app()
