"""From a finished run to variances in its predictions: fitted, saved, opened, judged; and what is refused."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gloo import run_ranks
from small_run import SCHEMA, make_log, run_file

from hmoe_rec import cli
from hmoe_rec.config import resolve_config
from hmoe_rec.data.exposures import count_exposures
from hmoe_rec.serving.predictor import predict_run
from hmoe_rec.training.evaluate import evaluate_run
from hmoe_rec.training.evaluate_uncertainty import SeenIds, evaluate_uncertainty
from hmoe_rec.training.trainer import train
from hmoe_rec.training.uncertainty import fit_uncertainty
from hmoe_rec.types import CheckpointError, ConfigError, DataError

TASKS = ("click", "like")


def make_run(folder: Path, name: str, tower: dict | None = None, **train_options) -> str:
    content = run_file(folder, name, max_steps=6, **train_options)
    content["model"]["tower"] = tower or {"hidden": [10]}
    train(resolve_config(content))
    return str(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A log whose test data has row ids and items that training does not have, and true probabilities of them."""
    folder = tmp_path_factory.mktemp("uncertainty")
    make_log(folder)
    for split in ("train", "validation"):
        table = pq.read_table(folder / f"{split}.parquet")
        pq.write_table(table.filter(pa.array(table["item_id"].to_numpy() >= 3)), folder / f"{split}.parquet")
    test = pq.read_table(folder / "test.parquet")
    pq.write_table(test.append_column("row_id", pa.array(np.arange(300) * 7)), folder / "test.parquet")
    rng = np.random.default_rng(1)
    truth = {"row_id": rng.permutation(300) * 7, "click": rng.uniform(0.1, 0.9, 300), "like": rng.uniform(0, 1, 300)}
    pq.write_table(pa.table(truth), folder / "truth.parquet")
    return folder


@pytest.fixture(scope="module")
def run(folder) -> str:
    return make_run(folder, "run")


def predictions(run: str, out: Path, kind: str | None) -> dict[str, np.ndarray]:
    predict_run(run, f"{Path(run).parent}/test.parquet", str(out), uncertainty=kind)
    table = pq.read_table(out)
    assert table.column_names[2:] == [*TASKS, *(f"{t}_std" for t in TASKS if kind)]
    return {name: table[name].to_numpy() for name in table.column_names[2:]}


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p) - np.log1p(-p)


def test_variances_stand_beside_the_probabilities_which_stay(folder, run, tmp_path):
    plain = predictions(run, tmp_path / "plain.parquet", None)
    stds = {}
    for kind in ("laplace", "row_laplace"):
        assert fit_uncertainty(run, kind)["examples"] == 6 * 160  # max_steps
        found = predictions(run, tmp_path / f"{kind}.parquet", kind)
        for task in TASKS:
            np.testing.assert_allclose(found[task], plain[task], atol=1e-6)
            stds[kind, task] = found[f"{task}_std"]
            assert (stds[kind, task] > 0).all()
    assert (stds["row_laplace", "click"] > stds["laplace", "click"]).all()


def test_logits_are_those_of_a_run_in_bf16(folder, tmp_path):
    run = make_run(folder, "bf16", precision="bf16")
    plain = predictions(run, tmp_path / "plain.parquet", None)
    for kind in ("laplace", "row_laplace"):
        fit_uncertainty(run, kind)
        found = predictions(run, tmp_path / f"{kind}.parquet", kind)
        np.testing.assert_array_equal(found["click"], plain["click"])


@pytest.mark.parametrize("correction", ["logit", "weights"])
def test_what_sampling_left_out_is_not_known(folder, correction):
    """Rows and offsets of the loss are those of training, so that less data leave more variance."""
    content = run_file(folder, correction, epochs=1)
    content["data"]["sampling"] = {"negatives": 0.1, "correction": correction}
    kept = train(resolve_config(content))["sampling"]
    whole = str(folder / "train.parquet")
    fits = [fit_uncertainty(str(folder / correction), "row_laplace", row_variance=1.0, data=d) for d in (None, whole)]
    assert fits[0]["examples"] == kept["kept"] < fits[1]["examples"] == kept["rows"]


