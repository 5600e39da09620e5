"""A cluster that need not be here, as plain data: its processes, their memory, the bandwidths between them.

No torch in here; `torchrec_topology` imports TorchRec when it is called.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import yaml

from hmoe_rec import io
from hmoe_rec.sharding.prices import Prices, prices_of
from hmoe_rec.suggest import did_you_mean, unknown
from hmoe_rec.types import PlanError

if TYPE_CHECKING:
    from torchrec.distributed.planner.types import Topology

GB = 1024**3
OPTIONAL = ("kernel_overhead_ms", "all_to_all_latency_ms", "prices")
_MS = 1e3  # in a second: TorchRec counts bytes per millisecond


@dataclass(frozen=True)
class Cluster:
    """`nodes` equal machines with `ranks_per_node` processes each, one process per device.

    Attributes:
        device: "cuda" or "cpu".
        hbm_bytes, ddr_bytes: memory of one process's device, and its share of its machine's memory. hbm is 0 on CPU.
        hbm_bandwidth, ddr_bandwidth: bytes/s one process reads from the one or the other.
        hbm_to_ddr_bandwidth: bytes/s between a device and the machine's memory (PCIe).
        intra_node_bandwidth, inter_node_bandwidth: bytes/s of one process in a collective on one machine, and over
            several: bytes of its whole buffer, its own part included, over the time (this is how TorchRec counts).
        kernel_overhead_ms: of one lookup call, forward or backward, whatever its size.
        all_to_all_latency_ms: of one collective with next to no data.
        prices: what the machine was measured to take; in place of bandwidths and overheads, as far as it goes.
    """

    name: str
    device: str
    nodes: int
    ranks_per_node: int
    hbm_bytes: int
    ddr_bytes: int
    hbm_bandwidth: float
    ddr_bandwidth: float
    hbm_to_ddr_bandwidth: float
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    kernel_overhead_ms: float = 0.0
    all_to_all_latency_ms: float = 0.0
    prices: Prices | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def memory_kind(self) -> str:
        """Where tables live unless a kernel says otherwise: "hbm" or "ddr"."""
        return "hbm" if self.device == "cuda" else "ddr"

    @property
    def memory_bytes(self) -> int:
        return self.hbm_bytes if self.device == "cuda" else self.ddr_bytes

    def with_nodes(self, nodes: int) -> "Cluster":
        return replace(self, nodes=nodes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _dgx(name: str, hbm: float, hbm_tb: float, ddr_tb: float, ddr_gb: float, pcie: float, nvlink: float, nic: float):
    return Cluster(
        name=name,
        device="cuda",
        nodes=1,
        ranks_per_node=8,
        hbm_bytes=int(hbm * GB),
        ddr_bytes=int(ddr_tb * 1024 * GB) // 8,
        hbm_bandwidth=hbm_tb * 1e12,
        ddr_bandwidth=ddr_gb * 1e9 / 8,
        hbm_to_ddr_bandwidth=pcie * 1e9,
        intra_node_bandwidth=nvlink * 1e9,
        inter_node_bandwidth=nic * 1e9,
        kernel_overhead_ms=0.01,
        all_to_all_latency_ms=0.05,
    )


NAMED = {
    c.name: c
    for c in (
        _dgx("h100x8", hbm=79, hbm_tb=3.35, ddr_tb=2, ddr_gb=614, pcie=64, nvlink=450, nic=50),
        _dgx("h200x8", hbm=139, hbm_tb=4.8, ddr_tb=2, ddr_gb=614, pcie=64, nvlink=450, nic=50),
        _dgx("a100x8_40gb", hbm=39, hbm_tb=1.555, ddr_tb=1, ddr_gb=410, pcie=32, nvlink=300, nic=25),
        _dgx("a100x8", hbm=79, hbm_tb=2.039, ddr_tb=2, ddr_gb=410, pcie=32, nvlink=300, nic=25),
        _dgx("b200x8", hbm=178, hbm_tb=8.0, ddr_tb=2, ddr_gb=717, pcie=64, nvlink=900, nic=50),
        Cluster(
            name="cpu",
            device="cpu",
            nodes=1,
            ranks_per_node=2,
            hbm_bytes=0,
            ddr_bytes=8 * GB,
            hbm_bandwidth=4e9,
            ddr_bandwidth=4e9,
            hbm_to_ddr_bandwidth=4e9,
            intra_node_bandwidth=1.9e9,
            inter_node_bandwidth=1.2e9,
            kernel_overhead_ms=0.1,
            all_to_all_latency_ms=0.3,
        ),
    )
}
"""Named machines, one node each (`with_nodes` takes more). Data sheets' figures, in one direction, not measurements:
`hmoe-rec bench calibrate` measures a machine and writes a topology file.

