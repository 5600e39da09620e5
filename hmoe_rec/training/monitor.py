"""Tables in training -> how many directions of their width they use, now and then, and a warning where one collapses.

    monitor = CollapseMonitor(sharded, process, every=1000, max_rows=4096, below=0.1)
    if monitor.is_due(step):
        found = monitor.measure(step)                      # collective
        for warning in monitor.warnings(found): ...

A table collapses when its information abundance falls to 1, whatever its width. What it is held against is a random
table of the sampled shape, which is also its own past: tables begin random, and all learning takes something away.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from hmoe_rec.metrics import spectrum
from hmoe_rec.sharding.live_grams import TableGram, live_grams
from hmoe_rec.sharding.process import Process

SHOWN = 5  # tables in a warning
WORTH = 0.01  # of the time; more is told
_random = cache(spectrum.random_reference)


@dataclass(frozen=True)
class TableMeasures:
    """Of the sampled rows of a table.

    Attributes:
        rows, sampled, dim: of the table, in the sample, width.
        information_abundance, effective_rank, stable_rank, participation_ratio: in [1, dim]; NaN for zeros.
        random: information abundance of random tables of the sample's shape.
        share_of_width: information_abundance / dim.
        share_of_random: (information_abundance - 1) / (random - 1): 0 = all rows on one line, about 1 = untrained.
            Ours; less 1, so that one threshold suits all widths.
    """

    rows: int
    sampled: int
    dim: int
    information_abundance: float
    effective_rank: float
    stable_rank: float
    participation_ratio: float
    random: float
    share_of_width: float
    share_of_random: float


class CollapseMonitor:
    """Measures a sharded model; every process makes one and calls it at the same steps.

    Args:
        model: under DistributedModelParallel.
        every: steps between measurements.
        max_rows: of a table that are looked at, each time others.
        below: `share_of_random` of a table that has collapsed. Published figures of DCN V2, 40 wide, on Criteo: 0.22
            on average, 0.03 in the worst table. Our runs on KuaiRand, MovieLens and synthetic logs: 0.11 and more.
        replicas: see `live_grams`.
    """

    def __init__(
        self, model: nn.Module, process: Process, *, every: int, max_rows: int, below: float, replicas: int = 1
    ) -> None:
        self.model, self.process, self.every, self.max_rows, self.below = model, process, every, max_rows, below
        self.replicas = replicas
        self._seen: int | None = None
        self.seconds = 0.0
        self._collapsed: set[str] = set()
        self._last, self._told = time.perf_counter(), False

    def is_due(self, step: int) -> bool:
        """Whether a multiple of `every` was passed since the last call, or is reached with this one."""
        before, self._seen = step - 1 if self._seen is None else self._seen, step
        return step // self.every > before // self.every

    def measure(self, step: int) -> dict[str, TableMeasures]:
        """By table, the same on every process. A collective call; `seconds` says how long it took."""
        began = time.perf_counter()
        grams = live_grams(
            self.model, self.process, max_rows=self.max_rows, turn=step // self.every, replicas=self.replicas
        )
        found = measures_of(grams)
        self.seconds = time.perf_counter() - began
        return found

    def warnings(self, found: Mapping[str, TableMeasures]) -> Iterator[str]:
        """A line on the tables that have collapsed since they were last seen, and one if measuring takes too long."""
        before, self._collapsed = self._collapsed, {n for n, m in found.items() if has_collapsed(m, self.below)}
        new = sorted(self._collapsed - before, key=lambda name: found[name].share_of_random)
        if new:
            shown = [f"{name} ({_in_words(found[name])})" for name in new[:SHOWN]]
            others = [f"{len(new) - SHOWN} more (collapse.jsonl)"] if len(new) > SHOWN else []
            yield (
                f"warning: {len(new)} of {len(found)} tables collapse{'s' if len(new) == 1 else ''}: "
                f"{', '.join([*shown, *others])}: less than train.monitor.collapse_below ({self.below:.0%}) of a "
                "random table's directions beyond the first. More width will not help: give several embedding sets "
                "(preset multi_embedding or stem) or an expert that projects before it multiplies (dcnv2), or lower "
                "train.embedding_learning_rate"
            )
        now = time.perf_counter()
        share, self._last = self.seconds / max(now - self._last, 1e-9), now
        if share > WORTH and not self._told:
            self._told = True
            yield (
                f"note: train.monitor takes {share:.1%} of the time ({self.seconds:.2f} s each {self.every} steps); "
                f"collapse_every={10 * math.ceil(self.every * share / WORTH / 10)} takes less than {WORTH:.0%}"
            )

    def line(self, step: int, found: Mapping[str, TableMeasures]) -> dict[str, Any]:
        """For collapse.jsonl."""
        return {"step": step, "seconds": self.seconds, "tables": {name: asdict(m) for name, m in found.items()}}


def measures_of(grams: Mapping[str, TableGram]) -> dict[str, TableMeasures]:
    """Tables of one width are measured together."""
    found: dict[str, TableMeasures] = {}
    widths: dict[int, list[str]] = {}
    for name, g in grams.items():
        widths.setdefault(len(g.gram_DD), []).append(name)
    for dim, names in widths.items():
        values = spectrum.singular_values(torch.stack([grams[n].gram_DD for n in names]))
        ranks = torch.stack([of(values) for of in _MEASURES], 1).tolist()
        for name, (abundance, effective, stable, participation) in zip(names, ranks, strict=True):
            g = grams[name]
            random = _random(g.sampled, dim)
            share = (abundance - 1) / (random - 1) if random > 1.0001 else float("nan")
            found[name] = TableMeasures(
                g.rows, g.sampled, dim, abundance, effective, stable, participation, random, abundance / dim, share
            )
    return {name: found[name] for name in grams}


_MEASURES = (
    spectrum.information_abundance,
    spectrum.effective_rank,
    spectrum.stable_rank,
    spectrum.participation_ratio,
)


def has_collapsed(measures: TableMeasures, below: float) -> bool:
    """Of tables with more rows than columns; a few rows have few directions by nature."""
    return measures.rows > measures.dim and measures.share_of_random < below


def _in_words(m: TableMeasures) -> str:
    return (
        f"information abundance {m.information_abundance:.1f} at width {m.dim}, random {m.random:.1f}: "
        f"{m.share_of_random:.0%}"
    )
