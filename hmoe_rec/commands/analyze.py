"""Commands on what a trained model has learned: analyze correlation, collapse, ..."""

from collections.abc import Sequence
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


@app.command()
def calibration(
    runs: Runs,
    data: Data = None,
    by: Annotated[
        list[str] | None, typer.Option(help="A column to slice by; any column of the files. Give it several times.")
    ] = None,
    checkpoint: CheckpointName = "best",
    rows: Rows = None,
    out: Out = None,
) -> None:
    """Whether predicted rates are the observed ones: overall, by score, and by any column.

    Few distinct values are slices by themselves, many become slices of equal size. The labels' noise is shown as a 95 %
    interval; a difference inside of it is none.

    \b
    Examples:
      hmoe-rec analyze calibration runs/quickstart
      hmoe-rec analyze calibration runs/kuairand --by tab --by video_duration --out reports
    """
    quiet()
    from hmoe_rec.analysis.calibration import analyze_calibration
    from hmoe_rec.analysis.opening import opened

    one = only(runs, "calibration")
    with opened(one, checkpoint) as run:
        found = analyze_calibration(run, run.uris(data), by=by or (), rows=rows)
    write([found], runs, out)


def only(runs: Sequence[str], command: str) -> str:
    """The run, where a command looks at one."""
    if len(runs) != 1:
        from hmoe_rec.types import ConfigError

        raise ConfigError(f"analyze {command}: looks at one run, got {len(runs)}: {', '.join(runs)}")
    return runs[0]