- Memory: what the driver shows of NVIDIA's 80, 141, 40, 80 and 180 GB, in GiB. HBM bandwidth: NVIDIA's data sheets of
  H100 SXM (3.35 TB/s), H200 (4.8), A100 SXM 40 GB (1.555) and 80 GB (2.039), DGX B200 (64 TB/s over 8).
- Machine: DGX H100, H200, A100 and B200 user guides: 2 TB of memory (1 TB with A100 40 GB), shared by 8 processes; two
  sockets of 8 channels DDR5-4800 (2 x 307 GB/s), DDR4-3200 (2 x 205), DDR5-5600 (2 x 358).
- Links: half of NVLink's 900, 600 and 1,800 GB/s (both directions together); one 400 Gb/s (A100: 200 Gb/s) network
  card a device; PCIe 5.0 x16 64 GB/s, PCIe 4.0 x16 32 GB/s.
- Overheads of the GPUs are ours: about one CUDA launch, about one small NCCL all-to-all.
- "cpu": measured on a two-core virtual machine: lookups of random rows 4 GB/s (a plain copy: 23), gloo all-to-all of
  4 MB 1.9 GB/s, of 32 bytes 0.3 ms; between machines 10 Gb/s Ethernet.
"""


def cluster_of(given: str | Mapping[str, Any], nodes: int | None = None) -> Cluster:
    """The cluster that a name of `NAMED`, a file (.yaml, .yml, .json) or a mapping describes.

    A mapping has the keys of `Cluster`, or `base: h100x8` and the keys that differ.

    Args:
        nodes: machines; None = what the description says, 1 for a name.

    Raises:
        PlanError: with every problem of the description.
    """
    where = "topology"
    if isinstance(given, str) and given in NAMED:
        given = {"base": given, "name": given}
    elif isinstance(given, str):
        if not given.endswith((".yaml", ".yml", ".json")):
            raise PlanError(f"topology: {unknown('topology', given, NAMED)}; or the path of a .yaml file")
        where, given = given, _read(given)
    if not isinstance(given, Mapping):
        raise PlanError(f"{where}: expected a name ({', '.join(NAMED)}) or a mapping, got {given!r}")
    content = dict(given)
    base = content.pop("base", None)
    if base is not None and base not in list(NAMED):
        raise PlanError(f"{where}: base: {unknown('topology', base, NAMED)}")
    defaults = {"name": "custom", "nodes": 1} | (NAMED[base].to_dict() if base is not None else {})
    cluster = _checked({**defaults, **content}, given=content, where=where)
    return cluster if nodes is None else _checked({**cluster.to_dict(), "nodes": nodes}, {"nodes": nodes}, where)


def this_machine(world_size: int, local_world_size: int, device: str) -> Cluster:
    """The cluster a job runs on: this machine's memory, the bandwidths of the named machine that resembles it."""
    import torch

    ddr = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_world_size
    base = NAMED["cpu"]
    hbm = 0
    if device == "cuda":
        present = torch.cuda.is_available()
        model = torch.cuda.get_device_properties(0).name if present else ""
        base = NAMED[next((name for name in ("h200x8", "b200x8", "a100x8") if name[:4].upper() in model), "h100x8")]
        hbm = torch.cuda.get_device_properties(0).total_memory if present else base.hbm_bytes
    return replace(
        base,
        name=f"this machine ({base.name})",
        nodes=max(1, world_size // local_world_size),
        ranks_per_node=min(local_world_size, world_size),
        hbm_bytes=hbm,
        ddr_bytes=ddr,
    )


def torchrec_topology(cluster: Cluster) -> "Topology":
    """The same for TorchRec's planner, as a dry run: no process group, no device."""
    from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig

    hardware = HardwareConfig(
        hbm_mem_bw=cluster.hbm_bandwidth / _MS,
        ddr_mem_bw=cluster.ddr_bandwidth / _MS,
        hbm_to_ddr_mem_bw=cluster.hbm_to_ddr_bandwidth / _MS,
        intra_host_bw=cluster.intra_node_bandwidth / _MS,
        inter_host_bw=cluster.inter_node_bandwidth / _MS,
    )
    trainer = TrainerConfig(
        world_size=cluster.world_size,
        local_world_size=cluster.ranks_per_node,
        is_dry_run=True,
        dry_run_hbm_bytes=cluster.hbm_bytes,
        dry_run_ddr_bytes=cluster.ddr_bytes,
    )
    # Without this flag TorchRec ignores the bandwidths above and takes those of a V100.
    kernel = KernelConfig(compute_device=cluster.device, use_hardware_based_bandwidth=True)
    return TopologyFactory.create_topology(trainer, hardware, kernel)


def _read(uri: str) -> Any:
    try:
        with io.open(uri, "r") as file:
            return yaml.safe_load(file)
    except FileNotFoundError as error:
        raise PlanError(f"{uri}: no such topology file; named topologies: {', '.join(NAMED)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{uri}: not a YAML file: {error}") from error


def _checked(content: Mapping[str, Any], given: Mapping[str, Any], where: str) -> Cluster:
    names = [f.name for f in fields(Cluster)]
    problems = [f"{key}: unknown key{did_you_mean(key, [*names, 'base'])}" for key in given if key not in names]
    required = [f.name for f in fields(Cluster) if f.name not in OPTIONAL]
    problems += [f"{key}: missing (or name a base: {', '.join(NAMED)})" for key in required if key not in content]
    values: dict[str, Any] = {"prices": prices_of(content.get("prices"), problems)}
    for field in fields(Cluster):
        if field.name in content and field.name != "prices":
            value = _value(field.name, content[field.name])
            values[field.name] = value
            problems += [] if value is not None else [_expected(field.name, content[field.name])]
    if values.get("device") == "cuda" and values.get("hbm_bytes") == 0:
        problems.append("hbm_bytes: 0, but device is cuda; give the memory of one device in bytes")
    if problems:
        raise PlanError("\n  ".join([f"{where}: {len(problems)} problem{'s' * (len(problems) > 1)}", *problems]))
    return Cluster(**values)


def _value(name: str, value: Any) -> Any:
    """The value of a key in its type; None if it is wrong. Strings may be numbers: YAML reads 3.35e12 as one."""
    if name == "name":
        return str(value)
    if name == "device":
        return value if value in ("cuda", "cpu") else None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    whole = name in ("nodes", "ranks_per_node", "hbm_bytes", "ddr_bytes")
    may_be_zero = name in ("hbm_bytes", "kernel_overhead_ms", "all_to_all_latency_ms")
    wrong = isinstance(value, bool) or not 0 <= number < float("inf") or (number == 0 and not may_be_zero)
    if wrong or (whole and number != int(number)):
        return None
    return int(number) if whole else number


def _expected(name: str, value: Any) -> str:
    if name == "device":
        return f"device: expected cuda or cpu, got {value!r}"
    kind = "a whole number" if name in ("nodes", "ranks_per_node", "hbm_bytes", "ddr_bytes") else "a number"
    unit = "bytes/s" if name.endswith("bandwidth") else "bytes" if name.endswith("bytes") else ""
    unit = "milliseconds" if name.endswith("_ms") else unit
    return f"{name}: expected {kind}{' of ' + unit if unit else ''} above 0, got {value!r}"
