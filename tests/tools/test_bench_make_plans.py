"""Plans made on purpose: each is one that a job takes, and they differ."""

import json

import make_plans
from planning import bags_model

from hmoe_rec.sharding.plan_file import load_plan

TABLES = {"s1__a": (5000, 16), "s1__b": (900, 16), "s2__a": (40, 16), "s2__b": (1, 16), "s2__c": (30, 12)}


def test_plans_differ_and_are_taken(tmp_path):
    module = bags_model(TABLES, {"s1__h": (70, 32)})
    paths = make_plans.make(module, 2, tmp_path)
    assert len(paths) >= 8
    contents = set()
    found = {}
    for path in paths:
        load_plan(str(path), module, world_size=2, local_world_size=2, device_type="cpu")
        plan = json.loads(path.read_text())["plan"]
        contents.add(json.dumps(plan))
        found[path.stem] = {
            t: (x["sharding_type"], [s["rank"] for s in x["shards"]]) for m in plan.values() for t, x in m.items()
        }
    assert len(contents) == len(paths)
    assert all(place == ("table_wise", [0]) for place in found["skewed"].values())
    by_row = found["large_by_row"]
    assert by_row["s1__a"] == ("row_wise", [0, 1]) and by_row["s2__a"] == ("table_wise", [0])
    assert found["small_by_row"]["s2__a"][0] == "row_wise"
    assert found["small_by_row"]["s2__b"][0] == "table_wise"  # one row cannot be cut
    assert all((place[1] == [1]) == t.startswith("s2") for t, place in found["set_by_set"].items())
