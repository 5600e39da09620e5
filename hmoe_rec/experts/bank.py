"""All experts of a model, each on its embedding set: set -> [B, F, D] in, [E, B, H] out."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hmoe_rec.experts.base import Expert
from hmoe_rec.layers import module_dict, run_together


class ExpertBank(nn.Module):
    """Runs experts; those whose MLPs have one shape run as one batched matmul a layer (same numbers, fewer launches).

    Any module [B, F, D] -> [B, H] is accepted; one that is not an `Expert` runs by itself.

    Args:
        experts: name -> expert; the order is the order of the output.
        sets: expert's name -> name of the set that it reads.
    """

    def __init__(self, experts: Mapping[str, nn.Module], sets: Mapping[str, str]) -> None:
        super().__init__()
        self.experts = module_dict("expert", experts)
        self.sets = [sets[name] for name in experts]
        shapes: dict[tuple, list[int]] = {}
        for i, expert in enumerate(experts.values()):
            key = expert.mlp.shape_key() if isinstance(expert, Expert) else ("alone", i)
            shapes.setdefault(key, []).append(i)
        self.groups = list(shapes.values())
        order = [i for group in self.groups for i in group]
        self.places = [order.index(i) for i in range(len(order))]

    def forward(self, fields: Mapping[str, Tensor], interests: Mapping[str, Tensor] | None = None) -> Tensor:
        """Set -> fields [B, F, D], and set -> interests [B, I, D] where an expert reads those. -> [E, B, H]."""
        experts = list(self.experts.values())
        inputs = [
            (interests or {})[name] if getattr(expert, "reads", "fields") == "interests" else fields[name]
            for expert, name in zip(experts, self.sets, strict=True)
        ]
        interactions = self._interactions(experts, inputs)
        outputs: list[Tensor] = []
        for group in self.groups:
            if isinstance(experts[group[0]], Expert):
                mlps = [e.mlp for i in group if isinstance(e := experts[i], Expert)]
                outputs.append(run_together(mlps, [interactions[i] for i in group]))
            else:
                outputs.append(experts[group[0]](inputs[group[0]]).unsqueeze(0))
        if len(outputs) == 1:
            return outputs[0]
        # Under autocast a lone part may answer in another precision than the batched ones.
        together = torch.cat([out.to(outputs[0].dtype) for out in outputs])
        return together if self.places == list(range(len(experts))) else together[self.places]

    def _interactions(self, experts: Sequence[nn.Module], inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """Interactions that say they are `fixed` and read the same are computed once."""
        shared: dict[tuple, Tensor] = {}
        results: dict[int, Tensor] = {}
        for i, expert in enumerate(experts):
            if not isinstance(expert, Expert):
                continue
            fixed = getattr(expert.interaction, "fixed", False)
            key = (self.sets[i], expert.reads, type(expert.interaction)) if fixed else (i,)
            if key not in shared:
                shared[key] = expert.interaction(inputs[i])
            results[i] = shared[key]
        return results
