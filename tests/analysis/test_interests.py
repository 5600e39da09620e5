"""Entanglement, gates and negative transfer: measures against naive references, planted truths, reports of runs."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gloo import run_ranks
from numbers_of_sections import leaves
from small_run import make_log, run_file
from typer.testing import CliRunner

from hmoe_rec.analysis.entanglement import (
    PairVectors,
    _verdicts,
    analyze_entanglement,
    by_task,
    conflicts_by_label,
    conflicts_by_percentile,
    kolmogorov_smirnov,
    measure,
    nearer_probability,
    read_pairs,
    smoothed_rates,
)
from hmoe_rec.analysis.gates import GateUsage, analyze_gates
from hmoe_rec.analysis.opening import load, opened
from hmoe_rec.analysis.report import Plot, Section, new_figure, side_by_side, write_section
from hmoe_rec.analysis.transfer import (
    Feedback,
    Scored,
    count_feedback,
    delong,
    resolve_names,
    score_rows,
    transfer_section,
)
from hmoe_rec.commands.analyze import app as analyze_app
from hmoe_rec.config import resolve_config
from hmoe_rec.metrics.auc import exact_auc
from hmoe_rec.metrics.spectrum import linear_cka
from hmoe_rec.sharding.process import process_group
from hmoe_rec.training.learned import training_data
from hmoe_rec.training.trainer import train
from hmoe_rec.types import ConfigError

B, E, H, T = 40, 3, 5, 2
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """The same log by STEM and by a shared bottom."""
    folder = tmp_path_factory.mktemp("interests")
    make_log(folder)
    for preset in ("stem", "shared_bottom"):
        given = run_file(folder, preset, max_steps=5)
        given["model"]["preset"] = preset
        train(resolve_config(given))
    return [folder / "stem", folder / "shared_bottom"]


# ------------------------------------------------------------------------------------------------------- entanglement


def test_independent_scores_give_16_percent_and_equal_ones_none():
    a, b = RNG.random((2, 100_000))
    found = conflicts_by_percentile(a, b)
    assert found.first.mean() == pytest.approx(0.16, abs=0.005) == found.second.mean()
    assert not (found.first & found.second).any()
    same = conflicts_by_percentile(a, a)
    assert not same.first.any() and not same.second.any()
    with pytest.raises(ValueError, match="low 0.7 and high 0.6"):
        conflicts_by_percentile(a, b, low=0.7)


def test_pairs_by_label_leave_out_missing_ones():
    nan = float("nan")
    found = conflicts_by_label(np.array([1, 1, 0, nan, 1]), np.array([0, 1, 1, 0, nan]))
    assert found.first.tolist() == [True, False, False, False, False]
    assert found.second.tolist() == [False, False, True, False, False]


def test_rates_are_pulled_to_the_mean():
    ids, labels = np.array([7, 7, 9, 9, 9]), np.array([1.0, 0, 0, 0, float("nan")])
    np.testing.assert_allclose(smoothed_rates(ids, labels, prior_examples=2), [1.5 / 4] * 2 + [0.5 / 4] * 3)


def test_distances_of_distributions_equal_their_definitions():
    x, y = RNG.integers(0, 6, 31).astype(float), RNG.integers(1, 8, 23).astype(float)  # with ties
    pairs = [(a < b) + 0.5 * (a == b) for a, b in product(x, y)]
    assert nearer_probability(x, y) == pytest.approx(np.mean(pairs))
    assert kolmogorov_smirnov(x, y) == pytest.approx(max(abs((x <= v).mean() - (y <= v).mean()) for v in range(9)))
    assert kolmogorov_smirnov(x, x) == 0 and nearer_probability(x, x) == pytest.approx(0.5)
    assert kolmogorov_smirnov(x, x + 100) == 1 == nearer_probability(x, x + 100)
    assert np.isnan(kolmogorov_smirnov(x, x[:0])) and np.isnan(nearer_probability(x[:0], x))


def test_planted_interests_are_apart_in_own_sets_and_overlap_in_a_shared_one():
    """Users and items have a taste per task; own sets hold one task's, the shared set the mean of both."""
    rows, d = 4000, 8
    tastes = RNG.normal(size=(2, rows, d))
    items = RNG.normal(size=(rows, d))
    affinity = np.einsum("trd,rd->tr", tastes, items) / d**0.5
    labels = (RNG.random((rows, 2)) < 1 / (1 + np.exp(-3 * affinity.T))).astype(float)
    users = {"own_a": tastes[0], "own_b": tastes[1], "shared": tastes.mean(0)}
    pairs = PairVectors(users, dict.fromkeys(users, items), labels, labels, np.arange(rows))
    found = measure(pairs, conflicts_by_label(labels[:, 0], labels[:, 1]))
    assert found["own_a"]["cosine"]["c1_nearer"] > 0.8 and found["own_b"]["cosine"]["c1_nearer"] < 0.2
    assert abs(found["shared"]["cosine"]["c1_nearer"] - 0.5) < 0.05 and found["shared"]["cosine"]["ks"] < 0.08
    assert found["own_a"]["cosine"]["ks"] > 0.5
    nearer = by_task(pairs, ("a", "b"))
    assert nearer["own_a"]["a"] > 0.75 > 0.55 > nearer["own_a"]["b"]


