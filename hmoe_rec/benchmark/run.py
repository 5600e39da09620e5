"""The benchmark of plans on one process of the job: all call `benchmark_plans`, all get the same report.

::

    batches in memory ─▶ plans and predictions ─▶ each plan built, taken apart ─▶ rounds: A B C, C A B, ... ─▶ report
"""

import gc
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from hmoe_rec.batch import Batch
from hmoe_rec.benchmark.batches import count_traffic, draw_batches, read_batches
from hmoe_rec.benchmark.candidates import Candidate, clusters_of, make_candidates
from hmoe_rec.benchmark.result import BenchmarkReport, PlanFigures, RankFigures
from hmoe_rec.benchmark.under_test import PlanUnderTest
from hmoe_rec.config import ResolvedData, RunConfig, prepare_data
from hmoe_rec.progress import Progress
from hmoe_rec.sharding.process import Process, process_group
from hmoe_rec.training.evaluate import device_of
from hmoe_rec.training.prepare import with_statistics
from hmoe_rec.training.trainer import choose_threads
from hmoe_rec.types import ConfigError, HmoeError, PlanError
from hmoe_rec.units import format_bytes

BATCH_MEMORY = 1 << 29  # bytes of batches that a process keeps, at most
FREE_SHARE = 0.7  # of the free memory, that plans may take together


@dataclass(frozen=True)
class BenchmarkSettings:
    """How to measure.

    Attributes:
        plans: kinds of plans and paths of plan files.
        data: Parquet; () = the run file's. zipf: skew of ids that are drawn in place of data; None = data.
        topologies: for the predictions; the first one also for the plan of kind auto. () = the run file's, else this
            machine's memory and typical bandwidths.
        rounds, steps, warmup: every plan takes `rounds` turns of `steps` timed steps, after `warmup` ones each.
        apart: steps taken apart, per plan.
        together: keep all plans in memory, or build each plan anew for every turn; None = together if they fit.
    """

    plans: tuple[str, ...]
    data: tuple[str, ...] = ()
    zipf: float | None = None
    topologies: tuple[str, ...] = ()
    rounds: int = 5
    steps: int = 10
    warmup: int = 2
    apart: int = 5
    together: bool | None = None


