"""The sharding section of a run file: what it takes, what it refuses, and what the planner gets from it."""

import pytest
from pydantic import ValidationError

from hmoe_rec.config.run import RunConfig, _plain, _plan_problems, resolve_config
from hmoe_rec.config.sections import PLANS, ShardingConfig
from hmoe_rec.sharding.constraints import KERNELS, POOLED_TYPES, Constraint, Constraints
from hmoe_rec.sharding.planner import COMMUNICATION, KINDS, RESERVED, SECONDS
from hmoe_rec.types import ConfigError

GIVEN = {
    "topology": {"base": "h100x8", "nodes": 2},
    "constraints": {
        "set1": {"types": ["table_wise", "row_wise"], "ranks": [0, 3]},
        "set2__user": {"kernels": ["fused_uvm_caching"], "cache_load_factor": 0.3, "pooling_factor": 7},
    },
    "together": [["user"], ["item", "shop"]],
    "apart": [["set1", "set2"]],
    "pooling": {"history": 31.5},
}


MANAGED = {"name": "ad", "num_embeddings": 64, "mode": "managed"}


def test_the_section_becomes_constraints() -> None:
    config = ShardingConfig.model_validate(GIVEN)
    assert _plan_problems(config) == []
    assert config.rules() == Constraints(
        tables={
            "set1": Constraint(types=("table_wise", "row_wise"), ranks=(0, 3)),
            "set2__user": Constraint(kernels=("fused_uvm_caching",), cache_load_factor=0.3, pooling_factor=7.0),
        },
        together=(("user",), ("item", "shop")),
        apart=(("set1", "set2"),),
        pooling={"history": 31.5},
    )
    assert ShardingConfig.model_validate(_plain(config)) == config
    assert ShardingConfig().rules() == Constraints()


def test_keys_and_planner_agree() -> None:
    assert PLANS == KINDS
    config = ShardingConfig()
    assert (config.reserved, config.seconds) == (RESERVED, SECONDS)
    for communication in COMMUNICATION:
        ShardingConfig(communication=communication, gradient_communication=communication)
    ShardingConfig.model_validate({"constraints": {"*": {"types": POOLED_TYPES, "kernels": KERNELS}}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"constraints": {"a": {"type": ["row_wise"]}}}, "unknown key; did you mean 'types'"),
        ({"constraints": {"a": {"types": ["rowwise"]}}}, "Input should be 'table_wise', 'row_wise'"),
        ({"constraints": {"a": {"cache_load_factor": 2}}}, "less than or equal to 1"),
        ({"communication": "int8"}, "Input should be 'fp32', 'fp16' or 'bf16'"),
        ({"gradient_communication": "fp8"}, "Input should be 'fp32', 'fp16' or 'bf16'"),
        ({"replicas": 0}, "greater than 0"),
        ({"reserved": 1.0}, "less than 1"),
    ],
)
def test_wrong_keys_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ShardingConfig.model_validate(given)


def test_problems_of_values() -> None:
    def problems(**given) -> str:
        return "\n".join(_plan_problems(ShardingConfig.model_validate(given)))

    assert "sharding.topology: unknown topology 'h100'" in problems(topology="h100")
    assert "sharding.topology: 1 problem; hbm_byte: unknown key" in problems(topology={"base": "cpu", "hbm_byte": 1})
    assert "only plan auto keeps constraints" in problems(plan="row_wise", apart=[["a", "b"]])
    assert "unknown plan 'rowwise'" in problems(plan="rowwise")


def test_replica_groups_are_refused_what_they_would_break() -> None:
    content = {
        "data": {"train": "x", "schema": {"tasks": [{"name": "click"}], "ids": [MANAGED]}},
        "model": {"preset": "single"},
        "train": {"publish": {"to": "out"}},
    }
    resolve_config(content)
    with pytest.raises(ConfigError) as error:
        resolve_config({**content, "sharding": {"replicas": 2}})
    assert "groups would each give rows of ad (mode: managed) away" in str(error.value)
    assert "deltas of train.publish would miss" in str(error.value)


def test_pooling_from_a_file_is_in_the_resolved_file(tmp_path) -> None:
    schema = {"ids": [{"name": "user", "num_embeddings": 7}], "tasks": [{"name": "click"}]}
    path = tmp_path / "pooling.yaml"

    def resolved() -> RunConfig:
        data, sharding = {"train": "x", "schema": schema}, {"pooling": str(path)}
        return resolve_config({"data": data, "model": {"preset": "single"}, "sharding": sharding})

    path.write_text("user: 2.5\n")
    assert resolved().sharding.pooling == resolved().sharding.rules().pooling == {"user": 2.5}
    path.write_text("user: -1\n")
    with pytest.raises(ConfigError, match="sharding.pooling.user: .*greater than 0"):
        resolved()
    path.unlink()
    with pytest.raises(ConfigError, match="sharding.pooling: .*pooling.yaml: no such file"):
        resolved()
