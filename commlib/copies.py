"""Copies: what all ranks last made of each other's parts, which `+delta` sends differences to.

Every rank holds all parts, as many bytes as what is gathered. The rows are the same on all ranks,
so a rank's own row is all of it that a checkpoint needs: the others come from their ranks again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

Names = tuple[str, ...]


def clean(x: torch.Tensor) -> bool:
    """True: all of `x` is finite. False: not known.

    On CPU a sum takes a hundredth of isfinite()'s time; on a device the host would wait for it.
    """
    return x.device.type == "cpu" and math.isfinite(float(x.sum(dtype=torch.float32)))


class Copies:
    """The rows of all ranks by the names in them; each name belongs to one group of names.

    rank, size: of this process in its group.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._rows: dict[Names, tuple[tuple[int, ...], torch.Tensor]] = {}
        self._saved: dict[str, torch.Tensor] = {}  # own parts, of a checkpoint

    def of(
        self, names: Names, sizes: tuple[int, ...], x: torch.Tensor
    ) -> tuple[torch.Tensor, bool]:
        """The rows (W, numel of x) of `names`, and whether all are known.

        Where they are not, or were of other tensors (a dtype, sizes), this rank's own is: from a
        checkpoint, else it is `x`, its part now.
        """
        held = self._rows.get(names)
        if held is not None and held[0] == sizes and held[1].dtype == x.dtype:
            return held[1], True
        with torch.inference_mode(False):  # training goes on with what evaluation began
            rows = torch.empty(self._size, x.numel(), dtype=x.dtype, device=x.device)
        own = rows[self._rank].copy_(x)
        for name, part in zip(names, own.split(sizes), strict=True):
            saved = self._saved.pop(name, None)
            if saved is not None and saved.shape == part.shape:
                part.copy_(saved)
        self._rows[names] = sizes, rows
        return rows, False

    def forget(self) -> None:
        """Begin anew: the tensors came from elsewhere."""
        self._rows.clear()

    def reset(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._saved.clear()

    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(rows.nbytes for _, rows in self._rows.values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's own parts by name."""
        parts = {name: part.clone() for name, part in self._saved.items()}
        for names, (sizes, rows) in self._rows.items():
            for name, part in zip(names, rows[self._rank].split(sizes), strict=True):
                parts[name] = part.clone()
        return parts

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what `state_dict` gave."""
        self._rows.clear()
        self._saved = {name: part.clone() for name, part in state.items()}