def test_sets_whose_positives_are_farther_are_turned_before_they_are_compared():
    """An MLP behind the products may take either sign: both sets put C1 nearer, yet each serves another task."""
    found = {s: {"cosine": {"ks": 0.4, "c1_nearer": 0.74}} for s in ("own_a", "own_b")}
    nearer = {"own_a": {"a": 0.8, "b": 0.6}, "own_b": {"a": 0.4, "b": 0.2}}
    sentences = _verdicts(found, nearer, "a not b")
    assert "positives are the farther ones" in sentences[1] and "farther" not in sentences[0]
    assert "up to 0.48" in sentences[2] and "keep the interests apart" in sentences[2]
    same = _verdicts(found, {"own_a": nearer["own_a"], "own_b": nearer["own_a"]}, "a not b")
    assert "up to 0.00" in same[2] and "say much the same" in same[2]
    noise = _verdicts(found, {"own_a": {"a": 0.47}, "own_b": {"a": float("nan")}}, "a not b")
    assert "farther ones" not in " ".join(noise[:2])


def test_report_on_entanglement(runs, tmp_path):
    with opened(str(runs[0])) as run:
        found = analyze_entanglement(run, run.uris(), rule="labels")
        assert found.numbers["user"] == "user_id" and found.numbers["item"] == "item_id"
        labels = np.concatenate([b.labels.numpy() for b in run.batches(run.uris())])
        assert found.numbers["pairs"]["c1"] == int(conflicts_by_label(labels[:, 0], labels[:, 1]).first.sum())
        assert set(found.numbers["sets"]) == set(run.model.encoders)
        for wrong, message in (
            ({"tasks": ("click", "lick")}, "unknown task 'lick'"),
            ({"tasks": ("click", "click")}, "two different tasks"),
            ({"item": "price"}, "price"),
        ):
            with pytest.raises(ConfigError, match=message):
                analyze_entanglement(run, run.uris(), **wrong)
    write_section(found, str(tmp_path))
    assert len(list(tmp_path.glob("entanglement_*.png"))) == 2
    assert "no expert there takes inner products" in (tmp_path / "report.html").read_text()


PARTS = {"user_id": 0, "item_id": 1, "city": 1}
MEETING = {
    "gwpfm": [{"kind": "gwpfm", "num_parts": 2, "parts": PARTS}],
    "fmfm": [{"kind": "fmfm"}],
    "fmfm pairs": [{"kind": "fmfm", "output": "pairs"}],
    "fwfm": [{"kind": "fwfm", "output": "pairs"}],
    "two": [{"kind": "gwpfm", "num_parts": 2, "parts": PARTS}, {"kind": "flat_dnn"}, {"kind": "ipnn"}],
}


