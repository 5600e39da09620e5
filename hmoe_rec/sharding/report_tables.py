"""The tables of a plan -> data and a script for the report's page, which shows, sorts and filters them.

They travel as JSON, since thousands of tables as markup would make the page slow.
"""

from collections.abc import Sequence
from typing import Any

from hmoe_rec.sharding.figures import NO_SET, SENT, best_alternative, check, format_ranks, part_name
from hmoe_rec.sharding.html_page import finite
from hmoe_rec.sharding.prediction import EXCHANGES, PARTS, Alternative, PlanPrediction, TablePrediction

MAX_ALTERNATIVES = 40_000  # on the page: with more it would grow beyond a few megabytes


class _Words:
    """Texts that repeat thousands of times, once each."""

    def __init__(self) -> None:
        self.index: dict[Any, int] = {}

    def __call__(self, word: Any) -> int:
        return self.index.setdefault(word, len(self.index))


def table_data(prediction: PlanPrediction) -> dict[str, Any]:
    """What the script reads. Entries of a table, in the order of `columns`; -1 stands for no text.

    Raises:
        PlanError: the prediction is empty.
    """
    check(prediction)
    words, ways, runs = _Words(), _Words(), {}
    limit = max(4, MAX_ALTERNATIVES // len(prediction.tables))

    def ranks_of(table: TablePrediction) -> tuple[str, int]:
        if table.ranks not in runs:  # thousands of tables share one tuple of thousands of ranks
            runs[table.ranks] = (format_ranks(table.ranks), len(table.ranks))
        return runs[table.ranks]

    def way(a: Alternative) -> tuple[Any, ...]:
        reason = -1 if a.impossible is None else words(a.impossible)
        return (words(a.sharding_type), words(a.kernel), finite(a.ms), a.hbm_bytes, reason, a.shards)

    rows = []
    for t in prediction.tables:
        best = best_alternative(t)
        named = (t.module, t.embedding_set or NO_SET, t.field, t.data_type, t.sharding_type, t.kernel)
        shown, count = ranks_of(t)
        ms = [finite(t.ms.get(part, 0.0)) for part in PARTS]
        times = [finite(t.slowest_ms), finite(sum(t.ms.values())), finite(best.ms) if best else None]
        sizes = [t.rows, t.dim, t.hbm_bytes, t.ddr_bytes]
        kept = _kept(t.alternatives, limit)
        others = [ways(tuple(map(way, kept))), len(t.alternatives) - len(kept)]
        sent = [t.sent.get(part, 0) for part in EXCHANGES]
        rows.append([t.table, *map(words, named), *sizes, words(shown), count, *times, ms, sent, *others])
    return {
        "columns": COLUMNS,
        "parts": [part_name(part) for part in PARTS],
        "sent": list(SENT.values()),
        "words": list(words.index),
        "alternatives": list(ways.index),
        "tables": rows,
    }


COLUMNS = (
    *("table", "module", "set", "field", "type", "sharding", "kernel", "rows", "dim", "hbm", "ddr"),
    *("ranks", "shards", "slowest_ms", "total_ms", "best_ms", "ms", "sent", "alternatives", "left_out"),
)


def _kept(alternatives: Sequence[Alternative], limit: int) -> Sequence[Alternative]:
    """At most `limit`, half of them possible and half of them not, or more of the one where the other has fewer."""
    if len(alternatives) <= limit:
        return alternatives
    possible = [a for a in alternatives if a.impossible is None]
    impossible = [a for a in alternatives if a.impossible is not None]
    num_possible = max(limit // 2, limit - len(impossible))
    possible = possible[:num_possible]
    return [*possible, *impossible[: limit - len(possible)]]


TABLES = """<section><h2>Tables</h2>
<p class="about">Every table: what was chosen, and what else could be. Time is that of the slowest rank's part of the
table, in milliseconds of a step; &ldquo;other&rdquo; is the same for the fastest way that was not chosen. Mind that a
finer cut takes less time of a rank, but of more ranks. Press a name for the alternatives, and why some are
impossible.</p>
<noscript><p>The list of tables needs JavaScript.</p></noscript>
<div class="filters"><input id="query" type="search" placeholder="name of table, field, module" aria-label="search">
<select id="set" aria-label="embedding set"></select><select id="chosen" aria-label="sharding"></select>
<span id="found" role="status"></span></div>
<div class="wide"><table id="tables"><thead><tr></tr></thead><tbody></tbody></table></div>
<p><button id="more" type="button">Show more</button></p></section>"""

SCRIPT = r"""
const data = JSON.parse(document.getElementById('data').textContent);
const get = id => document.getElementById(id);
const word = i => i < 0 ? '' : data.words[i];
const whole = n => n.toLocaleString('en-US');
const fixed = (x, digits) => x.toLocaleString('en-US', {minimumFractionDigits: digits, maximumFractionDigits: digits});
const ms = x => x === null ? '-' : x >= 1 || x === 0 ? fixed(x, 2) : x >= 0.01 ? fixed(x, 3) : x.toPrecision(2);
function bytes(n) {
  if (n === null) return '-';
  let power = 0;
  for (; n >= 1024 && power < 4; power++) n /= 1024;
  return fixed(n, power ? 1 : 0) + ' ' + ['B', 'KiB', 'MiB', 'GiB', 'TiB'][power];
}
function make(tag, kind, ...content) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.append(...content);  // strings become text, never markup
  return element;
}

const tables = data.tables.map(entries => {
  const t = Object.fromEntries(data.columns.map((name, i) => [name, entries[i]]));
  for (const name of ['module', 'set', 'field', 'type', 'sharding', 'kernel', 'ranks']) t[name] = word(t[name]);
  t.chosen = t.sharding + ' ' + t.kernel;
  t.memory = t.hbm + t.ddr;
  t.text = [t.table, t.module, t.field].join(' ').toLowerCase();
  return t;
});
const total = tables.reduce((sum, t) => sum + t.total_ms, 0) || 1;
const highest = of => tables.reduce((most, t) => Math.max(most, of(t)), 0) || 1;
const columns = [  // title, what it is sorted by, what is shown, class, meter
  ['table', t => t.table, t => t.table],
  ['set', t => t.set, t => t.set, 'optional'],
  ['rows x width', t => t.rows * t.dim, t => `${whole(t.rows)} x ${t.dim} ${t.type}`, 'optional n'],
  ['chosen', t => t.chosen, t => t.chosen],
  ['ranks', t => t.shards, t => t.ranks, 'optional'],
  ['memory', t => t.memory, t => bytes(t.memory), 'n', true],
  ['ms', t => t.slowest_ms, t => ms(t.slowest_ms), 'n', true],
  ['other, ms', t => t.best_ms ?? Infinity, t => ms(t.best_ms), 'optional n'],
  ['share of time', t => t.total_ms, t => fixed(100 * t.total_ms / total, 1) + ' %', 'optional n'],
];
const scale = columns.map(([, by, , , meter]) => meter ? highest(by) : 0);
let order = 8, down = true, limit = 50;

function alternative(t, [type, kernel, time, bytesOfShard, reason, ranks]) {
  const known = time !== null;  // excluded ways have a time beside the reason, impossible ones have none
  const change = known && t.slowest_ms ? 100 * (time / t.slowest_ms - 1) : null;
  const against = change === null ? '-' : (change < 0 ? '' : '+') + fixed(change, 1) + ' %';
  const figures = [ms(time), against, bytes(bytesOfShard), ranks === null ? '-' : whole(ranks)]
    .map(text => make('td', 'n', text));
  const rows = [make('tr', '', make('td', '', word(type) + ' ' + word(kernel)), ...figures)];
  if (reason >= 0) {
    const why = make('td', '', (known ? 'excluded: ' : 'impossible: ') + word(reason));
    why.colSpan = 5;
    rows.push(make('tr', 'reason', why));
  }
  return rows;
}

function detail(t) {
  const parts = data.parts.map((part, i) => [part, t.ms[i]]).filter(([, time]) => time !== 0);
  const together = t.shards > 1 ? ` of its ${whole(t.shards)} shards together` : '';
  const others = data.alternatives[t.alternatives];
  const sent = data.sent.map((what, i) => `${what} ${bytes(t.sent[i])}`).filter((_, i) => t.sent[i]);
  const head = make('tr', '', make('th', '', 'alternative'),
    ...['ms of a rank', 'against chosen', 'memory of a rank', 'ranks'].map(title => make('th', 'n', title)));
  const cell = make('td', '',
    make('p', '', `Field ${t.field} of set ${t.set}, in ${t.module}: ${whole(t.rows)} rows x ${t.dim}, ${t.type}.`),
    make('p', '', `${t.chosen}, ranks ${t.ranks}; HBM ${bytes(t.hbm)}, DDR ${bytes(t.ddr)}, all shards.`),
    make('p', '', `Milliseconds${together}: ` + parts.map(([part, time]) => `${part} ${ms(time)}`).join(', ') + '.'),
    make('p', '', sent.length ? `Sent in a step: ${sent.join(', ')}.` : 'Nothing of it is sent.'),
    others.length ? make('table', '', head, ...others.flatMap(a => alternative(t, a))) : 'No alternatives were tried.',
    t.left_out ? make('p', '', `${t.left_out} other alternatives are left out, to keep this page small.`) : '');
  cell.colSpan = [...document.querySelectorAll('#tables > thead th')].filter(head => head.offsetParent).length;
  return make('tr', 'more', cell);
}

function line(t) {
  const row = make('tr');
  columns.forEach(([, by, text, kind, meter], i) => {
    const cell = make('td', kind, i ? text(t) : '');
    if (meter) cell.append(make('i', 'meter')), cell.lastChild.style.width = 100 * by(t) / scale[i] + '%';
    row.append(cell);
  });
  const open = make('button', '', t.table);
  open.type = 'button';
  open.ariaExpanded = 'false';
  open.onclick = () => {
    const shown = open.ariaExpanded === 'true';
    open.ariaExpanded = String(!shown);
    shown ? row.nextSibling.remove() : row.after(detail(t));
  };
  row.firstChild.append(open);
  return row;
}

function show() {
  const query = get('query').value.toLowerCase(), set = get('set').value, chosen = get('chosen').value;
  const by = columns[order][1], sign = down ? -1 : 1;
  const fits = t => t.text.includes(query) && (!set || t.set === set) && (!chosen || t.chosen === chosen);
  const found = tables.filter(fits);
  const compare = (x, y) => x < y ? -1 : x > y ? 1 : 0;
  found.sort((a, b) => sign * compare(by(a), by(b)) || compare(a.table, b.table));
  document.querySelector('#tables tbody').replaceChildren(...found.slice(0, limit).map(line));
  get('found').textContent = `${whole(Math.min(limit, found.length))} of ${whole(found.length)} tables`;
  get('more').hidden = found.length <= limit;
  document.querySelectorAll('#tables > thead th').forEach((head, i) => {
    head.ariaSort = i !== order ? 'none' : down ? 'descending' : 'ascending';
    head.firstChild.textContent = columns[i][0] + (i !== order ? '' : down ? ' ▾' : ' ▴');
  });
}

function restart() {
  limit = 50;
  show();
}

columns.forEach(([title, by, , kind], i) => {
  const button = make('button', '', title);
  button.type = 'button';
  button.onclick = () => {
    down = i === order ? !down : typeof by(tables[0]) === 'number';
    order = i;
    restart();
  };
  document.querySelector('#tables > thead tr').append(make('th', kind, button));
});
for (const [id, label] of [['set', 'all sets'], ['chosen', 'all shardings']]) {
  const names = [...new Set(tables.map(t => t[id]))].sort();
  get(id).append(new Option(label, ''), ...names.map(name => new Option(name, name)));
}
for (const id of ['query', 'set', 'chosen']) get(id).oninput = restart;
get('more').onclick = () => {
  limit += 200;
  show();
};
show();
"""
