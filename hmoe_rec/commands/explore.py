"""Commands on logged choices: explore ope."""

from typing import Annotated, Any

import typer

from hmoe_rec.commands.common import group

app = group("What another policy would have earned, from a log with propensities.")


@app.callback()
def _several() -> None:
    """Keeps `ope` a command of its own while it is the only one."""


@app.command()
def ope(
    log: Annotated[list[str], typer.Argument(metavar="LOG...", help="Parquet files with a row per logged choice.")],
    reward: Annotated[str, typer.Option(help="Column: what the choice earned (a click: 0 or 1).")] = "reward",
    propensity: Annotated[
        str, typer.Option(help="Column: probability with which the logging policy showed it, in (0, 1].")
    ] = "propensity",
    target: Annotated[
        str | None, typer.Option(help="Column: probability with which the other policy would have shown it.")
    ] = None,
    action: Annotated[str, typer.Option(help="Column: what was shown; with --target-action.")] = "action",
    target_action: Annotated[
        str | None, typer.Option(help="Column: what the other policy would have shown, if it is deterministic.")
    ] = None,
    shown_value: Annotated[
        str | None, typer.Option(help="Column: a model's value of what was shown; for DR, with --target-value.")
    ] = None,
    target_value: Annotated[
        str | None, typer.Option(help="Column: the model's value of what the other policy shows, on average.")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest weight; lowers the variance, adds bias.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Estimate the mean reward of another policy: IPS, SNIPS and DR, with 95 % intervals.

    Each row is a choice of a policy that knew its probability. The file is read as a stream.

    \b
    Examples:
      hmoe-rec explore ope log.parquet --reward click --propensity p --target p_new
      hmoe-rec explore ope day1.parquet day2.parquet --reward click --propensity p --action ad --target-action new_ad
      hmoe-rec explore ope log.parquet --target p_new --shown-value m --target-value v --clip 20
    """
    from hmoe_rec.explore.log_file import Columns, evaluate_log
    from hmoe_rec.types import ConfigError

    if (target is None) == (target_action is None):
        raise ConfigError("give one of --target (a probability) and --target-action (what it would have shown)")
    if (shown_value is None) != (target_value is None):
        raise ConfigError("DR needs both --shown-value and --target-value")
    if clip is not None and clip <= 0:
        raise ConfigError(f"--clip: expected a number above 0, got {clip}")
    of_action = {} if target_action is None else {"action": action, "target_action": target_action}
    columns = Columns(reward, propensity, target, **of_action, shown_value=shown_value, target_value=target_value)
    sums = evaluate_log(log, columns, clip=clip)
    print_values(sums, as_json)


def print_values(sums: Any, as_json: bool) -> None:
    from dataclasses import asdict

    from hmoe_rec.metrics.format import json_safe

    values = {name: {k: float(x) for k, x in asdict(v).items()} for name, v in sums.values().items()}
    diagnosis = {name: float(x) for name, x in sums.diagnosis().items()}
    if as_json:
        import json

        typer.echo(json.dumps(json_safe({"values": values, **diagnosis}), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Mean reward of the other policy", title_justify="left")
    for column in ("estimate", "value", "std. error", "95 % interval"):
        table.add_column(column, justify="left" if column == "estimate" else "right")
    for name, v in values.items():
        table.add_row(name, f"{v['value']:.6f}", f"{v['std_error']:.6f}", f"{v['low']:.6f} .. {v['high']:.6f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{diagnosis['rows']:,.0f} choices that earned {diagnosis['logged_reward']:.6f} each as they were; mean weight "
        f"{diagnosis['mean_weight']:.4f} (1 is right), largest {diagnosis['largest_weight']:.1f}, clipped "
        f"{diagnosis['clipped']:.2%}; worth {diagnosis['effective_rows']:,.0f} choices",
        soft_wrap=True,
    )
