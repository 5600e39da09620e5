"""Commands on data: data describe, fit, pooling, exposures, replay, synth."""

from typing import Annotated

import typer

from hmoe_rec.commands.common import ConfigFile, Overrides, group, reads_parts

app = group("Look at data, or make some.")


@app.command()
def describe(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="Parquet: file, directory, glob or URI.", show_default=False)
    ],
) -> None:
    """Propose a schema for Parquet files.

    Prints a schema file, to be edited, and beside it (on stderr) a table of types, cardinalities and missing rates.

    \b
    Example:
      hmoe-rec data describe data/kuairand/train.parquet > my_schema.yaml
    """
    from rich.console import Console

    from hmoe_rec.data.describe import describe as describe_data

    report = describe_data(uri)
    Console(stderr=True).print(report.table())
    typer.echo(report.schema_yaml())


@app.command()
@reads_parts
def fit(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option(help="The YAML file to write, for data.statistics.")] = None,
) -> None:
    """Fit the statistics of numbers: ranges, quantiles, bins.

    They are read from data.train, every number of the schema, and decide how mnse, quantile, log_square and
    piecewise_linear see a number. A run that needs them fits them at its start and keeps them in its config.yaml; fit
    them beforehand to look at them, or to share them between runs.

    \b
    Examples:
      hmoe-rec data fit configs/criteo.yaml
      hmoe-rec data fit configs/criteo.yaml --out criteo_statistics.yaml
      hmoe-rec train configs/criteo.yaml data.statistics=criteo_statistics.yaml model.encoding.numbers=mnse
    """
    from hmoe_rec import io
    from hmoe_rec.config import load_config, prepare_data
    from hmoe_rec.config.file import to_yaml
    from hmoe_rec.data.statistics import fit_statistics, to_dict
    from hmoe_rec.progress import progress_bar
    from hmoe_rec.show import print_statistics

    resolved = load_config(config, overrides or [])
    data = prepare_data(resolved, progress=True)
    with progress_bar("statistics of numbers") as progress:
        fitted = fit_statistics(data.train, data.schema, progress=progress)
    print_statistics(fitted)
    if out is not None:
        io.write_text(out, to_yaml(to_dict(fitted)))
        typer.echo(f"wrote {out}")


@app.command()
@reads_parts
def pooling(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option(help="The YAML file to write, for sharding.pooling.")] = None,
) -> None:
    """Measure ids per example, for sharding plans.

    Without them a plan takes every field for one id per example, which is wrong for lists. Counted on a sample of
    data.train as the model will see it: after max_length and missing of the schema.

    \b
    Examples:
      hmoe-rec data pooling configs/kuairand.yaml
      hmoe-rec data pooling configs/kuairand.yaml --out pooling.yaml
      hmoe-rec plan configs/kuairand.yaml --topology h100x8 sharding.pooling=pooling.yaml
      hmoe-rec plan configs/kuairand.yaml --topology h100x8 sharding.measure_pooling=true
    """
    from hmoe_rec import io
    from hmoe_rec.config import load_config, prepare_data
    from hmoe_rec.config.file import to_yaml
    from hmoe_rec.show import print_pooling
    from hmoe_rec.training.prepare import measured_pooling

    resolved = load_config(config, overrides or [])
    measured = measured_pooling(resolved, prepare_data(resolved, progress=True))
    print_pooling(measured)
    if out is not None:
        io.write_text(out, "".join(to_yaml({name: ids}) for name, ids in measured.items()))
        typer.echo(f"wrote {out}")


@app.command()
def exposures(
    uris: Annotated[
        list[str],
        typer.Argument(
            metavar="URI...", help="Parquet in the order of time: files, directories or globs.", show_default=False
        ),
    ],
    key: Annotated[list[str], typer.Option(help="A column of what is counted. Give it several times: user, item.")],
    out: Annotated[str, typer.Option(help="The directory to write.")],
    time: Annotated[
        str | None, typer.Option(help="A column to check the order by. Default: it is not checked.")
    ] = None,
    column: Annotated[str, typer.Option(help="Name of the new column.")] = "shown_before",
    state: Annotated[str | None, typer.Option(help="What goes on tomorrow. Default: OUT/_exposures.parquet.")] = None,
    sketch_width: Annotated[
        int | None, typer.Option(help="Count in a sketch of 4 x WIDTH numbers (a power of 2). Default: exactly.")
    ] = None,
) -> None:
    """Count how often a user was shown an item before.

    Writes the files again with one more column: earlier rows of the same key, 0 for the first. Made once more with new
    files, or after it was cut short, it goes on from its state. Exact counts take 12 bytes a key; a sketch takes 16
    bytes x WIDTH, whatever the keys, and may count too many.

    \b
    Examples:
      hmoe-rec data exposures logs --key user_id --key item_id --time time --out counted
      hmoe-rec train my_run.yaml data.train=counted train.exposure.column=shown_before
    """
    from hmoe_rec.data.exposures import count_exposures
    from hmoe_rec.progress import progress_bar

    with progress_bar("exposures") as progress:
        done = count_exposures(
            uris, key, out, column=column, time=time, state=state, sketch_width=sketch_width, progress=progress
        )
    typer.echo(f"wrote {done.rows:,} rows in {len(done.files)} files to {out}; {done.skipped} counted before")


@app.command()
def replay(
    uris: Annotated[
        list[str],
        typer.Argument(metavar="URI...", help="Parquet: files, directories or globs, in order.", show_default=False),
    ],
    out: Annotated[str, typer.Option(help="The directory to write; without Parquet files yet.")],
    rows_per_file: Annotated[int, typer.Option(min=1, help="Of every file but the last.")] = 65536,
    pause: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Before every file but the first.")] = 0.0,
    done: Annotated[bool, typer.Option("--done", help="Write _DONE at the end, which ends a follower.")] = False,
) -> None:
    """Let a log appear file by file, to try online learning.

    Rows stay in their order; a file appears when it is whole.

    \b
    Examples:
      hmoe-rec data replay data/kuairand/train.parquet --out runs/stream --pause 5 --done
      hmoe-rec train configs/kuairand.yaml --follow runs/stream train.decay=constant
    """
    from hmoe_rec.data.replay import replay as replay_log
    from hmoe_rec.progress import progress_bar

    with progress_bar("replay") as progress:
        names = replay_log(uris, out, rows_per_file=rows_per_file, pause_seconds=pause, done=done, progress=progress)
    typer.echo(f"wrote {len(names)} files to {out}")


@app.command()
def synth(
    out: Annotated[str, typer.Option(help="Directory of this machine to write; appears when it is complete.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="What data.synthetic takes: rows=1000000 seed=2", show_default=False),
    ] = None,
) -> None:
    """Write the synthetic ads log.

    train.parquet, validation.parquet and test.parquet, their schema.yaml, and truth.json with the AUC per task that the
    true probabilities reach: the best that a model can do.

    \b
    Examples:
      hmoe-rec data synth --out data/small rows=20000 seed=2
      hmoe-rec data synth --out data/large rows=20000000 num_users=1000000 num_items=200000
    """
    from hmoe_rec import io
    from hmoe_rec.config.data import parse_synthetic
    from hmoe_rec.data.synthetic import synthesize
    from hmoe_rec.progress import progress_bar

    with progress_bar("synthetic log") as progress:
        log = synthesize(io.local_path(out), **parse_synthetic(arguments or []), progress=progress)
    typer.echo(f"wrote {log.directory}; best possible AUC on test: {figures(log.bayes_auc('test'))}")


def figures(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