def planted_log(folder: Path, rows: int = 1500) -> tuple[torch.Tensor, torch.Tensor]:
    """-> tastes of users [37, 4] and of items [23, 4]; their inner product decides click, and like by its reverse."""
    make_log(folder)
    rng = np.random.default_rng(1)
    users, items = rng.normal(size=(37, 4)), rng.normal(size=(23, 4))
    users, items = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (users, items))
    u, i = rng.integers(0, 37, rows), rng.integers(0, 23, rows)
    logit = 7 * (users[u] * items[i]).sum(1)
    click, like = (rng.random(rows) < 1 / (1 + np.exp(-s * logit)) for s in (1, -1))
    columns = {"user_id": u, "item_id": i, "city": ["x"] * rows, "click": click.astype("i1"), "like": like.astype("f8")}
    pq.write_table(pa.table(columns | {"weight": np.ones(rows)}), folder / "planted.parquet")
    return torch.tensor(users).float(), torch.tensor(items).float()


def plant(run, kind: str, users: torch.Tensor, items: torch.Tensor) -> None:
    """Tables of the run whose vectors that meet are the tastes, and say nothing as a whole."""
    noise = torch.Generator().manual_seed(3)
    user_ND, item_ND = (torch.randn(len(x), 8, generator=noise) for x in (users, items))
    interaction = next(iter(run.model.experts.experts.values())).interaction
    if kind in ("gwpfm", "two"):  # the user's part for the item's part 1, the item's for the user's part 0
        user_ND[:, 4:], item_ND[:, :4] = users, items
    elif kind == "fwfm":  # a pair's weight below 0: positives are far apart as a whole
        user_ND, item_ND = torch.cat([-users] * 2, 1), torch.cat([items] * 2, 1)
        interaction.weight[0] = -0.5
    else:  # a quarter turn: what meets is (taste, taste), a whole user is (taste, -taste)
        zero, one = torch.zeros(4, 4), torch.eye(4)
        interaction.weight[0] = torch.cat([torch.cat([zero, one], 1), torch.cat([-one, zero], 1)])
        user_ND, item_ND = torch.cat([users, -users], 1), torch.cat([items] * 2, 1)
    for field, values in (("user_id", user_ND), ("item_id", item_ND)):
        table = next(p for name, p in run.model.embedding.named_parameters() if f"__{field}" in name)
        table.copy_(values)


@pytest.mark.parametrize("kind", list(MEETING))
def test_distances_are_between_the_vectors_that_meet(kind, tmp_path):
    """A set that separates is found to by the vectors that its expert multiplies; whole vectors say nothing of it, or
    where the pair's weight is below 0 the reverse."""
    users, items = planted_log(tmp_path)
    given = run_file(tmp_path, max_steps=1)
    kept = ("ids", "tasks", "weight")
    given["data"]["schema"] = {name: value for name, value in given["data"]["schema"].items() if name in kept}
    experts = {f"e{n}": {"set": "s", **options} for n, options in enumerate(MEETING[kind])}
    routes = {task: dict.fromkeys(experts, "train") for task in ("click", "like")}
    given["model"] = {"expert_dim": 12, "sets": {"s": {"dim": 8}}, "experts": experts, "routes": routes}
    train(resolve_config(given))
    with opened(str(tmp_path / "run")) as run, torch.no_grad():
        plant(run, kind, users, items)
        uris = run.uris(str(tmp_path / "planted.parquet"))
        found = analyze_entanglement(run, uris, user="user_id", item="item_id", rule="labels")
        pairs = read_pairs(run, uris, "user_id", "item_id")
        fields = [run.model.represent(batch)[0]["s"][batch.weights > 0] for batch in run.batches(uris)]
    names = {"two": ["s", "s: e2"]}.get(kind, ["s"])
    numbers = found.numbers
    assert list(numbers["sets"]) == list(numbers["measured"]) == names
    assert numbers["sets"]["s"]["cosine"]["c1_nearer"] > 0.9 and numbers["positives_nearer"]["s"]["click"] > 0.85
    whole_BFD = torch.cat(fields).numpy()
    whole = PairVectors({"s": whole_BFD[:, 0]}, {"s": whole_BFD[:, 1]}, pairs.labels, pairs.scores, pairs.item_ids)
    by_whole = measure(whole, conflicts_by_label(*pairs.labels.T))["s"]["cosine"]["c1_nearer"]
    assert by_whole < 0.1 if kind == "fwfm" else abs(by_whole - 0.5) < 0.15
    assert not any("no expert there" in warning for warning in found.warnings)
    if kind == "two":
        assert numbers["measured"]["s: e2"] == "whole vectors" and "part vectors" in numbers["measured"]["s"]
        assert numbers["sets"]["s: e2"]["cosine"]["c1_nearer"] == pytest.approx(by_whole)
    else:
        assert any("is measured between" in sentence for sentence in found.summary)


