"""A CUDA backend as the contracts want it: CPU tensors in and out, kernels on the device."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from commlib_kernels import Memory, Tag


class OnDevice:
    """Runs the three ops on copies on the device, and copies back what they wrote.

    margin: bytes around every tensor that nobody may write; 0 where a sanitizer sees reads too.
    step_on_device: random streams take their step from the device, as captured graphs do.
    """

    def __init__(
        self,
        backend: ModuleType,
        device: str = "cuda",
        *,
        margin: int = 64,
        step_on_device: bool = False,
    ) -> None:
        self.name, self._backend = backend.name, backend
        self._device, self._step, self._margin = device, step_on_device, margin
        self._lent: list[tuple[torch.Tensor, torch.Tensor]] = []

    def quantize(self, fmt: Any, x: Any, wire: Any, layout: Any, tag: Tag, memory: Any) -> None:
        """As every backend's."""
        self._backend.quantize(
            fmt, self._lend(x), self._lend(wire), layout, self._tag(tag), self._memory(memory)
        )
        self._take_back()

    def dequantize(self, fmt: Any, wire: Any, out: Any, layout: Any, *, add: bool) -> None:
        """As every backend's."""
        self._backend.dequantize(fmt, self._lend(wire), self._lend(out), layout, add=add)
        self._take_back()

    def reduce(
        self, fmt: Any, wires: Any, out: Any, layout: Any, tag: Tag, *, factor: float, memory: Any
    ) -> None:
        """As every backend's."""
        self._backend.reduce(
            fmt, self._lend(wires), self._lend(out), layout, self._tag(tag),
            factor=factor, memory=self._memory(memory),
        )  # fmt: skip
        self._take_back()

    def _tag(self, tag: Tag) -> Tag:
        if not self._step:
            return tag
        return tag._replace(step=torch.tensor(tag.step, device=self._device))

    def _memory(self, memory: Memory | None) -> Memory | None:
        if memory is None:
            return None
        scales = None if memory.scales is None else self._lend(memory.scales)
        return replace(memory, residual=self._lend(memory.residual), scales=scales)

    def _lend(self, x: torch.Tensor) -> torch.Tensor:
        """A copy on the device, as far from a multiple of 16 bytes as the original."""
        before = self._margin + x.data_ptr() % 16
        size = before + x.nbytes + self._margin
        base = torch.full(
            (size + (-size % 16 if self._margin else 0),),
            0xA5,
            dtype=torch.uint8,
            device=self._device,
        )
        copy = base[before : before + x.nbytes].view(x.dtype)
        copy.copy_(x)
        self._lent.append((x, base))
        return copy

    def _take_back(self) -> None:
        for x, base in self._lent:
            before = self._margin + x.data_ptr() % 16
            found = base.cpu()
            x.copy_(found[before : before + x.nbytes].view(x.dtype))
            around = torch.cat([found[:before], found[before + x.nbytes :]])
            assert (around == 0xA5).all(), "written beyond the ends of a tensor"
        self._lent.clear()
