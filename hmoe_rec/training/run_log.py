"""What a run writes for people and tools: one progress line, metrics.jsonl and others by its side, TensorBoard."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from hmoe_rec import io
from hmoe_rec.line_log import LineLog, read_lines
from hmoe_rec.losses.bce import observed_weights
from hmoe_rec.metrics import json_safe
from hmoe_rec.training.board import Board
from hmoe_rec.training.task import ExtraName, StepOutput

CHARTS = ("information_abundance", "effective_rank", "share_of_width", "share_of_random")  # of a table in training


class Window:
    """Weighted sums since the last line of the log, kept on the device; nothing waits for it until the line is made.

    Args:
        extras: names of `StepOutput.extras_X`.
    """

    def __init__(
        self, num_tasks: int, device: torch.device, distributed: bool, extras: Sequence[ExtraName] = ()
    ) -> None:
        self.distributed, self.extras = distributed, tuple(extras)
        self.sums_4T = torch.zeros(4, num_tasks, device=device, dtype=torch.float64)
        self.sums_X = torch.zeros(len(self.extras), device=device, dtype=torch.float64)
        self.start()

    def start(self) -> None:
        self.sums_4T.zero_()
        self.sums_X.zero_()
        self.steps, self.began = 0, time.perf_counter()

    def skip(self, seconds: float) -> None:
        """Time that was not spent on training."""
        self.began += seconds

    def state(self) -> dict[str, Tensor]:
        """This rank's sums, for the checkpoint; `load` takes them back."""
        extras = {"extras": self.sums_X.cpu()} if self.extras else {}
        return {"sums": self.sums_4T.cpu(), "steps": torch.tensor([self.steps]), **extras}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.sums_4T.copy_(state["sums"])
        self.steps = int(state["steps"].item())
        if self.extras:
            self.sums_X.copy_(state["extras"])

    def add(self, output: StepOutput) -> None:
        known_BT = observed_weights(output.labels_BT, output.weights_B)
        self.steps += 1
        rows = (
            (output.labels_BT.nan_to_num(0.0) * known_BT).sum(0),
            (output.logits_BT.sigmoid() * known_BT).sum(0),
            known_BT.sum(0),
        )
        self.sums_4T[0] += output.losses_T
        for i, row in enumerate(rows, start=1):
            self.sums_4T[i] += row
        self.sums_X += output.extras_X

    def read(self, last_T: Tensor) -> tuple[list[float], dict[str, list[float]], dict[str, Any]]:
        """(the last step's loss per task, means over the window, its extras) of all ranks together.

        A collective call. The extras are nested: {"terms": {"click/pair": mean}, "conflicts": mean}.
        """
        num_tasks = self.sums_4T.shape[1]
        sums = torch.cat([self.sums_4T.flatten(), last_T.double(), self.sums_X])
        world_size = 1
        if self.distributed:
            world_size = dist.get_world_size()
            dist.all_reduce(sums)
        sums = sums.cpu()
        losses, labels, predictions, known, last = sums[: 5 * num_tasks].view(5, num_tasks).unbind(0)
        count = torch.where(known > 0, known, torch.ones_like(known))
        means = {
            "loss_mean": (losses / world_size / max(1, self.steps)).tolist(),
            "label_mean": (labels / count).tolist(),
            "prediction_mean": (predictions / count).tolist(),
        }
        extras: dict[str, Any] = {}
        for (what, of), total in zip(self.extras, sums[5 * num_tasks :].tolist(), strict=True):
            mean = total / world_size / max(1, self.steps)
            extras[what] = {**extras.get(what, {}), of: mean} if of else mean
        return (last / world_size).tolist(), means, extras


