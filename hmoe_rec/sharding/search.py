"""Tables, cluster, rules -> the fastest plan found: which way each table is sharded, and who holds its shards.

TorchRec's planner makes an object per shard and prices each of them, which takes minutes to hours where hundreds of
tables meet a thousand processes. Here a way is priced once per distinct table (options.py), a proposal picks a way for
every table, and placing it is a few numpy operations per table:

::

    proposals    which way each table takes, the most promising first (proposals.py)
    placement    row-wise shards and replicated tables are on all processes; the rest, the largest first, goes to the
                 process (or machine) with the least load that has room: largest by bytes, and, as another try, by
                 milliseconds
    finer cuts   where a table finds no room, it and some smaller ones go over to ways with smaller shards, more of them
                 each time, until all have a place
    exchange     tables of the busiest process move or change places with others (balance.py)
    improvement  of the best plan: the busiest process's most expensive tables try their other ways

The plan with the lowest time of the busiest process is kept (a collective for each sharding type of a collection
counts). The same input gives the same plan, unless time runs out.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hmoe_rec.sharding.balance import Group, balance
from hmoe_rec.sharding.constraints import REPLICATED, Rule
from hmoe_rec.sharding.options import Option, Table, Workload, fixed_ms, shared_ms, usable_bytes, ways
from hmoe_rec.sharding.prediction import Alternative
from hmoe_rec.sharding.proposals import Chosen, bound, bytes_of, proposals
from hmoe_rec.sharding.topology import Cluster

CUTS = 10  # rounds of finer cuts where a proposal finds no room
TRIES = 24  # of the improvement
EVERYWHERE = ("row_wise", REPLICATED)
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Space:
    """Everything a plan can be made of.

    Attributes:
        options: ways of each table that the planner may take.
        excluded: possible ways that it may not take, with the reason in `Option.excluded`.
        impossible: why other ways are none, for each table.
    """

    tables: list[Table]
    options: list[list[Option]]
    excluded: list[list[Option]]
    impossible: list[list[Alternative]]
    allowed: list[np.ndarray | None]  # processes that a rule allows; None = all


@dataclass(frozen=True)
class Found:
    """A plan in this module's terms.

    Attributes:
        ranks: of each table's shards, in the order of `Option.shards`.
        ms: of the busiest process.
        proposals: tried.
    """

    options: Chosen
    ranks: list[np.ndarray]
    ms: float
    proposals: int = 0
    timed_out: bool = False


@dataclass
class Failure:
    """Why the proposal that went furthest could not be placed."""

    table: Table | None = None
    option: Option | None = None
    placed: int = -1
    free: float = 0.0  # bytes on the process with the most room when it failed
    impossible: list[int] = field(default_factory=list)  # tables without any way


def make_space(tables: Sequence[Table], rules: Mapping[str, Rule], cluster: Cluster, work: Workload) -> Space:
    """Prices each way once for tables that differ in name only."""
    known: dict[tuple, tuple[list[Option], list[Alternative]]] = {}
    space = Space(list(tables), [], [], [], [])
    for table in tables:
        rule = rules[table.name]
        key = (table.kind, rule)
        if key not in known:
            known[key] = ways(table, rule, cluster, work)
        options, impossible = known[key]
        space.options.append([o for o in options if o.excluded is None])
        space.excluded.append([o for o in options if o.excluded is not None])
        space.impossible.append(impossible)
        space.allowed.append(np.array(rule.ranks) if rule.ranks else None)
    for module in dict.fromkeys(t.module for t in space.tables if not t.pooled):
        _one_width(space, module)
    return space


def _one_width(space: Space, module: str) -> None:
    """TorchRec cuts all column-wise tables of a collection of sequences into blocks of one width: one is kept.

    Of the numbers of blocks that most of the tables can have, the largest; all tables of such a collection are equally
    wide.
    """
    members = [i for i, t in enumerate(space.tables) if t.module == module]
    possible = [o.column_blocks for i in members for o in space.options[i] if o.sharding_type == "column_wise"]
    if not possible:
        return
    kept = max(possible, key=lambda count: (possible.count(count), count))
    for i in members:
        columns = [o for o in space.options[i] if o.sharding_type == "column_wise"]
        space.options[i] = [o for o in space.options[i] if o not in columns or o.column_blocks == kept]
        if columns and all(o.column_blocks != kept for o in columns):
            why = f"other tables of this collection have blocks of {space.tables[i].dim // kept} columns, as it must"
            space.impossible[i] = [*space.impossible[i], Alternative("column_wise", columns[0].kernel, None, None, why)]


def search(
    space: Space,
    cluster: Cluster,
    work: Workload,
    *,
    seconds: float = 120.0,
    progress: Progress | None = None,
    first: bool = False,
) -> Found | Failure:
    """The best plan found, or why there is none.

    Args:
        seconds: no new proposal is started afterwards, once there is a plan.
        progress: called with what is done and the share of the work that is behind, in [0, 1].
        first: stop at the first plan: to see whether there is one.
    """
    begin = time.perf_counter()
    failure = Failure(impossible=[i for i, options in enumerate(space.options) if not options])
    if failure.impossible:
        return failure
    placer = _Placer(space, cluster, work)
    proposed = proposals(space.options, cluster, work)
    best: Found | None = None
    tried, timed_out, end = 0, False, begin + seconds
    for number, chosen in enumerate(proposed):
        if best is not None and bound(chosen, cluster) >= best.ms:
            break  # they come in the order of their bounds
        timed_out = time.perf_counter() > end
        if timed_out and (best is not None or tried >= 4):
            break
        if progress is not None:
            progress(f"proposal {number + 1} of {len(proposed)}", 0.8 * number / len(proposed))
        for by in ("bytes", "ms"):
            tried += 1
            found = _placed(chosen, by, placer, failure)
            if found is not None and not first and (best is None or bound(found.options, cluster) < best.ms):
                found = _balanced(found, placer, end)
            best = _better(best, found)
        if first and best is not None:
            break
    if best is None:
        return failure
    if not first and not timed_out:
        best, more, timed_out = _improved(best, placer, end, progress)
        tried += more
    return replace(best, proposals=tried, timed_out=timed_out)


def _placed(chosen: Chosen, by: str, placer: "_Placer", failure: Failure) -> Found | None:
    """A placement; while there is none, the table that found no room and 0, 1, 3, 7, ... smaller ones are cut finer."""
    for cut in range(CUTS):
        found = placer.place(chosen, by, failure)
        if isinstance(found, Found):
            return found
        kind, size = chosen[found].sharding_type, placer.size(chosen[found])
        alike = [i for i, o in enumerate(chosen) if o.sharding_type == kind and placer.size(o) <= size and i != found]
        alike = [found, *sorted(alike, key=lambda i: -placer.size(chosen[i]))[: 2**cut - 1]]
        finer = {i: o for i in alike if (o := placer.finer(i, chosen[i])) is not None}
        if found not in finer:
            return None
        chosen = [finer.get(i, o) for i, o in enumerate(chosen)]
    return None


def _better(best: Found | None, found: Found | None) -> Found | None:
    if found is None or (best is not None and best.ms <= found.ms * (1 + 1e-9)):
        return best
    return found


def _improved(best: Found, placer: "_Placer", end: float, progress: Progress | None) -> tuple[Found, int, bool]:
    """The busiest process's most expensive tables try ways with smaller shards, the rest stays where it is."""
    tried, seen = 0, set()
    while tried < TRIES:
        load = placer.load(best)
        on_it = [i for i, ranks in enumerate(best.ranks) if len(ranks) < len(load) and load.argmax() in ranks]
        better = best
        for i in sorted(on_it, key=lambda i: -best.options[i].shard_ms)[:3]:
            for option in placer.space.options[i]:
                if option.shard_ms >= best.options[i].shard_ms or (i, id(option)) in seen or tried >= TRIES:
                    continue
                if time.perf_counter() > end:
                    return best, tried, True
                tried += 1
                seen.add((i, id(option)))
                found = placer.with_way(best, i, option)
                better = _better(better, found and _balanced(found, placer, end)) or better
            if progress is not None:
                progress(f"improvement {tried} of {TRIES}", 0.8 + 0.2 * tried / TRIES)
        if better is best:
            break
        best = better
    return best, tried, False


