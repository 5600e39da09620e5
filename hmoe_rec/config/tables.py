"""Names and precisions of a run's embedding tables. No torch in here: run files are read with it."""

from collections.abc import Mapping, Sequence

from hmoe_rec.sharding.constraints import SEPARATOR, matching
from hmoe_rec.suggest import did_you_mean, listing
from hmoe_rec.types import EmbeddingSet, Features


def places_of_tables(sets: Sequence[EmbeddingSet], features: Features) -> dict[str, tuple[str, str]]:
    """Table -> its set and its field. The name alone does not say: both may hold the separator.

    As `embedding/tables.py` makes them: one of every set for each of its id fields, and for those that its behavior
    columns share.
    """
    places = {}
    for s in sets:
        present = s.fields or features.field_names
        named = {features.targets.get(field, field) for field in present}
        places |= {f"{s.name}{SEPARATOR}{f.name}": (s.name, f.name) for f in features.ids if f.name in named}
    return places


def table_names(sets: Sequence[EmbeddingSet], features: Features) -> list[str]:
    """In the order of the sets and, within one, of the id fields."""
    return list(places_of_tables(sets, features))


def precisions_of(names: Sequence[str], default: str, patterns: Mapping[str, str]) -> dict[str, str]:
    """Table -> precision; of two patterns that match a table the later one counts."""
    result = dict.fromkeys(names, default)
    for pattern, precision in patterns.items():
        result |= dict.fromkeys(matching(pattern, names), precision)
    return result


def unknown_patterns(names: Sequence[str], patterns: Mapping[str, str]) -> list[str]:
    """A line for each pattern that matches nothing."""
    known = list(dict.fromkeys(part for name in names for part in (name, *name.split(SEPARATOR, 1))))
    where = "model.table_precisions"
    return [
        f"{where}: {p!r} matches no table, set or field{did_you_mean(p, known)}; tables: {listing(names)}"
        for p in patterns
        if not matching(p, names)
    ]
