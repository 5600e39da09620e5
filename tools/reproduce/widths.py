"""Wider tables against more tables: AUC, log loss, parameters and information abundance at the same embedding size.

    python tools/reproduce/widths.py configs/criteo.yaml --widths 1,2,4,10 --seeds 1,2,3 --jobs 2 --picture widths.png

For three models of the multi-embedding paper (arXiv 2310.04400): at "k x" a single set has width k * 8, and
multi-embedding has k sets of width 8, each with its own interaction and projection, whose mean is taken. Information
abundance (IA) is that of the trained tables, averaged over the fields with at least as many rows as the table is wide.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from compare import compare, run_dir
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hmoe_rec.metrics.spectrum import gram, information_abundance, singular_values
from hmoe_rec.sharding.process import process_group
from hmoe_rec.training.build import in_table
from hmoe_rec.training.evaluate import load_for_evaluation, open_run, read_run_config

BASE_WIDTH = 8  # the paper has 10; FBGEMM takes multiples of 4
EXPERTS = {
    "DNN": "{kind: flat_dnn, hidden: []}",
    "xDeepFM": "{kind: cin, deep: [400]}",
    "DCN V2": "{kind: dcnv2, num_layers: 4}",
}
COMMON = [
    "model.combine=mean",
    "model.expert_dim=400",
    "model.tower.hidden=[]",
    "data.leave_out=[I1, I2, I3, I4, I5, I6, I7, I8, I9, I10, I11, I12, I13]",  # the paper: 39 ids, counts binned
    "train.global_batch_size=512",
    "train.warmup_steps=0",
    "train.epochs=1",
]
Spectra = dict[str, Tensor]


def settings(models: Sequence[str], widths: Sequence[int]) -> dict[str, str]:
    """Label -> overrides."""
    made = {}
    for model in models:
        expert = f"model.preset=multi_embedding 'model.expert={EXPERTS[model]}'"
        for k in widths:
            sizes = {"single": (1, k * BASE_WIDTH), "multi": (k, BASE_WIDTH)} if k > 1 else {"single": (1, BASE_WIDTH)}
            for name, (sets, dim) in sizes.items():
                made[f"{model} {name} {k}x"] = f"{expert} model.num_sets={sets} model.embedding_dim={dim}"
    return made


def spectra(directory: Path) -> Spectra:
    """Table -> its singular values, descending, of a finished run's best checkpoint."""
    config = read_run_config(str(directory))
    with process_group("cpu") as process:
        sharded, _ = load_for_evaluation(open_run(str(directory), config), process, "best")
        state = sharded.state_dict()
        return {
            name.split(".")[-2]: singular_values(gram(_whole(table))) for name, table in state.items() if in_table(name)
        }


def _whole(table: Tensor) -> Tensor:
    """One process holds all of a sharded table."""
    shards = getattr(table, "local_shards", None)
    return table if shards is None else torch.cat([shard.tensor for shard in shards()])


def mean_abundance(found: Spectra, rows: Mapping[str, int]) -> float:
    """Over tables that could fill their width: a table of 4 rows has at most 4 directions whatever it learns."""
    values = [float(information_abundance(s)) for name, s in found.items() if rows[name] >= len(s)]
    return statistics.mean(values)


def picture(path: Path, curves: Mapping[str, Sequence[Spectra]]) -> None:
    """Mean normalized spectrum of the tables, one panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(label.rsplit(" ", 2)[0] for label in curves))
    figure, panels = plt.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False, sharey=True)
    for panel, model in zip(panels[0], models, strict=True):
        for label, runs in curves.items():
            if label.rsplit(" ", 2)[0] == model:
                logs = [(s / s[0]).clamp(min=1e-6).log() for run in runs for s in run.values()]
                widest = max(len(x) for x in logs)
                mean = torch.stack([x for x in logs if len(x) == widest]).mean(0).exp()
                style = "-" if "multi" in label else "--"
                panel.plot(torch.linspace(0, 1, widest), mean, style, label=label.removeprefix(model))
        panel.set(title=model, xlabel="rank of singular value / width", yscale="log")
        panel.legend()
    panels[0][0].set_ylabel("singular value / largest (geometric mean over tables)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    config: Annotated[str, typer.Argument(help="A run file with one task.")] = "configs/criteo.yaml",
    models: Annotated[str, typer.Option(help=f"Comma list of {', '.join(EXPERTS)}.")] = ",".join(EXPERTS),
    widths: Annotated[str, typer.Option(help="Comma list of multiples of width 8.")] = "1,2,4,10",
    seeds: Annotated[str, typer.Option(help="Comma list.")] = "1,2,3",
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/widths"),
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    picture_file: Annotated[Path | None, typer.Option("--picture", help="Write the spectra as PNG.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for all runs, after the experiment's.")
    ] = None,
) -> None:
    """Compare single and multi-embedding at growing widths."""
    chosen = settings(models.split(","), [int(k) for k in widths.split(",")])
    numbers = [int(seed) for seed in seeds.split(",")]
    all_overrides = [*COMMON, *(overrides or [])]
    reports = compare(config, chosen, seeds=numbers, out=out, jobs=jobs, overrides=all_overrides)
    table = Table(
        title=f"{config}: test data, mean ± standard deviation over {len(numbers)} seeds", title_justify="left"
    )
    for column in ("model", "AUC", "log loss", "dense", "tables", "IA of tables", "IA / width"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    curves: dict[str, list[Spectra]] = {}
    for label, runs in reports.items():
        directories = [run_dir(out, config, chosen[label], seed, all_overrides) for seed in numbers]
        curves[label] = [spectra(directory) for directory in directories]
        run_config = read_run_config(str(directories[0]))
        rows = {f"{s.name}__{f.name}": f.num_rows for s in run_config.layout().sets for f in run_config.features.ids}
        abundance = statistics.mean(mean_abundance(found, rows) for found in curves[label])
        width = run_config.layout().sets[0].dim
        cells = []
        for metric in ("auc", "logloss"):
            values = [next(iter(run["test"].values()))[metric] for run in runs]
            spread = f" ±{statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        counts = [f"{runs[0]['parameters'][part]:,}" for part in ("dense", "tables")]
        table.add_row(label, *cells, *counts, f"{abundance:.2f}", f"{abundance / width:.2f}")
        assert math.isfinite(abundance), f"{label}: a table of zeros"
    Console(width=150).print(table)
    if picture_file is not None:
        picture(picture_file, curves)


if __name__ == "__main__":
    typer.run(main)
