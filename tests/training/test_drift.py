"""Ids that are new, and alarms, against sets and sums counted by hand."""

import math

import pytest
import torch
from gloo import run_ranks
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.batch import Batch
from hmoe_rec.training.drift import Alarm, Limits, SeenIds, alarms_of
from hmoe_rec.types import Features, IdField, SequenceField

FEATURES = Features(
    ids=(IdField("user", 50), IdField("item", 20, missing_row=True), IdField("city", 1000, hashed=True)),
    sequences=(SequenceField("history", (("hist_item", "item"),)),),
)


def batch_of(generator: torch.Generator, size: int, users: int = 50) -> Batch:
    def ids(high: int, n: int) -> torch.Tensor:
        return torch.randint(high, (n,), generator=generator)

    behaviors = torch.randint(0, 3, (size,), generator=generator)
    cities = ids(30, size) * 0x5DEECE66D - (1 << 40)  # any 64-bit numbers
    values = torch.cat([ids(users, size), ids(21, size), cities, ids(20, int(behaviors.sum()))])
    lengths = torch.cat([torch.ones(3 * size, dtype=torch.int64), behaviors]).int()
    sparse = KeyedJaggedTensor(keys=list(FEATURES.sparse_keys), values=values, lengths=lengths)
    return Batch.of(sparse, torch.zeros(size, 1))


def naive_look(seen: dict[str, set], batches: list[Batch]) -> dict[str, float]:
    counts = {field.name: [0, 0] for field in FEATURES.ids}
    for batch in batches:
        for name, count in counts.items():
            for value in batch.sparse[name].values().tolist():
                count[0] += 1
                count[1] += value not in seen[name]
    for batch in batches:
        for key in batch.sparse.keys():
            seen[FEATURES.targets.get(key, key)] |= set(batch.sparse[key].values().tolist())
    return {name: new / n for name, (n, new) in counts.items()}


def test_unseen_ids_are_those_of_no_earlier_window():
    generator = torch.Generator().manual_seed(1)
    seen, naive = SeenIds(FEATURES), {field.name: set() for field in FEATURES.ids}
    for users in (10, 20, 50):
        batches = [batch_of(generator, 5, users), batch_of(generator, 6, users)]
        found, expected = seen.look(batches), naive_look(naive, batches)
        assert seen.look(batches) == found  # looking alone changes nothing
        seen.keep()
        assert found["user"] == expected["user"] and found["item"] == expected["item"]
        assert found["city"] == pytest.approx(expected["city"], abs=0.01)  # 30 ids among 16384 bits
    assert 0 < expected["user"] < 1
    assert math.isnan(seen.look([])["user"])
    again = SeenIds(FEATURES)
    again.state_dict()["bits"].copy_(seen.state_dict()["bits"])  # as a checkpoint does
    assert again.look(batches)["user"] == 0.0


def test_a_small_sketch_is_right_on_average():
    """Of 40,000 ids half are new; 1000 known ones have set about 800 of 2048 bits, so 39 % of the new ones look known.

    The corrected share has a standard deviation of 0.5 sqrt(0.39 * 0.61 / 20000) / 0.61 = 0.003.
    """
    seen = SeenIds(Features(ids=(IdField("user", 100_000),)), max_bits=2048)
    known, new = torch.arange(1000), torch.arange(50_000, 70_000)
    for ids in (known, torch.cat([known.repeat(20), new])):
        sparse = KeyedJaggedTensor(keys=["user"], values=ids, lengths=torch.ones(len(ids), dtype=torch.int32))
        share = seen.look([Batch.of(sparse, torch.zeros(len(ids), 1))])["user"]
        seen.keep()
    assert seen.state_dict()["bits"].numel() == 2048 / 8
    assert share == pytest.approx(0.5, abs=0.01)


def look_on_a_rank(rank: int, world_size: int) -> list[dict[str, float]]:
    generator = torch.Generator().manual_seed(1)
    batches = [batch_of(generator, 5, users) for users in (10, 10, 50, 50)]
    seen = SeenIds(FEATURES)
    windows = [batches[:2], batches[2:]]
    if world_size > 1:
        windows = [[window[rank]] for window in windows]
    found = []
    for window in windows:
        found.append(seen.look(window))
        seen.keep()
    return found


def test_ranks_see_together_what_one_sees():
    both = run_ranks(2, look_on_a_rank)
    assert both[0] == both[1] == look_on_a_rank(0, 1)


def metrics(examples: float, label_mean: float, prediction_mean: float) -> dict[str, dict[str, float]]:
    return {"click": {"examples": examples, "label_mean": label_mean, "prediction_mean": prediction_mean}}


@pytest.mark.parametrize(
    ("now", "before", "unseen", "kinds"),
    [
        (metrics(1000, 0.3, 0.3), metrics(9000, 0.3, 0.3), 0.1, []),
        (metrics(1000, 0.2, 0.41), metrics(9000, 0.2, 0.2), 0.1, ["calibration"]),
        (metrics(1000, 0.41, 0.2), metrics(9000, 0.3, 0.2), 0.1, ["calibration"]),
        (metrics(1000, 0.41, 0.3), metrics(9000, 0.2, 0.2), 0.1, ["label_rate"]),
        (metrics(1000, 0.0, 0.3), metrics(9000, 0.3, 0.3), 0.1, ["calibration", "label_rate"]),  # labels do not arrive
        (metrics(200, 0.2, 0.45), metrics(9000, 0.2, 0.2), 0.1, []),  # too few to tell
        (metrics(1000, 0.3, 0.3), metrics(0, math.nan, math.nan), 0.1, []),  # the first window
        (metrics(0, math.nan, math.nan), metrics(9000, 0.3, 0.3), 0.1, []),  # no labels of this task
        (metrics(1000, 0.3, 0.3), metrics(9000, 0.3, 0.3), 0.6, ["unseen_ids"]),
        (metrics(1000, 0.3, 0.3), metrics(9000, 0.3, 0.3), math.nan, []),
    ],
)
def test_alarms(now, before, unseen, kinds):
    found = alarms_of(now, before, {"user": unseen}, Limits())
    assert [alarm.kind for alarm in found] == kinds
    assert not alarms_of(now, before, {"user": unseen}, Limits(None, None, None))


def test_an_alarm_says_what_and_how_much():
    assert str(Alarm("calibration", "click", 2.5, 2.0)) == "calibration of click: 2.5 (limit 2)"
