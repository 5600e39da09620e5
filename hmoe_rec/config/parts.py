"""A part's `{kind: ..., option: ...}` against the constructor of its class: every problem, in the user's words.

Parts have no configuration of their own: their options are the keyword-only arguments of their constructors, with the
types that stand there. This holds for parts written elsewhere ("package.module:Class") too. Imports torch when called.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from hmoe_rec.kinds import Kinds, resolve
from hmoe_rec.suggest import unknown

_CONFIG = ConfigDict(arbitrary_types_allowed=True)


OF_THE_MODEL = ("field_names", "two_logits")  # keyword arguments that the model gives, and a run file may not


def check_part(
    given: Mapping[str, Any],
    registry: Kinds,
    sizes: tuple[Any, ...] | None,
    field_names: Sequence[str] = (),
) -> list[str]:
    """Problems of `{kind: ..., option: ...}`: its kind, names and types of its options, and whether it can be built.

    Args:
        registry: kind -> "module:Class".
        sizes: the positional arguments of the class; None = not known, so it is not built.
        field_names: what the model gives to a class that asks for the names of the fields.

    Returns:
        Lines that go on after the path of the part: ".num_layers: ..." or ": ...".
    """
    options = {key: value for key, value in given.items() if key != "kind"}
    if not isinstance(given.get("kind"), str):
        found = f"{given['kind']!r} given" if "kind" in given else "missing"
        return [f".kind: {found}; expected one of {', '.join(registry)}, or 'package.module:Class'"]
    try:
        part = resolve(given["kind"], registry)
    except ValueError as error:
        return [f".kind: {error}"]
    problems = _option_problems(part, given["kind"], options)
    if "field_names" in inspect.signature(part).parameters:
        options["field_names"] = field_names
    return problems or ([] if sizes is None else _build_problems(part, sizes, options))


def _option_problems(part: type, kind: str, options: Mapping[str, Any]) -> list[str]:
    parameters = inspect.signature(part).parameters.values()
    keywords = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in OF_THE_MODEL}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    hints = get_type_hints(part.__init__)
    problems = []
    for name, value in options.items():
        if name in keywords and name in hints:
            try:
                _check_type(TypeAdapter(hints[name], config=_CONFIG), value)
            except ValidationError as error:
                problems.append(f".{name}: {error.errors()[0]['msg']}, got {value!r}")
        elif name not in keywords and not open_ended:
            problems.append(f".{name}: {unknown(f'option of {kind}', name, keywords)}")
    required = [p.name for p in keywords.values() if p.default is p.empty and p.name not in options]
    return problems + [f".{name}: missing; {kind} needs it" for name in required]


def _check_type(kind: TypeAdapter, value: Any) -> None:
    """As strict as JSON is, since the part is given the value as it is: a list may be a tuple, but 3.0 is no int."""
    try:
        text = json.dumps(value)
    except TypeError:  # an object, which only Python can give
        kind.validate_python(value)
    else:
        kind.validate_json(text, strict=True)


def _build_problems(part: type, sizes: tuple[Any, ...], options: Mapping[str, Any]) -> list[str]:
    """Sizes that do not fit together, in the words of the part itself; on the meta device nothing is allocated."""
    import torch

    try:
        with torch.device("meta"):
            part(*sizes, **options)
    except (ValueError, TypeError) as error:
        return [f": {error}"]
    return []