def test_a_set_with_nan_in_it_is_left_out_of_the_plots(runs, tmp_path):
    with opened(str(runs[0])) as run, torch.no_grad():
        for name, p in run.model.embedding.named_parameters():
            if "shared__item_id" in name:
                p[0] = float("nan")
        found = analyze_entanglement(run, run.uris(), rule="labels")
    assert np.isnan(found.numbers["sets"]["shared"]["cosine"]["ks"])
    assert not np.isnan(found.numbers["sets"]["click"]["cosine"]["ks"])
    write_section(found, str(tmp_path))
    assert len(list(tmp_path.glob("entanglement_*.png"))) == 2


def test_rows_without_an_item_are_no_pairs(runs, tmp_path):
    table = pq.read_table(runs[0].parent / "test.parquet")
    items = table["item_id"].to_pylist()
    some = [None if i < 160 or i % 3 == 0 else item for i, item in enumerate(items)]  # none at all in the first batch
    pq.write_table(table.set_column(1, "item_id", pa.array(some, pa.int64())), tmp_path / "some.parquet")
    with opened(str(runs[0])) as run:
        pairs = read_pairs(run, run.uris(str(tmp_path / "some.parquet")), "user_id", "item_id")
    assert pairs.item_ids.tolist() == [item for item in some if item is not None]
    assert len(pairs.labels) == len(pairs.users["shared"]) == len(pairs.item_ids)


def test_several_runs_are_side_by_side(runs, tmp_path):
    options = ["--rows", "200", "--out", str(tmp_path)]
    for command in ("entanglement", "gates", "calibration"):
        limit = options if command != "calibration" else options[2:]
        result = CliRunner().invoke(analyze_app, [command, *map(str, runs), *limit])
        assert result.exit_code == 0, result.output
        content = json.loads((tmp_path / f"{command}.json").read_text())
        assert content["source"]["run"] == ["stem", "shared_bottom"] and len(content["source"]["step"]) == 2
        assert list(content["numbers"]["runs"]) == ["stem", "shared_bottom"]
        assert {line.partition(":")[0] for line in content["summary"]} == {"stem", "shared_bottom"}
        assert {row[0] for t in content["tables"] for row in t["rows"]} == {"stem", "shared_bottom"}
        assert all(t["header"][0] == "run" and t["left"] >= 2 for t in content["tables"])
        assert len({p["file"] for p in content["plots"]}) == len(content["plots"]) >= 2
    assert (tmp_path / "report.html").read_text().count("<img") == len(list(tmp_path.glob("*.png")))
    alone = side_by_side({"stem": Section("x", "X", ["a sentence"])})
    assert list(alone.summary) == ["a sentence"]


def test_a_plot_named_after_a_column_is_one_file_of_the_directory(tmp_path):
    figure, _ = new_figure(1, 1)
    write_section(Section("x", "X", [], plots=[Plot("by_day/hour", "a caption", figure)]), str(tmp_path))
    assert [p.name for p in tmp_path.rglob("*.png")] == ["x_by_day-hour.png"]


# -------------------------------------------------------------------------------------------------------------- gates


def test_gate_usage_is_the_mean_over_examples():
    gates, h, weights = torch.rand(T, B, E).softmax(2), torch.randn(E, B, H), torch.rand(B).round(decimals=1)
    h[1, :, 2:4] = 0
    slices = torch.randint(0, 2, (B,))
    usage = GateUsage(T, E, H, 2)
    for rows in torch.arange(B).split(13):
        usage.update(slices[rows], weights[rows], gates[:, rows], h[:, rows])
    w = weights.double()
    mean = (gates.double() * w[:, None]).sum(1) / w.sum()
    torch.testing.assert_close(usage.mean(), mean)
    one = slices == 1
    torch.testing.assert_close(usage.mean(1), (gates[:, one].double() * w[one, None]).sum(1) / w[one].sum())
    spread = ((gates.double() - mean[:, None]).square() * w[:, None]).sum(1) / w.sum()
    torch.testing.assert_close(usage.deviation(), spread.sqrt(), rtol=1e-6, atol=1e-8)
    assert usage.dead_units().tolist() == pytest.approx([0, 0.4, 0])
    centered = [(x.double() - (w[:, None] * x).sum(0) / w.sum()) * w.sqrt()[:, None] for x in h]
    expected = linear_cka(centered[0].T @ centered[0], centered[2].T @ centered[2], centered[0].T @ centered[2])
    torch.testing.assert_close(usage.similarity()[0, 2], expected)
    torch.testing.assert_close(usage.similarity().diagonal(), torch.ones(E, dtype=torch.float64))


