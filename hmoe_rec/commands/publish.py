"""Commands on published weights: publish list, apply."""

from typing import Annotated

import typer

from hmoe_rec.commands.common import group

Published = Annotated[str, typer.Argument(metavar="DIR", help="What train.publish.to named.", show_default=False)]

app = group("Look at the weights that a run publishes while it trains (train.publish), and put them together.")


@app.command("list")
def list_publications(directory: Published) -> None:
    """Print the newest full publication and the deltas after it: step, rows, size.

    \b
    Example:
      hmoe-rec publish list runs/quickstart/published
    """
    from hmoe_rec.training.publication import publications

    for found in publications(directory):
        size = found.bytes / 2**20
        typer.echo(f"{found.number:>6} {found.kind:<5} step {found.step:>9}  {found.rows:>12,} rows {size:>10,.1f} MiB")


@app.command("apply")
def apply(
    directory: Published,
    out: Annotated[str, typer.Argument(help="The .npz file to write; it must not be there yet.")],
) -> None:
    """Apply the deltas to the full publication before them, all checksums verified, and write the weights as one file.

    The arrays have the names of the model's state dict. A server does the same in memory, again and again, with
    hmoe_rec.serving.published.PublishedWeights.

    \b
    Example:
      hmoe-rec publish apply runs/quickstart/published weights.npz
    """
    from hmoe_rec.serving.published import PublishedWeights, save_npz

    weights = PublishedWeights(directory)
    applied = weights.update()
    save_npz(weights.arrays, out)
    rows = sum(found.rows for found in applied[1:])
    typer.echo(f"wrote {out}: step {applied[-1].step}, {len(applied) - 1} deltas of {rows:,} rows applied")
