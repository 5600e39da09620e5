"""Kills x other numbers of ranks and plans x streams x object stores x batches that do not divide, drawn from a seed.

    python tools/reproduce/soak/soak.py --rounds 12 --seed 1
    python tools/reproduce/soak/soak.py --rounds 4 --seed 1 --stores s3 --faults 0.05

Every round draws a scene: a small run is started, killed (all ranks, one of them, or told to stop) at drawn moments,
and each time started again with another number of ranks and another plan, in a directory or in a bucket whose server
fails now and then. In the end the run must have done every step once, and have the parameters, optimizer states and
metrics of the same run on one process that nobody disturbed. The exit status is the number of rounds that did not.
"""

import json
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from bucket import object_store  # noqa: E402
from lives import STOPPED, Life, live  # noqa: E402
from scenes import Scene, content_of, draw_scene, prepare_log, rows_of, stream_of  # noqa: E402

from hmoe_rec import io  # noqa: E402
from hmoe_rec.training.checkpoint import CheckpointManager, read_unsharded  # noqa: E402

#: Sums over ranks round otherwise than those of one process, and Adam divides by what has been rounded.
PARAMETERS, METRICS = 2e-3, 1e-4


@dataclass(frozen=True)
class Verdict:
    """What a scene came to. `problems` is empty where all is as it should be."""

    scene: Scene
    lives: int
    kills: int
    parameters: float
    metrics: float
    seconds: float
    problems: tuple[str, ...]


def play(scene: Scene, folder: Path, environment: dict[str, str], place: str) -> Verdict:
    """The disturbed run in `place` beside the undisturbed one, which is local."""
    began = time.perf_counter()
    content = content_of(folder, scene)
    run_file = folder / f"scene_{scene.seed}.yaml"
    run_file.write_text(yaml.safe_dump(content))
    words: list[str] = []
    if scene.mode == "follow":
        stream_of(folder, scene, folder / f"stream_{scene.seed}")
        words = ["--follow", str(folder / f"stream_{scene.seed}")]
    draw, problems, kills = random.Random(scene.seed), [], 0
    calm = str(folder / f"calm_{scene.seed}")
    for where, lives in ((calm, [Life(1, "table_wise")]), (place, scene.lives)):
        for life in lives:
            outcome = live(run_file, life, [f"train.run_dir={where}", *words], environment, draw)
            kills += life.after is not None and outcome.status in (None, STOPPED)
            if outcome.status not in (None, 0, STOPPED):
                problems.append(f"{life}: status {outcome.status}: {outcome.output[-1500:]}")
                return Verdict(scene, len(scene.lives), kills, 0, 0, time.perf_counter() - began, tuple(problems))
    parameters, metrics = differences(calm, place, problems)
    if scene.mode == "follow":
        expected, learned = rows_of(folder, scene), report_of(place)["rows"]
        problems += [] if learned == expected else [f"{learned} rows learned of {expected}"]
    return Verdict(scene, len(scene.lives), kills, parameters, metrics, time.perf_counter() - began, tuple(problems))


def differences(calm: str, place: str, problems: list[str]) -> tuple[float, float]:
    """Largest differences of parameters and optimizer states, and of test metrics."""
    one, other = (tensors_of(where) for where in (calm, place))
    if one.keys() != other.keys():
        problems.append(f"other tensors: {sorted(one.keys() ^ other.keys())[:5]}")
    parameters = max(
        float((one[k].float() - other[k].float()).abs().max()) for k in one.keys() & other.keys() if one[k].numel()
    )
    reports = [report_of(where) for where in (calm, place)]
    if reports[0]["steps"] != reports[1]["steps"]:
        problems.append(f"{reports[1]['steps']} steps in place of {reports[0]['steps']}")
    metrics = max(
        abs(value - reports[1]["test"][task][name])
        for task, values in reports[0]["test"].items()
        for name, value in values.items()
        if isinstance(value, float)
    )
    problems += [f"parameters differ by {parameters:.2g}"] if not parameters <= PARAMETERS else []
    problems += [f"metrics differ by {metrics:.2g}"] if not metrics <= METRICS else []
    return parameters, metrics


def tensors_of(run_dir: str) -> dict[str, Any]:
    found = CheckpointManager(io.join(run_dir, "checkpoints")).latest()
    assert found is not None, f"{run_dir}: no checkpoint"
    kept = ("model.", "optimizer.")
    return {key: x for key, x in read_unsharded(found).items() if key.startswith(kept) and x.is_floating_point()}


def report_of(run_dir: str) -> dict[str, Any]:
    with io.open(io.join(run_dir, "report.json"), "r") as file:
        return json.load(file)


def main(
    rounds: Annotated[int, typer.Option(help="Scenes.")] = 12,
    seed: Annotated[int, typer.Option(help="Of the first scene; the next ones count on.")] = 1,
    stores: Annotated[str, typer.Option(help="Comma list: local, s3 (a server that is started here).")] = "local,s3",
    faults: Annotated[float, typer.Option(help="Share of the bucket's answers that fail or are cut.")] = 0.02,
    out: Annotated[Path, typer.Option(help="Emptied first.")] = Path("runs/soak"),
) -> None:
    """Play the scenes one after the other and print a table."""
    shutil.rmtree(out, ignore_errors=True)
    prepare_log(out.resolve() / "log")
    console, verdicts = Console(width=170), list[Verdict]()
    for number in range(seed, seed + rounds):
        scene = draw_scene(number, tuple(stores.split(",")))
        console.print(f"{number}: {scene}", highlight=False)
        if scene.store == "s3":
            with object_store(faults, seed=number) as (bucket, environment):
                verdicts.append(play(scene, out.resolve() / "log", environment, f"{bucket}/run_{number}"))
        else:
            verdicts.append(play(scene, out.resolve() / "log", {}, str(out.resolve() / f"run_{number}")))
        for problem in verdicts[-1].problems:
            console.print(f"   WRONG: {problem}", markup=False, highlight=False)
    console.print(table_of(verdicts))
    raise SystemExit(sum(bool(verdict.problems) for verdict in verdicts))


def table_of(verdicts: list[Verdict]) -> Table:
    table = Table(
        "seed", "what", "store", "batch", "lives: ranks x plan, end @ line", title="Soak", title_justify="left"
    )
    for column in ("kills", "parameters", "metrics", "s", "verdict"):
        table.add_column(column, justify="right")
    for v in verdicts:
        scene, verdict = v.scene, "WRONG" if v.problems else "ok"
        damaged = f", {len(scene.damaged)} damaged files" if scene.damaged else ""
        figures = (str(v.kills), f"{v.parameters:.1e}", f"{v.metrics:.1e}", f"{v.seconds:.0f}", verdict)
        lives = " | ".join(map(str, scene.lives))
        table.add_row(str(scene.seed), scene.mode + damaged, scene.store, str(scene.batch), lives, *figures)
    return table


if __name__ == "__main__":
    typer.run(main)
