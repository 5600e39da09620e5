"""Do the analyses find what was planted? Logs whose truth is known, trained models, and what is read off them.

    python tools/reproduce/planted.py correlation    category x position: mutual information, the maps of TIM and DIN
    python tools/reproduce/planted.py interests      tastes that differ by task: distances in shared and in own tables

Each seed is a log of its own and a run of each model on it, below --out; finished runs are not trained again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from findings import spread, write_findings
from torch import Tensor

from hmoe_rec.analysis.correlation import BehaviorCounts, Examples, pearson, positions_of, scaled
from hmoe_rec.analysis.correlation_report import Correlation, choose_categories, correlate, question_of
from hmoe_rec.analysis.entanglement import by_task, find_conflicts, measure, read_pairs
from hmoe_rec.analysis.opening import opened
from hmoe_rec.analysis.report import Plot, ReportTable, Section, new_figure
from hmoe_rec.config import load_config
from hmoe_rec.data import synthetic_world as sw
from hmoe_rec.training.learned import training_data
from hmoe_rec.training.trainer import train

BASE = "configs/quickstart.yaml"
BLOCK_ROWS, TRUTH_STREAM = 16384, 7  # a stream of random numbers that no log uses
TASKS = ("click", "like")
COLORS = ("#1a41e5", "#d0803c")

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
Seeds = Annotated[str, typer.Option(help="Comma list.")]
Rows = Annotated[int, typer.Option(help="Rows of a training log.")]
Out = Annotated[Path, typer.Option(help="Logs, runs and findings.")]


def log_of(out: Path, seed: int, rows: int, effects: Mapping[str, float], **world: Any) -> dict[str, Any]:
    """`data.synthetic`: a log that has these effects and no other."""
    planted = {task: dict.fromkeys(sw.EFFECTS[task], 0.0) | dict(effects) for task in sw.TASKS}
    sizes = {"rows": rows, "validation_rows": 2_000, "test_rows": max(2_000, rows // 10)}
    return {"dir": str(out / f"log-seed{seed}"), "seed": seed, "effects": planted, **sizes, **world}


def trained(directory: Path, log: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """A run directory; trains if there is no report yet."""
    if not (directory / "report.json").exists():
        fixed = [f"train.run_dir={directory}", f"train.seed={log['seed']}", "train.num_threads=1"]
        train(load_config(BASE, [f"data.synthetic={dict(log)}", *overrides, *fixed]))
    return str(directory)


def world_of(log: Mapping[str, Any]) -> sw.World:
    return sw.build_world(sw.SyntheticArguments(**{k: v for k, v in log.items() if k != "dir"}))


# --------------------------------------------------------------------------------------------------------- correlation

POOLINGS = {"TIM": "{kind: tim, clock: position}", "DIN": "din"}
SINGLE = ("data.tasks=[click]", "model.preset=single", "model.expert={kind: flat_dnn, hidden: [64]}")
ONE_PASS = ("train.epochs=1", "train.learning_rate=0.01")


def true_information(
    world: sw.World, targets: Sequence[int], categories: Sequence[int], slots: int, rows: int
) -> Tensor:
    """[A, C, P] bits: exposures drawn anew, and the true probability of a click in place of its label."""
    counts = BehaviorCounts(torch.tensor(targets), torch.tensor(categories), slots)
    intercepts = sw.fit_intercepts(world)
    for block, start in enumerate(range(0, rows, BLOCK_ROWS)):
        rng = np.random.default_rng([world.arguments.seed, TRUTH_STREAM, block])
        times = np.full(min(BLOCK_ROWS, rows - start), sw.START_SECONDS)
        e = sw.draw_exposures(world, rng, times, training=True)
        there = np.arange(world.arguments.max_history)[::-1] < e.lengths[:, None]  # oldest first, as in a file
        values = torch.from_numpy(world.category[e.history_items[:, ::-1][there]])
        lengths = torch.from_numpy(e.lengths)
        clicks = torch.from_numpy(sw.sigmoid(sw.true_logits(world, e, intercepts))[:, 0])
        target = torch.from_numpy(world.category[e.items])
        counts.update(Examples(target, values, lengths, positions_of(lengths), clicks))
    return counts.information()


def planted_weights(world: sw.World, targets: Sequence[int], categories: Sequence[int], slots: int) -> Tensor:
    """[A, C, P] what a behavior adds to the logit, over the effect's size: kinship x exp(-(p - 1) / tau_a)."""
    rows = [[float(c == a) + sw.RELATED_SHARE * float(c == world.related[a]) for c in categories] for a in targets]
    decay = torch.tensor(world.decay[list(targets)])
    fading = torch.exp(-torch.arange(slots) / decay[:, None])
    return torch.tensor(rows, dtype=torch.float64)[..., None] * fading[:, None]


