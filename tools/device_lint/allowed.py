"""The stored table of waits: what is allowed to hold up the host, where, and how often in a step.

A wait is its phase, kind, operator and place (file and function, no line, so that moving code changes nothing). The
figure is the most that any variant does per step; an evaluation's waits are listed without one.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from phases import HOT
from recorder import WAITS, Event, Recorder

TABLE = Path(__file__).with_name("allowed.json")
Key = tuple[str, str, str, str]


def waits_of(recorder: Recorder) -> dict[Key, tuple[float, Event]]:
    """Waits in hot phases -> how often per step, and one event of it."""
    counts: dict[Key, float] = defaultdict(float)
    seen: dict[Key, Event] = {}
    for event, times in recorder.events.items():
        if event.phase in HOT and event.kind in WAITS:
            counts[event.key] += times
            seen[event.key] = event
    steps = max(1, recorder.steps)
    return {key: (count / steps if key[0] == "step" else 0, seen[key]) for key, count in counts.items()}


def read() -> dict[Key, float]:
    rows = json.loads(TABLE.read_text()) if TABLE.exists() else []
    return {(r["phase"], r["kind"], r["op"], r["place"]): r["most"] for r in rows}


def write(most: dict[Key, float]) -> None:
    rows = [
        {"phase": phase, "kind": kind, "op": op, "place": place, "most": math.ceil(n)}
        for (phase, kind, op, place), n in sorted(most.items())
    ]
    TABLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def offences(found: Iterable[tuple[float, Event]], allowed: dict[Key, float]) -> list[str]:
    """What the table does not list, or lists as rarer, in words."""
    lines = []
    for n, event in found:
        most = allowed.get(event.key)
        if most is None or n > most:
            listed = "not listed" if most is None else f"{n:g} a step, at most {most} listed"
            lines.append(f"{event.kind} {event.op} in {event.phase} @ {event.place}:{event.line} ({listed})")
    return lines
