"""The kind of a part -> its class; and whose code may be run for it.

A run directory, a run file or a checkpoint comes from anywhere, and a kind in it may name any class of any package.
Foreign code is let in by an act of the user only, never by what a file says: the command names the package (`--allow`,
or `allow` here), or a distribution that was installed offers the part (entry points, group `hmoe_rec.parts`). Whatever
lies in the current folder is not found.
"""

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType

from hmoe_rec.search_path import without_current_folder
from hmoe_rec.suggest import nearest
from hmoe_rec.types import ConfigError

OWN = __name__.partition(".")[0]
GROUP = f"{OWN}.parts"  # of entry points: name = "package.module:Class"
VARIABLE = "HMOE_REC_ALLOW"  # packages with commas between them; processes that are started from here see it too


class Kinds(dict[str, str]):
    """Kind -> "module:Class" of our own parts.

    Attributes:
        base: "module:Class" that a part written elsewhere derives from.
    """

    def __init__(self, base: str, kinds: Mapping[str, str]) -> None:
        super().__init__(kinds)
        self.base = base


def resolve(kind: str, registry: Kinds) -> type:
    """A part's class by its registered name, by the name that an installed distribution offers it under, or by
    "package.module:Class" for a part of a package that is allowed.

    The class is not called. It derives from the registry's base, and was defined in a package that is allowed.

    Raises:
        ValueError: no such name, module or class; code that is not allowed; something else than such a class.
    """
    path = registry.get(kind)
    if path is not None:
        return _own(path)
    offered = _offered(kind)
    path = offered or kind
    module, colon, name = path.partition(":")
    if not colon:
        near = nearest(kind, registry)
        hint = f"; did you mean {near!r}?" if near else ""
        known = f"known: {', '.join(sorted(registry))}; or 'package.module:Class', with --allow package"
        raise ValueError(f"unknown kind {kind!r}{hint} ({known})")
    if not (_is_dotted(module) and name.isidentifier()):
        raise ValueError(f"kind {kind!r}: expected 'package.module:Class'")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"kind {kind!r}: {module} is a module of Python itself, which has no parts of models")
    if not (offered or _is_allowed(module)):
        top = module.partition(".")[0]
        raise ValueError(
            f"kind {kind!r} is code of the package {top!r}, which runs only where you allow it: add --allow {top} to "
            f"the command (in Python: allow=[{top!r}]; for launchers: {VARIABLE}={top}), if you trust that package"
        )
    found = getattr(_imported(kind, module), name, None)
    problem = _problem(found, registry.base, anywhere=offered is not None)
    if problem is not None:
        raise ValueError(f"kind {kind!r}: {name!r} in {module!r} {problem}")
    assert isinstance(found, type)
    return found


def allow(packages: Iterable[str]) -> None:
    """From now on, parts of these packages may be imported: in this process, and in those that it starts.

    Raises:
        ConfigError: not the name of a package.
    """
    allowed = _allowed()
    for package in [packages] if isinstance(packages, str) else packages:
        if not _is_dotted(package):
            raise ConfigError(f"--allow {package}: expected the name of a package, such as my_package")
        allowed += [] if package in allowed else [package]
    if allowed:
        os.environ[VARIABLE] = ",".join(allowed)


# ----------------------------------------------------------------------------------------------------- whose code it is


def _allowed() -> list[str]:
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]


def _is_allowed(module: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in (OWN, *_allowed()))


@cache
def _offers() -> dict[str, tuple[str, ...]]:
    """Name -> the "package.module:Class" of it in each of the installed distributions that offer it."""
    from importlib import metadata

    found: dict[str, tuple[str, ...]] = {}
    for distribution in metadata.distributions(path=without_current_folder()):
        for point in distribution.entry_points.select(group=GROUP):
            path = f"{point.module}:{point.attr}"
            found[point.name] = tuple(dict.fromkeys((*found.get(point.name, ()), path)))
    return found


def _offered(kind: str) -> str | None:
    """The "package.module:Class" of a kind that an installed distribution offers; None where none does."""
    offers = _offers()
    paths = offers.get(kind, ())
    if len(paths) > 1:
        raise ValueError(f"kind {kind!r}: several installed distributions offer it; give one of {', '.join(paths)}")
    return paths[0] if paths else kind if any(kind in of_name for of_name in offers.values()) else None


# ------------------------------------------------------------------------------------------------------------ its class


def _own(path: str) -> type:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _imported(kind: str, module: str) -> ModuleType:
    try:
        with _searching(without_current_folder()):
            return importlib.import_module(module)
    except Exception as error:  # what a module raises as it is imported
        here = _in_current_folder(module) if isinstance(error, ImportError) else ""
        raise ValueError(f"kind {kind!r}: cannot import {module!r}: {error or type(error).__name__}{here}") from error


def _in_current_folder(module: str) -> str:
    from importlib.machinery import PathFinder

    top = module.partition(".")[0]
    folder = os.getcwd()
    if PathFinder.find_spec(top, without_current_folder()) is not None or PathFinder.find_spec(top, [folder]) is None:
        return ""
    return (
        f"; {top!r} of the current folder is never taken, since it may have come with the run: install it "
        f"(pip install -e .), or name its folder: PYTHONPATH={folder} (a program of your own may import it beforehand)"
    )


def _problem(found: object, base: str, *, anywhere: bool) -> str | None:
    """What is wrong with an attribute of a foreign module as a part, as the end of a sentence. Nothing is called."""
    if found is None:
        return "is not there"
    if not isinstance(found, type):
        return f"is no class but a {type(found).__name__}; expected a class that derives from {base}"
    if not issubclass(found, _own(base)):
        return f"is no {base.replace(':', '.')}; derive it from that class"
    if not (anywhere or _is_allowed(found.__module__)):
        return f"was defined in {found.__module__!r}, which is not allowed; name it there, and allow that package"
    return None


@contextmanager
def _searching(path: list[str]) -> Iterator[None]:
    before = sys.path[:]
    sys.path[:] = path
    try:
        yield
    finally:
        sys.path[:] = before + [item for item in sys.path if item not in path and item not in before]


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))
