"""Ways to shard each table -> proposals for all tables: which way each of them takes.

::

    uniform   one sharding type wherever it is possible, the cheapest other way elsewhere
    capped    of every table the way with the least work over all processes, among those whose shard takes at most c ms
              (an unlimited c ignores imbalance, a small one cuts every large table), for the c that promise the lowest
              time of the busiest process
    repair    while the memory of all shards exceeds the cluster's, tables go over to the way that saves a byte at the
              lowest price

No torch in here.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from hmoe_rec.sharding.options import AUTO_TYPES, Option, Workload, usable_bytes
from hmoe_rec.sharding.topology import Cluster

CAPS, CAPPED = 64, 8  # caps that are looked at, and the best of them, which are tried
Chosen = list[Option]
Ways = Sequence[list[Option]]  # of each table


def proposals(ways: Ways, cluster: Cluster, work: Workload) -> list[Chosen]:
    """Different ones, the one with the lowest bound of the busiest process's time first."""
    kinds = sorted({o.sharding_type for options in ways for o in options}, key=_order)
    proposed = [[_uniform(options, kind) for options in ways] for kind in kinds]
    proposed += _capped_proposals(ways, cluster, CAPPED)
    # Fewer sharding types mean fewer collectives: each pair of them, capped as well.
    if len(kinds) > 2:
        for other in kinds[1:]:
            among = [[o for o in options if o.sharding_type in (kinds[0], other)] or options for options in ways]
            proposed += _capped_proposals(among, cluster, CAPPED // 2)
    unique: dict[tuple[int, ...], Chosen] = {}
    for chosen in proposed:
        repaired = _repaired(chosen, ways, cluster, work)
        unique.setdefault(tuple(map(id, repaired)), repaired)
    return sorted(unique.values(), key=lambda chosen: bound(chosen, cluster))


def bound(chosen: Chosen, cluster: Cluster) -> float:
    """No placement is faster, fixed costs aside.

    Neither than the mean load, nor than what all processes have to do and the largest shard besides.
    """
    world = cluster.world_size
    everywhere = sum(o.shard_ms for o in chosen if o.num_shards == world)
    largest = max((o.shard_ms for o in chosen if o.num_shards < world), default=0.0)
    return max(sum(o.total_ms for o in chosen) / world, everywhere + largest)


def bytes_of(option: Option) -> np.ndarray:
    """[2]: hbm and ddr of one shard."""
    return np.array([sum(option.cost.hbm), sum(option.cost.ddr)], dtype=np.float64)


def _capped_proposals(ways: Ways, cluster: Cluster, count: int) -> list[Chosen]:
    kinds = {tuple(map(id, options)): options for options in ways}  # tables of one size share their ways
    counts = Counter(tuple(map(id, options)) for options in ways)
    shards = np.unique([o.shard_ms for options in kinds.values() for o in options])
    found = []
    for cap in np.unique(np.quantile(shards, np.linspace(0, 1, CAPS), method="nearest")):
        chosen = {key: _capped(options, float(cap)) for key, options in kinds.items()}
        promised = bound([o for key, o in chosen.items() for _ in range(counts[key])], cluster)
        found.append((promised, float(cap), chosen))
    best = sorted(found, key=lambda one: one[:2])[:count]
    return [[chosen[tuple(map(id, options))] for options in ways] for _, _, chosen in best]


def _order(kind: str) -> int:
    return AUTO_TYPES.index(kind) if kind in AUTO_TYPES else len(AUTO_TYPES)


def _uniform(options: list[Option], kind: str) -> Option:
    same = [o for o in options if o.sharding_type == kind]
    return min(same or options, key=lambda o: o.total_ms)


def _capped(options: list[Option], cap: float) -> Option:
    below = [o for o in options if o.shard_ms <= cap]
    return min(below, key=lambda o: o.total_ms) if below else min(options, key=lambda o: o.shard_ms)


def _repaired(chosen: Chosen, ways: Ways, cluster: Cluster, work: Workload) -> Chosen:
    """Goes over to thriftier ways until the sum over all processes fits (what a placement may still refuse)."""
    capacity = usable_bytes(cluster, work) * cluster.world_size * 0.98
    used = sum((bytes_of(o) * o.num_shards for o in chosen), np.zeros(2))
    chosen = list(chosen)
    for kind in (0, 1):  # hbm, ddr
        if used[kind] <= capacity[kind]:
            continue
        moves = []
        for i, (now, options) in enumerate(zip(chosen, ways, strict=True)):
            for other in options:
                saved = float((bytes_of(now) * now.num_shards - bytes_of(other) * other.num_shards)[kind])
                if saved > 0:
                    moves.append(((other.total_ms - now.total_ms) / saved, i, other))
        for _, i, other in sorted(moves, key=lambda m: m[0]):
            delta = bytes_of(other) * other.num_shards - bytes_of(chosen[i]) * chosen[i].num_shards
            if delta[kind] < 0:
                used, chosen[i] = used + delta, other
            if used[kind] <= capacity[kind]:
                break
    return chosen
