r"""Writes a synthetic ads log whose truth is known: Parquet files, their schema, and the best AUC a model can reach.

A row is an exposure of item i in slot s to user u with a history of earlier behaviors. The true logit of task t is::

    z_t = b_t + A_t <v_tu, x_i> / sqrt(R) + U_t bias_u + Q_t quality_ti + N_t f(price) + H_t h(history, i) + S_t slot_s

    P(click) = sigmoid(z_click)     P(like) = sigmoid(z_like)     P(buy | click) = sigmoid(z_buy)

The sizes A, U, Q, N, H, S are `effects` ("affinity", "user", "item", "price", "history", "slot"; defaults in
`synthetic_world.EFFECTS`). The intercepts b_t make the label rates `click_rate`, `like_rate` and `buy_rate`. The label
of buy is null where there is no click. What is planted, with r = `conflict` and e, e' ~ N(0, I):

- **Tasks that conflict**: v_like = r v_click + sqrt(1 - r^2) e, so the affinities of click and like correlate with r
  over all pairs of user and item, and one vector per user cannot serve both. v_buy = (v_click + e') / sqrt(2).
  quality_like is made of quality_click likewise (clickbait); quality_buy = quality_click.
- **Shared strength**: half of the variance of v_click is a function of age bucket and gender, of x_i of category and
  tags, of bias_u of the city, of quality of the author; the rest belongs to the id.
- **Ordinal effect**: f(price) = sin(3 pi log(1 + price) / log 1024) + 1[price >= 100]; 0 where the price is null. Price
  is an integer in [0, 1023], log-normal, drawn for every exposure. A share `unseen_price_share` of its values never
  occurs in training, but in validation and test.
- **Temporal category effect**: h = sum_p exp(-k_p / tau_a) (1[c_p = a] + 0.4 1[c_p = related(a)]), where a is the
  target's category and c_p that of the p-th latest behavior. k_p = p - 1 (`history_clock` "position") or
  log2(1 + age / 2 h) ("age"). tau_a runs from `fastest_decay` to `slowest_decay` over the categories in random order:
  category and position interact. related(a) = (a + C // 2) mod C.
- **Skew**: users, items inside a category, categories and cities have a popularity about proportional to rank^-`skew`
  (categories: half of that exponent). With even odds a category is one of the user's four favorites, in the exposure
  as in the history. Histories have 0 to `max_history` behaviors (5 % none, half full), drawn anew for every exposure.
- **Pre-trained vectors**: user_vector = M v_click + noise and item_vector = M x + noise with one orthonormal M, so that
  their cosine tells of the affinity to click; the noise has standard deviation `vector_noise`.
- **No effect at all**: age_days of the item, and the example weight (0.5, 1 or 1.5, independent of all else).

Time runs over ten days: training has the first eight, validation the ninth, test the tenth. Rows are in its order.

Files of a log::

    train.parquet validation.parquet test.parquet   the log
    schema.yaml                                     its schema
    truth.json                                      arguments, intercepts, decay; per split and task the AUC, log loss
                                                    and normalized entropy of the true probabilities on these rows
    truth/{split}.parquet                           true probabilities, row by row
    truth/world.npz                                 what was drawn for users and items: `synthetic_world.World`
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hmoe_rec.data import synthetic_world as sw
from hmoe_rec.data.synthetic_rows import blocks, schema_of
from hmoe_rec.data.true_score import TrueScore
from hmoe_rec.progress import Progress
from hmoe_rec.types import ConfigError, DataError

GENERATOR = "hmoe_rec synthetic log, version 1"  # a new version where the same arguments give other rows


@dataclass(frozen=True)
class SyntheticLog:
    """Where the files are, and what `truth.json` says.

    `truth["bayes"][split][task]` has auc, auc_error_bound, logloss, ne, label_mean, examples and positives, weighted as
    the schema says; the same under `unweighted`; and `auc_without_order`, what is left to a model that knows all but
    the order of the behaviors.
    """

    directory: str
    train: str
    validation: str
    test: str
    schema: str
    truth_file: str
    truth: Mapping[str, Any]

    def bayes_auc(self, split: str) -> dict[str, float]:
        return {task: figures["auc"] for task, figures in self.truth["bayes"][split].items()}


def synthesize(
    directory: str | os.PathLike,
    *,
    rows: int = 400_000,
    validation_rows: int = 50_000,
    test_rows: int = 50_000,
    seed: int = 1,
    num_users: int = 2000,
    num_items: int = 1000,
    num_categories: int = 20,
    max_history: int = 20,
    latent_dim: int = 2,
    vector_dim: int = 8,
    vector_noise: float = 0.5,
    skew: float = 0.5,
    click_rate: float = 0.35,
    like_rate: float = 0.2,
    buy_rate: float = 0.3,
    conflict: float = -0.6,
    history_clock: Literal["position", "age"] = "position",
    fastest_decay: float = 1.0,
    slowest_decay: float = 6.0,
    missing: float = 0.05,
    unseen_price_share: float = 0.0,
    effects: Mapping[str, Mapping[str, float]] | None = None,
    row_group_rows: int = 16384,
    progress: Progress | None = None,
) -> SyntheticLog:
    """Writes a log into `directory`, which appears when it is complete and replaces a synthetic log that stands there.

    Args:
        directory: a local directory; its parents are made.
        rows: exposures of the training split.
        seed: equal arguments give equal rows.
        latent_dim: R, dimensions of a preference.
        vector_dim: width of the pre-trained vectors, >= latent_dim.
        vector_noise: standard deviation of the noise in them; 0 = they tell all.
        skew: exponent of popularity, in [0, 1).
        buy_rate: among clicked rows.
        conflict: correlation of the preferences of click and like, in [-1, 1].
        fastest_decay: behaviors (or doublings of the age) after which a history effect falls to 1/e, at the least.
        slowest_decay: the same, at the most.
        missing: share of nulls in city, age bucket and price.
        unseen_price_share: share of price values that training does not show.
        effects: task -> effect -> size, where it differs from the default.
        row_group_rows: rows of a Parquet row group; it does not change the rows.
        progress: is called with the rows done and all rows after every block; `progress_bar` makes one.

    Raises:
        ConfigError: an argument that is out of its range.
        DataError: the directory exists and holds something else, or cannot be written.
    """
    given = dict(locals())
    arguments = sw.SyntheticArguments(**{name: given[name] for name in sw.SyntheticArguments.__dataclass_fields__})
    target = _local(directory)
    with _alone(target):
        return _make(target, arguments, row_group_rows, progress)


def ensure_synthetic(
    directory: str | os.PathLike, *, row_group_rows: int = 16384, progress: Progress | None = None, **arguments: Any
) -> SyntheticLog:
    """The log of these arguments of `synthesize`: the one that stands in `directory`, or else a new one.

    Any number of processes may ask at once: one makes it, the others wait and find it.

    Raises:
        ConfigError: an argument that is out of its range.
        DataError: the directory exists and holds something else, or cannot be written.
    """
    wanted, target = sw.SyntheticArguments(**arguments), _local(directory)
    found = _existing(target, wanted)
    if found is not None:
        return found
    with _alone(target):
        return _existing(target, wanted) or _make(target, wanted, row_group_rows, progress)


def open_synthetic(directory: str | os.PathLike) -> SyntheticLog | None:
    """The complete log in `directory`, if there is one of this generator."""
    path = _local(directory)
    try:
        truth = json.loads((path / "truth.json").read_text())
    except (OSError, ValueError):
        return None
    names = (*(f"{split}.parquet" for split in sw.SPLITS), "schema.yaml", "truth.json")
    log = SyntheticLog(str(path), *(str(path / name) for name in names), truth=truth)
    complete = all((path / name).exists() for name in names)
    return log if complete and isinstance(truth, dict) and truth.get("generator") == GENERATOR else None


def _existing(target: Path, wanted: sw.SyntheticArguments) -> SyntheticLog | None:
    found = open_synthetic(target)
    return found if found is not None and found.truth["arguments"] == wanted.to_dict() else None


# ---------------------------------------------------------------------------------------------------------- files


def _local(directory: str | os.PathLike) -> Path:
    if "://" in str(directory):
        raise ConfigError(f"{directory}: a synthetic log is written to a local directory; copy it from there")
    return Path(directory).resolve()


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process at a time makes this log; the lock ends with the process, however it ends."""
    import fcntl

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.parent / f".{target.name}.lock", "w")
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{target}: cannot write a synthetic log here ({reason}); give another directory") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(target: Path, a: sw.SyntheticArguments, row_group_rows: int, progress: Progress | None) -> SyntheticLog:
    if row_group_rows < 1:
        raise ConfigError(f"row_group_rows of the synthetic log must be >= 1, got {row_group_rows}")
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]) and not _is_ours(target):
        raise DataError(f"{target}: exists and is no synthetic log; remove it or give another directory")
    # We hold the lock: what an earlier process left unfinished is nobody's.
    unfinished, old = (target.parent / f".{target.name}.{suffix}" for suffix in ("unfinished", "replaced"))
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        (unfinished / "truth").mkdir(parents=True)
        _write(unfinished, a, row_group_rows, progress)
        if target.exists():
            target.rename(old)
        unfinished.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{target}: the synthetic log could not be written ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    log = open_synthetic(target)
    assert log is not None, target
    return log


