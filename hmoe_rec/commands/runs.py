"""Commands on a run: train, evaluate, predict, show, keys, doctor."""

from typing import Annotated, Any

import typer

from hmoe_rec.commands.common import (
    CheckpointName,
    ConfigFile,
    Device,
    Overrides,
    RunDir,
    group,
    is_first,
    quiet,
    reads_parts,
)

app = group("")
UncertaintyKind = Annotated[
    str | None,
    typer.Option(help="laplace, row_laplace, sngp, bootstrap, mc_dropout or ensemble (hmoe-rec uncertainty fit)."),
]


@app.command()
@reads_parts
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the latest checkpoint in train.run_dir.")
    ] = False,
    follow: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Learn online from a directory of Parquet files, or redis://host/0/stream."),
    ] = None,
    until_idle: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="With --follow: end when nothing new came for so long.")
    ] = None,
) -> None:
    """Train a model, then evaluate its best checkpoint.

    Everything goes to train.run_dir: config.yaml (resolved), metrics.jsonl, TensorBoard, checkpoints, report.json.
    With --follow it learns from what appears in a place as it appears: each window is tested on, then trained on
    (section online of the run file).

    \b
    Examples:
      hmoe-rec train configs/quickstart.yaml
      hmoe-rec train configs/kuairand.yaml model.preset=mmoe train.seed=2 train.run_dir=runs/mmoe-2
      hmoe-rec train configs/kuairand.yaml train.run_dir=runs/mmoe-2 --resume
      torchrun --nproc-per-node 2 -m hmoe_rec train configs/kuairand.yaml
      hmoe-rec train configs/kuairand.yaml --follow s3://bucket/log --resume train.decay=constant
    """
    import json

    from hmoe_rec.config import load_config

    given = {"train.resume": resume or None, "online.follow": follow, "online.until_idle": until_idle}
    options = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    resolved = load_config(config, [*(overrides or []), *options])
    quiet()
    if resolved.online.follow is None:
        from hmoe_rec.training.trainer import train as run_training
    else:
        from hmoe_rec.training.online import follow as run_training

    report = run_training(resolved)
    if is_first():
        print_report(report, resolved.train.run_dir)


