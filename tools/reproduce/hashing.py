"""What do tables with fewer rows than ids cost, and what do a salt per embedding set and managed ids save of it?

    python tools/reproduce/hashing.py synthetic             planted effects of ids, rows / ids from 1/16 to 1
    python tools/reproduce/hashing.py stream                ads that come and go: more than rows, few alive at a time
    python tools/reproduce/hashing.py kuairand              real ids in small tables (make data/kuairand first)

Settings of one table differ in nothing but how ids become rows; differences are taken seed by seed. NE is the loss over
that of the label rate: lower is better. Tables of several sets are as large together as those of one set.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

WIDTH = 16  # of all sets together
USERS, ITEMS = 20_000, 5_000
KUAIRAND_IDS = ("user_id", "video_id", "author_id", "music_id")
HAND_MADE = ["*_bucket", "*_past_days", "exposures_*", "hist_same_*", "hist_like_same_*", "hist_view_same_*"]
Rule = Callable[[dict[str, Any], int], dict[str, Any]]  # (id field, rows) -> how its ids become rows

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


def vocabulary(column: dict[str, Any], rows: int) -> dict[str, Any]:
    return column


def modulo(column: dict[str, Any], rows: int) -> dict[str, Any]:
    return column | {"num_embeddings": rows, "mode": "modulo"}


def hashed(salt: str) -> Rule:
    return lambda column, rows: column | {"num_embeddings": rows, "mode": "hash", "salt": salt}


def managed(**options: Any) -> Rule:
    """As many rows as the others have: an eighth of them is shared."""

    def rule(column: dict[str, Any], rows: int) -> dict[str, Any]:
        ways = min(32, rows // 8)
        own = (rows - rows // 8) // ways * ways
        part = {"ways": ways, "shared_rows": rows - own, **options}
        return column | {"num_embeddings": own, "mode": "managed", "managed": part}

    return rule


SALTS: Mapping[str, tuple[int, Rule]] = {
    "1 set": (1, hashed("field")),
    "2 sets, one salt": (2, hashed("field")),
    "2 sets, a salt each": (2, hashed("set")),
    "4 sets, one salt": (4, hashed("field")),
    "4 sets, a salt each": (4, hashed("set")),
}
STREAM: Mapping[str, tuple[int, Rule]] = {
    "modulo": (2, modulo),
    "hash, one salt": (2, hashed("field")),
    "hash, a salt each": (2, hashed("set")),
    "managed, lru": (2, managed(evict="lru")),
    "managed, lru, seen twice": (2, managed(evict="lru", min_count=2)),
    "managed, lfu": (2, managed(evict="lfu")),
    "managed, distance_lfu": (2, managed(evict="distance_lfu")),
    "a row per id": (2, vocabulary),
}


# ------------------------------------------------------------------------------------------------------------ the logs


def planted_log(folder: Path, rows: int, seed: int) -> list[dict[str, Any]]:
    """Users and items with effects, and a product of hidden vectors; the popular ones come often. -> id fields."""
    rng = np.random.default_rng(seed)
    columns, logit = {}, np.full(rows, -1.0)
    hidden = []
    for name, number in (("user", USERS), ("item", ITEMS)):
        share = 1 / (10 + np.arange(number)) ** 0.8
        columns[name] = rng.permutation(number)[rng.choice(number, rows, p=share / share.sum())]
        logit += rng.normal(0, 1, number)[columns[name]]
        hidden.append(rng.normal(0, 0.7, (number, 4))[columns[name]])
    logit += (hidden[0] * hidden[1]).sum(1)
    write(folder, columns, logit, rng, test=rows // 8)
    return [{"name": "user", "num_embeddings": USERS}, {"name": "item", "num_embeddings": ITEMS}]


def stream_log(folder: Path, rows: int, seed: int, *, ads: int = 30_000, alive: int = 2_000) -> list[dict[str, Any]]:
    """In the order of time: a window of `alive` ads moves over all of them; each has an effect. -> id fields."""
    rng = np.random.default_rng(seed)
    first = np.linspace(0, ads - alive, rows)
    within = (alive * rng.random(rows) ** 1.5).astype(np.int64)  # some are shown more often than others
    ad = np.minimum(first.astype(np.int64) + rng.permutation(alive)[within], ads - 1)
    page = rng.integers(0, 50, rows)
    logit = -1 + rng.normal(0, 1.2, ads)[ad] + rng.normal(0, 0.5, 50)[page]
    names = rng.permutation(ads)  # ids are no counter, which modulo would spread evenly
    write(folder, {"ad": names[ad], "page": page}, logit, rng, test=rows // 8)
    return [{"name": "ad", "num_embeddings": ads}, {"name": "page", "num_embeddings": 50, "keep": True}]


def write(folder: Path, columns: Mapping[str, np.ndarray], logit: np.ndarray, rng: Any, test: int) -> None:
    table = pa.table({**columns, "click": (rng.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(np.int8)})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.slice(0, len(logit) - test), folder / "train.parquet", row_group_size=20_000)
    pq.write_table(table.slice(len(logit) - test), folder / "test.parquet")


# ------------------------------------------------------------------------------------------------------------- the runs


def small_run(folder: Path, ids: Sequence[dict], num_sets: int, seed: int, **train_options: Any) -> dict[str, Any]:
    return {
        "data": {
            "train": str(folder / "train.parquet"),
            "test": str(folder / "test.parquet"),
            "schema": {"ids": list(ids), "tasks": [{"name": "click"}]},
        },
        "model": {
            "preset": "multi_embedding",
            "num_sets": num_sets,
            "embedding_dim": WIDTH // num_sets,
            "expert": {"kind": "flat_dnn", "hidden": [64]},
            "expert_dim": 32,
        },
        "train": {
            "run_dir": str(folder / "run"),
            "global_batch_size": 512,
            "learning_rate": 0.002,
            "embedding_learning_rate": 0.1,
            "num_threads": 1,
            "seed": seed,
            "log_every": 10_000,
        }
        | train_options,
    }


def result_of(content: dict[str, Any], *, progressive: bool = False) -> dict[str, dict[str, float]]:
    """Test metrics of a run; progressive: those of the training examples, each judged before it is learned from."""
    import json

    from hmoe_rec.config import resolve_config
    from hmoe_rec.training.trainer import train

    report = train(resolve_config(content))
    if not progressive:
        return report["test"]
    lines = (Path(content["train"]["run_dir"]) / "evaluations.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["train"]


def with_rows(ids: Sequence[dict], rule: Rule, rows: float) -> list[dict]:
    """rows: of a table; below or equal to 1: per id."""
    fields = [{k: v for k, v in column.items() if k != "keep"} for column in ids]
    counts = [max(8, int(c["num_embeddings"] * rows)) if rows <= 1 else int(rows) for c in ids]
    return [f if c.get("keep") else rule(f, n) for f, c, n in zip(fields, ids, counts, strict=True)]


def renamed(schema: dict[str, Any], seed: int) -> dict[str, Any]:
    """Other names give other salts: which ids collide is drawn anew for every seed."""
    names = {name: f"{name}-{seed}" for name in KUAIRAND_IDS}
    ids = [
        {**c, "name": names[c["name"]], "column": c["name"]} if c["name"] in names else {**c, "keep": True}
        for c in schema["ids"]
    ]
    sequences = [
        {**s, "columns": {column: names.get(target, target) for column, target in s["columns"].items()}}
        for s in schema.get("sequences", ())
    ]
    return {**schema, "ids": ids, "sequences": sequences}


def show(title: str, found: Mapping[str, Sequence[Mapping[str, float]]], base: str, metrics: Sequence[str]) -> None:
    """found: setting -> a run's metrics per seed."""
    table = Table(title=title, title_justify="left")
    table.add_column("setting", no_wrap=True)
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
        table.add_column(f"minus {base}, 1e-4", justify="right", no_wrap=True)
    for setting, runs in found.items():
        cells = []
        for metric in metrics:
            values = [run[metric] for run in runs]
            differences = [1e4 * (v - b[metric]) for v, b in zip(values, found[base], strict=True)]
            error = statistics.stdev(differences) / math.sqrt(len(runs)) if len(runs) > 1 else math.nan
            mean = statistics.mean(differences)
            cells += [f"{statistics.mean(values):.4f}", "" if setting == base else f"{mean:+.1f} ±{error:.1f}"]
        table.add_row(setting, *cells)
    Console(width=160, highlight=False).print(table)


