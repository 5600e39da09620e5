"""A run and two fields -> the vectors of each set in which the two meet, for distances that mean something.

Of GwPFM a field's part vector for the other's part, of FmFM the earlier field's vector times the pair's matrix, of FwFM
(and GwPFM) one of them turned where the pair's weight is below 0; of FM and IPNN whole vectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hmoe_rec.analysis.opening import OpenRun
from hmoe_rec.experts.base import Products

NOWHERE = "whole vectors, which no expert multiplies"
UNNAMED = (Products.meets, NOWHERE)  # what needs no sentence, or has a warning


@dataclass(frozen=True)
class Meeting:
    """Where a user's and an item's vector meet: in a product of one expert, or nowhere (None).

    Attributes:
        embedding_set: the set that is read.
        user, item: the fields' places in it.
        measured: which vectors these are.
    """

    embedding_set: str
    user: int
    item: int
    products: Products | None
    measured: str

    def of(self, fields: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """-> of user and item [B, K], float32."""
        fields_BFD = fields[self.embedding_set].float()
        if self.products is None:
            return fields_BFD[:, self.user], fields_BFD[:, self.item]
        with torch.autocast(fields_BFD.device.type, enabled=False):
            return self.products.meeting(fields_BFD, self.user, self.item)


def meetings_of(run: OpenRun, user: str, item: str) -> dict[str, Meeting]:
    """Name -> `Meeting`, for every set that has both fields: under the set's name that in its first expert that takes
    products; under "set: expert" those in further ones, where they multiply other vectors."""
    names = {s: list(encoder.field_names) for s, encoder in run.model.encoders.items()}  # type: ignore[union-attr]
    found: dict[str, Meeting] = {}
    for s, fields in names.items():
        if user not in fields or item not in fields:
            continue
        place = (s, fields.index(user), fields.index(item))
        of_set: dict[str, Meeting] = {}
        for spec, expert in zip(run.config.layout().experts, run.model.experts.experts.values(), strict=True):
            products = getattr(expert, "interaction", None)
            if spec.set != s or not isinstance(products, Products):
                continue
            whole = type(products).meeting is Products.meeting
            measured = products.meets if whole else f"{products.meets}, as in expert {spec.name} ({spec.kind})"
            if not any(m.measured == measured for m in of_set.values()):
                of_set[f"{s}: {spec.name}" if of_set else s] = Meeting(*place, products, measured)
        found |= of_set or {s: Meeting(*place, None, NOWHERE)}
    return found
