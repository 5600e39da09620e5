"""What this machine takes for lookups and exchanges, measured -> a topology that the planner can use.

::

    exchanges     TorchRec's collectives by size of message                        latency + bytes / bandwidth
    updates       steps of tables that every process holds, by size                bytes / s
    copies        between the GPU's memory and the machine's, or within memory     bytes / s
    collections   sharded collections of several widths, sizes of table, batches   FBGEMM's kernels and the way of ids,
                  and ids per bag, table-wise and row-wise, pooled and not         step by step taken apart

All processes work at once, as in training, so that what they share (memory, network) is shared here too. The price list
(`sharding.prices`) is fitted to the collections and exchanges; the single bandwidths beside it, which TorchRec's
formulas take, are read off the same measurements.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.benchmark.batches import mean_ids
from hmoe_rec.benchmark.fit import Fit, Observation, fit_prices
from hmoe_rec.benchmark.parts import StepParts, synchronize
from hmoe_rec.benchmark.result import OF_TABLES
from hmoe_rec.benchmark.run import host_of
from hmoe_rec.config import RunConfig
from hmoe_rec.embedding.lookup import MultiEmbedding
from hmoe_rec.progress import Progress
from hmoe_rec.sharding.constraints import Constraints
from hmoe_rec.sharding.estimate import predict
from hmoe_rec.sharding.planner import make_plan
from hmoe_rec.sharding.prices import TERMS, Price, Prices
from hmoe_rec.sharding.process import Process, process_group
from hmoe_rec.sharding.replicated import OPTIMIZERS, ReplicatedTables
from hmoe_rec.sharding.shard import shard_model
from hmoe_rec.sharding.topology import Cluster, this_machine
from hmoe_rec.training.optimizer import TABLE_OPTIMIZERS, attach_table_optimizer
from hmoe_rec.types import EmbeddingSet, Features, IdField, SequenceField

KINDS = ("table_wise", "row_wise")
PART_OF = {  # part of the step taken apart -> of a prediction
    "input": "input_all_to_all",
    "forward": "lookup_forward",
    "output": "output_all_to_all",
    "join": "output_all_to_all",
    "split": "gradient_all_to_all",
    "gradient": "gradient_all_to_all",
    "backward": "lookup_backward",
}
COPY_BYTES = 1 << 26
MOST_BYTES = 1 << 30  # of a collection


@dataclass(frozen=True)
class CalibrationSettings:
    """What to measure.

    Attributes:
        widths: of tables. rows: of the tables of a collection, one collection for each entry.
        loads: (examples per process, ids of an example in each table) of pooled tables.
        sequence_loads: the same of tables of sequences, whose backward kernel is slow on CPU.
        optimizer: of the tables.
        messages: bytes of a process's buffer.
        repeats: measured steps of each load, and exchanges of each size; the median counts.
    """

    widths: tuple[int, ...] = (16, 64)
    rows: tuple[tuple[int, ...], ...] = ((30, 1000) * 12, (20_000, 200_000) * 4, (30, 1000, 20_000, 200_000))
    loads: tuple[tuple[int, int], ...] = ((256, 1), (2048, 1), (256, 8), (2048, 8))
    sequence_loads: tuple[tuple[int, int], ...] = ((256, 1), (2048, 1), (256, 8))
    optimizer: str = "rowwise_adagrad"
    messages: tuple[int, ...] = (64, 1 << 12, 1 << 15, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
    repeats: int = 9


@dataclass(frozen=True)
class Exchange:
    """A collective of one size: median milliseconds of the slowest process."""

    kind: str
    bytes: int
    ms: float


@dataclass(frozen=True)
class Update:
    """A replicated table of one size: median milliseconds to write its gradient and to step, mean of the processes."""

    bytes: int
    ms: float


@dataclass(frozen=True)
class Lookup:
    """A collection under a load, taken apart: median milliseconds by part, mean of the processes.

    Attributes:
        ids: of an example in each of the `tables`.
        bandwidth: bytes/s of the forward kernels, by the planner's formula (ids, rows, vectors).
    """

    pooled: bool
    kind: str
    width: int
    rows: tuple[int, ...]
    batch_size: int
    ids: int
    ms: Mapping[str, float]
    bandwidth: float


@dataclass(frozen=True)
class Calibration:
    """Everything measured, and the topology made of it."""

    cluster: Cluster
    fit: Fit
    exchanges: tuple[Exchange, ...]
    updates: tuple[Update, ...]
    lookups: tuple[Lookup, ...]
    copies: Mapping[str, float]
    host: Mapping[str, Any]
    settings: CalibrationSettings

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"schema": "hmoe_rec.calibration", "version": 1, "cluster": self.cluster.to_dict()}


def settings_of(config: RunConfig, world_size: int) -> CalibrationSettings:
    """Widths, numbers and sizes of tables, batch, ids and optimizer as a run has them: for prices that fit its steps.

    Tables that together exceed `MOST_BYTES` are made smaller.
    """
    features, sets = config.features, config.layout().sets
    widths = tuple(sorted({s.dim for s in sets}))
    rows = [f.num_rows for f in features.ids] * len(sets)
    smaller = min(1.0, MOST_BYTES / (4 * widths[-1] * sum(rows)))
    rows = [max(min(n, 2 * world_size), round(smaller * n)) for n in rows]
    batch = max(1, config.train.global_batch_size // world_size)
    few = max(1, batch // 4)
    bags = [mean_ids(config, f.name) for f in features.ids if f.multi_valued]
    behaviors = [mean_ids(config, s.columns[0][0]) for s in features.sequences]
    bag, length = (max(2, round(statistics.fmean(given))) if given else 4 for given in (bags, behaviors))
    found = CalibrationSettings(
        widths=widths,
        rows=(tuple(rows), tuple(sorted(rows)[:: max(1, len(rows) // 4)])),
        loads=((few, 1), (batch, 1), (few, bag), (batch, bag)),
        optimizer=config.train.embedding_optimizer,
    )
    if not behaviors:
        return found
    return replace(found, sequence_loads=((few, 1), (batch, 1), (few, length), (batch, length)))


def calibrate(settings: CalibrationSettings, device: str, *, progress: Progress | None = None) -> Calibration:
    """Measures; a collective call of all processes of the job, which all get the result.

    Args:
        device: "cpu" or "cuda".
        progress: called on the first process with the collections done and all there are.
    """
    with process_group(device) as process:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.local_world_size))
        exchanges = measure_exchanges(process, settings)
        updates = measure_updates(process, settings)
        copies = measure_copies(process)
        base = this_machine(process.world_size, process.local_world_size, device)
        lookups, observations = measure_collections(process, settings, base, progress if process.rank == 0 else None)
        observations += [Observation(x.kind, _of_message(x.bytes), x.ms) for x in exchanges]
        observations += [Observation("update", _of_message(x.bytes), x.ms) for x in updates]
        fit = fit_prices(observations)
        cluster = _cluster(base, fit, exchanges, lookups, copies)
        return Calibration(
            cluster, fit, tuple(exchanges), tuple(updates), tuple(lookups), copies, host_of(process), settings
        )


# ------------------------------------------------------------------------------------------------ exchanges and copies


def measure_exchanges(process: Process, settings: CalibrationSettings) -> list[Exchange]:
    """TorchRec's three collectives and DDP's, on float buffers that are new each time; [] for one process."""
    if process.world_size == 1:
        return []
    world, device = process.world_size, process.device

    def all_to_all(values: Tensor) -> None:
        dist.all_to_all_single(torch.empty_like(values), values)

    def reduce_scatter(values: Tensor) -> None:
        dist.reduce_scatter_tensor(values.new_empty(len(values) // world), values)

    def all_gather(values: Tensor) -> None:
        dist.all_gather_into_tensor(torch.empty_like(values), values[: len(values) // world].contiguous())

    def all_reduce(values: Tensor) -> None:
        dist.all_reduce(values)

    found = []
    for size in settings.messages:
        count = max(world, size // 4 // world * world)
        for exchange in (all_to_all, reduce_scatter, all_gather, all_reduce):
            times = []
            for _ in range(settings.repeats + 2):
                values = torch.ones(count, device=device)
                times.append(_once(lambda: exchange(values), device))  # noqa: B023
            found.append(Exchange(exchange.__name__, 4 * count, _slowest(statistics.median(times[2:]), process)))
    return found


def measure_updates(process: Process, settings: CalibrationSettings) -> list[Update]:
    """Of `ReplicatedTables`, with gradients that are new each time; [] for optimizers that it does not know."""
    kind = TABLE_OPTIMIZERS[settings.optimizer].__name__
    if kind not in OPTIMIZERS:
        return []
    found, width = [], max(settings.widths)
    for size in settings.messages:
        table = nn.Parameter(torch.zeros(max(1, size // 4 // width), width, device=process.device))
        optimizer = ReplicatedTables({"tables.t.weight": table}, kind=kind, lr=0.01, eps=1e-8)
        times = []
        for _ in range(settings.repeats + 2):
            optimizer.zero_grad()
            times.append(_once(lambda: _update(table, optimizer), process.device))  # noqa: B023
        found.append(Update(4 * table.numel(), statistics.fmean(process.gather(statistics.median(times[2:])))))
    return found


def _update(table: nn.Parameter, optimizer: ReplicatedTables) -> None:
    table.grad = torch.zeros_like(table)
    optimizer.step()


def measure_copies(process: Process) -> dict[str, float]:
    """Name -> bytes/s of one process while all copy; on a GPU both ways over its bus, and within its memory."""
    device = process.device
    here, there = (torch.ones(COPY_BYTES // 4, device=device) for _ in range(2))
    ways: dict[str, Callable[[], Any]] = {"within memory": lambda: there.copy_(here)}
    if device.type == "cuda":
        pinned = torch.ones(COPY_BYTES // 4).pin_memory()
        ways |= {
            "host to device": lambda: here.copy_(pinned, non_blocking=True),
            "device to host": lambda: pinned.copy_(here, non_blocking=True),
        }
    found = {}
    for name, way in ways.items():
        times = [_once(way, device) for _ in range(7)]
        found[name] = 1e3 * COPY_BYTES / _slowest(statistics.median(times[2:]), process)
    return found


def _once(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds, begun by all processes together."""
    dist.barrier()
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return 1e3 * (time.perf_counter() - began)


