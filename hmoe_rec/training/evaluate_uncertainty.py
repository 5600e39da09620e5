"""A run, a kind of estimate, labelled data -> log loss, coverage of true logits, recognition of new ids, per task."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from hmoe_rec import io
from hmoe_rec.config import RunConfig, prepare_data
from hmoe_rec.data.source import find_files, open_file
from hmoe_rec.sharding.process import Process, process_group
from hmoe_rec.suggest import unknown
from hmoe_rec.training.evaluate import Results, device_of, evaluation_reader, read_run_config
from hmoe_rec.training.uncertainty import open_estimate
from hmoe_rec.types import ConfigError, DataError
from hmoe_rec.uncertainty.estimates import Estimate
from hmoe_rec.uncertainty.quality import UncertaintyMetrics

ROW_ID = "row_id"  # of a file with true probabilities, and of the log that it belongs to


def evaluate_uncertainty(
    run_dir: str,
    kind: str,
    *,
    data: str | Sequence[str] | None = None,
    checkpoint: str = "best",
    truth: str | None = None,
    new_ids: str | None = None,
) -> dict[str, Any]:
    """How good the variances of a run's logits are.

    Args:
        kind: one of `hmoe_rec.uncertainty.KINDS`.
        data: files with labels; None = the run's own test data.
        truth: Parquet with the true probabilities, a column per task, and row_id as in the data; None = those of a
            synthetic log, if `data` is its own.
        new_ids: an id field: examples whose id the training data does not have are new.

    Returns:
        As `evaluate_run`, with the figures of `hmoe_rec.uncertainty.quality` as metrics.
    """
    config = read_run_config(run_dir)
    own = prepare_data(config)
    uris = [data] if isinstance(data, str) else list(data or own.test or own.validation)
    if not uris:
        raise ConfigError("the run has neither test nor validation data; give --data URI")
    if truth is None and data is None and own.truth is not None:
        folder, _, name = uris[0].rpartition("/")
        truth = io.join(folder, "truth", name)
    true_logits = None if truth is None else TrueLogits(truth, config.tasks)
    seen = None if new_ids is None else SeenIds(_column_of(config, new_ids), own.train)
    with process_group(device_of(config)) as process:
        estimate, found = open_estimate(run_dir, config, process, kind, checkpoint)
        results = judge(estimate, config, process, uris, true_logits, seen)
    return {"checkpoint": found.uri, "step": found.step, "data": uris, "metrics": results, "reference": None}


def judge(
    estimate: Estimate,
    config: RunConfig,
    process: Process,
    uris: Sequence[str],
    true_logits: "TrueLogits | None" = None,
    seen: "SeenIds | None" = None,
) -> Results:
    """The figures over all processes. A collective call."""
    metrics = UncertaintyMetrics(config.tasks, process.device)
    carry = [*([ROW_ID] if true_logits else []), *([seen.column] if seen else [])]
    reader = evaluation_reader(uris, config.schema_of_data, config, process, carry=list(dict.fromkeys(carry)))
    for item in reader.epoch(0):
        batch, table = item if reader.carry else (item, None)
        whole = batch.at_least_one()
        true_BT = new_B = None
        if true_logits is not None and table is not None and len(batch):
            true_BT = true_logits.of(table.column(ROW_ID).to_numpy()).to(process.device)
        if seen is not None and table is not None and len(batch):
            new_B = seen.is_new(table.column(seen.column)).to(process.device)
        whole = whole.to(process.device)
        moments = estimate(whole)
        metrics.update(moments, whole.labels, whole.weights, true_BT=true_BT, new_B=new_B)
    return metrics.compute()


class TrueLogits:
    """True probabilities of a file with row_id and a column per task -> true logits of rows."""

    def __init__(self, uri: str, tasks: Sequence[str]) -> None:
        with io.open(uri, "rb") as file:
            names = pq.read_schema(file).names
            if missing := [name for name in (ROW_ID, *tasks) if name not in names]:
                raise DataError(f"{uri}: no column {missing[0]!r}; expected row_id and a true probability per task")
            table = pq.read_table(file, columns=[ROW_ID, *tasks])
        ids = table.column(ROW_ID).to_numpy()
        order = np.argsort(ids, kind="stable")
        self.uri, self.ids = uri, ids[order]
        p_nT = np.stack([table.column(task).to_numpy().astype(np.float64)[order] for task in tasks], 1)
        p_nT = p_nT.clip(1e-7, 1 - 1e-7)
        self.logits_nT = torch.from_numpy(np.log(p_nT) - np.log1p(-p_nT))

    def of(self, row_ids: np.ndarray) -> torch.Tensor:
        """
        Raises:
            DataError: a row that the file does not have.
        """
        places = np.searchsorted(self.ids, row_ids).clip(max=len(self.ids) - 1)
        if (wrong := self.ids[places] != row_ids).any():
            raise DataError(f"{self.uri}: no true probabilities of row_id {row_ids[wrong][0]}; is it of other data?")
        return self.logits_nT[torch.from_numpy(places)]


class SeenIds:
    """The distinct values of a column of the training data; holds them in memory."""

    def __init__(self, column: str, uris: Sequence[str]) -> None:
        self.column = column
        distinct: pa.Array | None = None
        for file in find_files(uris):
            for batch in open_file(file).iter_batches(columns=[column]):
                values = batch.column(0)
                values = values if distinct is None else pa.concat_arrays([distinct, values.cast(distinct.type)])
                distinct = values.unique()
        self.values = distinct

    def is_new(self, ids: pa.ChunkedArray) -> torch.Tensor:
        """[B] bool; a missing id is not new."""
        assert self.values is not None, "find_files finds at least one file"
        options = pc.SetLookupOptions(value_set=self.values.cast(ids.type), skip_nulls=False)
        found = pc.call_function("is_in", [ids], options).to_numpy() | ids.is_null().to_numpy()
        return ~torch.from_numpy(found)


def _column_of(config: RunConfig, name: str) -> str:
    single = {c.name: c.source for c in config.schema_of_data.ids if c.pooling is None}
    if name not in single:
        raise ConfigError(f"--new-ids: {unknown('single-valued id field', name, single)}")
    return single[name]
