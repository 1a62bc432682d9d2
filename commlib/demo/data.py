"""The Python standard library's own source text: data that every machine with Python has."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Left out: what is not the library itself, and tests (a third of the text, and much alike).
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT_PART = 20  # every file whose path hashes to 0 modulo this is held out


@dataclass(frozen=True)
class Corpus:
    """Source text as bytes (uint8, one dimension), split by file into two parts."""

    train: Tensor
    held_out: Tensor

    def batch(self, batch: int, context: int, *, seed: int, step: int, rank: int) -> Pair:
        """The training batch of (seed, step, rank): the same for every method."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed},{step},{rank}".encode()))
        starts = torch.randint(len(self.train) - context - 1, (batch,), generator=generator)
        return _windows(self.train, starts, context)

    def evaluation(self, batch: int, context: int, *, rank: int = 0, ranks: int = 1) -> Pair:
        """Part `rank` of `batch * ranks` windows spread evenly over the held-out text."""
        last = len(self.held_out) - context - 1
        starts = torch.linspace(0, last, batch * ranks).long()[rank::ranks]
        return _windows(self.held_out, starts, context)


Pair = tuple[Tensor, Tensor]


def load() -> Corpus:
    """Read the standard library's `*.py` files, in the order of their paths.

    Raises RuntimeError where Python was installed without its source text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED.intersection(name.parts):
            held_out = zlib.crc32(name.as_posix().encode()) % HELD_OUT_PART == 0
            parts[held_out].append(path.read_bytes())
    texts = [np.frombuffer(bytearray(b"\n".join(part)), dtype=np.uint8) for part in parts]
    if min(text.size for text in texts) < 100_000:
        raise RuntimeError(
            f"too little source text under {root}: the demo trains on *.py files there"
        )
    return Corpus(train=torch.from_numpy(texts[0]), held_out=torch.from_numpy(texts[1]))


def _windows(text: Tensor, starts: Tensor, context: int) -> Pair:
    rows = text[starts[:, None] + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]
