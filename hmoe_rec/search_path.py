"""Where Python searches for modules. Imports only what is loaded before any program starts."""

import os
import sys


def without_current_folder() -> list[str]:
    """Where Python searches, less the current folder and what PYTHONPATH names relative to it.

    It may be a run directory that somebody else has written. `python -m` and an interactive Python put it first; an
    empty item of PYTHONPATH means it too. Named there by its full path it stays: that is the user's own act. So it does
    where it holds this package.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = {os.path.realpath(item) for item in given if os.path.isabs(item)}
    named.add(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    near = {os.path.realpath(item) for item in ("", *given) if not os.path.isabs(item)} - named
    return [item for item in sys.path if os.path.realpath(item) not in near]