def agreement(shown: Tensor, truth: Tensor, own: Sequence[int]) -> dict[str, float]:
    """Means over targets, both [A, C, P]; along: how far a row moves over positions, as a share of the map's range."""
    whole = [pearson(s, t) for s, t in zip(shown, truth, strict=True)]
    rows = [pearson(shown[a, c], truth[a, c]) for a, c in enumerate(own)]
    moves = (shown.amax(2) - shown.amin(2)).amax(1) / (shown.amax((1, 2)) - shown.amin((1, 2))).clamp(min=1e-12)
    scale = torch.stack([scaled(t) for t in truth])
    return {
        "pearson": float(np.mean(whole)),
        "own": float(np.mean(rows)),
        "mae": float((torch.stack([scaled(s) for s in shown]) - scale).abs().mean()),
        "along": float(moves.mean()),
    }


def correlation_of_seed(
    out: Path, seed: int, rows: int, truth_rows: int, positions: int, left_out: Sequence[str]
) -> dict[str, Any]:
    """What is measured in one log and learned from it, beside what is true."""
    log = log_of(out, seed, rows, {"history": 1.8})
    mark = "" if left_out else "-items"
    found: list[Correlation] = []
    for name, pooling in POOLINGS.items():
        overrides = [*SINGLE, *ONE_PASS, *left_out, f"model.encoding.sequences={pooling}"]
        with opened(trained(out / f"{name}{mark}-seed{seed}", log, overrides)) as run:
            question = question_of(run.config, column="hist_category_id", num_slots=positions)
            uris = training_data(run.config)
            chosen = (found[0].targets, found[0].categories) if found else choose_categories(run, question, uris, 10)
            found.append(correlate(run, name, question, uris, *chosen))
    targets, categories = found[0].targets, found[0].categories
    world = world_of(log)
    truth = true_information(world, targets, categories, positions, truth_rows)
    own = [categories.index(a) for a in targets]
    maps = {"mutual information": found[0].bits}
    for each in found:
        maps |= {name: m for name, m in each.maps.items() if name != "data"}
    scores = {name: agreement(m, truth, own) for name, m in maps.items()}
    squared = planted_weights(world, targets, categories, positions).square()
    scores["mutual information"]["pearson_with_squared_weights"] = agreement(found[0].bits, squared, own)["pearson"]
    return {"truth": truth, "maps": maps, "targets": targets, "categories": categories, "scores": scores}


