"""Commands on how sure a run is: uncertainty fit."""

from typing import Annotated

import typer

from hmoe_rec.commands.common import CheckpointName, Device, RunDir, group, is_first, quiet, reads_parts

app = group("How sure a trained run is of its logits.")


@app.callback()
def _several() -> None:
    """Keeps `fit` a command of its own while it is the only one."""


@app.command()
@reads_parts
def fit(
    run: RunDir,
    kind: Annotated[str, typer.Option(help="laplace, row_laplace, sngp, bootstrap, mc_dropout or ensemble.")],
    checkpoint: CheckpointName = "best",
    data: Annotated[
        str | None, typer.Option(help="Labelled Parquet to fit on. Default: the rows learned from.")
    ] = None,
    prior_precision: Annotated[
        float | None,
        typer.Option(help="Last layer: one over the variance of a weight that no example speaks of. Default: 1."),
    ] = None,
    ids: Annotated[
        list[str] | None, typer.Option(help="row_laplace: id fields whose rows count. Default: all with one id a row.")
    ] = None,
    row_variance: Annotated[
        float | None,
        typer.Option(
            help="row_laplace: times the prior variance of a row that the tables show. Default: by field, the number "
            "under which the data are likeliest.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="mc_dropout: forward passes of each example. Default: 16.")
    ] = None,
    member: Annotated[
        list[str] | None, typer.Option(help="ensemble: a further run, RUN or RUN@STEP. Give it several times.")
    ] = None,
    device: Device = None,
) -> None:
    """Fit an estimate of the variance of a run's logits and save it beside its checkpoints.

    laplace (towers of kind mlp) and sngp read once what the checkpoint has learned from (of a followed run the files or
    messages of its windows, which must still be there, and what online.start_from had learned from) and keep a matrix
    per task; row_laplace also keeps a number per id, task and set, and so knows which ids are new; mc_dropout and
    ensemble only keep their options; bootstrap has nothing to fit. Then: hmoe-rec predict and evaluate --uncertainty.

    \b
    Examples:
      hmoe-rec uncertainty fit runs/quickstart --kind row_laplace
      hmoe-rec uncertainty fit runs/a --kind ensemble --member runs/b --member runs/c@2000
      torchrun --nproc-per-node 2 -m hmoe_rec uncertainty fit runs/quickstart --kind laplace
    """
    quiet()
    from hmoe_rec.training.uncertainty import fit_uncertainty

    fitted = fit_uncertainty(
        run,
        kind,
        checkpoint=checkpoint,
        data=data,
        prior_precision=prior_precision,
        ids=ids or None,
        row_variance=row_variance,
        samples=samples,
        members=member or (),
        device=device,
    )
    if is_first():
        rows = f", fitted on {fitted['examples']:,} rows" if fitted["examples"] else ""
        for note in fitted["notes"]:
            typer.echo(f"note: {note}")
        typer.echo(f"wrote {fitted['file']} for checkpoint {fitted['checkpoint']}{rows}")
        if row_variance is None and "row_variance" in fitted:
            shown = ", ".join(f"{name} {factor:.3g}" for name, factor in fitted["row_variance"].items())
            typer.echo(f"prior variance of rows, times what the tables show: {shown}")
