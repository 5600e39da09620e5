"""A source without end -> a model that is tested on each window, then trained on it; its checkpoints hold its position.

::

    stream ─▶ window ─▶ test with the parameters so far ─▶ alarms ─▶ train, batch by batch ─▶ position, checkpoint

"Test, then train" (prequential or progressive validation) makes every example a test example once, before it has been
learned from. Period, windows and alarms are ours: the papers name continued training and publish none of them.

Parameters, optimizer, position and metrics are committed in one atomic step. So after `kill -9` at any moment the run
goes on from the last checkpoint as if nothing had happened since: what the surviving parameters have learned from is
each row once, and where windows do not depend on the clock they are equal to those of an undisturbed run: on CPUs bit
for bit, on GPUs up to the order in which atomics add (trainer.py).
"""

import json
import signal
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hmoe_rec import io
from hmoe_rec.batch import Batch
from hmoe_rec.config import ResolvedData, RunConfig, prepare_data
from hmoe_rec.config.encoding import numbers_to_fit
from hmoe_rec.data.dead_letters import DeadLetters, Letter
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.data.stream import Clock, Stream, Window, WindowRule
from hmoe_rec.metrics import SlidingMetrics, TaskMetrics, json_safe
from hmoe_rec.sharding.process import Process, process_group
from hmoe_rec.training.build import load_state, state_of
from hmoe_rec.training.checkpoint import Checkpoint
from hmoe_rec.training.drift import Alarm, Limits, SeenIds, alarms_of
from hmoe_rec.training.evaluate import (
    Results,
    device_of,
    evaluate_batches,
    find_checkpoint,
    open_run,
    read_run_config,
    score,
)
from hmoe_rec.training.exposure import exposure_lines, with_exposure_weights
from hmoe_rec.training.feed import RETRY_SECONDS, Fed, WindowFeed
from hmoe_rec.training.offsets import begin_at, loss_offsets, probability_lines, undo_in
from hmoe_rec.training.prepare import check_same_meaning, fill_frozen_vectors, with_pooling, with_statistics
from hmoe_rec.training.run_log import RunLog
from hmoe_rec.training.trainer import PREEMPTED, Trainer, choose_threads
from hmoe_rec.types import ConfigError, DataError, HmoeError, TrainingError

WINDOW_BINS = 1 << 12
RECENT_UNITS, FEWEST_BAD = 1000, 10  # of online.max_bad_share
BEGAN_WITH = "began_with"  # of a checkpoint's progress: the history of what online.start_from named
INTERRUPTED = 130  # exit status after SIGINT


def follow(config: RunConfig, clock: Clock | None = None) -> dict[str, Any]:
    """Trains on `online.follow` until it is over; every process of the job calls it.

    Returns:
        What report.json holds: {"progressive": {task: {metric: value}} over all that was predicted, "sliding": ...,
        "windows", "rows", "notes", "bad", "alarms": counts, "validation" and "test" of the last checkpoint, ...}.

    Raises:
        SystemExit: after SIGTERM (status 143) or SIGINT (130), when everything is saved.
        HmoeError: see `hmoe_rec.training.trainer.train`; a source that does not answer; too many alarms in a row; too
            much that cannot be learned from (online.max_bad_share).
    """
    began = time.perf_counter()
    with process_group(device_of(config)) as process:
        choose_threads(config, process)
        data = prepare_data(config, progress=process.rank == 0)
        config = _with_statistics(config, data, process)
        if data.train:
            config = with_exposure_weights(with_pooling(config, data, process), data, process)
        return Follower(config, data, process, began, clock or Clock()).run()


