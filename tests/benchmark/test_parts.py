"""Steps taken apart: bytes by hand, the same training as without, and what each part is."""

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from torchrec.distributed import comm_ops, dist_data

from hmoe_rec.benchmark.calibrate import Tables, draw
from hmoe_rec.benchmark.parts import StepParts, sent_bytes
from hmoe_rec.benchmark.result import KINDS, MEASURED
from hmoe_rec.sharding.planner import make_plan
from hmoe_rec.sharding.shard import shard_model

ROWS, WIDTH, BATCH, IDS = (40, 30, 20), 8, 5, 3
SPLITS = 3 * 8  # to the other process: how many lengths and ids it will get, and how many examples; int64
CPU = torch.device("cpu")


def made(kind: str, pooled: bool):
    """-> the sharded module, and what holds its tables."""
    module = Tables(ROWS, WIDTH, pooled, "rowwise_adagrad")
    plan = make_plan(module, kind=kind, world_size=2, local_world_size=2, device_type="cpu")
    return shard_model(module, plan=plan, device=CPU, std=0.5), module


def take_apart(rank: int, world_size: int) -> dict:
    found = {}
    for kind, pooled in (("table_wise", True), ("row_wise", True), ("row_wise", False)):
        plain, _ = made(kind, pooled)
        watched, module = made(kind, pooled)
        parts = StepParts(module.tables, CPU)
        for step in range(3):
            batch = draw(module.features, BATCH, IDS, 10 * step + rank)
            plain(*batch).backward()
            with parts.watching():
                parts.step(lambda: watched(*batch), lambda loss: loss.backward(), lambda: None)  # noqa: B023
        weights = [[s.tensor for t in m.state_dict().values() for s in t.local_shards()] for m in (plain, watched)]
        same = all(torch.equal(a, b) for a, b in zip(*weights, strict=True)) and bool(weights[0])
        whole = comm_ops.dist is dist and dist_data.dist is dist
        found[kind, pooled] = (same, whole, parts.median_ms(), parts.mean_sent(), dict(parts.exchanges))
    return {"steps": found, "collectives": count()}


@pytest.fixture(scope="module")
def measured() -> list[dict]:
    return run_ranks(2, take_apart)


def test_bytes_parts_and_training(measured):
    ranks = [found["steps"] for found in measured]
    for rank, found in enumerate(ranks):
        for (kind, pooled), (same, whole, ms, sent, exchanges) in found.items():
            assert same, f"{kind}: steps that are watched train another model"
            assert whole, "TorchRec has its own torch.distributed back"
            assert set(ms) == set(MEASURED) and all(ms[part] > 0 for part in MEASURED), (kind, ms)
            assert exchanges == {"input": 9, "output": 3, "gradient": 3} and set(sent) == set(KINDS)
            if kind == "row_wise" and pooled:  # vectors of all tables for the other's examples; splits, lengths
                assert sent["output"] == sent["gradient"] == 3 * BATCH * WIDTH * 4
                assert sent["input"] > 3 * BATCH * 4
        # Largest first onto the fewest bytes: table 0 is on process 0, tables 1 and 2 are on process 1.
        mine, others = ([0], [1, 2]) if rank == 0 else ([1, 2], [0])
        sent = found["table_wise", True][3]
        assert sent["output"] == len(mine) * BATCH * WIDTH * 4
        assert sent["gradient"] == len(others) * BATCH * WIDTH * 4
        assert sent["input"] == SPLITS + 4 * BATCH * len(others) + 4 * IDS * BATCH * len(others)  # lengths, ids: int32
    bucketed = [found["row_wise", True][3]["input"] for found in ranks]
    all_ids = 3 * 2 * BATCH * 3 * IDS  # of three steps and both processes, each goes to one half of the rows
    lengths = 3 * 4 * BATCH
    crossing = sum(s - SPLITS - lengths for s in bucketed) * 3 / 4
    assert crossing == pytest.approx(all_ids / 2, rel=0.35) and crossing == int(crossing)


def count() -> list[int]:
    x = torch.zeros(6, 4)
    return [
        sent_bytes("all_to_all_single", output=x, input=x, output_split_sizes=[1, 5], input_split_sizes=[1, 5]),
        sent_bytes("all_to_all_single", x, x),
        sent_bytes("reduce_scatter_tensor", x[:3], x),
        sent_bytes("reduce_scatter", x[:2], [x[:2], x[:4]]),
        sent_bytes("all_gather_into_tensor", torch.zeros(12, 4), x),
        sent_bytes("all_gather", [x, x], x),
    ]


def test_bytes_of_every_collective(measured):
    assert [found["collectives"] for found in measured] == [
        [5 * 16, 48, 48, 4 * 16, 96, 96],
        [16, 48, 48, 2 * 16, 96, 96],
    ]
