"""Sums and rows over the ranks of a process group."""

import torch
import torch.distributed as dist
from torch import Tensor

MIXER = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64: spreads keys that were not hashed well


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def all_reduced(tensor: Tensor, op: dist.ReduceOp.RedOpType, process_group: dist.ProcessGroup | None) -> Tensor:
    """A copy of the tensor, reduced over the ranks; just a copy in a job of one process."""
    if not is_distributed():
        return tensor.clone()
    moved = tensor.to(_communication_device(tensor.device, process_group), copy=True)
    dist.all_reduce(moved, op=op, group=process_group)
    return moved.to(tensor.device)


def to_owners(groups: Tensor, columns: list[Tensor], process_group: dist.ProcessGroup | None) -> list[Tensor]:
    """Sends every row to the rank that owns its group, so that each group is whole on one rank.

    Args:
        groups: [B] int64, any values; ranks may have different B, also 0.
        columns: tensors [B, ...] to send along; same number, types and widths on every rank.

    Returns:
        The groups and then the columns of the rows that this rank owns.
    """
    world_size = dist.get_world_size(process_group) if is_distributed() else 1
    if world_size == 1:
        return [groups, *columns]
    device = _communication_device(groups.device, process_group)
    owner = ((groups * MIXER) >> 33) % world_size
    order = owner.argsort(stable=True)
    num_sent = torch.bincount(owner, minlength=world_size).to(device)
    num_received = torch.empty_like(num_sent)
    dist.all_to_all_single(num_received, num_sent, group=process_group)
    sent, received = num_sent.tolist(), num_received.tolist()

    def send(column: Tensor) -> Tensor:
        rows = column[order].to(device)
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows, received, sent, group=process_group)
        return arrived.to(column.device)

    return [send(column) for column in (groups, *columns)]


def _communication_device(device: torch.device, process_group: dist.ProcessGroup | None) -> torch.device:
    """gloo carries rows in CPU memory only, NCCL in GPU memory only; a group with both takes the tensor as it lies."""
    backend = dist.get_backend(process_group)
    if backend == "gloo":
        return torch.device("cpu")
    if backend == "nccl" and device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return device
