"""FBGEMM's row cache on a CPU, where its kernels have none: what reads and writes the cache, and what the table.

A kernel computes on a second copy of its tables, the cache. A row enters it when it is looked up; `flush` writes the
cached rows to the tables, and `reset_cache_states` empties it: the semantics of FBGEMM's CUDA kernels
(fused_uvm_caching) with a cache that never evicts, so that what is stale stays so.
"""

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn


class _Cache:
    """values: what the kernel computes on. rows: cached row of the flat tables -> its place there, as a mask."""

    def __init__(self, tables: Tensor) -> None:
        self.values, self.cached = nn.Parameter(torch.full_like(tables, torch.nan)), torch.zeros(len(tables)).bool()


def cache_rows(patch: pytest.MonkeyPatch) -> list[str]:
    """All kernels made from now on cache their rows. -> the calls of flush and reset that come, in their order."""
    kernel, calls = SplitTableBatchedEmbeddingBagsCodegen, []
    forward = kernel.forward

    def cache_of(tbe: nn.Module) -> _Cache:
        if not hasattr(tbe, "fake_cache"):
            object.__setattr__(tbe, "fake_cache", _Cache(tbe.weights_host.detach()))
        return tbe.fake_cache  # type: ignore[return-value]

    def caching_forward(self, indices, offsets, *args, **options):
        cache, tables = cache_of(self), self.weights_host
        asked = _places(self, indices.long(), offsets.long())
        new = asked[~cache.cached[asked]]
        with torch.no_grad():
            cache.values[new] = tables[new]
        cache.cached[new] = True
        self._parameters["weights_host"] = cache.values
        try:
            return forward(self, indices, offsets, *args, **options)
        finally:
            self._parameters["weights_host"] = tables

    def flush(self) -> None:
        calls.append("flush")
        cache = cache_of(self)
        with torch.no_grad():
            self.weights_host[cache.cached] = cache.values[cache.cached]

    def reset_cache_states(self) -> None:
        calls.append("reset")
        cache_of(self).cached.zero_()

    patch.setattr(kernel, "forward", caching_forward)
    patch.setattr(kernel, "flush", flush)
    patch.setattr(kernel, "reset_cache_states", reset_cache_states)
    return calls


def _places(tbe: nn.Module, indices: Tensor, offsets: Tensor) -> Tensor:
    """Places in the flat tables of all values of the rows that are looked up."""
    features = len(tbe.feature_table_map)
    batch = (len(offsets) - 1) // features
    found = [torch.zeros(0, dtype=torch.int64)]
    for f, table in enumerate(tbe.feature_table_map):
        _, dim, _, _ = tbe.embedding_specs[table]
        rows = indices[offsets[f * batch] : offsets[(f + 1) * batch]].unique()
        first = int(tbe.weights_physical_offsets[table])
        found.append((first + rows[:, None] * dim + torch.arange(dim)).flatten())
    return torch.cat(found).unique()
