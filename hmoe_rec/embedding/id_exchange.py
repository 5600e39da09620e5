"""Ids of all processes -> the process that holds an id's bucket -> the answers back. One process asks itself."""

from collections.abc import Callable, Sequence

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

Answer = Callable[[int, Tensor, Tensor], Tensor]


def distinct_ids(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[n] int64 -> the distinct ids, for each of the n its place among them, and how often each occurs."""
    if ids.device.type != "cpu":
        return torch.unique(ids, return_inverse=True, return_counts=True)
    # A hash table, where torch sorts: several times faster.
    encoded = pa.array(ids.numpy()).dictionary_encode()
    distinct = torch.from_numpy(encoded.dictionary.to_numpy(zero_copy_only=False).copy())
    inverse = torch.from_numpy(encoded.indices.to_numpy(zero_copy_only=False).astype("int64"))
    return distinct, inverse, torch.bincount(inverse, minlength=len(distinct))


class IdExchange:
    """Process p of W holds of every field the buckets from p B / W to (p + 1) B / W, B being their number.

    Args:
        num_buckets: of every field.
    """

    def __init__(self, num_buckets: Sequence[int], rank: int = 0, world_size: int = 1) -> None:
        self.num_buckets, self.rank, self.world_size = tuple(num_buckets), rank, world_size

    def bounds(self, field: int) -> list[int]:
        """First bucket of every process, and the end."""
        return [p * self.num_buckets[field] // self.world_size for p in range(self.world_size + 1)]

    def local_buckets(self, field: int) -> tuple[int, int]:
        first, last = self.bounds(field)[self.rank : self.rank + 2]
        return first, last

    def ask(self, buckets: Sequence[Tensor], ids: Sequence[Tensor], times: Sequence[Tensor], answer: Answer) -> list:
        """Field after field, the rows of this process's ids. Collective.

        Args:
            buckets, ids, times: of a field, [n] each: distinct ids, their buckets, and how often each occurs here.
            answer: (field, distinct ids of all processes whose buckets are here, how often each occurs) -> rows.
        """
        if self.world_size == 1:
            return [answer(i, *given) for i, given in enumerate(zip(ids, times, strict=True))]
        order, sent = self._route(buckets)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        send_sizes, receive_sizes = sent.sum(1).tolist(), received.sum(1).tolist()
        outgoing = torch.stack([torch.cat(list(ids)), torch.cat(list(times))], 1)[order]
        incoming = outgoing.new_empty(sum(receive_sizes), 2)
        dist.all_to_all_single(incoming, outgoing, receive_sizes, send_sizes)
        field = torch.arange(len(ids), device=sent.device).repeat(self.world_size)
        field = field.repeat_interleave(received.view(-1))
        found = incoming.new_empty(len(incoming))
        for i in range(len(ids)):
            mine = (field == i).nonzero().squeeze(1)
            distinct, inverse, _ = distinct_ids(incoming[mine, 0])
            total = torch.zeros_like(distinct).index_add_(0, inverse, incoming[mine, 1])
            found[mine] = answer(i, distinct, total)[inverse]
        back = outgoing.new_empty(len(outgoing))
        dist.all_to_all_single(back, found, send_sizes, receive_sizes)
        rows = torch.empty_like(back)
        rows[order] = back
        return list(rows.split([len(x) for x in ids]))

    def _route(self, buckets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The order in which ids are sent, by process and field; how many to each process of each field, [W, F]."""
        owners = []
        for i, bucket in enumerate(buckets):
            starts = torch.tensor(self.bounds(i)[1:-1], device=bucket.device)
            owners.append(torch.bucketize(bucket, starts, right=True) * len(buckets) + i)
        key = torch.cat(owners)
        sizes = torch.bincount(key, minlength=self.world_size * len(buckets))
        return key.argsort(stable=True), sizes.view(self.world_size, len(buckets))

    def share(self, counts: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Sum of all processes' counts, and field after field the rows of all of them. Collective.

        Args:
            counts: int64.
            rows: of every field, those that this process has to tell of.
        """
        if self.world_size == 1:
            return counts, list(rows)
        sizes = torch.tensor([len(x) for x in rows], device=counts.device)
        told = torch.cat([sizes, counts.view(-1)])
        everyone = self._gather(told)
        sizes_WF = everyone[:, : len(rows)].tolist()
        most = max(sum(sizes) for sizes in sizes_WF)
        total = everyone[:, len(rows) :].sum(0).view_as(counts)
        if not most:
            return total, list(rows)
        padded = told.new_zeros(most)
        padded[: sum(len(x) for x in rows)] = torch.cat(list(rows))
        parts = [list(row[: sum(n)].split(n)) for row, n in zip(self._gather(padded), sizes_WF, strict=True)]
        return total, [torch.cat([part[i] for part in parts]) for i in range(len(rows))]

    def _gather(self, values: Tensor) -> Tensor:
        """[n] of every process -> [W, n]."""
        flat = values.new_empty(self.world_size * len(values))
        dist.all_gather_into_tensor(flat, values)
        return flat.view(self.world_size, -1)
