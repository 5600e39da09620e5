"""Commands on sharding plans: plan make, plan diff."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from hmoe_rec.commands.common import ConfigFile, Overrides, group, quiet, reads_parts

if TYPE_CHECKING:
    from hmoe_rec.sharding.plan_file import Difference
    from hmoe_rec.sharding.prediction import PlanPrediction


class MakeByDefault(TyperGroup):
    """`plan CONFIG` is `plan make CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = ["make", *args]
        return super().parse_args(ctx, args)


app = group(
    "Plan how tables are laid over processes, for clusters that need not be here; compare plans.", cls=MakeByDefault
)


@app.command("make")
@reads_parts
def make(
    config: ConfigFile,
    overrides: Overrides = None,
    topology: Annotated[
        str | None,
        typer.Option(help="h100x8, h200x8, a100x8, a100x8_40gb, b200x8, cpu, or a .yaml file. Default: the run's."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines. Default: what the topology says.")] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Groups of machines that each hold all tables (2D). Default: the run's.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The plan file (.json) to write, for sharding.plan.")] = None,
    html: Annotated[str | None, typer.Option(help="The report (.html) to write; needs nothing but a browser.")] = None,
    tables: Annotated[int, typer.Option(min=1, help="Tables to print, the slowest ones.")] = 30,
) -> None:
    """Plan a run's tables for a cluster: memory, time and the alternatives. No GPU is needed, no table is allocated.

    Sharding keys of the run file count (hmoe-rec keys sharding): plan, constraints, together, apart, pooling, reserved.
    Without sharding.pooling (hmoe-rec data pooling), or sharding.measure_pooling, every field is taken for one id.
    Where nothing fits, it says how much is missing and which remedies it has tried. `plan CONFIG` is short for this.

    \b
    Examples:
      hmoe-rec plan configs/cluster_example.yaml --topology h100x8 --nodes 2
      hmoe-rec plan configs/cluster_example.yaml --topology h100x8 --nodes 16 --out plan.json --html plan.html
      hmoe-rec plan make configs/quickstart.yaml --topology cpu sharding.plan=row_wise
    """
    from rich.console import Console
    from rich.progress import Progress

    from hmoe_rec import io
    from hmoe_rec.config import load_config
    from hmoe_rec.sharding.report import plan_table
    from hmoe_rec.sharding.report_html import plan_html
    from hmoe_rec.sharding.topology import cluster_of
    from hmoe_rec.types import ConfigError

    resolved = load_config(config, overrides or [])
    given = topology or resolved.sharding.topology
    if given is None:
        raise ConfigError(
            "plan: for which cluster? Give --topology (h100x8, cpu, ...), or sharding.topology in the file"
        )
    cluster = cluster_of(given, nodes)
    quiet()
    from hmoe_rec.training.build import plan_model
    from hmoe_rec.training.prepare import with_pooling_here

    resolved = with_pooling_here(resolved)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("planning", total=1.0)
        model, planned = plan_model(
            resolved,
            cluster,
            replicas=replicas,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )
    plan_table(planned.prediction, Console(highlight=False, width=None if sys.stdout.isatty() else 150), tables)
    if out is not None:
        planned.save(model, out)
        typer.echo(f"plan: {out} (hmoe-rec train CONFIG sharding.plan={out})")
    if html is not None:
        io.write_text(html, plan_html(planned.prediction, f"{config} on {cluster.nodes} x {cluster.name}"))
        typer.echo(f"report: {html}")


@app.command("diff")
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A plan file.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    html: Annotated[str | None, typer.Option(help="The comparison (.html) to write; needs only a browser.")] = None,
    tables: Annotated[int, typer.Option(min=1, help="Changed tables to print, the largest change of time first.")] = 30,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="End with 1 where the plans differ, else 0.")] = False,
) -> None:
    """Compare two plan files: predicted memory, time and bytes sent before and after, and the tables that changed.

    The models may differ: what a further embedding set costs is the difference between a plan with it and one without.

    \b
    Examples:
      hmoe-rec plan diff before.json after.json
      hmoe-rec plan diff one_set.json four_sets.json --html sets.html
      hmoe-rec plan diff before.json after.json --exit-code
    """
    quiet()
    from hmoe_rec.sharding.plan_file import diff_plans, read_plan

    plans = read_plan(first), read_plan(second)
    differences = diff_plans(*plans)
    before, after = (plan.prediction for plan in plans)
    if not differences:
        typer.echo("the plans are equal")
    elif before is None or after is None:
        for difference in differences:
            typer.echo(str(difference))
    else:
        from rich.console import Console

        from hmoe_rec.sharding.report_diff import diff_table

        for line in _not_in_tables(differences):
            typer.echo(line)
        diff_table(before, after, Console(highlight=False, width=None if sys.stdout.isatty() else 150), tables)
    if html is not None:
        _write_diff(html, f"{first} and {second}", before, after, _not_in_tables(differences))
    if exit_code and differences:
        raise typer.Exit(1)


def _not_in_tables(differences: "list[Difference]") -> list[str]:
    """What the tables of figures and of sharded tables do not show."""
    shown = [d for d in differences if not d.is_predicted]
    return [str(d) for d in shown if d.table is None or d.what in ("cache load factor", "sizes")]


def _write_diff(
    html: str, title: str, before: "PlanPrediction | None", after: "PlanPrediction | None", remarks: list[str]
) -> None:
    from hmoe_rec import io
    from hmoe_rec.sharding.report_diff import diff_html
    from hmoe_rec.types import PlanError

    if before is None or after is None:
        raise PlanError("plan diff --html: a plan without a prediction; make it again with hmoe-rec plan ... --out")
    io.write_text(html, diff_html(before, after, title, remarks))
    typer.echo(f"comparison: {html}")
