"""TaskMetrics against loops over examples and users, and its state against itself."""

import math

import pytest
import torch

from hmoe_rec.metrics import TaskMetrics, exact_auc
from hmoe_rec.types import HASH_OF_MISSING, CheckpointError

TASKS = ["click", "like", "buy"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(11)


def draw(num_examples: int = 211, num_users: int = 17):
    logits = torch.randn(num_examples, len(TASKS)) - 0.5
    logits[:, 1] = (logits[:, 1] * 2).round() / 2  # ties
    labels = (torch.rand_like(logits) < logits.sigmoid()).float()
    labels[torch.rand_like(labels) < 0.2] = torch.nan
    weights = torch.rand(num_examples) * 3
    weights[::13] = 0
    return logits, labels, weights, torch.randint(0, num_users, (num_examples,)) * 1_000_003 - 5


def measured(*batches, **options) -> TaskMetrics:
    metrics = TaskMetrics(TASKS, **options)
    for batch in batches:
        metrics.update(*batch)
    return metrics


def part(batch, rows):
    return tuple(x[rows] for x in batch)


def naive(logits, labels, weights, groups) -> dict[str, float]:
    """One task, example by example."""
    rows = [
        (x, y, w, g)
        for x, y, w, g in zip(logits.tolist(), labels.tolist(), weights.tolist(), groups.tolist(), strict=True)
        if not math.isnan(y) and w > 0
    ]
    weight = sum(w for _, _, w, _ in rows)
    probability = [1 / (1 + math.exp(-x)) for x, _, _, _ in rows]
    loss = sum(-w * math.log(p if y else 1 - p) for (_, y, w, _), p in zip(rows, probability, strict=True))
    label = sum(w * y for _, y, w, _ in rows)
    prediction = sum(w * p for (_, _, w, _), p in zip(rows, probability, strict=True))
    mean = label / weight
    weighted_auc = users_weight = users = 0.0
    for user in {g for _, _, _, g in rows}:
        of_user = torch.tensor([row[:3] for row in rows if row[3] == user], dtype=torch.float64)
        x, y, w = of_user.unbind(1)
        if len(set(y.tolist())) == 2:
            weighted_auc += exact_auc(x, y, w) * w.sum().item()
            users_weight += w.sum().item()
            users += 1
    return {
        "auc": exact_auc(*torch.tensor([row[:3] for row in rows], dtype=torch.float64).unbind(1)),
        "gauc": weighted_auc / users_weight,
        "gauc_users": users,
        "logloss": loss / weight,
        "ne": loss / weight / -(mean * math.log(mean) + (1 - mean) * math.log(1 - mean)),
        "calibration": prediction / label,
        "label_mean": mean,
        "prediction_mean": prediction / weight,
        "examples": len(rows),
    }


def assert_close(found, expected, abs=1e-12):
    for task in TASKS:
        for name, value in expected[task].items():
            assert found[task][name] == pytest.approx(value, abs=abs, rel=1e-12, nan_ok=True), (task, name)


def test_every_metric_equals_a_loop_over_examples():
    logits, labels, weights, groups = batch = draw()
    found = measured(part(batch, slice(0, 100)), part(batch, slice(100, None))).compute()
    for t, task in enumerate(TASKS):
        expected = naive(logits[:, t], labels[:, t], weights, groups)
        bound = found[task]["auc_error_bound"]
        assert abs(found[task].pop("auc") - expected.pop("auc")) <= bound + 1e-12
        assert found[task] == pytest.approx(expected | {"auc_error_bound": bound}, rel=1e-9)


def test_keys_are_those_promised():
    found = measured(draw()).compute()
    assert list(found) == TASKS
    assert list(found["click"]) == (
        "auc auc_error_bound gauc gauc_users logloss ne calibration label_mean prediction_mean examples".split()
    )
    assert all(type(value) is float for row in found.values() for value in row.values())


def test_halves_merge_to_the_whole():
    batch = draw()
    whole = measured(batch, num_bins=64).compute()
    halves = measured(part(batch, slice(0, 90)), num_bins=64).merge_(
        measured(part(batch, slice(90, None)), num_bins=64)
    )
    assert_close(halves.compute(), whole)


def test_other_metrics_do_not_merge():
    with pytest.raises(ValueError, match="equal .*num_bins"):
        TaskMetrics(TASKS, num_bins=4).merge_(TaskMetrics(TASKS, num_bins=8))


def test_an_example_of_weight_two_is_two_examples():
    logits, labels, weights, groups = draw()
    weights = torch.randint(0, 4, (len(weights),))
    copies = torch.repeat_interleave(torch.arange(len(weights)), weights)
    once = measured((logits, labels, weights, groups)).compute()
    repeated = measured((logits[copies], labels[copies], torch.ones(len(copies)), groups[copies])).compute()
    for row in (*once.values(), *repeated.values()):
        del row["examples"]
    assert_close(once, repeated)


def test_unlabelled_and_weightless_examples_do_not_count_even_with_nan_logits():
    logits, labels, weights, groups = batch = draw()
    expected = measured(batch).compute()
    assert_close(
        measured((torch.where(labels.isnan() | (weights == 0)[:, None], torch.nan, logits), *batch[1:])).compute(),
        expected,
    )


def test_empty_batches_change_nothing():
    batch, empty = draw(), part(draw(), slice(0, 0))
    assert_close(measured(empty, batch, empty).compute(), measured(batch).compute())
    nothing = measured(empty).compute()
    assert_close(nothing, TaskMetrics(TASKS).compute())
    assert nothing["click"]["examples"] == 0 and math.isnan(nothing["click"]["logloss"])


@pytest.mark.parametrize(
    ("label", "undefined"), [(0.0, {"auc", "gauc", "ne", "calibration"}), (1.0, {"auc", "gauc", "ne"})]
)
def test_one_class_leaves_nan_where_nothing_can_be_said(label, undefined):
    logits, labels, weights, groups = draw()
    found = measured((logits, torch.full_like(labels, label), weights, groups)).compute()["like"]
    assert {name for name, value in found.items() if math.isnan(value)} == undefined | {"auc_error_bound"}
    assert found["label_mean"] == label and found["gauc_users"] == 0


def test_a_nan_logit_shows_in_its_task_only():
    logits, labels, weights, groups = batch = draw()
    expected = measured(batch).compute()
    row = (~labels[:, 1].isnan() & (weights > 0)).nonzero()[0]
    logits = logits.clone()
    logits[row, 1] = torch.nan
    found = measured((logits, labels, weights, groups)).compute()
    assert found["click"] == expected["click"]
    defined = {name for name, value in found["like"].items() if not math.isnan(value)}
    assert defined == {"gauc_users", "label_mean", "examples"}


def test_bfloat16_logits_are_taken_at_their_value():
    logits, *rest = draw()
    low = logits.bfloat16()
    assert_close(measured((low, *rest)).compute(), measured((low.float(), *rest)).compute(), abs=0)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[60.0], [-60.0], [300.0], [-300.0]])
    metrics = TaskMetrics(["click"])
    metrics.update(logits, torch.tensor([[0.0], [1.0], [1.0], [0.0]]), torch.ones(4), torch.arange(4))
    found = metrics.compute()["click"]
    assert found["logloss"] == pytest.approx(120 / 4) and found["auc"] == 0.75


