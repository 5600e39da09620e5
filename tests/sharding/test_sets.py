"""What a further embedding set costs in a real step of two processes: bytes as predicted, and no exchange more."""

import math

import pytest
import torch
from gloo import run_ranks
from torch.profiler import ProfilerActivity, profile
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.embedding.lookup import MultiEmbedding
from hmoe_rec.sharding.constraints import Constraints
from hmoe_rec.sharding.planner import plan_for
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.sharding.topology import NAMED
from hmoe_rec.training.optimizer import attach_table_optimizer
from hmoe_rec.types import EmbeddingSet, Features, IdField

FEATURES = Features(ids=(IdField("user", 11), IdField("item", 13, hashed=True), IdField("tags", 17, multi_valued=True)))
EXAMPLES, WIDTH = 5, 8


def a_step(rank: int, world_size: int, sets: int) -> tuple[list[list[int]], dict[str, int]]:
    """(elements that this process sends, per all-to-all; predicted bytes of all processes)"""
    names = [EmbeddingSet(f"s{i}", WIDTH) for i in range(sets)]
    model = MultiEmbedding(FEATURES, names, device=torch.device("meta"))
    attach_table_optimizer(model, kind="rowwise_adagrad", lr=0.1, eps=1e-8)
    pooling = Constraints(pooling={"tags": 2.0})
    planned = plan_for(model, NAMED["cpu"], kind="table_wise", batch_size=EXAMPLES, constraints=pooling)
    predicted = {
        part: sum(t.sent[part] for t in planned.prediction.tables) for part in planned.prediction.tables[0].sent
    }
    sharded = shard_model(model, plan=planned.plan, device=torch.device("cpu"))
    lengths = torch.tensor([1] * 2 * EXAMPLES + [0, 1, 2, 3, 4], dtype=torch.int32)  # tags: 2 on average
    ids = KeyedJaggedTensor(keys=["user", "item", "tags"], values=torch.arange(20) % 11, lengths=lengths)

    def step() -> None:
        torch.stack([vectors.pooled.sum() for vectors in sharded(ids).values()]).sum().backward()

    step()  # the first one also agrees on the exchanges
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step()
    sent = [e.input_shapes[1] for e in profiled.events() if e.name == "c10d::alltoall_base_"]  # (received, sent, ...)
    assert not any("reduce" in e.name or "gather" in e.name for e in profiled.events() if e.name.startswith("c10d"))
    return sent, predicted


@pytest.mark.parametrize("sets", [1, 3])
def test_one_input_exchange_whatever_the_number_of_sets_and_bytes_as_predicted(sets: int) -> None:
    (first, predicted), (second, _) = run_ranks(2, a_step, sets)
    assert len(first) == len(second) == 5  # sizes, lengths and ids; vectors; gradients
    _, lengths, ids, vectors, gradients = (math.prod(a) + math.prod(b) for a, b in zip(first, second, strict=True))
    assert predicted["input_all_to_all"] == 4 * ids + 4 * lengths
    assert predicted["output_all_to_all"] == predicted["gradient_all_to_all"] == 4 * vectors == 4 * gradients
    assert vectors == 2 * EXAMPLES * WIDTH * 3 * sets
