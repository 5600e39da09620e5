"""A resolved configuration -> a trained run: the loop, its evaluations, checkpoints, early stop and report.

::

    batches ─▶ loop.progress ─▶ log every n steps ─▶ evaluate, checkpoint at the end of every epoch ─▶ report

A resumed run goes on from the same parameters, statistics, data and random states. On CPUs, with as many processes, its
losses are then those of an undisturbed run bit for bit. On GPUs they are not, since additions change their order from
run to run: FBGEMM's backward cuts a row that a batch has more than 1,024 times into parts that are added by atomics,
unless torch.use_deterministic_algorithms is set (embedding_backward_split_template.cu: max_segment_length_per_cta);
torch's index_add, scatter_add and cumsum, and matrix products that share a workspace, have such orders too. A
deterministic mode was not made: nothing here could show that it holds.
"""

import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
import torch.distributed as dist

from hmoe_rec import io
from hmoe_rec.batch import Batch
from hmoe_rec.config import ResolvedData, RunConfig, prepare_data
from hmoe_rec.embedding.managed import managed_ids
from hmoe_rec.lock import Lock
from hmoe_rec.metrics import TaskMetrics, json_safe
from hmoe_rec.sharding.process import Process, process_group
from hmoe_rec.sharding.replicas import Averaging
from hmoe_rec.training.build import build_optimizers, build_sharded, load_state, parameter_counts, state_of
from hmoe_rec.training.checkpoint import Checkpoint, CheckpointManager
from hmoe_rec.training.evaluate import Results, device_of, evaluate_batches, evaluation_reader
from hmoe_rec.training.exposure import exposure_lines, with_exposure_weights
from hmoe_rec.training.loop import make_loop
from hmoe_rec.training.monitor import CollapseMonitor
from hmoe_rec.training.offsets import SAVED, begin_at, loss_offsets, probability_lines, undo_in
from hmoe_rec.training.prepare import (
    check_same_meaning,
    fill_frozen_vectors,
    order_of,
    with_pooling,
    with_statistics,
)
from hmoe_rec.training.publish import Publisher
from hmoe_rec.training.random_state import change_of_generators, random_state, restore_random_state
from hmoe_rec.training.run_dir import owned_run_dir, writing_run_dir
from hmoe_rec.training.run_log import RunLog, Window
from hmoe_rec.training.sampling import sampling_line, sampling_offsets, sampling_report, training_reader
from hmoe_rec.training.task import StepOutput, train_task_of
from hmoe_rec.types import CheckpointError, TrainingError

LOWER_IS_BETTER = ("logloss", "ne")
PROGRESSIVE_BINS = 1 << 13  # of AUC in training: each example is scored before it is learned from
PREEMPTED = 143  # exit status after SIGTERM, as a shell reports it


def train(config: RunConfig) -> dict[str, Any]:
    """Trains, evaluates and reports one run; every process of the job calls it.

    Returns:
        What report.json holds: {"validation": {task: {metric: value}}, "test": ..., "parameters": ..., ...}.

    Raises:
        HmoeError: bad data, a plan or checkpoint that does not fit, or a loss that is not finite.
    """
    began = time.perf_counter()
    with process_group(device_of(config)) as process:
        choose_threads(config, process)
        data = prepare_data(config, progress=process.rank == 0)
        config = with_pooling(with_statistics(config, data, process), data, process)
        config = with_exposure_weights(config, data, process)
        return Trainer(config, data, process, began).run()


