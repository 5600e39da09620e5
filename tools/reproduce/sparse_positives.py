"""Cross-entropy against ranking losses where positives are rare, on a real log: metrics, and gradients on negatives.

    python tools/reproduce/sparse_positives.py configs/criteo.yaml --rates 0.033,0.1,1 --jobs 2 --picture sparse.png

Every positive gets the weight beta that brings the share of positives down to a rate; the weight holds in training, in
validation and in the test metrics, so that no example is lost. (1 = the log as it is.) Losses and their mixtures with
cross-entropy are those that the paper found best at 3.3 %; the same at all rates, nothing is tuned here.

Source: arXiv 2403.14144, section 5 (there Criteo_x1, 33 million rows, 5 seeds).
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer
from compare import Report, cell, compare, paired, run_dir
from rich.console import Console
from rich.table import Table

from hmoe_rec.config import RunConfig, load_config

WEIGHT = "weight_of_positive"
LOSSES = {
    "bce": "bce",
    "pair": "[{kind: bce, weight: 0.7}, {kind: pair, weight: 0.3}]",
    "list": "[{kind: bce, weight: 0.9}, {kind: list, weight: 0.1}]",
    "rcr": "[{kind: bce, weight: 0.9}, {kind: rcr, weight: 0.1}]",
    "jrc": "[{kind: bce, weight: 0.4}, {kind: jrc, weight: 0.6}]",
    "focal": "{kind: focal, gamma: 6.0}",
}
COMMON = ("train.log_negative_gradients=true", "train.log_every=10", "train.keep_checkpoints=1")
CRITEO = ("model.num_sets=1", "model.expert={kind: flat_dnn, hidden: [128]}", "train.global_batch_size=512",
          "train.warmup_steps=0", "train.epochs=2")  # fmt: skip
# Per run file: what fits a log of this size, one task.
OVERRIDES = {
    "criteo.yaml": CRITEO,
    "kuairand.yaml": ("data.tasks=[long_view]", "model.preset=single", "model.encoding.sequences=mean"),
}


def positive_share(config: RunConfig) -> float:
    (task,) = config.schema_of_data.tasks
    columns = [pq.read_table(uri, columns=[task.source])[task.source] for uri in config.data.train]
    return pc.mean(pa.chunked_array([c for column in columns for c in column.chunks])).as_py()


def beta_for(rate: float, share: float) -> float:
    """The weight of positives that makes their share `rate`: odds over odds."""
    beta = rate / (1 - rate) * (1 - share) / share
    if not 0 < beta <= 1:
        raise typer.BadParameter(
            f"a rate of {rate} is more than the log's own {share:.3f}; positives are made rarer only"
        )
    return beta


def weighted_data(config: RunConfig, beta: float, folder: Path) -> list[str]:
    """Copies of the files with a column of weights, and a schema that names it. -> overrides of the run file."""
    schema = config.schema_of_data
    (task,) = schema.tasks
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"data.schema={folder / 'schema.yaml'}"]
    for split in ("train", "validation", "test"):
        overrides.append(f"data.{split}={folder / split}.parquet")
        (uri,) = getattr(config.data, split)
        if (folder / f"{split}.parquet").exists():
            continue
        source = pq.ParquetFile(uri)
        with pq.ParquetWriter(folder / f"{split}.parquet", source.schema_arrow.append(pa.field(WEIGHT, "f4"))) as file:
            for group in range(source.num_row_groups):
                table = source.read_row_group(group)
                weights = pc.if_else(pc.equal(table[task.source], 1), beta, 1.0)
                if schema.weight:
                    weights = pc.multiply(weights, table[schema.weight])
                file.write_table(table.append_column(pa.field(WEIGHT, "f4"), weights.cast("f4")))
    (folder / "schema.yaml").write_text(schema.model_copy(update={"weight": WEIGHT}).to_yaml())
    return overrides


def gradients(directory: Path) -> list[tuple[int, float]]:
    """(step, mean absolute gradient on negatives) of every line of the log."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], next(iter(line["negative_gradient"].values()))) for line in lines]