class Follower(Trainer):
    """A trainer whose examples never end."""

    def __init__(self, config: RunConfig, data: ResolvedData, process: Process, began: float, clock: Clock) -> None:
        self.online, self.clock = config.online, clock
        super().__init__(config, data, process, began)
        self.epoch_metrics = self._new_metrics()  # of the whole life
        self.sliding = SlidingMetrics(self.tasks, windows=self.online.sliding_windows, num_bins=WINDOW_BINS)
        self.seen = SeenIds(config.features, max_bits=self.online.sketch_bits)
        self.progress |= {"windows": 0, "alarms": {}, "alarms_in_a_row": 0, "stream": self.stream.position()}
        self.progress |= {"bad": 0, "recent": []}  # recent: (messages or row groups, bad ones among them) by window
        self.letters = DeadLetters(self.online.dead_letters or io.join(self.run_dir, "dead_letters.jsonl"))
        self._unsaved = 0  # windows
        self._saved_at = clock.now()
        self._exit_status = 0

    def run(self) -> dict[str, Any]:
        before = signal.signal(signal.SIGINT, self._on_sigint)
        try:
            return super().run()
        finally:
            signal.signal(signal.SIGINT, before)

    def _open_data(self) -> int:
        online, self.train_name = self.online, "train"
        assert online.follow is not None, "follow() is for runs with online.follow"
        self.stream = open_stream(self.config, self.data, self.clock)
        self.feed = WindowFeed(
            self.stream,
            self._reader,
            self.process,
            ahead=online.windows_ahead,
            poll_seconds=online.poll_seconds,
            until_idle=online.until_idle,
            patience_seconds=online.patience_seconds,
            clock=self.clock,
            stop=lambda: self._exit_status,
        )
        return 0

    def _reader(self, source: ParquetSource, rank: int, world_size: int) -> BatchReader:
        return window_reader(self.config, source, rank, world_size)

    # ------------------------------------------------------------------------------------------------------ the run

    def _train(self, log: RunLog) -> None:
        self.sharded.train()
        for fed in self.feed.windows():
            if fed is None:
                if self._unsaved:
                    self._save([])
                continue
            for note in fed.window.notes:
                log.event(self.step, note.kind, f"{note.unit}: {note.detail}")
            if fed.batches:
                self._learn(log, fed)
            self._bury(fed.window)
            self._move_on(fed.window)
            self._check_share(fed.window)
            if self._is_save_due():
                self._save([])
            self._publish(ends=False)
            if self._has_enough():
                break
        self._publish(ends=True)
        if self._unsaved or self.checkpoints.latest() is None:
            self._save([])
        if self.feed.status:
            log.say(f"stopped at step {self.step}: everything is saved; go on with --resume")
            raise SystemExit(self.feed.status)

    def _learn(self, log: RunLog, fed: Fed) -> None:
        """Test, then train."""
        began = time.perf_counter()
        metrics, before = self._new_metrics(), self.sliding.compute()
        self._average()
        score(self.loop.evaluation_model(), fed.batches, metrics, self.process.device)
        self.loop.after_evaluation()
        results, unseen = _known(metrics.compute()), self.seen.look(fed.batches)
        alarms = self._alarms(log, results, before, unseen)
        self.epoch_metrics.merge_(metrics)
        self.sliding.add(metrics)
        self.seen.keep()
        rate = self._fit(fed.batches)
        seconds = time.perf_counter() - began
        losses, means, extras = self.window.read(self.last_losses_T)
        self.window.start()
        by_task = {name: dict(zip(self.tasks, values, strict=True)) for name, values in means.items()}
        line = {
            "step": self.step,
            "window": self.progress["windows"] + 1,
            "rows": fed.window.rows,
            "slices": [[s.unit, s.first, s.last, s.rows] for s in fed.window.slices],
            "parts": [s.parts for s in fed.window.slices],
            "losses": dict(zip(self.tasks, losses, strict=True)),
            **by_task,
            **extras,
            "learning_rate": rate,
            "examples_per_second": fed.window.rows / max(seconds, 1e-9),
            "seconds_waited": fed.waited,
            "test": results,
            "sliding": _known(self.sliding.compute()),
            "unseen": unseen,
            "bad": len(fed.window.bad),
            "alarms": [str(alarm) for alarm in alarms],
            "lag": vars(fed.lag) if fed.lag else {},
            **({} if self.managed is None else self.managed.window()),
        }
        log.window(line)
        self._watch(log)

    def _fit(self, batches: Sequence[Batch]) -> float:
        """One pass over the batches. -> the dense learning rate."""
        feed, rate = iter([batch.filled() for batch in batches]), 0.0
        for number, batch in enumerate(batches, start=1):
            rate = self.optimizers.set_learning_rates(self.step)
            output = self.loop.progress(feed)
            self._count_step()
            self._sources.append((self.step, batch.files))
            self.window.add(output)
            if self.reads_every_loss or number == len(batches):  # what a window has spoiled is not saved
                self._check_finite(output)
            self.last_losses_T = output.losses_T
        self.loop.rewind()
        return rate

    def _move_on(self, window: Window) -> None:
        self.stream.done(window)
        self.progress["windows"] += 1
        self._unsaved += 1

    def _bury(self, window: Window) -> None:
        """What nobody can learn from goes to the dead letters, before the position moves over it.

        Raises:
            DataError: on every process, they cannot be written for `patience_seconds`.
        """
        if not window.bad:
            return
        began = self.clock.now()
        while error := self.feed.first_says(self._write_letters(window) if self.process.rank == 0 else ""):
            if self.feed.first_says(self.clock.now() - began) >= self.online.patience_seconds:
                raise DataError(
                    f"{self.letters.uri}: dead letters cannot be written: {error}; mend that, or name another file in "
                    "online.dead_letters, then go on with --resume: what was not saved yet is read again"
                )
            self.clock.sleep(RETRY_SECONDS)
        self.progress["bad"] += len(window.bad)

    def _write_letters(self, window: Window) -> str:
        """-> what went wrong; "": nothing."""
        now = self.clock.now()
        try:
            bodies = [None if note.where is None else self.stream.body_of(note.where) for note in window.bad]
            notes = zip(window.bad, bodies, strict=True)
            self.letters.add(Letter(note.id, note.kind, note.detail, now, body) for note, body in notes)
        except (OSError, HmoeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _check_share(self, window: Window) -> None:
        """Stops a stream that is mostly garbage, with all saved; who resumes it has it counted from the beginning."""
        recent = [*self.progress["recent"], [window.units, len(window.bad)]]
        while sum(units for units, _ in recent[1:]) >= RECENT_UNITS:
            del recent[0]
        self.progress["recent"] = recent
        units, bad = (sum(numbers) for numbers in zip(*recent, strict=True))
        if not window.bad or bad < FEWEST_BAD or bad <= self.online.max_bad_share * units:
            return
        self.progress["recent"] = []
        self._save([])
        raise TrainingError(
            f"{self.stream.source}: {bad} of the last {units} messages or row groups cannot be learned from "
            f"({bad / units:.1%}; online.max_bad_share is {self.online.max_bad_share:.1%}), the last one "
            f"{window.bad[-1].id}: {window.bad[-1].detail}. They are in {self.letters.uri}; all the others are learned "
            "and saved. Mend what writes them, or raise online.max_bad_share, then go on with --resume"
        )

    def _alarms(self, log: RunLog, results: Results, before: Results, unseen: dict[str, float]) -> list[Alarm]:
        """Rings them; too many windows in a row raise before this one is trained on."""
        rule = self.online.alarms
        if self.progress["windows"] < rule.grace_windows:
            return []
        limits = Limits(rule.calibration, rule.label_rate, rule.unseen_ids, rule.min_positives)
        alarms = alarms_of(results, before, unseen, limits)
        for alarm in alarms:
            log.event(self.step, "alarm", f"window {self.progress['windows'] + 1}: {alarm}")
        in_a_row = self.progress["alarms_in_a_row"] + 1 if alarms else 0
        if rule.stop_after is not None and in_a_row >= rule.stop_after:
            if self._unsaved:
                self._save([])
            raise TrainingError(
                f"{in_a_row} window(s) in a row with an alarm, the last one before training on it: "
                f"{'; '.join(map(str, alarms))}. Everything before it is saved; mend the data or raise the limits "
                "(online.alarms), then go on with --resume"
            )
        self.progress["alarms_in_a_row"] = in_a_row
        counts = Counter(self.progress["alarms"]) + Counter(alarm.kind for alarm in alarms)
        self.progress["alarms"] = dict(counts)
        return alarms

    def _has_enough(self) -> bool:
        limit = self.config.train.max_steps
        return limit is not None and self.step >= limit

    def _new_metrics(self) -> TaskMetrics:
        return TaskMetrics(self.tasks, num_bins=WINDOW_BINS, gauc=False, device=self.process.device)

    # ---------------------------------------------------------------------------------------------- saving and resuming

    def _is_save_due(self) -> bool:
        waited = self.feed.first_says(self.clock.now() - self._saved_at)
        return self._unsaved >= self.online.checkpoint_windows or waited >= self.online.checkpoint_seconds

    def _save(self, tags: list[str]) -> None:
        self.progress["stream"] = self.stream.position()
        super()._save(tags)
        self._unsaved, self._saved_at = 0, self.clock.now()

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "sliding": self.sliding.state_dict(), "seen": self.seen.state_dict()}

    def _position(self) -> dict[str, Any]:
        """What the stream's position depends on; batch size and number of processes may change between windows."""
        return {"online.order": self.online.order, "kind of online.follow": self.stream.kind}

    def _resume(self) -> Checkpoint | None:
        found = super()._resume()
        if found is not None:
            self.stream.restore(self.progress["stream"])
        return found

    def _begin(self) -> None:
        """With model and optimizer of another run, if one is named; its position and its metrics stay behind."""
        fill_frozen_vectors(self.sharded, self.config)
        run_dir = self.online.start_from
        if run_dir is None:
            begin_at(self.sharded, loss_offsets(self.config))
            return
        run = open_run(run_dir, read_run_config(run_dir))
        checkpoint = find_checkpoint(run, self.online.start_checkpoint)
        check_same_meaning(checkpoint, self.config)
        state = {**state_of(self.sharded), "optimizer": self.optimizers.combined.state_dict()}
        run.checkpoints.load_into(state, checkpoint)
        load_state(self.sharded, state)
        undo_in(self.sharded, checkpoint)
        self.progress[BEGAN_WITH] = history_of(run_dir, checkpoint.step, checkpoint.meta)
        self.optimizers.combined.load_state_dict(state["optimizer"])

    # ---------------------------------------------------------------------------------------------------------- the end

    def _on_sigterm(self, *_: object) -> None:
        self._exit_status = PREEMPTED

    def _on_sigint(self, *_: object) -> None:
        if self._exit_status:
            raise KeyboardInterrupt  # the second time it is meant at once
        self._exit_status = INTERRUPTED

    def _length(self) -> str:
        return f"follows {self.online.follow} in batches"

    def _remarks(self) -> Iterable[str | None]:
        before, now = self.stream.restored_from, self.stream.source
        if before is not None and before != now:
            yield (
                f"online.follow is {now}; the position of this run was saved in {before}. What was done there is not "
                "read here again, by its names: right for the same source at another address. For another source "
                "begin a run with online.start_from"
            )
        yield from exposure_lines(self.config)
        yield from probability_lines(self.config)

    def _report(self, log: RunLog) -> dict[str, Any]:
        report: dict[str, Any] = {
            "best_step": self.step,
            "steps": self.step,
            "windows": self.progress["windows"],
            "rows": self.stream.rows,
            "notes": dict(self.stream.counts),
            "bad": self.progress["bad"],
            "dead_letters": self.letters.uri if self.progress["bad"] else None,
            "alarms": self.progress["alarms"],
            "progressive": _known(self.epoch_metrics.compute()),
            "sliding": _known(self.sliding.compute()),
        }
        for split, reader in self.evaluated.items():
            report[split] = evaluate_batches(self.loop.evaluation_model(), reader, self.tasks, self.process)
            self.loop.after_evaluation()
        report["reference"] = dict(self.data.truth or {})
        report["seconds"] = time.perf_counter() - self.began
        if self.process.rank == 0:
            text = json.dumps(json_safe(report), indent=1, allow_nan=False)
            io.write_text(io.join(self.run_dir, "report.json"), text)
        return report


