"""Clusters: named, from a mapping or a file, refused where wrong, and as TorchRec takes them."""

from pathlib import Path

import pytest
import yaml

from hmoe_rec.sharding.topology import GB, NAMED, Cluster, cluster_of, this_machine, torchrec_topology
from hmoe_rec.types import PlanError

CUSTOM = {
    "name": "lab",
    "device": "cuda",
    "nodes": 3,
    "ranks_per_node": 4,
    "hbm_bytes": 24 * GB,
    "ddr_bytes": 32 * GB,
    "hbm_bandwidth": 1e12,
    "ddr_bandwidth": 5e10,
    "hbm_to_ddr_bandwidth": 1.6e10,
    "intra_node_bandwidth": 3.2e10,
    "inter_node_bandwidth": 1.25e9,
}


@pytest.mark.parametrize("name", NAMED)
def test_named_clusters(name: str) -> None:
    cluster = cluster_of(name, 3)
    assert cluster == NAMED[name].with_nodes(3)
    assert cluster.world_size == 3 * cluster.ranks_per_node
    assert cluster.memory_bytes == (cluster.hbm_bytes if cluster.device == "cuda" else cluster.ddr_bytes) > 0
    assert cluster_of(cluster.to_dict()) == cluster


def test_a_mapping_and_a_file_give_the_same(tmp_path: Path) -> None:
    cluster = cluster_of(CUSTOM)
    assert cluster == Cluster(**CUSTOM) and cluster.world_size == 12
    path = tmp_path / "lab.yaml"
    path.write_text(yaml.safe_dump(CUSTOM).replace("1000000000000.0", "1e12"))
    assert "hbm_bandwidth: 1e12" in path.read_text()
    assert cluster_of(str(path)) == cluster
    assert cluster_of(str(path), 5).nodes == 5


def test_a_base_is_changed_by_the_keys_beside_it() -> None:
    cluster = cluster_of({"base": "h100x8", "name": "slow net", "inter_node_bandwidth": 1e10, "nodes": 2})
    assert cluster.to_dict() == NAMED["h100x8"].to_dict() | {
        "name": "slow net",
        "inter_node_bandwidth": 1e10,
        "nodes": 2,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("h100x9", "unknown topology 'h100x9'.*did you mean 'h100x8'"),
        ("none.yaml", "none.yaml: no such topology file; named topologies: h100x8"),
        (5, "expected a name .* got 5"),
        ({"base": "h100"}, "base: unknown topology 'h100'"),
        ({"base": ["h100x8"]}, "base: unknown topology"),
        ({"base": "h100x8", "hbm_byte": 1}, "hbm_byte: unknown key; did you mean 'hbm_bytes'"),
        ({"base": "h100x8", "hbm_bytes": -1}, "hbm_bytes: expected a whole number of bytes above 0, got -1"),
        ({"base": "h100x8", "hbm_bytes": 1.5}, "hbm_bytes: expected a whole number"),
        ({"base": "h100x8", "hbm_bytes": 0}, "hbm_bytes: 0, but device is cuda"),
        (
            {"base": "h100x8", "hbm_bandwidth": "fast"},
            "hbm_bandwidth: expected a number of bytes/s above 0, got 'fast'",
        ),
        ({"base": "h100x8", "device": "tpu"}, "device: expected cuda or cpu, got 'tpu'"),
        ({"base": "h100x8", "nodes": 0}, "nodes: expected a whole number above 0, got 0"),
        ({"device": "cpu"}, "ranks_per_node: missing"),
    ],
)
def test_a_wrong_description_is_refused(given, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        cluster_of(given)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("base: h100x8\nhbm_bytes: no\nnode: 3\n")
    with pytest.raises(PlanError, match="bad.yaml: 2 problems\n.*node: unknown key.*\n.*hbm_bytes: expected"):
        cluster_of(str(path))
    path.write_text("a: [")
    with pytest.raises(PlanError, match="not a YAML file"):
        cluster_of(str(path))


def test_torchrec_sees_our_figures_per_millisecond() -> None:
    cluster = cluster_of(CUSTOM)
    topology = torchrec_topology(cluster)
    assert (topology.world_size, topology.local_world_size, topology.compute_device) == (12, 4, "cuda")
    assert topology.hbm_mem_bw == 1e9 and topology.ddr_mem_bw == 5e7 and topology.hbm_to_ddr_mem_bw == 1.6e7
    assert topology.intra_host_bw == 3.2e7 and topology.inter_host_bw == 1.25e6
    assert {(d.storage.hbm, d.storage.ddr) for d in topology.devices} == {(24 * GB, 32 * GB)}
    assert {d.storage.hbm for d in torchrec_topology(NAMED["cpu"]).devices} == {0}


def test_this_machine_has_its_own_memory() -> None:
    cluster = this_machine(4, 2, "cpu")
    assert (cluster.nodes, cluster.ranks_per_node, cluster.device) == (2, 2, "cpu")
    assert cluster.ddr_bytes == this_machine(1, 1, "cpu").ddr_bytes // 2 and cluster.hbm_bytes == 0
    assert this_machine(16, 8, "cuda").hbm_bytes > 0
