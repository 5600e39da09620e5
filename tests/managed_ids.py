"""A small managed field and a stream of more ids than it has rows; the small run with such fields."""

import copy
from pathlib import Path

import torch
from small_run import SCHEMA, run_file

from hmoe_rec.types import EmbeddingSet, Features, IdField, ManagedRows, SequenceField

POLICIES = [
    ManagedRows("lru", shared_rows=3, ways=4),
    ManagedRows("lru", min_count=3, shared_rows=3, ways=4, waiting=2),
    ManagedRows("lfu", shared_rows=3, ways=4),
    ManagedRows("distance_lfu", min_count=2, shared_rows=3, ways=4, decay=0.7),
]
SETS = (EmbeddingSet("a", 8), EmbeddingSet("b", 4))
ROWS = 24


def features_of(policy: ManagedRows, rows: int = ROWS) -> Features:
    """A managed field that is the target of behaviors, and a plain one before it."""
    ad = IdField("ad", rows, hashed=True, managed=policy)
    return Features(ids=(IdField("tab", 5), ad), sequences=(SequenceField("history", (("hist_ad", "ad"),), False, 9),))


def stream(steps: int, seed: int = 0) -> list[list[int]]:
    """Ids of growing value come and go: of 300 in all, at a time about 25 are frequent and some others pass by."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for step in range(steps):
        live = step * 2 + (25 * torch.rand(14, generator=generator) ** 2).long()
        rare = torch.randint(1000, 9999, (5,), generator=generator)
        result.append([x * 10**14 - 7 for x in torch.cat([live, rare]).tolist()])
    return result


def managed_file(folder: Path, run: str, evict: str = "lru", **train_options) -> dict:
    """Fewer rows than ids in all three fields, one of them the target of the behaviors."""
    content = run_file(folder, run, **train_options)
    content["data"]["schema"] = schema = copy.deepcopy(SCHEMA)
    user, item, city = schema["ids"]
    user |= {"num_embeddings": 16, "mode": "managed", "managed": {"ways": 4, "evict": evict, "min_count": 2}}
    item |= {"num_embeddings": 12, "mode": "managed", "managed": {"ways": 4, "evict": "distance_lfu"}}
    city |= {"num_embeddings": 64, "mode": "managed"}
    return content
