"""Runs -> how many directions their embedding tables use, beside random tables of the same shapes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmoe_rec.analysis.opening import data_of, join_names, total_over
from hmoe_rec.analysis.report import Plot, ReportTable, Section, new_figure
from hmoe_rec.analysis.row_counts import row_counts
from hmoe_rec.analysis.spectra import FieldGrams, FieldTables, field_grams, field_tables
from hmoe_rec.config import RunConfig
from hmoe_rec.config.encoding import set_encoders
from hmoe_rec.config.tables import places_of_tables
from hmoe_rec.metrics.spectrum import (
    canonical_correlations,
    effective_rank,
    information_abundance,
    linear_cka,
    participation_ratio,
    random_reference,
    singular_values,
    stable_rank,
)
from hmoe_rec.progress import progress_bar
from hmoe_rec.sharding.process import Process
from hmoe_rec.suggest import listing
from hmoe_rec.training.checkpoint_access import open_checkpoint
from hmoe_rec.training.checkpoint_rows import StoredTensors
from hmoe_rec.training.evaluate import read_run_config
from hmoe_rec.types import CheckpointError

COLORS = ("#1a41e5", "#d0803c", "#6f6103", "#58389e", "#8b305a", "#989396", "#5883ef")
COLLAPSED = 0.25  # a table below this share of a random table's abundance is called collapsed
SHOWN_TABLES = 200
MAX_FIELDS = 60  # of a heat map of sub-embeddings

Counts = Callable[[RunConfig], Mapping[str, Tensor]]


@dataclass(frozen=True)
class TableSpectrum:
    """Attributes: values: singular values, descending. random: abundance of Gaussian tables of this shape."""

    run: str
    embedding_set: str
    field: str
    rows: int
    values: Tensor
    normalized: Tensor
    random: float
    weighted: Tensor | None

    @property
    def dim(self) -> int:
        return len(self.values)

    @property
    def abundance(self) -> float:
        return float(information_abundance(self.values))

    @property
    def is_sound(self) -> bool:
        """It has a spectrum: all its values are finite, and not all of them 0."""
        return math.isfinite(self.abundance)

    @property
    def share(self) -> float:
        """Of a random table's abundance."""
        return self.abundance / self.random

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "set": self.embedding_set,
            "field": self.field,
            "rows": self.rows,
            "dim": self.dim,
            "information_abundance": self.abundance,
            "information_abundance_of_normalized_rows": float(information_abundance(self.normalized)),
            "information_abundance_by_frequency": (
                None if self.weighted is None else float(information_abundance(self.weighted))
            ),
            "random": self.random,
            "effective_rank": float(effective_rank(self.values)),
            "stable_rank": float(stable_rank(self.values)),
            "participation_ratio": float(participation_ratio(self.values)),
            "singular_values": self.values.tolist(),
        }


@dataclass(frozen=True)
class RunSpectra:
    """What a run's checkpoint says."""

    name: str
    step: int
    tables: list[TableSpectrum]
    relations: list[dict[str, Any]] = field(default_factory=list)
    sub_embeddings: dict[str, dict[str, Any]] = field(default_factory=dict)


