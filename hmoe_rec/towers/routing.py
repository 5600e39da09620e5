r"""Names of tasks -> the layout of a published architecture: who reads which set, and who trains which expert.

Single task, shared bottom, MMoE, PLE, multi-embedding, STEM, AME and STEM-AL are presets of one table, not classes:
`preset("stem", ["click", "like"])` gives a `Layout` whose routing prints as ::

           click_1  like_1  shared_1
    click     t       r        t
    like      r       t        t
    t = trains the expert   r = reads it, no gradient   . = cut off

What a cell promises: d loss_t / d tables of set m is other than 0 only if task t trains an expert that reads m, or m
feeds the gate of t. The stop-gradient acts on an expert's output; gates are never stopped; a gate and a tower belong to
one task.

Source: Pan et al., Ads Recommendation in a Collapsed and Entangled World, KDD 2024, arXiv 2403.00793 (overview figure,
AME, STEM-AL); Su et al., STEM, AAAI 2024, arXiv 2308.13537; Guo et al., On the Embedding Collapse when Scaling up
Recommendation Models, ICML 2024, arXiv 2310.04400 (multi-embedding); Ma et al., MMoE, KDD 2018; Tang et al., PLE,
RecSys 2020.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any, Literal

from hmoe_rec.suggest import unknown
from hmoe_rec.towers.layout import Cell, Combine, ExpertSpec, GateCombine, GateInput, Layout, Routing, validate
from hmoe_rec.types import ConfigError, EmbeddingSet

__all__ = [
    "Cell",
    "Combine",
    "ExpertSpec",
    "GateCombine",
    "GateInput",
    "Layout",
    "PRESETS",
    "Routing",
    "preset",
    "preset_options",
    "validate",
]

Kind = Mapping[str, Any]  # {"kind": "dcnv2", "num_layers": 2}
SHARED = "shared"


def _single(tasks: Sequence[str], kinds: Sequence[Kind], *, embedding_dim: int = 16) -> Layout:
    """A separate model per task, side by side: a set of its own, one expert (one of each kind), nothing shared."""
    sets = [EmbeddingSet(t, embedding_dim, owner=t) for t in tasks]
    owners = [t for t in tasks for _ in kinds]
    rows = [["train" if owner == t else "none" for owner in owners] for t in tasks]
    return _layout(tasks, sets, _owned(owners, kinds), rows, [GateInput((t,)) for t in tasks])


def _shared_bottom(tasks: Sequence[str], kinds: Sequence[Kind], *, embedding_dim: int = 16) -> Layout:
    """One set, one expert, a tower per task; no gate."""
    return _mmoe(tasks, kinds, embedding_dim=embedding_dim, num_experts=1)


def _mmoe(
    tasks: Sequence[str], kinds: Sequence[Kind], *, embedding_dim: int = 16, num_experts: int | None = None
) -> Layout:
    """One set, `num_experts` experts (4, or as many as there are kinds), a gate per task."""
    count = max(4, len(kinds)) if num_experts is None else num_experts
    experts = _owned([SHARED] * count, kinds)
    sets = [EmbeddingSet(SHARED, embedding_dim)]
    return _layout(tasks, sets, experts, [["train"] * count for _ in tasks], [GateInput((SHARED,))] * len(tasks))


def _ple(
    tasks: Sequence[str],
    kinds: Sequence[Kind],
    *,
    embedding_dim: int = 16,
    task_experts: int | None = None,
    shared_experts: int | None = None,
) -> Layout:
    """PLE with one layer (CGC): one set, `task_experts` experts a task (one of each kind), none of which another task
    reads, and `shared_experts` shared ones (2, or one of each kind)."""
    owners = _owners(tasks, task_experts or len(kinds))
    owners += [SHARED] * (max(2, len(kinds)) if shared_experts is None else shared_experts)
    experts = [replace(e, set=SHARED) for e in _owned(owners, kinds)]
    rows = [["train" if owner in (t, SHARED) else "none" for owner in owners] for t in tasks]
    return _layout(tasks, [EmbeddingSet(SHARED, embedding_dim)], experts, rows, [GateInput((SHARED,))] * len(tasks))


def _multi_embedding(
    tasks: Sequence[str],
    kinds: Sequence[Kind],
    *,
    embedding_dim: int = 16,
    num_sets: int = 2,
    num_experts: int | None = None,
) -> Layout:
    """`num_sets` sets of one width, one expert a set (or `num_experts`, dealt to the sets in turn); gates look at set1.

    One kind of expert and `combine="mean"` is the model of the multi-embedding paper; several kinds and gates is the
    HMoE of the overview figure, with a gate per task.
    """
    return _unowned(tasks, kinds, [embedding_dim] * num_sets, num_experts, dict.fromkeys(tasks, "set1"))


def _stem(
    tasks: Sequence[str],
    kinds: Sequence[Kind],
    *,
    embedding_dim: int = 16,
    task_experts: int | None = None,
    shared_experts: int | None = None,
) -> Layout:
    """A set per task and a shared one; a task reads the experts of others forward only. Gates see x_task + x_shared."""
    sets = [EmbeddingSet(t, embedding_dim, owner=t) for t in tasks] + [EmbeddingSet(SHARED, embedding_dim)]
    owners = _owners(tasks, task_experts or len(kinds)) + [SHARED] * (shared_experts or len(kinds))
    rows = [["train" if owner in (t, SHARED) else "read" for owner in owners] for t in tasks]
    return _layout(tasks, sets, _owned(owners, kinds), rows, [GateInput((t, SHARED), "sum") for t in tasks])


def _ame(
    tasks: Sequence[str],
    kinds: Sequence[Kind],
    *,
    embedding_dim: int = 16,
    widths: Sequence[int] | None = None,
    num_experts: int | None = None,
    gate_sets: Mapping[str, str] | None = None,
) -> Layout:
    """Sets of unequal `widths` (1, 2 and 4 times `embedding_dim`), without owner; every task trains every expert.

    `gate_sets` says which set feeds the gate of a task. By default the tasks are spread over the sets in order, the
    first task to set1 and the last to the last set: with growing widths, list the task with the fewest positives first.
    """
    widths = _ame_widths(embedding_dim) if widths is None else widths
    last_task, last_set = max(len(tasks) - 1, 1), len(widths) - 1
    by_position = {t: f"set{1 + round(i * last_set / last_task)}" for i, t in enumerate(tasks)}
    return _unowned(tasks, kinds, widths, num_experts, by_position | dict(gate_sets or {}))


def _stem_al(
    tasks: Sequence[str],
    kinds: Sequence[Kind],
    *,
    embedding_dim: int = 16,
    task_experts: int | None = None,
    shared_experts: int | None = None,
    main_task: str | None = None,
    aux_sets: Literal["shared", "per_aux"] = "shared",
) -> Layout:
    """The main task (the first unless named) trains its own set and the shared one, the others only the shared one.

    With `aux_sets="per_aux"` each auxiliary task has a set of its own instead, which the main task trains as well.
    """
    main = tasks[0] if main_task is None else main_task
    others = [SHARED] if aux_sets == "shared" else [t for t in tasks if t != main]
    home = {t: SHARED if aux_sets == "shared" else t for t in tasks}
    sets = [EmbeddingSet(main, embedding_dim, owner=main)]
    sets += [EmbeddingSet(name, embedding_dim, owner=None if name == SHARED else name) for name in others]
    owners = _owners([main], task_experts or len(kinds)) + _owners(others, shared_experts or len(kinds))
    rows = [["train" if t == main or owner == home[t] else "none" for owner in owners] for t in tasks]
    main_gate = GateInput((main, SHARED), "sum") if aux_sets == "shared" else GateInput((main,))
    gates = [main_gate if t == main else GateInput((home[t],)) for t in tasks]
    return _layout(tasks, sets, _owned(owners, kinds), rows, gates)


PRESETS: dict[str, Callable[..., Layout]] = {
    "single": _single,
    "shared_bottom": _shared_bottom,
    "mmoe": _mmoe,
    "ple": _ple,
    "multi_embedding": _multi_embedding,
    "stem": _stem,
    "ame": _ame,
    "stem_al": _stem_al,
}


def preset_options(name: str) -> tuple[str, ...]:
    """The options of a preset, besides `expert` and `combine`."""
    parameters = inspect.signature(PRESETS[name]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def preset(
    name: str,
    tasks: Sequence[str],
    *,
    expert: Kind | Sequence[Kind] = ({"kind": "flat_dnn"},),
    combine: Combine = "gate",
    **options: Any,
) -> Layout:
    """The layout of a published architecture.

    Sets are called `shared`, after their task, or `set1`, `set2`, ...; experts after their owner or set, with a number:
    `click_1`. The result is plain data: change it with `dataclasses.replace`, check it with `validate`.

    Args:
        name: single, shared_bottom, mmoe, ple, multi_embedding, stem, ame or stem_al.
        tasks: names of the tasks, in the order of the labels.
        expert: `{"kind": ..., option: ...}`, or several of them (heterogeneous experts), dealt in turn: to the experts
            of each owner, or, where sets have no owner, to the sets.
        combine: how a task mixes its experts.
        options: those of the preset's function in `PRESETS`: `embedding_dim`, `num_sets`, `num_experts`,
            `task_experts`, `shared_experts`, `widths`, `gate_sets`, `main_task`, `aux_sets`.

    Raises:
        ConfigError: unknown preset, option, task or set; no task; no kind of expert; a size below 1.
    """
    kinds = [expert] if isinstance(expert, Mapping) else list(expert)
    problems = _problems(name, tasks, kinds, options)
    if problems:
        raise ConfigError("\n".join(problems))
    layout = PRESETS[name](tuple(tasks), kinds, **options)
    return replace(layout, routing=replace(layout.routing, combine=combine))


def _problems(name: str, tasks: Sequence[str], kinds: Sequence[Kind], options: Mapping[str, Any]) -> list[str]:
    """All that is wrong with the arguments of `preset`; what is wrong with its result is `validate`'s to say."""
    if name not in PRESETS:
        return [f"preset: {unknown('preset', name, PRESETS)}"]
    problems = [] if tasks else ["tasks: none given; a model needs at least one"]
    problems += [] if kinds else ["expert: none given; expected {kind: ...} or a list of them"]
    problems += [
        f"expert: {dict(kind)} given; expected {{kind: ..., option: ...}}" for kind in kinds if "kind" not in kind
    ]
    if name == "shared_bottom" and len(kinds) > 1:
        problems.append(f"expert: {len(kinds)} kinds given; shared_bottom has one expert (mmoe has several)")
    if name in ("ple", "stem", "stem_al") and SHARED in tasks:
        problems.append(f"tasks: '{SHARED}' is what preset {name} calls what all tasks share; rename the task")
    allowed = preset_options(name)
    for option, value in options.items():
        if option not in allowed:
            problems.append(f"{option}: preset {name} does not have it; {unknown('option', option, allowed)}")
        else:
            problems += [f"{option}{problem}" for problem in _option_problems(name, tasks, option, value)]
    num_sets = options.get("num_sets", 2) if name == "multi_embedding" else len(options.get("widths") or _ame_widths())
    num_experts = options.get("num_experts")
    if name in ("multi_embedding", "ame") and num_experts is not None and 1 <= num_experts < num_sets:
        problems.append(f"num_experts: {num_experts} given for {num_sets} sets; expected at least one expert per set")
    return problems


