"""YAML text and `key.path=value` overrides -> nested dicts and lists; and back to YAML that a person likes to read.

Differs from plain `yaml.safe_load` in two points that cost people an evening: a key that is given twice is an error,
and `1e-3` is a number.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from hmoe_rec import io
from hmoe_rec.suggest import did_you_mean
from hmoe_rec.types import ConfigError

_LINE = 108  # a mapping or list that fits on such a line is written on one


_MERGE = "tag:yaml.org,2002:merge"  # the key "<<"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the floats of YAML 1.2; duplicate keys are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool | None):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key '{key}' is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts the keys of `<<: *anchor` and `<<: [*first, *second]` into the mapping: its own win, then the first's.

        Ours, since PyYAML 6.0.4 takes keys for the same where their texts are one Python object: a key that the mapping
        behind the anchor had overridden got its old value again, and of a list the last mapping won.
        """
        merged: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag != _MERGE:
                continue
            sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for source in reversed(sources):
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(
                        None, None, "'<<' takes a mapping or a list of mappings", node.start_mark
                    )
                self.flatten_mapping(source)
                merged |= _by_key(source)
        node.value = list((merged | _by_key(node)).values())


def _by_key(node: yaml.MappingNode) -> dict[Any, tuple[yaml.Node, yaml.Node]]:
    """A mapping's pairs by their keys, which are scalars or else stand for themselves; without the key `<<`."""
    return {
        (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key): (key, value)
        for key, value in node.value
        if key.tag != _MERGE
    }


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that `_Loader` would take for a float."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse_yaml(text: str, where: str) -> Any:
    """
    Raises:
        ConfigError: not YAML, or a key that is given twice; says the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}{line}: {error.problem or 'not YAML'}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from None


def read_yaml(uri: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; {} for an empty file.

    Raises:
        ConfigError: no such file, not readable, or no mapping.
    """
    try:
        with io.open(uri, "r") as file:
            text = file.read()
    except FileNotFoundError:
        raise ConfigError(f"{uri}: no such file{did_you_mean(uri, _files_beside(uri))}") from None
    except IsADirectoryError:
        raise ConfigError(f"{uri}: is a directory; expected a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{uri}: not a text file; expected YAML") from None
    except OSError as error:
        raise ConfigError(f"{uri}: cannot be read: {error.strerror or error}") from None
    content = parse_yaml(text, uri)
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{uri}: holds a {type(content).__name__}; expected a mapping such as 'train: {{seed: 1}}'")
    return content or {}


def apply_overrides(content: Any, overrides: Iterable[str]) -> list[str]:
    """Sets `key.path=value` pairs in nested dicts and lists, in place; values are YAML. -> problems, one line each.

    Dicts on the way are made where missing; a number is the position in a list: `model.expert.0.kind=dcnv2`. Whether a
    key exists is not known here: the check of the whole tells.
    """
    return [problem for override in overrides if (problem := _apply(content, override))]


def _apply(content: Any, override: str) -> str | None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return f"override '{override}': expected key.path=value, such as train.seed=2"
    try:
        value = parse_yaml(text, f"override '{override}'")
    except ConfigError as error:
        return str(error)
    target = content
    for depth, key in enumerate(keys):
        done = ".".join(keys[:depth]) or "the run file"
        if isinstance(target, list):
            if not key.isdecimal() or int(key) >= len(target):
                last = len(target) - 1
                return f"override '{override}': {done} is a list; expected a position from 0 to {last}, not '{key}'"
        elif not isinstance(target, dict):
            return f"override '{override}': {done} is {target!r}, which has no key '{key}'"
        place: Any = int(key) if isinstance(target, list) else key
        if depth == len(keys) - 1:
            target[place] = value
        else:
            if isinstance(target, dict) and target.get(place) is None:
                target[place] = {}
            target = target[place]
    return None


def to_yaml(content: Mapping[str, Any]) -> str:
    """Block style for what is long, one line for what is short; an empty line between sections."""
    return "\n".join("\n".join(_lines(key, value, 0, False)) + "\n" for key, value in content.items())


def _lines(key: str, value: Any, depth: int, may_be_flow: bool = True) -> list[str]:
    pad, flow = "  " * depth, _flow(value)
    head = f"{pad}{_flow(key)}:"
    if not isinstance(value, Mapping | list | tuple) or not value or (may_be_flow and len(head) + len(flow) < _LINE):
        return [f"{head} {flow}"]
    if not isinstance(value, Mapping):
        return [head] + [f"{pad}  - {_flow(item)}" for item in value]
    if may_be_flow and not any(isinstance(item, Mapping | list | tuple) for item in value.values()):
        return _filled(f"{head} {{", [f"{_flow(k)}: {_flow(v)}" for k, v in value.items()], len(pad) + 4)
    return [head] + [line for k, v in value.items() for line in _lines(k, v, depth + 1)]


def _filled(head: str, items: list[str], indent: int) -> list[str]:
    """A flow mapping that takes several lines."""
    lines = [head]
    for item in items:
        if len(lines[-1]) + len(item) > _LINE:
            lines.append(" " * indent)
        lines[-1] += f"{item}, "
    return [line.rstrip() for line in lines[:-1]] + [lines[-1].removesuffix(", ") + "}"]


def _flow(value: Any) -> str:
    options: dict[str, Any] = dict(default_flow_style=True, sort_keys=False, width=10**9, allow_unicode=True)
    text = yaml.dump(value, Dumper=_Dumper, **options)
    return text.removesuffix("\n").removesuffix("\n...")


def _files_beside(uri: str) -> list[str]:
    folder = uri.rpartition("/")[0]
    try:
        return [f"{folder}/{name}" if folder else name for name in io.ls(folder or ".")]
    except (OSError, ValueError):  # the folder is missing too: no suggestion then
        return []