def table(title: str, reports: Mapping[str, Sequence[Report]], curves: Mapping[str, list]) -> Table:
    """First the base, then every loss with its paired differences in units of the fourth digit."""
    result = Table(title=title, title_justify="left")
    for column in ("loss", "AUC", "minus bce", "log loss", "minus bce", "mean |gradient|", "over bce"):
        result.add_column(column, justify="left" if column == "loss" else "right", no_wrap=True)
    mean_gradient = {
        label: statistics.mean(value for run in runs for _, value in run) for label, runs in curves.items()
    }
    base = next(iter(reports))
    for label, runs in reports.items():
        cells = []
        for metric in ("auc", "logloss"):
            values, of_base = ([next(iter(r["test"].values()))[metric] for r in x] for x in (runs, reports[base]))
            shown = paired(values, of_base) if label != base and len(values) > 1 else ""
            cells += [cell(values), shown]
        ratio = mean_gradient[label] / mean_gradient[base]
        result.add_row(label, *cells, f"{mean_gradient[label]:.2e}", f"{ratio:.1f}")
    return result


def draw(path: Path, curves: Mapping[str, Mapping[str, list]]) -> None:
    """Gradient on negatives over the steps, mean over the seeds; one panel per rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for panel, (rate, by_loss) in zip(panels, curves.items(), strict=True):
        for label, runs in by_loss.items():
            steps = [step for step, _ in runs[0]]
            panel.plot(steps, [statistics.mean(x) for x in zip(*([v for _, v in run] for run in runs), strict=True)],
                       label=label)  # fmt: skip
        panel.set(title=rate, xlabel="step", yscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean |gradient| on negatives")
    panels[0].legend()
    figure.savefig(path, dpi=120)


def main(
    config: Annotated[str, typer.Argument(help="A run file with one task and three files of data.")],
    rates: Annotated[str, typer.Option(help="Comma list of shares of positives; 1 = as they are.")] = "0.033,0.1,1",
    losses: Annotated[str, typer.Option(help="Comma list; the first is the base.")] = ",".join(LOSSES),
    seeds: Annotated[str, typer.Option(help="Comma list.")] = "1,2,3,4,5",
    out: Annotated[Path, typer.Option(help="Where data and runs go.")] = Path("runs/sparse_positives"),
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    picture: Annotated[Path | None, typer.Option(help="PNG to write: gradients over the steps.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for all runs.")] = None,
) -> None:
    """Compare losses on a log whose positives are made rare."""
    console = Console(width=150, highlight=False)
    common = [*OVERRIDES.get(Path(config).name, ()), *COMMON, *(overrides or [])]
    resolved = load_config(config, common)
    if len(resolved.tasks) != 1:
        raise typer.BadParameter(f"{len(resolved.tasks)} tasks; choose one with data.tasks=[{resolved.tasks[0]}]")
    share, numbers = positive_share(resolved), [int(seed) for seed in seeds.split(",")]
    settings = {name: f"train.losses='{{{resolved.tasks[0]}: {LOSSES[name]}}}'" for name in losses.split(",")}
    curves: dict[str, dict[str, list]] = {}
    for text in rates.split(","):
        beta = 1.0 if text == "1" else beta_for(float(text), share)
        rate = beta * share / (beta * share + 1 - share)
        data = weighted_data(resolved, beta, out / f"{Path(config).stem}-{resolved.tasks[0]}-{text}")
        of_rate = [*common, *data]
        reports = compare(config, settings, seeds=numbers, out=out, jobs=jobs, overrides=of_rate)
        title = f"{config}, {resolved.tasks[0]}: {rate:.1%} positive (beta {beta:.3f}), {len(numbers)} seeds"
        curves[title] = {
            label: [gradients(run_dir(out, config, setting, seed, of_rate)) for seed in numbers]
            for label, setting in settings.items()
        }
        console.print(table(title, reports, curves[title]))
    if picture is not None:
        draw(picture, curves)
        console.print(f"picture: {picture}")


if __name__ == "__main__":
    typer.run(main)
