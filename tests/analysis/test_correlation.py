"""Behavior-target correlation: counts against loops, exact cases of the formula, and what models are known to learn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo import run_ranks
from small_run import make_log, run_file

from hmoe_rec.analysis.correlation import (
    BehaviorCounts,
    Examples,
    bias_of_information,
    learned_correlation,
    mutual_information,
    pearson,
    permutation_p_values,
    positions_of,
)
from hmoe_rec.analysis.correlation_report import (
    Correlation,
    Question,
    choose_categories,
    correlate,
    correlation_section,
    question_of,
)
from hmoe_rec.analysis.opening import opened
from hmoe_rec.analysis.report import write_section
from hmoe_rec.config import resolve_config
from hmoe_rec.encoding.din import DIN
from hmoe_rec.encoding.pooling import MeanPooling, TargetAttention
from hmoe_rec.encoding.sasrec import SASRec
from hmoe_rec.encoding.temporal_interest import TIM
from hmoe_rec.training.trainer import train
from hmoe_rec.types import ConfigError

C, D, P = 4, 6, 5


def bits(*counts: float) -> float:
    return mutual_information(*(torch.tensor(float(c)) for c in counts)).item()


def test_exact_cases():
    assert bits(40, 10, 50, 50) == pytest.approx(0.278072, abs=1e-6)
    assert bits(25, 25, 50, 50) == pytest.approx(0, abs=1e-12)
    assert bits(0, 0, 50, 50) == pytest.approx(0, abs=1e-6)
    assert bits(10, 40, 50, 50) == pytest.approx(bits(40, 10, 50, 50))
    assert bits(50, 0, 50, 50) == pytest.approx(1, abs=1e-5)
    assert bits(0, 0, 0, 0) == 0


def test_pearson_of_the_published_rows():
    """The row of category 674 of Amazon Electronics: mutual information and TIN's map, rounded."""
    truth = torch.tensor([1, 0.48, 0.30, 0.27, 0.23, 0.22, 0.18, 0.19, 0.17, 0.12])
    tin = torch.tensor([1, 0.52, 0.28, 0.15, 0.11, 0.11, 0.09, 0.07, 0.06, 0.05])
    assert pearson(truth, tin) == pytest.approx(0.989, abs=1e-3)
    assert pearson(truth, torch.full((10,), 0.3)) == 0


def test_what_is_not_a_number_is_no_flat_map():
    broken = torch.randn(3, D)
    broken[1, 0] = float("nan")
    shown = learned_correlation(TargetAttention(D, P, False), broken, broken[0], slots=P, dims=slice(None), ages_P=None)
    assert shown.isnan().all() and np.isnan(pearson(shown, torch.rand(3, P)))


def naive_counts(targets, categories, a, histories, y):
    hits, everything = np.zeros((len(targets), len(categories), P, 2)), np.zeros((len(targets), 2))
    for target, history, label in zip(a, histories, y, strict=True):
        if target not in targets or np.isnan(label):
            continue
        i = targets.index(target)
        everything[i] += (label, 1 - label)
        for p, c in enumerate(reversed(history)):
            if p < P and c in categories:
                hits[i, categories.index(c), p] += (label, 1 - label)
    return hits, everything


def test_counts_are_those_of_a_loop_in_any_batches():
    rng = np.random.default_rng(1)
    rows = 300
    a, y = rng.integers(0, 5, rows), rng.integers(0, 2, rows).astype(float)
    y[rng.random(rows) < 0.1] = np.nan
    histories = [rng.integers(0, 7, rng.integers(0, 9)).tolist() for _ in range(rows)]
    targets, categories = [3, 0], [6, 1, 2]
    found = BehaviorCounts(torch.tensor(targets), torch.tensor(categories), P)
    for i in range(0, rows, 77):
        part = histories[i : i + 77]
        lengths = torch.tensor([len(h) for h in part])
        values = torch.tensor([c for h in part for c in h])
        target, response = torch.tensor(a[i : i + 77]), torch.tensor(y[i : i + 77])
        found.update(Examples(target, values, lengths, positions_of(lengths), response))
    hits, everything = naive_counts(targets, categories, a, histories, y)
    np.testing.assert_allclose(found.hits_ACP2, hits)
    np.testing.assert_allclose(found.all_A2, everything)
    i, c, p = 1, 2, 3
    expected = bits(*hits[i, c, p], *everything[i])
    assert found.information()[i, c, p].item() == pytest.approx(expected)
    corrected = expected - 1 / (2 * np.log(2) * everything[i].sum())
    assert found.information(unbiased=True)[i, c, p].item() == pytest.approx(corrected)


