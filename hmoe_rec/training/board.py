"""Scalars -> TensorBoard's event files, in a directory or in a store."""

import logging
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from hmoe_rec import io

log = logging.getLogger(__name__)

EVERY_SECONDS = 30.0  # between two copies of a file that grows
FILE_BYTES = 1 << 22  # of an event file in a store, which is copied whole each time; after that another one begins


class Board:
    """
    An event file grows, which no object does. For a remote directory it is written here and copied now and then;
    TensorBoard reads the copies as it reads files that grow, and several in their order.

    Args:
        purge_step: events from this step on, of an earlier attempt, are not shown; None = all are.
    """

    def __init__(self, uri: str, purge_step: int | None) -> None:
        self.uri, self._purge_step, self._files = uri, purge_step, 0
        self._folder = None if io.is_local(uri) else tempfile.TemporaryDirectory(prefix="hmoe_board_")
        self._writer = self._open()
        self._copied_at = time.monotonic()

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

        # One event, not add_scalar for each, which takes 0.1 ms: of hundreds of tables there are a thousand.
        points = [Summary.Value(tag=tag, simple_value=float(x)) for tag, x in scalars.items()]
        self._writer.file_writer.add_summary(Summary(value=points), step)
        if self._folder is not None and time.monotonic() - self._copied_at >= EVERY_SECONDS:
            self._copy()

    def flush(self) -> None:
        """What was added can be seen in a store, too."""
        if self._folder is not None:
            self._copy()

    def close(self) -> None:
        self._writer.close()
        if self._folder is not None:
            self._copy(last=True)
            self._folder.cleanup()

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        folder = io.local_path(self.uri) if self._folder is None else self._folder.name
        suffix = "" if self._folder is None else f".{self._files:04d}"
        return SummaryWriter(folder, purge_step=self._purge_step, filename_suffix=suffix)

    def _copy(self, last: bool = False) -> None:
        assert self._folder is not None
        self._writer.flush()
        self._copied_at = time.monotonic()
        for name in sorted(os.listdir(self._folder.name)):
            path = os.path.join(self._folder.name, name)
            try:
                io.upload(path, io.join(self.uri, name))
            except OSError as error:
                log.warning("%s; TensorBoard's file is copied later", error)
                return
            if not last and os.path.getsize(path) >= FILE_BYTES:
                self._writer.close()
                os.remove(path)
                self._files, self._purge_step = self._files + 1, None
                self._writer = self._open()