@app.command()
def correlation(
    seeds: Seeds = "1,2,3",
    rows: Rows = 500_000,
    truth_rows: Annotated[int, typer.Option(help="Exposures drawn for the truth.")] = 1_000_000,
    positions: Annotated[int, typer.Option(help="Positions, the latest behavior first.")] = 10,
    items: Annotated[bool, typer.Option("--items", help="Histories of item ids beside those of categories.")] = False,
    out: Out = Path("runs/planted/correlation"),
) -> None:
    """A log with nothing but an effect of category and position: is it measured, and is it learned?"""
    numbers = [int(seed) for seed in seeds.split(",")]
    left_out = () if items else ("data.leave_out=[hist_item_id]",)
    found = {seed: correlation_of_seed(out, seed, rows, truth_rows, positions, left_out) for seed in numbers}
    names = list(found[numbers[0]]["scores"])
    header = ["map", "Pearson", "own category's row", "mean absolute error", "moves along positions"]
    lines = [
        [name, *(spread([f["scores"][name][k] for f in found.values()]) for k in ("pearson", "own", "mae", "along"))]
        for name in names
    ]
    squared = [f["scores"]["mutual information"]["pearson_with_squared_weights"] for f in found.values()]
    summary = [
        f"{rows:,} rows a log, seeds {seeds}. The truth: {truth_rows:,} other exposures with their true probabilities.",
        f"Measured mutual information and the squares of the planted weights: Pearson {spread(squared)}.",
    ]
    caption = "Agreement with the true mutual information, mean over four targets"
    plot = Plot("maps", "True, measured and learned, first seed; all scaled to [0, 1].", draw_maps(found[numbers[0]]))
    content = {str(seed): f["scores"] for seed, f in found.items()}
    tables = [ReportTable(caption, header, lines)]
    source = {"seeds": numbers, "rows": rows, "truth_rows": truth_rows}
    title = "A planted effect of category and position"
    write_findings(Section("planted_correlation", title, summary, tables, [plot], content, source), out)