def _option_problems(name: str, tasks: Sequence[str], option: str, value: Any) -> list[str]:
    least = 0 if (name, option) == ("ple", "shared_experts") else 1
    if isinstance(value, int):
        return [f": {value} given; expected at least {least}"] if value < least else []
    if option == "widths" and value is not None and (not value or min(value) < 1):
        return [f": {list(value)} given; expected one width, at least 1, per embedding set"]
    if option == "main_task" and value is not None and value not in tasks:
        return [f": {unknown('task', value, tasks)}"]
    if option == "aux_sets" and value not in ("shared", "per_aux"):
        return [f": '{value}' given; expected shared or per_aux"]
    if option == "gate_sets":
        return [f".{task}: {unknown('task', task, tasks)}" for task in value or () if task not in tasks]
    return []


def _ame_widths(embedding_dim: int = 16) -> tuple[int, ...]:
    return embedding_dim, 2 * embedding_dim, 4 * embedding_dim


def _owners(names: Sequence[str], count: int) -> list[str]:
    return [name for name in names for _ in range(count)]


def _owned(owners: Sequence[str], kinds: Sequence[Kind]) -> list[ExpertSpec]:
    """One expert per entry, reading its owner's set; the kinds are dealt anew to each owner."""
    dealt = {owner: cycle(kinds) for owner in owners}
    return _named((owner, next(dealt[owner])) for owner in owners)


