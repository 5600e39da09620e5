"""The data section of a run -> files and their schema; a synthetic log is made on the way if it is not there yet."""

import fcntl
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmoe_rec.config.file import apply_overrides
from hmoe_rec.data.schema import Schema
from hmoe_rec.progress import progress_bar
from hmoe_rec.suggest import unknown
from hmoe_rec.types import ConfigError, DataError, NumberStatistics

if TYPE_CHECKING:
    from hmoe_rec.config.run import RunConfig

SYNTHETIC_DIR = "data/synthetic"


@dataclass(frozen=True)
class ResolvedData:
    """What a run reads.

    Attributes:
        train, validation, test: files, directories, globs or URIs; empty where there is none.
        truth: of a synthetic log, split -> task -> figures of the true probabilities such as "auc"; else None.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    schema: Schema
    truth: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None


def prepare_data(config: "RunConfig", *, progress: bool = False) -> ResolvedData:
    """Any number of processes may call it at once: one makes the synthetic log, the others wait for it and find it.

    Args:
        progress: show a bar on the terminal while a log is made.

    Raises:
        DataError: the synthetic log cannot be written.
    """
    data, schema = config.data, config.schema_of_data
    if data.synthetic is None:
        return ResolvedData(data.train, data.validation, data.test, schema)
    from hmoe_rec.data import synthetic

    arguments, directory = _arguments(data.synthetic), synthetic_dir(data.synthetic)
    with _one_at_a_time(directory):
        log = synthetic.open_synthetic(directory)
        if log is None:
            with progress_bar("synthetic log") if progress else nullcontext() as report:
                log = synthetic.ensure_synthetic(directory, **arguments, progress=report)
    return ResolvedData((log.train,), (log.validation,), (log.test,), schema, log.truth["bayes"])


def statistics_of(given: Mapping[str, Any] | str | None) -> Mapping[str, NumberStatistics]:
    """`data.statistics` of a resolved run -> number -> its statistics; {} where nothing is fitted yet.

    Raises:
        SchemaError: not what `hmoe-rec data fit` writes.
    """
    if not given:
        return {}
    from hmoe_rec.data.statistics import from_dict

    assert not isinstance(given, str), "a resolved configuration holds the statistics themselves"
    return from_dict(given)


def synthetic_dir(given: Mapping[str, Any]) -> Path:
    """A directory below `dir` that belongs to these arguments alone, so that another run's log stays as it is."""
    arguments = _arguments(given)
    key = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:8]
    return Path(given.get("dir", SYNTHETIC_DIR)) / f"log-{key}"


def synthetic_schema(given: Mapping[str, Any]) -> Schema:
    """The schema of the log that `data.synthetic` describes; nothing is written.

    Raises:
        ConfigError: unknown arguments, wrong types and values out of their range, one a line with its path.
    """
    from hmoe_rec.data.synthetic_rows import schema_of
    from hmoe_rec.data.synthetic_world import SyntheticArguments

    problems = _argument_problems(given)
    if problems:
        raise ConfigError("\n".join(f"data.synthetic.{problem}" for problem in problems))
    contents = {key: value for key, value in _arguments(given).items() if key != "row_group_rows"}
    contents["effects"] = contents.get("effects") or {}
    try:
        return schema_of(SyntheticArguments(**contents))
    except ConfigError as error:
        raise ConfigError(f"data.synthetic: {error}") from None


def parse_synthetic(pairs: Iterable[str]) -> dict[str, Any]:
    """`rows=20000`, ... -> keyword arguments of the synthetic log; values are YAML.

    Raises:
        ConfigError: every pair that is not key=value, unknown key and wrong type, one a line.
    """
    given: dict[str, Any] = {}
    problems = apply_overrides(given, pairs)
    problems += _argument_problems(given)
    if "dir" in given:
        problems.append("dir: give the directory with --out")
    if problems:
        raise ConfigError("\n  ".join(["synthetic log:", *problems]))
    return _arguments(given)


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without the directory, and 1e6 rows as the int that they are."""
    types = _types()
    return {
        key: _converted(value, types[key]) if isinstance(value, float | str) else value
        for key, value in given.items()
        if key != "dir"
    }


def _types() -> dict[str, Any]:
    """Argument -> type."""
    from hmoe_rec.data.synthetic import synthesize

    parameters = inspect.signature(synthesize).parameters.values()
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "progress"]
    return {"dir": str} | {p.name: p.annotation for p in keywords}


def _converted(value: Any, kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind).validate_python(value, strict=False)


def _argument_problems(given: Mapping[str, Any]) -> list[str]:
    from pydantic import ValidationError

    types = _types()
    problems = []
    for name, value in given.items():
        if name not in types:
            problems.append(f"{name}: {unknown('key', name, types)}")
            continue
        try:
            _converted(value, types[name])
        except ValidationError as error:
            problems.append(f"{name}: {error.errors()[0]['msg']}, got {value!r}")
    return problems


class _one_at_a_time:
    """Holds a lock beside the directory, so that of many processes the first makes the log and the others find it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory.parent / f".{directory.name}.wait"

    def __enter__(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "w")
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"{self.path.parent}: cannot be written ({reason}); set data.synthetic.dir") from None
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self.file.close()
