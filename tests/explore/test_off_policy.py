"""Values of other policies: formulas against loops, unbiased, intervals that cover; files say what arrays say."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hmoe_rec import cli
from hmoe_rec.explore.log_file import Columns, evaluate_log
from hmoe_rec.explore.off_policy import OffPolicySums
from hmoe_rec.types import DataError, SchemaError

CONTEXTS, ACTIONS = 6, 4


def world(seed: int = 0):
    """True reward rates, a logging policy, another policy and a wrong model, per context and action."""
    rng = np.random.default_rng(seed)
    rate = rng.uniform(0.05, 0.6, (CONTEXTS, ACTIONS))
    logging, other = rng.dirichlet([3.0] * ACTIONS, CONTEXTS), rng.dirichlet([0.8] * ACTIONS, CONTEXTS)
    return rate, logging, other, (rate + rng.normal(0, 0.05, rate.shape)).clip(0, 1)


def draw(rng: np.random.Generator, shape: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    rate, logging, other, model = world(seed)
    context = rng.integers(CONTEXTS, size=shape)
    cumulative = logging.cumsum(1)[context]
    action = (rng.random(shape)[..., None] > cumulative[..., :-1]).sum(-1)
    return {
        "reward": (rng.random(shape) < rate[context, action]).astype(float),
        "propensity": logging[context, action],
        "target": other[context, action],
        "shown_value": model[context, action],
        "target_value": (other * model).sum(1)[context],
    }


def truth(seed: int = 0) -> float:
    rate, _, other, _ = world(seed)
    return float((rate * other).sum(1).mean())


def test_values_are_those_of_loops():
    log = draw(np.random.default_rng(1), (50,))
    sums = OffPolicySums(clip=2.0)
    for rows in np.array_split(np.arange(50), 3):
        sums.add(**{name: x[rows] for name, x in log.items()})
    w = [min(q / p, 2.0) for q, p in zip(log["target"], log["propensity"], strict=True)]
    wr = [a * r for a, r in zip(w, log["reward"], strict=True)]
    dr = [v + a * (r - m) for v, a, r, m in zip(log["target_value"], w, log["reward"], log["shown_value"], strict=True)]
    found = sums.values()
    assert found["ips"].value == pytest.approx(sum(wr) / 50)
    assert found["ips"].std_error == pytest.approx(np.std(wr, ddof=1) / 50**0.5)
    assert found["dr"].value == pytest.approx(sum(dr) / 50)
    assert found["dr"].std_error == pytest.approx(np.std(dr, ddof=1) / 50**0.5)
    snips = sum(wr) / sum(w)
    residual = sum((a * (r - snips)) ** 2 for a, r in zip(w, log["reward"], strict=True))
    assert found["snips"].value == pytest.approx(snips)
    assert found["snips"].std_error == pytest.approx((residual / sum(w) ** 2 * 50 / 49) ** 0.5)
    diagnosis = sums.diagnosis()
    assert diagnosis["effective_rows"] == pytest.approx(sum(w) ** 2 / sum(a * a for a in w))
    assert diagnosis["clipped"] == pytest.approx(np.mean(log["target"] / log["propensity"] > 2))
    assert diagnosis["largest_weight"] == pytest.approx((log["target"] / log["propensity"]).max())


def test_estimates_are_unbiased_and_their_intervals_cover_the_truth():
    """2,000 logs of 1,000 choices: the mean of the estimates is the true value within three standard errors, 95 % of
    the intervals hold it (a share of 2,000 has a standard error of .005)."""
    sums = OffPolicySums(shape=(2000,))
    rng = np.random.default_rng(3)
    for _ in range(2):
        sums.add(**draw(rng, (2000, 500)))
    values = sums.values()
    for name, value in values.items():
        error = value.value.std(ddof=1) / 2000**0.5
        assert abs(value.value.mean() - truth()) < 3 * error + (5e-4 if name == "snips" else 0), name
        covered = ((value.low <= truth()) & (truth() <= value.high)).mean()
        assert 0.935 < covered < 0.965, (name, covered)
        assert value.std_error.mean() == pytest.approx(value.value.std(ddof=1), rel=0.05)
    spread = {name: value.value.std() for name, value in values.items()}
    assert spread["dr"] < spread["snips"] < spread["ips"], "a model, even a wrong one, makes it more exact"


def test_clipping_lowers_the_variance_and_the_value():
    log, found = draw(np.random.default_rng(4), (200, 1000)), {}
    for clip in (None, 1.0):
        sums = OffPolicySums(clip=clip, shape=(200,))
        sums.add(**log)
        found[clip] = sums.values()["ips"].value
    assert sums.diagnosis()["mean_weight"].mean() == pytest.approx(1, abs=0.01), (
        "propensities are right, clipped or not"
    )
    assert found[1.0].mean() < truth() - 0.02 and found[1.0].std() < found[None].std()


def test_the_log_of_the_policy_itself_has_its_mean_reward():
    log = draw(np.random.default_rng(5), (300,))
    sums = OffPolicySums()
    sums.add(log["reward"], log["propensity"], log["propensity"])
    for name in ("ips", "snips"):
        assert sums.values()[name].value == pytest.approx(log["reward"].mean())
    assert "dr" not in sums.values()
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        sums.add(log["reward"], np.zeros(300), log["target"])
    with pytest.raises(ValueError, match="target probability"):
        sums.add(log["reward"], log["propensity"], log["target"] + 1)


def write(folder: Path, **changes) -> str:
    log = draw(np.random.default_rng(6), (1000,)) | {"ad": np.arange(1000) % 4, "new_ad": np.arange(1000) % 3}
    pq.write_table(pa.table(log | changes), folder / "log.parquet", row_group_size=130)
    return str(folder / "log.parquet")


COLUMNS = Columns("reward", "propensity", "target", shown_value="shown_value", target_value="target_value")


def test_a_file_says_what_the_arrays_say(tmp_path, monkeypatch):
    monkeypatch.setattr("hmoe_rec.explore.log_file.ROWS", 170)
    path = write(tmp_path)
    log = draw(np.random.default_rng(6), (1000,))
    expected = OffPolicySums()
    expected.add(**log)
    found = evaluate_log([path, path], COLUMNS)
    assert found.sums["n"] == 2000
    for name, value in expected.values().items():
        assert found.values()[name].value == pytest.approx(value.value)
    deterministic = evaluate_log([path], Columns("reward", "propensity", action="ad", target_action="new_ad"))
    same = (np.arange(1000) % 4 == np.arange(1000) % 3) / log["propensity"] * log["reward"]
    assert deterministic.values()["ips"].value == pytest.approx(same.mean())


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"propensity": np.r_[np.full(999, 0.5), 0.0]}, DataError, "row 999, column propensity: got 0.0, expected"),
        ({"target": np.full(1000, 1.5)}, DataError, "row 0, column target: got 1.5"),
        ({"reward": pa.array([None] + [1.0] * 999)}, DataError, "row 0, column reward: got None"),
        ({"reward": ["x"] * 1000}, SchemaError, "column 'reward' is string; expected a number"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_named(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        evaluate_log([write(tmp_path, **changes)], COLUMNS)


def test_actions_that_cannot_be_compared_are_named(tmp_path):
    columns = Columns("reward", "propensity", action="ad", target_action="new_ad")
    with pytest.raises(SchemaError, match=r"'ad' \(int64\) and 'new_ad' \(string\) cannot be compared"):
        evaluate_log([write(tmp_path, new_ad=[str(i % 3) for i in range(1000)])], columns)
    with pytest.raises(SchemaError, match=r"'ad' \(uint64\) and 'new_ad' \(int64\) cannot be compared"):
        evaluate_log([write(tmp_path, ad=np.full(1000, 2**63 + 5, np.uint64))], columns)


def test_files_that_are_not_there_and_columns_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        evaluate_log([str(tmp_path / "no.parquet")], COLUMNS)
    with pytest.raises(SchemaError, match="did you mean 'propensity'"):
        evaluate_log([write(tmp_path)], Columns("reward", "propensiti", "target"))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["explore", "ope", *arguments])
    return int(end.value.code or 0)


def test_the_command_prints_a_table_or_json_and_tells_what_is_missing(tmp_path, capsys):
    path = write(tmp_path)
    assert run(path, "--target", "target", "--clip", "5", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown["values"]) == {"ips", "snips"} and shown["rows"] == 1000
    model = ("--shown-value", "shown_value", "--target-value", "target_value")
    assert run(path, "--target", "target", *model) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("ips", "snips", "dr", "1,000 choices"))
    assert run(path, "--action", "ad", "--target-action", "new_ad") == 0
    for wrong in ((), ("--target", "target", "--target-action", "ad"), ("--target", "target", *model[:2])):
        assert run(path, *wrong) == 2
    assert "DR needs both" in capsys.readouterr().err
