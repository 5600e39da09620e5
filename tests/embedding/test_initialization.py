"""Tables start from (seed, table, row) alone."""

import pytest
import torch
from gloo import run_ranks
from tiny_model import TinyModel, apply_table_optimizer, batch_of, full
from torch import nn

from hmoe_rec.embedding.initialization import BLOCK_VALUES, initialize_tables
from hmoe_rec.sharding.planner import make_plan
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.types import HmoeError

CPU = torch.device("cpu")
LONG = {"s__a": (2 * BLOCK_VALUES // 8 + 77, 8), "s__b": (9, 8)}  # three blocks and a short one


def tables(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("mlp")}


def unsharded(seed: int, distribution: str = "normal", bags: dict = LONG) -> dict[str, torch.Tensor]:
    model = TinyModel(CPU, bags=bags)
    initialize_tables(model, seed=seed, std=0.5, distribution=distribution)
    return tables(model)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_values_have_the_asked_spread_and_differ_by_seed_table_and_block(distribution: str) -> None:
    first, again, other = (unsharded(seed, distribution) for seed in (1, 1, 2))
    for key in first:
        assert torch.equal(first[key], again[key])
        assert not torch.isclose(first[key], other[key]).any(1).all()
    long = first["ebc.embedding_bags.s__a.weight"]
    assert long.mean().abs() < 0.01 and abs(long.std() - 0.5) < 0.01
    assert (long.abs().max() <= 0.5 * 3**0.5) == (distribution == "uniform")
    block = BLOCK_VALUES // 8
    assert not torch.equal(long[:block], long[block : 2 * block])
    assert not torch.equal(long[:9], first["ebc.embedding_bags.s__b.weight"])


def test_a_row_does_not_depend_on_the_number_of_rows() -> None:
    short = unsharded(1, bags={"s__a": (100, 8)})["ebc.embedding_bags.s__a.weight"]
    assert torch.equal(short, unsharded(1)["ebc.embedding_bags.s__a.weight"][:100])


def test_global_random_state_is_left_alone() -> None:
    model = TinyModel(CPU)
    before = torch.get_rng_state()
    initialize_tables(model, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_tables_without_memory_and_tables_of_one_name_are_refused() -> None:
    with pytest.raises(HmoeError, match="'s__a' is on the meta device"):
        initialize_tables(TinyModel(), seed=1)
    with pytest.raises(HmoeError, match="table 's__a' is in 'ebc' and in 'ec'"):
        initialize_tables(TinyModel(CPU, rows={"s__a": (5, 8)}), seed=1)


def shard_and_show(rank: int, world_size: int, kind: str) -> tuple:
    torch.manual_seed(7)  # the same on every rank: TorchRec itself would start all shards of a table alike
    before = torch.get_rng_state()
    model = TinyModel(bags=LONG)
    apply_table_optimizer(model)
    plan = make_plan(model, kind=kind, world_size=world_size, local_world_size=world_size, device_type="cpu")
    model = shard_model(model, plan=plan, device=CPU, seed=1, std=0.5)
    assert torch.equal(before, torch.get_rng_state())
    whole = {key: full(value) for key, value in model.state_dict().items() if not key.startswith("mlp")}
    ids, _ = batch_of(0, rank, world_size, tables={**LONG, "s__h": (23, 8)})
    # What the lookup returns must come from the new values, not from those that TorchRec drew.
    pooled = model.module.ebc(ids).wait()["s__a"].detach()
    lengths, values = ids["s__a"].lengths().tolist(), ids["s__a"].values()
    sums = [rows.sum(0) for rows in whole["ebc.embedding_bags.s__a.weight"][values].split(lengths)]
    assert torch.allclose(pooled, torch.stack(sums), atol=1e-6)
    return whole


@pytest.mark.parametrize(("world_size", "kind"), [(1, "row_wise"), (2, "row_wise"), (2, "column_wise")])
def test_every_plan_starts_from_the_same_bits(world_size: int, kind: str) -> None:
    check_start(world_size, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "kind"), [(2, "table_wise"), (3, "row_wise"), (4, "row_wise"), (4, "auto")])
def test_more_plans_start_from_the_same_bits(world_size: int, kind: str) -> None:
    check_start(world_size, kind)


def check_start(world_size: int, kind: str) -> None:
    reference = unsharded(1)
    for whole in run_ranks(world_size, shard_and_show, kind):
        assert whole.keys() == reference.keys()
        for key, value in whole.items():
            assert torch.equal(value, reference[key]), key