def _is_ours(target: Path) -> bool:
    try:
        return str(json.loads((target / "truth.json").read_text())["generator"]).startswith("hmoe_rec synthetic log")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(folder: Path, arguments: sw.SyntheticArguments, row_group_rows: int, progress: Progress | None) -> None:
    world = sw.build_world(arguments)
    intercepts = sw.fit_intercepts(world)
    total, done, bayes = sum(map(arguments.split_rows, sw.SPLITS)), 0, {}
    for split in sw.SPLITS:
        scores = [TrueScore() for _ in sw.TASKS]
        with (
            _RowGroups(folder / f"{split}.parquet", row_group_rows) as log_file,
            _RowGroups(folder / "truth" / f"{split}.parquet", row_group_rows) as truth_file,
        ):
            for log_table, truth_table in blocks(world, intercepts, split, scores):
                log_file.add(log_table)
                truth_file.add(truth_table)
                done += log_table.num_rows
                if progress:
                    progress(done, total)
        bayes[split] = {task: score.figures() for task, score in zip(sw.TASKS, scores, strict=True)}
    arrays: dict[str, Any] = {name: value for name, value in vars(world).items() if isinstance(value, np.ndarray)}
    np.savez(folder / "truth" / "world.npz", **arrays)
    (folder / "schema.yaml").write_text(schema_of(arguments).to_yaml())
    (folder / "truth.json").write_text(json.dumps(_truth(world, intercepts, bayes), indent=1, allow_nan=False))


