"""Gates and experts over data: which task reads which expert and set how much, which experts are alike, which are dead.

Letters of this file: G slices, U units of all experts side by side.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmoe_rec.analysis.calibration import Slicing, agreed_slicing, slices_of
from hmoe_rec.analysis.opening import OpenRun
from hmoe_rec.analysis.report import Plot, ReportTable, Section, new_figure
from hmoe_rec.metrics.spectrum import linear_cka
from hmoe_rec.towers.gate import Mixture

UNUSED = 0.2  # of an equal share: a task that gives an expert less does not use it
CONSTANT = 1e-12  # share of an expert's squares that is its variance: below it, it says the same to all examples
MAX_UNITS = 4096  # the Gram matrix of all experts' outputs is as wide as they are


class GateUsage:
    """Sums over examples, weighted as they are; processes add up.

    Args:
        num_tasks, num_experts, width: T, E, H.
        num_slices: G.

    Attributes:
        width: units of an expert whose likeness is measured, the first ones: all, or as many as `MAX_UNITS` allows.
    """

    def __init__(self, num_tasks: int, num_experts: int, width: int, num_slices: int = 1) -> None:
        self.num_experts, self.width = num_experts, min(width, max(1, MAX_UNITS // num_experts))
        num_units = num_experts * self.width
        self.weight_GTE = torch.zeros(num_slices, num_tasks, num_experts, dtype=torch.float64)
        self.square_TE = torch.zeros(num_tasks, num_experts, dtype=torch.float64)
        self.examples_G = torch.zeros(num_slices, dtype=torch.float64)
        self.gram_UU = torch.zeros(num_units, num_units, dtype=torch.float64)
        self.sum_U = torch.zeros(num_units, dtype=torch.float64)
        self.active_EH = torch.zeros(num_experts, width, dtype=torch.float64)

    def update(self, slice_B: Tensor, weights_B: Tensor, gates_TBE: Tensor, h_EBH: Tensor) -> None:
        """gates_TBE: weights of the mixture; h_EBH: what the experts say. Examples of weight 0 do not count."""
        known = weights_B > 0
        w_B, g_TBE = weights_B[known].double(), gates_TBE[:, known].double()
        h_BU = h_EBH[:, known, : self.width].double().transpose(0, 1).flatten(1)
        per_example = (w_B[:, None, None] * g_TBE.transpose(0, 1)).cpu()
        self.weight_GTE.index_add_(0, slice_B.to(known.device)[known].cpu(), per_example)
        self.square_TE += (w_B[:, None, None] * g_TBE.transpose(0, 1).square()).sum(0).cpu()
        self.examples_G.index_add_(0, slice_B.to(known.device)[known].cpu(), w_B.cpu())
        self.gram_UU += (h_BU.T @ (w_B[:, None] * h_BU)).cpu()
        self.sum_U += (w_B @ h_BU).cpu()
        self.active_EH += (h_EBH[:, known] != 0).sum(1).cpu()

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Adds up the sums of all processes; a collective call."""
        for name in ("weight_GTE", "square_TE", "examples_G", "gram_UU", "sum_U", "active_EH"):
            setattr(self, name, total(getattr(self, name)))

    def mean(self, group: int | None = None) -> Tensor:
        """Mean gate weights [T, E], of a slice or of all; NaN where there is no example."""
        if group is None:
            return self.weight_GTE.sum(0) / self.examples_G.sum()
        return self.weight_GTE[group] / self.examples_G[group]

    def deviation(self) -> Tensor:
        """Standard deviation of the gate weights over examples [T, E]: 0 = the same for all examples."""
        return (self.square_TE / self.examples_G.sum() - self.mean().square()).clamp(min=0).sqrt()

    def similarity(self) -> Tensor:
        """Linear CKA of every two experts' outputs [E, E]; NaN for an expert that says the same to all examples."""
        centered = self.gram_UU - torch.outer(self.sum_U, self.sum_U) / self.examples_G.sum()
        of_units = [gram.diagonal().view(self.num_experts, -1).sum(1) for gram in (centered, self.gram_UU)]
        constant_U = (of_units[0] <= CONSTANT * of_units[1]).repeat_interleave(self.width)
        centered[constant_U] = centered[:, constant_U] = 0.0  # what is left of a constant is rounding
        blocks = centered.unflatten(0, (self.num_experts, -1)).unflatten(2, (self.num_experts, -1))
        rows = [
            torch.stack(
                [linear_cka(blocks[i, :, i], blocks[j, :, j], blocks[i, :, j]) for j in range(self.num_experts)]
            )
            for i in range(self.num_experts)
        ]
        return torch.stack(rows)

    def dead_units(self) -> Tensor:
        """Share of each expert's outputs that are 0 for every example [E]."""
        return (self.active_EH == 0).double().mean(1)


