"""Managed ids: rows that belong to one id, given and taken by rule, the same on any number of processes."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from managed_ids import POLICIES, ROWS, SETS, features_of, stream
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.embedding.hashing import salt_of
from hmoe_rec.embedding.lookup import MultiEmbedding
from hmoe_rec.embedding.managed import ManagedIds, managed_tables
from hmoe_rec.embedding.row_ids import RowIds
from hmoe_rec.embedding.row_reset import RowReset, manage_rows
from hmoe_rec.embedding.row_values import row_values
from hmoe_rec.embedding.slots import EMPTY
from hmoe_rec.types import ManagedRows


def batch_of(ids: list[int], behaviors: list[int] = ()) -> KeyedJaggedTensor:  # type: ignore[assignment]
    """One example, whose ad field is as long as it needs to be."""
    return KeyedJaggedTensor(
        keys=["tab", "ad", "hist_ad"],
        values=torch.tensor([4, *ids, *behaviors]),
        lengths=torch.tensor([1, len(ids), len(behaviors)], dtype=torch.int32),
        length_per_key=[1, len(ids), len(behaviors)],
        stride=1,
    )


class Naive:
    """What slots.py says, id by id, with dictionaries: bucket -> {id: [way, count, last]}."""

    def __init__(self, policy: ManagedRows, buckets: int, bucket_of) -> None:
        self.policy, self.bucket_of, self.step = policy, bucket_of, 0
        self.rows = [{} for _ in range(buckets)]
        self.waiting = [{} for _ in range(buckets)]
        self.waits = 0 if policy.evict == "lru" and policy.min_count == 1 else policy.waiting * policy.ways

    def worth(self, count: int, last: int) -> float:
        age = self.step - last + 1
        return {"lru": last, "lfu": count, "distance_lfu": count / age**self.policy.decay}[self.policy.evict]

    def learn(self, ids: list[int]) -> dict[int, int]:
        self.step += 1
        seen = {i: ids.count(i) for i in ids}
        for b in range(len(self.rows)):
            mine = {i: n for i, n in seen.items() if self.bucket_of(i) == b}
            self._bucket(self.rows[b], self.waiting[b], mine)
        return self.find(ids)

    def _bucket(self, rows: dict, waiting: dict, seen: dict[int, int]) -> None:
        for i in rows.keys() & seen.keys():
            rows[i][1:] = [rows[i][1] + seen[i], self.step]
        new = {i: n + waiting.get(i, [0, 0])[1] for i, n in seen.items() if i not in rows}
        ripe = [i for i, n in new.items() if n >= self.policy.min_count]
        won = self._seats(
            rows, {i: (self.worth(new[i], self.step), new[i]) for i in ripe}, self.policy.ways, self.worth
        )
        for i in won & waiting.keys():
            del waiting[i]
        rest = {i: n for i, n in new.items() if i not in won}
        for i in rest.keys() & waiting.keys():
            waiting[i][1:] = [rest[i], self.step]
        others = {i: (n + self.step, n) for i, n in rest.items() if i not in waiting}
        if self.waits:
            self._seats(waiting, others, self.waits, lambda count, last: last)

    def _seats(self, place: dict, new: dict, ways: int, worth) -> set[int]:
        """new: id -> (priority, count)."""
        free = [w for w in range(ways) if w not in {way for way, _, _ in place.values()}]
        losers = sorted((worth(n, t), t, way, i) for i, (way, n, t) in place.items() if t < self.step)
        seats = [(float("-inf"), way, None) for way in free] + [(x, way, i) for x, _, way, i in losers]
        won = set()
        order = sorted(new, key=lambda i: (-new[i][0], i))
        for i, (x, way, loser) in zip(order, seats, strict=False):
            if x <= new[i][0]:
                place.pop(loser, None)
                place[i] = [way, new[i][1], self.step]
                won.add(i)
        return won

    def find(self, ids: list[int]) -> dict[int, int]:
        """Row of an id, None without one."""
        return {
            i: b * self.policy.ways + self.rows[b][i][0] if i in self.rows[b] else None
            for i in ids
            for b in [self.bucket_of(i)]
        }


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.evict}-{p.min_count}")
def test_equals_the_rule_followed_id_by_id(policy):
    managed = ManagedIds(features_of(policy), SETS)
    (rows,) = managed.rows
    naive = Naive(policy, ROWS // 4, cache(lambda i: int(rows.bucket_of(torch.tensor([i])))))
    for ids in stream(120):
        sparse = managed(batch_of(ids[:9], ids[9:]))
        got = sparse.values()[1:].tolist()
        expected = naive.learn(ids)
        assert sparse.values()[0] == 4  # not managed
        for i, row in zip(ids, got, strict=True):
            assert row == (expected[i] if expected[i] is not None else i | EMPTY)
        live = {i: r for i, r in expected.items() if r is not None}
        assert len(set(live.values())) == len(live)  # no two ids in one row
        occupied = sum(map(len, naive.rows))
        assert managed.window()["id_occupancy"]["ad"] == occupied / ROWS
    evicted = int(managed.totals[0, 4])
    assert evicted > 50 and int(managed.totals[0, 3]) - evicted == occupied


def test_nothing_is_learned_outside_of_training():
    managed = ManagedIds(features_of(POLICIES[0]), SETS)
    known, unknown = [7, 8, 9], [10, -3]
    rows = managed(batch_of(known)).values()[1:]
    before = {name: x.clone() for name, x in managed.state_dict().items()}
    for learning in (managed.train(), managed.eval()):
        with torch.set_grad_enabled(not learning.training):
            out = learning(batch_of(known, unknown)).values()
        assert torch.equal(out[1:4], rows) and (out[4:] < 0).all()
    after = managed.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_a_row_is_not_taken_in_the_step_that_uses_it():
    policy = replace(POLICIES[0], ways=ROWS)  # one bucket
    managed = ManagedIds(features_of(policy), SETS)
    first = managed(batch_of(list(range(20)))).values()[1:]
    both = managed(batch_of(list(range(20)), list(range(100, 140)))).values()[1:]
    assert torch.equal(both[:20], first)
    assert sorted(both[20:][both[20:] >= 0].tolist()) == sorted(set(range(ROWS)) - set(first.tolist()))
    assert int(managed.totals[0, 2]) == 36  # no row left: shared


def test_an_id_whose_bits_mean_empty_is_an_id():
    managed = ManagedIds(features_of(POLICIES[0]), SETS)
    first = managed(batch_of([EMPTY, 5])).values()[1:]
    assert torch.equal(managed(batch_of([EMPTY, 5])).values()[1:], first) and (first >= 0).all()


def test_window_counts_since_the_last_one():
    managed = ManagedIds(features_of(replace(POLICIES[0], ways=ROWS)), SETS)
    managed(batch_of([1, 1, 2]))
    managed(batch_of([2, 3], [4]))
    found = managed.window()
    assert found["id_known_rate"]["ad"] == 1 / 6 and found["id_shared_rate"]["ad"] == 0
    assert found["id_given_per_step"]["ad"] == 2 and found["id_occupancy"]["ad"] == 4 / ROWS
    managed(batch_of([1]))
    assert managed.window()["id_known_rate"]["ad"] == 1


def test_counts_lie_where_they_are_placed_and_are_read_on_the_cpu():
    """Made under another device, as all of a model is: what is counted shall not be of two devices."""
    with torch.device("meta"):
        ids = ManagedIds(features_of(POLICIES[0]), SETS)
    assert ids._read.device.type == "cpu"
    ids.place(0, 1, torch.device("cpu"), lambda *_: None)
    assert ids.totals.device.type == "cpu"
    ids(batch_of([10**15, 10**15, 7]))
    assert ids.totals.tolist() == [[3, 0, 0, 2, 0]]
    assert ids.window()["id_occupancy"] == {"ad": 2 / ROWS}
    saved = ids.state_dict()
    ids(batch_of([7]))
    ids.load_state_dict(saved)
    assert ids.totals.tolist() == ids._read.tolist() == [[3, 0, 0, 2, 0]]


def test_ids_without_a_row_share_others_in_every_set():
    features = features_of(replace(POLICIES[0], shared_rows=11))
    wanted = [(s, key) for s in ("a", "b") for key in ("tab", "ad", "hist_ad")]
    ids = RowIds(features, wanted)
    sparse = batch_of([5, 3, -9, -8, -7, EMPTY + 2], [-9])
    out = ids(sparse)
    assert torch.equal(out.values(), ids._at_once(sparse.permute(ids.positions)))
    a, b = (out[f"{s}__ad"].values().tolist() for s in ("a", "b"))
    assert a[:2] == b[:2] == [5, 3]  # their own
    assert all(ROWS <= row < ROWS + 11 for row in a[2:] + b[2:]) and a[2:] != b[2:]
    assert out["a__hist_ad"].values().tolist() == [a[2]]
    assert salt_of("a", "ad") != salt_of("b", "ad")


class TestRowValues:
    def test_each_value_stands_for_itself(self):
        rows = torch.tensor([7, 0, 10**9])
        whole = row_values(3, "t", rows, range(0, 12), std=0.5)
        assert torch.equal(row_values(3, "t", rows[1:2], range(4, 8), std=0.5), whole[1:2, 4:8])
        for other in (row_values(4, "t", rows, range(12), std=0.5), row_values(3, "u", rows, range(12), std=0.5)):
            assert not torch.isclose(whole, other).any()

    @pytest.mark.parametrize("distribution", ["normal", "uniform"])
    def test_spread(self, distribution):
        x = row_values(1, "t", torch.arange(20_000), range(8), std=0.5, distribution=distribution).double()
        n = x.numel()
        kurtosis = 3.0 if distribution == "normal" else 1.8
        assert abs(x.mean()) < 4 * 0.5 / n**0.5
        assert abs(x.var() - 0.25) < 4 * 0.25 * ((kurtosis - 1) / n) ** 0.5
        assert abs((x**4).mean() / 0.25**2 - kurtosis) < 0.1
        assert (torch.corrcoef(x.T) - torch.eye(8)).abs().max() < 5 / 20_000**0.5
        assert torch.corrcoef(torch.stack([x[:-1].flatten(), x[1:].flatten()]))[0, 1].abs() < 5 / n**0.5


def test_rows_taken_over_start_afresh_in_every_set():
    from hmoe_rec.embedding.initialization import initialize_tables

    embedding = MultiEmbedding(features_of(POLICIES[0]), SETS)
    assert managed_tables(embedding) == {"a__ad", "b__ad"}
    initialize_tables(embedding, seed=3, std=0.5)
    manage_rows(embedding, seed=3, std=0.5, device=torch.device("cpu"))
    first = {name: x.detach().clone() for name, x in embedding.named_parameters()}
    for weight in embedding.parameters():
        weight.data += 1
    reset: list[int] = []
    for ids in stream(9):
        before = int(embedding.managed.totals[0, 4])
        embedding(batch_of(ids[:9], ids[9:]))
        reset.append(int(embedding.managed.totals[0, 4]) - before)
    assert sum(reset) > 5
    for name, weight in embedding.named_parameters():
        afresh = torch.isclose(weight, first[name], rtol=0, atol=1e-7).all(1)
        assert torch.equal(weight[afresh], first[name][afresh])
        assert torch.equal(weight[~afresh], first[name][~afresh] + 1)
        assert bool(afresh.any()) == (".ad." in name or "__ad." in name) and not afresh[ROWS:].any()
    with pytest.raises(KeyError):
        RowReset(embedding, {"a__ad": "ad"}, seed=3, std=0.5)("tab", torch.tensor([1]))
