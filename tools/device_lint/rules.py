"""One operator and its operands -> what CUDA would say to them."""

from typing import Any

import torch
from recorder import Recorder, note

#: Where even a CPU tensor of no dimensions beside CUDA tensors is refused (operators without TensorIterator).
STRICT = frozenset(
    "cat stack mm bmm addmm baddbmm addmm_ index_select gather scatter scatter_add index_add index_add_ index_copy "
    "embedding _embedding_bag searchsorted bucketize linear convolution".split()
)
#: Sizes that depend on values, and checks for errors: the host reads a number that the device has to compute first.
WAITING = {
    "_local_scalar_dense": 1,
    "nonzero": 1,
    "argwhere": 1,
    "masked_select": 1,
    "_unique": 1,
    "_unique2": 1,
    "unique_dim": 1,
    "unique_consecutive": 1,
    "equal": 1,
    "is_nonzero": 1,
    "bincount": 2,
    "histogram": 1,
    "multinomial": 1,
    "segment_reduce": 1,
    "linalg_eig": 1,
    "linalg_eigh": 1,
    "_linalg_eigh": 1,
    "_linalg_svd": 1,
    "linalg_lstsq": 1,
}
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
#: Operators that take tensors of several devices.
MIXING = ("detach", "set_", "to", *INDEXING)


class DeviceMismatch(RuntimeError):
    """What torch raises on a GPU, where a recorder refuses."""


def name_of(func: Any) -> str:
    return func._schema.name.split("::")[1]


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def pin(x: torch.Tensor) -> torch.Tensor:
    x._pretended_pinned = True  # type: ignore[attr-defined]
    return x


def is_pinned(x: torch.Tensor) -> bool:
    return getattr(x, "_pretended_pinned", False)


def judge(func: Any, args: tuple, kwargs: dict, on_device: list, plain: list[torch.Tensor]) -> None:
    """Tells the active recorder.

    Args:
        on_device: the operands that are on the GPU.
        plain: the other tensors among them.

    Raises:
        DeviceMismatch: operands on several devices, where the recorder refuses.
    """
    if Recorder.active is None:
        return
    name = name_of(func)
    if name in ("_to_copy", "copy_"):
        _judge_copy(name, args, kwargs, on_device)
        return
    if func.namespace in ("c10d", "_c10d_functional"):
        if plain and on_device:
            _mixed(f"{func.namespace}.{name}", plain)
        return
    generators = [x for x in (kwargs.get("generator"), *args) if isinstance(x, torch.Generator)]
    if any(generator.device.type == "cpu" for generator in generators):
        note("GENERATOR", name)
    strays = [x for x in plain if not x.is_meta and (x.dim() or name in STRICT)]
    if on_device and strays and name not in MIXING:
        _mixed(name, strays)
    if name in INDEXING:
        _judge_index(name, args, on_device)
    elif name == "repeat_interleave":
        if kwargs.get("output_size") is None:
            note("SYNC", "repeat_interleave without output_size")
    elif name == "where" and len(args) == 1:
        note("SYNC", "where(condition)")
    else:
        note("SYNC", name, WAITING.get(name, 0))


def _mixed(op: str, strays: list[torch.Tensor]) -> None:
    sizes = ", ".join(str(list(x.shape)) for x in strays)
    note("MIX", op)
    if Recorder.active is not None and Recorder.active.refuse:
        raise DeviceMismatch(f"{op}: expected all tensors on the same device, found some on cuda and {sizes} on cpu")


def _judge_index(name: str, args: tuple, on_device: list) -> None:
    indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
    held = {id(x) for x in on_device}
    if id(args[0]) in held:
        note("H2D*", f"{name} by a list or a CPU tensor", sum(id(x) not in held and x.dim() > 0 for x in indices))
    masks = [x for x in indices if x.dtype in (torch.bool, torch.uint8)]
    filled = name != "index" and len(indices) == 1 and args[2].numel() == 1  # becomes masked_fill
    if masks and not filled:
        note("SYNC", f"{name} by a mask", len(masks))


def _judge_copy(name: str, args: tuple, kwargs: dict, on_device: list) -> None:
    held = {id(x) for x in on_device}
    if name == "_to_copy":
        source, device = args[0], kwargs.get("device")
        to_cuda = is_cuda(device) if device is not None else id(source) in held
        non_blocking = kwargs.get("non_blocking", False)
        if device is not None and torch.device(device).type == "meta":
            return
    else:
        source, to_cuda = args[1], id(args[0]) in held
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    from_cuda = id(source) in held
    if from_cuda == to_cuda:
        return
    if from_cuda:
        note("d2h" if non_blocking else "D2H", name)
    elif non_blocking and is_pinned(source):
        note("h2d", f"{name} pinned")
    else:
        note("H2D" if non_blocking else "H2D*", name)
