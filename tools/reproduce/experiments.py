"""The comparisons that the README reports, by name: run file, settings, seeds and budget are here; one command each.

    python tools/reproduce/experiments.py                        lists them
    python tools/reproduce/experiments.py kuairand-sequences --jobs 2

Settings of one experiment differ in nothing but what their names say: same data, split, optimizer, steps and seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from compare import compare, print_tables
from rich.console import Console

HISTORY = "model.encoding.sequences"
NUMBERS = "model.encoding.numbers"


@dataclass(frozen=True)
class Experiment:
    """
    Attributes:
        question: what it answers.
        settings: label -> overrides, separated by spaces; the first is what the others are compared with.
        overrides: of all settings.
        data: the command that makes the data, after ./tools/run.
    """

    question: str
    config: str
    settings: Mapping[str, str]
    overrides: Sequence[str] = ()
    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    metrics: Sequence[str] = ("auc", "logloss")
    data: str = ""


def frozen(name: str) -> str:
    path = f"{{field: video_id, path: data/kuairand/item_embeddings_{name}.parquet}}"
    return f"model.encoding.frozen_vectors.{name}='{path}'"


def of_both(kind: str, **options: str) -> str:
    """A similarity of each supplied embedding."""
    parts = []
    for name in ("graph_emb", "twotower"):
        given = ", ".join([f"kind: {kind}", *(f"{k}: {v.format(name)}" for k, v in options.items())])
        parts.append(f"{frozen(name)} model.encoding.similarities.{name}_{kind}='{{{given}}}'")
    return " ".join(parts)


NUMBER_KINDS = {
    "scalar": f"{NUMBERS}=scalar",
    "mnse": f"{NUMBERS}=mnse",
    "log_square": f"{NUMBERS}=log_square",
    "quantile": f"{NUMBERS}=quantile",
    "autodis": f"{NUMBERS}=autodis",
    "periodic": f"{NUMBERS}=periodic",
    "piecewise_linear": f"{NUMBERS}=piecewise_linear",
}
KUAIRAND = "python tools/convert_kuairand.py KuaiRand-Pure data/kuairand"
MMOE = ("model.preset=mmoe", "model.num_experts=2")

POOLINGS = {
    "tim": f"{HISTORY}=tim",
    "tim, positions": f"{HISTORY}='{{kind: tim, clock: position}}'",
    "tim without time": f"{HISTORY}='{{kind: tim, clock: none}}'",
    "mean": f"{HISTORY}=mean",
    "din": f"{HISTORY}=din",
    "sasrec": f"{HISTORY}=sasrec",
}


def losses_of_all(losses: str) -> str:
    """The same for every task of KuaiRand."""
    return f"train.losses='{{click: {losses}, long_view: {losses}, like: {losses}, profile_enter: {losses}}}'"


EXPERIMENTS = {
    "kuairand-sequences": Experiment(
        "Does TIM beat mean pooling, DIN and SASRec on real logs?",
        "configs/kuairand.yaml",
        POOLINGS,
        MMOE,
        data=KUAIRAND,
    ),
    "kuairand-sequence-expert": Experiment(
        "The same with an expert for the histories, which reads [summary, target, product], as in production.",
        "configs/kuairand.yaml",
        POOLINGS,
        (*MMOE, "model.expert=[{kind: flat_dnn, hidden: [128]}, {kind: sequence, hidden: [128]}]"),
        data=KUAIRAND,
    ),
    "kuairand-sequences-alone": Experiment(
        "The same without the hand-made counts of behaviors that have the target's author or tag.",
        "configs/kuairand.yaml",
        POOLINGS,
        (*MMOE, "data.leave_out=['hist_same_*', 'hist_like_same_*', 'hist_view_same_*']"),
        data=KUAIRAND,
    ),
    "movielens-sequences": Experiment(
        "The same on long histories where order is known to matter.",
        "configs/movielens.yaml",
        {
            "tim": f"{HISTORY}='{{kind: tim, clock: position}}'",
            "tim without time": f"{HISTORY}='{{kind: tim, clock: none}}'",
            "din": f"{HISTORY}=din",
            "sasrec": f"{HISTORY}=sasrec",
            "mean": f"{HISTORY}=mean",
        },
        data="python tools/convert_movielens.py ml-1m data/movielens --latest 60",
    ),
    "synthetic-sequences": Experiment(
        "A log with nothing but a planted effect of time and category: who comes near the best possible AUC?",
        "configs/quickstart.yaml",
        {
            "tim": f"{HISTORY}='{{kind: tim, clock: position}}'",
            "din": f"{HISTORY}=din",
            "sasrec": f"{HISTORY}=sasrec",
            "target_attention": f"{HISTORY}=target_attention",
            "mean": f"{HISTORY}=mean",
        },
        (
            "data.synthetic={rows: 1000000, seed: 1, effects: "
            "{click: {affinity: 0, user: 0, item: 0, price: 0}, like: {affinity: 0, user: 0, item: 0, price: 0}, "
            "buy: {affinity: 0, user: 0, item: 0, price: 0}}}",
            "data.tasks=[click]",
            "model.preset=single",
            "model.expert={kind: flat_dnn, hidden: [64]}",
            "train.epochs=1",
            "train.learning_rate=0.01",
        ),
        seeds=(1, 2, 3),
    ),
    "criteo-numbers": Experiment(
        "Thirteen counts by seven encoders, the binned copies of the counts left out.",
        "configs/criteo.yaml",
        NUMBER_KINDS,
        (
            "data.leave_out='I*_bin'",
            "model.num_sets=1",
            "model.expert={kind: flat_dnn, hidden: [128]}",
            "train.global_batch_size=512",
            "train.warmup_steps=0",
            "train.epochs=2",
        ),
        data="python tools/convert_criteo.py criteo_dac80k data/criteo",
    ),
    "kuairand-numbers": Experiment(
        "The counts of users, videos and histories by seven encoders, their binned copies left out.",
        "configs/kuairand.yaml",
        NUMBER_KINDS,
        (*MMOE, "data.leave_out='*_bucket'"),
        data=KUAIRAND,
    ),
    "kuairand-losses": Experiment(
        "Ranking losses on tasks of which two are rare by nature: like and profile_enter have 2 % positives.",
        "configs/kuairand.yaml",
        {
            "bce": "",
            "pair": losses_of_all("[{kind: bce, weight: 0.7}, {kind: pair, weight: 0.3}]"),
            "pair within user": losses_of_all("[{kind: bce, weight: 0.7}, {kind: pair, weight: 0.3, within: user}]"),
            "list": losses_of_all("[{kind: bce, weight: 0.9}, {kind: list, weight: 0.1}]"),
            "rcr": losses_of_all("[{kind: bce, weight: 0.9}, {kind: rcr, weight: 0.1}]"),
            "jrc": losses_of_all("[{kind: bce, weight: 0.4}, {kind: jrc, weight: 0.6}]"),
            "focal": losses_of_all("{kind: focal, gamma: 6.0}"),
        },
        MMOE,
        metrics=("auc", "gauc", "logloss"),
        data=KUAIRAND,
    ),
    "kuairand-task-weights": Experiment(
        "Four tasks on common experts: fixed weights, learned ones, dynamic ones, projected gradients.",
        "configs/kuairand.yaml",
        {
            "fixed": "",
            "uncertainty": "train.task_weighting=uncertainty",
            "dwa": "train.task_weighting='{kind: dwa, every: 20}'",
            "pcgrad": "train.gradient_surgery=pcgrad",
        },
        MMOE,
        data=KUAIRAND,
    ),
    "kuairand-simenc": Experiment(
        "Two pre-trained item embeddings: not used, raw, as similarity to the history by MNSE, as histograms of it.",
        "configs/kuairand.yaml",
        {
            "none": "",
            "raw vector": of_both("vector", of="{}"),
            "simenc": of_both("history", vectors="{}", sequence="views"),
            "tiers": of_both("tiers", vectors="{}", sequence="views"),
        },
        MMOE,
        data=KUAIRAND,
    ),
}


def main(
    name: Annotated[str | None, typer.Argument(help="An experiment; without one they are listed.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma list, in place of the experiment's own.")] = None,
    only: Annotated[str | None, typer.Option(help="Comma list of settings, the first is the base.")] = None,
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/experiments"),
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for all runs, after the experiment's.")
    ] = None,
) -> None:
    """Run one of the comparisons of the README."""
    console = Console()
    if name is None:
        for key, experiment in EXPERIMENTS.items():
            console.print(f"[bold]{key}[/]  {experiment.question}")
            if experiment.data:
                console.print(f"    data: ./tools/run {experiment.data}", style="dim", highlight=False)
        return
    if name not in EXPERIMENTS:
        raise typer.BadParameter(f"{name!r}; there are {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    numbers = [int(seed) for seed in seeds.split(",")] if seeds else list(experiment.seeds)
    labels = only.split(",") if only else list(experiment.settings)
    if unknown := [label for label in labels if label not in experiment.settings]:
        raise typer.BadParameter(f"--only {unknown[0]!r}; there are {', '.join(experiment.settings)}")
    settings = {label: experiment.settings[label] for label in labels}
    all_overrides = [*experiment.overrides, *(overrides or [])]
    reports = compare(experiment.config, settings, seeds=numbers, out=out, jobs=jobs, overrides=all_overrides)
    console.print(f"{name}: {experiment.question}")
    print_tables(reports, experiment.metrics, "test")
    reference = next(iter(reports.values()))[0]["reference"].get("test") or {}
    for task, figures in reference.items():
        if task in next(iter(reports.values()))[0]["test"]:
            console.print(
                f"best possible on this test data, {task}: AUC {figures['auc']:.4f}, log loss {figures['logloss']:.4f}"
            )


if __name__ == "__main__":
    typer.run(main)