class RunLog:
    """The log of rank 0; other ranks get one that writes nothing.

    Args:
        run_dir: directory or URI.
        tasks: names.
        total_steps: of the whole run, for the bar; 0 = without end.
        first_step: steps done before; later lines of an earlier attempt are dropped.
        active: rank 0.
        train_name: what the rows are called that training metrics are of.
    """

    def __init__(
        self,
        run_dir: str,
        tasks: Sequence[str],
        *,
        total_steps: int,
        first_step: int,
        active: bool,
        train_name: str = "train",
    ) -> None:
        self.run_dir, self.tasks, self.active, self.train_name = run_dir, tuple(tasks), active, train_name
        self.console = Console(stderr=True)
        self._logs: dict[str, LineLog] = {}
        self._board: Board | None = None
        self._first_step = first_step
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            disable=not (active and self.console.is_terminal),
        )
        self._bar = self.progress.add_task("step", total=total_steps or None, completed=first_step, line="")
        if active:
            for name in ("metrics.jsonl", "evaluations.jsonl", "events.jsonl", "collapse.jsonl"):
                self._log(name).keep(lambda line: _is_up_to(line, first_step))

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.progress.stop()
        if self._board is not None:
            self._board.close()
        for log in self._logs.values():
            with nullcontext() if kind is None else suppress(OSError):  # the first error is the one to tell
                log.flush()

    def flush(self) -> None:
        """Before a checkpoint: a run that goes on from it has all lines up to it."""
        for log in self._logs.values():
            log.flush()
        if self._board is not None:
            self._board.flush()

    def say(self, message: str) -> None:
        if self.active:
            self.console.print(message, highlight=False, soft_wrap=True, markup=False)

    def advance(self, step: int) -> None:
        self.progress.update(self._bar, completed=step)

    def step(self, line: Mapping[str, Any]) -> None:
        """One object of metrics.jsonl, its scalars on TensorBoard, and the progress line."""
        if not self.active:
            return
        self._append("metrics.jsonl", line)
        self._scalars("train", line, line["step"])
        losses = " ".join(f"{task} {line['losses'][task]:.4f}" for task in self.tasks)
        rates = " ".join(f"{line['label_mean'][t]:.3f}/{line['prediction_mean'][t]:.3f}" for t in self.tasks)
        text = f"loss {losses} | label/prediction {rates} | {line['examples_per_second']:,.0f} examples/s"
        self.progress.update(self._bar, line=text)
        if not self.console.is_terminal:
            self.console.print(f"step {line['step']:>6}  {text}", highlight=False, soft_wrap=True)

    def evaluation(self, step: int, epoch: float, results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        """One object of evaluations.jsonl. results: "validation", and at the end of an epoch "train" -> metrics."""
        if not self.active:
            return
        self._append("evaluations.jsonl", {"step": step, "epoch": epoch, **results})
        for split, metrics in results.items():
            self._scalars(f"{split}_metrics" if split == "train" else split, metrics, step)
            figures = "  ".join(f"{task} {m['auc']:.4f}/{m['ne']:.4f}" for task, m in metrics.items())
            shown = self.train_name if split == "train" else split
            self.say(f"step {step:>6}  epoch {epoch:g}  {shown:>10} AUC/NE  {figures}")

    def window(self, line: Mapping[str, Any]) -> None:
        """One object of metrics.jsonl per window of a stream: "test" is what was predicted before training on it."""
        if not self.active:
            return
        self._append("metrics.jsonl", line)
        self._scalars("train", {name: line[name] for name in ("losses", "examples_per_second")}, line["step"])
        for group in ("test", "sliding", "lag", "unseen"):
            for name, value in line[group].items():
                scalars = value if isinstance(value, Mapping) else {"value": value}
                self._scalars(group, {name: scalars}, line["step"])
        figures = "  ".join(
            f"{t} {_number(m['ne'])} ({_number(line['sliding'][t]['ne'])}) {_number(m['calibration'], 2)}"
            for t, m in line["test"].items()
        )
        lag = line["lag"]
        bad = f", {line['bad']} bad" if line["bad"] else ""
        behind = f"{lag['units']:,} units, {lag['rows']:,} rows, {lag['seconds']:,.0f} s behind"
        text = (
            f"window {line['window']:>5}  {line['rows']:>8,} rows{bad}  NE (sliding) calibration  {figures} | {behind}"
        )
        self.progress.update(self._bar, completed=line["step"], line=text)
        if not self.console.is_terminal:
            self.console.print(text, highlight=False, soft_wrap=True)

    def event(self, step: int, kind: str, text: str) -> None:
        """Something out of the ordinary: an object of events.jsonl, and a line for people."""
        if self.active:
            self._append("events.jsonl", {"step": step, "kind": kind, "text": text})
            self.say(f"{kind}: {text}")

    def tables(self, line: Mapping[str, Any]) -> None:
        """One object of collapse.jsonl: "tables" -> name -> measures; on TensorBoard a chart per measure and table."""
        if not self.active:
            return
        self._append("collapse.jsonl", line)
        charts = {m: {name: x[m] for name, x in line["tables"].items()} for m in CHARTS}
        self._scalars("collapse", charts, line["step"])

    def _scalars(self, prefix: str, values: Mapping[str, Any], step: int) -> None:
        if self._board is None:
            purge = self._first_step + 1 if self._first_step else None
            self._board = Board(io.join(self.run_dir, "tensorboard"), purge)
        scalars = {
            f"{prefix}/{name}{key}": x
            for name, value in values.items()
            if name != "step"
            for key, x in (
                {f"/{k}": x for k, x in value.items()} if isinstance(value, Mapping) else {"": value}
            ).items()
        }
        self._board.add(scalars, step)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        self._log(name).append(json.dumps(json_safe(record), allow_nan=False))

    def _log(self, name: str) -> LineLog:
        if name not in self._logs:
            self._logs[name] = LineLog(io.join(self.run_dir, name))
        return self._logs[name]


def _number(value: float, digits: int = 4) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _is_up_to(line: str, step: int) -> bool:
    """So that what is redone after a restart is not there twice."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError):  # the last line of a process that was killed while writing it
        return False


def read_windows(run_dir: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that tell of a stream's windows; none where there is no such file."""
    found = []
    for text in _lines(io.join(run_dir, "metrics.jsonl")):
        try:
            line = json.loads(text)
        except ValueError:  # the last line of a process that was killed while writing it
            continue
        if "slices" in line:
            found.append(line)
    return found


def _lines(uri: str) -> list[str]:
    try:
        return read_lines(uri)
    except FileNotFoundError:
        return []
