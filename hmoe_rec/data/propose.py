"""Facts about columns -> a first schema. Names and numbers are all there is to go by, so a person must look it over.

Rules, the first that holds:
    list of floats, all equally long       vector
    list named like an id column (hist_X)  behaviors with target X, lists of equal lengths together in one sequence
    other list of ids                      bag, pooling: mean
    numbers named like a weight or a time  weight, time
    0 and 1, named like feedback           label (without any: every 0/1 column)
    strings                                id, mode: hash, twice as many buckets as distinct values
    floats                                 number; log1p or slog where the tail is long
    integers named like a quantity, or < 0 number
    integers                               id: mode: vocabulary where ids are dense, else hash
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hmoe_rec.data import fit

if TYPE_CHECKING:
    from hmoe_rec.data.describe import ColumnFacts

LABEL = re.compile(
    r"(^|_)(label|target|y|clicks?|like|follow|share|forward|comment|hate|buy|bought|purchase|conv|conversion|install|"
    r"pay|order|cart|subscribe|enter|finish|view|watched|favorite|favourite|rated|income|response)(_|\d|$)"
)
QUANTITY = re.compile(
    r"(^|_)(num|number|count|counts|cnt|amount|price|age|duration|days?|hours?|weeks?|minutes|seconds|secs|ms|rate|"
    r"score|size|width|height|length|len|gains?|loss(es)?|dividends|total|avg|mean|sum|max|min|revenue|cost|time)(_|\d|$)|^i\d+$"
)
TIME = re.compile(r"(^|_)(time|timestamp|ts|datetime)(_|$)")
DATE = re.compile(r"(^|_)(date|day|dt)(_|$)")
WEIGHT = re.compile(r"^(instance_|sample_|example_)?weight$")
USER = re.compile(r"^(user|uid|user_?id|member_?id|customer_?id|visitor_?id|device_?id)$")
ITEM = re.compile(r"^(item|video|ad|product|movie|article|content)_?id$")
ID = re.compile(r"(^|_)(id|ids|code|cat|category|key|type|bucket|bin|group|level|range)(_|$)|^c\d+$")
HISTORY = re.compile(r"^(hist|history|past|seq|recent)_|_(hist|history|seq|sequence|list)$")
ADVICE = (
    "# Proposed from names and values: look it over. What is known only after the exposure (watch times, other",
    "# feedback) must not be an input; vocabularies must hold the ids of days to come.",
)
DENSE = 0.05  # ids fill at least this share of 0..greatest: then a vocabulary, no hashing
LONG_TAIL = 9.0  # kurtosis from which a number is transformed: that of the exponential distribution


@dataclass(frozen=True)
class Proposal:
    """Attributes: left_out: (column, why)."""

    schema: dict[str, Any]
    left_out: tuple[tuple[str, str], ...]


def propose(columns: "Sequence[ColumnFacts]") -> Proposal:
    """The rules above."""
    left_out = {c.name: why for c in columns if (why := _useless(c))}
    rest = [c for c in columns if c.name not in left_out]
    lists, scalars = [c for c in rest if c.is_list], [c for c in rest if not c.is_list]

    weight = next((c.name for c in scalars if WEIGHT.search(c.name.lower()) and c.values.size), None)
    times = sorted((c for c in scalars if _is_time(c)), key=lambda c: -c.distinct)
    feedback = [c for c in scalars if c.is_binary and LABEL.search(c.name.lower())]
    tasks = feedback or [c for c in scalars if c.is_binary]
    taken = {weight, *(c.name for c in (*times, *tasks))}
    left_out |= {c.name: "a time" for c in times}
    ids, numbers = [], []
    for c in scalars:
        if c.name not in taken:
            (numbers if _is_quantity(c) else ids).append(c)

    schema: dict[str, Any] = {"ids": [_id(c) for c in ids]}
    vectors = [c for c in lists if pa.types.is_floating(c.element) and _constant(c)]
    sequences, bags, others = _lists([c for c in lists if c not in vectors], schema["ids"], times)
    left_out |= others
    schema["ids"] += [{**_id(c), "pooling": "mean"} for c in bags]
    schema["sequences"] = sequences
    schema["numbers"] = [_number(c) for c in numbers]
    schema["vectors"] = [_named(c, dim=int(c.lengths[0])) for c in vectors if c.lengths is not None]
    schema["tasks"] = [{"name": _name(c), **({"label": c.name} if _name(c) != c.name else {})} for c in tasks]
    user = next((c.name for c in ids if USER.search(c.name.lower())), None)
    items = [c.name for c in ids if ITEM.search(c.name.lower())]
    schema |= {"weight": weight, "user_key": user, "time": times[0].name if times else None}
    schema["keys"] = [name for name in (user, *items, schema["time"]) if name]
    schema = {key: value for key, value in schema.items() if value or key in ("ids", "tasks")}
    return Proposal(schema, tuple(left_out.items()))


def to_yaml(proposal: Proposal, columns: "Sequence[ColumnFacts]", headline: str) -> str:
    """A schema file with what was found as comments."""
    import yaml

    facts = {c.name: c.summary() for c in columns}

    def flow(value: Any) -> str:
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()

    lines = [f"# {headline}", *ADVICE, ""]
    for key, value in proposal.schema.items():
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            lines.append(flow({key: value})[1:-1])
            continue
        lines.append(f"{key}:" if value else f"{key}: []  # none found: write at least one")
        texts = [f"  - {flow(part)}" for part in value]
        width = min(90, max(map(len, texts), default=0))
        for part, text in zip(value, texts, strict=True):
            found = facts.get(part.get("column") or part.get("label") or part["name"])
            lines.append(f"{text:<{width}}  # {found}" if found else text)
            lines += [f"    # {column}: {facts[column]}" for column in part.get("columns", {})]
    if proposal.left_out:
        lines += ["", "# left out:"]
        lines += [f"#   {name} ({why}): {facts[name]}" for name, why in proposal.left_out]
    return "\n".join(lines) + "\n"


def _useless(c: "ColumnFacts") -> str | None:
    if c.missing == 1 or (c.lengths is not None and not c.lengths.any()):
        return "no values"
    known = fit.is_integer(c.element) or fit.is_text(c.element) or pa.types.is_floating(c.element)
    if not known and not pa.types.is_temporal(c.element):
        return "no role takes this type"
    if _is_row_number(c):
        return "a row number"
    return "always the same" if c.distinct <= 1 and c.missing == 0 and not c.is_list else None


def _is_row_number(c: "ColumnFacts") -> bool:
    name = c.name.lower()
    counts_up = not c.is_list and c.values.size > 2 and bool((np.diff(c.values) == 1).all())
    return counts_up and not USER.search(name) and not ITEM.search(name)


def _is_time(c: "ColumnFacts") -> bool:
    if pa.types.is_temporal(c.element) or not c.values.size:
        return pa.types.is_temporal(c.element)
    seconds = c.values.min() > 1e8  # since 1970, or a finer unit
    calendar = c.values.min() >= 19000101 and c.values.max() <= 21001231
    return bool((TIME.search(c.name.lower()) and seconds) or (DATE.search(c.name.lower()) and calendar))


def _is_quantity(c: "ColumnFacts") -> bool:
    if fit.is_text(c.element):
        return False
    if pa.types.is_floating(c.element):
        return True
    named_id, named_quantity = ID.search(c.name.lower()), QUANTITY.search(c.name.lower())
    return not named_id and c.distinct > 2 and bool(named_quantity or c.low < 0)


def _is_dense(c: "ColumnFacts") -> bool:
    return not fit.is_text(c.element) and c.low >= 0 and c.distinct >= DENSE * (c.high + 1)


def _id(c: "ColumnFacts") -> dict[str, Any]:
    if _is_dense(c):
        return _named(c, num_embeddings=int(c.high) + 1)
    return _named(c, num_embeddings=max(16, 1 << (2 * c.distinct - 1).bit_length()), mode="hash")


def _number(c: "ColumnFacts") -> dict[str, Any]:
    x, transform = c.values[np.isfinite(c.values)], "none"
    if x.size and _kurtosis(x) > LONG_TAIL:
        transform = "log1p" if c.low >= 0 else "slog"
        x = np.sign(x) * np.log1p(np.abs(x))
    options: dict[str, Any] = {} if transform == "none" else {"transform": transform}
    if x.size and x.std() > 0:
        options |= {"mean": float(f"{x.mean():.4g}"), "std": float(f"{x.std():.4g}")}
    return _named(c, **options)


def _lists(
    lists: "Sequence[ColumnFacts]", ids: list[dict[str, Any]], times: "Sequence[ColumnFacts]"
) -> "tuple[list[dict[str, Any]], list[ColumnFacts], dict[str, str]]":
    """Lists -> sequences, bags, and why others are left out."""
    left_out = {c.name: "a list of floats of several lengths" for c in lists if pa.types.is_floating(c.element)}
    clocks = [c for c in lists if c.name not in left_out and _is_time(c)]
    left_out |= {c.name: "times" for c in clocks}
    targets = {i["name"].lower(): i["name"] for i in ids}
    by_lengths: dict[bytes, list[tuple[ColumnFacts, str]]] = {}
    bags = []
    for c in lists:
        if c.name in left_out:
            continue
        stem = HISTORY.sub("", c.name.lower())
        target = targets.get(stem) or targets.get(f"{stem}_id") or targets.get(stem.removesuffix("s"))
        if target and HISTORY.search(c.name.lower()) and c.lengths is not None:
            by_lengths.setdefault(c.lengths.tobytes(), []).append((c, target))
        else:
            bags.append(c)
    sequences = []
    for number, (lengths, members) in enumerate(by_lengths.items()):
        sequence: dict[str, Any] = {"name": f"history{number + 1 if number else ''}"}
        sequence["columns"] = {c.name: target for c, target in members}
        clock = next((c for c in clocks if c.lengths is not None and c.lengths.tobytes() == lengths), None)
        if clock is not None and times:
            unit = {"time_unit": "ms"} if clock.values.size and clock.values.min() > 1e11 else {}
            sequence |= {"times": clock.name, "exposure_time": times[0].name, **unit}
            left_out.pop(clock.name)
        longest = max(int(c.lengths.max()) for c, _ in members if c.lengths is not None)
        sequences.append({**sequence, "max_length": max(1, longest)})
    return sequences, bags, left_out


def _named(c: "ColumnFacts", **options: Any) -> dict[str, Any]:
    name = _name(c)
    return {"name": name, **({"column": c.name} if name != c.name else {}), **options}


def _name(c: "ColumnFacts") -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", c.name) or "column"


def _constant(c: "ColumnFacts") -> bool:
    return c.lengths is not None and c.lengths.size > 0 and c.lengths.min() == c.lengths.max() > 0


def _kurtosis(x: np.ndarray) -> float:
    spread = x.std()
    return float((((x - x.mean()) / spread) ** 4).mean()) if spread > 0 else 0.0
