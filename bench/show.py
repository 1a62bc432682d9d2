"""Print rows of `bench/results/*.jsonl` as Markdown tables: what the READMEs quote.

python bench/show.py bench/results/all_reduce-1gbit.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from commlib.benchmark.codecs import OPERATIONS
from commlib.benchmark.rows import CodecRow, Row, codec_table, table


def read(file: Path) -> list[Row | CodecRow]:
    """The rows that `--json` wrote."""
    rows = map(json.loads, file.read_text().splitlines())
    return [CodecRow(**row) if "nmse" in row else Row(**row) for row in rows]


def conditions(row: Row | CodecRow) -> str:
    """What a figure is worth nothing without."""
    versions = ", ".join(f"{name} {version}" for name, version in row.versions.items())
    where = f"{row.op}, {row.ranks} ranks, {row.link}; " if isinstance(row, Row) else ""
    return f"{where}{row.device}; {versions}, commit {row.commit}"


def markdown(rows: list[Row | CodecRow]) -> str:
    """A table per set of conditions, in order of appearance."""
    parts = []
    for about in dict.fromkeys(map(conditions, rows)):
        here = [row for row in rows if conditions(row) == about]
        collectives = [row for row in here if isinstance(row, Row)]
        codecs = [row for row in here if isinstance(row, CodecRow)]
        if collectives:
            parts.append(f"{about}\n\n{table(collectives, 'github')}")
        if codecs:
            parts.append(f"{about}\n\n{codec_table(codecs, OPERATIONS, 'github')}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        print(markdown(read(Path(name))))
