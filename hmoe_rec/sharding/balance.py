"""Loads of processes -> lower loads of the busiest: tables move, or change places, while memory allows it.

A placement that took the largest tables first leaves one process behind where memory decided. No torch in here.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXCHANGES = 300
GAIN = 1e-4  # of the highest load: less is no gain


@dataclass
class Group:
    """Tables that lie on one slot each: on a process, or on all processes of a machine.

    Attributes:
        tables: [M] their numbers.
        slots: [S, P] processes of each slot.
        slot: [M] where each table is; changed in place.
        ms: [M] what it adds to the load of every process of its slot.
        bytes: [M, kinds of memory], of every process of its slot.
    """

    tables: np.ndarray
    slots: np.ndarray
    slot: np.ndarray
    ms: np.ndarray
    bytes: np.ndarray


@dataclass(frozen=True)
class _Exchange:
    """Table `i` goes to `slot`; `other`, if any, to where it was. `load`: the higher of the two slots afterwards."""

    load: float
    group: Group
    i: int
    other: int | None
    slot: int


def balance(busy: np.ndarray, free: np.ndarray, groups: Sequence[Group], end: float) -> None:
    """Exchanges tables of the busiest process, the best exchange first, until none helps; in place.

    Args:
        busy: [W] load of each process.
        free: [kinds of memory, W] bytes that are left.
        end: of `time.perf_counter`, when to stop.
    """
    for _ in range(EXCHANGES):
        most = busy.max()
        found = [x for group in groups for x in _exchanges(busy, free, group) if x.load < most * (1 - GAIN)]
        if not found or time.perf_counter() > end:
            return
        best = min(found, key=lambda x: x.load)
        group, home = best.group, int(best.group.slot[best.i])
        _put(busy, free, group, best.i, best.slot)
        if best.other is not None:
            _put(busy, free, group, best.other, home)


def _exchanges(busy: np.ndarray, free: np.ndarray, group: Group):
    """The best move and the best change of places of each table on the busiest process."""
    mine = int(busy.argmax()) // group.slots.shape[1]
    load, room = busy[group.slots].max(axis=1), free[:, group.slots].min(axis=2).T  # [S], [S, kinds]
    others = np.flatnonzero(group.slot != mine)
    there = group.slot[others]
    for i in np.flatnonzero(group.slot == mine):
        after = np.maximum(load + group.ms[i], load[mine] - group.ms[i])
        after[(room < group.bytes[i]).any(axis=1)] = np.inf
        after[mine] = np.inf
        slot = int(after.argmin())
        yield _Exchange(float(after[slot]), group, int(i), None, slot)
        if len(others):
            less, fewer = group.ms[i] - group.ms[others], group.bytes[i] - group.bytes[others]
            after = np.maximum(load[there] + less, load[mine] - less)
            after[((room[there] < fewer) | (room[mine] < -fewer)).any(axis=1)] = np.inf
            k = int(after.argmin())
            yield _Exchange(float(after[k]), group, int(i), int(others[k]), int(there[k]))


def _put(busy: np.ndarray, free: np.ndarray, group: Group, i: int, slot: int) -> None:
    for sign, where in ((-1, group.slots[group.slot[i]]), (1, group.slots[slot])):
        busy[where] += sign * group.ms[i]
        free[:, where] -= sign * group.bytes[i][:, None]
    group.slot[i] = slot
