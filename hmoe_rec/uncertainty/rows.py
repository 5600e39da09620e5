r"""How well the rows of embedding tables are known -> their part of a logit's variance: large for ids that are new.

A last layer is known well after thousands of examples, whatever the id; what is not known of a new ad is its row. For a
row e of an id (its vectors in all sets, side by side, width D) and J = dz/de the Laplace approximation is

.. math:: \Lambda_e = W^{-2} + \sum_{n \ni e} c_n J_n J_n^T \approx W^{-1} (I + s_e M)\, W^{-1}, \qquad
          \mathrm{Var}_e(z) = (WJ)^T (I + s_e M)^{-1} (WJ)

with c = w p (1 - p), s_e = sum of c |W J|^2 over the examples with that id, and M = sum of c (WJ)(WJ)^T over all
examples, divided by its trace: how much was learned of a row is its own, in which directions is common to all rows of
the field. J is the derivative through the field itself, not through poolings of behaviors that it is the target of.
The prior variance W^2 of a set's entries is their mean square over the examples, as they were trained, times a factor
of the field: the one under which the data are likeliest (`FieldRows.choose_factor`), or a given one. So a row costs a
number per task and set, and another per set; sums do not depend on the order of examples, and add up over processes.

Source: ours. It is a Laplace approximation (MacKay 1992) with a Gauss-Newton curvature that is block-diagonal over rows
and Kronecker-like within a field; rows, last layer and tasks count as independent, and only what a task trains counts
(not routes that it reads).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hmoe_rec.batch import Batch
from hmoe_rec.embedding.hashing import splitmix64
from hmoe_rec.encoding.fields import FieldEncoder
from hmoe_rec.metrics.exchange import all_reduced
from hmoe_rec.model import HMoE

_POSITIVE = 0x7FFFFFFFFFFFFFFF
MAX_ROWS = 1 << 20


@dataclass(frozen=True)
class Slopes:
    """Of a batch at the model's weights: logits [B, T], what the towers get, fields set -> [B, F, D], and for each task
    the derivative of its logit by them."""

    logits_BT: Tensor
    mixed: list[Tensor]
    fields: Mapping[str, Tensor]
    by_task: Sequence[Mapping[str, Tensor]]


def slopes(model: HMoE, batch: Batch) -> Slopes:
    """One forward pass, and one backward pass per task through experts, gates and towers."""
    with torch.no_grad():
        fields, interests = model.encode(batch)
    with torch.enable_grad():
        fields = {name: x.detach().requires_grad_() for name, x in fields.items()}
        mixed = model.mixture(fields, model.experts(fields, interests))
        logits_BT = model.towers(mixed).float()
        inputs, sums = list(fields.values()), logits_BT.sum(0)
        found = [torch.autograd.grad(z, inputs, retain_graph=True, allow_unused=True) for z in sums.unbind()]
    zero = [torch.zeros_like(x) for x in inputs]
    by_task = [
        {name: z if g is None else g for name, g, z in zip(fields, of_task, zero, strict=True)} for of_task in found
    ]
    return Slopes(
        logits_BT.detach(), [x.detach() for x in mixed], {name: x.detach() for name, x in fields.items()}, by_task
    )


class FieldRows:
    """The rows of one id field, for T tasks and the sets that embed it.

    Args:
        name: a field with at most one id per example.
        factor: of the prior variance W^2, > 0.
        max_rows: numbers kept per task and set; ids of a larger field, and hashed ones, share them by hash, so that a
            new id may look known.
    """

    def __init__(
        self, name: str, model: HMoE, *, factor: float, max_rows: int, device: torch.device | str | None
    ) -> None:
        field = model.features.id_field(name)
        self.name, self.num_rows = name, min(field.num_rows, max_rows)
        self.hashed = field.hashed or field.num_rows > max_rows
        encoders = {s: e for s, e in encoders_of(model).items() if name in e.field_names}
        self.places = [(s, encoder.field_names.index(name)) for s, encoder in encoders.items()]
        self.dims = [encoder.dim for encoder in encoders.values()]
        num_tasks, dim = len(model.layout.routing.tasks), sum(self.dims)
        zeros = {"dtype": torch.float64, "device": device}
        self.learned_STR = torch.zeros(len(self.places), num_tasks, self.num_rows, **zeros)
        self.directions_TDD = torch.zeros(num_tasks, dim, dim, **zeros)
        self.squares_SR = torch.zeros(len(self.places), self.num_rows, **zeros)  # of the entries, summed over examples
        self.examples_R = torch.zeros(self.num_rows, **zeros)
        self.factor = factor
        self._axes: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, batch: Batch, found: Slopes, curvature_BT: Tensor) -> None:
        rows_B, known_B = self._rows(batch)
        for s, (name, f) in enumerate(self.places):
            entries_BD = found.fields[name][:, f].double()
            self.squares_SR[s].index_add_(0, rows_B, entries_BD.square().mean(1) * known_B)
        self.examples_R.index_add_(0, rows_B, known_B)
        for t, slope in enumerate(found.by_task):
            c_B = curvature_BT[:, t] * known_B
            parts = [slope[name][:, f].double() for name, f in self.places]
            for s, part_BD in enumerate(parts):
                self.learned_STR[s, t].index_add_(0, rows_B, c_B * part_BD.square().sum(1))
            slope_BD = torch.cat(parts, 1)
            self.directions_TDD[t].addmm_((slope_BD * c_B.unsqueeze(1)).T, slope_BD)
        self._axes = None

    def choose_factor(self) -> None:
        r"""Sets the factor f under which the data are likeliest: the fixed point of MacKay's update.

        .. math:: f = \sum_e |W^{-1} e|^2 \Big/ \sum_e \gamma_e, \qquad
                  \gamma_e = \sum_i \frac{f s_e \mu_i}{1 + f s_e \mu_i}

        with W as the tables show it, mu_i the eigenvalues of M, and s_e and M summed over the tasks, which share the
        row: gamma_e says how many directions of a row the data decided on. The tables alone show too narrow a prior,
        since most directions of most rows never left the neighborhood of 0 where they began. Rows without examples do
        not count; where nothing was learned, or all entries are 0, the factor stays.

        Assumes that the rows are near the mode, and began near 0 (`model.embedding_init_std`).

        Source: MacKay, "Bayesian Interpolation", Neural Computation 4 (1992): gamma = 2 alpha E_W where the evidence
        is largest; that it is one number per field, on the curvature above, at weights trained without it: ours.
        """
        variance_S, std_D = self._prior()
        learned_R = torch.einsum("s,str->r", variance_S, self.learned_STR)
        white_DD = std_D.unsqueeze(1) * self.directions_TDD.sum(0) * std_D
        trace = white_DD.trace()
        rows = learned_R > 0
        if not bool(rows.any()) or not float(trace) > 0:
            return
        values = torch.linalg.eigvalsh(white_DD / trace).clamp(min=0).tolist()
        dims_S = torch.tensor(self.dims, dtype=torch.float64, device=learned_R.device)
        white_S = (self.squares_SR[:, rows] / self.examples_R[rows]).sum(1) / variance_S
        squares, learned_R, factor = float((dims_S * white_S.nan_to_num(0.0)).sum()), learned_R[rows], 1.0
        for _ in range(100):
            decided = sum(float((x_R / (1 + x_R)).sum()) for x_R in (factor * value * learned_R for value in values))
            # f decided(f) rises with f, so there is one fixed point; the geometric mean of f and its update is a
            # contraction towards it, the update alone swings.
            before, factor = factor, math.sqrt(factor * squares / decided)
            if abs(factor - before) <= 1e-9 * before:
                break
        self.factor, self._axes = factor, None

    def variance(self, batch: Batch, found: Slopes) -> Tensor:
        """[B, T] float64."""
        learned_TR, values_TD, vectors_TDD = self._prepared()
        rows_B, known_B = self._rows(batch)
        columns = []
        for t, slope in enumerate(found.by_task):
            slope_BD = torch.cat([slope[name][:, f].double() for name, f in self.places], 1)
            along_BD = (slope_BD @ vectors_TDD[t]).square()
            columns.append((along_BD / (1 + learned_TR[t][rows_B].unsqueeze(1) * values_TD[t])).sum(1) * known_B)
        return torch.stack(columns, 1)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "learned": self.learned_STR,
            "directions": self.directions_TDD,
            "squares": self.squares_SR,
            "examples": self.examples_R,
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, own in self.tensors().items():
            own.copy_(tensors[name])
        self._axes = None

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> row of each example [B] int64, and 1 where it has an id, else 0 [B] float64."""
        ids = batch.sparse[self.name]
        known_B = ids.lengths() > 0
        rows_B = torch.zeros(len(known_B), dtype=torch.int64, device=known_B.device)
        values = ids.values().long()
        rows_B[known_B] = ((splitmix64(values) & _POSITIVE) % self.num_rows) if self.hashed else values
        return rows_B, known_B.double()

    def _prior(self) -> tuple[Tensor, Tensor]:
        """W as the tables show it: W^2 of each set [S], and W of all entries side by side [D]."""
        variance_S = self.squares_SR.sum(1) / self.examples_R.sum().clamp(min=1)
        return variance_S, torch.cat([v.sqrt().expand(d) for v, d in zip(variance_S, self.dims, strict=True)])

    def _prepared(self) -> tuple[Tensor, Tensor, Tensor]:
        """-> s_e [T, R], eigenvalues of M [T, D], W times its eigenvectors [T, D, D]."""
        if self._axes is None:
            variance_S, std_D = self._prior()
            variance_S, std_D = self.factor * variance_S, math.sqrt(self.factor) * std_D
            white_TDD = std_D.unsqueeze(1) * self.directions_TDD * std_D
            trace_T = white_TDD.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-300)
            values_TD, vectors_TDD = torch.linalg.eigh(white_TDD / trace_T[:, None, None])
            learned_TR = torch.einsum("s,str->tr", variance_S, self.learned_STR)
            self._axes = learned_TR, values_TD.clamp(min=0), std_D.unsqueeze(1) * vectors_TDD
        return self._axes


