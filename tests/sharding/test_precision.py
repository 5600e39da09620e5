"""Tables in half precision, and vectors and gradients that travel in it: how far from exact they may be, and why."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gloo import run_ranks
from hand_plans import BAGS, ROWS, TABLES, hand_plan, one_kind
from planning import META
from tiny_model import TinyModel, apply_table_optimizer, batch_of, full, optimizer_of
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from hmoe_rec.embedding.initialization import initialize_tables
from hmoe_rec.embedding.lookup import MultiEmbedding
from hmoe_rec.sharding.planner import make_plan
from hmoe_rec.sharding.process import process_group
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.types import EmbeddingSet, Features, IdField, PlanError, SchemaError, SequenceField

CPU = torch.device("cpu")
HALF = {"a": "fp16", "b": "fp16", "x": "fp16"}  # of the tables a to g, x to w; the rest is fp32
STEPS = 4


def model_of(precisions: dict[str, str]) -> TinyModel:
    """On the meta device, tables of mixed precision in both collections."""
    model = TinyModel(bags=BAGS, rows=ROWS)

    def configs(kind: type, sizes: dict) -> list[Any]:
        return [
            kind(
                name=t,
                feature_names=[t],
                num_embeddings=n,
                embedding_dim=d,
                data_type=DataType(precisions.get(t, "fp32").upper()),
            )
            for t, (n, d) in sizes.items()
        ]

    model.ebc = EmbeddingBagCollection(tables=configs(EmbeddingBagConfig, BAGS), device=META)
    model.ec = EmbeddingCollection(tables=configs(EmbeddingConfig, ROWS), device=META)
    return model


def trained(rank: int, world_size: int, kind: str, precisions: dict[str, str]) -> dict[str, Tensor]:
    model = model_of(precisions)
    apply_table_optimizer(model, eps=1e-3)
    plan = hand_plan(model, one_kind(kind), world_size, world_size)
    model = shard_model(model, plan=plan, device=CPU, seed=5, std=0.3)
    both = optimizer_of(model)
    for step in range(STEPS):
        ids, labels = batch_of(step, rank, world_size, tables=TABLES)
        both.zero_grad()
        F.binary_cross_entropy_with_logits(model(ids), labels).backward()
        both.step()
    return {key: full(value) for key, value in model.state_dict().items() if "embedding" in key}


def reference(precisions: dict[str, str]) -> dict[str, Tensor]:
    """One process; a half-precision table is rounded to the nearest after every step, its statistics are float32."""
    model = TinyModel(CPU, bags=BAGS, rows=ROWS)
    initialize_tables(model, seed=5, std=0.3)
    tables = {key: p for key, p in model.named_parameters() if "embedding" in key}
    moments = {key: torch.zeros(p.shape[0], 1) for key, p in tables.items()}
    adam = torch.optim.Adam(model.mlp.parameters(), lr=0.01)

    def rounded(key: str, p: Tensor) -> None:
        if precisions.get(key.split(".")[-2]) == "fp16":
            p.copy_(p.half())

    for step in range(STEPS + 1):
        with torch.no_grad():
            for key, p in tables.items():
                if step:
                    moments[key] += p.grad.square().mean(1, keepdim=True)
                    p -= 0.1 * p.grad / (moments[key].sqrt() + 1e-3)
                rounded(key, p)
        if step < STEPS:
            ids, labels = batch_of(step, 0, 1, tables=TABLES)
            model.zero_grad()
            F.binary_cross_entropy_with_logits(model(ids), labels).backward()
            adam.step()
    return {key: p.detach() for key, p in tables.items()}


@pytest.mark.parametrize("kind", ["row_wise", pytest.param("table_wise", marks=pytest.mark.slow)])
def test_tables_of_mixed_precision_train_like_their_reference(kind: str) -> None:
    """Values are below 2, and so their neighbors in fp16 at most 2**-10 apart. Where the kernel's sums round another
    way than the reference's, a step may end at the other neighbor."""
    wanted = reference(HALF)
    for found in run_ranks(2, trained, kind, HALF):
        for key, value in found.items():
            half = HALF.get(key.split(".")[-2]) == "fp16"
            assert value.dtype == (torch.float16 if half else torch.float32) and wanted[key].abs().max() < 2
            limit = STEPS * 2**-10 if half else 1e-5
            assert (value.float() - wanted[key]).abs().max() <= limit, key


def test_half_precision_moves_the_reference() -> None:
    """The test above would see tables that were silently kept in float32, or the other way around."""
    exact, half = reference({}), reference(HALF)
    for key in exact:
        assert (exact[key] - half[key]).abs().max() > (1e-4 if HALF.get(key.split(".")[-2]) else 0.0), key


