"""Widths and sets of DCN V2 -> information abundance of their tables beside random tables of the same shapes.

    python tools/reproduce/abundance.py configs/criteo.yaml --widths 1,2,4,5,10

Runs are those of widths.py; what is there is not trained again. Every table counts, as in the official notebook, which
normalizes rows: DCN V2 with one set of width 40 on all of Criteo, 39 fields: 1.81 at the least, 6.64 on average, 12.47
at the most, where random tables of those shapes have 26.36 (ours).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from compare import compare, run_dir
from findings import spread, write_findings
from widths import BASE_WIDTH, COMMON, settings

from hmoe_rec.analysis.collapse_report import RunSpectra, spectra_of_run
from hmoe_rec.analysis.report import Plot, ReportTable, Section, new_figure
from hmoe_rec.metrics.spectrum import information_abundance, random_reference
from hmoe_rec.sharding.process import process_group

COLORS = ("#1a41e5", "#d0803c", "#6f6103", "#58389e", "#8b305a", "#989396", "#5883ef")
PUBLISHED = ["published: Criteo, 45.8 million rows, 1 set of width 40", "", "", "1.81", "6.64", "12.47", "26.36", "25%"]


def abundances(found: RunSpectra) -> dict[str, Any]:
    """Of all tables of a run, raw and with rows of length 1."""
    tables = found.tables
    raw = [t.abundance for t in tables]
    normalized = [float(information_abundance(t.normalized)) for t in tables]
    random = [random_reference(t.rows, t.dim, draws=2, normalize_rows=True) for t in tables]
    spectra = [(t.values / t.values[0]).tolist() for t in tables if t.rows > t.dim]
    return {
        "raw": raw,
        "normalized": normalized,
        "random": [t.random for t in tables],
        "random_normalized": random,
        "spectrum": np.exp(np.log(np.maximum(spectra, 1e-6)).mean(0)).tolist(),
        "sub_embeddings": {
            name: [content["pearson_of_row_means"], content["pearson_of_column_means"]]
            for name, content in found.sub_embeddings.items()
        },
    }


def row(label: str, runs: list[dict[str, Any]]) -> list[str]:
    def cell(statistic: Any, key: str) -> str:
        return spread([float(statistic(run[key])) for run in runs], 2)

    share = np.mean([np.mean(run["normalized"]) / np.mean(run["random_normalized"]) for run in runs])
    of_raw = f"{np.mean([np.mean(run['raw']) / np.mean(run['random']) for run in runs]):.0%}"
    extremes = [cell(statistic, "normalized") for statistic in (np.min, np.mean, np.max)]
    return [label, cell(np.mean, "raw"), of_raw, *extremes, cell(np.mean, "random_normalized"), f"{share:.0%}"]


def main(
    config: Annotated[str, typer.Argument(help="A run file with one task.")] = "configs/criteo.yaml",
    model: Annotated[str, typer.Option(help="One of those of widths.py.")] = "DCN V2",
    widths: Annotated[str, typer.Option(help="Comma list of multiples of width 8.")] = "1,2,4,5",
    seeds: Annotated[str, typer.Option(help="Comma list.")] = "1,2",
    runs: Annotated[Path, typer.Option(help="Where the runs are, or go.")] = Path("runs/widths"),
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the findings.")] = Path("runs/abundance"),
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for all runs.")] = None,
) -> None:
    """Information abundance of a model's tables at several widths and numbers of sets."""
    chosen = settings([model], [int(k) for k in widths.split(",")])
    numbers = [int(seed) for seed in seeds.split(",")]
    all_overrides = [*COMMON, *(overrides or [])]
    compare(config, chosen, seeds=numbers, out=runs, jobs=jobs, overrides=all_overrides)
    found: dict[str, list[dict[str, Any]]] = {}
    with process_group() as process:
        for label, setting in chosen.items():
            directories = [run_dir(runs, config, setting, seed, all_overrides) for seed in numbers]
            found[named(label)] = [abundances(spectra_of_run(str(d), process)) for d in directories]
    header = ["tables", "IA, raw", "of random", "IA, rows normalized: least", "mean", "most", "random", "of random"]
    table = ReportTable(f"{config}, {model}: all tables of a run, seeds {seeds}", header, [
        *(row(label, of) for label, of in found.items()), PUBLISHED
    ])  # fmt: skip
    summary = []
    for label, of in found.items():
        pairs = [p for run in of for p in run["sub_embeddings"].values() if None not in p]
        if pairs:
            rows, columns = np.mean(np.array(pairs, dtype=float), 0)
            summary.append(
                f"{label}: mean abundance of the sub-embeddings correlates {rows:.2f} with the table's own, and "
                f"{columns:.2f} with that of the field projected to (published: .90 and .76)."
            )
    plot = Plot("spectrum", "Singular values over the largest, geometric mean over tables and seeds.", draw(found))
    source = {"config": config, "model": model, "seeds": numbers}
    title = f"Information abundance of {model}"
    write_findings(Section("abundance", title, summary, [table], [plot], found, source), out)


def named(label: str) -> str:
    """ "DCN V2 multi 4x" -> "4 sets of width 8"."""
    _, kind, times = label.rsplit(" ", 2)
    k = int(times.removesuffix("x"))
    return f"{k} sets of width {BASE_WIDTH}" if kind == "multi" else f"1 set of width {k * BASE_WIDTH}"


def draw(found: Mapping[str, list[dict[str, Any]]]) -> Any:
    figure, axis = new_figure(7, 4.5)
    for k, (label, runs) in enumerate(found.items()):
        mean = np.exp(np.mean([np.log(run["spectrum"]) for run in runs], 0))
        style = "-" if "sets" in label else "--"
        axis.plot(np.linspace(0, 1, len(mean)), mean, style, color=COLORS[k % len(COLORS)], label=label)
    axis.set(xlabel="rank of singular value / width", ylabel="singular value / largest", yscale="log")
    axis.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    typer.run(main)
