"""A behavior log -> what the category at each lag says of the next choice, straight from Parquet: no model, no run.

    python tools/reproduce/genre_lags.py data/movielens          mutual information by lag, for the genres of MovieLens

A row is a candidate: the user's next movie (1) or one drawn at random (0). For the rows whose candidate has genre a:
bits between "the movie p before it has genre c" and the response, less what independent variables show on average.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
import yaml
from findings import write_findings

from hmoe_rec.analysis.correlation import BehaviorCounts, Examples, positions_of
from hmoe_rec.analysis.report import Plot, ReportTable, Section, new_figure
from hmoe_rec.data.source import find_files

COLORS = ("#1a41e5", "#d0803c", "#6f6103", "#58389e", "#8b305a", "#989396", "#5883ef")


def count(files: Sequence[str], target: str, behaviors: str, task: str, categories: int, lags: int) -> BehaviorCounts:
    """One pass, in batches; rows without a target category do not count."""
    every = torch.arange(categories)
    counts = BehaviorCounts(every, every, lags)
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(65536, columns=[target, behaviors, task]):
            lists = batch.column(behaviors)
            lengths = torch.from_numpy(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).copy())
            values = torch.from_numpy(lists.flatten().fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64))
            of_row = batch.column(target).fill_null(-1).to_numpy(zero_copy_only=False)
            response = batch.column(task).cast("float64").to_numpy(zero_copy_only=False)
            rows = (torch.from_numpy(of_row.astype(np.int64)), values, lengths, positions_of(lengths))
            counts.update(Examples(*rows, torch.from_numpy(response.copy())))
    return counts


def names_of(folder: Path, vocabulary: str, categories: int) -> list[str]:
    """From vocabularies.json beside the data, where the converter wrote one."""
    file = folder / "vocabularies.json"
    known = json.loads(file.read_text()).get(vocabulary, []) if file.exists() else []
    return [known[i] if i < len(known) else str(i) for i in range(categories)]


def main(
    folder: Annotated[Path, typer.Argument(help="Parquet files and schema.yaml.")] = Path("data/movielens"),
    target: Annotated[str, typer.Option(help="Column with the candidate's category.")] = "main_genre",
    behaviors: Annotated[
        str, typer.Option(help="Column with the behaviors' categories, oldest first.")
    ] = "hist_main_genre",
    task: Annotated[str, typer.Option(help="The response.")] = "watched",
    vocabulary: Annotated[str, typer.Option(help="The categories' names, in vocabularies.json.")] = "genre",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    lags: Annotated[int, typer.Option(help="Positions, 1 = the latest behavior.")] = 50,
    draws: Annotated[int, typer.Option(help="Permutations of the responses, for p values; 0 = none.")] = 199,
    out: Annotated[Path, typer.Option(help="Folder of the findings.")] = Path("runs/genre_lags"),
) -> None:
    """Mutual information by lag between a category in the history and the response."""
    schema = yaml.safe_load((folder / "schema.yaml").read_text())
    categories = next(field["num_embeddings"] for field in schema["ids"] if field["name"] == target)
    counts = count(list(find_files(str(folder / f"{split}.parquet"))), target, behaviors, task, categories, lags)
    names = names_of(folder, vocabulary, categories)
    bits, rows = counts.information(unbiased=True), counts.all_A2.sum(1)
    order = [a for a in rows.argsort(descending=True).tolist() if rows[a] > 0]
    share = rows / rows.sum()
    own = torch.stack([bits[a, a] for a in range(categories)])  # [A, P]
    others = (bits.sum(1) - own) / max(1, categories - 1)
    mean_own, mean_others = share @ own, share @ others
    p_values = counts.p_values(draws=draws) if draws else None
    shown_lags = [p for p in (1, 2, 3, 5, 10, 20, 50) if p <= lags]
    lines = []
    for a in order:
        cells = [f"{1e3 * own[a, p - 1]:.2f}" for p in shown_lags]
        lines.append([names[a], f"{rows[a]:,.0f}", *cells])
    lines.append(["all, own genre", f"{rows.sum():,.0f}", *(f"{1e3 * mean_own[p - 1]:.2f}" for p in shown_lags)])
    lines.append(["all, another genre", "", *(f"{1e3 * mean_others[p - 1]:.3f}" for p in shown_lags)])
    header = [target, "rows", *(f"lag {p}" for p in shown_lags)]
    tables = [ReportTable("Own genre in the history: 1e-3 bits, unbiased", header, lines)]
    summary = [f"{split}: {rows.sum():,.0f} rows; mean over targets, weighted by their rows."]
    first = float(mean_own[0])
    half = next((p + 1 for p in range(lags) if mean_own[p] < first / 2), None)
    fallen = f"falls below half of it at lag {half}" if half else f"stays above half of it over {lags} lags"
    summary.append(f"The own genre at lag 1 says {1e3 * first:.2f}e-3 bits of {task}, and {fallen}.")
    if p_values is not None:
        significant = [p_values[a, a, p - 1] <= 0.01 for a in order for p in shown_lags]
        summary.append(
            f"{sum(map(bool, significant))} of {len(significant)} cells shown have p <= .01 ({draws} draws)."
        )
    figure, axes = new_figure(10, 4, 1, 2)
    for k, a in enumerate(order[: len(COLORS)]):
        axes[0].plot(range(1, lags + 1), 1e3 * own[a], color=COLORS[k], linewidth=1.2, label=names[a])
    axes[0].set(xlabel="lag, 1 = the latest", ylabel="1e-3 bits, own genre", ylim=(0, None))
    axes[0].legend(fontsize=7)
    axes[1].plot(range(1, lags + 1), 1e3 * mean_own, color=COLORS[0], label="own genre")
    axes[1].plot(range(1, lags + 1), 1e3 * mean_others, color=COLORS[1], label="another genre, mean")
    axes[1].set(xlabel="lag, 1 = the latest", yscale="log", ylabel="1e-3 bits, mean over targets")
    axes[1].legend(fontsize=7)
    numbers = {
        "names": names,
        "rows": rows.tolist(),
        "bits": bits.tolist(),
        "own_by_lag": mean_own.tolist(),
        "others_by_lag": mean_others.tolist(),
        "p_values_of_own": None if p_values is None else [p_values[a, a].tolist() for a in range(categories)],
    }
    plot = Plot("lags", "Left: the seven most frequent genres. Right: mean over all.", figure)
    source = {"data": str(folder), "split": split, "lags": lags}
    write_findings(Section("genre_lags", f"{target} by lag", summary, tables, [plot], numbers, source), out)


if __name__ == "__main__":
    typer.run(main)
