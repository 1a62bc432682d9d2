"""When a pipeline's stages work: forward fill, then backward drain, in units of time.

One unit (a tick) is the forward or the backward of one pass at one stage; moving a tensor to the
next stage takes none. With D stages and n passes, counted from 0::

    forward of pass j at stage s     tick  j + s
    backward of pass j at stage s    tick  (n + D - 1) + j + (D - 1 - s)
    all of it                        2 (n + D - 1) ticks, of which a stage works in 2 n

Source: Colin, dos Santos, Scaman, "Theoretical limits of pipeline parallel optimization and
application to distributed deep learning", NeurIPS 2019, arXiv 1910.05104.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Operation(NamedTuple):
    """What a stage did: `kind` of pass `number`, in the unit of time `tick`."""

    tick: int
    kind: Literal["forward", "backward"]
    number: int


@dataclass(frozen=True)
class Schedule:
    """Forward fill, backward drain of `passes` passes through `stages` stages.

    Raises: ValueError: not at least one of each.
    """

    stages: int
    passes: int

    def __post_init__(self) -> None:
        for name in ("stages", "passes"):
            check_count(f"Schedule: {name}", getattr(self, name))

    @property
    def ticks(self) -> int:
        """Units of time from the first forward to the last backward."""
        return 2 * (self.passes + self.stages - 1)

    @property
    def bubble_fraction(self) -> float:
        """Share of the time in which a stage waits: (D - 1) / (n + D - 1), alike at all stages."""
        return (self.stages - 1) / (self.passes + self.stages - 1)

    def operations(self, stage: int, start: int = 0) -> tuple[Operation, ...]:
        """What `stage` does, in order. start: the tick of the whole schedule's first forward.

        Raises: ValueError: there is no such stage.
        """
        if not 0 <= stage < self.stages:
            raise ValueError(f"Schedule: stage is {stage}, allowed: 0 to {self.stages - 1}")
        drain = start + self.passes + 2 * (self.stages - 1) - stage
        return (
            *(Operation(start + stage + j, "forward", j) for j in range(self.passes)),
            *(Operation(drain + j, "backward", j) for j in range(self.passes)),
        )


def span(logs: Iterable[Sequence[Operation]]) -> int:
    """Units of time from the first to the last of all operations; 0 where there are none."""
    ticks = [operation.tick for log in logs for operation in log]
    return max(ticks) - min(ticks) + 1 if ticks else 0


def check_count(name: str, value: object) -> None:
    """Refuse what is not a whole number of at least 1 (ValueError)."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, allowed: a whole number of at least 1")