def test_examples_of_nobody_are_no_users():
    batch = draw()
    nobodys = torch.arange(len(batch[2])) % 3 == 0
    groups = torch.where(nobodys, HASH_OF_MISSING, batch[3])
    found, of_users = measured((*batch[:3], groups)).compute(), measured(part(batch, ~nobodys)).compute()
    for task in TASKS:
        assert found[task]["gauc"] == pytest.approx(of_users[task]["gauc"])
        assert found[task]["gauc_users"] == of_users[task]["gauc_users"]
    assert found["click"]["auc"] == pytest.approx(measured(batch).compute()["click"]["auc"])


def test_gauc_can_be_left_out():
    metrics = TaskMetrics(TASKS, gauc=False)
    metrics.update(*draw()[:3])
    found = metrics.compute()["click"]
    assert math.isnan(found["gauc"]) and math.isnan(found["gauc_users"]) and found["auc"] > 0


def test_later_changes_of_the_batch_do_not_matter():
    batch = draw()
    metrics = measured(batch)
    expected = metrics.compute()
    for x in batch:
        x.zero_()
    assert_close(metrics.compute(), expected, abs=0)


def test_state_round_trip_keeps_all_but_gauc():
    first, second = draw(), draw()
    expected = measured(first, second).compute()
    resumed = TaskMetrics(TASKS)
    resumed.load_state_dict(measured(first).reduced_state_dict())
    resumed.update(*second)
    found = resumed.compute()
    gauc_of_second = measured(second).compute()
    for task in TASKS:
        expected[task] |= {name: gauc_of_second[task][name] for name in ("gauc", "gauc_users")}
    assert_close(found, expected)


