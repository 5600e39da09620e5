"""Batches in memory: drawn ids follow the law they should, and what batches ask of tables is counted."""

import numpy as np
import pytest
import torch
from making import make_batch, small_features
from small_run import make_log, run_file

from hmoe_rec.benchmark.batches import _lengths, count_traffic, draw_batches, read_batches, zipf_ids
from hmoe_rec.config import resolve_config
from hmoe_rec.sharding.process import Process
from hmoe_rec.types import ConfigError, DataError

ALONE = Process(0, 1, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.0, 1.3])
def test_ids_follow_zipfs_law(skew: float):
    rows = 50
    ids = zipf_ids(200_000, rows, skew, torch.Generator().manual_seed(1))
    assert ids.min() >= 0 and ids.max() < rows
    share = np.sort(np.bincount(ids.numpy(), minlength=rows) / len(ids))[::-1]
    # The law of the continuous draw: of rank k the integral of x^-skew from k to k + 1.
    edges = np.arange(1, rows + 2, dtype=float)
    integral = np.log(edges) if skew == 1 else edges ** (1 - skew) / (1 - skew)
    law = np.diff(integral) / (integral[-1] - integral[0])
    assert share == pytest.approx(law, abs=0.004)
    if skew > 0.5:  # the frequent ids are not the first rows
        frequent = np.argsort(-np.bincount(ids.numpy(), minlength=rows))[:10]
        assert 3 <= (frequent < rows // 2).sum() <= 7


@pytest.mark.parametrize(
    ("mean", "longest", "found"), [(0.3, None, 0.3), (7.2, None, 7.2), (2.5, 3, 2.5), (9.0, 4, 4.0)]
)
def test_bags_have_the_mean_that_is_asked_for(mean: float, longest: int | None, found: float):
    lengths = _lengths(mean, longest, 50_000, torch.Generator().manual_seed(2))
    assert lengths.double().mean().item() == pytest.approx(found, abs=0.06)
    assert 0 <= lengths.min() and lengths.max() <= (longest or 2 * mean + 1)


def test_one_row_and_equal_seeds():
    assert (zipf_ids(9, 1, 1.0, torch.Generator()) == 0).all()
    first, second = (zipf_ids(99, 1000, 0.9, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)


def test_drawn_batches_are_what_the_schema_says(tmp_path):
    content = run_file(tmp_path) | {"sharding": {"pooling": {"hist_item_id": 1.0}}}
    config = resolve_config(content)
    ranks = [Process(r, 3, r, 3, torch.device("cpu")) for r in range(3)]
    drawn = [draw_batches(config, process, 0.5, 2) for process in ranks]
    assert [len(batches[0]) for batches in drawn] == [54, 53, 53]  # 160 examples
    a, b = drawn[0]
    assert a.sparse.keys() == list(config.features.sparse_keys) and not torch.equal(a.labels, b.labels)
    assert not torch.equal(a.sparse.values()[:53], drawn[1][0].sparse.values()[:53])
    lengths = a.sparse.lengths().view(4, -1)
    assert (lengths[:3] == 1).all() and a.longest == (int(lengths[3].max()),)
    assert 0 <= lengths[3].min() and lengths[3].max() <= 2 and lengths[3].float().mean() == pytest.approx(1.0, abs=0.35)
    assert a.ages is not None and torch.equal(a.ages.lengths(), lengths[3])
    assert (a.numbers.shape, a.vectors.shape, a.labels.shape) == ((54, 1), (54, 3), (54, 2))
    again = draw_batches(config, ranks[0], 0.5, 2)[0]
    assert torch.equal(again.sparse.values(), a.sparse.values())


def test_what_cannot_be_drawn_is_told(tmp_path):
    content = run_file(tmp_path)
    content["model"] |= {"encoding": {"numbers": "mnse"}}
    with pytest.raises(ConfigError, match="--zipf: the encoders of price need statistics"):
        draw_batches(resolve_config(content), ALONE, 1.0, 1)
    few = resolve_config(run_file(tmp_path, global_batch_size=2))
    with pytest.raises(ConfigError, match="2 examples for 3 processes"):
        draw_batches(few, Process(0, 3, 0, 3, torch.device("cpu")), 1.0, 1)


def test_batches_of_data_are_full_and_no_more_than_there_are(tmp_path):
    make_log(tmp_path)
    config = resolve_config(run_file(tmp_path))
    batches = read_batches(config, ALONE, config.data.train, 99)
    assert [len(b) for b in batches] == [160] * 12  # of 2000 rows
    assert len(read_batches(config, ALONE, config.data.train, 3)) == 3
    with pytest.raises(DataError, match="2,000 rows do not make a batch of 9,999"):
        read_batches(resolve_config(run_file(tmp_path, global_batch_size=9999)), ALONE, config.data.train, 1)


def test_traffic_is_counted():
    features = small_features()
    batches = [make_batch(features, 5, seed=s) for s in (1, 2)]
    traffic = count_traffic(batches, features, ALONE)
    for i, key in enumerate(features.sparse_keys):
        lengths = [b.sparse.lengths().view(5, -1)[i] for b in batches]
        assert traffic.ids[key] == pytest.approx(float(torch.cat(lengths).float().mean()))
    for name, keys in {"user": ["user"], "item": ["item", "hist_item"]}.items():
        of_batch = [torch.cat([b.sparse[key].values() for key in keys]) for b in batches]
        different, looked_up = sum(len(set(v.tolist())) for v in of_batch), sum(map(len, of_batch))
        assert traffic.distinct[name] == pytest.approx(different / looked_up)
