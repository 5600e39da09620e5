"""Tensors that say they are on a GPU and compute on the CPU; to be imported before torch.

A wrapper tensor holds the true values, so that code which depends on them runs as it would; a dispatch mode sees the
factories. What CUDA would refuse or wait for goes to the recorder (rules.py). Kernels are not known here: whether one
exists for a type, and what it computes, is another question.
"""

import guard  # noqa: F401, I001  (before torch)

import os
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import rules
from recorder import Recorder

CUDA = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
CPU = torch.device("cpu")


class Pretended(torch.Tensor):
    """Says `CUDA`; `elem` holds the values."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> "Pretended":
        assert not isinstance(elem, Pretended)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=CUDA,
            requires_grad=False,
        )
        made.elem = elem
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({self.elem!r})"

    def record_stream(self, stream: Any) -> None:
        return None

    def tolist(self) -> Any:
        return self.detach().to(CPU).tolist()

    def __deepcopy__(self, memo: dict) -> "Pretended":
        with torch.no_grad():
            copy = Pretended(self.elem.detach().clone())
        copy.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy._is_param = True
        return copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Recording(TorchDispatchMode):
    """The `with` block in which a recorder is active."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __enter__(self) -> Recorder:  # type: ignore[override]
        Recorder.active = self.recorder
        # torch.tensor(..., device="cuda") makes it on the CPU and calls `to`, which is then seen.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self.recorder

    def __exit__(self, *problem: object) -> None:
        super().__exit__(*problem)
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        Recorder.active = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    """One operator: judged, computed on the CPU, its results wrapped where a GPU would hold them."""
    flat, spec = tree_flatten((args, kwargs))
    on_device = [x for x in flat if isinstance(x, Pretended)]
    device = kwargs.get("device")
    if not on_device and not rules.is_cuda(device):
        return _on_cpu(func, args, kwargs)
    rules.judge(func, args, kwargs, on_device, [x for x in flat if _is_plain(x)])
    name = rules.name_of(func)
    if name == "record_stream":
        return None
    if name == "is_pinned":
        return False
    flat = [x.elem if isinstance(x, Pretended) else x for x in flat]
    plain_args, plain_kwargs = tree_unflatten(flat, spec)
    if device is not None:
        plain_kwargs = _without_device(name, plain_kwargs, device)
    out = func(*plain_args, **plain_kwargs)
    if name == "copy_" and not isinstance(args[0], Pretended):
        return args[0]
    if name == "_local_scalar_dense":
        return out
    if torch.Tag.inplace_view in func.tags and isinstance(args[0], Pretended):
        with torch._C._DisableTorchDispatch():  # the wrapper's own sizes
            func(*args, **kwargs)
    stays = rules.is_cuda(device) if device is not None else True
    return _wrapped(out, {id(x.elem): x for x in on_device}, stays)


def _is_plain(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, Pretended)


def _on_cpu(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operator that a GPU has nothing to do with; pinned memory is a mark on the tensor."""
    name = rules.name_of(func)
    if name == "is_pinned":
        return rules.is_pinned(args[0])
    if name == "_pin_memory":
        return rules.pin(args[0].clone())
    if kwargs.get("pin_memory"):
        return rules.pin(func(*args, **{**kwargs, "pin_memory": False}))
    return func(*args, **kwargs)


def _without_device(name: str, kwargs: dict, device: Any) -> dict:
    kwargs = {**kwargs, "device": CPU if rules.is_cuda(device) else device}
    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = False
    if name == "_to_copy":
        kwargs["non_blocking"] = False
        if torch.device(device).type != "meta":
            del kwargs["device"]
    return kwargs


def _wrapped(out: Any, known: dict[int, Pretended], stays: bool) -> Any:
    """The results on the device: an input that came back as itself, others in a new wrapper."""

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.is_meta:
            return x
        if id(x) in known:
            return known[id(x)]
        return Pretended(x) if stays and x.device.type == "cpu" else x

    return tree_map(wrap, out)