def gate_weights(mixture: Mixture, fields: dict[str, Tensor], h_EBH: Tensor) -> Tensor:
    """[T, B, E] weights of any way to mix; of "concat", 1 for every expert that the task reaches."""
    if mixture.gated:
        return mixture.weights(fields)
    fixed = mixture.fixed_TE
    if mixture.combine == "concat":
        fixed = (fixed > 0).to(fixed.dtype)
    if mixture.combine == "weighted_sum":
        fixed = fixed * mixture.weight_TE
    return fixed.unsqueeze(1).expand(-1, h_EBH.shape[1], -1)


def analyze_gates(
    run: OpenRun, uris: Sequence[str], *, by: str | None = None, rows: int | None = 100_000, max_slices: int = 8
) -> Section:
    """Mean gate weights per task, overall and per slice of a column; experts that are alike, dead or unused.

    Args:
        by: a column to slice by.

    Raises:
        ConfigError: the column cannot be sliced.
    """
    usage: GateUsage | None = None
    slicing: Slicing | None = None
    for item in run.batches(uris, rows=rows, carry=(by,) if by else ()):
        batch = item[0] if by else item
        with torch.no_grad():
            fields, h_EBH = run.model.represent(batch)
            gates_TBE = gate_weights(run.model.mixture, fields, h_EBH)
        slice_B = torch.zeros(len(batch), dtype=torch.int64)
        if by:
            values = item[1].column(by).to_pylist()
            slicing = slicing or agreed_slicing(run, by, values, max_slices)
            slice_B = slices_of(slicing, values, len(batch))
        if usage is None:
            usage = GateUsage(*gates_TBE.shape[::2], h_EBH.shape[2], len(slicing.names) if slicing else 1)
        usage.update(slice_B, batch.weights, gates_TBE.float(), h_EBH.float())
    assert usage is not None, "a reader of no rows raises"
    usage.merge(run.total)
    return _section(run, uris, usage, slicing)