class _Placer:
    """Puts the shards of a proposal onto processes."""

    def __init__(self, space: Space, cluster: Cluster, work: Workload) -> None:
        self.space, self.cluster = space, cluster
        self.capacity = usable_bytes(cluster, work)
        self.memory = {id(o): bytes_of(o) for options in space.options for o in options}
        self.ms = {id(o): o.shard_ms for options in space.options for o in options}
        pairs = [(table, o) for table, options in zip(space.tables, space.options, strict=True) for o in options]
        self.shared: dict[int, float] = {}
        if cluster.prices is not None:
            self.shared = {id(o): float(shared_ms(table, o.sharding_type, cluster, work).sum()) for table, o in pairs}
        self.fixed: dict[tuple[str, bool], tuple[float, float]] = {}
        for kind, pooled in {(o.sharding_type, table.pooled) for table, o in pairs}:
            everyone, holders = fixed_ms(kind, pooled, cluster)
            self.fixed[kind, pooled] = float(everyone.sum()), float(holders.sum())

    def size(self, option: Option) -> float:
        return float(self.memory[id(option)].max())

    def finer(self, i: int, option: Option) -> Option | None:
        """The way of a table with the least work among those with smaller shards."""
        finer = [o for o in self.space.options[i] if self.size(o) < self.size(option)]
        return min(finer, key=lambda o: o.total_ms, default=None)

    def place(self, chosen: Chosen, by: str, failure: Failure) -> Found | int:
        """A placement, or the number of the table that found no room."""
        world = self.cluster.world_size
        self.free = np.repeat(self.capacity[:, None], world, axis=1)
        self.busy = np.zeros(world)
        ranks: list[np.ndarray] = [np.empty(0, np.int64)] * len(chosen)
        everywhere = np.arange(world)
        rest = []
        for i, option in enumerate(chosen):
            if option.sharding_type in EVERYWHERE:
                ranks[i] = everywhere
                self._take(everywhere, option)
            else:
                rest.append(i)
        if (self.free < 0).any():
            largest = max((o for o in chosen if o.sharding_type in EVERYWHERE), key=lambda o: self.memory[id(o)].max())
            i = next(i for i, o in enumerate(chosen) if o is largest)
            self._note(failure, i, largest, len(chosen) - len(rest) - 1)
            return i
        size = self.memory if by == "bytes" else {key: np.array([ms]) for key, ms in self.ms.items()}
        # What a rule binds to some processes goes first: the rest can go elsewhere.
        rest.sort(key=lambda i: (self.space.allowed[i] is None, -size[id(chosen[i])].max() * chosen[i].row_blocks))
        for count, i in enumerate(rest):
            found = self._where(chosen[i], self.space.allowed[i])
            if found is None:
                self._note(failure, i, chosen[i], len(chosen) - len(rest) + count)
                return i
            ranks[i] = found
            self._take(found, chosen[i])
        return Found(chosen, ranks, float(self._with_fixed_costs(self.busy, chosen, ranks).max()))

    def _with_fixed_costs(self, busy: np.ndarray, chosen: Chosen, ranks: list[np.ndarray]) -> np.ndarray:
        """As `estimate.prediction_of` counts them: collectives for everybody, lookup calls for who holds a shard."""
        members: dict[tuple[str, bool, str], list[np.ndarray]] = {}
        for table, option, mine in zip(self.space.tables, chosen, ranks, strict=True):
            members.setdefault((table.module, table.pooled, option.sharding_type), []).append(mine)
        for (_, pooled, kind), group in members.items():
            everyone, holders = self.fixed[kind, pooled]
            busy = busy + everyone
            busy[np.unique(np.concatenate(group))] += holders
        return busy + sum(self.shared[id(option)] for option in chosen) if self.shared else busy

    def load(self, found: Found) -> np.ndarray:
        busy = np.zeros(self.cluster.world_size)
        for option, ranks in zip(found.options, found.ranks, strict=True):
            np.add.at(busy, ranks, self.ms[id(option)])
        return self._with_fixed_costs(busy, found.options, found.ranks)

    def with_way(self, found: Found, i: int, option: Option) -> Found | None:
        """The same with another way for one table, in the best place for it; None if there is no room."""
        self.busy, self.free = self.load(found), self.room(found)
        self.busy[found.ranks[i]] -= self.ms[id(found.options[i])]
        self.free[:, found.ranks[i]] += self.memory[id(found.options[i])][:, None]
        everywhere = np.arange(len(self.busy)) if (self.free >= self.memory[id(option)][:, None]).all() else None
        where = everywhere if option.num_shards == len(self.busy) else self._where(option, self.space.allowed[i])
        if where is None:
            return None
        options = [*found.options[:i], option, *found.options[i + 1 :]]
        moved = Found(options, [*found.ranks[:i], where, *found.ranks[i + 1 :]], 0.0)
        return replace(moved, ms=float(self.load(moved).max()))

    def room(self, found: Found) -> np.ndarray:
        """[2, processes]: bytes that are left."""
        used = np.zeros((self.cluster.world_size, 2))
        for option, ranks in zip(found.options, found.ranks, strict=True):
            np.add.at(used, ranks, self.memory[id(option)])
        return self.capacity[:, None] - used.T

    def _take(self, ranks: np.ndarray, option: Option) -> None:
        self.free[:, ranks] -= self.memory[id(option)][:, None]
        self.busy[ranks] += self.ms[id(option)]

    def _where(self, option: Option, allowed: np.ndarray | None) -> np.ndarray | None:
        """Ranks of the shards in their order; None if there is no room."""
        room = np.asarray((self.free >= self.memory[id(option)][:, None]).all(axis=0))
        if allowed is not None:
            mask = np.zeros_like(room)
            mask[allowed] = True
            room &= mask
        busy = np.where(room, self.busy, np.inf)
        if option.sharding_type in ("table_wise", "column_wise"):
            count = option.num_shards
            if count == 1:
                best = int(busy.argmin())
                return np.array([best]) if room[best] else None
            order = np.argsort(busy, kind="stable")[:count]
            return np.sort(order) if room[order].all() else None
        hosts = busy.reshape(self.cluster.nodes, self.cluster.ranks_per_node)
        if option.sharding_type == "table_column_wise":
            ordered = np.sort(hosts, axis=1)[:, option.num_shards - 1]
            host = int(ordered.argmin())
            if not np.isfinite(ordered[host]):
                return None
            local = np.sort(np.argsort(hosts[host], kind="stable")[: option.num_shards])
            return host * self.cluster.ranks_per_node + local
        worst = hosts.max(axis=1)  # table_row_wise, grid_shard: a whole machine for each block of columns
        blocks = np.sort(np.argsort(worst, kind="stable")[: option.column_blocks])
        if not np.isfinite(worst[blocks]).all():
            return None
        return (blocks[:, None] * self.cluster.ranks_per_node + np.arange(self.cluster.ranks_per_node)).ravel()

    def _note(self, failure: Failure, i: int, option: Option, placed: int) -> None:
        if placed > failure.placed:
            kind = 0 if self.memory[id(option)][0] > 0 else 1
            failure.table, failure.option, failure.placed = self.space.tables[i], option, placed
            failure.free = max(0.0, float(self.free[kind].max()))


