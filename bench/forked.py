"""Processes forked from a server that has imported and compiled, once, what they need.

Such a process starts in hundredths of a second, where python and torch anew take four. A process
has one server, with the modules that were asked for before its first fork, and the environment and
the random state of then: who draws without a seed has to seed anew.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

_modules: list[str] = []


def forked(*modules: str) -> Any:
    """The context of processes whose server has imported `modules`, and those asked for before."""
    # OpenBLAS and OpenMP would start threads in the server, and a fork has none of them. (This
    # process and what it starts compute on one thread as well, where torch is not told otherwise.)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _modules.extend(one for one in modules if one not in _modules)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_modules)
    return context
