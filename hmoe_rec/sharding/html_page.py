"""What pages of reports share: the frame, its style, tables, and stacked bars. A page needs nothing but a browser.

Bars are plain boxes with heights in percent; nothing is loaded from anywhere.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


def page(title: str, subtitle: str, sections: Iterable[str], *, data: Any = None, script: str = "") -> str:
    """A whole page, to be written to a file.

    Args:
        title, subtitle: plain text.
        sections: markup; empty ones are left out.
        data: JSON-able, without infinities (`finite`), for the script, which finds it as the text of #data.
        script: runs at the end of the page.
    """
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        subtitle=escape(subtitle),
        sections="\n".join(filter(None, sections)),
        data=content,
        script=script,
    )


def section(title: str, explanation: str, *body: str) -> str:
    """Title and explanation are plain text, the body is markup."""
    about = f'<p class="about">{escape(explanation)}</p>' if explanation else ""
    return f"<section><h2>{escape(title)}</h2>{about}{''.join(body)}</section>"


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table. Cells are markup; all but the first `left` columns are figures."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(f"<{tag}{'' if i < left else ' class=n'}>{cell}</{tag}>" for i, cell in enumerate(cells))

    body = "".join(f"<tr>{line('td', cells)}</tr>" for cells in rows)
    return f'<div class="wide"><table><thead><tr>{line("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'


def cards(entries: Iterable[tuple[str, str, str, bool]]) -> str:
    """The few figures that matter: (name, value, detail, whether it is bad) in plain text."""
    boxes = (
        f'<div class="card{" bad" if bad else ""}"><span>{escape(name)}</span><strong>{escape(value)}</strong>'
        f"<span>{escape(detail)}</span></div>"
        for name, value, detail, bad in entries
    )
    return f'<div class="cards">{"".join(boxes)}</div>'


def swatch(color: int, name: str) -> str:
    """A colored square and its name; colors are numbers 0 to 6."""
    return f'<span class="key"><i class="c{color}"></i>{escape(name)}</span>'


def legend(colors: Mapping[str, int], line: str = "") -> str:
    keys = "".join(swatch(color, name) for name, color in colors.items())
    dashes = f'<span class="key"><i class="dashes"></i>{escape(line)}</span>' if line else ""
    return f'<p class="legend">{keys}{dashes}</p>'


def finite(value: float | None) -> float | None:
    """JSON knows no infinity; six digits are more than an estimate has."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


@dataclass(frozen=True)
class Stack:
    """One bar of a chart.

    Attributes:
        label: below it.
        hint: shown where the mouse rests.
        parts: from the bottom up, one for each color of the chart.
        notch: height of a mark; None = no mark.
    """

    label: str
    hint: str
    parts: tuple[float, ...]
    notch: float | None = None

    @property
    def total(self) -> float:
        return sum(self.parts)


def chart(
    title: str,
    stacks: Sequence[Stack],
    colors: Mapping[str, int],
    text: Callable[[float], str],
    *,
    axis: str,
    figures: str,
    line: tuple[str, float] | None = None,
    unit: float = 1.0,
    remark: str = "",
) -> str:
    """Stacked bars, and their figures to unfold.

    Args:
        colors: name of a part -> color 0 to 6.
        text: a height in words.
        axis: what the labels below the bars are.
        figures: markup to unfold, such as a `grid`; "" = none.
        line: a dashed line's name and height.
        unit: marks at the side are round multiples of it.
    """
    highest = max(stack.total for stack in stacks)
    within = line is not None and line[1] <= 4 * highest  # else the bars would be too flat to read
    top = 1.08 * max(highest, line[1] if line and within else 0.0) or 1.0
    marks = "".join(
        f'<div class="tick" style="bottom:{100 * tick / top:.2f}%"><span>{escape(text(tick))}</span></div>'
        for tick in _ticks(top, unit)
    )
    if line and within:
        marks += f'<div class="limit" style="bottom:{100 * line[1] / top:.2f}%"></div>'
    columns = "".join(_column(stack, top, tuple(colors.values())) for stack in stacks)
    under = "".join(f"<span>{escape(stack.label)}</span>" for stack in stacks)
    about = f"{title}: {len(stacks)} stacked bars, the highest {text(highest)}; figures in the table below"
    remarks = [f"The {line[0]} is above the chart."] if line and not within else []
    remarks += [remark] if remark else []
    unfold = f"<details><summary>Figures of the bars</summary>{figures}</details>" if figures else ""
    return (
        f"{legend(colors, line[0] if line and within else '')}"
        f'<div class="chart" role="img" aria-label="{escape(about)}"><div class="plot">{marks}'
        f'<div class="bars{" many" if len(stacks) > 24 else ""}">{columns}</div></div>'
        f'<div class="under"><b>{escape(axis)}</b>{under}</div></div><p class="about">{escape(" ".join(remarks))}</p>'
        f"{unfold}"
    )