@app.command()
@reads_parts
def evaluate(
    run: RunDir,
    data: Annotated[
        str | None, typer.Option(help="Parquet: file, directory, glob or URI. Default: the run's test data.")
    ] = None,
    checkpoint: CheckpointName = "best",
    uncertainty: UncertaintyKind = None,
    new_ids: Annotated[
        str | None, typer.Option(help="With --uncertainty: an id field; ids that training did not show are new.")
    ] = None,
    truth: Annotated[
        str | None, typer.Option(help="With --uncertainty: Parquet with row_id and the true probability per task.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    device: Device = None,
) -> None:
    """Print the metrics of a trained model.

    AUC, GAUC by user, log loss, normalized entropy and calibration, per task. With --uncertainty: how good the
    variances of the logits are: log loss of the expected probability, coverage of the true logits where they are known
    (a synthetic log), and whether new ids are recognized by their variance.

    \b
    Examples:
      hmoe-rec evaluate runs/quickstart
      hmoe-rec evaluate runs/mmoe-2 --data data/kuairand/test.parquet --checkpoint latest
      hmoe-rec evaluate runs/quickstart --uncertainty row_laplace --new-ids item_id
    """
    quiet()
    if uncertainty is not None:
        from hmoe_rec.training.evaluate_uncertainty import evaluate_uncertainty

        files: Any = {"data": data, "truth": truth, "new_ids": new_ids}
        results = evaluate_uncertainty(run, uncertainty, checkpoint=checkpoint, device=device, **files)
        if is_first():
            print_uncertainty(results, as_json)
        return
    from hmoe_rec.training.evaluate import evaluate_run
    from hmoe_rec.types import ConfigError

    for name, value in (("--new-ids", new_ids), ("--truth", truth)):
        if value is not None:
            raise ConfigError(f"{name}: needs --uncertainty KIND, whose variances it judges; add that or leave it out")
    results = evaluate_run(run, data=data, checkpoint=checkpoint, device=device)
    if is_first():
        print_results(results, as_json)


@app.command()
@reads_parts
def predict(
    run: RunDir,
    data: Annotated[str, typer.Option(help="Parquet: file, directory, glob or URI; labels are not needed.")],
    out: Annotated[str, typer.Option(help="The Parquet file or directory to write.")],
    checkpoint: CheckpointName = "best",
    uncertainty: UncertaintyKind = None,
    device: Device = None,
) -> None:
    """Write a probability per row and task.

    The Parquet that is written has the columns that the schema lists as keys, and one column per task. Rows are read
    and written as a stream, so that any number will do. With --uncertainty there is a column TASK_std beside each
    task's: the standard deviation of its logit.

    \b
    Examples:
      hmoe-rec predict runs/quickstart --data new.parquet --out predictions.parquet
      hmoe-rec predict runs/quickstart --data new.parquet --out predictions.parquet --uncertainty row_laplace
    """
    quiet()
    from hmoe_rec.serving.predictor import predict_run

    written = predict_run(run, data, out, checkpoint=checkpoint, uncertainty=uncertainty, device=device)
    if is_first():
        typer.echo(f"wrote {written['rows']:,} rows to {out} (checkpoint {written['checkpoint']})")


@app.command()
@reads_parts
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the resolved run file only, as plain YAML.")] = False,
) -> None:
    """Print what a run file means, without running it.

    The resolved configuration, the routes (which task trains or reads which expert), and the sizes of embedding sets
    and experts.

    \b
    Examples:
      hmoe-rec show configs/quickstart.yaml
      hmoe-rec show configs/kuairand.yaml model.preset=stem model.embedding_dim=32
      hmoe-rec show configs/kuairand.yaml model.preset=ple --yaml > my.yaml
    """
    from hmoe_rec.config import load_config

    resolved = load_config(config, overrides or [])
    if as_yaml:
        typer.echo(resolved.to_yaml())
        return
    quiet()
    from hmoe_rec.show import print_config

    print_config(resolved)


@app.command()
def keys(
    section: Annotated[
        str | None, typer.Argument(help="data, model, train, online, sharding or parts. Default: all.")
    ] = None,
) -> None:
    """List the keys of a run file.

    Each with its type, default and meaning. Section `parts` lists the kinds of experts, encoders and losses with their
    options.

    \b
    Example:
      hmoe-rec keys train
    """
    from hmoe_rec.show import print_keys

    print_keys(section)


@app.command()
def doctor() -> None:
    """Check the installation.

    Versions that fit together, whether fbgemm loads, devices, threads. The exit code is 1 if training cannot work.

    \b
    Example:
      hmoe-rec doctor
    """
    quiet()
    from hmoe_rec.doctor import diagnose, print_report

    raise typer.Exit(print_report(diagnose()))


def print_report(report: dict[str, Any], run_dir: str) -> None:
    """The table of the test data (or else of the validation data), beside the best possible where it is known."""
    from rich.console import Console

    from hmoe_rec.metrics.format import metrics_table

    split = next((split for split in ("test", "validation", "progressive") if report.get(split)), None)
    if split is None:
        return
    own_best = report.get("test_at_best_of_each_task") or {} if split == "test" else {}
    own_best = {task: figures for task, figures in own_best.items() if figures["step"] != report["best_step"]}
    references = {"at its own best step": own_best, "best possible": report["reference"].get(split, {})}
    console = Console()
    what = f"{split} data at step" if split != "progressive" else "every window before it was trained on, up to step"
    console.print(metrics_table(report[split], references, title=f"{what} {report['best_step']}"))
    console.print(f"report: {run_dir}/report.json", highlight=False, markup=False, soft_wrap=True)


def print_results(results: dict[str, Any], as_json: bool) -> None:
    from hmoe_rec.metrics.format import json_safe, metrics_table

    if as_json:
        import json

        typer.echo(json.dumps(json_safe(results), indent=2))
        return
    from rich.console import Console

    references = {"best possible": results["reference"]} if results.get("reference") else None
    Console().print(metrics_table(results["metrics"], references, title=f"step {results['step']}"))


def print_uncertainty(results: dict[str, Any], as_json: bool) -> None:
    from hmoe_rec.metrics.format import json_safe, metrics_table

    if as_json:
        import json

        typer.echo(json.dumps(json_safe(results), indent=2))
        return
    from rich.console import Console

    losses = ("logloss", "logloss_mean_field", "std", "coverage_50", "coverage_90", "coverage_95", "nll_of_true_logit")
    of_new = ("new", "new_auc", "std_new", "std", "logloss_new", "logloss_mean_field_new", "examples")
    console = Console()
    console.print(
        metrics_table(results["metrics"], columns=losses, title=f"step {results['step']}: logits and variance")
    )
    if any(figures["new"] for figures in results["metrics"].values()):
        console.print(metrics_table(results["metrics"], columns=of_new, title="examples with new ids"))
