"""What a measurement is written down as: one schema for the table and for the JSON lines.

A `Row` is one (collective, contestant, size); a `CodecRow` one (codec, operation). Both carry
where they come from: device, versions and commit, read once by `origin()`. GB/s is 1e9 bytes per
second, everywhere.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from .timing import Ratio
from .units import format_size


class Origin(NamedTuple):
    """Where a row was measured: the processor, the software, the commit (None: not a checkout)."""

    device: str
    versions: dict[str, str]
    commit: str | None


@cache
def origin() -> Origin:
    """Device, versions and commit of this process, asked of the machine once."""
    return Origin(_device(), _versions(), _commit())


def versions() -> str:
    """Versions and commit as one line."""
    words = [f"{name} {version}" for name, version in origin().versions.items()]
    return ", ".join([*words, f"commit {origin().commit}"] if origin().commit else words)


@dataclass(frozen=True)
class Row:
    """One collective by one contestant at one size; see DESIGN section 7 for the first fields.

    `size_bytes` is the fp32 size of the whole tensor, `wire_bytes` what one rank sends,
    `ratio_*` the paired time ratio to the library's own fp32 collective (below 1: faster),
    `host_bytes` what the busiest host's interface sent where ranks share hosts, `wire_efficiency` =
    wire_bytes (where ranks share hosts, host_bytes) / line rate / p50, `rate` that line's bit/s,
    `hosts` how many the ranks run on, `chosen` the scheme that ran where that is not
    `scheme`. None where a figure does not apply.
    """

    op: str
    scheme: str
    backend: str
    ranks: int
    size_bytes: int
    wire_bytes: int
    ms_p50: float
    ms_p80: float
    algbw_GBps: float | None
    busbw_GBps: float | None
    rel_err: float | None
    speedup: float | None
    link: str
    ratio: float | None = None
    ratio_ci_low: float | None = None
    ratio_ci_high: float | None = None
    wire_efficiency: float | None = None
    wire_ratio: float | None = None
    host_bytes: int | None = None
    rate: float | None = None
    hosts: int | None = None
    iters: int = 0
    threads: int = 1
    chosen: str | None = None
    device: str = field(default_factory=lambda: origin().device)
    versions: dict[str, str] = field(default_factory=lambda: origin().versions)
    commit: str | None = field(default_factory=lambda: origin().commit)


@dataclass(frozen=True)
class CodecRow:
    """One operation of one codec: input GB/s, and that as a fraction of this run's copy speed.

    `rd_gap` = bits - 0.5 log2(1/NMSE): how many bits per element the codec spends on Gaussian data
    above the least any code of that error needs.
    """

    op: str
    scheme: str
    backend: str
    size_bytes: int
    wire_bytes: int
    ms_p50: float
    ms_p80: float
    input_GBps: float
    of_copy: float
    of_copy_ci_low: float | None
    of_copy_ci_high: float | None
    bits: float | None = None
    nmse: float | None = None
    rd_gap: float | None = None
    iters: int = 0
    threads: int = 1
    device: str = field(default_factory=lambda: origin().device)
    versions: dict[str, str] = field(default_factory=lambda: origin().versions)
    commit: str | None = field(default_factory=lambda: origin().commit)


def write_jsonl(path: Path, rows: Iterable[Row | CodecRow]) -> None:
    """Append one JSON object per row to `path`; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row), allow_nan=False) + "\n")


def table(rows: Sequence[Row], style: str = "simple") -> str:
    """Rows as a table in the manner of nccl-tests, with paired ratios; style: tabulate's name."""
    header = [
        "size", "scheme", "sent", "sent/fp32", "p50 ms", "p80 ms", "algbw GB/s", "busbw GB/s",
        "rel err", "speed-up", "time ratio [95%]", "wire eff",
    ]  # fmt: skip
    body = [
        [
            format_size(row.size_bytes),
            row.scheme if row.chosen is None else f"{row.scheme} ({_short(row.chosen)})",
            format_size(row.wire_bytes),
            _cell(row.wire_ratio, "1/{:.2f}"),
            f"{row.ms_p50:.3f}",
            f"{row.ms_p80:.3f}",
            _cell(row.algbw_GBps, "{:.3f}"),
            _cell(row.busbw_GBps, "{:.3f}"),
            _cell(row.rel_err, "{:.1e}"),
            _cell(row.speedup, "{:.2f}x"),
            _interval(row),
            _cell(row.wire_efficiency, "{:.2f}"),
        ]
        for row in rows
    ]
    if any(row.host_bytes is not None for row in rows):
        header.insert(3, "host sent")
        for cells, row in zip(body, rows, strict=True):
            cells.insert(3, "-" if row.host_bytes is None else format_size(row.host_bytes))
    return tabulate(body, header, style, disable_numparse=True, stralign="right")


def codec_table(rows: Sequence[CodecRow], operations: Sequence[str], style: str = "simple") -> str:
    """One line per codec; per operation input GB/s and, in brackets, the fraction of a copy."""
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    cells = {(row.scheme, row.op): row for row in rows}
    body = []
    for scheme in schemes:
        mine = [row for row in rows if row.scheme == scheme]
        about = next((row for row in mine if row.nmse is not None), mine[0])
        speeds = [cells.get((scheme, op)) for op in operations]
        body.append(
            [
                scheme,
                *("-" if s is None else f"{s.input_GBps:.1f} ({s.of_copy:.2f})" for s in speeds),
                _cell(about.bits, "{:.3f}"),
                _cell(about.nmse, "{:.1e}"),
                _cell(about.rd_gap, "{:.2f}"),
            ]
        )
    header = ["codec", *operations, "bits", "NMSE", "R-D gap"]
    return tabulate(body, header, style, disable_numparse=True, stralign="right")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _short(scheme: str) -> str:
    return re.sub(r":round=\w+", "", scheme)  # chosen by role, and the same for all of a table


def _interval(row: Row) -> str:
    if row.ratio is None:
        return "-"
    return str(Ratio(row.ratio, row.ratio_ci_low, row.ratio_ci_high))


def _device() -> str:
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:  # not Linux, or a sandbox without /proc: the machine's own word will do
        pass
    return f"{name}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    from commlib import __version__

    found: dict[str, Any] = {"commlib": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "numba"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str | None:
    """The commit of the checkout that holds this file; None for an installed wheel."""
    here = Path(__file__)

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # a virtual environment inside somebody else's checkout must not lend us its commit
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or None
