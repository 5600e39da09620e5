"""Nested state <-> flat names, and what keeps a checkpoint's tensors from filling another state's, in words."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hmoe_rec.suggest import nearest
from hmoe_rec.types import CheckpointError

PER_RANK = "per_rank"  # the part of a checkpoint that holds each process's own tensors
Form = tuple[tuple[int, ...], torch.dtype]
_SHOWN = 4  # keys that an error message names


def flatten(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """{"model": {"w": t}} -> {"model.w": t}; CheckpointError where a leaf is not a tensor or two names coincide."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        inner = flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
        for leaf, tensor in inner.items():
            if not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"state {leaf!r} is a {type(tensor).__name__}; only tensors are stored (reading objects back could "
                    "run code): make it a tensor, or put it in meta"
                )
            if leaf in result:
                raise CheckpointError(f"state holds {leaf!r} twice: rename one")
            result[leaf] = tensor
    return result


def size_of(tensor: Tensor) -> tuple[int, ...]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # ShardedTensor announces its successor at each call
        return tuple(tensor.size())


def difference(uri: str, saved: Mapping[str, Form], wanted: Mapping[str, Form], converted: set[str]) -> str | None:
    """What keeps the checkpoint at `uri` from filling a state, as a message; None if nothing does.

    Only the parts (first components of names) that the state has are compared; `converted` may differ in size.
    """
    parts = {key.split(".")[0] for key in wanted}
    missing = sorted(wanted.keys() - saved.keys())
    extra = sorted(key for key in saved.keys() - wanted.keys() if key.split(".")[0] in parts - {PER_RANK})
    changed = sorted(k for k in wanted.keys() & saved.keys() if wanted[k] != saved[k] and k not in converted)
    problems = []
    if missing:
        hints = [f"{key} (it has {near})" if (near := nearest(key, extra)) else key for key in missing[:_SHOWN]]
        problems.append(f"{len(missing)} tensors are not in it: {_listing(hints, len(missing))}")
    if extra:
        problems.append(f"{len(extra)} of its tensors are not in this model: {_listing(extra[:_SHOWN], len(extra))}")
    if changed:
        shown = [f"{k}: {_form(*saved[k])} there, {_form(*wanted[k])} here" for k in changed[:_SHOWN]]
        problems.append(f"{len(changed)} differ in size or dtype: {_listing(shown, len(changed))}")
    if not problems:
        return None
    what = "; ".join(problems)
    hint = ""
    if missing and all(".crosses.biases." in key or ".interaction.biases." in key for key in missing):
        hint = ": a CIN without biases, as those of earlier versions, has bias: false beside its kind"
    return f"{uri} is a checkpoint of another model: {what}. Use the configuration it was made with{hint}"


def _listing(shown: list[str], total: int) -> str:
    return ", ".join(shown) + (f" and {total - len(shown)} more" if total > len(shown) else "")


def _form(size: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(size)} {str(dtype).removeprefix('torch.')}"
