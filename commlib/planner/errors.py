"""Error tables: what coding a gradient under each candidate scheme loses, measured by doing it.

    e[l][s] = |Q_s(g_l) - g_l|^2        energy[l] = |g_l|^2

The codec and the rounding are those that the scheme would have for gradients. What is measured is
the sender's coding of this rank's gradient alone, without its residual, and not the owner's second
coding of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from commlib_kernels.layout import Layout
from commlib_kernels.tag import Tag

from ..policy import TensorInfo
from ..scheme import Scheme
from .schemes import Cost, Layer, candidates, nbytes

RUN = 1024  # elements that are sampled together: whole blocks of all codecs but the largest


def squared_error(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """|Q(x) - x|^2 as an fp64 scalar on the device of `x`; 0 for a scheme that loses nothing."""
    if scheme.lossless:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    codec, flat = scheme.resolve().codec, x.detach().reshape(-1)
    layout = Layout((flat.numel(),), flat.dtype, align=codec.align)
    wire = torch.zeros(codec.nbytes(layout), dtype=torch.uint8, device=x.device)
    back = torch.empty_like(flat)
    codec.encode(flat, wire, layout, Tag())
    codec.decode(wire, back, layout, Tag())
    return _energy(back.sub_(flat))


class Errors:
    """The tables of some tensors, built one gradient after the other.

    Args:
        tensors: by name, the same on all ranks.
        schemes: texts of the candidates.
        device: of the gradients.
        sample: elements of a gradient that are coded, in whole blocks drawn once for each size; the
            sums are scaled up. None: all.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        schemes: Sequence[str],
        device: torch.device | str = "cpu",
        sample: int | None = None,
    ) -> None:
        self.infos = dict(tensors)
        self.schemes = tuple(schemes)
        self._sample = sample
        self._parsed = [Scheme.parse(text) for text in schemes]
        self._rows = {name: row for row, name in enumerate(self.infos)}
        # the last column is the energy
        self.table = torch.zeros(
            len(self.infos), len(schemes) + 1, dtype=torch.float64, device=device
        )

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Measure one gradient. What can only go exactly (vectors, small ones) is not coded."""
        row = self.table[self._rows[name]]
        possible = candidates(self.infos[name], self.schemes)
        # by names and schemes alone, so that ranks measure alike
        if len(possible) == 1 and Scheme.parse(possible[0]).lossless:
            return
        gradient, times = _sampled(gradient.detach().reshape(-1), self._sample)
        for place, text in enumerate(self.schemes):
            if text in possible:
                row[place] += times * squared_error(gradient, self._parsed[place])
        row[-1] += times * _energy(gradient)

    def layers(self, default: str, cost: Cost = nbytes) -> tuple[Layer, ...]:
        """The rows, with what sending costs.

        A tensor whose gradient was zero everywhere has shown nothing: it has no choice but
        `default`. ValueError where an error is not finite, as a gradient was not.
        """
        rows = []
        for info, (*errors, energy) in zip(self.infos.values(), self.table.tolist(), strict=True):
            name = info.key or ""
            texts = candidates(info, self.schemes)
            if energy == 0 and default in texts:
                texts = (default,)
            by_text = dict(zip(self.schemes, errors, strict=True))
            costs = tuple(cost(info, Scheme.parse(text)) for text in texts)
            found = tuple(by_text.get(text, 0.0) for text in texts)
            rows.append(Layer(name, info.numel, texts, found, costs))
        return tuple(rows)


def _sampled(x: torch.Tensor, most: int | None) -> tuple[torch.Tensor, float]:
    """About `most` elements of flat `x` in runs of `RUN`, and how many times more there are."""
    runs = x.numel() // RUN
    if most is None or x.numel() <= most:
        return x, 1.0
    # at random: regular steps would meet the same columns of a matrix again and again
    order = torch.randperm(runs, generator=torch.Generator().manual_seed(runs))
    taken = order[: max(1, most // RUN)].to(x.device)
    part = x[: runs * RUN].view(runs, RUN)[taken].reshape(-1)
    return part, x.numel() / part.numel()


def _energy(x: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()