def _unowned(
    tasks: Sequence[str],
    kinds: Sequence[Kind],
    widths: Sequence[int],
    num_experts: int | None,
    gate_sets: Mapping[str, str],
) -> Layout:
    """Sets without owner. Expert k has kind k and reads set k, both in turn, so that every set has a reader."""
    sets = [EmbeddingSet(f"set{i}", width) for i, width in enumerate(widths, start=1)]
    count = max(len(sets), len(kinds)) if num_experts is None else num_experts
    readers = sorted((k % len(sets), k) for k in range(count))
    experts = _named((sets[i].name, kinds[k % len(kinds)]) for i, k in readers)
    rows = [["train"] * count for _ in tasks]
    return _layout(tasks, sets, experts, rows, [GateInput((gate_sets[t],)) for t in tasks])


def _named(places: Iterable[tuple[str, Kind]]) -> list[ExpertSpec]:
    """(set, kind) of every expert, in order -> experts called `<set>_<k>`."""
    counts: dict[str, int] = {}
    experts = []
    for name, kind in places:
        counts[name] = counts.get(name, 0) + 1
        options = {key: value for key, value in kind.items() if key != "kind"}
        experts.append(ExpertSpec(f"{name}_{counts[name]}", kind["kind"], name, options))
    return experts


def _layout(
    tasks: Sequence[str],
    sets: Sequence[EmbeddingSet],
    experts: Sequence[ExpertSpec],
    rows: Sequence[Sequence[Any]],
    gate_inputs: Sequence[GateInput],
) -> Layout:
    cells = tuple(map(tuple, rows))
    routing = Routing(tuple(tasks), tuple(e.name for e in experts), cells, tuple(gate_inputs))
    return Layout(tuple(sets), tuple(experts), routing)
