"""The line rate of a demo's hosts, found while its ranks run.

Ranks cannot change the rate of their own hosts. They ask for it in a file; a thread of the process
that holds the network answers.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...emulation import Network

ANSWER_SECONDS = 30.0
TARGET = 8.0  # uncompressed step / step without a network: large models on 100 Mbit/s
WITHIN = 0.04  # of the target; the main run must land within half a unit of TARGET
_POLL_SECONDS = 0.02


@contextmanager
def dial(network: Network) -> Iterator[Path]:
    """A folder in which `turn` asks for rates of `network`, as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="commlib-line-") as name:
        folder, over = Path(name), threading.Event()

        def answer() -> None:
            wanted = folder / "wanted"
            while not over.wait(_POLL_SECONDS):
                if wanted.exists():
                    try:
                        network.set_rate(wanted.read_text(encoding="ascii"))
                    except (OSError, RuntimeError, ValueError) as error:
                        (folder / "refused").write_text(str(error), encoding="utf-8")
                    wanted.unlink()

        thread = threading.Thread(target=answer, name="commlib-line", daemon=True)
        thread.start()
        try:
            yield folder
        finally:
            over.set()
            thread.join()


def turn(folder: Path, rate: str) -> None:
    """Give all hosts of the network behind `folder` the line rate `rate`; one rank calls it.

    Raises: RuntimeError: it was refused, or nobody answers.
    """
    wanted, fresh, refused = (folder / name for name in ("wanted", "fresh", "refused"))
    fresh.write_text(rate, encoding="ascii")
    fresh.rename(wanted)  # whole or not at all
    end = time.monotonic() + ANSWER_SECONDS
    while wanted.exists():
        if time.monotonic() > end:
            raise RuntimeError(f"nobody set the line rate within {ANSWER_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)
    if refused.exists():
        reason = refused.read_text(encoding="utf-8")
        refused.unlink()
        raise RuntimeError(f"line rate {rate}: {reason}")


@dataclass(frozen=True)
class Line:
    """A calibrated line: its rate (bits per second) and the seconds of a step it was found by."""

    bits: int
    alone: float
    uncompressed: float

    @property
    def ratio(self) -> float:
        return self.uncompressed / self.alone

    @property
    def rate(self) -> str:
        """As `Network` takes it."""
        return rate_text(self.bits)


def rate_text(bits: float) -> str:
    """A rate in whole kbit."""
    return f"{max(8, round(bits / 1e3))}kbit"


def calibrate(
    measure: Callable[[int], tuple[float, float]],
    critical_bytes: float,
    tries: int = 6,
    *,
    target: float = TARGET,
) -> Line:
    """The line rate at which an uncompressed step takes `target` times one without a network.

    Args:
        measure: seconds of a step (without a network, uncompressed) at a rate in bits per second.
            Called once with 0, for no limit.
        critical_bytes: what an uncompressed step sends one after the other.
        tries: rates at most; the last one is taken if none came within WITHIN.
    """
    alone, free = measure(0)
    seconds = [alone]
    bits = 8 * critical_bytes / (target * alone - min(free, alone))
    uncompressed = free
    for number in range(tries):
        now, uncompressed = measure(round(bits))
        seconds.append(now)
        alone = sorted(seconds)[len(seconds) // 2]
        if abs(uncompressed / (target * alone) - 1) < WITHIN or number == tries - 1:
            break
        # the part of a step that is not the line's does not change with its rate
        wire = max(uncompressed - alone, 0.1 * uncompressed)
        bits *= wire / ((target - 1) * alone)
    return Line(round(bits), alone, uncompressed)