def test_reduced_state_is_a_copy():
    metrics = measured(draw())
    state = metrics.reduced_state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    metrics.update(*draw())
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert all(type(tensor) is torch.Tensor for tensor in state.values())


def test_state_of_other_tasks_or_bins_is_refused_before_anything_changes():
    metrics = measured(draw(), num_bins=8)
    expected = metrics.compute()
    with pytest.raises(CheckpointError, match="'share.sums'.*tasks"):
        metrics.load_state_dict(TaskMetrics([*TASKS[:2], "share"], num_bins=8).state_dict())
    with pytest.raises(CheckpointError, match=r"click.histogram has shape \[2, 4\], expected \[2, 8\].*num_bins"):
        metrics.load_state_dict(TaskMetrics(TASKS, num_bins=4).state_dict())
    assert_close(metrics.compute(), expected, abs=0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 3), (5, 2), (5,), (5,)), r"labels \[5, 2\]"),
        (((5, 3), (5, 3), (5, 1), (5,)), r"weights \[5, 1\]"),
        (((4, 3), (5, 3), (5,), (5,)), r"logits \[4, 3\]"),
        (((5, 3), (5, 3), (5,), (4,)), r"groups \[5\], got \[4\]"),
        (((5, 3), (5, 3), (5,), None), r"got none; without a user key set gauc=False"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        TaskMetrics(TASKS, num_bins=2).update(*(None if shape is None else torch.zeros(shape) for shape in shapes))


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="each once"):
        TaskMetrics(["click", "click"])
    with pytest.raises(ValueError, match="even"):
        TaskMetrics(TASKS, num_bins=7)


def test_ne_and_calibration_are_those_of_torchrec():
    calibration = pytest.importorskip("torchrec.metrics.calibration")
    from torchrec.metrics.metrics_config import DefaultTaskInfo
    from torchrec.metrics.ne import NEMetric
    from torchrec.metrics.rec_metric import RecComputeMode

    logits, labels, weights, groups = draw()
    labels = labels.nan_to_num()  # torchrec has no missing labels
    found = measured((logits, labels, weights, groups)).compute()
    for t, task in enumerate(TASKS):
        for kind, name in ((NEMetric, "ne"), (calibration.CalibrationMetric, "calibration")):
            theirs = kind(1, 0, len(weights), [DefaultTaskInfo], RecComputeMode.UNFUSED_TASKS_COMPUTATION, 1000)
            data = {"predictions": logits[:, t].double().sigmoid(), "labels": labels[:, t].double(), "weights": weights}
            theirs.update(**{key: {"DefaultTask": x.double()} for key, x in data.items()})
            value = theirs.compute()[f"{name}-DefaultTask|lifetime_{name}"].item()
            assert found[task][name] == pytest.approx(value, rel=1e-9), (task, name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_and_cpu_agree():
    batches = [draw(), draw(), part(draw(), slice(0, 0))]
    on_gpu = TaskMetrics(TASKS, device="cuda")
    for batch in batches:
        on_gpu.update(*(x.cuda() for x in batch))
    assert_close(on_gpu.compute(), measured(*batches).compute())
