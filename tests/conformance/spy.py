"""How many calls reached a backend's own process groups in a test, summed over its ranks.

Counted are calls of what the class defines, from torch.distributed and from DDP's C++ alike, and of
what it inherits, as far as only Python calls it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CLASSES = {"commlib": ("commlib.integrations.process_group", "ProcessGroup")}
TRAFFIC = ("all", "_all", "barrier", "broadcast", "gather", "recv", "reduce", "scatter", "send")
# Not virtual in torch's trampoline: an override that calls its base is not called back by it.
INHERITED = ("allgather_coalesced", "alltoall", "gather", "scatter")


def preload(backend: str) -> None:
    """Import what is counted, before ranks are forked."""
    if backend in CLASSES:
        importlib.import_module(CLASSES[backend][0])


def prepare(folder: Path) -> None:
    """Before the ranks of a test start; `folder` is the test's own."""
    (folder / "calls").mkdir()


def collect(folder: Path, backend: str) -> int | None:
    """After they ended: what they have counted; None where there is no class to look at."""
    if backend not in CLASSES:
        return None
    return sum(int(path.read_text()) for path in (folder / "calls").iterdir())


@contextmanager
def counting(folder: Path, rank: int, backend: str) -> Iterator[None]:
    """Count this rank's calls, and write the count down however the rank ends."""
    counts = [0]
    if backend in CLASSES:
        module, name = CLASSES[backend]
        group: Any = getattr(importlib.import_module(module), name)
        own = {name for name in vars(group) if name.startswith(TRAFFIC)}
        for method in own.union(INHERITED):
            setattr(group, method, _counted(getattr(group, method), counts))
    try:
        yield
    finally:
        (folder / "calls" / str(rank)).write_text(str(counts[0]))


def _counted(function: Callable[..., Any], counts: list[int]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        counts[0] += 1
        return function(*args, **options)

    return call
