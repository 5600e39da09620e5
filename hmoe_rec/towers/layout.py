"""Embedding sets x experts x tasks: the table that carries the model, as plain data, and all that can be wrong with it.

What comes in: names and sizes, spelled out or from `hmoe_rec.towers.routing.preset`. What goes out: a frozen `Layout`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from hmoe_rec.suggest import unknown
from hmoe_rec.types import EmbeddingSet

Cell = Literal["none", "read", "train"]
Combine = Literal["gate", "mean", "sum", "weighted_sum", "concat"]
GateCombine = Literal["concat", "sum"]

_SYMBOLS: dict[Cell, str] = {"none": ".", "read": "r", "train": "t"}
_LEGEND = "t = trains the expert   r = reads it, no gradient   . = cut off"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class GateInput:
    """What the gate of a task looks at: the fields of these sets, side by side or added up (sets of one width)."""

    sets: tuple[str, ...]
    combine: GateCombine = "concat"


@dataclass(frozen=True)
class ExpertSpec:
    """An expert to build: its kind, the one set it reads, and the keyword arguments of its constructor."""

    name: str
    kind: str
    set: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Routing:
    """Who learns from what.

    Attributes:
        cells: [task][expert]; "train": with gradient, "read": forward only, "none": cut off.
        gate_inputs: one per task; a task that one expert reaches needs no gate and ignores its own.
        combine: how a task mixes its experts. "gate": softmax of the task's gate; "mean", "sum"; "weighted_sum": one
            learned scalar per expert, 1 at the start; "concat": side by side.
    """

    tasks: tuple[str, ...]
    experts: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    gate_inputs: tuple[GateInput, ...]
    combine: Combine = "gate"

    def cell(self, task: str, expert: str) -> Cell:
        return self.cells[self.tasks.index(task)][self.experts.index(expert)]

    def reachable(self, task: str) -> tuple[str, ...]:
        """Experts whose output reaches the task, with or without gradient."""
        row = self.cells[self.tasks.index(task)]
        return tuple(e for e, cell in zip(self.experts, row, strict=True) if cell != "none")

    def trained_by(self, task: str) -> tuple[str, ...]:
        """Experts that learn from the task."""
        row = self.cells[self.tasks.index(task)]
        return tuple(e for e, cell in zip(self.experts, row, strict=True) if cell == "train")

    def table(self) -> str:
        """The picture at the top of this file, one line per task."""
        left = max(map(len, self.tasks), default=0)
        widths = [max(len(name), 3) for name in self.experts]
        header = " " * left + "".join(f"  {name:^{w}}" for name, w in zip(self.experts, widths, strict=True))
        rows = [
            f"{task:<{left}}" + "".join(f"  {_SYMBOLS[cell]:^{w}}" for cell, w in zip(row, widths, strict=True))
            for task, row in zip(self.tasks, self.cells, strict=True)
        ]
        return "\n".join(line.rstrip() for line in [header, *rows]) + f"\n{_LEGEND}"


@dataclass(frozen=True)
class Layout:
    """Embedding sets, the experts that read them, and the routes from tasks to experts."""

    sets: tuple[EmbeddingSet, ...]
    experts: tuple[ExpertSpec, ...]
    routing: Routing


def validate(layout: Layout, tasks: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Everything that is wrong with a layout, one line each: `place: what was given; what is expected`.

    Args:
        tasks: the tasks that the data has labels for.
        fields: the fields that the data has.

    Returns:
        Problems in the order sets, experts, routes, gate inputs; empty if the layout is sound.
    """
    sizes = _size_problems(layout)
    return sizes or [
        *_set_problems(layout, fields),
        *_expert_problems(layout),
        *_route_problems(layout, tasks),
        *_gate_problems(layout),
    ]


def _size_problems(layout: Layout) -> list[str]:
    """A matrix that does not have a row per task and a column per expert: nothing else can be said about it."""
    routing = layout.routing
    problems = []
    if routing.experts != tuple(e.name for e in layout.experts):
        problems.append(f"routes: columns are {list(routing.experts)}; expected {[e.name for e in layout.experts]}")
    if len(routing.cells) != len(routing.tasks) or any(len(row) != len(routing.experts) for row in routing.cells):
        problems.append("routes: expected one row per task and one cell per expert")
    if len(routing.gate_inputs) != len(routing.tasks):
        problems.append(f"gate_inputs: {len(routing.gate_inputs)} given; expected one per task ({len(routing.tasks)})")
    return problems