def test_in_an_age_bucket_a_category_counts_once():
    found = BehaviorCounts(torch.tensor([7]), torch.tensor([1, 2]), 2)
    slots = torch.tensor([0, 0, 1, 5])
    found.update(
        Examples(torch.tensor([7]), torch.tensor([1, 1, 2, 1]), torch.tensor([4]), slots, torch.tensor([0.25]))
    )
    assert found.hits_ACP2[0, :, :, 0].tolist() == [[0.25, 0], [0, 0.25]]
    assert found.all_A2.tolist() == [[0.25, 0.75]]


def test_bias_and_significance_of_independent_responses():
    rng = np.random.default_rng(0)
    size, cells = 400, 3000
    t_pos = 130
    n_pos = rng.hypergeometric(t_pos, size - t_pos, 60, cells)
    known = (torch.tensor(n_pos), torch.tensor(60 - n_pos), torch.tensor(t_pos), torch.tensor(size - t_pos))
    plain = mutual_information(*known)
    assert plain.mean().item() == pytest.approx(bias_of_information(*known)[0].item(), rel=0.1)
    p_values = permutation_p_values(*(x[:400] if x.dim() else x for x in known), draws=199)
    assert 0.02 < (p_values <= 0.05).float().mean().item() < 0.08 and p_values.min() > 0
    strong = permutation_p_values(*(torch.tensor([x]) for x in (50, 10, 130, 270)), draws=199)
    assert strong.item() == pytest.approx(1 / 200)


def test_the_mean_of_unbiased_information_of_independent_data_is_zero():
    """Over 600 cells of 40 targets; raised to 0, its mean would be seven standard errors above it. A category that
    never comes says 0, not less."""
    rng = np.random.default_rng(4)
    rows, categories = 30_000, 5
    found = BehaviorCounts(torch.arange(40), torch.arange(categories + 1), 3)
    lengths = torch.full((rows,), 3)
    values = torch.from_numpy(rng.integers(0, categories, 3 * rows))
    response = torch.from_numpy((rng.random(rows) < 0.3).astype(float))
    found.update(
        Examples(torch.from_numpy(rng.integers(0, 40, rows)), values, lengths, positions_of(lengths), response)
    )
    bits = found.information(unbiased=True)
    assert (bits[:, categories] > -1e-9).all()
    cells = bits[:, :categories].flatten()
    error = cells.std() / len(cells) ** 0.5
    assert cells.mean().abs() < 3 * error and cells.clamp(min=0).mean() > 7 * error


def learned(pooling, dims=slice(None), ages=None):
    generator = torch.Generator().manual_seed(2)
    categories, target = torch.randn(C, D, generator=generator), torch.randn(D, generator=generator)
    return learned_correlation(pooling, categories, target, slots=P, dims=dims, ages_P=ages), categories, target


@pytest.mark.parametrize("kind", [MeanPooling, TargetAttention, DIN])
def test_without_positions_maps_are_flat_in_them(kind):
    shown, *_ = learned(kind(D, P, False))
    torch.testing.assert_close(shown, shown[:, :1].expand(-1, P))
    assert shown.std() > 0 and pearson(shown[0], torch.arange(P)) == 0


def test_tim_is_the_official_map():
    tim = TIM(D, P, False, clock="position")
    dims = slice(2, 5)
    shown, categories, target = learned(tim, dims)
    table = tim.tables["position"].detach()
    e = (categories[:, None] + table[1 : P + 1])[..., dims].double()  # position 1 = the latest
    v = (target + table[0])[dims].double()
    logits, norms = e @ v, (e * v).norm(dim=2)
    z = (logits - logits.mean()) / logits.std(correction=0)
    grid = z.flatten().softmax(0).view_as(z) * norms
    expected = (grid - grid.min()) / (grid.max() - grid.min())
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-5)


def test_times_take_the_place_of_positions():
    tim = TIM(D, P, True, clock="time")
    ages = torch.tensor([0.0, 100, 1e4, 1e6, 1e8])
    shown, *_ = learned(tim, ages=ages)
    same, *_ = learned(tim, ages=torch.zeros(P))
    assert shown.std(1).min() > 0 and same.std(1).max() < 1e-6
    assert learned(SASRec(D, P, False))[0].std(1).min() > 0


# ----------------------------------------------------------------------------------------------------------- of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("correlation")
    make_log(folder)
    given = run_file(folder, max_steps=4)
    given["model"]["encoding"] = {"sequences": {"kind": "tim", "clock": "position"}}
    train(resolve_config(given))
    return folder / "run"


