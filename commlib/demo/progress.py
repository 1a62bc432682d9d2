"""The progress bar of the demos."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm


class Running(Protocol):
    """A method in training: its name and, per step, loss and seconds."""

    method: str
    losses: list[float]
    seconds: list[float]


@contextmanager
def bar(steps: int, *, shown: bool) -> Iterator[Callable[[Running], None]]:
    """A progress bar, as something to call after each step."""
    with tqdm(
        total=steps,
        unit="step",
        disable=not shown,
        leave=False,
        smoothing=0,  # methods take turns: only the mean over all of them tells the end
        mininterval=0.1 if sys.stderr.isatty() else 15,
    ) as drawn:
        drawn.set_description("reading text, compiling kernels")

        def progress(run: Running) -> None:
            drawn.set_description(f"{run.method:>22}")
            drawn.set_postfix(loss=f"{run.losses[-1]:.3f}", ms=f"{1e3 * run.seconds[-1]:.0f}")
            drawn.update()

        yield progress
