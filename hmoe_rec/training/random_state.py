"""This process's random state, and what of it goes on where a run is resumed on another kind of device."""

from collections.abc import Collection

import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """By generator: "cpu", and "cuda" on a GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device, *, seed: int) -> None:
    """state: as `random_state` gave it, here or on another kind of device. seed: of a GPU's generator that it lacks."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
        else:
            torch.cuda.manual_seed(seed)


def change_of_generators(saved: Collection[str], here: Collection[str]) -> str | None:
    """A line for people; None where the run goes on with all the generators that it had."""
    if "cuda" in here and "cuda" not in saved:
        return "note: it was saved on a CPU; this GPU's random numbers (dropout) are seeded by train.seed and the step"
    if "cuda" in saved and "cuda" not in here:
        return "note: it was saved on a GPU, whose random numbers (dropout) cannot go on here: the CPU's are drawn"
    return None
