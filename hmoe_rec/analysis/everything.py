"""Runs -> every analysis that they allow, section by section; what they do not allow is listed with the reason.

Analyses that compare runs (correlation, collapse, transfer) look at all of them together; those that look into one run
give a section for each.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hmoe_rec.analysis.calibration import analyze_calibration
from hmoe_rec.analysis.collapse_report import analyze_collapse
from hmoe_rec.analysis.correlation_report import analyze_correlation
from hmoe_rec.analysis.entanglement import analyze_entanglement
from hmoe_rec.analysis.fields import analyze_fields
from hmoe_rec.analysis.gates import analyze_gates
from hmoe_rec.analysis.opening import OpenRun, data_of, join_names, load
from hmoe_rec.analysis.report import ReportTable, Section, per_run
from hmoe_rec.analysis.transfer import analyze_transfer
from hmoe_rec.data.parquet import ParquetSource
from hmoe_rec.sharding.process import Process
from hmoe_rec.training.checkpoint_access import open_checkpoint
from hmoe_rec.training.evaluate import read_run_config
from hmoe_rec.training.learned import training_data
from hmoe_rec.types import ConfigError

ROWS = {"fields": 500_000, "entanglement": 100_000, "gates": 100_000}  # where nobody says how many


@dataclass(frozen=True)
class Outcome:
    """Attributes: reason: why there is no section; None = there is one."""

    analysis: str
    run: str
    seconds: float
    reason: str | None = None


Step = tuple[str, str, Callable[[], Section]]  # analysis, run ("" = all), what finds it


def analyze_all(
    runs: Sequence[str],
    process: Process,
    *,
    data: str | None = None,
    rows: int | None = None,
    by: Sequence[str] = (),
    checkpoint: str = "best",
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Section]:
    """Section after section, the overview last. Every process makes the same calls.

    Args:
        data: None = each run's test data; that of the first one where runs are compared.
        rows: of each analysis; None = all, or as many as the analysis takes by itself.
        by: columns to slice calibration by.
        tell: is called with a line before each analysis, and with the reason where one is left out.

    Raises:
        ConfigError: a run that is none, or one that allows no analysis at all.
        CheckpointError: no such checkpoint.
        DataError, SchemaError: damaged data, or data that does not fit the runs.
    """
    for run in runs:  # what would fail later on is better told at once
        config = read_run_config(run)
        open_checkpoint(run, checkpoint)
        if by:
            ParquetSource(data_of(config, data), config.schema_of_data, columns=by)
    outcomes: list[Outcome] = []
    steps = [*_together(runs, process, data, rows, checkpoint), *_one_by_one(runs, process, data, rows, by, checkpoint)]
    for number, (analysis, run, find) in enumerate(steps, 1):
        tell(f"[{number}/{len(steps)}] {analysis}{f' of {run}' if run else ''}")
        began = time.perf_counter()
        try:
            found = find()
        except ConfigError as error:
            reason = str(error).removeprefix(f"{analysis}: ")
            outcomes.append(Outcome(analysis, run, time.perf_counter() - began, reason))
            tell(f"  left out: {reason}")
            continue
        outcomes.append(Outcome(analysis, run, time.perf_counter() - began))
        yield per_run(found, run) if run else found
    if all(o.reason for o in outcomes):
        raise ConfigError("\n  ".join(["no analysis is possible:", *(f"{o.analysis}: {o.reason}" for o in outcomes)]))
    yield overview(outcomes, runs)


def _together(
    runs: Sequence[str], process: Process, data: str | None, rows: int | None, checkpoint: str
) -> Iterator[Step]:
    first = read_run_config(runs[0])
    yield "fields", "", lambda: analyze_fields(first, process, rows=rows or ROWS["fields"])
    yield "correlation", "", lambda: analyze_correlation(runs, process, data=data, rows=rows, checkpoint=checkpoint)
    yield "collapse", "", lambda: analyze_collapse(runs, process, checkpoint=checkpoint)

    def transfer() -> Section:
        if len(runs) < 2:
            raise ConfigError("transfer: compares runs; give several")
        return analyze_transfer(runs, process, data=data, rows=rows, checkpoint=checkpoint)

    yield "transfer", "", transfer


def _one_by_one(
    runs: Sequence[str], process: Process, data: str | None, rows: int | None, by: Sequence[str], checkpoint: str
) -> Iterator[Step]:
    for directory, name in zip(runs, join_names(runs), strict=True):
        shown = name if len(runs) > 1 else ""
        opened: list[OpenRun] = []  # by the first of the three, and shared

        def run(directory: str = directory, opened: list[OpenRun] = opened) -> OpenRun:
            if not opened:
                opened.append(load(directory, process, checkpoint))
            return opened[0]

        def entanglement(run: Callable[[], OpenRun] = run) -> Section:
            return analyze_entanglement(run(), run().uris(data), rows=rows or ROWS["entanglement"])

        def gates(run: Callable[[], OpenRun] = run) -> Section:
            return analyze_gates(run(), run().uris(data), rows=rows or ROWS["gates"])

        def calibration(run: Callable[[], OpenRun] = run, opened: list[OpenRun] = opened) -> Section:
            fields = _cold_start_fields(run())
            found = analyze_calibration(run(), run().uris(data), by=by, frequency=fields, rows=rows)
            opened.clear()  # one model in memory at a time
            return found

        yield "entanglement", shown, entanglement
        yield "gates", shown, gates
        yield "calibration", shown, calibration


def _cold_start_fields(run: OpenRun) -> list[str]:
    """The field that behaviors share, most likely the item; none where there is no training data to count."""
    features = run.config.features
    single = [t for t in features.targets.values() if not features.id_field(t).multi_valued]
    try:
        training_data(run.config, run.run_dir, run.checkpoint.step)
    except ConfigError:
        return []
    return single[:1]


def overview(outcomes: Sequence[Outcome], runs: Sequence[str]) -> Section:
    """What was done and what was left out, and why."""
    left_out = [o for o in outcomes if o.reason]
    done = sorted({o.analysis for o in outcomes if not o.reason}, key=[o.analysis for o in outcomes].index)
    summary = [f"Done: {', '.join(done)}."]
    summary += [f"Left out: {o.analysis}{f' of {o.run}' if o.run else ''}: {o.reason}." for o in left_out]
    rows = [[o.analysis, o.run or "all", "left out" if o.reason else "done", f"{o.seconds:.1f}"] for o in outcomes]
    table = ReportTable("Analyses", ["analysis", "run", "", "seconds"], rows, left=3)
    numbers = {"outcomes": [vars(o) for o in outcomes]}
    return Section("all", "Overview", summary, [table], (), numbers, {"run": list(runs)})
