r"""Raw ids of one field -> rows that belong to one id each, for as long as the id is live.

Rows lie in buckets of `ways` rows. An id's hash says its bucket, and the id may take any row in it: a set-associative
cache, as HugeCTR's HierarchicalKV and FBGEMM's row cache are. Beside its rows a bucket has a waiting room, where ids
without a row are counted until they have been seen often enough, or more often than one that has a row::

    bucket 0   rows  | id 17, 5 times, step 93 | id 4, ... | empty |      waiting  | id 8, once, step 92 | empty |
    bucket 1   rows  | ...

Nothing passes from one bucket to another, so that any cut between buckets shards a field, and moving buckets reshards
it: what a bucket does depends on the ids of the global batch alone, not on how many processes there are.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hmoe_rec.embedding.hashing import hashed_rows, salt_of
from hmoe_rec.types import IdField, ManagedRows

EMPTY = -(1 << 63)  # an id of this value is treated as its neighbor
_MOST = (1 << 31) - 1
_NEVER, _ALWAYS = float("inf"), float("-inf")


@dataclass
class Slots:
    """[buckets, ways] places for an id.

    Attributes:
        ids: int64; EMPTY where there is none.
        count: int32, times it was seen.
        last: int32, step in which it was last seen.
    """

    ids: Tensor
    count: Tensor
    last: Tensor

    @classmethod
    def empty(cls, buckets: int, ways: int, device: torch.device) -> "Slots":
        shape = (buckets, ways)
        return cls(
            torch.full(shape, EMPTY, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
        )

    @property
    def ways(self) -> int:
        return self.ids.shape[1]

    def find(self, ids: Tensor, bucket: Tensor) -> Tensor:
        """Places [n] in the flattened slots; -1 where an id is not there."""
        found, way = (self.ids.index_select(0, bucket) == ids.unsqueeze(1)).max(1)
        return torch.where(found, bucket * self.ways + way, -1)

    def see(self, place: Tensor, times: Tensor, step: int) -> None:
        """Distinct places."""
        count = self.count.view(-1)
        count[place] = (count[place].long() + times).clamp(max=_MOST).int()
        self.last.view(-1)[place] = step

    def put(self, place: Tensor, ids: Tensor, count: Tensor, step: int) -> Tensor:
        """Takes distinct places; -> whether there was an id."""
        taken = self.ids.view(-1)[place] != EMPTY
        self.ids.view(-1)[place] = ids
        self.count.view(-1)[place] = count.clamp(max=_MOST).int()
        self.last.view(-1)[place] = step
        return taken

    def remove(self, place: Tensor) -> None:
        for values, nothing in ((self.ids, EMPTY), (self.count, 0), (self.last, 0)):
            values.view(-1)[place] = nothing

    def offer(self, ids: Tensor, bucket: Tensor, priority: Tensor, step: int, policy: ManagedRows) -> Tensor:
        """Places [n] for new ids, each another; -1 for those that get none.

        The newcomers of a bucket, the highest priority first, meet its places, the lowest first. Nobody loses the place
        where it was seen in this step, nor to a newcomer of lower priority.
        """
        # By id last: the result must not depend on the order in which processes have sent the ids.
        order = ids.argsort()
        order = order[priority[order].argsort(descending=True, stable=True)]
        order = order[bucket[order].argsort(stable=True)]
        distinct, group, sizes = torch.unique_consecutive(bucket[order], return_inverse=True, return_counts=True)
        rank = torch.arange(len(order), device=ids.device) - (sizes.cumsum(0) - sizes)[group]
        worth, way = self._worst_first(distinct, step, policy)
        seat = rank.clamp(max=self.ways - 1)
        wins = (rank < self.ways) & (worth[group, seat] <= priority[order])
        place = torch.full_like(ids, -1)
        place[order] = torch.where(wins, distinct[group] * self.ways + way[group, seat], -1)
        return place

    def _worst_first(self, bucket: Tensor, step: int, policy: ManagedRows) -> tuple[Tensor, Tensor]:
        """[buckets, ways] priorities, ascending, of equal ones the longest not seen first; and the ways they are of."""
        last = self.last[bucket]
        worth = priority_of(self.count[bucket], last, step, policy)
        worth = torch.where(last == step, _NEVER, worth)
        worth = torch.where(self.ids[bucket] == EMPTY, _ALWAYS, worth)
        oldest = last.argsort(stable=True, dim=1)
        worth, order = worth.gather(1, oldest).sort(stable=True, dim=1)
        return worth, oldest.gather(1, order)


def priority_of(count: Tensor, last: Tensor, step: int, policy: ManagedRows) -> Tensor:
    """float64. The three policies and the formula of "distance_lfu" are those of torchrec.modules.mc_modules."""
    if policy.evict == "lru":
        return last.double()
    if policy.evict == "lfu":
        return count.double()
    return count.double() / (step - last + 1).double().pow(policy.decay)


class Learned(NamedTuple):
    """What a training step has done to a field.

    Attributes:
        rows: of the ids, [n]; -1 for those without one.
        known: whether they had it before, [n].
        given: rows that ids have got in this step.
        evicted: of those, the ones that another id has lost.
    """

    rows: Tensor
    known: Tensor
    given: Tensor
    evicted: Tensor


class FieldRows:
    """Buckets [first, last) of one field: those of this process.

    Args:
        field: a managed one.
        device: where the slots live.
    """

    def __init__(self, field: IdField, first: int, last: int, device: torch.device) -> None:
        assert field.managed is not None, f"{field.name} is not managed"
        self.policy, self.first, self.last = field.managed, first, last
        self.num_buckets, self.ways = buckets_of(field)
        self._salt = salt_of("", field.name)
        self.rows = Slots.empty(last - first, self.ways, device)
        self.waiting = Slots.empty(last - first, self.ways * waiting_of(field.managed), device)

    def bucket_of(self, ids: Tensor) -> Tensor:
        """Of all buckets of the field, [n]."""
        return hashed_rows(ids, self._salt, self.num_buckets)

    def find(self, ids: Tensor) -> Tensor:
        """Rows [n] of distinct ids whose buckets are here; -1 where an id has none. Nothing changes."""
        place = self.rows.find(ids, self.bucket_of(ids) - self.first)
        return torch.where(place >= 0, place + self.first * self.ways, -1)

    def learn(self, ids: Tensor, times: Tensor, step: int) -> Learned:
        """Distinct ids [n] of a training step whose buckets are here, and how often each is in it [n]."""
        bucket = self.bucket_of(ids) - self.first
        place = self.rows.find(ids, bucket)
        known = place >= 0
        self.rows.see(place[known], times[known], step)
        new = (~known).nonzero().squeeze(1)
        given = evicted = new[:0]
        if len(new):
            place[new], evicted = self._admit(ids[new], bucket[new], times[new], step)
            given = place[new][place[new] >= 0]
        start = self.first * self.ways
        return Learned(torch.where(place >= 0, place + start, -1), known, given + start, evicted + start)

    def _admit(self, ids: Tensor, bucket: Tensor, times: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Ids without a row -> places, -1 for those who go on waiting; and the places that were taken from another."""
        waits = torch.full_like(ids, -1)
        if self.waiting.ways:
            waits = self.waiting.find(ids, bucket)
            times = times + torch.where(waits >= 0, self.waiting.count.view(-1)[waits.clamp(min=0)], 0)
        place = torch.full_like(ids, -1)
        ripe = (times >= self.policy.min_count).nonzero().squeeze(1)
        if len(ripe):
            now = torch.full_like(ripe, step)
            priority = priority_of(times[ripe], now, step, self.policy)
            place[ripe] = self.rows.offer(ids[ripe], bucket[ripe], priority, step, self.policy)
        wins = place >= 0
        taken = self.rows.put(place[wins], ids[wins], times[wins], step)
        if self.waiting.ways:
            self.waiting.remove(waits[wins & (waits >= 0)])
            self._wait(ids[~wins], bucket[~wins], times[~wins], waits[~wins], step)
        return place, place[wins][taken]

    def _wait(self, ids: Tensor, bucket: Tensor, times: Tensor, waits: Tensor, step: int) -> None:
        """The longest not seen leaves the waiting room for a new one, whatever the policy of the rows."""
        there = waits >= 0
        self.waiting.put(waits[there], ids[there], times[there], step)
        ids, bucket, times = ids[~there], bucket[~there], times[~there]
        if len(ids):
            # Of many newcomers those seen most often; all are newer than whoever they replace.
            place = self.waiting.offer(ids, bucket, times.double() + step, step, ManagedRows(evict="lru"))
            stays = place >= 0
            self.waiting.put(place[stays], ids[stays], times[stays], step)

    def state(self) -> dict[str, tuple[Tensor, int]]:
        """Name -> (values of the places here, sharing memory; places of a bucket)."""
        parts = {"": self.rows, "waiting_": self.waiting}
        return {
            f"{prefix}{name}": (getattr(slots, name).view(-1), slots.ways)
            for prefix, slots in parts.items()
            if slots.ways
            for name in ("ids", "count", "last")
        }


def buckets_of(field: IdField) -> tuple[int, int]:
    """(buckets, ways) of a managed field."""
    assert field.managed is not None, f"{field.name} is not managed"
    ways = min(field.managed.ways, field.num_embeddings)
    return field.num_embeddings // ways, ways


def waiting_of(policy: ManagedRows) -> int:
    """Waiting places per row; none where every new id gets a row at once."""
    return 0 if policy.evict == "lru" and policy.min_count == 1 else policy.waiting
