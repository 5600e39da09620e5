"""Commands on checkpoints: checkpoint inspect, reshard, export."""

from typing import Annotated

import typer

from hmoe_rec.commands.common import group, quiet

SOURCE_HELP = "A run, a directory of checkpoints, or one checkpoint."
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP, show_default=False)]
SourceCheckpoint = Annotated[str, typer.Option("--checkpoint", help="latest, best, a tag, or a step.")]

app = group("Look at a checkpoint, cut it for other processes, write its tables for other programs.")


@app.command("inspect")
def inspect(
    source: Source,
    checkpoint: SourceCheckpoint = "latest",
    verify: Annotated[bool, typer.Option("--verify", help="Read all files and compare their checksums.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the tables.")] = False,
) -> None:
    """Print what a checkpoint holds: tables, their shards and optimizer states, dense parameters, damage.

    The exit code is 1 where files are missing or damaged.

    \b
    Examples:
      hmoe-rec checkpoint inspect runs/quickstart
      hmoe-rec checkpoint inspect runs/quickstart --checkpoint best --verify
    """
    from hmoe_rec.progress import progress_bar
    from hmoe_rec.show import print_checkpoint
    from hmoe_rec.training.checkpoint_tools import inspect

    quiet()
    with progress_bar("checking files") as progress:
        report = inspect(source, checkpoint, verify_files=verify, progress=progress if verify else None)
    if as_json:
        import json
        from dataclasses import asdict

        typer.echo(json.dumps(asdict(report), indent=1))
    else:
        print_checkpoint(report)
    raise typer.Exit(1 if report.problems else 0)


@app.command("reshard")
def reshard(
    source: Source,
    target: Annotated[str, typer.Argument(help="A directory of checkpoints, such as RUN/checkpoints.")],
    checkpoint: SourceCheckpoint = "latest",
    world_size: Annotated[int | None, typer.Option(min=1, help="Processes to cut it for. Default: as it is.")] = None,
    plan: Annotated[str | None, typer.Option(help="A plan file (.json) whose shards are the pieces.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the tables: fp32 or fp16. Default: as it is.")] = None,
    with_optimizer: Annotated[bool, typer.Option(help="Keep the optimizer's states.")] = True,
) -> None:
    """Write a checkpoint anew, cut for other processes; values stay the same to the bit.

    Any run loads any checkpoint as it is, whatever processes wrote it. This makes fewer or more files, smaller ones
    (fp16, without optimizer), or pieces that lie where a plan wants them.

    \b
    Examples:
      hmoe-rec checkpoint reshard runs/big runs/small/checkpoints --world-size 8
      hmoe-rec checkpoint reshard runs/big runs/serve/checkpoints --no-with-optimizer --precision fp16
    """
    from hmoe_rec.progress import progress_bar
    from hmoe_rec.training.checkpoint_tools import reshard
    from hmoe_rec.types import ConfigError

    if precision not in (None, "fp32", "fp16"):
        raise ConfigError(f"--precision {precision}: expected fp32 or fp16")
    quiet()
    with progress_bar("resharding") as progress:
        written = reshard(
            source,
            target,
            checkpoint=checkpoint,
            world_size=world_size,
            plan=plan,
            precision=precision,
            with_optimizer=with_optimizer,
            progress=progress,
        )
    typer.echo(f"wrote {written.uri} ({written.world_size} processes)")


@app.command("export")
def export(
    source: Source,
    target: Annotated[str, typer.Argument(help="The directory to write; it must not be there yet.")],
    format: Annotated[str, typer.Option(help="safetensors, npy or npz.")] = "safetensors",
    checkpoint: SourceCheckpoint = "best",
    tables: Annotated[list[str] | None, typer.Option(help="Names with * and ?. Give it several times.")] = None,
    with_optimizer: Annotated[bool, typer.Option(help="Write the optimizer's states too.")] = False,
    with_dense: Annotated[bool, typer.Option(help="Write the other parameters too.")] = False,
) -> None:
    """Write a file per table, row r = id r, for other programs.

    \b
    Examples:
      hmoe-rec checkpoint export runs/quickstart tables
      hmoe-rec checkpoint export runs/quickstart tables --format npy --tables 'set1__*'
    """
    from hmoe_rec.progress import progress_bar
    from hmoe_rec.training.checkpoint_tools import export
    from hmoe_rec.types import ConfigError

    if format not in ("safetensors", "npz", "npy"):
        raise ConfigError(f"--format {format}: expected safetensors, npy or npz")
    quiet()
    with progress_bar("exporting") as progress:
        written = export(
            source,
            target,
            format=format,
            checkpoint=checkpoint,
            tables=tables or "*",
            with_optimizer=with_optimizer,
            with_dense=with_dense,
            progress=progress,
        )
    typer.echo(f"wrote {len(written.files)} files of step {written.step} to {written.uri}")