def _balanced(found: Found, placer: "_Placer", end: float) -> Found:
    """Tables that lie on one process, or cut over one machine, change places."""
    nodes, local = placer.cluster.nodes, placer.cluster.ranks_per_node
    busy, free, ranks = placer.load(found), placer.room(found), list(found.ranks)
    groups = []
    for kind, width in (("table_wise", 1), ("table_row_wise", local)):
        tables = [i for i, o in enumerate(found.options) if o.sharding_type == kind]
        tables = np.array([i for i in tables if placer.space.allowed[i] is None], np.int64)
        slots = np.arange(nodes * local).reshape(-1, width)
        slot = np.array([ranks[i][0] // width for i in tables], np.int64)
        ms = np.array([found.options[i].shard_ms for i in tables])
        groups.append(Group(tables, slots, slot, ms, np.array([bytes_of(found.options[i]) for i in tables])))
    balance(busy, free, groups, end)
    for group in groups:
        for i, slot in zip(group.tables, group.slot, strict=True):
            ranks[i] = group.slots[slot]
    moved = replace(found, ranks=ranks)
    moved = replace(moved, ms=float(placer.load(moved).max()))
    return moved if moved.ms < found.ms else found


def place_uniformly(space: Space, cluster: Cluster, kinds: Sequence[str], work: Workload) -> Found:
    """Every table by the first of `kinds` that is possible for it, whatever the memory; widest cut of columns.

    The largest table first, onto the processes with the fewest bytes of tables and optimizer state.
    """

    def pick(options: list[Option]) -> Option:
        same = next(found for kind in kinds if (found := [o for o in options if o.sharding_type == kind]))
        return max(same, key=lambda o: o.column_blocks)

    placer = _Placer(space, cluster, work)
    placer.capacity = np.full(2, np.inf)
    placer.ms = {id(o): float(sum(o.cost.hbm[:2]) + sum(o.cost.ddr[:2])) for all_ in space.options for o in all_}
    found = placer.place([pick(options) for options in space.options], "ms", Failure())
    assert isinstance(found, Found), "without limits of memory everything finds a place"
    return found