def test_positives_weigh_in_the_posterior_what_they_weigh_in_the_loss(folder):
    count_exposures(str(folder / "train.parquet"), ["item_id"], str(folder / "counted"), time="time")
    content = run_file(folder, "exposed", epochs=1)
    content["data"]["train"] = str(folder / "counted")
    propensity = {"propensity": {"table": [1.0, 5.0]}, "normalize": False}
    content["train"]["exposure"] = {"column": "shown_before", "tasks": ["click"], **propensity}
    train(resolve_config(content))
    rows = pq.read_table(folder / "counted" / "train.parquet")
    sums = []
    for data in (None, str(folder / "counted")):  # other data weigh as they are
        with np.load(fit_uncertainty(str(folder / "exposed"), "laplace", data=data)["file"]) as file:
            sums.append({task: np.trace(file[f"last.{t}"]) for t, task in enumerate(TASKS)})
    click, shown_before, weight = (rows[name].to_numpy() for name in ("click", "shown_before", "weight"))
    factor = np.where((click == 1) & (shown_before > 0), 1 / 5, 1.0)
    assert sums[0]["click"] / sums[1]["click"] == pytest.approx(np.average(factor, weights=weight), rel=0.02)
    assert sums[0]["like"] == pytest.approx(sums[1]["like"], rel=1e-5)


@pytest.mark.slow
def test_an_ensemble_is_the_spread_of_its_runs(folder, run, tmp_path):
    others = [make_run(folder, f"seed{seed}", seed=seed) for seed in (2, 3)]
    fit_uncertainty(run, "ensemble", members=[others[0], f"{others[1]}@latest"])
    found = predictions(run, tmp_path / "all.parquet", "ensemble")
    apart = [predictions(r, tmp_path / f"{i}.parquet", None) for i, r in enumerate((run, *others))]
    for task in TASKS:
        logits = np.stack([logit(p[task]) for p in apart])
        np.testing.assert_allclose(found[task], 1 / (1 + np.exp(-logits.mean(0))), atol=1e-5)
        np.testing.assert_allclose(found[f"{task}_std"], logits.std(0, ddof=1), atol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param("bootstrap", marks=pytest.mark.slow), "sngp"])
def test_towers_that_were_trained_for_it(folder, tmp_path, kind):
    run = make_run(folder, kind, {"kind": kind, "hidden": [7]})
    if kind == "sngp":
        fit_uncertainty(run, kind, prior_precision=2.0)
    found = predictions(run, tmp_path / "out.parquet", kind)
    plain = predictions(run, tmp_path / "plain.parquet", None)
    np.testing.assert_allclose(found["like"], plain["like"], atol=1e-5)
    assert (found["like_std"] > 0).all()
    with pytest.raises(ConfigError, match=f"kind laplace needs towers of kind mlp, and this run's are {kind}"):
        fit_uncertainty(run, "laplace")


def test_dropout_needs_no_fit(run, tmp_path):
    found = predictions(run, tmp_path / "out.parquet", "mc_dropout")
    assert (found["click_std"] > 0).all()


def test_evaluation_tells_log_loss_coverage_and_new_ids(folder, run):
    fit_uncertainty(run, "row_laplace", ids=["item_id", "user_id"], row_variance=2.0)
    truth = str(folder / "truth.parquet")
    found = evaluate_uncertainty(run, "row_laplace", truth=truth, new_ids="item_id")["metrics"]
    plain = evaluate_run(run)["metrics"]
    items = pq.read_table(folder / "test.parquet")["item_id"].to_numpy()
    for task in TASKS:
        assert found[task]["logloss"] == pytest.approx(plain[task]["logloss"], abs=1e-5)
        assert 0 < found[task]["coverage_50"] < found[task]["coverage_95"] <= 1
    assert found["click"]["new"] == (items < 3).sum() > 10
    assert 0 < found["click"]["new_auc"] <= 1


def test_the_prior_of_rows_is_chosen_unless_it_is_given(run, tmp_path):
    chosen = fit_uncertainty(run, "row_laplace")["row_variance"]
    assert set(chosen) == {"user_id", "item_id", "city"} and min(chosen.values()) > 1
    wide = predictions(run, tmp_path / "wide.parquet", "row_laplace")
    assert fit_uncertainty(run, "row_laplace", row_variance=1.0)["row_variance"] == 1.0
    narrow = predictions(run, tmp_path / "narrow.parquet", "row_laplace")
    assert (wide["click_std"] > narrow["click_std"]).all()


