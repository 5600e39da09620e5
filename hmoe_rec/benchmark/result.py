"""What a benchmark found, as plain data, and its JSON. No torch in here.

What is called an error of a prediction: a planner predicts the time of the tables (`PlanPrediction.critical_ms`: ids
and vectors exchanged, lookups, the tables' optimizer; on the busiest process), not of the dense part, which is the
same under every plan. So::

    measured time of the tables = median step - median step without tables (`dense_ms`)
    error of the tables         = predicted time of the tables / measured time of the tables - 1
    error of the step           = (dense_ms + predicted time of the tables) / median step - 1

`dense_ms` is measured in the same rounds: the same step with the vectors given, so no ids, no lookups, no exchange of
either; experts, towers, losses, DDP and Adam as they are. Where a pipeline overlaps exchanges with other work, the
difference is what is not hidden.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hmoe_rec.benchmark.statistics import kendall, median, paired_ratio, quantile, spearman, spread_of_median
from hmoe_rec.sharding.prediction import PlanPrediction

SCHEMA = "hmoe_rec.benchmark"
VERSION = 1
# Parts of a step that is taken apart (parts.py says what they are), and kinds of bytes sent.
OF_TABLES = ("input", "forward", "output", "join", "split", "gradient", "backward")
MEASURED = (*OF_TABLES, "wait", "rest")
KINDS = ("input", "output", "gradient")


@dataclass(frozen=True)
class RankFigures:
    """One process under a plan.

    Attributes:
        ms: part of a step taken apart (`MEASURED`) -> median milliseconds.
        sent: "input", "output", "gradient" -> mean bytes a step sends to other processes.
        memory: "tables", "optimizer", "peak" -> bytes (`under_test.Memory`).
    """

    ms: Mapping[str, float]
    sent: Mapping[str, float]
    memory: Mapping[str, int]

    @property
    def exchange_ms(self) -> float:
        """In exchanges: of ids with what prepares them, of vectors, of gradients; without the wait for others."""
        return sum(self.ms[part] for part in ("input", "output", "gradient"))

    @property
    def table_ms(self) -> float:
        """In all parts that are predicted."""
        return sum(self.ms[part] for part in OF_TABLES)


@dataclass(frozen=True)
class PlanFigures:
    """One plan.

    Attributes:
        rounds: of each round, milliseconds of its steps, each that of the slowest process.
        ranks: of each process.
        shardings: sharding type -> tables.
        predictions: topology -> what was predicted.
        error: why it could not be built; then there are no figures.
    """

    name: str
    rounds: tuple[tuple[float, ...], ...] = ()
    ranks: tuple[RankFigures, ...] = ()
    shardings: Mapping[str, int] = field(default_factory=dict)
    predictions: Mapping[str, PlanPrediction] = field(default_factory=dict)
    error: str | None = None

    @property
    def steps(self) -> list[float]:
        return [ms for steps in self.rounds for ms in steps]

    @property
    def median_ms(self) -> float:
        return median(self.steps)

    @property
    def p90_ms(self) -> float:
        return quantile(self.steps, 0.9)

    @property
    def spread_ms(self) -> tuple[float, float]:
        return spread_of_median(self.rounds)

    @property
    def sent_bytes(self) -> float:
        """By the process that sends the most."""
        return max(sum(rank.sent.values()) for rank in self.ranks)

    @property
    def exchange_ms(self) -> float:
        """Of the process that spends the most in exchanges."""
        return max(rank.exchange_ms for rank in self.ranks)

    def most_memory(self, kind: str) -> int:
        return max(rank.memory[kind] for rank in self.ranks)


@dataclass(frozen=True)
class Agreement:
    """How well a topology predicted the plans.

    Attributes:
        table_error, step_error: plan -> share, see the module's docstring; None where nothing was measured.
        spearman, kendall: rank correlation of predicted time and median step; None with fewer than two plans.
    """

    table_error: Mapping[str, float | None]
    step_error: Mapping[str, float]
    spearman: float | None
    kendall: float | None

    @property
    def mean_table_error(self) -> float | None:
        """Mean of the absolute errors."""
        known = [abs(x) for x in self.table_error.values() if x is not None]
        return sum(known) / len(known) if known else None

    @property
    def mean_step_error(self) -> float | None:
        return sum(map(abs, self.step_error.values())) / len(self.step_error) if self.step_error else None


@dataclass(frozen=True)
class BenchmarkReport:
    """A whole benchmark.

    Attributes:
        config: the run file; overrides: what was set over it.
        host: machine, versions, threads; settings: of the benchmark.
        dense_rounds: of each round, milliseconds of steps without tables.
        kept: all plans were in memory together; False: one at a time, built anew in every round.
    """

    config: str
    overrides: tuple[str, ...]
    host: Mapping[str, Any]
    settings: Mapping[str, Any]
    world_size: int
    global_batch_size: int
    plans: tuple[PlanFigures, ...]
    dense_rounds: tuple[tuple[float, ...], ...]
    topologies: tuple[str, ...] = ()
    kept: bool = True

    @property
    def built(self) -> list[PlanFigures]:
        """Plans with figures, the fastest first."""
        return sorted((p for p in self.plans if p.error is None), key=lambda p: p.median_ms)

    @property
    def failed(self) -> list[PlanFigures]:
        return [p for p in self.plans if p.error is not None]

    @property
    def dense_ms(self) -> float:
        return median([ms for steps in self.dense_rounds for ms in steps])

    def ratio(self, plan: PlanFigures) -> float:
        """To the fastest plan, round by round."""
        return paired_ratio(plan.rounds, self.built[0].rounds)

    def table_ms(self, plan: PlanFigures) -> float:
        """Measured: what the tables add to a step. Below 0 where noise is larger than they are."""
        return plan.median_ms - self.dense_ms

    def examples_per_second(self, plan: PlanFigures) -> float:
        return 1e3 * self.global_batch_size / plan.median_ms

    def agreement(self, topology: str) -> Agreement:
        plans = self.built
        predicted = {p.name: p.predictions[topology].critical_ms for p in plans}
        measured = {p.name: p.median_ms for p in plans}
        return Agreement(
            table_error={
                p.name: predicted[p.name] / self.table_ms(p) - 1 if self.table_ms(p) > 0 else None for p in plans
            },
            step_error={p.name: (self.dense_ms + predicted[p.name]) / measured[p.name] - 1 for p in plans},
            spearman=spearman(list(predicted.values()), list(measured.values())),
            kendall=kendall(list(predicted.values()), list(measured.values())),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: everything measured, and the figures made of it."""
        plans = [_plan_to_dict(self, plan) for plan in self.plans]
        agreements = {name: self.agreement(name) for name in self.topologies} if self.built else {}
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "config": self.config,
            "overrides": list(self.overrides),
            "host": dict(self.host),
            "settings": dict(self.settings),
            "world_size": self.world_size,
            "global_batch_size": self.global_batch_size,
            "kept_in_memory_together": self.kept,
            "dense_ms": self.dense_ms if self.dense_rounds else None,
            "dense_rounds_ms": [list(steps) for steps in self.dense_rounds],
            "plans": plans,
            "agreement": {
                name: asdict(a) | {"mean_table_error": a.mean_table_error, "mean_step_error": a.mean_step_error}
                for name, a in agreements.items()
            },
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def _plan_to_dict(report: BenchmarkReport, plan: PlanFigures) -> dict[str, Any]:
    if plan.error is not None:
        return {"name": plan.name, "error": plan.error}
    return {
        "name": plan.name,
        "error": None,
        "shardings": dict(plan.shardings),
        "median_ms": plan.median_ms,
        "p90_ms": plan.p90_ms,
        "median_ms_95": list(plan.spread_ms),
        "examples_per_second": report.examples_per_second(plan),
        "ratio_to_fastest": report.ratio(plan),
        "table_ms": report.table_ms(plan),
        "round_medians_ms": [median(steps) for steps in plan.rounds],
        "rounds_ms": [list(steps) for steps in plan.rounds],
        "ranks": [asdict(rank) for rank in plan.ranks],
        "predictions": {
            name: {
                "critical_ms": p.critical_ms,
                "ranks_ms": [dict(rank.ms) for rank in p.ranks],
                "ranks_memory": [{"hbm": dict(rank.hbm), "ddr": dict(rank.ddr)} for rank in p.ranks],
            }
            for name, p in plan.predictions.items()
        },
    }