def _truth(world: sw.World, intercepts: np.ndarray, bayes: dict[str, Any]) -> dict[str, Any]:
    return {
        "generator": GENERATOR,
        "made": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "arguments": world.arguments.to_dict(),
        "intercepts": dict(zip(sw.TASKS, intercepts.tolist(), strict=True)),
        "history": {
            "decay_by_category": world.decay.tolist(),
            "related_category": world.related.tolist(),
            "related_share": sw.RELATED_SHARE,
        },
        "bayes": bayes,
    }


# Columns worth a dictionary. Lists go by the path of their elements.
_REPEATING = "user_id city age_bucket gender item_id category_id author_id slot price weight".split()
_REPEATING += [f"{name}.list.element" for name in ("tags", "hist_item_id", "hist_category_id")]


class _RowGroups:
    """Tables of any length -> one Parquet file whose row groups have `rows` rows, and the last one what is left."""

    def __init__(self, path: Path, rows: int) -> None:
        self.path, self.rows, self.writer = path, rows, None
        self.waiting: list[pa.Table] = []

    def __enter__(self) -> "_RowGroups":
        return self

    def add(self, table: pa.Table) -> None:
        self.waiting.append(table)
        held = pa.concat_tables(self.waiting)
        whole = held.num_rows - held.num_rows % self.rows
        if whole:
            self._write(held.slice(0, whole))
            self.waiting = [held.slice(whole)]

    def _write(self, table: pa.Table) -> None:
        if self.writer is None:
            self.writer = pq.ParquetWriter(
                self.path,
                table.schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=_REPEATING,  # pyright: ignore[reportArgumentType]  it also takes names of columns
            )
        self.writer.write_table(table, row_group_size=self.rows)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None and sum(t.num_rows for t in self.waiting):
            self._write(pa.concat_tables(self.waiting))
        if self.writer is not None:
            self.writer.close()