def _slowest(ms: float, process: Process) -> float:
    return max(process.gather(ms))


# --------------------------------------------------------------------------------------------------------- collections


class Tables(nn.Module):
    """One collection as a model has it, `MultiEmbedding`; the loss is the mean square of all vectors.

    Args:
        rows: of each table; `t0`, `t1`, ...
        pooled: a bag of ids for each table; else one id and a sequence of behaviors.
    """

    def __init__(self, rows: Sequence[int], width: int, pooled: bool, optimizer: str) -> None:
        super().__init__()
        fields = tuple(IdField(f"t{i}", count, multi_valued=pooled) for i, count in enumerate(rows))
        sequences = tuple(SequenceField(f"s{i}", ((f"b{i}", f"t{i}"),)) for i in range(0 if pooled else len(rows)))
        self.features = Features(fields, sequences)
        self.tables = MultiEmbedding(self.features, [EmbeddingSet("s", width)], device=torch.device("meta"))
        attach_table_optimizer(self, kind=optimizer, lr=0.01)

    def forward(self, ids: KeyedJaggedTensor, longest: tuple[int, ...]) -> Tensor:
        found = self.tables(ids, longest)["s"]
        vectors = [found.pooled] if found.pooled is not None else [*found.targets.values(), *found.behaviors.values()]
        return torch.stack([v.square().mean() for v in vectors]).sum()


