"""What a GPU would have refused or waited for, counted by phase, kind, operator and place in the code."""

import sys
from collections import Counter
from dataclasses import dataclass

PACKAGE = "hmoe_rec"
LIBRARIES = ("torchrec", "fbgemm_gpu")
#: Kinds that are wrong wherever they are.
WRONG = ("MIX", "GENERATOR")
#: Kinds in which the host stands still until the device has come to it.
WAITS = ("SYNC", "D2H", "H2D*")


@dataclass(frozen=True)
class Event:
    """One kind of thing at one place.

    Attributes:
        kind: MIX (operands on several devices), GENERATOR (of another device), SYNC (the host waits), D2H (a copy to
            the host), H2D* (a copy to the device that waits), H2D (one that does not).
        place: "file function" of the innermost line of the package, else of a library below it.
        line: its number, for people; it changes too often to be compared.
    """

    phase: str
    kind: str
    op: str
    place: str
    line: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.phase, self.kind, self.op, self.place


class Recorder:
    """Everything in its `with` block is seen. There is one at a time.

    Attributes:
        phase: what the run is doing, set from outside.
        steps: training steps so far in phase "step".
    """

    active: "Recorder | None" = None

    def __init__(self, *, refuse: bool = False) -> None:
        self.refuse, self.phase, self.steps = refuse, "", 0
        self.events: Counter[Event] = Counter()
        self.stream = ""

    def add(self, kind: str, op: str, times: int = 1) -> None:
        where, line = place()
        if self.stream:
            where += f" on {self.stream}"
        self.events[Event(self.phase, kind, op, where, line)] += times


def note(kind: str, op: str, times: int = 1) -> None:
    """To the active recorder, if there is one."""
    if Recorder.active is not None and times:
        Recorder.active.add(kind, op, times)


def place() -> tuple[str, int]:
    """("file function", line) of the innermost frame of the package; of TorchRec or FBGEMM where none is below them."""
    library = None
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if f"/{PACKAGE}/" in name:
            return f"{PACKAGE}/{name.rsplit(f'/{PACKAGE}/', 1)[1]} {frame.f_code.co_name}", frame.f_lineno
        for part in LIBRARIES:
            if library is None and f"/{part}/" in name:
                library = f"{part}/{name.rsplit(f'/{part}/', 1)[1]} {frame.f_code.co_name}", frame.f_lineno
        frame = frame.f_back
    return library or ("torch", 0)
