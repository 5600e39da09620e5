"""A calibration -> a topology file for `--topology`, with what it rests on as comments; and the same in a terminal."""

from collections.abc import Sequence
from dataclasses import asdict

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hmoe_rec.benchmark.calibrate import KINDS, Calibration, Exchange, Lookup
from hmoe_rec.sharding.prices import PARTS_PRICED, TERMS
from hmoe_rec.units import format_bytes, format_ms


def topology_yaml(calibration: Calibration, name: str) -> str:
    """The file; `cluster_of` reads it."""
    cluster = {**calibration.cluster.to_dict(), "name": name}
    prices = cluster.pop("prices")
    host = calibration.host
    settings = calibration.settings
    text = [
        "# What this machine takes, measured by `hmoe-rec bench calibrate`; for --topology and sharding.topology.",
        f"# {host['device']}, {host['processor']}, {host['cores']} cores; {calibration.cluster.world_size} processes, "
        f"{host['threads']} threads each, {host['backend']}; torch {host['torch']}, torchrec {host['torchrec']}",
        f"# tables' optimizer: {settings.optimizer}; widths {_listed(settings.widths)}",
        *[f"{key}: {_number(value)}" for key, value in cluster.items()],
        "# A part's ms = call_ms + (id_ns ids + row_ns different rows + vector_ns vectors + byte_ns bytes) / 1e6;",
        "# behind it the median of |fitted / measured - 1|.",
        "prices:",
    ]
    for part in PARTS_PRICED:
        terms = ", ".join(f"{term}: {_number(prices[part][term])}" for term in TERMS)
        text.append(f"  {part}: {{{terms}}}  # {_error(calibration, part)}")
    text.append("# Exchanges: bytes of a process's buffer, milliseconds of the slowest process, GB/s")
    text += [f"#   {x.kind:14} {x.bytes:>12,} {x.ms:>10.3f} {_gb(x):>8.3f}" for x in calibration.exchanges]
    return "\n".join(text) + "\n"


def print_calibration(calibration: Calibration, console: Console) -> None:
    host = calibration.host
    console.print(
        Text(f"{host['device']}, {host['processor']}: {calibration.cluster.world_size} processes", style="bold")
    )
    for name, bandwidth in calibration.copies.items():
        console.print(Text(f"copy {name}: {bandwidth / 1e9:,.2f} GB/s a process"))
    if calibration.exchanges:
        console.print(_exchanges(calibration.exchanges))
    console.print(_lookups([x for x in calibration.lookups if x.kind == KINDS[0]]))
    console.print(_prices(calibration))
    cluster = calibration.cluster
    random = cluster.hbm_bandwidth if cluster.device == "cuda" else cluster.ddr_bandwidth
    console.print(
        Text(f"rows at random: {random / 1e9:,.2f} GB/s; a lookup call: {format_ms(cluster.kernel_overhead_ms)} ms")
    )


def _exchanges(exchanges: Sequence[Exchange]) -> Table:
    kinds = list(dict.fromkeys(x.kind for x in exchanges))
    table = _grid("Exchanges by size of a process's buffer: ms of the slowest process (GB/s)", ("buffer",), kinds)
    for size in dict.fromkeys(x.bytes for x in exchanges):
        found = {x.kind: x for x in exchanges if x.bytes == size}
        table.add_row(format_bytes(size), *(f"{format_ms(found[k].ms)} ({_gb(found[k]):.2f})" for k in kinds))
    return table


def _lookups(lookups: Sequence[Lookup]) -> Table:
    right = ("width", "rows", "examples", "ids", "forward, ms", "ns an id", "GB/s", "backward, ms", "ns an id")
    table = _grid("Lookups, table-wise: a process's half of the tables for all examples", ("tables",), right)
    for x in lookups:
        looked_up = x.batch_size * x.ids * len(x.rows)
        table.add_row(
            f"{len(x.rows)} {'pooled' if x.pooled else 'sequences'}",
            *(f"{n:,}" for n in (x.width, max(x.rows), x.batch_size, x.ids)),
            format_ms(x.ms["forward"]),
            f"{1e6 * x.ms['forward'] / looked_up:,.0f}",
            f"{x.bandwidth / 1e9:.2f}",
            format_ms(x.ms["backward"]),
            f"{1e6 * x.ms['backward'] / looked_up:,.0f}",
        )
    return table


def _prices(calibration: Calibration) -> Table:
    table = _grid("Prices, fitted", ("part",), (*(t.replace("_", ", ") for t in TERMS), "median |error|", "measured"))
    for part, price in asdict(calibration.cluster.prices).items() if calibration.cluster.prices else ():
        error = calibration.fit.error.get(part)
        cells = [f"{price[term]:.4g}" for term in TERMS]
        table.add_row(part, *cells, "-" if error is None else f"{100 * error:.0f} %", str(calibration.fit.count[part]))
    return table


def _error(calibration: Calibration, part: str) -> str:
    error = calibration.fit.error.get(part)
    return "not measured" if error is None else f"{100 * error:.0f} %, {calibration.fit.count[part]} measurements"


def _gb(exchange: Exchange) -> float:
    return exchange.bytes / exchange.ms / 1e6


def _number(value: object) -> str:
    """Four digits are more than a measurement has."""
    rounded = float(f"{value:.4g}") if isinstance(value, float) else value
    return yaml.safe_dump(rounded, default_flow_style=True).splitlines()[0]


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _grid(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table