def _set_problems(layout: Layout, fields: Sequence[str]) -> list[str]:
    names = [s.name for s in layout.sets]
    read = {e.set for e in layout.experts}
    problems = [f"sets.{name}: two sets have this name; every set needs its own" for name in _repeated(names)]
    tables: dict[str, str] = {}
    for s in layout.sets:
        place = f"sets.{s.name}"
        if not _NAME.fullmatch(s.name):
            problems.append(f"{place}: names of sets become names of tables; use letters, digits, '_' and '-' only")
        elif not _can_name_module(s.name):
            problems.append(f"{place}: this cannot be the name of a module; rename it")
        if s.dim < 1:
            problems.append(f"{place}.dim: {s.dim} given; expected at least 1")
        if s.name not in read:
            problems.append(f"{place}: no expert reads it; add an expert with 'set: {s.name}' or remove the set")
        problems += [f"{place}.fields: {unknown('field', f, fields)}" for f in s.fields if f not in fields]
        problems += [f"{place}.fields: '{f}' is listed twice" for f in _repeated(s.fields)]
        if s.owner is not None and s.owner not in layout.routing.tasks:
            problems.append(f"{place}.owner: {unknown('task', s.owner, layout.routing.tasks)}")
        for name in dict.fromkeys(s.fields or fields):
            table = f"{s.name}__{name}"
            if tables.setdefault(table, s.name) != s.name:
                problems.append(
                    f"{place}: its table '{table}' has the name of one of set '{tables[table]}'; rename a set"
                )
    return problems


def _expert_problems(layout: Layout) -> list[str]:
    names = [e.name for e in layout.experts]
    sets = [s.name for s in layout.sets]
    problems = [] if names else ["experts: none given; a model needs at least one"]
    problems += [f"experts.{name}: two experts have this name" for name in _repeated(names)]
    for e in layout.experts:
        if not _NAME.fullmatch(e.name):
            problems.append(f"experts.{e.name}: use letters, digits, '_' and '-' only")
        elif not _can_name_module(e.name):
            problems.append(f"experts.{e.name}: this cannot be the name of a module; rename it")
        if e.set not in sets:
            problems.append(f"experts.{e.name}.set: {unknown('set', e.set, sets)}")
    return problems


def _route_problems(layout: Layout, tasks: Sequence[str]) -> list[str]:
    routing = layout.routing
    problems = [f"routes.{t}: {unknown('task', t, tasks)}" for t in routing.tasks if t not in tasks]
    problems += [f"routes.{t}: missing; every task needs a row" for t in tasks if t not in routing.tasks]
    for task, row in zip(routing.tasks, routing.cells, strict=True):
        problems += [
            f"routes.{task}.{expert}: {unknown('cell', cell, get_args(Cell))}"
            for expert, cell in zip(routing.experts, row, strict=True)
            if cell not in _SYMBOLS
        ]
        if "train" not in row and routing.experts and task in tasks:
            problems.append(
                f"routes.{task}: trains no expert, so nothing below its tower learns; set one cell to train"
            )
    for k, expert in enumerate(routing.experts):
        if routing.cells and not any(row[k] == "train" for row in routing.cells):
            problems.append(f"routes: no task trains expert '{expert}'; set its cell to train in one row, or remove it")
    if routing.combine not in get_args(Combine):
        problems.append(f"combine: {unknown('combine', routing.combine, get_args(Combine))}")
    return problems


def _gate_problems(layout: Layout) -> list[str]:
    """Gate inputs must exist, and sets that are added up must have one width and the same fields."""
    sets = {s.name: s for s in layout.sets}
    problems = []
    for task, gate in zip(layout.routing.tasks, layout.routing.gate_inputs, strict=True):
        place = f"gate_inputs.{task}"
        problems += [f"{place}.sets: {unknown('set', name, sets)}" for name in gate.sets if name not in sets]
        if not gate.sets:
            problems.append(f"{place}.sets: none given; expected at least one of {', '.join(sets)}")
        known = [sets[name] for name in gate.sets if name in sets]
        if gate.combine not in get_args(GateCombine):
            problems.append(f"{place}.combine: {unknown('combine', gate.combine, get_args(GateCombine))}")
        if gate.combine == "sum" and len({(s.dim, frozenset(s.fields)) for s in known}) > 1:
            widths = ", ".join(f"{s.name} {s.dim}" for s in known)
            problems.append(
                f"{place}: a sum needs sets of one width and the same fields, got {widths}; use combine: concat"
            )
    return problems


def _can_name_module(name: str) -> bool:
    from hmoe_rec.layers import can_name_module  # imports torch

    return can_name_module(name)


def _repeated(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return list(dict.fromkeys(name for name in names if name in seen or seen.add(name)))