def draw(features: Features, batch_size: int, ids: int, seed: int) -> tuple[KeyedJaggedTensor, tuple[int, ...]]:
    """Evenly drawn ids, and the length of every sequence: `ids` in each bag or sequence, one id beside a sequence."""
    generator = torch.Generator().manual_seed(seed)
    values, lengths = [], []
    for key in features.sparse_keys:
        field = features.id_field(features.targets.get(key, key))
        count = ids if field.multi_valued or key in features.targets else 1
        drawn = torch.randint(field.num_embeddings, (batch_size * count,), generator=generator, dtype=torch.int32)
        values.append(drawn)
        lengths.append(torch.full((batch_size,), count, dtype=torch.int32))
    jagged = KeyedJaggedTensor(keys=list(features.sparse_keys), values=torch.cat(values), lengths=torch.cat(lengths))
    return jagged, (ids,) * len(features.sequences)


def measure_collections(
    process: Process, settings: CalibrationSettings, base: Cluster, progress: Progress | None
) -> tuple[list[Lookup], list[Observation]]:
    lookups: list[Lookup] = []
    observations: list[Observation] = []
    builds = [(p, w, r, k) for p in (True, False) for w in settings.widths for r in settings.rows for k in KINDS]
    for done, (pooled, width, rows, kind) in enumerate(builds):
        module = Tables(rows, width, pooled, settings.optimizer)
        plan = make_plan(
            module,
            kind=kind,
            world_size=process.world_size,
            local_world_size=process.local_world_size,
            device_type=process.device.type,
        )
        for_predictions = Tables(rows, width, pooled, settings.optimizer)
        sharded = shard_model(module, plan=plan, device=process.device)
        for batch_size, ids in settings.loads if pooled else settings.sequence_loads:
            parts = _steps(sharded, module, batch_size, ids, settings.repeats, process)
            measured = process.gather(parts.median_ms())
            prediction = partial(predicted_ms, for_predictions, plan, batch_size, ids)
            observations += observations_of(base, kind, pooled, measured, prediction)
            ms = {part: statistics.fmean(rank[part] for rank in measured) for part in OF_TABLES}
            lookups.append(
                Lookup(pooled, kind, width, rows, batch_size, ids, ms, _bandwidth(base, ms["forward"], prediction))
            )
        if progress is not None:
            progress(done + 1, len(builds))
    return lookups, observations