def test_units_beyond_those_whose_likeness_is_measured_are_not_dead(monkeypatch):
    monkeypatch.setattr("hmoe_rec.analysis.gates.MAX_UNITS", 2 * E)
    h = torch.rand(E, B, H)
    h[1, :, :3] = 0
    usage = GateUsage(T, E, H)
    usage.update(torch.zeros(B, dtype=torch.int64), torch.ones(B), torch.ones(T, B, E) / E, h)
    assert usage.dead_units().tolist() == pytest.approx([0, 0.6, 0])
    assert usage.gram_UU.shape == (2 * E, 2 * E) and usage.similarity().shape == (E, E)


def test_experts_that_say_the_same_to_all_examples_are_like_no_other():
    h = torch.rand(E, B, H)
    h[1:] = torch.rand(2, 1, H)
    usage = GateUsage(T, E, H)
    usage.update(torch.zeros(B, dtype=torch.int64), torch.rand(B), torch.ones(T, B, E) / E, h)
    alike = usage.similarity()
    assert float(alike[0, 0]) == pytest.approx(1) and alike[1:].isnan().all() and alike[:, 1:].isnan().all()


def test_report_on_gates(runs, tmp_path):
    with opened(str(runs[0])) as run:
        found = analyze_gates(run, run.uris(), by="city")
        for task, weights in found.numbers["mean"].items():
            assert sum(weights.values()) == pytest.approx(1), task
        assert set(found.numbers["slices"]) == {"click", "like"}
    write_section(found, str(tmp_path))
    assert "click reads" in (tmp_path / "report.html").read_text()
    with opened(str(runs[1])) as run:  # one expert, no gate
        assert analyze_gates(run, run.uris()).numbers["mean"]["click"] == {next(iter(found_experts(run))): 1.0}


def found_experts(run) -> list[str]:
    return [spec.name for spec in run.config.layout().experts]


# ----------------------------------------------------------------------------------------------------------- transfer


def test_delong_is_the_auc_and_its_error_that_of_resampling():
    rows = 400
    labels = RNG.random(rows) < 0.4
    first = labels + RNG.normal(0, 1.2, rows)
    second = 0.6 * first + RNG.normal(0, 0.8, rows).round(1)
    found = delong(first, second, labels)
    for auc, score in zip(found.auc, (first, second), strict=True):
        assert auc == pytest.approx(exact_auc(torch.tensor(score), torch.tensor(labels).double()))
    assert found.difference == pytest.approx(found.auc[1] - found.auc[0])
    draws = []
    for _ in range(400):
        i = RNG.integers(0, rows, rows)
        a, b = (exact_auc(torch.tensor(s[i]), torch.tensor(labels[i]).double()) for s in (first, second))
        draws.append(b - a)
    assert found.error == pytest.approx(np.std(draws), rel=0.15)
    assert delong(first, first, labels).error == 0
    assert np.isnan(delong(first, second, np.zeros(rows, bool)).difference)


def test_scores_that_are_nan_are_no_ties():
    positive, scores, broken = np.arange(40) % 3 == 0, RNG.random(40), RNG.random(40)
    broken[7] = float("nan")
    found = delong(scores, broken, positive)
    assert found.auc[0] == delong(scores, scores, positive).auc[0]
    assert np.isnan([found.auc[1], found.difference, found.error]).all()
    assert np.isnan([kolmogorov_smirnov(scores, broken), nearer_probability(broken, scores)]).all()
    feedback = Feedback(np.array([0]), np.array([[9.0, 0]]), (0.5, 0.5))
    labels = np.stack([positive, positive], 1).astype(float)
    runs = [
        Scored(name, ("a", "b"), np.stack([s, s], 1), labels, np.zeros(40, int), np.ones(40, bool))
        for name, s in (("sound", scores), ("broken", broken))
    ]
    sentences = transfer_section(runs, feedback, ("a", "b"), "item").summary
    assert all("broken against sound: nothing to compare" in s for s in sentences)