def correlated(rank: int, world_size: int, run_dir: str) -> str:
    with opened(run_dir) as run:
        question, uris = question_of(run.config, num_slots=3), run.uris()
        targets, categories = choose_categories(run, question, uris, 6)
        found = correlate(run, "run", question, uris, targets, categories, permutations=9)
        return json.dumps(correlation_section([found], question, run.source(uris)).numbers)


def test_the_truth_beside_several_runs_is_that_of_the_first():
    """Another run may see shorter histories of the same rows."""

    def found(name: str, height: float) -> Correlation:
        bits = torch.tensor([[[0.0, height, 1.0], [height, height, height]]])
        return Correlation([1], [1, 2], bits, None, {"data": bits, f"{name}: x": bits}, torch.ones(1, 2))

    runs = [found("first", 0.75), found("second", 0.25)]
    question = Question("history", "hist_item", "item", "click", "position", 3)
    numbers = correlation_section(runs, question, {}).numbers
    assert numbers["maps"]["data"] == numbers["bits"] == runs[0].bits.tolist()
    assert list(numbers["maps"]) == ["data", "first: x", "second: x"]


def test_what_is_no_attention_to_the_target_is_not_called_so():
    """SASRec does not read the target; a mean, and TIM without attention, weigh all behaviors alike."""
    names = {
        kind.attention_is
        for kind in (DIN(D, P, False), TargetAttention(D, P, False), TIM(D, P, False, clock="position"))
    }
    assert names == {"attention"}
    assert "no target attention" in SASRec(D, P, False).attention_is
    assert "weigh alike" in MeanPooling(D, P, False).attention_is == TIM(D, P, False, attention=False).attention_is
    targets = torch.randn(2, D, generator=torch.Generator().manual_seed(0))
    pooling = SASRec(D, P, False)
    one, other = (pooling(torch.ones(1, P, D), v[None], torch.ones(1, P).bool(), None) for v in targets)
    assert torch.equal(one.field_BD, other.field_BD)


def test_a_map_has_a_title_beside_its_key():
    bits = torch.tensor([[[0.0, 0.5, 1.0], [0.2, 0.2, 0.2]]])
    key, title = "a: attention of s", "a: products of s"
    found = Correlation([1], [1, 2], bits, None, {"data": bits, key: bits}, torch.ones(1, 2), {key: title})
    section = correlation_section([found], Question("history", "hist_item", "item", "click", "position", 3), {})
    assert list(section.numbers["maps"]) == ["data", key] and section.numbers["titles"] == {"data": "data", key: title}
    assert section.tables[0].rows[0][0] == title
    assert any(line.startswith(title) for line in section.summary) and key not in " ".join(section.summary)
    shown = [text.get_text() for plot in section.plots for axis in plot.figure.axes for text in (axis.title,)]
    assert "a\nproducts of s" in shown


def test_report_of_a_run(run, tmp_path):
    numbers = json.loads(correlated(0, 1, str(run)))
    assert numbers["question"]["column"] == "hist_item_id" and numbers["question"]["task"] == "click"
    assert set(numbers["targets"]) <= set(numbers["categories"]) and len(numbers["categories"]) == 6
    assert set(numbers["maps"]) == {"data", "run: predictions"} | {
        f"run: attention of {s}" for s in ("shared", "click", "like")
    }
    assert np.array(numbers["p_values"]).shape == (4, 6, 3)
    with opened(str(run)) as open_run:
        by_age = question_of(open_run.config, slots="age", task="like")
        found = correlate(open_run, "run", by_age, open_run.uris(), numbers["targets"], numbers["categories"])
        section = correlation_section([found], by_age, open_run.source())
        for wrong, message in (
            ({"column": "hist_itm"}, "hist_item_id"),
            ({"task": "clik"}, "did you mean 'click'"),
        ):
            with pytest.raises(ConfigError, match=message):
                question_of(open_run.config, **wrong)
    write_section(section, str(tmp_path))
    assert (tmp_path / "correlation_maps.png").stat().st_size > 5000


def test_a_run_without_sequences(run, tmp_path):
    given = run_file(run.parent)
    given["data"]["schema"] = {k: v for k, v in given["data"]["schema"].items() if k != "sequences"}
    with pytest.raises(ConfigError, match="no behavior sequence"):
        question_of(resolve_config(given))


@pytest.mark.slow
def test_two_processes_find_the_same(run):
    alone, (first, second) = correlated(0, 1, str(run)), run_ranks(2, correlated, str(run))
    assert first == second
    one, two = json.loads(alone), json.loads(first)
    assert one["targets"] == two["targets"] and one["categories"] == two["categories"]
    np.testing.assert_allclose(one["bits"], two["bits"], atol=1e-12)
    for name, values in one["maps"].items():
        np.testing.assert_allclose(values, two["maps"][name], atol=1e-4, err_msg=name)
