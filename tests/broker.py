"""A Redis server of a test's own: started on a free port, without files, stopped at the end."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """-> "redis://127.0.0.1:port/0". Skips where there is no redis-server ($HMOE_REC_REDIS_SERVER, or on the PATH)."""
    program = os.environ.get("HMOE_REC_REDIS_SERVER") or shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server (apt install redis-server, or set HMOE_REC_REDIS_SERVER)")
    redis = pytest.importorskip("redis", reason="the package redis is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"port": port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": str(folder)}
    command = [program, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = redis.Redis(port=port)
        for _ in range(500):
            try:
                client.ping()
                break
            except redis.exceptions.ConnectionError:
                time.sleep(0.01)
        client.ping()
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()