def benchmark_plans(
    config: RunConfig,
    settings: BenchmarkSettings,
    *,
    config_name: str = "",
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Runs training steps under every plan, in turns. A collective call of all processes of the job.

    Args:
        config_name, overrides: for the report.
        progress: called on the first process with the turns done and all there are.

    Raises:
        HmoeError: no plan at all can be built, bad data, or a topology for another kind of device.
    """
    if config.sharding.replicas > 1:
        raise ConfigError(
            f"sharding.replicas: {config.sharding.replicas}; the benchmark measures plans of one group, without their "
            "averaging: set sharding.replicas=1 and start the processes of a group"
        )
    with process_group(device_of(config)) as process:
        choose_threads(config, process)
        config, batches = _prepare(config, settings, process)
        traffic = count_traffic(batches, config.features, process)
        clusters = clusters_of(settings.topologies or _topology_of(config), process)
        candidates = make_candidates(config, settings.plans, clusters, traffic, process)
        bench = _Bench(config, settings, process, batches, candidates, progress)
        bench.run()
        return BenchmarkReport(
            config=config_name,
            overrides=tuple(overrides),
            host=host_of(process),
            settings=asdict(settings) | {"batches": len(batches), "ids_per_example": traffic.ids},
            world_size=process.world_size,
            global_batch_size=config.train.global_batch_size,
            plans=tuple(bench.figures(c) for c in candidates),
            dense_rounds=tuple(bench.dense_rounds),
            topologies=tuple(clusters),
            kept=bench.together,
        )


class _Bench:
    """The plans of a benchmark while they are measured."""

    def __init__(
        self,
        config: RunConfig,
        settings: BenchmarkSettings,
        process: Process,
        batches: list[Batch],
        candidates: Sequence[Candidate],
        progress: Progress | None,
    ) -> None:
        self.config, self.settings, self.process = config, settings, process
        self.batches = [batch.filled() for batch in batches]
        if process.device.type == "cuda":
            self.batches = [batch.pin_memory() for batch in self.batches]
        self.errors = {c.name: c.error for c in candidates if c.error is not None}
        self.candidates = [c for c in candidates if c.error is None]
        self.progress = progress if process.rank == 0 else None
        self.together = self._fit_together() if settings.together is None else settings.together
        self.built: dict[str, PlanUnderTest] = {}
        self.rounds: dict[str, list[tuple[float, ...]]] = {c.name: [] for c in candidates}
        self.ranks: dict[str, list[RankFigures]] = {}
        self.apart: dict[str, tuple[dict, dict]] = {}
        self.dense_rounds: list[tuple[float, ...]] = []
        self.done = 0

    def run(self) -> None:
        s = self.settings
        if self.together:
            for candidate in self.candidates:
                self._build(candidate)
        for turn in range(s.rounds):
            for candidate in in_turn([c for c in self.candidates if c.name not in self.errors], turn):
                plan = self.built.get(candidate.name) or self._build(candidate)
                if plan is None:
                    continue
                first = turn * (s.warmup + s.steps)
                self.rounds[candidate.name].append(self._slowest(plan.block(s.warmup, s.steps, first)))
                if len(self.dense_rounds) == turn:  # by the first plan of the round
                    self.dense_rounds.append(self._slowest(plan.dense_block(s.warmup, s.steps)))
                if candidate.name not in self.ranks:
                    self._describe(candidate, plan)
                if not self.together:
                    self.built.pop(candidate.name)
                    del plan
                    _free(self.process.device)
                self._advance()
        if len(self.errors) == len(self.rounds):
            reasons = [f"{name}: {error}" for name, error in self.errors.items()]
            raise PlanError("\n  ".join(["none of the plans can be built:", *reasons]))

    def figures(self, candidate: Candidate) -> PlanFigures:
        error = self.errors.get(candidate.name)
        if error is not None:
            return PlanFigures(candidate.name, error=error)
        return PlanFigures(
            candidate.name,
            rounds=tuple(self.rounds[candidate.name]),
            ranks=tuple(self.ranks[candidate.name]),
            shardings=candidate.shardings,
            predictions=candidate.predictions,
        )

    def _build(self, candidate: Candidate) -> PlanUnderTest | None:
        """The plan, or None where any process cannot build it; why not is kept."""
        plan, error = None, self._lacks_memory(candidate)
        if not any(self.process.gather(error)):
            try:
                plan = PlanUnderTest(self.config, self.process, candidate.for_torchrec(self.process), self.batches)
                if candidate.name not in self.apart:
                    parts = plan.parts(self.settings.apart)
                    self.apart[candidate.name] = parts.median_ms(), parts.mean_sent()
                plan.keep_vectors()
            except HmoeError as failed:
                error = str(failed)
            except Exception as failed:  # TorchRec refuses in many ways; the other plans can still be measured
                error = f"{type(failed).__name__}: {(str(failed).splitlines() or ['no message'])[0]}"
        errors = [e for e in self.process.gather(error) if e]
        if errors:
            self.errors[candidate.name] = errors[0]
            return None
        assert plan is not None
        self.built[candidate.name] = plan
        return plan

    def _describe(self, candidate: Candidate, plan: PlanUnderTest) -> None:
        ms, sent = self.apart[candidate.name]
        self.ranks[candidate.name] = self.process.gather(RankFigures(ms, sent, asdict(plan.memory())))

    def _slowest(self, mine: list[float]) -> tuple[float, ...]:
        """Step by step, of all processes."""
        return tuple(max(steps) for steps in zip(*self.process.gather(mine), strict=True))

    def _advance(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.settings.rounds * len(self.candidates))

    # ----------------------------------------------------------------------------------------------------------- memory

    def _needed(self, candidate: Candidate) -> int:
        """Bytes of tables and optimizer that the plan gives this process, as predicted."""
        prediction = next(iter(candidate.predictions.values()))
        rank = prediction.ranks[self.process.rank]
        memory = rank.hbm if self.process.device.type == "cuda" else rank.ddr
        return memory["tables"] + memory["optimizer"]

    def _fit_together(self) -> bool:
        """Whether every process has room for all plans at once."""
        fits = sum(map(self._needed, self.candidates)) <= FREE_SHARE * free_memory(self.process)
        return all(self.process.gather(fits))

    def _lacks_memory(self, candidate: Candidate) -> str | None:
        """Checked beforehand: one process that runs out of memory would leave the others waiting."""
        needed, free = self._needed(candidate), free_memory(self.process)
        if needed <= free:
            return None
        return (
            f"process {self.process.rank} has {format_bytes(free)} of memory free, its tables and their optimizer take "
            f"{format_bytes(needed)}"
        )


def in_turn(plans: Sequence[Any], turn: int) -> list[Any]:
    """The order of a round: every other one runs the one before it backwards, so that a steady drift cancels in pairs;
    each pair begins one further."""
    start = turn // 2 % max(1, len(plans))
    order = [*plans[start:], *plans[:start]]
    return order[::-1] if turn % 2 else order


def free_memory(process: Process) -> int:
    """Bytes that are free for this process: of its GPU, or its share of the machine's."""
    if process.device.type == "cuda":
        return torch.cuda.mem_get_info(process.device)[0]
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return available * 1024 // process.local_world_size


def host_of(process: Process) -> dict[str, Any]:
    """What a reader has to know of the machine."""
    import fbgemm_gpu
    import torchrec

    from hmoe_rec import __version__

    device = "cpu"
    if process.device.type == "cuda":
        device = torch.cuda.get_device_properties(process.device).name
    return {
        "device": device,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backend": dist.get_backend(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchrec": torchrec.__version__,
        "fbgemm": getattr(fbgemm_gpu, "__version__", "unknown"),
        "hmoe_rec": __version__,
    }


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _prepare(config: RunConfig, settings: BenchmarkSettings, process: Process) -> tuple[RunConfig, list[Batch]]:
    wanted = settings.rounds * (settings.warmup + settings.steps) + 2
    if settings.zipf is not None:
        return config, _kept(lambda n: draw_batches(config, process, settings.zipf or 0.0, n), wanted, process)
    if settings.data:
        resolved = ResolvedData(settings.data, (), (), config.schema_of_data)
    else:
        resolved = prepare_data(config, progress=process.rank == 0)
    if not resolved.train:
        raise ConfigError("benchmark: no data; give --data URI, data.train in the run file, or --zipf SKEW")
    config = with_statistics(config, resolved, process)
    return config, _kept(lambda n: read_batches(config, process, resolved.train, n), wanted, process)


def _kept(make: Callable[[int], list[Batch]], wanted: int, process: Process) -> list[Batch]:
    """As many batches as are wanted and as memory allows; the same number everywhere."""
    (first,) = make(1)
    count = max(1, min(wanted, BATCH_MEMORY // max(1, _bytes(first))))
    batches = make(count)
    return batches[: min(process.gather(len(batches)))]


def _bytes(batch: Batch) -> int:
    tensors = (batch.sparse.values(), batch.sparse.lengths(), batch.numbers, batch.vectors, batch.labels)
    return sum(t.numel() * t.element_size() for t in tensors)


def _topology_of(config: RunConfig) -> tuple[Any, ...]:
    return () if config.sharding.topology is None else (config.sharding.topology,)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
