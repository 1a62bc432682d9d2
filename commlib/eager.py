"""Functions that torch.compile leaves as they are.

Dynamo follows a program into every Python function that runs while it compiles: into a hook that
DDP calls in backward, behind a graph break, or into a collective. There is no graph in threads and
sockets: it went on for minutes, down to the kernels' dispatchers.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

P = ParamSpec("P")
T = TypeVar("T")


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which breaks graphs and is not compiled, nor what it calls."""
    uncompiled = _disable_dynamo(function)

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> T:
        # Where nobody compiles, dynamo is not there yet; importing it takes a second.
        call = uncompiled if "torch._dynamo" in sys.modules else function
        return call(*args, **named)

    return run
