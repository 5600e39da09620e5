"""What a study found -> NAME.json, NAME_*.png and NAME.md in a folder, and its tables on the screen."""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hmoe_rec.analysis.report import DPI, ReportTable, Section
from hmoe_rec.metrics.format import json_safe


def write_findings(found: Section, out: Path) -> None:
    """The section's files, with the command that made them; prints what the Markdown says."""
    out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", *sys.argv])
    lines = [f"# {found.title}", "", f"`{command}`", "", *(f"- {sentence}" for sentence in found.summary)]
    for table in found.tables:
        lines += ["", f"{table.caption}:", "", *markdown(table)]
    for plot in found.plots:
        file = f"{found.name}_{plot.name}.png"
        plot.figure.savefig(out / file, dpi=DPI, facecolor="white")
        lines += ["", f"![{plot.caption}]({file})", "", plot.caption]
    content = {"command": command, "source": dict(found.source), "numbers": dict(found.numbers)}
    (out / f"{found.name}.json").write_text(json.dumps(json_safe(content), indent=1, allow_nan=False) + "\n")
    (out / f"{found.name}.md").write_text("\n".join(lines) + "\n")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print("\n".join(lines))
    console.print(f"files: {out}/{found.name}.*")


def markdown(table: ReportTable) -> list[str]:
    rule = ["---" if k < table.left else "---:" for k in range(len(table.header))]
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (table.header, rule, *table.rows)]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
