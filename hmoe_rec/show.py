"""A resolved configuration -> what a person looks at before training: the file, who learns from what, the sizes."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from hmoe_rec.config import RunConfig
from hmoe_rec.config.encoding import numbers_to_fit
from hmoe_rec.config.parts import OF_THE_MODEL
from hmoe_rec.config.tables import table_names
from hmoe_rec.encoding import part_of_number, part_of_sequence
from hmoe_rec.sharding.constraints import SEPARATOR
from hmoe_rec.suggest import unknown
from hmoe_rec.types import ConfigError, EmbeddingSet, Features, NumberStatistics
from hmoe_rec.units import format_bytes

if TYPE_CHECKING:
    from hmoe_rec.training.checkpoint_tools import CheckpointReport

_VALUE_BYTES = {"fp32": 4, "fp16": 2}
_STATE_BYTES = 4  # optimizer states are fp32


@dataclass(frozen=True)
class SetSize:
    """What the tables of an embedding set hold, with the state of their optimizer."""

    tables: int
    rows: int
    parameters: int
    bytes: int


def set_size(
    s: EmbeddingSet,
    features: Features,
    *,
    precisions: Mapping[str, str] | None = None,
    optimizer: str = "rowwise_adagrad",
) -> SetSize:
    """
    Args:
        precisions: table -> precision; missing = fp32.
        optimizer: rowwise_adagrad keeps one number per row, adagrad one per parameter, sgd none.
    """
    names = table_names([s], features)
    rows = {name: features.id_field(name.removeprefix(f"{s.name}{SEPARATOR}")).num_rows for name in names}
    values = sum(n * _VALUE_BYTES[(precisions or {}).get(name, "fp32")] for name, n in rows.items()) * s.dim
    parameters = sum(rows.values()) * s.dim
    state = {"rowwise_adagrad": sum(rows.values()), "adagrad": parameters, "sgd": 0}[optimizer]
    return SetSize(len(rows), sum(rows.values()), parameters, values + state * _STATE_BYTES)


@dataclass(frozen=True)
class DenseSize:
    """What a part outside the tables costs.

    Attributes:
        parameters: trained ones.
        flops: products and sums of one example's forward pass; None = not stated by the part.
    """

    parameters: int
    flops: int | None


def dense_sizes(config: RunConfig) -> Mapping[str, DenseSize]:
    """Part -> size: experts by name, `encoders`, `gates`, `towers`. Allocates nothing."""
    import torch

    from hmoe_rec.experts.base import Expert
    from hmoe_rec.layers import MLP
    from hmoe_rec.training.build import build_model

    with torch.device("meta"):
        model = build_model(config, table_device=torch.device("meta"))

    def parameters(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    def flops_of_mlps(module: torch.nn.Module) -> int:
        return sum(m.flops for m in module.modules() if isinstance(m, MLP))

    sizes = {
        name: DenseSize(parameters(expert), expert.flops if isinstance(expert, Expert) else None)
        for name, expert in model.experts.experts.items()
    }
    sizes["encoders"] = DenseSize(parameters(model.encoders), None)
    sizes["gates"] = DenseSize(parameters(model.mixture), flops_of_mlps(model.mixture))
    sizes["towers"] = DenseSize(parameters(model.towers), flops_of_mlps(model.towers))
    return sizes


def print_config(config: RunConfig, console: Console | None = None) -> None:
    """The resolved file, the routes, the embedding sets and the dense parts."""
    console = console or Console(highlight=False)
    console.print(Syntax(config.to_yaml().rstrip(), "yaml", background_color="default", word_wrap=True))
    console.rule("routes")
    console.print(config.layout().routing.table(), soft_wrap=True)
    for task, gate in zip(config.tasks, config.layout().routing.gate_inputs, strict=True):
        gated = config.model.combine == "gate" and len(config.layout().routing.reachable(task)) > 1
        seen = {"concat": ", ".join, "sum": " + ".join}[gate.combine](gate.sets)
        console.print(f"gate of {task}: {f'sees {seen}' if gated else 'none'}", style="dim", soft_wrap=True)
    console.rule("sizes")
    console.print(_sets_table(config))
    console.print(_dense_table(config))
    for line in _objective_lines(config):
        console.print(line, soft_wrap=True)
    if waiting := numbers_to_fit(config):
        names = ", ".join(waiting[:3]) + (f" and {len(waiting) - 3} more" if len(waiting) > 3 else "")
        console.print(
            f"statistics of {names} are not fitted yet, so sizes that follow from them may change: a run fits them at "
            "its start, or hmoe-rec data fit does",
            style="dim",
            soft_wrap=True,
        )


def _objective_lines(config: RunConfig) -> Iterator[str]:
    """Sampling and weights of exposures, where there are any."""
    sampling, exposure = config.data.sampling, config.train.exposure
    if sampling.active:
        slices = {f"{sampling.slices.column} = {value}": value for value in sampling.slices.rates}
        for name, value in {**slices, "other rows" if slices else "all rows": None}.items():
            rates = sampling.rates(config.tasks, value)
            offsets = {
                t: "" if sampling.correction == "weights" else f" (offset {-math.log(r):+.3f})"
                for t, r in rates.items()
            }
            shown = ", ".join(f"{task} {rate:g}{offsets[task]}" for task, rate in rates.items())
            yield f"sampling: negatives kept of {name}: {shown}"
        if sampling.probability.column is not None:
            yield f"sampling: rows kept with min(1, {sampling.probability.scale:g} x {sampling.probability.column})"
        what = {"weights": "kept rows weigh 1 / rate", "logit": "offsets are added to the logits in the loss only"}
        yield f"sampling: {what[sampling.correction]}; the model's own predictions are those of all rows"
    if exposure.column is not None:
        tasks = ", ".join(exposure.tasks or config.tasks)
        within = f"column {exposure.column}, within {list(exposure.clip)}"
        yield f"exposures: positives of {tasks} weigh 1 / propensity by {within}"


def _sets_table(config: RunConfig) -> Table:
    optimizer = config.train.embedding_optimizer
    table = Table(title=f"Embedding sets; bytes with the state of {optimizer}", title_justify="left")
    for column in ("set", "owner"):
        table.add_column(column, overflow="fold")
    for column in ("width", "tables", "rows", "parameters", "bytes"):
        table.add_column(column, justify="right")
    sizes, precisions = [], config.table_precisions()
    for s in config.layout().sets:
        size = set_size(s, config.features, precisions=precisions, optimizer=optimizer)
        sizes.append(size)
        table.add_row(
            s.name,
            s.owner or "-",
            str(s.dim),
            str(size.tables),
            f"{size.rows:,}",
            f"{size.parameters:,}",
            format_bytes(size.bytes),
        )
    table.add_section()
    total = [sum(column) for column in zip(*((x.tables, x.rows, x.parameters, x.bytes) for x in sizes), strict=True)]
    table.add_row("all", "", "", str(total[0]), f"{total[1]:,}", f"{total[2]:,}", format_bytes(total[3]))
    return table


def _dense_table(config: RunConfig) -> Table:
    title = "Dense parts; flops: products and sums of one example's forward pass"
    table = Table("part", "kind", "reads", title=title, title_justify="left")
    for column in ("parameters", "flops"):
        table.add_column(column, justify="right")
    sizes = dict(dense_sizes(config))
    everything = list(sizes.values())

    def figures(size: DenseSize) -> tuple[str, str]:
        return f"{size.parameters:,}", "" if size.flops is None else f"{size.flops:,}"

    for expert in config.layout().experts:
        table.add_row(expert.name, expert.kind, expert.set, *figures(sizes.pop(expert.name)))
    table.add_section()
    for part, size in sizes.items():
        table.add_row(part, _kinds_of_encoders(config) if part == "encoders" else "", "", *figures(size))
    table.add_section()
    total = DenseSize(sum(s.parameters for s in everything), sum(s.flops or 0 for s in everything))
    table.add_row("all", "", "", *figures(total))
    return table


def _kinds_of_encoders(config: RunConfig) -> str:
    features, encoding = config.features, config.encoding
    kinds = [part_of_number(n, encoding)["kind"] for n in features.numbers]
    kinds += [part_of_sequence(s, encoding)["kind"] for s in features.sequences]
    kinds += [part["kind"] for part in encoding.similarities.values()]
    return ", ".join(dict.fromkeys(kinds))


def print_statistics(fitted: Mapping[str, NumberStatistics], console: Console | None = None) -> None:
    """What the training data says of each number, in raw values."""
    table = Table(title="Numbers in the training data, raw values", title_justify="left")
    table.add_column("number", overflow="fold")
    for column in ("values", "missing", "least", "0.1 %", "median", "99.9 %", "largest", "whole"):
        table.add_column(column, justify="right")
    for name, s in fitted.items():
        median = s.quantiles[len(s.quantiles) // 2] if s.quantiles else float("nan")
        shown = [f"{x:,.6g}" for x in (s.minimum, s.low, median, s.high, s.maximum)]
        table.add_row(name, f"{s.count:,}", f"{s.missing:,}", *shown, "yes" if s.integral else "no")
    (console or Console(highlight=False)).print(table)


def print_pooling(measured: Mapping[str, float], console: Console | None = None) -> None:
    """Mean ids of an example, the most first; fields that always have one are only counted."""
    console = console or Console(highlight=False)
    table = Table(title="Ids per example in the training data", title_justify="left")
    table.add_column("field", overflow="fold")
    table.add_column("ids", justify="right")
    for name, ids in sorted(measured.items(), key=lambda item: -item[1]):
        if ids != 1:
            table.add_row(name, f"{ids:,.4g}")
    console.print(table)
    console.print(f"always one id: {sum(ids == 1 for ids in measured.values())} other fields", style="dim")


def print_checkpoint(report: "CheckpointReport", console: Console | None = None) -> None:
    """What a checkpoint holds: one line per table, and what is wrong with its files."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    tags = f", tagged {', '.join(report.tags)}" if report.tags else ""
    checked = "checksums compared" if report.verified else "sizes compared; --verify compares checksums"
    console.print(f"{report.uri}: step {report.step:,}{tags}", soft_wrap=True)
    console.print(
        f"written by {report.world_size} processes, {report.files} files, {format_bytes(report.bytes)} ({checked})",
        style="dim",
        soft_wrap=True,
    )
    table = Table(title="Embedding tables", title_justify="left")
    table.add_column("table", overflow="fold")
    for column in ("rows", "width", "type", "bytes", "pieces", "column blocks", "optimizer state"):
        table.add_column(column, justify="right")
    for t in report.tables:
        states = ", ".join(f"{s.name} {format_bytes(s.bytes)}" for s in t.states) or "none"
        blocks = str(t.dim) if len(t.column_blocks) < 2 else " + ".join(map(str, t.column_blocks))
        table.add_row(t.name, f"{t.rows:,}", str(t.dim), t.dtype, format_bytes(t.bytes), str(t.pieces), blocks, states)
    console.print(table)
    dense = sum(x.bytes for x in report.dense)
    console.print(f"dense: {len(report.dense)} tensors, {format_bytes(dense)}; ", end="", style="dim")
    console.print(", ".join(f"{part} {format_bytes(size)}" for part, size in report.parts.items()), style="dim")
    for problem in report.problems:
        console.print(f"damaged: {problem}", style="red", soft_wrap=True, markup=False)


