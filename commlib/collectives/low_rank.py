"""The arithmetic of low rank: what ranks compute from the same bits, with the same result.

Every sum and product here is a chain of element-wise operations in one order, each rounded by
itself: ranks with other numbers of threads, other vector units or a GPU get the same bits. A matrix
product promises that nowhere.

Factors lie as rows: of an n x m matrix P is (r, n) and Q is (r, m).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

DEPENDENT = 2.0**-36
"""Share of a row's square below which what earlier rows leave of it is rounding (each 2^-24)."""


def orthonormal(factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each factor (r, n) with its rows made orthonormal in their order, by Gram-Schmidt.

    A row of zeros stays one, and one that depends on rows before it becomes one; a NaN or Inf
    spoils its row and those after it. The result for one factor does not depend on the others.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for place, factor in enumerate(factors):
        rank, numel = factor.shape
        groups.setdefault((rank, 1 << max(0, numel - 1).bit_length()), []).append(place)
    found = list(factors)
    for (_, width), places in groups.items():  # one chain of small operations for all of a width
        stacked = [pad(factors[p], (0, width - factors[p].shape[1])) for p in places]
        rows = torch.stack(stacked)
        _gram_schmidt(rows)
        for place, done in zip(places, rows, strict=True):
            found[place] = done[:, : factors[place].shape[1]].contiguous()
    return found


def _gram_schmidt(rows: torch.Tensor) -> None:
    """Orthonormalise (batch, r, width) along r, in place; `width` is a power of two."""
    largest = rows.abs().amax(-1, keepdim=True)
    rows.div_(torch.where(largest == 0, 1.0, largest))  # squares neither overflow nor vanish
    for j in range(rows.shape[1]):
        row, before = rows[:, j], rows[:, :j]
        whole = _sum(row * row)
        for _ in range(2 if j else 0):  # the second takes out what rounding left of the first
            shares = _sum(before * row[:, None])
            for i in range(j):
                row.sub_(shares[:, i] * before[:, i])
        rest = _sum(row * row)
        # Of a row that depends on those before, rounding is left. Where only a few columns are not
        # zero it lies in their span again: made one long it would count a direction twice.
        gone = rest < whole * DEPENDENT
        norm = rest.sqrt()
        row.mul_(~gone).div_(torch.where(gone | (norm == 0), 1.0, norm))


def _sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of the last dimension, a power of two: halves added to halves."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def product(p: torch.Tensor, q: torch.Tensor, out: torch.Tensor, room: torch.Tensor) -> None:
    """out = P Q^T, (n, m), of (r, n) and (r, m); `room` is like `out`, and spoilt."""
    torch.mul(p[0, :, None], q[0], out=out)
    for row, other in zip(p[1:], q[1:], strict=True):
        out.add_(torch.mul(row[:, None], other, out=room))


def approximated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """`matrix` at `rank` by two subspace iterations from random rows: what a warm start has."""
    generator = torch.Generator().manual_seed(rank)
    q = torch.randn(rank, matrix.shape[1], generator=generator).to(matrix.device)
    for _ in range(2):
        (p,) = orthonormal([q @ matrix.T])
        q = p @ matrix
    return p.T @ q
