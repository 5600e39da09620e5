"""What is not known of a row of a table: exact where it can be, large for what is new, additive over processes."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from gloo import run_ranks
from small_batches import ITEMS, make_batch, make_model
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.batch import Batch
from hmoe_rec.model import HMoE
from hmoe_rec.uncertainty.estimates import LastLayer, RowLaplace
from hmoe_rec.uncertainty.posterior import LastLayerPosterior, logistic_curvature
from hmoe_rec.uncertainty.rows import RowPosterior, eligible, slopes


def cut(batch: Batch, rows: slice) -> Batch:
    ids = batch.sparse
    padded = [ids[key].to_padded_dense(1)[rows].flatten().long() for key in ids.keys()]
    lengths = [ids[key].lengths()[rows] for key in ids.keys()]
    values = torch.cat([p[n > 0] for p, n in zip(padded, lengths, strict=True)])
    kjt = KeyedJaggedTensor(ids.keys(), values, lengths=torch.cat(lengths))
    return Batch.of(kjt, batch.labels[rows], weights=batch.weights[rows])


def fitted(model: HMoE, fields: list[str], batch: Batch, **options) -> RowPosterior:
    found, rows = slopes(model, batch), RowPosterior(model, fields, **options)
    rows.update(batch, found, logistic_curvature(found.logits_BT, batch.labels, batch.weights))
    return rows


def test_slopes_are_derivatives_of_the_logits():
    """Naive: an entry of every example's fields moved by a little, in float64."""
    model, batch = make_model("stem", combine="sum"), make_batch(4)  # a gate's softmax is float32
    found, exact = slopes(model, batch), deepcopy(model).double()
    fields = {name: x.double() for name, x in found.fields.items()}

    def logits(fields: dict[str, torch.Tensor]) -> torch.Tensor:
        return exact.towers(exact.mixture(fields, exact.experts(fields, {})))

    with torch.no_grad():
        torch.testing.assert_close(found.logits_BT, model(batch))
        for t, other in ((0, "like"), (1, "click")):
            assert found.by_task[t][other].abs().max() == 0, "what a task only reads does not count"
        for name, f, d in (("click", 1, 2), ("shared", 0, 4)):
            moved = {key: x.clone() for key, x in fields.items()}
            moved[name][:, f, d] += 1e-6
            slope_B = (logits(moved) - logits(fields))[:, 0] / 1e-6
            assert slope_B.abs().max() > 1e-4
            torch.testing.assert_close(found.by_task[0][name][:, f, d].double(), slope_B, atol=1e-6, rtol=1e-3)