def draw_maps(found: Mapping[str, Any]) -> Any:
    maps = {"truth": found["truth"], **found["maps"]}
    figure, axes = new_figure(2.1 * len(maps), 1.9 * len(found["targets"]), len(found["targets"]), len(maps))
    for a, target in enumerate(found["targets"]):
        for axis, (name, values) in zip(axes[a], maps.items(), strict=True):
            axis.imshow(scaled(values[a]).numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if a == 0:
                axis.set_title(name.replace(": ", "\n"), fontsize=8)
        axes[a][0].set_ylabel(f"target {target}", fontsize=8)
    return figure


# ----------------------------------------------------------------------------------------------------------- interests

PRESETS = ("shared_bottom", "stem")
TEST_AUCS = [f"test AUC {task}" for task in TASKS]
TWO_IDS = (
    f"data.tasks=[{','.join(TASKS)}]",
    "data.leave_out=[city,age_bucket,gender,category_id,author_id,tags,slot,price,age_days,'*_vector','hist*']",
    "model.expert={kind: ipnn, embeddings: false, hidden: [16]}",
)


def interests_of_seed(out: Path, seed: int, rows: int, conflict: float) -> dict[str, Any]:
    """preset -> what the distances of its sets say of pairs of opposite labels, on the log's test rows."""
    world = {"conflict": conflict, "num_users": 1000, "num_items": 500, "like_rate": 0.35}
    log = log_of(out, seed, rows, {"affinity": 2.0}, **world)
    found: dict[str, Any] = {}
    for preset in PRESETS:
        overrides = [*TWO_IDS, f"model.preset={preset}", "model.embedding_dim=8"]
        directory = trained(out / f"{preset}-seed{seed}", log, overrides)
        with opened(directory) as run:
            pairs = read_pairs(run, run.uris(), "user_id", "item_id", rows=None)
        conflicts = find_conflicts(pairs, 0, 1, "labels")
        test = json.loads((Path(directory) / "report.json").read_text())["test"]
        found[preset] = {
            "distances": {s: (pairs.distances(s)["cosine"], conflicts) for s in pairs.users},
            "sets": {s: of["cosine"] for s, of in measure(pairs, conflicts).items()},
            "positives_nearer": by_task(pairs, TASKS),
            "auc": {task: test[task]["auc"] for task in TASKS},
        }
    return found


def separation(of_set: Mapping[str, float]) -> float:
    """How well a distance tells the two kinds of pairs apart: .5 = not at all, 1 = always, whichever is nearer."""
    return max(of_set["c1_nearer"], 1 - of_set["c1_nearer"])


def served(found: Mapping[str, Any]) -> float:
    """How well positives and negatives of the worse served task are told apart by the set that does so best."""
    nearer = found["positives_nearer"].values()
    return min(max(max(of[task], 1 - of[task]) for of in nearer) for task in TASKS)


@app.command()
def interests(
    seeds: Seeds = "1,2,3",
    rows: Rows = 300_000,
    conflicts: Annotated[str, typer.Option(help="Correlations of the two tasks' tastes, comma list.")] = "0.5,0,-0.6",
    out: Out = Path("runs/planted/interests"),
) -> None:
    """A log with nothing but tastes, which differ between two tasks: which tables keep them apart?"""
    numbers = [int(seed) for seed in seeds.split(",")]
    found = {
        conflict: {
            seed: interests_of_seed(out / f"conflict{conflict}", seed, rows, float(conflict)) for seed in numbers
        }
        for conflict in conflicts.split(",")
    }
    lines, content = [], {}
    for conflict, by_seed in found.items():
        for preset in PRESETS:
            runs = [f[preset] for f in by_seed.values()]
            best = [max(run["sets"].values(), key=separation) for run in runs]
            figures = [[b["ks"] for b in best], [separation(b) for b in best], [served(run) for run in runs]]
            figures += [[run["auc"][task] for run in runs] for task in TASKS]
            lines.append([conflict, preset, *map(spread, figures)])
        content[conflict] = {
            seed: {p: {k: v for k, v in x.items() if k != "distances"} for p, x in f.items()}
            for seed, f in by_seed.items()
        }
    header = ["correlation of tastes", "preset", "KS", "AUC of the distance", "serves both", *TEST_AUCS]
    caption = (
        "KS and AUC: the set that tells click without like from like without click best. Serves both: AUC of "
        "the distance for the task that is served worse, by the set that serves it best"
    )
    tables = [ReportTable(caption, header, lines, left=2)]
    tables += [_by_set(conflict, by_seed) for conflict, by_seed in found.items()]
    first = next(iter(found))
    caption = f"1 - cosine of user and item, correlation of tastes {first}, seed {numbers[0]}."
    plot = Plot("distances", caption, draw_distances(found[first][numbers[0]]))
    summary = [f"{rows:,} rows a log, seeds {seeds}; one inner product of user and item a set, an MLP behind it."]
    source = {"seeds": numbers, "rows": rows}
    title = "Planted tastes that differ by task"
    write_findings(Section("planted_interests", title, summary, tables, [plot], content, source), out)


def _by_set(conflict: str, by_seed: Mapping[int, Any]) -> ReportTable:
    header = ["seed", "preset", "set", "KS", "P(C1 nearer)", *(f"P(positive nearer), {task}" for task in TASKS)]
    lines = []
    for seed, presets in by_seed.items():
        for preset, found in presets.items():
            for s, of in found["sets"].items():
                near = [f"{found['positives_nearer'][s][task]:.2f}" for task in TASKS]
                lines.append([str(seed), preset, s, f"{of['ks']:.2f}", f"{of['c1_nearer']:.2f}", *near])
    return ReportTable(f"Correlation of tastes {conflict}, set by set (C1: click and no like)", header, lines, left=3)


def draw_distances(presets: Mapping[str, Any]) -> Any:
    shown = [(preset, s, *of["distances"][s], of["sets"][s]) for preset, of in presets.items() for s in of["sets"]]
    figure, axes = new_figure(3.2 * len(shown), 2.8, 1, len(shown))
    for axis, (preset, s, distances, conflicts, figures) in zip(axes, shown, strict=True):
        bins = np.linspace(0, 2, 50).tolist()
        axis.hist(distances[conflicts.first], bins, density=True, color=COLORS[0], alpha=0.45, label="click, no like")
        axis.hist(
            distances[conflicts.second], bins, density=True, color=COLORS[1], histtype="step", label="like, no click"
        )
        axis.set(title=f"{preset}, {s}: KS {figures['ks']:.2f}", xlabel="1 - cosine", yticks=[])
    axes[0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    app()
