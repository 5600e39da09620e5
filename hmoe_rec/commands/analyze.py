"""Commands on what a trained model has learned: analyze correlation, collapse, ..."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from hmoe_rec.commands.common import CheckpointName, Device, group, is_first, quiet, reads_parts

app = group("Look into data and trained models: numbers (JSON), pictures (PNG) and a page (report.html).")

Runs = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Run directories, to be compared.", show_default=False)
]
Data = Annotated[str | None, typer.Option(help="Parquet: file, directory, glob or URI. Default: the run's test data.")]
Out = Annotated[str | None, typer.Option(help="Directory for the files. Default: analysis/ in the first run.")]
Rows = Annotated[int | None, typer.Option(min=1, help="Read about so many rows. Default: all.")]


def write(sections: Sequence[Any], runs: Sequence[str], out: str | None, *, where: bool = True) -> None:
    """Writes what was found, and tells it, and where it is."""
    from hmoe_rec import io
    from hmoe_rec.analysis.report import write_section

    directory = out or io.join(runs[0], "analysis")
    if is_first():
        for found in sections:
            for sentence in (*found.warnings, *found.summary):
                typer.echo(sentence)
            write_section(found, directory)
        if where:
            typer.echo(f"report: {directory}/report.html")


@app.command(name="all")
@reads_parts
def everything(
    runs: Runs,
    by: Annotated[list[str] | None, typer.Option(help="A column to slice calibration by; several times.")] = None,
    data: Data = None,
    rows: Rows = None,
    checkpoint: CheckpointName = "best",
    out: Out = None,
    device: Device = None,
) -> None:
    """Every analysis that the runs allow, in one page.

    What cannot be done (no behavior sequence, one task, one run where runs are compared) is listed with the reason, and
    is no error. Each analysis has a command of its own with more options; given the same --out, it replaces its section
    of the page.

    \b
    Examples:
      hmoe-rec analyze all runs/quickstart
      hmoe-rec analyze all runs/single runs/mmoe runs/stem --rows 200000 --out runs/comparison
      torchrun --nproc-per-node 8 -m hmoe_rec analyze all runs/big
    """
    quiet()
    from hmoe_rec.analysis.everything import analyze_all
    from hmoe_rec.sharding.process import process_group
    from hmoe_rec.training.evaluate import device_of, read_run_config

    def tell(line: str) -> None:
        if is_first():
            typer.echo(line, err=True)

    options: Any = {"data": data, "rows": rows, "by": by or (), "checkpoint": checkpoint, "tell": tell}
    with process_group(device_of(read_run_config(runs[0]), device)) as process:
        for found in analyze_all(runs, process, **options):
            write([found], runs, out, where=found.name == "all")


@app.command()
@reads_parts
def calibration(
    runs: Runs,
    data: Data = None,
    by: Annotated[
        list[str] | None, typer.Option(help="A column to slice by; any column of the files. Give it several times.")
    ] = None,
    counts: Annotated[
        list[str] | None, typer.Option(help="A column of counts, such as earlier exposures: 0, 1, 2 to 4, 5 to 9, ...")
    ] = None,
    frequency: Annotated[
        list[str] | None, typer.Option(help="An id field, by how many rows of the training data have the row's id.")
    ] = None,
    checkpoint: CheckpointName = "best",
    rows: Rows = None,
    out: Out = None,
    device: Device = None,
) -> None:
    """Whether predicted rates are the observed ones: overall, by score, by any column, and where ids are new.

    --frequency counts the training data once; ids that are not in it are the slice 0, the cold start. --counts is for
    columns such as the one that `hmoe-rec data exposures` writes. Of other columns, few distinct values are slices by
    themselves, many become slices of equal size. The labels' noise is shown as a 95 % interval; a difference inside of
    it is none.

    \b
    Examples:
      hmoe-rec analyze calibration runs/quickstart
      hmoe-rec analyze calibration runs/kuairand --by tab --by video_duration --frequency video_id --out reports
      hmoe-rec analyze calibration runs/quickstart --data counted/test.parquet --counts shown_before
    """
    quiet()
    from hmoe_rec.analysis.calibration import analyze_calibration

    def of(run: Any) -> Any:
        slices: Any = {"by": by or (), "counts": counts or (), "frequency": frequency or ()}
        return analyze_calibration(run, run.uris(data), rows=rows, **slices)

    write([each(runs, checkpoint, device, of)], runs, out)


@app.command()
@reads_parts
def collapse(
    runs: Runs,
    weighted: Annotated[
        bool, typer.Option("--weighted", help="Also count rows as often as the data has them (reads the data).")
    ] = False,
    data: Data = None,
    rows: Rows = None,
    checkpoint: CheckpointName = "best",
    out: Out = None,
) -> None:
    """How many directions of their width the embedding tables use.

    Singular spectrum and information abundance of every table, raw and with rows of length 1, beside a random table of
    the same shape; how the sets of a run relate; what the projections of dcnv2 and gwpfm leave. Tables are streamed
    from the checkpoint, of any size: nothing is held but a chunk of rows. Give several runs to compare them.

    \b
    Examples:
      hmoe-rec analyze collapse runs/quickstart
      hmoe-rec analyze collapse runs/single runs/four-sets --out runs/comparison
      torchrun --nproc-per-node 8 -m hmoe_rec analyze collapse runs/big
    """
    quiet()
    from hmoe_rec.analysis.collapse_report import analyze_collapse
    from hmoe_rec.sharding.process import process_group

    with process_group() as process:
        found = analyze_collapse(runs, process, weighted=weighted, data=data, rows=rows, checkpoint=checkpoint)
    write([found], runs, out)


def _pair(names: str | None, option: str) -> tuple[str, str] | None:
    """ "click,like" -> its two names."""
    if names is None:
        return None
    parts = [n.strip() for n in names.split(",")]
    if len(parts) != 2 or not all(parts):
        from hmoe_rec.types import ConfigError

        raise ConfigError(f"{option} {names}: expected two names with a comma between, such as click,like")
    return parts[0], parts[1]


Tasks = Annotated[str | None, typer.Option(help="Two tasks: click,like. Default: the first two.")]


@app.command()
@reads_parts
def entanglement(
    runs: Runs,
    tasks: Tasks = None,
    user: Annotated[str | None, typer.Option(help="The user's id field. Default: the schema's user_key.")] = None,
    item: Annotated[str | None, typer.Option(help="The item's id field. Default: what behaviors share.")] = None,
    rule: Annotated[str, typer.Option(help="Pairs by: scores, labels or rates.")] = "scores",
    data: Data = None,
    rows: Annotated[int, typer.Option(min=1, help="Read about so many rows.")] = 100_000,
    checkpoint: CheckpointName = "best",
    out: Out = None,
    device: Device = None,
) -> None:
    """Whether embedding sets keep the interests of two tasks apart.

    Takes pairs of user and item whose feedback contradicts between the tasks (click but not like, and the mirror), and
    compares the distances of their vectors, set by set: where the two kinds of pairs overlap, the set is entangled.

    \b
    Examples:
      hmoe-rec analyze entanglement runs/quickstart --tasks click,like
      hmoe-rec analyze entanglement runs/shared-bottom runs/stem --rule labels --user user_id --item video_id
    """
    quiet()
    from typing import get_args

    from hmoe_rec.analysis.entanglement import Rule, analyze_entanglement
    from hmoe_rec.types import ConfigError

    if rule not in get_args(Rule):
        raise ConfigError(f"--rule {rule}: expected {', '.join(get_args(Rule))}")
    names: Any = {"tasks": _pair(tasks, "--tasks"), "user": user, "item": item, "rule": rule}

    def of(run: Any) -> Any:
        return analyze_entanglement(run, run.uris(data), rows=rows, **names)

    write([each(runs, checkpoint, device, of)], runs, out)


@app.command()
@reads_parts
def gates(
    runs: Runs,
    by: Annotated[str | None, typer.Option(help="A column to slice by; any column of the files.")] = None,
    data: Data = None,
    rows: Annotated[int, typer.Option(min=1, help="Read about so many rows.")] = 100_000,
    checkpoint: CheckpointName = "best",
    out: Out = None,
    device: Device = None,
) -> None:
    """Which task reads which expert and set how much; experts that are alike, dead or unused.

    \b
    Examples:
      hmoe-rec analyze gates runs/quickstart
      hmoe-rec analyze gates runs/mmoe runs/stem --by tab --out runs/comparison
    """
    quiet()
    from hmoe_rec.analysis.gates import analyze_gates

    def of(run: Any) -> Any:
        return analyze_gates(run, run.uris(data), by=by, rows=rows)

    write([each(runs, checkpoint, device, of)], runs, out)


@app.command()
@reads_parts
def transfer(
    runs: Runs,
    tasks: Tasks = None,
    field: Annotated[
        str | None, typer.Option(help="The id field whose feedback is compared. Default: what behaviors share.")
    ] = None,
    data: Data = None,
    rows: Rows = None,
    checkpoint: CheckpointName = "best",
    out: Out = None,
    device: Device = None,
) -> None:
    """Where learning tasks together helps and where it hurts: AUC by subset, run against run.

    Rows fall into subsets by how the feedback of two tasks compares for their item in the training data of the first
    run: mostly the one, comparable, mostly the other. Differences come with standard errors over the rows.

    \b
    Example:
      hmoe-rec analyze transfer runs/shared-bottom runs/mmoe runs/stem --tasks click,like --out runs/transfer
    """
    quiet()
    from hmoe_rec.analysis.transfer import analyze_transfer
    from hmoe_rec.sharding.process import process_group
    from hmoe_rec.training.evaluate import device_of, read_run_config

    pair, options = _pair(tasks, "--tasks"), {"data": data, "rows": rows, "checkpoint": checkpoint}
    with process_group(device_of(read_run_config(runs[0]), device)) as process:
        found = analyze_transfer(runs, process, tasks=pair, field=field, **options)
    write([found], runs, out)


@app.command()
@reads_parts
def correlation(
    runs: Runs,
    column: Annotated[
        str | None, typer.Option(help="A behavior column. Default: the one whose target has the fewest ids.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The response. Default: the first task.")] = None,
    slots: Annotated[str, typer.Option(help="Where a behavior is: by position or by age.")] = "position",
    positions: Annotated[int, typer.Option(min=1, help="Positions, the latest behavior first.")] = 10,
    categories: Annotated[int, typer.Option(min=2, help="Behavior categories to show, the most frequent ones.")] = 10,
    permutations: Annotated[
        int, typer.Option(min=0, help="Permutations of the responses, for p values. 0 = none.")
    ] = 0,
    unbiased: Annotated[
        bool, typer.Option("--unbiased", help="Less what noise alone would show; a cell may be below 0.")
    ] = False,
    data: Data = None,
    rows: Rows = None,
    checkpoint: CheckpointName = "best",
    out: Out = None,
    device: Device = None,
) -> None:
    """What a behavior's category and position say of the response: in the data, and in what models learned.

    Mutual information (bits) for the most frequent target categories, beside the models' attention and their
    predictions, as heat maps with their agreement (Pearson, mean absolute error). Several runs compare poolings.

    \b
    Examples:
      hmoe-rec analyze correlation runs/quickstart
      hmoe-rec analyze correlation runs/tim runs/din --column hist_main_tag --task click --permutations 999
    """
    quiet()
    from typing import get_args

    from hmoe_rec.analysis.correlation_report import Slots, analyze_correlation
    from hmoe_rec.sharding.process import process_group
    from hmoe_rec.training.evaluate import device_of, read_run_config
    from hmoe_rec.types import ConfigError

    if slots not in get_args(Slots):
        raise ConfigError(f"--slots {slots}: expected {' or '.join(get_args(Slots))}")
    by: Any = slots
    with process_group(device_of(read_run_config(runs[0]), device)) as process:
        found = analyze_correlation(
            runs,
            process,
            column=column,
            task=task,
            slots=by,
            num_slots=positions,
            num_categories=categories,
            data=data,
            rows=rows,
            checkpoint=checkpoint,
            unbiased=unbiased,
            permutations=permutations,
        )
    write([found], runs, out)


@app.command()
@reads_parts
def fields(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A run file or a run directory.", show_default=False)],
    data: Annotated[
        str | None, typer.Option(help="Parquet: file, directory, glob or URI. Default: the training data.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Read about so many rows.")] = 500_000,
    out: Annotated[str, typer.Option(help="Directory for the files.")] = "analysis",
) -> None:
    """Which fields matter for each task, and which are redundant: mutual information, before any training.

    \b
    Example:
      hmoe-rec analyze fields configs/quickstart.yaml --out runs/fields
    """
    quiet()
    from hmoe_rec import io
    from hmoe_rec.analysis.fields import analyze_fields
    from hmoe_rec.config import load_config
    from hmoe_rec.sharding.process import process_group
    from hmoe_rec.training.evaluate import read_run_config

    resolved = read_run_config(config) if io.isdir(config) else load_config(config)
    with process_group() as process:
        found = analyze_fields(resolved, process, data=data, rows=rows)
    write([found], [out], out)


def each(runs: Sequence[str], checkpoint: str, device: str | None, analysis: Callable[[Any], Any]) -> Any:
    """What an analysis of one run finds in each of several, side by side."""
    from hmoe_rec.analysis.opening import join_names, load
    from hmoe_rec.analysis.report import side_by_side
    from hmoe_rec.sharding.process import process_group
    from hmoe_rec.training.evaluate import device_of, read_run_config

    with process_group(device_of(read_run_config(runs[0]), device)) as process:
        names = join_names(runs)
        return side_by_side({n: analysis(load(r, process, checkpoint)) for r, n in zip(runs, names, strict=True)})
