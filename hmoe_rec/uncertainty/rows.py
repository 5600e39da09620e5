r"""How well the rows of embedding tables are known -> their part of a logit's variance: large for ids that are new.

A last layer is known well after thousands of examples, whatever the id; what is not known of a new ad is its row. For a
row e of an id (its vectors in all sets, side by side, width D) and J = dz/de the Laplace approximation is

.. math:: \Lambda_e = W^{-2} + \sum_{n \ni e} c_n J_n J_n^T \approx W^{-1} (I + s_e M)\, W^{-1}, \qquad
          \mathrm{Var}_e(z) = (WJ)^T (I + s_e M)^{-1} (WJ)

with c = w p (1 - p), s_e = sum of c |W J|^2 over the examples with that id, and M = sum of c (WJ)(WJ)^T over all
examples, divided by its trace: how much was learned of a row is its own, in which directions is common to all rows of
the field. The prior variance W^2 of a set's entries is their mean square over the examples, as they were trained. So a
row costs one number per task and set, sums do not depend on the order of examples, and add up over processes.

Source: ours. It is a Laplace approximation (MacKay 1992) with a Gauss-Newton curvature that is block-diagonal over rows
and Kronecker-like within a field; rows, last layer and tasks count as independent, and only what a task trains counts
(not routes that it reads).
"""

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
        num_rows: numbers kept per task and set; ids of a larger field, and hashed ones, share them by hash, so that a
            new id may look known.
    """

    def __init__(self, name: str, model: HMoE, *, max_rows: int, device: torch.device | str | None) -> None:
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
        self.squares_S = torch.zeros(len(self.places), **zeros)
        self.examples = torch.zeros((), **zeros)
        self._axes: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, batch: Batch, found: Slopes, curvature_BT: Tensor) -> None:
        rows_B, known_B = self._rows(batch)
        for s, (name, f) in enumerate(self.places):
            entries_BD = found.fields[name][:, f].double()
            self.squares_S[s] += (entries_BD.square().mean(1) * known_B).sum()
        self.examples += known_B.sum()
        for t, slope in enumerate(found.by_task):
            c_B = curvature_BT[:, t] * known_B
            parts = [slope[name][:, f].double() for name, f in self.places]
            for s, part_BD in enumerate(parts):
                self.learned_STR[s, t].index_add_(0, rows_B, c_B * part_BD.square().sum(1))
            slope_BD = torch.cat(parts, 1)
            self.directions_TDD[t].addmm_((slope_BD * c_B.unsqueeze(1)).T, slope_BD)
        self._axes = None

    def variance(self, batch: Batch, found: Slopes, factor: float) -> Tensor:
        """[B, T] float64."""
        learned_TR, values_TD, vectors_TDD = self._prepared(factor)
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
            "squares": self.squares_S,
            "examples": self.examples,
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

    def _prepared(self, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        """-> s_e [T, R], eigenvalues of M [T, D], W times its eigenvectors [T, D, D]."""
        if self._axes is None:
            variance_S = factor * self.squares_S / self.examples.clamp(min=1)
            std_D = torch.cat([v.sqrt().expand(d) for v, d in zip(variance_S, self.dims, strict=True)])
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
        factor: of the prior variance W^2, > 0; above 1 the rows count as less known.
        max_rows: see `FieldRows`.

    Raises:
        ValueError: a field that no set embeds or that has several ids, or a factor that is not positive.
    """

    def __init__(
        self,
        model: HMoE,
        fields: Sequence[str],
        *,
        factor: float = 1.0,
        max_rows: int = MAX_ROWS,
        device: torch.device | str | None = None,
    ) -> None:
        if factor <= 0:
            raise ValueError(f"factor of the prior variance must be positive, got {factor}")
        if unfit := sorted(set(fields) - set(eligible(model))):
            raise ValueError(
                f"{unfit[0]!r} is no id field with one id per example; those are {', '.join(eligible(model))}"
            )
        self.factor = factor
        self.fields = [FieldRows(name, model, max_rows=max_rows, device=device) for name in fields]

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
    def variance(self, batch: Batch, found: Slopes) -> Tensor:
        """[B, T] float64."""
        return torch.stack([field.variance(batch, found, self.factor) for field in self.fields]).sum(0)

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
