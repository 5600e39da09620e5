"""Rows that a caching kernel (fused_uvm_caching) keeps on the device, and what may be written below them."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hmoe_rec.embedding.initialization import named_collections


def forget_cached_rows(module: nn.Module) -> None:
    """To be called after tables below `module` were written to: the next lookup reads what was written.

    FBGEMM's cache is written back, never compared: lookups take cached rows before those of the table, and every state
    dict (`flush`) writes them over the table's. Whoever writes to tables takes the state dict first, which writes the
    cached rows back, fills its tensors, and forgets the cache before anything takes a state dict again. Statistics of
    optimizers have no cache.

    Source: `flush`, `reset_cache_states` and `construct_split_state(cacheable=False)` of FBGEMM's
    split_table_batched_embeddings_ops_training.py (1.6 to 1.9); `purge` of TorchRec's lookups.
    """
    for _, collection in named_collections(module):
        for lookup in getattr(collection, "_lookups", ()):
            while isinstance(lookup, DistributedDataParallel):
                lookup = lookup.module
            lookup.purge()
