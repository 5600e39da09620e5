"""Who may import whom: imports go down the floors only, and rooms on one floor are strangers. Read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hmoe_rec"
FLOORS = [
    {
        "types",
        "suggest",
        "units",
        "object_store",
        "io",
        "lock",
        "commit",
        "line_log",
        "progress",
        "batch",
        "kinds",
        "search_path",
    }
    | {"layers"},
    {"data", "encoding", "embedding", "experts", "towers", "losses", "metrics"},
    {"assembly"},
    {"model"},
    {"sharding", "uncertainty", "explore"},
    {"training"},
    {"analysis", "serving", "benchmark"},
    {"config", "show", "doctor", "commands", "cli"},
]
NEIGHBOURS = {  # what a room may import besides the floors below its own
    "batch": {"types"},
    "io": {"types", "suggest", "object_store"},
    "lock": {"types", "io"},
    "commit": {"types", "io", "lock"},
    "line_log": {"io"},
    "kinds": {"types", "suggest", "search_path"},
    "training": {"config"},
    "serving": {"config"},
    "analysis": {"config"},
    "benchmark": {"config"},
    "show": {"config"},
    "commands": {"config", "show", "doctor"},
    "cli": {"commands"},
}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(source: str) -> set[str]:
    """Rooms of hmoe_rec that a source imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write hmoe_rec.{node.module}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("hmoe_rec.")} - {"__version__"}


def is_allowed(room: str, other: str) -> bool:
    return room == other or FLOOR_OF[other] < FLOOR_OF[room] or other in NEIGHBOURS.get(room, ())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path):
    room = room_of(path)
    assert room in FLOOR_OF, f"{room} has no floor yet: add it to FLOORS"
    unknown = imported_rooms(path.read_text()) - FLOOR_OF.keys()
    assert not unknown, f"{unknown}: import modules, not names, from hmoe_rec itself"
    wrong = sorted(other for other in imported_rooms(path.read_text()) if not is_allowed(room, other))
    assert not wrong, f"{room} (floor {FLOOR_OF[room]}) may not import {wrong}: hand it over as an argument instead"


def test_a_sideways_and_an_upward_import_are_seen():
    assert imported_rooms("from hmoe_rec.experts.fm import FM\ndef f():\n    import hmoe_rec.config") == {
        "experts",
        "config",
    }
    assert not is_allowed("towers", "experts") and not is_allowed("experts", "config") and is_allowed("model", "towers")