def choose_threads(config: RunConfig, process: Process) -> None:
    """The machine's cores, shared by its processes; FBGEMM's CPU kernels use one, matrix products the others."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    torch.set_num_threads(config.train.num_threads or max(1, cores // process.local_world_size))


class Trainer:
    """One run, from building to report; `run` reads top to bottom."""

    def __init__(self, config: RunConfig, data: ResolvedData, process: Process, began: float) -> None:
        self.config, self.data, self.process, self.began = config, data, process, began
        train = config.train
        self.tasks, self.run_dir = config.tasks, train.run_dir
        self.total_steps = self._open_data()
        # Also the test data: what is wrong with it shall not come up after the last step.
        splits = {"validation": data.validation, "test": data.test}
        self.evaluated = {
            split: evaluation_reader(uris, data.schema, config, process) for split, uris in splits.items() if uris
        }
        self.sharded = build_sharded(config, process)
        self.managed = managed_ids(self.sharded)
        self.optimizers = build_optimizers(config, self.sharded, self.total_steps)
        sharding = config.sharding
        self.averaging = (
            Averaging(self.sharded, self.optimizers.tables, every=sharding.sync_every)
            if sharding.replicas > 1
            else None
        )
        self.loop = make_loop(train.pipeline, self.sharded, self.optimizers.combined, process.device)
        # A launcher that restarts its processes means them to go on, not to start another run.
        self.resume = train.resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        # On a GPU reading the loss waits for the step: there it is read before anything is logged, saved or published.
        self.reads_every_loss = process.device.type == "cpu"
        self.step = 0
        self.progress: dict[str, Any] = {"best": {}, "since_best": 0, "stopped": False}
        extras = train_task_of(self.sharded).extra_names
        self.window = Window(len(self.tasks), process.device, process.world_size > 1, extras)
        self.epoch_metrics = TaskMetrics(self.tasks, num_bins=PROGRESSIVE_BINS, gauc=False, device=process.device)
        self.stop_signal = False
        self.flush_log: Callable[[], None] = lambda: None  # of the run's log, once it is open
        self.publisher: Publisher | None = None
        self._published = 0  # the step of it
        self.monitor = self._make_monitor()
        self._sources: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=8)

    def _open_data(self) -> int:
        """Opens what is trained on. -> steps of the run."""
        train = self.config.train
        self.reader = training_reader(self.config, self.data, self.process)
        self.train_name = "train" if self.reader.sampler is None else "train, sampled"
        self.steps_per_epoch = self.reader.steps_per_epoch
        all_steps = self.steps_per_epoch * train.epochs
        return all_steps if train.max_steps is None else min(train.max_steps, all_steps)

    # ------------------------------------------------------------------------------------------------------ the run

    def run(self) -> dict[str, Any]:
        with owned_run_dir(self.run_dir, self.process, resumes=self.resume) as lock:
            return self._run(lock)

    def _run(self, lock: Lock) -> dict[str, Any]:
        self.checkpoints = CheckpointManager(
            io.join(self.run_dir, "checkpoints"),
            keep=self.config.train.keep_checkpoints,
            before_commit=lock.check,
        )
        resumed = self._resume()
        if resumed is None:
            self._begin()
        self._write_config()
        publish = self.config.train.publish
        if publish is not None:
            self.publisher = Publisher(
                publish.to, self.sharded, prefix="model.", base_every=publish.base_every, keep=publish.keep
            )
            # A process may have died between a checkpoint and its publication.
            self._published = min(self.step, self.publisher.step)
        signal_before = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            with RunLog(
                self.run_dir,
                self.tasks,
                total_steps=self.total_steps,
                first_step=self.step,
                active=self.process.rank == 0,
                train_name=self.train_name,
            ) as log:
                self.flush_log = log.flush
                self._announce(log, resumed)
                self._train(log)
                report = self._report(log)
        finally:
            signal.signal(signal.SIGTERM, signal_before)
            if self.publisher is not None:
                self.publisher.close()
        return report

    def _begin(self) -> None:
        """What a run that is not resumed does to its model before the first step."""
        fill_frozen_vectors(self.sharded, self.config)
        begin_at(self.sharded, loss_offsets(self.config), sampling_offsets(self.reader))

    def _train(self, log: RunLog) -> None:
        batches = self._batches()
        self.window.skip(time.perf_counter() - self.window.began)
        self.sharded.train()
        if self.progress.pop("evaluation_due", False):  # the run was stopped before it
            self._save(self._evaluate(log, self._ends_epoch()))
        while self.step < self.total_steps and not self.progress["stopped"]:
            lr = self.optimizers.set_learning_rates(self.step)
            output = self.loop.progress(batches)
            self._count_step()
            self.window.add(output)
            self.epoch_metrics.update(output.logits_BT, output.labels_BT, output.weights_B)
            logs = self.step % self.config.train.log_every == 0 or self.step == self.total_steps
            evaluates, saves = self._is_evaluation_due(), _every(self.step, self.config.train.checkpoint_every)
            if self.reads_every_loss or logs or evaluates or saves or self._is_publication_due():
                self._check_finite(output)
            if logs:
                self._log_step(log, output, lr)
            self._watch(log)
            log.advance(self.step)
            tags = self._evaluate(log, self._ends_epoch()) if evaluates else []
            if tags or saves or self._ends_epoch():
                self._save(tags)
            self._publish(ends=False)
        batches.close()
        self._publish(ends=True)

    def _ends_epoch(self) -> bool:
        return self.step % self.steps_per_epoch == 0 or self.step == self.total_steps

    def _is_evaluation_due(self) -> bool:
        return self._ends_epoch() or _every(self.step, self.config.train.evaluate_every)

    def _count_step(self) -> None:
        self.step += 1
        if self.averaging is not None:
            self.averaging.after(self.step)

    def _make_monitor(self) -> CollapseMonitor | None:
        settings = self.config.train.monitor
        if not settings.collapse_every:
            return None
        return CollapseMonitor(
            self.sharded,
            self.process,
            every=settings.collapse_every,
            max_rows=settings.rows,
            below=settings.collapse_below,
            replicas=self.config.sharding.replicas,
        )

    def _watch(self, log: RunLog) -> None:
        """Measures the tables where that is due."""
        if self.monitor is None or not self.monitor.is_due(self.step):
            return
        found = self.monitor.measure(self.step)
        log.tables(self.monitor.line(self.step, found))
        for warning in self.monitor.warnings(found):
            log.say(warning)

    def _is_publication_due(self) -> bool:
        """Whether a multiple of `train.publish.every` steps was reached since the last one."""
        settings = self.config.train.publish
        return settings is not None and self.step // settings.every > self._published // settings.every

    def _publish(self, *, ends: bool) -> None:
        """Where that is due, and at the end."""
        if self.publisher is None or self.step == self._published:
            return
        if ends or self._is_publication_due():
            began = time.perf_counter()
            self.publisher.publish(self.step)
            self.window.skip(time.perf_counter() - began)
            self._published = self.step

    def _batches(self) -> Generator[Batch, None, None]:
        """From the present step to the last one, over the ends of epochs, so that a pipeline never runs dry."""
        step = self.step
        while step < self.total_steps:
            epoch, start = divmod(step, self.steps_per_epoch)
            for batch in self.reader.epoch(epoch, start):
                step += 1
                self._sources.append((step, batch.files))
                yield batch.filled()
                if step == self.total_steps:
                    return

    # ------------------------------------------------------------------------------------------- what happens in a step

    def _check_finite(self, output: StepOutput) -> None:
        wrong = [t for t, loss in zip(self.tasks, output.losses_T.tolist(), strict=True) if not math.isfinite(loss)]
        if wrong:
            files = dict(self._sources).get(self.step, ())
            raise TrainingError(
                f"step {self.step}: the loss of task {', '.join(wrong)} is not finite; the batch came from "
                f"{', '.join(files) or 'an empty slice'}. Lower train.learning_rate or train.embedding_learning_rate, "
                "or set train.clip_norm; the last committed checkpoint is untouched (hmoe-rec train CONFIG --resume)"
            )

    def _log_step(self, log: RunLog, output: StepOutput, lr: float) -> None:
        window = self.window
        seconds = time.perf_counter() - window.began
        examples = self.reader.rows_until(self.step) - self.reader.rows_until(self.step - window.steps)
        last, means, extras = window.read(output.losses_T)
        self._stop_together()
        weights = [self.config.train.task_weights.get(task, 1.0) for task in self.tasks]
        line = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "loss": sum(w * x for w, x in zip(weights, last, strict=True)),
            "losses": dict(zip(self.tasks, last, strict=True)),
            **{name: dict(zip(self.tasks, values, strict=True)) for name, values in means.items()},
            **extras,
            "learning_rate": lr,
            "examples_per_second": examples / max(seconds, 1e-9),
            **({} if self.managed is None else self.managed.window()),
        }
        log.step(line)
        window.start()

    def _evaluate(self, log: RunLog, epoch_ends: bool) -> list[str]:
        """-> tags that the checkpoint of this step earns."""
        began = time.perf_counter()
        found: dict[str, Results] = {}
        self._average()
        validation = self.evaluated.get("validation")
        if validation is not None:
            model = self.loop.evaluation_model()
            found["validation"] = evaluate_batches(model, validation, self.tasks, self.process)
            self.loop.after_evaluation()
        if epoch_ends:
            found["train"] = self.epoch_metrics.compute()
            self.epoch_metrics.reset()
        if found:
            log.evaluation(self.step, self.step / self.steps_per_epoch, found)
        self.window.skip(time.perf_counter() - began)
        return self._judge(log, found["validation"]) if validation is not None else []

    def _judge(self, log: RunLog, results: Results) -> list[str]:
        """Best checkpoints and early stop."""
        best = self.config.train.best
        tags = ["best"] if self._improved("best", best.metric, best.task, results) else []
        tags += [f"best_{task}" for task in self.tasks if self._improved(f"best_{task}", best.metric, task, results)]
        stop = self.config.train.early_stop
        if stop is not None and not math.isnan(_score(stop.metric, stop.task, results)):
            better = self._improved("early_stop", stop.metric, stop.task, results)
            self.progress["since_best"] = 0 if better else self.progress["since_best"] + 1
            self.progress["stopped"] = self._has_waited()
            if self.progress["stopped"]:
                log.say(f"early stop: {stop.metric} has not improved for {stop.patience} evaluations")
        return tags

    def _improved(self, name: str, metric: str, task: str | None, results: Results) -> bool:
        score = _score(metric, task, results)
        if not score > self.progress["best"].get(name, -math.inf):
            return False
        self.progress["best"][name] = score
        return True

    # ---------------------------------------------------------------------------------------------- saving and resuming

    def _state(self) -> dict[str, Any]:
        return {
            **state_of(self.sharded),
            "optimizer": self.optimizers.combined.state_dict(),
            "metrics": self.epoch_metrics.reduced_state_dict(),
        }

    def _own_state(self) -> dict[str, Any]:
        """What belongs to this process alone."""
        return {"random": random_state(self.process.device), "window": self.window.state()}

    def _position(self) -> dict[str, Any]:
        """What the order of the examples depends on: a step means the same batch only while these are equal."""
        train, data = self.config.train, self.config.data
        order = (
            {"shuffle": train.shuffle, "seed": train.seed, "shuffle_rows": data.shuffle_rows} if train.shuffle else {}
        )
        return {
            "train.global_batch_size": train.global_batch_size,
            "rows of data.train": self.reader.num_rows,
            "data.lanes": self.reader.lanes,
            **{f"train.{name}": value for name, value in order.items()},
        }

    def _save(self, tags: list[str]) -> None:
        meta = {
            "progress": json_safe(self.progress),
            "position": self._position(),
            "total_steps": self.total_steps,
            "random": sorted(random_state(self.process.device)),
            "order": order_of(self.config),
            SAVED: loss_offsets(self.config),
            "config": self.config.to_dict(),
        }
        self._average()
        self.flush_log()
        self.checkpoints.save(self.step, self._state(), per_rank=self._own_state(), meta=meta, tags=tags)

    def _average(self) -> None:
        """What is judged and saved is the same in all replica groups."""
        if self.averaging is not None:
            self.averaging.now(self.step)

    def _resume(self) -> Checkpoint | None:
        if not self.resume:
            return None
        found = self.checkpoints.latest()
        if found is None:
            return None
        self._keep_lanes(found)
        differing = [
            f"{name} was {found.meta['position'].get(name)!r} and is {value!r}"
            for name, value in self._position().items()
            if found.meta["position"].get(name) != value
        ]
        if differing:
            raise CheckpointError(
                f"{found.uri}: the position in the data cannot be restored, as {'; '.join(differing)}. Set it back, or "
                "start another run in another train.run_dir"
            )
        self._check_objective(found)
        check_same_meaning(found, self.config)
        self._load(found, with_optimizer=True)
        self.step = found.step
        self.progress |= found.meta["progress"]
        self.progress["stopped"] = self._has_waited()
        return found

    def _keep_lanes(self, found: Checkpoint) -> None:
        """Where the run file gives none, the lanes that the run was begun with, whatever the default was then."""
        lanes = found.meta["position"].get("data.lanes")
        if self.config.data.lanes is None and lanes is not None:
            self.reader.use_lanes(lanes)

    def _has_waited(self) -> bool:
        """Whether early stop is due; by the run file of now, which may have more patience than that of then."""
        stop = self.config.train.early_stop
        return stop is not None and self.progress["since_best"] >= stop.patience

    def _check_objective(self, found: Checkpoint) -> None:
        """What the loss makes of a row is part of the model: its logits would come to mean something else."""
        saved, config = found.meta["config"], self.config
        sections = {
            "data.sampling": (saved["data"].get("sampling"), config.data.sampling),
            "train.exposure": (saved["train"].get("exposure"), config.train.exposure),
        }
        for name, (before, now) in sections.items():
            if type(now).model_validate(before or {}) != now:
                raise CheckpointError(
                    f"{found.uri}: it was trained with another {name}, whose correction is part of the model's logits. "
                    "Set it back, or start another run in another train.run_dir"
                )

    def _load(self, checkpoint: Checkpoint, *, with_optimizer: bool) -> None:
        state = self._state() if with_optimizer else {"model": state_of(self.sharded)["model"]}
        own = self._own_state()
        own["random"] = {name: x for name, x in own["random"].items() if name in _generators_of(checkpoint)}
        if self.checkpoints.load_into(state, checkpoint, per_rank=own if with_optimizer else None):
            seed = self.config.train.seed + checkpoint.step
            restore_random_state(own["random"], self.process.device, seed=seed)
            self.window.load(own["window"])
        load_state(self.sharded, state)
        undo_in(self.sharded, checkpoint)
        if with_optimizer:
            self.optimizers.combined.load_state_dict(state["optimizer"])
            self.epoch_metrics.load_reduced_state_dict(state["metrics"])

    def _write_config(self) -> None:
        """After the checkpoint was accepted: a resume that is refused leaves the run as it was."""
        if self.process.rank == 0:
            with writing_run_dir(self.run_dir):
                io.write_text(io.join(self.run_dir, "config.yaml"), self.config.to_yaml())

    # ---------------------------------------------------------------------------------------------------------- the end

    def _on_sigterm(self, *_: object) -> None:
        self.stop_signal = True

    def _stop_together(self) -> None:
        """After SIGTERM on any process: all save at this step and leave. Looked at when a line is logged."""
        flag = torch.tensor([float(self.stop_signal)], device=self.process.device)
        if self.process.world_size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item():
            self.progress["evaluation_due"] = self._is_evaluation_due()
            self._save([])
            raise SystemExit(PREEMPTED)

    def _announce(self, log: RunLog, resumed: Checkpoint | None) -> None:
        counts = parameter_counts(self.sharded)
        where = f"{self.process.world_size} x {self.process.device.type}, {torch.get_num_threads()} threads each"
        examples = self.config.train.global_batch_size
        log.say(f"run {self.run_dir}: {self._length()} of {examples:,} examples; {where}")
        log.say(f"ready after {time.perf_counter() - self.began:.1f} s" + f"; dense parameters {counts['dense']:,}")
        for line in self._remarks():
            if line is not None:
                log.say(line)
        train = self.config.train
        one_statistic = train.embedding_optimizer == "rowwise_adagrad"
        plan = self.config.sharding.plan
        if plan in ("column_wise", "table_column_wise", "grid_shard") and self.process.world_size > 1 and one_statistic:
            log.say(
                f"note: under {plan} row-wise Adagrad keeps one statistic per row and column block, which trains a "
                "slightly different model than other plans; train.embedding_optimizer=adagrad does not"
            )
        sharding = self.config.sharding
        if sharding.replicas > 1:
            size = self.process.world_size // sharding.replicas
            log.say(
                f"tables: {sharding.replicas} replica groups of {size} processes, averaged every {sharding.sync_every} "
                "steps, and before evaluating and saving"
            )
        if resumed is not None:
            log.say(f"resumed at step {self.step} from {resumed.uri}")
            here = random_state(self.process.device)
            if (note := change_of_generators(_generators_of(resumed), here)) is not None:
                log.say(note)

    def _length(self) -> str:
        return f"{self.total_steps:,} steps"

    def _remarks(self) -> Iterable[str | None]:
        """What a person should know of the rows when a run begins."""
        return sampling_line(self.reader), *exposure_lines(self.config), *probability_lines(self.config)

    def _report(self, log: RunLog) -> dict[str, Any]:
        """Evaluates the best checkpoint on validation and test and writes report.json."""
        best = self.checkpoints.best() or self.checkpoints.latest()
        assert best is not None, "the last step always saves"
        model = self.loop.evaluation_model()
        report: dict[str, Any] = {"best_step": best.step, "steps": self.step}
        self._load(best, with_optimizer=False)
        report["validation"] = {}
        for split, reader in self.evaluated.items():
            report[split] = evaluate_batches(model, reader, self.tasks, self.process)
        if test := self.evaluated.get("test"):
            report["test_at_best_of_each_task"] = self._at_best_of_each(model, test, best, report["test"])
        report["reference"] = dict(self.data.truth or {})
        report["parameters"] = parameter_counts(self.sharded)
        report["sampling"] = sampling_report(self.reader)
        report["exposure"] = self.config.train.exposure.fitted
        report["seconds"] = time.perf_counter() - self.began
        if self.process.rank == 0:
            text = json.dumps(json_safe(report), indent=1, allow_nan=False)
            io.write_text(io.join(self.run_dir, "report.json"), text)
        return report

    def _at_best_of_each(self, model: Any, reader: Any, best: Checkpoint, results: Results) -> Results:
        """Each task at the checkpoint where its own validation metric was best: tasks peak at different steps."""
        known: dict[int, Results] = {best.step: results}
        found: Results = {}
        for task in self.tasks:
            checkpoint = self.checkpoints.tagged(f"best_{task}") or best
            if checkpoint.step not in known:
                self._load(checkpoint, with_optimizer=False)
                known[checkpoint.step] = evaluate_batches(model, reader, self.tasks, self.process)
            found[task] = {**known[checkpoint.step][task], "step": checkpoint.step}
        return found


def _score(metric: str, task: str | None, results: Results) -> float:
    """The higher the better: of a task, or the mean over the tasks that have a value; NaN where none has one."""
    values = [results[t][metric] for t in ([task] if task else results)]
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) * (-1 if metric in LOWER_IS_BETTER else 1) if known else math.nan


def _generators_of(checkpoint: Checkpoint) -> list[str]:
    """Whose state it holds; checkpoints that do not say were made on CPUs."""
    return checkpoint.meta.get("random", ["cpu"])


def _every(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
