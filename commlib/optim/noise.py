"""Gaussian numbers that whoever needs them makes again, so that nobody sends them.

Philox4x32-10 (commlib_kernels.philox) under

    counter = (group, copy, step, stage)      key = (seed, "PPRS")

turned into normals by Box and Muller (1958): of the four words of group g come elements 4 g to
4 g + 3, sqrt(-2 ln u) cos(2 pi v) and sqrt(-2 ln u) sin(2 pi v) of either pair.
"""

from __future__ import annotations

import numpy as np
import torch

from commlib_kernels.philox import philox, seed_word

STREAM = 0x50505253  # "PPRS": apart from the streams of rounding, which have segments' names
CHUNK = 1 << 16  # groups at a time: 0.5 MB per array of counters
WORD = 2.0**-32


def normals(numel: int, copies: range, *, seed: int, step: int, stage: int) -> torch.Tensor:
    """N(0, 1) of shape (len(copies), numel), fp32, a function of these numbers alone.

    Element (k, i) depends on copies[k], i, seed, step and stage, not on what else is asked for.
    """
    width = -(-numel // 4)
    total = len(copies) * width
    out = np.empty((total, 4), dtype=np.float32)
    for start in range(0, total, CHUNK):
        place = np.arange(start, min(total, start + CHUNK), dtype=np.uint64)
        row, group = np.divmod(place, np.uint64(max(1, width)))
        constant = np.full_like(place, step & 0xFFFFFFFF), np.full_like(place, stage)
        copy = np.uint64(copies.start) + row * np.uint64(copies.step)
        words = philox((group, copy, *constant), (seed_word(seed), STREAM))
        for pair in (0, 2):
            radius = np.sqrt(-2.0 * np.log((words[pair].astype(np.float64) + 1.0) * WORD))
            angle = words[pair + 1].astype(np.float64) * (2.0 * np.pi * WORD)
            out[start : start + len(place), pair] = radius * np.cos(angle)
            out[start : start + len(place), pair + 1] = radius * np.sin(angle)
    rows = out.reshape(len(copies), 4 * width)[:, :numel]
    return torch.from_numpy(np.ascontiguousarray(rows))
