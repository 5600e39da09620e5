"""The whole model: shapes, independence, tracing; and what each preset lets a task's loss reach, by autograd."""

from dataclasses import replace

import pytest
import torch
from making import make_batch, small_features
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from hmoe_rec.embedding.tables import table_name
from hmoe_rec.model import HMoE
from hmoe_rec.towers.routing import PRESETS, preset

TASKS = ("click", "like")


def build(name: str, **options) -> HMoE:
    layout = preset(name, TASKS, embedding_dim=6, **options)
    return HMoE(
        small_features(), layout, expert_dim=7, tower_hidden=(9,), sequence_pooling={"kind": "target_attention"}
    )


@pytest.fixture(params=sorted(PRESETS))
def model(request):
    return build(request.param)


def table_gradients(model: HMoE, task: int, batch) -> dict[str, float]:
    """Embedding set -> sum of |d logit_task / d tables|."""
    model.zero_grad(set_to_none=True)
    model(batch)[:, task].square().sum().backward()
    sums = {s.name: 0.0 for s in model.layout.sets}
    for name, p in model.embedding.named_parameters():
        set_name = next(s for s in sums if name.split(".")[-2].startswith(f"{s}__"))
        sums[set_name] += 0.0 if p.grad is None else float(p.grad.abs().sum())
    return sums


def test_logits(model):
    assert model(make_batch(small_features())).shape == (5, 2)


def test_a_task_reaches_exactly_the_sets_that_its_routes_allow(model):
    routing, batch = model.layout.routing, make_batch(small_features(), 40)
    for t in range(len(TASKS)):
        trained = {e.set for e, cell in zip(model.layout.experts, routing.cells[t], strict=True) if cell == "train"}
        reachable = [e for e, cell in enumerate(routing.cells[t]) if cell != "none"]
        gated = set(routing.gate_inputs[t].sets) if len(reachable) > 1 and routing.combine == "gate" else set()
        reached = {name for name, total in table_gradients(model, t, batch).items() if total > 0}
        assert reached == trained | gated


def test_no_preset_leaks_into_another_tasks_set(model):
    owners = {s.name: s.owner for s in model.layout.sets}
    for t, task in enumerate(TASKS):
        gradients = table_gradients(model, t, make_batch(small_features(), 40))
        leaks = [name for name, total in gradients.items() if owners[name] not in (None, task) and total != 0.0]
        # STEM-AL's auxiliary task uses nothing of the main task's set, and the other way round.
        assert leaks == []


def test_stem_values_equal_the_same_model_without_stops():
    stem = build("stem")
    free = build("stem")
    free.load_state_dict(stem.state_dict())
    free.mixture.train_TE.fill_(1.0)
    free.mixture.any_read = False
    batch = make_batch(small_features())
    torch.testing.assert_close(stem(batch), free(batch))


def test_examples_are_independent(model):
    """Another value in one example leaves the others as they are."""
    batch = make_batch(small_features())
    numbers = batch.numbers.clone()
    numbers[3] += 2.0
    before, after = model(batch), model(replace(batch, numbers=numbers))
    others = [0, 1, 2, 4]
    assert torch.equal(before[others], after[others]) and not torch.equal(before[3], after[3])


def test_every_parameter_of_a_preset_is_trained(model):
    """DistributedDataParallel waits for a gradient of every dense parameter."""
    model(make_batch(small_features(), 60)).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


def test_a_batch_of_one_example(model):
    assert model(make_batch(small_features(), 1)).shape == (1, 2)


def test_traces_with_the_collections_as_leaves(model):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, qualified_name):
            leaf = type(m).__name__ in ("EmbeddingBagCollection", "EmbeddingCollection", "RowIds")
            return leaf or super().is_leaf_module(m, qualified_name)

    graph = Tracer().trace(model)
    traced = torch.fx.GraphModule(model, graph)
    batch = make_batch(small_features())
    torch.testing.assert_close(traced(batch), model(batch))


def test_heterogeneous_experts_on_sets_of_different_widths():
    experts = [{"kind": "gwpfm", "num_parts": 3}, {"kind": "dcnv2"}, {"kind": "flat_dnn"}]
    model = build("ame", expert=experts, widths=[6, 12, 18])
    assert model(make_batch(small_features())).shape == (5, 2)
    assert [type(e).__name__ for e in model.experts.experts.values()] == ["GwPFMExpert", "DCNv2Expert", "FlatDNNExpert"]


def test_table_names_are_set_and_field():
    names = {key.split(".")[-2] for key, _ in build("stem").embedding.named_parameters()}
    assert {table_name(s, f) for s in ("click", "like", "shared") for f in ("user", "item", "tags", "city")} == names


def test_empty_sequences_for_a_whole_batch(model):
    features = small_features()
    batch = make_batch(features)
    sparse = batch.sparse.to_dict()
    sparse["hist_item"] = JaggedTensor(
        values=torch.empty(0, dtype=torch.int64), lengths=torch.zeros(5, dtype=torch.int32)
    )
    out = model(replace(batch, sparse=KeyedJaggedTensor.from_jt_dict(sparse)))
    out.sum().backward()
    assert out.shape == (5, 2) and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
