"""A bucket on an S3 server of this machine, whose answers fail now and then."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from object_store import ObjectStore, Spoiled


@dataclass
class Faulty(ObjectStore):
    """Attributes: share: of the answers that fail, come late or are cut. draw: which ones."""

    share: float = 0.0
    draw: random.Random = field(default_factory=random.Random)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if self.draw.random() >= self.share:
            return super().__call__(environ, start_response)
        rule = Spoiled("*", "", self.draw.choice((500, 503, "slow", "cut")), 1, 0.3, 0)
        return self._spoil(rule, environ, start_response)


@contextmanager
def object_store(faults: float, *, seed: int) -> Iterator[tuple[str, dict[str, str]]]:
    """-> s3://bucket, and the environment of those who write there, which is this process's too."""
    store = Faulty(draw=random.Random(seed))
    store.start()
    os.environ.update(store.environment)
    try:
        uri = store.make_bucket("soak")
        store.share = faults
        yield uri, store.environment
    finally:
        store.stop()
