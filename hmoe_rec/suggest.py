"""A wrong name and the right ones -> the part of an error message that helps.

>>> unknown("field", "user_di", ["user_id", "video_id"])
"unknown field 'user_di'; known: user_id, video_id; did you mean 'user_id'?"
"""

from collections.abc import Iterable
from difflib import get_close_matches

_MOST_NAMES = 12  # a message that lists more is not read


def nearest(given: object, known: Iterable[str]) -> str | None:
    """The known name that resembles the given one most; None if none does."""
    names = {name.lower(): name for name in known}
    matches = get_close_matches(str(given).lower(), names, n=1, cutoff=0.6)
    return names[matches[0]] if matches else None


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or nothing where no known name resembles the given one."""
    match = nearest(given, known)
    return f"; did you mean '{match}'?" if match else ""


def listing(known: Iterable[str]) -> str:
    """The names, separated by commas; the tail of a long list becomes a count."""
    names = list(known)
    head = ", ".join(names[:_MOST_NAMES]) or "none"
    return f"{head}, ... ({len(names)} in all)" if len(names) > _MOST_NAMES else head


def unknown(noun: str, given: object, known: Iterable[str]) -> str:
    """One sentence: which name is not known, which are, and which one was probably meant."""
    names = list(known)
    return f"unknown {noun} '{given}'; known: {listing(names)}{did_you_mean(given, names)}"
