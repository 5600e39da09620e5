"""Gate inputs and expert outputs [E, B, H] -> what every task's tower gets [T][B, H]."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hmoe_rec.layers import MLP, module_dict, run_together
from hmoe_rec.towers.layout import GateInput, Routing

COMBINES = ("gate", "mean", "sum", "weighted_sum", "concat")


class Mixture(nn.Module):
    r"""Mixes experts for every task by its row of the route table.

    .. math:: h_t = \sum_e w_t[e]\,(o_e \text{ if route } = \text{train};\ \mathrm{stopgrad}(o_e) \text{ if read})

    with w_t = softmax over the reachable experts of a gate MLP on the task's gate input ("gate"), 1/k ("mean"), 1
    ("sum"), a learned number per expert that starts at 1 ("weighted_sum"); "concat" puts the reachable experts side by
    side. The stop acts on expert outputs; gate weights are never stopped. A task that reaches one expert has no gate.

    Args:
        routing: the route table, the gate inputs and the way to combine.
        gate_dims: set -> width of its flattened fields.
        expert_dim: H.
        hidden: widths of the gates' hidden layers.

    Raises:
        ValueError: a gate that adds up sets of different widths; an unknown way to combine.

    Source: gates over experts: MMoE (KDD 2018); all-forward task-specific backward: STEM, arXiv 2308.13537.
    """

    train_TE: Tensor
    fixed_TE: Tensor

    def __init__(
        self, routing: Routing, gate_dims: Mapping[str, int], expert_dim: int, *, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__()
        if routing.combine not in COMBINES:
            raise ValueError(f"combine must be one of {COMBINES}, got {routing.combine!r}")
        self.combine, self.routing = routing.combine, routing
        self.reach = [[e for e, cell in enumerate(row) if cell != "none"] for row in routing.cells]
        self.out_dims = [expert_dim * (len(r) if routing.combine == "concat" else 1) for r in self.reach]
        train = torch.tensor([[float(cell == "train") for cell in row] for row in routing.cells])
        self.register_buffer("train_TE", train, persistent=False)
        self.any_read = any(cell == "read" for row in routing.cells for cell in row)
        self.gated = [t for t, r in enumerate(self.reach) if routing.combine == "gate" and len(r) > 1]
        gates: dict[str, MLP] = {}
        for t in self.gated:
            dims = [gate_dims[name] for name in routing.gate_inputs[t].sets]
            if routing.gate_inputs[t].combine == "sum" and len(set(dims)) > 1:
                raise ValueError(
                    f"gate of task {routing.tasks[t]!r} adds up sets of different widths {dims}; use combine: concat"
                )
            in_dim = dims[0] if routing.gate_inputs[t].combine == "sum" else sum(dims)
            gates[routing.tasks[t]] = MLP(in_dim, hidden, linear_output=len(self.reach[t]))
        self.gates = module_dict("task", gates)
        shapes: dict[tuple, list[int]] = {}
        for t in self.gated:
            shapes.setdefault(gates[routing.tasks[t]].shape_key(), []).append(t)
        self.gate_groups = list(shapes.values())
        constant = 1.0 if routing.combine in ("sum", "weighted_sum") else None
        fixed = [[(constant or 1.0 / len(r)) if e in r else 0.0 for e in range(len(row))] for r, row in
                 zip(self.reach, routing.cells, strict=True)]  # fmt: skip
        self.register_buffer("fixed_TE", torch.tensor(fixed), persistent=False)
        if routing.combine == "weighted_sum":
            self.weight_TE = nn.Parameter(torch.ones(len(routing.tasks), len(routing.experts)))

    def forward(self, fields: Mapping[str, Tensor], h_EBH: Tensor) -> list[Tensor]:
        """set -> [B, F, D], and expert outputs [E, B, H] -> one [B, out_dims[t]] per task."""
        if self.combine == "concat":
            return [self._side_by_side(t, h_EBH) for t in range(len(self.reach))]
        if self.gated:
            w_TBE = self.weights(fields)
            mixed = self._mix_gated(w_TBE, h_EBH)
        else:
            w_TE = self.fixed_TE * self.weight_TE if self.combine == "weighted_sum" else self.fixed_TE
            mixed = torch.einsum("te,ebh->tbh", (w_TE * self.train_TE).to(h_EBH.dtype), h_EBH)
            if self.any_read:
                read = torch.einsum("te,ebh->tbh", (w_TE * (1 - self.train_TE)).to(h_EBH.dtype), h_EBH.detach())
                mixed = mixed + read
        return [mixed[t] for t in range(len(self.reach))]

    def weights(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Gate weights [T, B, E]; rows sum to 1, experts that a task cannot reach have exactly 0."""
        rows: dict[int, Tensor] = {}
        for group in self.gate_groups:
            gates = [self._gate(t) for t in group]
            logits = run_together(gates, self._gate_inputs(group, fields))
            for i, t in enumerate(group):
                rows[t] = self._spread(t, logits[i].float().softmax(-1))
        batch = next(iter(rows.values()))
        ones_B1 = torch.ones_like(batch[:, :1])
        return torch.stack([rows[t] if t in rows else ones_B1 * self.fixed_TE[t] for t in range(len(self.reach))])

    def _gate(self, t: int) -> MLP:
        gate = self.gates[self.routing.tasks[t]]
        assert isinstance(gate, MLP), f"gates are MLPs, got {type(gate)}"
        return gate

    def _gate_inputs(self, group: Sequence[int], fields: Mapping[str, Tensor]) -> list[Tensor]:
        """One tensor per gate; gates with equal inputs get the very same tensor (`run_together` shares it)."""
        made: dict[GateInput, Tensor] = {}
        for t in group:
            source = self.routing.gate_inputs[t]
            if source not in made:
                parts = [fields[name].flatten(1) for name in source.sets]
                made[source] = sum(parts[1:], parts[0]) if source.combine == "sum" else torch.cat(parts, 1)
        return [made[self.routing.gate_inputs[t]] for t in group]

    def _spread(self, t: int, weights_Bk: Tensor) -> Tensor:
        """[B, reachable] -> [B, E] with zeros elsewhere."""
        num_experts = len(self.routing.experts)
        if len(self.reach[t]) == num_experts:
            return weights_Bk
        zeros = torch.zeros_like(weights_Bk[:, :1])
        place = {e: i for i, e in enumerate(self.reach[t])}
        columns = [weights_Bk[:, place[e] : place[e] + 1] if e in place else zeros for e in range(num_experts)]
        return torch.cat(columns, 1)

    def _mix_gated(self, w_TBE: Tensor, h_EBH: Tensor) -> Tensor:
        h_BEH = h_EBH.transpose(0, 1)
        w_BTE = w_TBE.transpose(0, 1).to(h_EBH.dtype)
        if not self.any_read:
            return (w_BTE @ h_BEH).transpose(0, 1)
        train_TE = self.train_TE.to(h_EBH.dtype)
        return ((w_BTE * train_TE) @ h_BEH + (w_BTE * (1 - train_TE)) @ h_BEH.detach()).transpose(0, 1)

    def _side_by_side(self, t: int, h_EBH: Tensor) -> Tensor:
        parts = [h_EBH[e] if self.routing.cells[t][e] == "train" else h_EBH[e].detach() for e in self.reach[t]]
        return torch.cat(parts, dim=1)