def test_of_width_one_it_is_the_exact_posterior_of_every_row():
    """D = 1: precision of a row = 1 / prior variance + sum of c J^2 over its examples."""
    model, batch = make_model("shared_bottom", dim=1), make_batch()
    found = slopes(model, batch)
    c_BT = logistic_curvature(found.logits_BT, batch.labels, batch.weights)
    rows = fitted(model, ["item"], batch)
    items, known = batch.sparse["item"].to_padded_dense(1)[:, 0].long(), batch.sparse["item"].lengths() > 0
    f = model.encoders["shared"].field_names.index("item")
    entries_B = found.fields["shared"][:, f, 0].double()
    prior = float((entries_B[known] ** 2).mean())
    new = make_batch(20, seed=1, items=ITEMS)
    slopes_new = slopes(model, new)
    variance_BT = rows.variance(new, slopes_new)
    new_items = new.sparse["item"].to_padded_dense(1)[:, 0].long()
    for t in range(2):
        J_B = found.by_task[t]["shared"][:, f, 0].double()
        for b in range(20):
            same = known & (items == new_items[b])
            precision = 1 / prior + float((c_BT[same, t] * J_B[same] ** 2).sum())
            expected = 0.0 if b == 0 else float(slopes_new.by_task[t]["shared"][b, f, 0]) ** 2 / precision
            assert variance_BT[b, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_of_one_row_it_is_the_exact_posterior_in_all_directions():
    """All examples have one item: M is its own curvature, so nothing is approximated. Two sets of unequal width."""
    model, batch = make_model("ame", widths=(4, 8)), make_batch(items=1)
    found = slopes(model, batch)
    c_BT = logistic_curvature(found.logits_BT, batch.labels, batch.weights)
    rows = fitted(model, ["item"], batch, factor=1.7)
    known = batch.sparse["item"].lengths() > 0
    places = [(s, e.field_names.index("item")) for s, e in model.encoders.items()]
    prior = torch.cat(
        [(found.fields[s][known, f].double() ** 2).mean().expand(found.fields[s].shape[2]) for s, f in places]
    )
    variance_BT = rows.variance(batch, found)
    for t in range(2):
        J_BD = torch.cat([found.by_task[t][s][:, f].double() for s, f in places], 1)
        c_B = c_BT[:, t] * known
        covariance = torch.linalg.inv(torch.diag(1 / (1.7 * prior)) + (J_BD * c_B[:, None]).T @ J_BD)
        expected_B = ((J_BD @ covariance) * J_BD).sum(1) * known
        torch.testing.assert_close(variance_BT[:, t], expected_B, rtol=1e-6, atol=1e-12)


def test_the_chosen_factor_is_where_the_evidence_is_largest():
    """Naive: row by row, log N(row; 0, f W^2) integrated over the Gaussian that the data leave, for f all about."""
    model, batch = make_model("ame", widths=(4, 8)), make_batch()
    rows = fitted(model, ["item"], batch)
    (field,) = rows.fields
    factor, found = rows.choose_factors()["item"], slopes(model, batch)
    items, known = batch.sparse["item"].to_padded_dense(1)[:, 0].long(), batch.sparse["item"].lengths() > 0
    places = [(s, e.field_names.index("item")) for s, e in model.encoders.items()]
    entries = [found.fields[s][:, f].double() for s, f in places]
    std_D = torch.cat([x[known].square().mean().sqrt().expand(x.shape[1]) for x in entries])
    c_BT = logistic_curvature(found.logits_BT, batch.labels, batch.weights) * known[:, None]
    J_TBD = [torch.cat([of[s][:, f].double() for s, f in places], 1) * std_D for of in found.by_task]
    M_DD = sum((J_BD * c_B[:, None]).T @ J_BD for J_BD, c_B in zip(J_TBD, c_BT.unbind(1), strict=True))
    s_B = sum(c_B * J_BD.square().sum(1) for J_BD, c_B in zip(J_TBD, c_BT.unbind(1), strict=True))

    def evidence(f: float) -> float:
        total = 0.0
        for item in items[known].unique():
            mine = known & (items == item)
            row_D = torch.cat([x[mine][0] for x in entries]) / std_D
            precision = torch.eye(len(row_D)).double() / f + s_B[mine].sum() * M_DD / M_DD.trace()
            total -= float(row_D.square().sum() / f + len(row_D) * math.log(f) + torch.logdet(precision)) / 2
        return total

    assert factor > 1
    values = [evidence(factor * x) for x in (0.01, 0.5, 0.99, 1.0, 1.01, 2.0, 100.0)]
    assert max(values) == values[3] and values == sorted(values[:4]) + sorted(values[4:], reverse=True)
    with torch.no_grad():
        wider = fitted(model, ["item"], batch, factor={"item": factor})
        torch.testing.assert_close(rows.variance(batch, found), wider.variance(batch, found))
    assert field.factor == factor


def test_where_nothing_is_learned_the_factor_stays():
    model, batch = make_model(), make_batch()
    rows = fitted(model, ["user", "item"], replace(batch, labels=torch.full_like(batch.labels, torch.nan)))
    assert rows.choose_factors() == {"user": 1.0, "item": 1.0}
    assert rows.variance(batch, slopes(model, batch)).isfinite().all()


def test_a_new_id_is_less_known_than_every_seen_one():
    model, batch = make_model(), make_batch(600)
    rows = fitted(model, ["item"], batch, factor=1e5)  # the model is not trained, and its slopes are small
    seen = make_batch(1, seed=2)
    ids = [KeyedJaggedTensor(["user", "item", "tags"], torch.tensor([1, item, 2]), lengths=torch.ones(3).int())
           for item in range(ITEMS)]  # fmt: skip
    base = slopes(model, replace(seen, sparse=ids[0]))
    variances = torch.stack([rows.variance(replace(seen, sparse=kjt), base)[0] for kjt in ids])  # at equal slopes
    assert (variances[ITEMS - 2 :] > 3 * variances[: ITEMS - 2].max(0).values).all()
    torch.testing.assert_close(variances[ITEMS - 2], variances[ITEMS - 1])


def test_ids_beyond_the_limit_share_numbers_by_hash_and_sums_survive_saving():
    model, batch = make_model(), make_batch()
    small = fitted(model, ["user", "item"], batch, max_rows=2)
    assert small.fields[1].learned_STR.shape[2] == 2
    again = RowPosterior(model, ["user", "item"], max_rows=2)
    again.load_state_dict(small.state_dict())
    found = slopes(model, batch)
    torch.testing.assert_close(again.variance(batch, found), small.variance(batch, found))


def test_fields_that_have_no_rows_of_their_own():
    model = make_model()
    assert eligible(model) == ("user", "item")
    with pytest.raises(ValueError, match="'tags' is no id field with one id"):
        RowPosterior(model, ["tags"])
    for factor in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="factor"):
            RowPosterior(model, ["item"], factor=factor)


