"""Examples that only fill a rank's share count nowhere: not in a loss, a gradient, a metric or anything else that is
summed over examples."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from managed_ids import SETS, features_of
from small_run import make_log, run_file
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.batch import Batch
from hmoe_rec.config import RunConfig, prepare_data, resolve_config
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.embedding.managed import ManagedIds
from hmoe_rec.experts import EXPERTS
from hmoe_rec.metrics import TaskMetrics
from hmoe_rec.sharding.process import Process
from hmoe_rec.towers import TOWERS
from hmoe_rec.training.build import build_losses, build_model, build_weighting
from hmoe_rec.training.drift import SeenIds
from hmoe_rec.training.prepare import with_statistics
from hmoe_rec.training.run_log import Window
from hmoe_rec.training.task import TrainTask
from hmoe_rec.types import ManagedRows
from hmoe_rec.uncertainty.estimates import LastLayer, RowLaplace
from hmoe_rec.uncertainty.posterior import LastLayerPosterior
from hmoe_rec.uncertainty.rows import RowPosterior

ALONE = Process(0, 1, 0, 1, torch.device("cpu"))
SIZE, MORE = 13, 5
LOSSES = {
    "click": [{"kind": "focal", "gamma": 1.5}, {"kind": "jrc", "weight": 0.3}, {"kind": "rcr", "weight": 0.4}],
    "like": ["bce", {"kind": "pair", "within": "user"}, {"kind": "list", "within": "item_id"}],
}
# Numbers, poolings of sequences, towers, and what is added to the loss, so that each kind is there once.
PARTS = [
    ("scalar", "mean", "mlp", {}),
    ("mnse", "target_attention", "mlp", {"losses": LOSSES, "log_negative_gradients": True}),
    ("quantile", "tim", "sngp", {"decorrelation": 0.5}),
    ("log_square", "din", "mlp", {"gradient_surgery": "pcgrad"}),
    ("autodis", "sasrec", "bootstrap", {"task_weighting": "uncertainty"}),
    ("periodic", "mean", "mlp", {"task_weighting": {"kind": "dwa", "every": 2}}),
    ("piecewise_linear", "tim", "mlp", {}),
]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    make_log(folder, rows=2400)
    return folder


def configured(log: Path, numbers: str = "scalar", sequences: str = "mean", tower: str = "mlp", **train) -> RunConfig:
    content = run_file(log, global_batch_size=SIZE, **train)
    kinds = [{"kind": kind} for kind in EXPERTS]
    content["model"] |= {"preset": "mmoe", "num_experts": len(kinds), "expert": kinds, "dropout": 0.0}
    content["model"] |= {"tower": {"kind": tower}, "encoding": {"numbers": numbers, "sequences": sequences}}
    config = resolve_config(content)
    return with_statistics(config, prepare_data(config), ALONE)


def batch_of(config: RunConfig) -> Batch:
    source = ParquetSource(config.data.train, config.schema_of_data)
    batch = next(BatchReader(source, global_batch_size=SIZE, shuffle=False).epoch(0))
    batch.weights[3] = 0.0  # as the data may have it
    return batch


def with_more(batch: Batch) -> Batch:
    return replace(batch, share=len(batch) + MORE).filled()


def task_of(config: RunConfig) -> TrainTask:
    torch.manual_seed(5)
    model, train = build_model(config), config.train
    return TrainTask(
        model,
        config.tasks,
        losses=build_losses(config),
        weighting=build_weighting(config, distributed=False),
        decorrelation=train.decorrelation,
        surgery=train.gradient_surgery,
        log_negative_gradients=train.log_negative_gradients,
    )


def test_filled_keeps_the_examples_and_adds_some_without_anything(log):
    batch = batch_of(configured(log))
    whole = with_more(batch)
    assert len(whole) == SIZE + MORE and whole.share == SIZE + MORE
    for jagged, before in ((whole.sparse, batch.sparse), (whole.ages, batch.ages)):
        assert jagged.keys() == before.keys() and jagged.stride() == SIZE + MORE
        for key in jagged.keys():
            assert torch.equal(jagged[key].values(), before[key].values())
            assert jagged[key].lengths().tolist() == before[key].lengths().tolist() + [0] * MORE
    for name in ("numbers", "vectors", "labels", "weights", "groups", "row_ids"):
        assert torch.equal(getattr(whole, name)[:SIZE].nan_to_num(7), getattr(batch, name).nan_to_num(7))
        assert getattr(whole, name).dtype == getattr(batch, name).dtype
    assert whole.labels[SIZE:].isnan().all() and (whole.weights[SIZE:] == 0).all()
    assert whole.to(torch.device("cpu")).share == whole.share


def test_what_is_full_is_left_alone_and_nothing_becomes_one(log):
    batch = batch_of(configured(log))
    assert batch.share == SIZE and batch.filled() is batch
    assert replace(batch, share=0).filled().share == 0  # a loader that does not know
    source = ParquetSource(configured(log).data.train, configured(log).schema_of_data)
    (*_, last) = BatchReader(source, global_batch_size=1999, shuffle=False, rank=0, world_size=3).epoch(0)
    assert len(last) == 0 and last.share == 1 and len(last.filled()) == 1


def test_all_parts_are_in_these_tests():
    from hmoe_rec.encoding import NUMBERS, POOLINGS

    numbers, poolings, towers, _ = (set(map(str, kinds)) for kinds in zip(*PARTS, strict=True))
    assert (numbers, poolings, towers) == (set(NUMBERS), set(POOLINGS), set(TOWERS))


@pytest.mark.parametrize(("numbers", "sequences", "tower", "train"), PARTS)
def test_losses_and_gradients_of_every_part_stay(log, numbers, sequences, tower, train):
    config = configured(log, numbers, sequences, tower, **train)
    batch = batch_of(config)
    results = []
    for given in (batch, with_more(batch)):
        task = task_of(config).train()
        loss, output = task(given)
        loss.backward()
        found = {f"gradient of {name}": p.grad for name, p in task.named_parameters() if p.grad is not None}
        found |= {f"after the step {name}": x for name, x in task.named_buffers()}
        logits_BT = output.logits_BT[:SIZE]
        results.append(found | {"loss": loss, "tasks": output.losses_T, "extras": output.extras_X, "logits": logits_BT})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 50
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_metrics_and_the_windows_of_the_log_stay(log):
    config = configured(log)
    batch, task = batch_of(config), task_of(config).eval()
    found = []
    for given in (batch, with_more(batch)):
        metrics = TaskMetrics(config.tasks, num_bins=64, gauc=True)
        window = Window(len(config.tasks), torch.device("cpu"), False)
        with torch.no_grad():
            _, output = task(given)
        metrics.update(output.logits_BT, output.labels_BT, output.weights_B, output.groups_B)
        window.add(output)
        found.append((metrics.compute(), window.read(output.losses_T)))
    for task, figures in found[0][0].items():
        assert found[1][0][task] == pytest.approx(figures, rel=1e-6, nan_ok=True)
    assert found[0][0]["click"]["examples"] == SIZE - 1
    assert found[0][1][0] == pytest.approx(found[1][1][0], rel=1e-6)
    for name, means in found[0][1][1].items():
        assert means == pytest.approx(found[1][1][1][name], rel=1e-6)


def test_posteriors_stay(log):
    config = configured(log)
    batch, model = batch_of(config), task_of(config).eval().model
    sums = []
    for given in (batch, with_more(batch)):
        dims = [f.shape[1] for f in LastLayer(model, None).features(model.mix(batch))]  # type: ignore[arg-type]
        posterior, rows = LastLayerPosterior(dims), RowPosterior(model, ["user_id", "city"])
        RowLaplace(model, posterior, rows).learn(given)
        sums.append({**posterior.state_dict(), **rows.state_dict()})
    for name, value in sums[0].items():
        torch.testing.assert_close(sums[1][name], value, rtol=1e-6, atol=1e-9)
        assert value.abs().sum() > 0


def test_ids_that_were_seen_and_managed_rows_stay(log):
    config = configured(log)
    batch = batch_of(config)
    seen = [SeenIds(config.features) for _ in range(2)]
    assert seen[0].look([batch]) == seen[1].look([with_more(batch)])
    for one in seen:
        one.keep()
    assert torch.equal(seen[0].state_dict()["bits"], seen[1].state_dict()["bits"])

    features = features_of(ManagedRows("lfu", min_count=2, shared_rows=3, ways=4))
    ids = KeyedJaggedTensor(
        list(features.sparse_keys), torch.tensor([1, 2, 77, 77, 78, 77]), lengths=torch.tensor([1, 1, 2, 1, 0, 1])
    )
    plain = Batch.of(ids, torch.ones(2, 1))
    states = []
    for given in (plain, with_more(plain)):
        managed = ManagedIds(features, SETS).train()
        rows = [managed(given.sparse).values() for _ in range(3)]
        states.append({**managed.state_dict(), "rows": torch.stack(rows)})
    for name, value in states[0].items():
        assert torch.equal(torch.as_tensor(states[1][name]), torch.as_tensor(value)), name
