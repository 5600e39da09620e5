"""A frozen pydantic model that reports all its problems at once: each with path, value and nearest valid name."""

from collections.abc import Iterator, Mapping
from typing import Any, LiteralString, cast

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from hmoe_rec.suggest import nearest


class Part(BaseModel):
    """A frozen mapping whose unknown keys are errors that name the nearest valid key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _collect(cls, given: Any, handler: Any) -> Any:
        errors: list[InitErrorDetails] = []
        made = None
        try:
            made = handler(given)
        except ValidationError as invalid:
            errors = [_line(e["loc"], _message(e, cls), e["input"], e["type"]) for e in invalid.errors()]
        if isinstance(given, Mapping):
            errors += [_line(loc, message, value) for loc, message, value in cls._cross_problems(given)]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return made

    @classmethod
    def _cross_problems(cls, given: Mapping[str, Any]) -> Iterator[tuple[tuple, str, Any]]:
        """(path, message, value) of what no single key shows; reads the raw mapping, which may hold anything."""
        return iter(())


def render_problem(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as `ids.0.mode: what is wrong, got value`."""
    place = ".".join(str(x) for x in error["loc"]) or "schema"
    if error["type"] == "missing" or error["input"] is None:
        return f"{place}: {error['msg']}"
    shown = repr(error["input"])
    return f"{place}: {error['msg']}, got {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _line(loc: tuple, message: str, value: Any, kind: str = "schema") -> InitErrorDetails:
    # The message goes in as a value, since braces in it would be taken for a template.
    error = PydanticCustomError(cast(LiteralString, kind), "{text}", {"text": message})
    return InitErrorDetails(type=error, loc=loc, input=value)


def _message(error: Any, cls: type[BaseModel]) -> str:
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        return f"unknown key{hint(error['loc'][0], cls.model_fields)}"
    if error["type"] == "string_pattern_mismatch":
        return "a name has letters, digits, '_' and '-' only (TorchRec stumbles over '.', '@' and '/')"
    return error["msg"]


def hint(name: Any, candidates: Any) -> str:
    candidates = [str(c) for c in candidates]
    found = nearest(str(name), candidates)
    return f"; did you mean {found!r}?" if found else f"; there are: {', '.join(candidates)}"