def _steps(sharded: nn.Module, module: Tables, batch_size: int, ids: int, repeats: int, process: Process) -> StepParts:
    parts = StepParts(module.tables, process.device)
    for i in range(repeats + 2):
        jagged, longest = draw(module.features, batch_size, ids, process.rank * 65537 + i)
        here = jagged.to(process.device)
        if i < 2:
            sharded(here, longest).backward()
        else:
            with parts.watching():
                parts.step(lambda: sharded(here, longest), lambda loss: loss.backward(), lambda: None)  # noqa: B023
    return parts


def predicted_ms(
    module: Tables, plan: ShardingPlan, batch_size: int, ids: float, cluster: Cluster
) -> list[dict[str, float]]:
    """What the planner predicts of `draw`'s batches: milliseconds by part, by rank."""
    targets = module.features.targets
    pooling = {key: 1.0 if targets and key not in targets else float(ids) for key in module.features.sparse_keys}
    found = predict(module, plan, cluster, batch_size=batch_size, constraints=Constraints(pooling=pooling))
    return [dict(rank.ms) for rank in found.ranks]


def observations_of(
    base: Cluster,
    kind: str,
    pooled: bool,
    measured: Sequence[Mapping[str, float]],
    prediction: Callable[[Cluster], list[dict[str, float]]],
) -> list[Observation]:
    """What a price multiplies is what the planner predicts where that price is 1 and the others are 0."""
    cut, world = kind == "row_wise", len(measured)
    price_of = {
        "input": "input_cut" if cut else "input",
        "forward": "forward" if pooled else "forward_unpooled",
        "backward": "backward" if pooled else "backward_unpooled",
        "join": "join_unpooled" if not pooled else "join_cut" if cut else "join",
        "split": "split_unpooled" if not pooled else "split_cut" if cut else "split",
    }
    if world > 1:
        price_of["output"] = "reduce_scatter" if cut and pooled else "all_to_all"
        price_of["gradient"] = "all_gather" if cut and pooled else "all_to_all"
    amounts: dict[tuple[str, str], list[dict[str, float]]] = {}
    for term in TERMS:
        # Exchanges and what is done around them are one part of a prediction, so they take turns.
        for group in (("join", "split"), tuple(part for part in price_of if part not in ("join", "split"))):
            alone = Prices(**{price_of[part]: Price(**{term: 1.0}) for part in group})
            found = prediction(replace(base, nodes=1, prices=alone))
            amounts |= {(part, term): found for part in group}
    return [
        Observation(price, {term: amounts[part, term][rank][PART_OF[part]] for term in TERMS}, ms[part])
        for rank, ms in enumerate(measured)
        for part, price in price_of.items()
    ]


def _bandwidth(base: Cluster, ms: float, prediction: Callable[[Cluster], list[dict[str, float]]]) -> float:
    """Bytes/s that make the planner's formula right."""
    unit = replace(base, hbm_bandwidth=1e9, ddr_bandwidth=1e9, kernel_overhead_ms=0.0)
    predicted = statistics.fmean(rank["lookup_forward"] for rank in prediction(unit))
    return 1e9 * predicted / ms if ms > 0 else float("inf")


# -------------------------------------------------------------------------------------------------------- the topology


def _of_message(size: int) -> dict[str, float]:
    return {"call_ms": 1.0, "byte_ns": size / 1e6}


def _cluster(
    base: Cluster, fit: Fit, exchanges: Sequence[Exchange], lookups: Sequence[Lookup], copies: Mapping[str, float]
) -> Cluster:
    messages = fit_prices([Observation(x.kind, _of_message(x.bytes), x.ms) for x in exchanges]).prices.all_to_all
    found: dict[str, Any] = {
        "name": "calibrated",
        "prices": fit.prices,
        "kernel_overhead_ms": fit.prices.forward.call_ms,
    }
    large = [x.bandwidth for x in _large(lookups)]
    found["hbm_bandwidth" if base.device == "cuda" else "ddr_bandwidth"] = statistics.median(large)
    if base.device == "cuda":
        found["hbm_to_ddr_bandwidth"] = min(copies["host to device"], copies["device to host"])
    if exchanges:
        found["all_to_all_latency_ms"] = messages.call_ms
        bandwidth = 1e9 / messages.byte_ns if messages.byte_ns else base.intra_node_bandwidth
        found["intra_node_bandwidth" if base.nodes == 1 else "inter_node_bandwidth"] = bandwidth
    return replace(base, **found)


def _large(lookups: Sequence[Lookup]) -> list[Lookup]:
    """Pooled lookups of the largest batch where tables are large and ids few: there rows are random to the memory."""
    pooled = [x for x in lookups if x.pooled]
    for key in (lambda x: statistics.median(x.rows), lambda x: -x.ids, lambda x: x.batch_size):
        most = max(map(key, pooled))
        pooled = [x for x in pooled if key(x) == most]
    return pooled
