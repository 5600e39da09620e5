"""Figures as a person reads them. Memory and bytes moved are in powers of 1024 everywhere: 1 GiB = 2^30 bytes."""

import math


def format_bytes(count: float | None) -> str:
    """In the largest power of 1024 that keeps it above 1; "-" for None and for what is not finite."""
    if count is None or not math.isfinite(count):
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"


def format_ms(ms: float | None) -> str:
    """Without the unit, which the column names."""
    if ms is None or not math.isfinite(ms):
        return "-"
    if abs(ms) >= 1 or ms == 0:
        return f"{ms:,.2f}"
    return f"{ms:.3f}" if abs(ms) >= 0.01 else f"{ms:.2g}"


def format_count(count: float) -> str:
    """123,456 or 12.3M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:,.1f}{letter}"
    return f"{count:,.0f}"