def test_precisions_that_do_not_train_are_refused() -> None:
    for precision, message in (
        ("bf16", "'a' is bf16: FBGEMM's CPU kernels refuse it, .*; train in fp32 or fp16"),
        ("int8", "'a' is int8: it is for serving, FBGEMM's optimizers do not train it; quantize what is exported"),
    ):
        model = model_of({"a": precision})
        apply_table_optimizer(model)
        plan = make_plan(model, kind="table_wise", world_size=1, local_world_size=1, device_type="cpu")
        with process_group("cpu"), pytest.raises(PlanError, match=message):
            shard_model(model, plan=plan, device=CPU)


def test_precision_by_table() -> None:
    features = Features(
        ids=(IdField("user", 7), IdField("item", 10)), sequences=(SequenceField("history", (("clicked", "item"),)),)
    )
    sets = (EmbeddingSet("s", 8), EmbeddingSet("t", 8))
    embedding = MultiEmbedding(features, sets, device=META, precision={"s__user": "fp16", "t__item": "fp16"})
    dtypes = {name.split(".")[-2]: p.dtype for name, p in embedding.named_parameters()}
    half, single = torch.float16, torch.float32
    assert dtypes == {"s__user": half, "s__item": single, "t__user": single, "t__item": half}
    with pytest.raises(SchemaError, match="table 's__user': precision 'int8'; tables are trained in fp32, fp16"):
        MultiEmbedding(features, sets, device=META, precision="int8")


# On the way.


def sent(rank: int, world_size: int, pairs: list[tuple[str, str]]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Per pair of (vectors, gradients): this process's vectors, and how its tables move by SGD with rate 1."""
    result = []
    for communication, gradients in pairs:
        model = TinyModel(bags=BAGS, rows=ROWS)
        apply_table_optimizer(model, torch.optim.SGD, lr=1.0)
        plan = hand_plan(model, one_kind("row_wise"), world_size, world_size)
        sharded = shard_model(
            model,
            plan=plan,
            device=CPU,
            seed=5,
            std=1.0,
            communication=communication,
            gradient_communication=gradients,
        )
        before = {key: full(value) for key, value in sharded.state_dict().items() if "embedding" in key}
        ids, _ = batch_of(0, rank, world_size, tables=TABLES)
        inner: nn.Module = sharded.module
        pooled, rows = inner.ebc(ids), inner.ec(ids)
        vectors = torch.cat([pooled[t].flatten() for t in BAGS] + [rows[t].values().flatten() for t in ROWS])
        (vectors * torch.linspace(0.5, 1.5, len(vectors))).sum().backward()
        after = {key: full(value) for key, value in sharded.state_dict().items() if "embedding" in key}
        result.append((vectors.detach(), {key: before[key] - after[key] for key in before}))
    return result


@pytest.mark.slow
def test_each_direction_has_its_precision() -> None:
    """A value of p bits behind the comma is off by 2**-(p + 1) of itself; two parts of a bag are added up in it: twice
    that of the larger one, and rounded once more."""
    pairs = [("fp32", "fp32"), ("fp16", "fp32"), ("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "bf16")]
    bits = {"fp32": 20, "fp16": 10, "bf16": 7}  # of fp32: what sums in another order may cost
    for results in run_ranks(2, sent, pairs):
        exact, moved = results[0]
        largest, steepest = exact.abs().max().item(), max(m.abs().max().item() for m in moved.values())
        for (communication, gradients), (vectors, steps) in zip(pairs, results, strict=True):
            error = (vectors - exact).abs().max().item()
            assert error <= 4 * largest * 2.0 ** -(bits[communication] + 1)
            assert (error == 0) == (communication == "fp32")
            error = max((steps[key] - moved[key]).abs().max().item() for key in moved)
            assert error <= 4 * steepest * 2.0 ** -(bits[gradients] + 1)
            assert (error > 1e-5) == (gradients != "fp32")


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tables_train_on_a_gpu(precision: str) -> None:
    """Stochastic rounding: within a few units in the last place of the float32 reference, which is rounded nowhere."""
    model = model_of(dict.fromkeys(TABLES, precision))
    apply_table_optimizer(model, eps=1e-3)
    model.mlp.to("cuda")
    plan = make_plan(model, kind="table_wise", world_size=1, local_world_size=1, device_type="cuda")
    with process_group("cuda") as process:
        sharded = shard_model(model, plan=plan, device=process.device, seed=5, std=0.3)
        both = optimizer_of(sharded)
        for step in range(STEPS):
            ids, labels = batch_of(step, 0, 1, tables=TABLES)
            both.zero_grad()
            F.binary_cross_entropy_with_logits(sharded(ids.to("cuda")), labels.to("cuda")).backward()
            both.step()
        found = {k: s.local_shards()[0].tensor.float().cpu() for k, s in sharded.state_dict().items() if "embedd" in k}
    unit = {"fp32": 2**-20, "fp16": 2**-10}[precision]
    for key, value in reference({}).items():
        assert (found[key] - value).abs().max() <= 2 * (STEPS + 1) * unit, key
