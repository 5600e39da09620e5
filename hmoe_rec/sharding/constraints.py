"""What a person demands of a plan, by table, set or field -> one rule per table, or every mistake at once.

No torch in here: run files are read with it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Protocol

from hmoe_rec.sharding.topology import Cluster
from hmoe_rec.suggest import did_you_mean, listing, unknown
from hmoe_rec.types import PlanError

REPLICATED = "data_parallel"  # every process holds the table whole
SHARDED_TYPES = ("table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard")
POOLED_TYPES = (*SHARDED_TYPES, REPLICATED)
UNPOOLED_TYPES = (*SHARDED_TYPES[:3], REPLICATED)
HOST_TYPES = ("table_row_wise", "table_column_wise", "grid_shard")  # bound to the borders of machines
FUSED, UVM, CACHING = "fused", "fused_uvm", "fused_uvm_caching"
KERNELS = (FUSED, UVM, CACHING)
DENSE = "dense"  # of replicated tables only
SEPARATOR = "__"  # of set and field, as in embedding/tables.py, which needs torch


class Sized(Protocol):
    """What is read of a table here."""

    @property
    def name(self) -> str: ...
    @property
    def table_bytes(self) -> int: ...


@dataclass(frozen=True)
class Constraint:
    """Demands on the tables that a pattern matches; empty or None = no demand.

    Attributes:
        types: sharding types to choose from.
        kernels: of tables that are not replicated: fused (table in the device's memory), fused_uvm (in the machine's),
            fused_uvm_caching (in the machine's, with a cache on the device).
        min_partition: narrowest block of columns; 16 if None.
        cache_load_factor: share of the table's rows that fused_uvm_caching caches, in (0, 1]; TorchRec's 0.2 if None.
        pooling_factor: mean number of ids of an example in one feature.
        ranks, hosts: processes, or machines, that may hold a part; both given = those in both.
    """

    types: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    min_partition: int | None = None
    cache_load_factor: float | None = None
    pooling_factor: float | None = None
    ranks: tuple[int, ...] = ()
    hosts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Constraints:
    """All demands on a plan.

    A pattern is a table (`set__field`), a set, a field, or a pattern with `*` and `?` over table names.

    Attributes:
        tables: pattern -> demands; of two patterns that set the same key of a table the later one counts.
        together: groups of patterns; all tables of a group go to one machine (to one process, where there is one
            machine).
        apart: groups of patterns; the tables of different patterns share no machine (no process, where there is one
            machine). Each pattern gets a share of the machines that fits the bytes of its tables.
        pooling: table or field -> mean number of ids of an example, as measured from the data.
        distinct: table or field -> different ids over ids in a batch of all processes; only measured clusters
            (`Cluster.prices`) use it.
    """

    tables: Mapping[str, Constraint] = field(default_factory=dict)
    together: tuple[tuple[str, ...], ...] = ()
    apart: tuple[tuple[str, ...], ...] = ()
    pooling: Mapping[str, float] = field(default_factory=dict)
    distinct: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule(Constraint):
    """The demands on one table. `ranks` is complete: with hosts, together and apart worked in; () = all."""


def rules_of(constraints: Constraints, tables: Sequence[Sized], cluster: Cluster) -> dict[str, Rule]:
    """Table -> its rule.

    Raises:
        PlanError: with every unknown table, type or kernel, rank outside the cluster, and contradiction.
    """
    names = [t.name for t in tables]
    problems = [*_wrong_values(constraints, cluster), *_unknown_patterns(constraints, names)]
    rules = {name: Rule() for name in names}
    for pattern, given in constraints.tables.items():
        for name in matching(pattern, names):
            rules[name] = _merged(rules[name], given)
    if not problems:
        places = _places(constraints, tables, cluster)
        for name, rule in rules.items():
            sets = [set(rule.ranks)] if rule.ranks else []
            sets += [{r for h in rule.hosts for r in _ranks_of_host(h, cluster)}] if rule.hosts else []
            sets += [places[name]] if name in places else []
            allowed = set.intersection(*sets) if sets else set()
            if sets and not allowed:
                problems.append(f"table {name!r}: ranks, hosts, together and apart leave no process for it")
            rules[name] = replace(rule, ranks=() if len(allowed) == cluster.world_size else tuple(sorted(allowed)))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise PlanError("\n  ".join([f"sharding constraints: {count}", *dict.fromkeys(problems)]))
    return rules


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Tables that a pattern means: a table, a set, a field, or a pattern with wildcards."""
    return [n for n in names if pattern in (n, *n.split(SEPARATOR, 1)) or fnmatchcase(n, pattern)]


def _merged(rule: Rule, given: Constraint) -> Rule:
    return replace(rule, **{f.name: v for f in fields(given) if (v := getattr(given, f.name)) not in ((), None)})


def _unknown_patterns(constraints: Constraints, names: list[str]) -> list[str]:
    known = list(dict.fromkeys(part for name in names for part in (name, *name.split(SEPARATOR, 1))))
    given = [("constraints", p) for p in constraints.tables]
    given += [("together", p) for group in constraints.together for p in group]
    given += [("apart", p) for group in constraints.apart for p in group]
    return [
        f"{place}: {pattern!r} matches no table, set or field{did_you_mean(pattern, known)}; tables: {listing(names)}"
        for place, pattern in given
        if not matching(pattern, names)
    ]


def _wrong_values(constraints: Constraints, cluster: Cluster) -> list[str]:
    problems = []
    for pattern, given in constraints.tables.items():
        where = f"constraints.{pattern}"
        problems += [f"{where}.types: {unknown('type', t, POOLED_TYPES)}" for t in given.types if t not in POOLED_TYPES]
        problems += [f"{where}.kernels: {unknown('kernel', k, KERNELS)}" for k in given.kernels if k not in KERNELS]
        if cluster.device == "cpu" and given.kernels and not set(given.kernels) & {FUSED}:
            problems.append(f"{where}.kernels: {', '.join(given.kernels)} need a GPU; on CPU there is fused only")
        for key, count in (("ranks", cluster.world_size), ("hosts", cluster.nodes)):
            outside = [i for i in getattr(given, key) if not 0 <= i < count]
            if outside:
                problems.append(f"{where}.{key}: {outside[0]}, but this cluster has {key} 0 to {count - 1}")
    return problems


def _ranks_of_host(host: int, cluster: Cluster) -> range:
    return range(host * cluster.ranks_per_node, (host + 1) * cluster.ranks_per_node)


def _places(constraints: Constraints, tables: Sequence[Sized], cluster: Cluster) -> dict[str, set[int]]:
    """Table of a group of `together` or `apart` -> processes it may be on."""
    count = cluster.nodes if cluster.nodes > 1 else cluster.world_size
    size = {t.name: t.table_bytes for t in tables}

    def ranks(places: Iterable[int]) -> set[int]:
        return {r for p in places for r in (_ranks_of_host(p, cluster) if cluster.nodes > 1 else (p,))}

    result: dict[str, set[int]] = {}
    for group in constraints.apart:
        units = [matching(pattern, size) for pattern in group]
        if len(units) > count:
            what = "machines" if cluster.nodes > 1 else "processes"
            raise PlanError(f"sharding.apart: {len(units)} groups ({', '.join(group)}) but {count} {what}")
        begin = 0
        for members, share in zip(units, _shares([sum(map(size.__getitem__, m)) for m in units], count), strict=True):
            for name in members:
                mine = ranks(range(begin, begin + share))
                result[name] = result.get(name, mine) & mine
            begin += share
    load = [0] * count
    groups = [[n for pattern in group for n in matching(pattern, size)] for group in constraints.together]
    for members in sorted(groups, key=lambda m: -sum(map(size.__getitem__, m))):
        open_ranks = set.intersection(*(result.get(n, ranks(range(count))) for n in members))
        free = [p for p in range(count) if ranks([p]) & open_ranks]
        if not free:
            raise PlanError(f"sharding.together: {listing(members)} are in groups of `apart` that share no machine")
        place = min(free, key=load.__getitem__)
        load[place] += sum(map(size.__getitem__, members))
        for name in members:
            result[name] = result.get(name, ranks([place])) & ranks([place])
    return result


def _shares(weights: Sequence[int], count: int) -> list[int]:
    """`count` places dealt in proportion to the weights, one at least for each."""
    shares = [1] * len(weights)
    for _ in range(count - len(weights)):
        shares[max(range(len(weights)), key=lambda i: weights[i] / shares[i])] += 1
    return shares