def history_of(run_dir: str, step: int, meta: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON: what it takes to read again what a run had learned from at a step, with the run before it.

    Args:
        meta: of the checkpoint.
    """
    progress = meta.get("progress", {})
    stream = progress.get("stream")
    return {
        "run_dir": run_dir,
        "step": step,
        "position": meta.get("position", {}),
        "rows of the stream": None if stream is None else stream["rows"],
        BEGAN_WITH: progress.get(BEGAN_WITH),
    }


def window_reader(config: RunConfig, source: ParquetSource, rank: int, world_size: int) -> BatchReader:
    """Rows in their order: a window may hold part of a file, and nothing of what follows may be learned before."""
    return BatchReader(
        source,
        global_batch_size=config.train.global_batch_size,
        rank=rank,
        world_size=world_size,
        shuffle=False,
        num_workers=config.data.num_workers,
        exposures=config.train.exposure.column,
    )


def is_broker(uri: str) -> bool:
    """Whether `online.follow` names a stream of messages; else it is a directory."""
    return uri.startswith(("redis://", "rediss://"))


def open_stream(config: RunConfig, data: ResolvedData, clock: Clock) -> Stream:
    """What `online.follow` names.

    Raises:
        ConfigError: a URI that no source takes.
    """
    online = config.online
    assert online.follow is not None
    rule = WindowRule(online.window_rows, online.window_files, online.window_seconds)
    exposures = config.train.exposure.column
    more = () if exposures is None else (exposures,)
    if is_broker(online.follow):
        from hmoe_rec.data.redis_stream import RedisStream

        return RedisStream(online.follow, data.schema, rule=rule, clock=clock, more_columns=more)
    from hmoe_rec.data.file_stream import FileStream

    return FileStream(
        online.follow,
        data.schema,
        rule=rule,
        order=online.order,
        late=online.late,
        lateness=online.lateness,
        patience_seconds=online.patience_seconds,
        clock=clock,
        more_columns=more,
    )


def _known(results: Results) -> Results:
    """Without GAUC, which a stream has no memory for."""
    return {task: {k: v for k, v in values.items() if "gauc" not in k} for task, values in results.items()}


def _with_statistics(config: RunConfig, data: ResolvedData, process: Process) -> RunConfig:
    """Statistics of numbers, where encoders need them: the run's own, those of the run it begins with, or fitted."""
    missing = numbers_to_fit(config)
    resumed = config.train.resume and io.exists(io.join(config.train.run_dir, "config.yaml"))
    if missing and config.online.start_from is not None and not resumed:
        statistics = read_run_config(config.online.start_from).data.statistics
        config = config.model_copy(update={"data": config.data.model_copy(update={"statistics": statistics})})
        missing = numbers_to_fit(config)
    if missing and not data.train and not resumed:
        raise ConfigError(
            f"data.statistics: the encoders of {', '.join(missing)} need statistics before the first row; give "
            "data.train to fit them on, what `hmoe-rec data fit` wrote (data.statistics), or online.start_from"
        )
    return with_statistics(config, data, process)