def test_subsets_compare_feedback_with_the_overall_rates():
    feedback = Feedback(np.array([2, 5, 8]), np.array([[9.0, 1], [4, 2], [0, 3]]), (0.2, 0.1))
    # Relative to the rates: id 2 has 45 : 10, id 5 20 : 20, id 8 0 : 30; id 6 has none.
    assert feedback.subset(np.array([8, 2, 5, 6, 9])).tolist() == [2, 0, 1, 3, 3]


def test_rows_without_an_id_have_no_feedback():
    """Not that of id 0, which their place is filled with."""
    ids, has_id = np.array([0, 0, 4]), np.array([True, False, True])
    scored = Scored("run", ("a", "b"), RNG.random((3, 2)), np.ones((3, 2)), ids, has_id)
    feedback = Feedback(np.array([0]), np.array([[9.0, 0]]), (0.5, 0.5))
    rows = transfer_section([scored], feedback, ("a", "b"), "item").numbers["rows"]
    assert rows == {"mostly a": 1, "comparable": 0, "mostly b": 0, "no feedback": 2}


def test_report_on_transfer(runs, tmp_path):
    stem, shared = map(str, runs)
    with process_group() as process:
        first = load(stem, process)
        tasks, field = resolve_names(first.config, None, None)
        assert (tasks, field) == (("click", "like"), "item_id")
        feedback = count_feedback(first.config, process, training_data(first.config), field, (0, 1))
        rows = [b for b in first.batches(training_data(first.config))]
        labels = np.concatenate([b.labels.numpy() for b in rows])
        items = np.concatenate([b.sparse["item_id"].values().numpy() for b in rows])
        for k, item in enumerate(feedback.ids):
            assert feedback.positives[k].tolist() == np.nansum(labels[items == item], 0).tolist()
        scored = [score_rows(load(d, process), n, first.uris(), field) for d, n in ((stem, "stem"), (shared, "shared"))]
        found = transfer_section(scored, feedback, tasks, field)
        with pytest.raises(ConfigError, match="read different rows"):
            other = score_rows(first, "other", training_data(first.config), field)
            transfer_section([scored[0], other], feedback, tasks, field)
        with pytest.raises(ConfigError, match="id field"):
            resolve_names(first.config, None, "price")
    assert sum(found.numbers["rows"].values()) == 300
    whole = found.numbers["auc"]["click"]["shared"]["all"]
    y = torch.tensor(scored[1].labels[:, 0])
    assert whole["auc"][1] == pytest.approx(exact_auc(torch.tensor(scored[1].scores[:, 0]), y))
    write_section(found, str(tmp_path))
    assert json.loads((tmp_path / "transfer.json").read_text())["plots"]


# ---------------------------------------------------------------------------------------------------- several processes


def numbers_of(rank: int, world_size: int, run_dir: str) -> list[dict]:
    with opened(run_dir) as run:
        uris = run.uris()
        feedback = count_feedback(run.config, run.process, training_data(run.config), "item_id", (0, 1))
        scored = score_rows(run, "run", uris, "item_id")
        sections = [
            analyze_entanglement(run, uris),
            analyze_gates(run, uris),
            transfer_section([scored], feedback, ("click", "like"), "item_id"),
        ]
    return [json.loads(json.dumps(s.numbers)) for s in sections]


@pytest.mark.slow
def test_two_processes_find_the_same(runs):
    alone, (first, second) = numbers_of(0, 1, str(runs[0])), run_ranks(2, numbers_of, str(runs[0]))
    assert json.dumps(first) == json.dumps(second)
    one, two = leaves(alone), leaves(first)
    assert one.keys() == two.keys()
    # Scores differ in their last bits, which may swap a pair at the edge of a percentile.
    np.testing.assert_allclose([*one.values()], [*two.values()], rtol=1e-3, atol=1e-3)
