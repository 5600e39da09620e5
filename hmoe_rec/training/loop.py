"""Two loops with one signature: `progress(iterator of batches) -> StepOutput`, StopIteration at the end.

The plain one is to read and to debug with; the pipelined one is TorchRec's. A test holds their losses equal.
"""

import logging
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule
from torchrec.optim.keyed import KeyedOptimizer

from hmoe_rec.batch import Batch
from hmoe_rec.embedding.managed import managed_ids
from hmoe_rec.training.task import StepOutput
from hmoe_rec.types import ConfigError

log = logging.getLogger(__name__)


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
    """TorchRec's pipeline that also exchanges the next batch's ids while this one trains: the one for GPUs.

    `RowIds`, which stands before every collection, has no parameters and reads the batch alone, so that TorchRec may
    run it ahead too; without `pipeline_postproc` it takes every collection behind a module for one whose ids the model
    has changed, and runs none ahead.
    """

    def __init__(self, model: nn.Module, optimizer: KeyedOptimizer, device: torch.device) -> None:
        PlainLoop.__init__(self, model, optimizer, device)
        self.pipeline = TrainPipelineSparseDist(
            model, optimizer, device, execute_all_batches=True, pipeline_postproc=True
        )
        self._told = False

    def progress(self, batches: Iterator[Batch]) -> StepOutput:
        output = self.pipeline.progress(batches)
        if not self._told:
            self._told = True
            self._tell_what_waits()
        return output

    def not_ahead(self) -> list[str]:
        """Paths of the sharded modules whose ids are not exchanged ahead; known after the first step."""
        ahead = {id(module) for module in self.pipeline._pipelined_modules}
        modules = get_unwrapped_module(self.model).named_modules()
        sharded = ((name, m) for name, m in modules if isinstance(m, ShardedModule))
        return [name for name, module in sharded if id(module) not in ahead]

    def _tell_what_waits(self) -> None:
        if (waits := self.not_ahead()) and (not dist.is_initialized() or dist.get_rank() == 0):
            log.warning(
                "train.pipeline: sparse_dist does not exchange the ids of %s ahead of the step, since the model "
                "changes them by more than modules without parameters; the run is right, but not faster by them",
                ", ".join(waits),
            )

    def evaluation_model(self) -> nn.Module:
        # The pipeline replaces the sharded modules' forward; batches already in flight stay in the pipeline.
        # RowIds are put back here: TorchRec 1.6 puts modules below the model's own children back under a wrong name, so
        # that ours would go on giving the rows of the batch in flight.
        for replaced in self.pipeline._pipelined_postprocs:
            get_unwrapped_module(self.model).set_submodule(replaced.fqn, replaced.postproc_module)
        self.pipeline._pipelined_postprocs = []
        return self.pipeline.detach()

    def after_evaluation(self) -> None:
        # Every step leaves the next batch's ids exchanged. TorchRec would start that exchange once more, under a
        # context that nobody waits for, and the lookup of several processes would fail.
        self.pipeline.attach(sparse_dist=False)

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