# --------------------------------------------------------------------------------------------------- keys of a run file


def print_keys(section: str | None = None, console: Console | None = None) -> None:
    """Every key of a section with type, default and meaning; all sections where none is named.

    Raises:
        ConfigError: no such section.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    names = [*RunConfig.model_fields, "parts"]
    if section is not None and section not in names:
        raise ConfigError(unknown("section", section, names))
    for name in names if section is None else [section]:
        if name == "parts":
            _print_parts(console)
        else:
            part = RunConfig.model_fields[name].annotation
            console.print(f"{name}:", style="bold", end="")
            console.print(f"  # {RunConfig.model_fields[name].description}", style="dim")
            for key, default, meaning in _keys_of(part):
                console.print(f"  {key}: {default}", end="")
                console.print(f"  # {meaning}", style="dim")


def _keys_of(part: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning), with the keys of nested sections behind a dot."""
    for name, field in part.model_fields.items():
        nested = field.default if hasattr(type(field.default), "model_fields") else None
        if nested is None:
            yield f"{prefix}{name}", _yaml_value(field.default), field.description or ""
        else:
            yield from _keys_of(type(nested), f"{prefix}{name}.")


def _yaml_value(value: Any) -> str:
    if value is None or value == ():
        return "null" if value is None else "[]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_yaml_value(item)}' for key, item in value.items())}}}"
    return str(list(value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _print_parts(console: Console) -> None:
    import inspect

    from hmoe_rec.encoding import NUMBERS, POOLINGS, SIMILARITIES
    from hmoe_rec.experts import EXPERTS
    from hmoe_rec.kinds import resolve
    from hmoe_rec.losses import LOSSES, WEIGHTINGS
    from hmoe_rec.towers import TOWERS

    registries = {
        "experts": EXPERTS,
        "encodings of numbers": NUMBERS,
        "encodings of sequences": POOLINGS,
        "similarities": SIMILARITIES,
        "losses": LOSSES,
        "task weightings": WEIGHTINGS,
        "towers": TOWERS,
    }
    for title, registry in registries.items():
        console.print(f"{title}:", style="bold", end="")
        console.print("  # {kind: ..., option: value}; or kind: package.module:Class, and --allow package", style="dim")
        for kind in registry:
            part = resolve(kind, registry)
            parameters = inspect.signature(part).parameters.values()
            options = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in OF_THE_MODEL]
            meaning = (inspect.getdoc(part) or "").partition("\n")[0]
            values = [(p.name, "..." if p.default is p.empty else _yaml_value(p.default)) for p in options]
            shown = ", ".join([f"kind: {kind}", *(f"{name}: {value}" for name, value in values)])
            console.print(f"  {{{shown}}}", end="", markup=False)
            console.print(f"  # {meaning}", style="dim", markup=False)