class RowPosterior:
    """The rows of several id fields.

    Args:
        fields: id fields with at most one id per example.
        factor: of the prior variance W^2, > 0; above 1 the rows count as less known. One for all fields, or by field.
        max_rows: see `FieldRows`.

    Raises:
        ValueError: no field, one that is given twice, that no set embeds or that has several ids, or a factor that is
            not positive.
    """

    def __init__(
        self,
        model: HMoE,
        fields: Sequence[str],
        *,
        factor: float | Mapping[str, float] = 1.0,
        max_rows: int = MAX_ROWS,
        device: torch.device | str | None = None,
    ) -> None:
        factors = factor if isinstance(factor, Mapping) else dict.fromkeys(fields, factor)
        if not all(0 < f < math.inf for f in factors.values()):
            raise ValueError(f"factor of the prior variance must be positive and finite, got {factor}")
        if unfit := sorted(set(fields) - set(eligible(model))):
            raise ValueError(
                f"{unfit[0]!r} is no id field with one id per example; those are {', '.join(eligible(model))}"
            )
        if not fields or len(set(fields)) < len(fields):
            raise ValueError(f"expected one field or more, each once, got {', '.join(fields) or 'none'}")
        self.fields = [FieldRows(n, model, factor=factors[n], max_rows=max_rows, device=device) for n in fields]

    @torch.no_grad()
    def update(self, batch: Batch, found: Slopes, curvature_BT: Tensor) -> None:
        """Adds a batch; curvature_BT: c, 0 where there is no label."""
        for field in self.fields:
            field.update(batch, found, curvature_BT.double())

    def reduce_(self, process_group: dist.ProcessGroup | None = None) -> None:
        """The sums of all processes on each of them. A collective call; once, when all batches are in."""
        for field in self.fields:
            field.load({n: all_reduced(x, dist.ReduceOp.SUM, process_group) for n, x in field.tensors().items()})

    @torch.no_grad()
    def choose_factors(self) -> dict[str, float]:
        """Sets each field's factor by the sums of all examples (`FieldRows.choose_factor`) -> field -> factor."""
        for field in self.fields:
            field.choose_factor()
        return {field.name: field.factor for field in self.fields}

    @torch.no_grad()
    def variance(self, batch: Batch, found: Slopes) -> Tensor:
        """[B, T] float64."""
        return torch.stack([field.variance(batch, found) for field in self.fields]).sum(0)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{f.name}.{name}": x for f in self.fields for name, x in f.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for field in self.fields:
            field.load({name: state[f"{field.name}.{name}"] for name in field.tensors()})


def eligible(model: HMoE) -> tuple[str, ...]:
    """Id fields with at most one id per example that some set embeds."""
    shown = {name for encoder in encoders_of(model).values() for name in encoder.field_names}
    return tuple(f.name for f in model.features.ids if not f.multi_valued and f.name in shown)


def encoders_of(model: HMoE) -> dict[str, FieldEncoder]:
    return {name: encoder for name, encoder in model.encoders.items() if isinstance(encoder, FieldEncoder)}
