"""Prices are recovered from what the planner would predict under them, and are never negative."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from hmoe_rec.benchmark.calibrate import KINDS, PART_OF, Tables, observations_of, predicted_ms
from hmoe_rec.benchmark.fit import Observation, fit_prices, nonnegative
from hmoe_rec.sharding.planner import make_plan
from hmoe_rec.sharding.prices import PARTS_PRICED, Price, Prices
from hmoe_rec.sharding.topology import NAMED

CPU = NAMED["cpu"]
TRUE = Prices(
    **{
        part: Price(call_ms=0.1 * i, id_ns=3.0 * i, row_ns=5.0 + i, vector_ns=7.0, byte_ns=0.2 * i)
        for i, part in enumerate(PARTS_PRICED, start=1)
    }
)


def as_measured(prediction) -> list[dict[str, float]]:
    """What steps taken apart would show if the prices were true; join and split apart from the exchanges."""
    around = {part: Price() for part in PARTS_PRICED if not part.startswith(("join", "split"))}
    whole, joins = (prediction(replace(CPU, prices=replace(TRUE, **other))) for other in ({}, around))
    found = []
    for all_ms, around_ms in zip(whole, joins, strict=True):
        ms = {part: all_ms[name] for part, name in PART_OF.items()}
        ms |= {"join": around_ms["output_all_to_all"], "split": around_ms["gradient_all_to_all"]}
        found.append(ms | {"output": ms["output"] - ms["join"], "gradient": ms["gradient"] - ms["split"]})
    return found


def test_nonnegative_least_squares():
    rng = np.random.default_rng(3)
    matrix, x = rng.random((30, 4)), np.array([2.0, 0.0, 0.5, 0.0])
    assert nonnegative(matrix, matrix @ x) == pytest.approx(x, abs=1e-9)
    target = matrix @ np.array([1.0, -2.0, 1.0, 0.5]) + 0.1 * rng.normal(size=30)
    found = nonnegative(matrix, target)
    gradient = matrix.T @ (matrix @ found - target)  # Karush, Kuhn, Tucker: 0 where x > 0, not below 0 elsewhere
    assert (found >= 0).all() and (found == 0).any()
    assert gradient[found > 0] == pytest.approx(0, abs=1e-8) and (gradient[found == 0] > -1e-8).all()
    assert (nonnegative(matrix, -matrix[:, 0]) == 0).all()


def test_prices_are_recovered_from_predictions_under_them():
    observations = []
    for pooled in (True, False):
        for width in (8, 32):
            for kind in KINDS:
                module = Tables((40, 3000, 50, 4000), width, pooled, "rowwise_adagrad")
                plan = make_plan(module, kind=kind, world_size=2, local_world_size=2, device_type="cpu")
                for batch_size, ids in ((5, 1), (400, 1), (400, 7), (90, 3)):
                    prediction = partial(predicted_ms, module, plan, batch_size, ids)
                    observations += observations_of(CPU, kind, pooled, as_measured(prediction), prediction)
    fit = fit_prices(observations)
    assert max(fit.error.values()) < 1e-6 and set(fit.error) == set(PARTS_PRICED) - {"all_reduce", "update"}
    for part in ("all_to_all", "reduce_scatter", "all_gather"):  # of which ids are no part
        want = getattr(TRUE, part)
        assert vars(getattr(fit.prices, part)) == pytest.approx(
            vars(Price(want.call_ms, byte_ns=want.byte_ns)), rel=1e-6
        )
    assert vars(fit.prices.forward) == pytest.approx(vars(TRUE.forward), rel=1e-6)
    assert vars(fit.prices.backward) == pytest.approx(vars(TRUE.backward), rel=1e-6)


def test_parts_that_were_not_measured_cost_nothing():
    fit = fit_prices([Observation("forward", {"call_ms": 1.0, "ids": 5.0}, 0.25)])
    assert fit.prices.forward.call_ms == pytest.approx(0.25) and fit.prices.backward == Price()
    assert "backward" not in fit.error and fit.count["forward"] == 1
