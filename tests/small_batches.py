"""A small model of users, items and tags for two tasks, and batches for it, without files."""

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.batch import Batch
from hmoe_rec.model import HMoE
from hmoe_rec.towers.routing import preset
from hmoe_rec.types import Features, IdField

USERS, ITEMS, ROWS = 4, 9, 60
FEATURES = Features(
    ids=(IdField("user", USERS), IdField("item", ITEMS, missing_row=True), IdField("tags", 5, multi_valued=True))
)


def make_model(name: str = "mmoe", dim: int = 6, **options) -> HMoE:
    torch.manual_seed(3)
    layout = preset(name, ["click", "like"], embedding_dim=dim, expert={"kind": "flat_dnn", "hidden": [7]}, **options)
    model = HMoE(FEATURES, layout, expert_dim=5, tower_hidden=(3,))
    for p in model.embedding.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


def make_batch(rows: int = ROWS, *, seed: int = 0, items: int = ITEMS - 2) -> Batch:
    g = torch.Generator().manual_seed(seed)
    users, tags = torch.randint(USERS, (rows,), generator=g), torch.randint(5, (rows,), generator=g)
    given = torch.randint(items, (rows,), generator=g)
    lengths = torch.ones(3, rows, dtype=torch.int32)
    lengths[1, 0] = 0  # an example without item
    values = torch.cat([users, given[1:], tags])
    labels = torch.randint(2, (rows, 2), generator=g).float()
    labels[rows // 2, 1] = torch.nan
    ids = KeyedJaggedTensor(["user", "item", "tags"], values, lengths=lengths.flatten())
    return Batch.of(ids, labels, weights=torch.rand(rows, generator=g) + 0.5)