def estimate_of(batches: list[Batch]) -> RowLaplace:
    model = make_model()
    dims = [x.shape[1] for x in model.towers.features([torch.zeros(1, 5)] * 2)]
    estimate = RowLaplace(model, LastLayerPosterior(dims), RowPosterior(model, ["user", "item"]))
    for batch in batches:
        estimate.learn(batch)
    return estimate


def variance_of_rank(rank: int, world_size: int) -> list:
    estimate = estimate_of([cut(make_batch(), slice(rank * 25, 25 + rank * 35))])
    estimate.posterior.reduce_()
    estimate.rows.reduce_()
    estimate.rows.choose_factors()
    return estimate(make_batch(5, seed=4)).variance_BT.tolist()


def test_batches_in_any_order_add_up_to_the_same():
    batch = make_batch()
    new = make_batch(5, seed=4)
    whole = estimate_of([batch])
    pieces = estimate_of([cut(batch, slice(31, 60)), cut(batch, slice(0, 31))])
    torch.testing.assert_close(pieces(new).variance_BT, whole(new).variance_BT)
    last_layer = LastLayer(whole.model, whole.posterior)(new)
    assert (whole(new).variance_BT > last_layer.variance_BT).all()
    torch.testing.assert_close(whole(new).mean_BT, last_layer.mean_BT)


def test_sampled_rows_have_the_curvature_of_their_loss():
    batch = make_batch()
    offset = torch.full((60, 2), 2.0)
    found, sampled = slopes(make_model(), batch), estimate_of([replace(batch, offsets=offset)])
    expected = LastLayerPosterior([x.shape[0] for x in sampled.posterior.sums])
    c_BT = logistic_curvature(found.logits_BT + 2, batch.labels, batch.weights)
    expected.update(sampled.features(found.mixed), c_BT)
    torch.testing.assert_close(sampled.posterior.sums, expected.sums)


@pytest.mark.slow
def test_two_processes_add_up_to_one():
    whole = estimate_of([make_batch()])
    whole.rows.choose_factors()
    for found in run_ranks(2, variance_of_rank):
        torch.testing.assert_close(torch.tensor(found), whole(make_batch(5, seed=4)).variance_BT)