def test_true_logits_are_found_by_the_id_of_the_row(folder, run, tmp_path):
    """Of true probabilities that are the predictions, every interval holds the true logit."""
    fit_uncertainty(run, "laplace")
    predictions(run, tmp_path / "own.parquet", None)
    own = pq.read_table(tmp_path / "own.parquet").select(list(TASKS))
    order = np.random.default_rng(2).permutation(300)
    table = own.append_column("row_id", pa.array(np.arange(300) * 7)).take(order)
    pq.write_table(table, tmp_path / "truth.parquet")
    found = evaluate_uncertainty(run, "laplace", truth=str(tmp_path / "truth.parquet"))["metrics"]["click"]
    assert found["error_of_true_logit"] < 1e-4 and found["coverage_50"] == 1
    pq.write_table(table.slice(0, 100), tmp_path / "short.parquet")
    with pytest.raises(DataError, match="no true probabilities of row_id"):
        evaluate_uncertainty(run, "laplace", truth=str(tmp_path / "short.parquet"))
    two = {"row_id": [0, 7], "like": [0, 1]}
    for truth, message in (
        (table.slice(0, 0), "0 rows"),
        (pa.table({**two, "click": [0.5, None]}), "row 1, column click: got nan, expected a probability"),
        (pa.table({**two, "click": [5.0, 0.1]}), "row 0, column click: got 5.0"),
    ):
        pq.write_table(truth, tmp_path / "wrong.parquet")
        with pytest.raises(DataError, match=message):
            evaluate_uncertainty(run, "laplace", truth=str(tmp_path / "wrong.parquet"))
    with pytest.raises(DataError, match="none.parquet: true probabilities cannot be read"):
        evaluate_uncertainty(run, "laplace", truth=str(tmp_path / "none.parquet"))
    pq.write_table(table.drop_columns(["like"]), tmp_path / "less.parquet")
    with pytest.raises(DataError, match="no column 'like'"):
        evaluate_uncertainty(run, "laplace", truth=str(tmp_path / "less.parquet"))


@pytest.mark.parametrize(
    "train, test, new",
    [
        (pa.array([1, 2], pa.int64()), pa.array([2, 3, None], pa.int32()), [False, True, False]),
        (pa.array([1, 2**40], pa.int64()), pa.array([1, 3, None], pa.int32()), [False, True, False]),
        (pa.array(["a", "b"]).dictionary_encode(), pa.array(["b", "c", None]), [False, True, False]),
        (pa.array(["a", None]), pa.array(["c", "a", None]).dictionary_encode(), [True, False, False]),
    ],
    ids=["narrower", "too narrow", "dictionary in training", "dictionary in test"],
)
def test_ids_are_new_whatever_types_the_files_have(tmp_path, train, test, new):
    for i, ids in enumerate((train, train.slice(1))):
        pq.write_table(pa.table({"item": ids}), tmp_path / f"{i}.parquet")
    seen = SeenIds("item", [str(tmp_path)])
    assert seen.is_new(pa.chunked_array([test])).tolist() == new


def test_what_is_refused(folder, run, tmp_path):
    def fails(error: type, message: str, *given, **options) -> None:
        with pytest.raises(error, match=message):
            fit_uncertainty(*given, **options)

    fails(ConfigError, "expected one of laplace", run, "laplase")
    fails(ConfigError, "needs towers of kind bootstrap", run, "bootstrap")
    fails(ConfigError, "at least one more run", run, "ensemble")
    fails(ConfigError, "samples: expected at least 2", run, "mc_dropout", samples=1)
    fails(ConfigError, "row_variance: expected a finite number above 0", run, "row_laplace", row_variance=0.0)
    fails(ConfigError, "prior_precision: expected a finite", run, "laplace", prior_precision=float("nan"))
    fails(ConfigError, "'hist_item_id' is no id field", run, "row_laplace", ids=["hist_item_id"])
    fails(ConfigError, "got item_id, item_id", run, "row_laplace", ids=["item_id", "item_id"])
    fails(ConfigError, "ids: expected one field or more", run, "row_laplace", ids=[])
    fails(CheckpointError, "no checkpoint '77'", run, "laplace", checkpoint="77")
    fails(CheckpointError, "no checkpoint '77'", run, "ensemble", members=[f"{run}@77"])
    fails(
        ConfigError,
        "member .*run@6: its checkpoint .* is in the ensemble already",
        run,
        "ensemble",
        members=[f"{run}@6"],
    )
    for kind, options in (
        ("laplace", {"row_variance": 9.0}),
        ("mc_dropout", {"data": "x"}),
        ("ensemble", {"samples": 3}),
    ):
        fails(ConfigError, f"{[*options][0]}: no option of kind {kind}, whose", run, kind, **options)
    fails(ConfigError, "not a run directory", run, "ensemble", members=[str(tmp_path)])
    with pytest.raises(ConfigError, match="--new-ids: unknown single-valued id field 'item'.*did you mean 'item_id'"):
        evaluate_uncertainty(run, "mc_dropout", new_ids="item")