Seeds = Annotated[int, typer.Option(help="Seeds 1 to this; the log and the run take both.")]
Out = Annotated[Path, typer.Option(help="Where the logs and runs go.")]


@app.command()
def synthetic(
    rows: Annotated[int, typer.Option(help="Examples.")] = 240_000,
    ratios: Annotated[str, typer.Option(help="Rows of a table / ids, comma list.")] = "0.0625,0.125,0.25,0.5,1",
    seeds: Seeds = 5,
    out: Out = Path("runs/hashing"),
) -> None:
    """Planted effects of users and items."""
    for ratio in map(float, ratios.split(",")):
        found: dict[str, list] = {label: [] for label in SALTS}
        for seed in track(range(1, seeds + 1), f"rows / ids {ratio:g}", console=Console(stderr=True)):
            ids = planted_log(out, rows, seed)
            for label, (num_sets, rule) in SALTS.items():
                fields = with_rows(ids, rule, ratio)
                found[label].append(result_of(small_run(out, fields, num_sets, seed))["click"])
        for num_sets in (2, 4):
            pair = {label: found[label] for label in ("1 set", *(x for x in SALTS if x[0] == str(num_sets)))}
            show(f"rows / ids {ratio:g}, {num_sets} sets", pair, f"{num_sets} sets, one salt", ("auc", "ne"))


