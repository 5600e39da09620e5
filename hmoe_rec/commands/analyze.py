"""Commands on what a trained model has learned: analyze correlation, collapse, ..."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from hmoe_rec.commands.common import CheckpointName, group, is_first, quiet

app = group("Look into data and trained models: numbers (JSON), pictures (PNG) and a page (report.html).")

Runs = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Run directories, to be compared.", show_default=False)
]
Data = Annotated[str | None, typer.Option(help="Parquet: file, directory, glob or URI. Default: the run's test data.")]
Out = Annotated[str | None, typer.Option(help="Directory for the files. Default: analysis/ in the first run.")]
Rows = Annotated[int | None, typer.Option(min=1, help="Read about so many rows. Default: all.")]


def write(sections: Sequence[Any], runs: Sequence[str], out: str | None) -> None:
    """Writes what was found, and tells where."""
    from hmoe_rec import io
    from hmoe_rec.analysis.report import write_section

    directory = out or io.join(runs[0], "analysis")
    if is_first():
        for found in sections:
            for sentence in (*found.warnings, *found.summary):
                typer.echo(sentence)
            write_section(found, directory)
        typer.echo(f"report: {directory}/report.html")
