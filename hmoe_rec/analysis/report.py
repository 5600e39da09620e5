"""What an analysis found -> NAME.json, NAME_*.png, and report.html of all analyses in the directory.

An analysis returns a `Section`: numbers for programs, and titles, words, tables and figures for people.
"""

import base64
import io as memory
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any

from hmoe_rec import io
from hmoe_rec.metrics.format import json_safe
from hmoe_rec.sharding.html_page import grid, page, section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110
SMALLEST = 0.55  # of its size, a picture is still readable
OF_RUN = "--"  # between the name of an analysis and that of a run
ORDER = ("all", "fields", "correlation", "collapse", "transfer", "entanglement", "gates", "calibration")


@dataclass(frozen=True)
class ReportTable:
    """Cells are plain text; all but the first `left` columns are figures."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass(frozen=True)
class Plot:
    """A picture: its name within the section, what it shows, and the matplotlib figure.

    The name is part of the file's, in which signs that do not suit one become "-".
    """

    name: str
    caption: str
    figure: "Figure"


@dataclass(frozen=True)
class Section:
    """What one analysis found.

    Attributes:
        name: of the files and of the section: "collapse".
        title: what people read.
        summary: sentences that a person acts on, the most important one first.
        tables, plots: in the order of the page.
        numbers: everything that was computed, for programs: nested dicts and lists of numbers, strings and None.
        source: what it was computed from: run, checkpoint, data, rows.
        warnings: what a reader must not overlook.
    """

    name: str
    title: str
    summary: Sequence[str]
    tables: Sequence[ReportTable] = ()
    plots: Sequence[Plot] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def side_by_side(found: Mapping[str, Section]) -> Section:
    """The sections that one analysis made of several runs, as one: run -> section, one after the other.

    Sentences, captions and file names get the run's name; tables with the same caption and header become one, with a
    column that says the run.
    """
    if len(found) == 1:
        return next(iter(found.values()))
    first = next(iter(found.values()))
    merged: dict[tuple[str, tuple[str, ...]], list[list[str]]] = {}
    left: dict[tuple[str, tuple[str, ...]], int] = {}
    for run, one in found.items():
        for t in one.tables:
            key = (t.caption, tuple(t.header))
            merged.setdefault(key, []).extend([run, *row] for row in t.rows)
            left[key] = t.left + 1
    tables = [
        ReportTable(caption, ["run", *header], rows, left[caption, header])
        for (caption, header), rows in merged.items()
    ]
    plots = [Plot(f"{run}_{p.name}", f"{run}: {p.caption}", p.figure) for run, one in found.items() for p in one.plots]
    warnings: dict[str, list[str]] = {}
    for run, one in found.items():
        for warning in one.warnings:
            warnings.setdefault(warning, []).append(run)
    return Section(
        first.name,
        first.title,
        [f"{run}: {sentence}" for run, one in found.items() for sentence in one.summary],
        tables,
        plots,
        {"runs": {run: one.numbers for run, one in found.items()}},
        {**first.source, "run": list(found), "step": [one.source.get("step") for one in found.values()]},
        [f"{', '.join(runs)}: {warning}" for warning, runs in warnings.items()],
    )


def per_run(found: Section, run: str) -> Section:
    """A section of its own for each of several runs in one directory: "gates--stem"."""
    return replace(found, name=f"{found.name}{OF_RUN}{_file_name(run)}", title=f"{found.title}: {run}")


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=,-]+", "-", name).strip("-")


def new_figure(width: float = 8.0, height: float = 4.5, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """-> (figure, axes) as `matplotlib.pyplot.subplots` gives them, without pyplot's global state. Sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def write_section(found: Section, directory: str) -> list[str]:
    """Writes the section's files and report.html anew, with the sections that are in the directory already.

    Returns:
        The files that were written.
    """
    io.mkdirs(directory)
    files = []
    pictures = []
    for plot in found.plots:
        name = f"{found.name}_{_file_name(plot.name)}.png"
        buffer = memory.BytesIO()
        plot.figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
        io.write_bytes(io.join(directory, name), buffer.getvalue())
        pictures.append({"file": name, "caption": plot.caption})
        files.append(io.join(directory, name))
    content = {
        "version": 1,
        "name": found.name,
        "title": found.title,
        "summary": list(found.summary),
        "warnings": list(found.warnings),
        "source": dict(found.source),
        "tables": [
            {"caption": t.caption, "header": list(t.header), "rows": [list(r) for r in t.rows], "left": t.left}
            for t in found.tables
        ],
        "plots": pictures,
        "numbers": dict(found.numbers),
    }
    io.write_text(io.join(directory, f"{found.name}.json"), json.dumps(json_safe(content), indent=1, allow_nan=False))
    io.write_text(io.join(directory, "report.html"), report_html(directory))
    return [*files, io.join(directory, f"{found.name}.json"), io.join(directory, "report.html")]


def report_html(directory: str) -> str:
    """The page of all sections in a directory; pictures are inside it, so that it works offline."""
    there = [name.removesuffix(".json") for name in io.ls(directory) if name.endswith(".json")]
    sections = []
    for name in (n for kind in ORDER for n in there if n.partition(OF_RUN)[0] == kind):
        with io.open(io.join(directory, f"{name}.json"), "r") as file:
            sections.append(json.load(file))
    if sections and sections[0]["name"] == "all":  # runs in the order in which they were given
        given = [_file_name(o["run"]) for o in sections[0]["numbers"]["outcomes"]]
        kinds = {s["name"]: ORDER.index(s["name"].partition(OF_RUN)[0]) for s in sections}
        runs = {s["name"]: s["name"].partition(OF_RUN)[2] for s in sections}
        known = {name: given.index(run) if run in given else len(given) for name, run in runs.items()}
        sections.sort(key=lambda s: (kinds[s["name"]], known[s["name"]]))
    contents = " · ".join(f'<a href="#{s["name"]}">{escape(s["title"])}</a>' for s in sections)
    described = sections[:1] if sections and sections[0]["name"] == "all" else sections
    subtitle = "; ".join(dict.fromkeys(_source_line(s["source"]) for s in described))
    markup = [f"<nav>{contents}</nav>", *(_section_markup(s, directory) for s in sections)]
    return page("Analysis", subtitle, markup)


def _source_line(source: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_word(value)}" for key, value in source.items())


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(str, value[:3])) + (f" and {len(value) - 3} more" if len(value) > 3 else "")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _section_markup(content: Mapping[str, Any], directory: str) -> str:
    body = [f'<p class="warning">{escape(w)}</p>' for w in content["warnings"]]
    body += [f"<p>{escape(sentence)}</p>" for sentence in content["summary"]]
    for plot in content["plots"]:
        with io.open(io.join(directory, plot["file"]), "rb") as file:
            picture = file.read()
        caption = escape(plot["caption"])
        # On a phone a wide picture is scrolled, not made so small that nobody can read it.
        width = int.from_bytes(picture[16:20], "big")
        style = f"min-width:{round(SMALLEST * width)}px"
        content_of = base64.b64encode(picture).decode()
        image = f'<img alt="{caption}" style="{style}" src="data:image/png;base64,{content_of}">'
        body.append(f'<figure><div class="wide">{image}</div><figcaption>{caption}</figcaption></figure>')
    for t in content["tables"]:
        rows = [[escape(str(cell)) for cell in row] for row in t["rows"]]
        body.append(f"<h3>{escape(t['caption'])}</h3>{grid([escape(h) for h in t['header']], rows, t['left'])}")
    return (
        f'<div id="{escape(content["name"])}">{section(content["title"], _source_line(content["source"]), *body)}</div>'
    )
