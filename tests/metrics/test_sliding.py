"""The last n windows together are what the metrics of all their examples are."""

import torch

from hmoe_rec.metrics import SlidingMetrics, TaskMetrics


def examples(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 2, generator=generator)
    labels = torch.randint(0, 2, (5, 2), generator=generator).float()
    labels[0, 1] = torch.nan
    return logits, labels, torch.rand(5, generator=generator)


def metrics_of(*seeds: int) -> TaskMetrics:
    found = TaskMetrics(("click", "like"), num_bins=64, gauc=False)
    for seed in seeds:
        found.update(*examples(seed))
    return found


def assert_equal(a: dict, b: dict) -> None:
    for task in ("click", "like"):
        for name in ("auc", "logloss", "ne", "calibration", "label_mean", "examples"):
            torch.testing.assert_close(a[task][name], b[task][name], equal_nan=True)


def test_the_oldest_window_is_forgotten():
    sliding = SlidingMetrics(("click", "like"), windows=3, num_bins=64)
    assert sliding.compute()["click"]["examples"] == 0
    for seed in range(5):
        sliding.add(metrics_of(seed))
        assert_equal(sliding.compute(), metrics_of(*range(max(0, seed - 2), seed + 1)).compute())


def test_its_state_is_all_of_it():
    sliding, again = (SlidingMetrics(("click", "like"), windows=3, num_bins=64) for _ in range(2))
    for seed in range(4):
        sliding.add(metrics_of(seed))
    for name, tensor in again.state_dict().items():
        tensor.copy_(sliding.state_dict()[name])
    again.add(metrics_of(4))
    assert_equal(again.compute(), metrics_of(2, 3, 4).compute())
