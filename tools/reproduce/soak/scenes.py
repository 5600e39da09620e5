"""A seed -> what a run goes through."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from lives import Life
from small_run import make_log, run_file

PLANS = ("table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel", "auto")
RANKS = (1, 2, 2, 3, 3, 5)
TRAIN_ROWS = 2000
#: What 2,000 examples leave for the last batch: 2, 5, 48, 22, 2 and 5.
BATCHES = (37, 57, 61, 43, 111, 133)
FILES = 14


@dataclass(frozen=True)
class Scene:
    """Attributes: mode: train or follow. store: local or s3. damaged: files of the stream that are no Parquet."""

    seed: int
    mode: str
    store: str
    batch: int
    lives: tuple[Life, ...]
    damaged: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.mode}, {self.store}, batch {self.batch}: {' | '.join(map(str, self.lives))}"


def draw_scene(seed: int, stores: tuple[str, ...]) -> Scene:
    """The next scene of a soak; the same for the same seed."""
    draw = random.Random(seed)
    mode = draw.choice(("train", "follow"))
    batch = draw.choice(BATCHES)
    steps = 2 * -(-TRAIN_ROWS // batch) if mode == "train" else FILES
    kills = draw.randint(1, 3)
    lives = [
        Life(
            draw.choice(RANKS),
            draw.choice(PLANS),
            after=draw.randint(1, max(2, steps // (kills + 1))),
            seconds=draw.uniform(0, 0.4),
            end=draw.choice(("all", "all", "one", "stop")),
        )
        for _ in range(kills)
    ]
    last = Life(draw.choice(RANKS), draw.choice(PLANS))
    damaged = tuple(sorted(draw.sample(range(1, FILES), draw.randint(0, 2)))) if mode == "follow" else ()
    return Scene(seed, mode, draw.choice(stores), batch, (*lives, last), damaged)


def prepare_log(folder: Path) -> None:
    """The small log of the tests, and its training rows again as files of a stream, of very different sizes."""
    make_log(folder)
    table = pq.read_table(folder / "train.parquet")
    stream = folder / "stream"
    stream.mkdir(exist_ok=True)
    bounds = [TRAIN_ROWS * i * i // FILES**2 for i in range(FILES + 1)]
    for i, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        pq.write_table(table.slice(start, stop - start), stream / f"{i:03}.parquet", row_group_size=97)


def content_of(folder: Path, scene: Scene) -> dict[str, Any]:
    """The run file of a scene, without its place."""
    content = run_file(folder, "run", global_batch_size=scene.batch, checkpoint_every=4, num_threads=1, device="cpu")
    content["model"]["dropout"] = 0.0
    # Row-wise Adagrad keeps a statistic per block of columns, so that it trains otherwise where a plan cuts columns.
    content["train"]["embedding_optimizer"] = "adagrad"
    if scene.mode == "follow":
        del content["data"]["train"]
        content["train"] |= {"epochs": 1, "checkpoint_every": None}
        content["online"] = {"window_files": 1, "checkpoint_windows": 2, "until_idle": 1.0, "poll_seconds": 0.05}
        content["online"] |= {"max_bad_share": 1.0, "patience_seconds": 0}  # damaged files stay so
    return content


def stream_of(folder: Path, scene: Scene, target: Path) -> None:
    """The files of the stream in `target`, some of them damaged: their first half only."""
    target.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(sorted((folder / "stream").glob("*.parquet"))):
        content = file.read_bytes()
        (target / file.name).write_bytes(content[: len(content) // 2] if i in scene.damaged else content)
    (target / "_DONE").touch()


def rows_of(folder: Path, scene: Scene) -> int:
    """Sound rows of the stream."""
    files = sorted((folder / "stream").glob("*.parquet"))
    return sum(pq.read_metadata(f).num_rows for i, f in enumerate(files) if i not in scene.damaged)