def test_a_task_that_is_named_like_the_std_of_another_is_refused(folder, tmp_path):
    content = run_file(folder, "names", max_steps=1)
    content["data"]["schema"] = {**SCHEMA, "tasks": [{"name": "click"}, {"name": "click_std", "label": "like"}]}
    train(resolve_config(content))
    with pytest.raises(ConfigError, match="the std of task 'click' and task 'click_std' name one column"):
        predict_run(str(folder / "names"), str(folder / "test.parquet"), str(tmp_path / "x"), uncertainty="mc_dropout")


def test_dropout_needs_something_to_drop(folder):
    content = run_file(folder, "dry", max_steps=1)
    content["model"]["dropout"] = 0.0
    train(resolve_config(content))
    with pytest.raises(ConfigError, match="nothing to drop"):
        fit_uncertainty(str(folder / "dry"), "mc_dropout")


def test_what_was_fitted_belongs_to_one_checkpoint(folder, tmp_path):
    run = make_run(folder, "fresh")
    with pytest.raises(ConfigError, match="hmoe-rec uncertainty fit .* --kind laplace --checkpoint 6"):
        predict_run(run, str(folder / "test.parquet"), str(tmp_path / "x.parquet"), uncertainty="laplace")
    file = Path(fit_uncertainty(run, "laplace")["file"])
    for manifest in Path(run).glob("checkpoints/step_*/manifest.json"):
        content = json.loads(manifest.read_text())
        next(iter(content["files"].values()))["sha256"] = "0" * 64
        manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        predict_run(run, str(folder / "test.parquet"), str(tmp_path / "x.parquet"), uncertainty="laplace")
    file.write_bytes(b"no numbers")
    with pytest.raises(CheckpointError):
        predict_run(run, str(folder / "test.parquet"), str(tmp_path / "x.parquet"), uncertainty="laplace")


def test_the_commands(folder, run, tmp_path, capsys):
    def program(*arguments: str) -> int:
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        return int(end.value.code or 0)

    assert program("uncertainty", "fit", run, "--kind", "row_laplace", "--ids", "item_id") == 0
    out = capsys.readouterr().out.replace("\n", "")
    assert "row_laplace-step_000000006.npz" in out and "times what the tables show: item_id " in out
    evaluate = ("evaluate", run, "--uncertainty", "row_laplace", "--new-ids", "item_id")
    assert program(*evaluate, "--json") == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["click"]["new_auc"] > 0
    assert program("evaluate", run, "--new-ids", "item_id") == 2
    assert "--new-ids: needs --uncertainty KIND" in capsys.readouterr().err
    assert program(*evaluate) == 0
    assert "examples with new ids" in capsys.readouterr().out
    out = tmp_path / "out.parquet"
    data = ("--data", str(folder / "test.parquet"), "--out", str(out))
    assert program("predict", run, *data, "--uncertainty", "row_laplace") == 0
    assert "click_std" in pq.read_table(out).column_names


def test_sums_of_another_version_are_to_be_fitted_again(run, tmp_path):
    file = Path(fit_uncertainty(run, "row_laplace", ids=["item_id"])["file"])
    with np.load(file) as content:
        arrays = dict(content)
    np.savez(file, **arrays | {"rows.item_id.squares": np.zeros(2)})
    with pytest.raises(CheckpointError, match=r"row_laplace.*\.npz: its sums do not fit .* fit again"):
        predictions(run, tmp_path / "x.parquet", "row_laplace")


def fit_rank(rank: int, world_size: int, run: str) -> None:
    fit_uncertainty(run, "row_laplace")


@pytest.mark.slow
def test_two_processes_fit_what_one_fits(run, tmp_path):
    fit_uncertainty(run, "row_laplace")
    one = predictions(run, tmp_path / "one.parquet", "row_laplace")
    run_ranks(2, fit_rank, run)
    two = predictions(run, tmp_path / "two.parquet", "row_laplace")
    for task in TASKS:
        np.testing.assert_allclose(two[f"{task}_std"], one[f"{task}_std"], rtol=1e-5)
