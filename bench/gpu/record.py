"""The record of a run on a GPU: JSON lines, and a page that reads well."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from commlib.benchmark.rows import origin

RESULTS = Path(__file__).parent.parent / "results" / "gpu"
PACKAGES = ("torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "numba-cuda", "numba", "numpy")


@cache
def about() -> dict[str, Any]:
    """Device, versions and commit: part of every row."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    # A copy of a checkout without its history is told its commit from outside.
    commit = os.environ.get("COMMLIB_COMMIT") or origin().commit or "unknown"
    return {"device": device, "versions": found, "commit": commit}


class Record:
    """Rows of one run, written as they come: a run that is cut short leaves what it had.

    In ``$OUT`` where that is set, else in bench/results/gpu/.
    """

    def __init__(self, what: str) -> None:
        folder = Path(os.environ.get("OUT") or RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        device = re.sub(r"\W+", "-", about()["device"].lower())
        self.path = folder / f"{device}-{about()['commit'][:12]}-{what}.jsonl"
        self.path.write_text("")
        self.rows: list[dict[str, Any]] = []
        self._page = [f"# {what}: {about()['device']}, commit {about()['commit']}", ""]
        versions = ", ".join(f"{name} {v}" for name, v in about()["versions"].items())
        self._page += [f"{versions}. Rows: `{self.path.name}`.", ""]

    def add(self, **row: Any) -> None:
        """Write a row."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps({**row, **about()}) + "\n")

    def table(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table, and put it on the page."""
        text = tabulate(rows, heads, tablefmt="github", floatfmt=".3f")
        print(f"\n{title}\n{text}", flush=True)
        self._page += [f"## {title}", "", text, ""]
        self.path.with_suffix(".md").write_text("\n".join(self._page))
