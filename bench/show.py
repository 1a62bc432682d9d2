"""Print rows of `bench/results/*.jsonl` as Markdown tables: what the READMEs quote.

Rows of `commlib bench` as it prints them itself; of any others all scalar fields, and above the
table those that are the same in all of its rows. Lists, such as curves, are left out.

python bench/show.py bench/results/all_reduce-1gbit.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

from commlib.benchmark.codecs import OPERATIONS
from commlib.benchmark.rows import CodecRow, Row, codec_table, table

Other = dict[str, Any]  # a row of anything but `commlib bench`
ORIGIN = ("device", "versions", "commit")


def read(file: Path) -> list[Row | CodecRow | Other]:
    """The rows that `--json` wrote."""
    return [_row(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _row(values: Other) -> Row | CodecRow | Other:
    for kind in (Row, CodecRow):
        known = {field.name for field in fields(kind)}
        needed = {
            field.name
            for field in fields(kind)
            if field.default is MISSING and field.default_factory is MISSING
        }
        if needed <= set(values) <= known:
            return kind(**values)
    return values


def conditions(row: Row | CodecRow | Other) -> str:
    """What a figure is worth nothing without."""
    device, found, commit = (
        row.get(name) if isinstance(row, dict) else getattr(row, name) for name in ORIGIN
    )
    versions = ", ".join(f"{name} {version}" for name, version in (found or {}).items())
    where = f"{row.op}, {row.ranks} ranks, {row.link}; " if isinstance(row, Row) else ""
    return f"{where}{device}; {versions}, commit {commit}"


def markdown(rows: Sequence[Row | CodecRow | Other]) -> str:
    """A table per set of conditions, in order of appearance."""
    parts = []
    for about in dict.fromkeys(map(conditions, rows)):
        here = [row for row in rows if conditions(row) == about]
        collectives = [row for row in here if isinstance(row, Row)]
        codecs = [row for row in here if isinstance(row, CodecRow)]
        others = [row for row in here if isinstance(row, dict)]
        if collectives:
            parts.append(f"{about}\n\n{table(collectives, 'github')}")
        if codecs:
            parts.append(f"{about}\n\n{codec_table(codecs, OPERATIONS, 'github')}")
        if others:
            parts.append(f"{about}\n\n{other_table(others)}")
    return "\n\n".join(parts)


def other_table(rows: Sequence[Other]) -> str:
    """All scalar fields of some rows, but for their origin and what none of them has."""
    flat = [dict(_scalars(row)) for row in rows]
    names = [
        name
        for name in dict.fromkeys(name for row in flat for name in row)
        if name not in ORIGIN and any(row.get(name) not in (None, "") for row in flat)
    ]
    cells = {name: [_cell(row.get(name)) for row in flat] for name in names}
    alike = {name: len({str(row.get(name)) for row in flat}) == 1 for name in names}
    same = [name for name in names if len(rows) > 1 and alike[name]]
    body = {name: cells[name] for name in names if name not in same}
    text = tabulate(body, "keys", "github", disable_numparse=True)
    if same:
        text = "; ".join(f"{name}: {cells[name][0]}" for name in same) + f"\n\n{text}"
    return text


def _scalars(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The fields that are no lists, those of inner objects by `outer.inner`."""
    for name, value in values.items():
        if before + name == "versions":
            continue
        if isinstance(value, dict):
            yield from _scalars(value, f"{before}{name}.")
        elif not isinstance(value, list):
            yield before + name, value


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")  # else Markdown ends the cell there


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        print(markdown(read(Path(name))))
