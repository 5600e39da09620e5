"""Bars for long work: what works calls `Progress`, the command line shows it."""

import contextlib
from collections.abc import Callable, Iterator

Progress = Callable[[int, int], None]  # what is done, and all there is to do: rows, or bytes


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A bar on the terminal (stderr: what is printed may be piped) for as long as the block runs."""
    from rich import progress as rp
    from rich.console import Console

    columns = (rp.TextColumn("{task.description}"), rp.BarColumn(), rp.MofNCompleteColumn(), rp.TimeRemainingColumn())
    with rp.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description)
        yield lambda done, total: bar.update(task, completed=done, total=total)