def spectra_of_run(
    run_dir: str,
    process: Process,
    *,
    name: str | None = None,
    checkpoint: str = "best",
    counts: Counts | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> RunSpectra:
    """Reads a run's tables once, each process its share of the rows; the model is not built.

    Args:
        counts: configuration -> table -> how often its rows occur, for spectra weighted by frequency.
        total: adds up a tensor over all processes.

    Raises:
        ConfigError: not a run directory.
        CheckpointError: no such checkpoint, or one without embedding tables.
    """
    config = read_run_config(run_dir)
    found = open_checkpoint(run_dir, checkpoint)
    stored = StoredTensors(found)
    hashed_apart = {f.name for f in config.features.ids if f.hashed}
    places = places_of_tables(config.layout().sets, config.features)
    fields = field_tables(stored, places, lambda f: f not in hashed_apart)
    if not fields:
        raise CheckpointError(f"{found.uri}: holds no embedding table; give a run of a model that has some")
    name = name or run_dir.rstrip("/").rpartition("/")[2]
    tables, relations, raw = [], [], {}
    known = counts(config) if counts is not None else None
    with progress_bar(f"rows of {name}") as bar:
        grams = field_grams(
            stored,
            fields,
            counts=known,
            rank=process.rank,
            world_size=process.world_size,
            total=total,
            progress=bar if process.rank == 0 else None,
        )
        for f, g in zip(fields, grams, strict=True):
            for embedding_set, table in f.tables.items():
                own = f.columns(embedding_set)
                raw[embedding_set, f.name] = g.raw[own, own]
                tables.append(
                    TableSpectrum(
                        name,
                        embedding_set,
                        f.name,
                        table.rows,
                        singular_values(g.raw[own, own]),
                        singular_values(g.normalized[own, own]),
                        random_reference(table.rows, table.dim),
                        None if g.weighted is None else singular_values(g.weighted[own, own]),
                    )
                )
            relations += _relations(f, g)
    return RunSpectra(name, found.step, tables, relations, _sub_embeddings(config, stored, raw))


def _relations(f: FieldTables, g: FieldGrams) -> list[dict[str, Any]]:
    """Of every two sets: how much of their columns' spaces is the same."""
    names, result = list(f.tables), []
    centered = g.centered(f.rows)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            a, b = f.columns(one), f.columns(other)
            if f.rows <= 2 * (a.stop - a.start + b.stop - b.start) or not centered.isfinite().all():
                continue  # so few rows are spanned by any two tables
            cosines = canonical_correlations(centered[a, a], centered[b, b], centered[a, b])
            result.append(
                {
                    "field": f.name,
                    "rows": f.rows,
                    "sets": [one, other],
                    "cka": float(linear_cka(centered[a, a], centered[b, b], centered[a, b])),
                    "canonical_correlations": cosines.tolist(),
                }
            )
    return result


def _sub_embeddings(
    config: RunConfig, stored: StoredTensors, raw: Mapping[tuple[str, str], Tensor]
) -> dict[str, dict[str, Any]]:
    """Expert -> abundance of E_i seen through the projection towards field (or part) j, from Gram matrices alone.

    DCN V2: E_i W_ji^T of the first cross layer, W_ji its block from field i to field j; GwPFM: the columns of E_i that
    meet part j. Source: arXiv 2310.04400, sub-embeddings of DCN V2 and FFM; GwPFM's are ours, by the same reading.
    """
    layout = config.layout()
    encoders, _ = set_encoders(config.encoding, config.features, layout)
    found: dict[str, dict[str, Any]] = {}
    for spec in layout.experts:
        names = list(encoders[spec.set].field_names) if spec.set in encoders else []
        shown = [(i, n) for i, n in enumerate(names) if (spec.set, n) in raw][:MAX_FIELDS]
        dim = next((s.dim for s in layout.sets if s.name == spec.set), 0)
        rows: list[list[float]] = []
        towards: list[str] = []
        if spec.kind == "dcnv2" and shown and spec.options.get("num_experts", 1) == 1:
            weight = _cross_weight(stored, spec.name)
            if weight is None or weight.shape != (len(names) * dim, len(names) * dim):
                continue
            blocks = weight.double().unflatten(0, (-1, dim)).unflatten(2, (-1, dim))  # [to, dim, from, dim]
            towards = [n for _, n in shown]
            for i, n in shown:
                seen = torch.stack([blocks[j, :, i] @ raw[spec.set, n] @ blocks[j, :, i].T for j, _ in shown])
                rows.append(information_abundance(singular_values(seen)).tolist())
        elif spec.kind == "gwpfm" and shown:
            parts = int(spec.options.get("num_parts", 2))
            width = dim // parts
            towards = [f"part {p}" for p in range(parts)]
            for _, n in shown:
                g = raw[spec.set, n]
                seen = torch.stack([g[p * width : (p + 1) * width, p * width : (p + 1) * width] for p in range(parts)])
                rows.append(information_abundance(singular_values(seen)).tolist())
        if rows:
            own = [float(information_abundance(singular_values(raw[spec.set, n]))) for _, n in shown]
            found[spec.name] = {
                "kind": spec.kind,
                "set": spec.set,
                "fields": [n for _, n in shown],
                "towards": towards,
                "information_abundance": rows,
                "of_the_tables": own,
                "pearson_of_row_means": _pearson(np.mean(rows, 1), np.array(own)),
                "pearson_of_column_means": (
                    _pearson(np.mean(rows, 0), np.array(own)) if len(towards) == len(own) else None
                ),
            }
    return found


def _cross_weight(stored: StoredTensors, expert: str) -> Tensor | None:
    """[F*D, F*D] of the first cross layer, U V^T multiplied out; None where the checkpoint has no such layer."""

    def read(end: str) -> Tensor | None:
        keys = [k for k in stored.forms if k.startswith("model.") and k.endswith(f"experts.{expert}.interaction.{end}")]
        return stored.read(keys[0], (0, 0), tuple(stored.forms[keys[0]].size)) if keys else None

    whole, down, up = read("layers.0.weight"), read("layers.0.0.weight"), read("layers.0.1.weight")
    return whole if down is None or up is None else up.double() @ down.double()


def _pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    if len(x) < 3 or not np.std(x) or not np.std(y):
        return None
    return float(np.corrcoef(x, y)[0, 1])


# ----------------------------------------------------------------------------------------------------------- the report


def analyze_collapse(
    runs: Sequence[str],
    process: Process,
    *,
    weighted: bool = False,
    data: str | None = None,
    rows: int | None = None,
    checkpoint: str = "best",
) -> Section:
    """Of one run, or of several to compare.

    Args:
        weighted: also count rows as often as `data` (each run's own, if None) has them.

    Raises:
        ConfigError, CheckpointError: see `spectra_of_run`.
    """
    total = total_over(process)

    def counts(config: RunConfig) -> Mapping[str, Tensor]:
        return row_counts(config, process, data_of(config, data), rows=rows, total=total)

    known: dict[str, Any] = {"checkpoint": checkpoint, "counts": counts if weighted else None, "total": total}
    found = [spectra_of_run(r, process, name=n, **known) for r, n in zip(runs, join_names(runs), strict=True)]
    return collapse_section(found, weighted=weighted)


def collapse_section(runs: Sequence[RunSpectra], *, weighted: bool = False) -> Section:
    """What `spectra_of_run` found, for people."""
    tables = [t for run in runs for t in run.tables]
    broken = [t for t in tables if not t.is_sound]
    groups = _groups([t for t in tables if t.is_sound] or tables)
    summary = [_of_group(run, name, members) for (run, name), members in groups.items()]
    weak = sorted((t for t in tables if t.share < COLLAPSED and t.rows > t.dim), key=lambda t: t.share)
    summary += [
        f"{_label(t, runs)} uses {t.abundance:.1f} of {t.dim} directions, {t.share:.0%} of what a random table of its "
        "shape has."
        for t in weak[:5]
    ]
    if len(weak) > 5:
        summary.append(f"{len(weak)} of {len(tables)} tables are below {COLLAPSED:.0%} of a random one's abundance.")
    report = [_groups_table(groups, weighted), _tables_table(tables, weighted)]
    plots = [
        Plot(
            "spectrum",
            "Singular values over the largest one, against the share of the width: the line is the median over the "
            "tables with more rows than columns, the band holds half of them. Flat is good.",
            _spectrum_plot(groups),
        ),
        Plot(
            "abundance",
            "Information abundance by table; the mark is a random table of the same shape. The largest tables.",
            _abundance_plot(groups),
        ),
    ]
    for run in runs:
        if run.relations:
            report.append(_relations_table(run, runs))
        for expert, content in run.sub_embeddings.items():
            prefix = f"{run.name}_" if len(runs) > 1 else ""
            plots.append(Plot(f"sub_{prefix}{expert}", _sub_caption(run, expert, content), _heat_map(content)))
    numbers = {
        "tables": [t.to_dict() for t in tables],
        "relations": {run.name: run.relations for run in runs},
        "sub_embeddings": {run.name: run.sub_embeddings for run in runs},
    }
    source = {"run": [run.name for run in runs], "step": [run.step for run in runs]}
    warnings = [
        f"No spectrum and in no mean, for holding NaN, infinities or nothing but zeros: "
        f"{listing([_label(t, runs) for t in broken])}."
    ]
    return Section(
        "collapse", "Dimensional collapse", summary, report, plots, numbers, source, warnings if broken else ()
    )


def _groups(tables: Sequence[TableSpectrum]) -> dict[tuple[str, str], list[TableSpectrum]]:
    """(run, set) -> its tables."""
    groups: dict[tuple[str, str], list[TableSpectrum]] = {}
    for t in tables:
        groups.setdefault((t.run, t.embedding_set), []).append(t)
    return groups


def _means(members: Sequence[TableSpectrum]) -> dict[str, float]:
    """Over the tables that have more rows than columns; over all where there are none."""
    large = [t for t in members if t.rows > t.dim] or list(members)

    def mean(of: Callable[[TableSpectrum], float]) -> float:
        return math.fsum(map(of, large)) / len(large)

    return {
        "abundance": mean(lambda t: t.abundance),
        "share_of_width": mean(lambda t: t.abundance / t.dim),
        "share_of_random": mean(lambda t: t.share),
        "normalized": mean(lambda t: float(information_abundance(t.normalized))),
        "weighted": mean(lambda t: float("nan") if t.weighted is None else float(information_abundance(t.weighted))),
        "effective_rank": mean(lambda t: float(effective_rank(t.values))),
        "stable_rank": mean(lambda t: float(stable_rank(t.values))),
        "participation_ratio": mean(lambda t: float(participation_ratio(t.values))),
        "random": mean(lambda t: t.random),
        "tables": float(len(large)),
    }


def _of_group(run: str, name: str, members: Sequence[TableSpectrum]) -> str:
    m = _means(members)
    return (
        f"{run}, {name or 'tables'} ({members[0].dim} wide): information abundance {m['abundance']:.1f} on average, "
        f"{m['share_of_width']:.0%} of the width and {m['share_of_random']:.0%} of random tables."
    )


def _groups_table(groups: Mapping[tuple[str, str], Sequence[TableSpectrum]], weighted: bool) -> ReportTable:
    header = ["run", "set", "tables", "width", "abundance", "of the width", "of random", "rows normalized"]
    header += ["by frequency"] if weighted else []
    header += ["effective rank", "stable rank", "participation"]
    rows = []
    for (run, name), members in groups.items():
        m = _means(members)
        cells = [f"{m[k]:.2f}" for k in ("effective_rank", "stable_rank", "participation_ratio")]
        middle = [f"{m['weighted']:.2f}"] if weighted else []
        figures = [f"{m['abundance']:.2f}", f"{m['share_of_width']:.0%}", f"{m['share_of_random']:.0%}"]
        first = [run, name, f"{m['tables']:.0f}", str(members[0].dim)]
        rows.append([*first, *figures, f"{m['normalized']:.2f}", *middle, *cells])
    return ReportTable("Means over tables with more rows than columns", header, rows, left=2)


def _tables_table(tables: Sequence[TableSpectrum], weighted: bool) -> ReportTable:
    header = ["run", "set", "field", "rows", "width", "abundance", "random", "of random", "rows normalized"]
    header += ["by frequency"] if weighted else []
    rows = []
    for t in sorted(tables, key=lambda t: t.rows, reverse=True)[:SHOWN_TABLES]:
        middle = [f"{float(information_abundance(t.weighted)):.2f}"] if t.weighted is not None else []
        figures = [f"{t.rows:,}", str(t.dim), f"{t.abundance:.2f}", f"{t.random:.2f}", f"{t.share:.0%}"]
        normalized = f"{float(information_abundance(t.normalized)):.2f}"
        rows.append([t.run, t.embedding_set, t.field, *figures, normalized, *middle])
    caption = "Tables, the largest first" + (
        f" ({SHOWN_TABLES} of {len(tables)})" if len(tables) > SHOWN_TABLES else ""
    )
    return ReportTable(caption, header, rows, left=3)


def _relations_table(run: RunSpectra, runs: Sequence[RunSpectra]) -> ReportTable:
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in run.relations:
        one, other = sorted(r["sets"])  # a checkpoint may have the tables of one field in another order
        pairs.setdefault((one, other), []).append(r)
    rows = []
    for (one, other), found in pairs.items():
        cosines = [float(np.mean(r["canonical_correlations"])) for r in found if r["canonical_correlations"]]
        cka = [r["cka"] for r in found]
        rows.append([one, other, str(len(found)), f"{np.mean(cka):.3f}", f"{np.mean(cosines):.3f}"])
    where = f"{run.name}: " if len(runs) > 1 else ""
    caption = f"{where}sets among themselves (CKA 1 = the same up to rotation; cosine of principal angles, mean)"
    return ReportTable(caption, ["set", "and set", "tables", "CKA", "mean cosine"], rows, left=2)


def _label(t: TableSpectrum, runs: Sequence[RunSpectra]) -> str:
    name = f"{t.embedding_set}__{t.field}" if t.embedding_set else t.field
    return f"{t.run}: {name}" if len(runs) > 1 else name


def _spectrum_plot(groups: Mapping[tuple[str, str], Sequence[TableSpectrum]]) -> Any:
    figure, axis = new_figure(7.5, 4.5)
    for g, ((run, name), members) in enumerate(groups.items()):
        large = [t for t in members if t.rows > t.dim and t.is_sound]
        if not large:
            continue
        curves = torch.stack([t.values / t.values[0] for t in large]).clamp(min=1e-8)
        x = (np.arange(curves.shape[1]) + 1) / curves.shape[1]
        low, middle, high = (curves.quantile(q, dim=0).numpy() for q in (0.25, 0.5, 0.75))
        color = COLORS[g % len(COLORS)]
        axis.plot(x, middle, color=color, label=f"{run} {name}".strip(), linestyle="-" if g < len(COLORS) else "--")
        axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    axis.set(yscale="log", xlabel="k / width", ylabel="s_k / s_1", xlim=(0, 1))
    axis.legend(fontsize=8, ncols=1 + len(groups) // 9)
    return figure


def _abundance_plot(groups: Mapping[tuple[str, str], Sequence[TableSpectrum]]) -> Any:
    fields: dict[str, int] = {}
    for members in groups.values():
        for t in members:
            fields[t.field] = max(fields.get(t.field, 0), t.rows)
    shown = sorted(fields, key=lambda f: fields[f], reverse=True)[: max(6, min(24, 96 // len(groups)))]
    figure, axis = new_figure(min(12.0, max(6.0, 0.42 * len(shown) * len(groups) ** 0.5)), 4.5 + 0.05 * len(groups))
    step = 0.8 / len(groups)
    for g, ((run, name), members) in enumerate(groups.items()):
        of = {t.field: t for t in members}
        x = [i for i, f in enumerate(shown) if f in of]
        places = [i - 0.4 + step * (g + 0.5) for i in x]
        color = COLORS[g % len(COLORS)]
        heights = [of[shown[i]].abundance for i in x]
        axis.bar(places, heights, 0.9 * step, color=color, label=f"{run} {name}".strip())
        marks = [of[shown[i]].random for i in x]
        axis.scatter(places, marks, marker="_", s=90 * step + 10, color="#16191d", linewidths=1.2, zorder=3)
    axis.set_xticks(range(len(shown)), [f"{f}\n{fields[f]:,} rows" for f in shown], rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="information abundance")
    figure.legend(fontsize=7, loc="outside lower center", ncols=min(6, len(groups)))
    return figure


def _sub_caption(run: RunSpectra, expert: str, content: Mapping[str, Any]) -> str:
    what = "seen by the first cross layer towards field j" if content["kind"] == "dcnv2" else "its columns for part j"
    text = f"{run.name}, expert {expert} ({content['kind']}, {content['set']}): abundance of table i, {what}."
    if content["pearson_of_row_means"] is not None:
        text += f" Row means correlate {content['pearson_of_row_means']:.2f} with the tables' own abundance"
        if content["pearson_of_column_means"] is not None:
            text += f", column means {content['pearson_of_column_means']:.2f}"
        text += "; theory expects both to be positive." if content["kind"] == "dcnv2" else "."
    return text


def _heat_map(content: Mapping[str, Any]) -> Any:
    values = np.array(content["information_abundance"])
    figure, axis = new_figure(2.5 + 0.28 * values.shape[1], 1.8 + 0.24 * values.shape[0])
    image = axis.imshow(values, aspect="auto", cmap="viridis")
    axis.set_yticks(range(len(content["fields"])), content["fields"], fontsize=7)
    axis.set_xticks(range(len(content["towards"])), content["towards"], fontsize=7, rotation=90)
    axis.set(xlabel="towards", ylabel="table")
    figure.colorbar(image, ax=axis, label="information abundance")
    return figure
