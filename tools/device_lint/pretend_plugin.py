"""pytest -p pretend_plugin: every test believes in one GPU, and a mix of devices raises as it would there.

    PYTHONPATH=tools/device_lint python -m pytest -p pretend_plugin tests/losses

Tests that fork their ranks have no pretended GPU there. At the end come the mixes that a test caught, by test.
"""

import pretend  # before torch  # noqa: I001

from collections.abc import Iterator

import fake_cuda
import pytest
from recorder import WRONG, Recorder

_mixes: dict[str, set[str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    fake_cuda.patch()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    recorder = Recorder(refuse=True)
    with pretend.Recording(recorder):
        result = yield
    found = {f"{e.kind} {e.op} @ {e.place}:{e.line}" for e in recorder.events if e.kind in WRONG}
    if found:
        _mixes[item.nodeid] = found
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for test, found in _mixes.items():
        terminalreporter.write_line(f"mixed devices: {test}")
        for line in sorted(found):
            terminalreporter.write_line(f"    {line}")