def _ticks(top: float, unit: float) -> list[float]:
    """Three to five round values up to `top`, in multiples of the unit."""
    raw = top / unit / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    return [i * step * unit for i in range(1, math.floor(top / unit / step + 1e-9) + 1)]


def _column(stack: Stack, top: float, colors: Sequence[int]) -> str:
    parts = [(color, part) for color, part in zip(colors, stack.parts, strict=True) if part > 0]
    pieces = "".join(f'<i class="c{color}" style="height:{100 * x / top:.2f}%"></i>' for color, x in parts)
    notch = "" if stack.notch is None else f'<b style="bottom:{100 * stack.notch / top:.2f}%"></b>'
    return f'<div title="{escape(stack.hint)}">{pieces}{notch}</div>'


_STYLE = """
:root {
  color-scheme: light dark;
  --back: #fff; --soft: #f3f4f6; --edge: #d5d9df; --text: #16191d; --dim: #5a626d; --bad: #b3261e; --link: #1f5fa8;
  --c0: #1a41e5; --c1: #989396; --c2: #6f6103; --c3: #5883ef; --c4: #58389e; --c5: #d0803c; --c6: #8b305a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171b; --soft: #1e2329; --edge: #39414b; --text: #e8eaed; --dim: #a0a8b3; --bad: #ff8a80; --link: #8ab8f0;
    --c0: #5a62db; --c1: #b99d9c; --c2: #6f7414; --c3: #bdcef5; --c4: #6c8cf3; --c5: #f7af77; --c6: #c35182;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
h3 { font-size: 1rem; margin: .4rem 0; }
section { margin: 2rem 0; }
.about { color: var(--dim); margin: .3rem 0 .7rem; }
.about:empty { display: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.card { background: var(--soft); border: 1px solid var(--edge); border-radius: 8px; padding: .7rem .9rem; }
.card span { display: block; color: var(--dim); font-size: .85rem; }
.card strong { display: block; font-size: 1.35rem; }
.card.bad { border-color: var(--bad); }
.card.bad strong, .card.bad span { color: var(--bad); }
.notes { background: var(--soft); border-left: 4px solid var(--link); padding: .7rem 1rem; }
.notes ul { margin: 0; padding-left: 1.2rem; }
.notes li { overflow-wrap: anywhere; }
.warning { border-left: 4px solid var(--bad); padding: .3rem .8rem; }
nav { margin: .8rem 0; }
a { color: var(--link); }
figure { margin: 1rem 0; background: #fff; color: #16191d; border: 1px solid var(--edge); border-radius: 8px;
  padding: .6rem; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .85rem; margin-top: .3rem; }

.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .3rem 0; font-size: .85rem; }
.key { display: inline-flex; align-items: center; gap: .4rem; }
.key i { width: .8rem; height: .8rem; border-radius: 2px; flex: none; }
.c0 { background: var(--c0); } .c1 { background: var(--c1); } .c2 { background: var(--c2); }
.c3 { background: var(--c3); } .c4 { background: var(--c4); } .c5 { background: var(--c5); }
.c6 { background: var(--c6); }
.chart { padding: .6rem 0 0 4.6rem; }
.plot { position: relative; height: 15rem; border-bottom: 1px solid var(--dim); }
.tick { position: absolute; left: 0; right: 0; border-top: 1px solid var(--edge); }
.tick span { position: absolute; right: 100%; top: -.75em; padding-right: .5rem; font-size: .8rem; color: var(--dim);
  white-space: nowrap; }
.limit { position: absolute; left: 0; right: 0; border-top: 2px dashed var(--text); z-index: 2; pointer-events: none; }
.key .dashes { width: 1.4rem; height: 0; border-top: 2px dashed var(--text); border-radius: 0; }
.bars { position: absolute; inset: 0; display: flex; gap: 4px; padding: 0 3px; }
.bars.many { gap: 1px; }
.bars > div { position: relative; flex: 1 1 0; min-width: 0; display: flex; flex-direction: column-reverse; }
.bars > div:hover { outline: 1px solid var(--text); }
.bars i { flex: none; display: block; border-top: 1px solid var(--back); }
.bars b { position: absolute; left: 0; right: 0; height: 2px; background: var(--text); }
.under { position: relative; display: flex; gap: 1px; padding: 0 3px; height: 1.3em; font-size: .8rem;
  color: var(--dim); }
.under b { position: absolute; right: 100%; padding-right: .5rem; font-weight: normal; }
.under span { flex: 1 1 0; width: 0; display: flex; justify-content: center; white-space: nowrap; }
.stack { display: flex; width: 9rem; height: .9rem; margin-top: .2rem; background: var(--soft); }
.stack i { display: block; border-right: 1px solid var(--back); }

.wide { overflow-x: auto; }
.wide + h3 { margin-top: 1.4rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .9rem .28rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--edge); }
th { color: var(--dim); font-weight: 600; vertical-align: bottom; }
.n { text-align: right; }
td.n { white-space: nowrap; }
details { margin: .4rem 0 1rem; }
summary { cursor: pointer; color: var(--link); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0 2rem; }
.pair td:last-child { overflow-wrap: anywhere; }

.filters { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .6rem 0; }
input, select, button { font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--edge);
  border-radius: 6px; padding: .35rem .6rem; max-width: 100%; min-width: 0; }
input { flex: 1 1 14rem; }
select { flex: 0 1 12rem; }
button { cursor: pointer; }
#found { color: var(--dim); font-size: .88rem; }
#tables { width: 100%; }
#tables button { all: unset; cursor: pointer; color: var(--link); overflow-wrap: anywhere; }
#tables th button { color: inherit; overflow-wrap: normal; }
#tables button:focus-visible { outline: 2px solid var(--link); }
#tables td:first-child { min-width: 8rem; }
#tables .more > td { background: var(--soft); padding: .6rem .8rem 1rem; }
.more p { margin: .2rem 0; overflow-wrap: anywhere; }
.more table { margin-top: .5rem; }
.more .reason td { color: var(--dim); padding-top: 0; }
.more tr:has(+ .reason) td { border-bottom: 0; }
.meter { display: block; height: 3px; background: var(--c0); margin-left: auto; }
@media (max-width: 640px) {
  body { padding: .7rem; }
  .optional { display: none; }
  .chart { padding-left: 4.1rem; }
  .plot { height: 12rem; }
  th, td { padding-right: .6rem; }
  table { font-size: .8rem; }
  .n { padding-right: .4rem; }
  th.n { min-width: 3.2rem; }
  #tables { table-layout: fixed; overflow-wrap: anywhere; }
  #tables th:nth-child(6), #tables th:nth-child(7) { width: 20%; }
  #tables td:first-child { min-width: 0; }
  .more table { width: 100%; }
}
@media print { body { max-width: none; } .filters, #more { display: none; } }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body>
<header><h1>{title}</h1><p class="about">{subtitle}</p></header>
<main>
{sections}
</main>
<script type="application/json" id="data">{data}</script><script>{script}</script></body></html>
"""
