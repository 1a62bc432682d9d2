"""Sizes as people write them, `64KiB` or `1.5MB`, numbers of bytes and bits as they read them, and
files for results, refused before the run where they could not be written after it.

KiB, MiB, GiB are powers of 1024; KB, MB, GB and all units of rates are powers of 1000.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_SIZE = {
    "": 1, "b": 1,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30,
    "kb": 10**3, "mb": 10**6, "gb": 10**9,
}  # fmt: skip
_NUMBER_UNIT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes of a size: `4096`, `64KiB`, `1.5 MB`. ValueError names the units that exist."""
    match = _NUMBER_UNIT.fullmatch(text.lower())
    if match is None or match[2] not in _SIZE:
        raise ValueError(
            f"size {text!r} is not a number with one of B, KiB, MiB, GiB, KB, MB, GB; "
            "write 64KiB or 65536"
        )
    return round(float(match[1]) * _SIZE[match[2]])


def format_size(num_bytes: float) -> str:
    """The shortest power-of-1024 spelling: 65536 -> `64KiB`."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.4g}{unit}"
    return f"{num_bytes:.4g}B"


def format_rate(bits_per_second: float) -> str:
    """1e9 -> `1 Gbit/s`."""
    for unit, scale in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits_per_second >= scale:
            return f"{bits_per_second / scale:.4g} {unit}"
    return f"{bits_per_second:.4g} bit/s"


def parse_output(text: str) -> Path:
    """A file to write. ValueError where that would fail."""
    path = Path(text)
    place = path if path.exists() else path.absolute().parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(
            f"{text!r} cannot be written: name a file in a folder that exists and is yours"
        )
    return path