def _section(run: OpenRun, uris: Sequence[str], usage: GateUsage, slicing: Slicing | None) -> Section:
    layout = run.config.layout()
    routing, tasks = layout.routing, list(run.config.tasks)
    experts = [spec.name for spec in layout.experts]
    sets = {spec.name: spec.set for spec in layout.experts}
    mean, deviation, dead, alike = usage.mean(), usage.deviation(), usage.dead_units(), usage.similarity()
    numbers: dict[str, Any] = {
        "experts": experts,
        "sets": sets,
        "mean": {task: dict(zip(experts, mean[t].tolist(), strict=True)) for t, task in enumerate(tasks)},
        "deviation": {task: dict(zip(experts, deviation[t].tolist(), strict=True)) for t, task in enumerate(tasks)},
        "dead_units": dict(zip(experts, dead.tolist(), strict=True)),
        "similarity": alike.tolist(),
    }  # fmt: skip
    rows = [
        [task, *(_cell(routing.cells[t][e], mean[t, e]) for e in range(len(experts)))] for t, task in enumerate(tasks)
    ]
    tables = [ReportTable("Mean weight of each expert (t: trains it, r: reads it)", ["task", *experts], rows)]
    by_set = list(dict.fromkeys(sets.values()))
    shares = [
        [task, *(f"{sum(float(mean[t, e]) for e, x in enumerate(experts) if sets[x] == s):.3f}" for s in by_set)]
        for t, task in enumerate(tasks)
    ]
    tables.append(ReportTable("Mean weight of each embedding set", ["task", *by_set], shares))
    if slicing is not None:
        numbers["slices"] = {}
        for t, task in enumerate(tasks):
            lines = []
            for g, name in enumerate(slicing.names):
                if usage.examples_G[g] > 0:
                    of_slice = usage.mean(g)[t].tolist()
                    numbers["slices"].setdefault(task, {})[name] = dict(zip(experts, of_slice, strict=True))
                    lines.append([name, *(f"{x:.3f}" for x in of_slice)])
            tables.append(ReportTable(f"{task} by {slicing.column}", [slicing.column, *experts], lines))
    plots = [Plot("weights", "Mean gate weights: which task reads which expert.", _map(mean.numpy(), tasks, experts))]
    if len(experts) > 1:
        caption = "Linear CKA of the experts' outputs: 1 = they say the same up to rotation and scale."
        plots.append(Plot("similarity", caption, _map(alike.numpy(), experts, experts)))
    return Section(
        "gates",
        "Gates and experts",
        _summary(usage, tasks, experts, routing.cells),
        tables,
        plots,
        numbers,
        run.source(uris),
    )


def _summary(
    usage: GateUsage, tasks: Sequence[str], experts: Sequence[str], cells: Sequence[Sequence[str]]
) -> list[str]:
    mean, deviation, dead, alike = usage.mean(), usage.deviation(), usage.dead_units(), usage.similarity()
    sentences = []
    for t, task in enumerate(tasks):
        order = mean[t].argsort(descending=True).tolist()
        most = ", ".join(f"{experts[e]} {float(mean[t, e]):.2f}" for e in order[:3] if mean[t, e] > 0)
        sentences.append(
            f"{task} reads {most}; over examples a weight varies by up to {float(deviation[t].max()):.2f}."
        )
    for e, name in enumerate(experts):
        reaching = [t for t in range(len(tasks)) if cells[t][e] != "none"]
        equal = [UNUSED / sum(cell != "none" for cell in cells[t]) for t in reaching]
        if reaching and all(mean[t, e] < limit for t, limit in zip(reaching, equal, strict=True)):
            sentences.append(f"{name} is unused: no task gives it {UNUSED:.0%} of an equal share; leave it out.")
        if dead[e] == 1:
            sentences.append(f"{name} is dead: all its outputs are 0 for every example.")
        elif dead[e] > 0.5:
            sentences.append(
                f"{name}: {float(dead[e]):.0%} of its outputs are 0 for every example; it may be narrower."
            )
    pairs = [
        (float(alike[i, j]), experts[i], experts[j]) for i in range(len(experts)) for j in range(i + 1, len(experts))
    ]
    pairs = [p for p in pairs if not np.isnan(p[0])]
    if pairs:
        most, one, other = max(pairs)
        least, apart, from_it = min(pairs)
        sentences.append(f"Most alike: {one} and {other} (CKA {most:.2f}); least: {apart} and {from_it} ({least:.2f}).")
    return sentences


def _cell(route: str, weight: Tensor) -> str:
    return "" if route == "none" else f"{float(weight):.3f} {route[0]}"


def _map(values: np.ndarray, names: Sequence[str], columns: Sequence[str]) -> Any:
    figure, axis = new_figure(2.6 + 0.55 * len(columns), 1.6 + 0.42 * len(names))
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=max(1e-9, float(np.nanmax(values))))
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xticks(range(len(columns)), columns, fontsize=8, rotation=60, ha="right")
    top = float(np.nanmax(values))
    for i in range(len(names)):
        for j in range(len(columns)):
            if len(columns) <= 12:
                dark = values[i, j] < 0.6 * top
                axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
    figure.colorbar(image, ax=axis)
    return figure
