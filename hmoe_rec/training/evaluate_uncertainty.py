"""A run, a kind of estimate, labelled data -> log loss, coverage of true logits, recognition of new ids, per task."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hmoe_rec import io
from hmoe_rec.config import RunConfig, prepare_data
from hmoe_rec.data.hashing import hash_rows
from hmoe_rec.data.source import find_files, open_file
from hmoe_rec.sharding.process import Process, process_group
from hmoe_rec.suggest import unknown
from hmoe_rec.training.evaluate import Results, device_of, evaluation_reader, read_run_config
from hmoe_rec.training.learned import training_data
from hmoe_rec.training.uncertainty import open_estimate
from hmoe_rec.types import ConfigError, DataError
from hmoe_rec.uncertainty.estimates import Estimate
from hmoe_rec.uncertainty.moments import Moments
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
    device: str | None = None,
) -> dict[str, Any]:
    """How good the variances of a run's logits are.

    Args:
        kind: one of `hmoe_rec.uncertainty.KINDS`.
        data: files with labels; None = the run's own test data.
        truth: Parquet with the true probabilities, a column per task, and row_id as in the data; None = those of a
            synthetic log, if `data` is its own.
        new_ids: an id field: examples whose id the training data does not have are new.
        device: see `device_of`.

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
    column = None if new_ids is None else _column_of(config, new_ids)
    with process_group(device_of(config, device)) as process:
        estimate, found = open_estimate(run_dir, config, process, kind, checkpoint)
        seen = None if column is None else SeenIds(column, training_data(config, run_dir, found.step))
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
        true_BT = new_B = None
        if true_logits is not None and table is not None:
            true_BT = true_logits.of(table.column(ROW_ID).to_numpy()).to(process.device)
        if seen is not None and table is not None:
            new_B = seen.is_new(table.column(seen.column)).to(process.device)
        whole, size = batch.filled().to(process.device), len(batch)
        moments = Moments(*(x_BT[:size] for x_BT in estimate(whole)))
        metrics.update(moments, whole.labels[:size], whole.weights[:size], true_BT=true_BT, new_B=new_B)
    return metrics.compute()


class TrueLogits:
    """True probabilities of a file with row_id and a column per task -> true logits of rows.

    Raises:
        DataError: a file that is missing, damaged or empty, a missing column, or a value that is no probability.
    """

    def __init__(self, uri: str, tasks: Sequence[str]) -> None:
        try:
            with open_file(uri) as file:
                if missing := [name for name in (ROW_ID, *tasks) if name not in file.schema_arrow.names]:
                    raise DataError(f"{uri}: no column {missing[0]!r}; expected row_id and a true probability per task")
                table = file.read(columns=[ROW_ID, *tasks])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{uri}: true probabilities cannot be read ({error}); expected a Parquet file") from None
        if not table.num_rows:
            raise DataError(f"{uri}: 0 rows; expected the true probabilities of all rows that are evaluated")
        ids = table.column(ROW_ID).to_numpy()
        p_nT = np.stack([table.column(task).to_numpy().astype(np.float64) for task in tasks], 1)
        right_nT = (p_nT >= 0) & (p_nT <= 1)  # not of null, which is NaN here
        if not right_nT.all():
            at, t = np.argwhere(~right_nT)[0]
            raise DataError(f"{uri}, row {at}, column {tasks[t]}: got {p_nT[at, t]}, expected a probability in [0, 1]")
        order = np.argsort(ids, kind="stable")
        self.uri, self.ids = uri, ids[order]
        p_nT = p_nT[order].clip(1e-7, 1 - 1e-7)
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
    """The distinct values of a column of the training data, as hashes, whatever types the files have; in memory."""

    def __init__(self, column: str, uris: Sequence[str]) -> None:
        self.column = column
        self.hashes = np.empty(0, np.uint64)
        for file in find_files(uris):
            with open_file(file) as parquet:
                for batch in parquet.iter_batches(columns=[column]):
                    self.hashes = np.union1d(self.hashes, hash_rows(pa.Table.from_batches([batch]), [column]))

    def is_new(self, ids: pa.ChunkedArray) -> torch.Tensor:
        """[B] bool; a missing id is not new."""
        seen = np.isin(hash_rows(pa.table({self.column: ids}), [self.column]), self.hashes)
        return torch.from_numpy(~seen & ids.is_valid().to_numpy())


def _column_of(config: RunConfig, name: str) -> str:
    single = {c.name: c.source for c in config.schema_of_data.ids if c.pooling is None}
    if name not in single:
        raise ConfigError(f"--new-ids: {unknown('single-valued id field', name, single)}")
    return single[name]
