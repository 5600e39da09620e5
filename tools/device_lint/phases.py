"""What a run is doing while something happens: from the trainer's methods to the recorder's phase."""

import functools
from collections.abc import Callable
from typing import Any

from recorder import Recorder

from hmoe_rec.training.trainer import Trainer

#: Steps that fill the pipeline and make what is made once.
FIRST_STEPS = 3
PHASES = {
    "_log_step": "log line",
    "_evaluate": "evaluate",
    "_save": "save",
    "_publish": "publish",
    "_watch": "monitor",
    "_report": "report",
    "_average": "average",
    "_begin": "build",
    "_resume": "resume",
}
#: Phases in which a wait costs every step, or every batch of an evaluation, and must be listed.
HOT = ("step", "evaluate")


def watch() -> None:
    """Every Trainer made from here on tells the active recorder what it does."""
    for name, phase in PHASES.items():
        setattr(Trainer, name, _in_phase(getattr(Trainer, name), phase))
    Trainer._train = _counting(Trainer._train)  # type: ignore[method-assign]


def _recorder() -> Recorder:
    assert Recorder.active is not None, "a Trainer ran outside of the recorder"
    return Recorder.active


def _in_phase(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        recorder, before = _recorder(), _recorder().phase
        recorder.phase = before if before in ("evaluate", "report") and phase != "save" else phase
        try:
            return function(self, *args, **kwargs)
        finally:
            recorder.phase = before

    return call


def _counting(train: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train)
    def call(self: Trainer, log: Any) -> Any:
        progress, done = self.loop.progress, [0]

        def counted(batches: Any) -> Any:
            recorder = _recorder()
            done[0] += 1
            recorder.phase = "first steps" if done[0] <= FIRST_STEPS else "step"
            recorder.steps += done[0] > FIRST_STEPS
            return progress(batches)

        self.loop.progress = counted  # type: ignore[method-assign]
        try:
            return train(self, log)
        finally:
            _recorder().phase = ""

    return call
