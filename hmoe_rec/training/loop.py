"""Two loops with one signature: `progress(iterator of batches) -> StepOutput`, StopIteration at the end.

The plain one is to read and to debug with; the pipelined one is TorchRec's. A test holds their losses equal.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer

from hmoe_rec.batch import Batch
from hmoe_rec.embedding.managed import managed_ids
from hmoe_rec.training.task import StepOutput
from hmoe_rec.types import ConfigError


class Loop(Protocol):
    def progress(self, batches: Iterator[Batch]) -> StepOutput: ...

    def evaluation_model(self) -> nn.Module:
        """The model, callable outside of the pipeline."""
        ...

    def after_evaluation(self) -> None: ...

    def rewind(self) -> None:
        """All batches of an iterator have been trained on: the next call of `progress` brings another one."""
        ...


class PlainLoop:
    """Forward, backward, step; nothing overlaps."""

    def __init__(self, model: nn.Module, optimizer: KeyedOptimizer, device: torch.device) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device

    def progress(self, batches: Iterator[Batch]) -> StepOutput:
        batch = next(batches).to(self.device)
        self.optimizer.zero_grad()
        loss, output = self.model(batch)
        loss.backward()
        self.optimizer.step()
        return output

    def evaluation_model(self) -> nn.Module:
        return self.model

    def after_evaluation(self) -> None:
        pass

    def rewind(self) -> None:
        pass


class BaseLoop(PlainLoop):
    """TorchRec's base pipeline: the next batch is copied to the device while this one trains."""

    def __init__(self, model: nn.Module, optimizer: KeyedOptimizer, device: torch.device) -> None:
        super().__init__(model, optimizer, device)
        self.pipeline = TrainPipelineBase(model, optimizer, device)

    def progress(self, batches: Iterator[Batch]) -> StepOutput:
        return self.pipeline.progress(batches)

    def rewind(self) -> None:
        self.pipeline.reset()


class SparseDistLoop(BaseLoop):
    """TorchRec's pipeline that also exchanges the next batch's ids while this one trains: the one for GPUs."""

    def __init__(self, model: nn.Module, optimizer: KeyedOptimizer, device: torch.device) -> None:
        PlainLoop.__init__(self, model, optimizer, device)
        self.pipeline = TrainPipelineSparseDist(model, optimizer, device, execute_all_batches=True)

    def evaluation_model(self) -> nn.Module:
        # The pipeline replaces the sharded modules' forward; batches already in flight stay in the pipeline.
        return self.pipeline.detach()

    def after_evaluation(self) -> None:
        self.pipeline.attach()

    def rewind(self) -> None:
        pass  # the pipeline sees by itself that the iterator is another one


LOOPS: dict[str, type[PlainLoop]] = {"plain": PlainLoop, "base": BaseLoop, "sparse_dist": SparseDistLoop}


def make_loop(kind: str, model: nn.Module, optimizer: KeyedOptimizer, device: torch.device) -> Loop:
    """kind: "plain", "base", "sparse_dist", or "auto": sparse_dist on a GPU, base elsewhere (no gain there on CPU).

    Managed ids take "base": ahead of the step, sparse_dist would give rows to ids of batches that are not yet trained,
    which evaluations and checkpoints in between would see.

    Raises:
        ConfigError: sparse_dist with managed ids.
    """
    managed = managed_ids(model) is not None
    if kind == "auto":
        kind = "sparse_dist" if device.type == "cuda" and not managed else "base"
    if kind == "sparse_dist" and managed:
        raise ConfigError(
            "train.pipeline: sparse_dist looks up ids ahead of the step, which fields of mode: managed do not allow; "
            "give base or auto"
        )
    return LOOPS[kind](model, optimizer, device)