@app.command()
def stream(
    rows: Annotated[int, typer.Option(help="Examples.")] = 240_000,
    table_rows: Annotated[int, typer.Option(help="Rows of the ads' tables.")] = 4096,
    seeds: Seeds = 5,
    out: Out = Path("runs/hashing"),
) -> None:
    """30,000 ads of which 2,000 are alive at a time, in the order of time, each example judged before it is learned."""
    found: dict[str, list] = {label: [] for label in STREAM}
    for seed in track(range(1, seeds + 1), "seeds", console=Console(stderr=True)):
        ids = stream_log(out, rows, seed)
        for label, (num_sets, rule) in STREAM.items():
            fields = with_rows(ids, rule, table_rows)
            content = small_run(out, fields, num_sets, seed, shuffle=False)
            found[label].append(result_of(content, progressive=True)["click"])
    show(f"{table_rows:,} rows for 30,000 ads, progressive", found, "modulo", ("auc", "ne"))


@app.command()
def kuairand(
    ratios: Annotated[str, typer.Option(help="Rows of a table / ids, comma list.")] = "0.03125,0.125,0.5",
    config: Annotated[str, typer.Option(help="A run file.")] = "configs/kuairand.yaml",
    alone: Annotated[bool, typer.Option(help="Without the hand-made counts and rates of the past days.")] = False,
    seeds: Seeds = 5,
    out: Out = Path("runs/hashing"),
) -> None:
    """User, video, author and music ids of KuaiRand hashed into small tables; the model of the run file, two sets."""
    content = yaml.safe_load(Path(config).read_text())
    schema = yaml.safe_load(Path(content["data"]["schema"]).read_text())
    tasks = [task["name"] for task in schema["tasks"]]
    for ratio in map(float, ratios.split(",")):
        found: dict[str, list] = {}
        for seed in track(range(1, seeds + 1), f"rows / ids {ratio:g}", console=Console(stderr=True)):
            for label in ("2 sets, one salt", "2 sets, a salt each"):
                num_sets, rule = SALTS[label]
                given = renamed(schema, seed)
                fields = with_rows(given["ids"], rule, ratio)
                model = {k: v for k, v in content["model"].items() if k != "preset"}
                run = {
                    "data": {**content["data"], "schema": {**given, "ids": fields}},
                    "model": {**model, "preset": "multi_embedding", "num_sets": num_sets},
                    "train": {**content["train"], "run_dir": str(out / "run"), "seed": seed, "num_threads": 1},
                }
                if alone:
                    run["data"]["leave_out"] = HAND_MADE
                found.setdefault(label, []).append(result_of(run))
        for task in tasks:
            runs = {label: [run[task] for run in metrics] for label, metrics in found.items()}
            show(f"rows / ids {ratio:g}: {task}", runs, "2 sets, one salt", ("auc", "ne"))


if __name__ == "__main__":
    app()
