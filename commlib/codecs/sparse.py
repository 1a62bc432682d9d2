"""``topk|inner``, ``randk|inner``: only some elements travel, and the inner codec codes these.

::

    topk    the k = ceil(density m) largest magnitudes of every m elements; of equal ones the first
    randk   one element at random of each of k parts of every m; the same ones on all ranks

    wire:   | positions (topk) or the number they are drawn from (randk) | the inner codec's |

m is `block`, or all that a payload holds of a parameter. What does not travel decodes to zero, and
with error feedback stays in the residual: ``topk:density=0.01|int8+ef``. Positions take
log2(m / k) + 2 bits each, about 8.6 at 1%. Where one of the values that travel is not finite, all
of the piece is NaN on all ranks, and its residual stays as it was. randk looks at all elements for
that; topk sends what is not finite first.

Sources: Aji and Heafield 2017 (arXiv 1704.05021); Stich et al. 2018, "Sparsified SGD with memory"
(arXiv 1809.07599); random-k unbiased: Wangni et al. 2018 (arXiv 1710.09854).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from commlib.codecs.base import Codec, Round
from commlib_kernels import Format, Layout
from commlib_kernels.compact import chosen
from commlib_kernels.sparse import Sparse

MIN_RUN, MAX_RUN = 32, 65536


@dataclass(frozen=True)
class _Chosen(Codec):
    """What both have in common."""

    name: ClassVar[str]

    inner: Codec
    density: float = 0.01
    block: int | None = None

    def __post_init__(self) -> None:
        given = f"{self.name}|{self.inner}"
        if self.inner.format.sparse is not None:
            raise ValueError(f"{given}: {self.inner.id} is sparse already; once is enough")
        if not self.inner.fixed_size:
            raise ValueError(f"{given}: sparse messages have a fixed size; leave |entropy out")
        if self.inner.format.kind == "buckets":
            raise ValueError(
                f"{given}: the means of {self.inner.id}'s buckets would take more bytes than a few "
                "values; give int8"
            )
        if self.inner.format.per_segment:
            raise ValueError(
                f"{given}: the values that travel have no segments; give {self.inner.id} a block "
                "size instead of block=tensor"
            )
        number = isinstance(self.density, int | float) and not isinstance(self.density, bool)
        if not number or not 0 < self.density <= 1:
            raise ValueError(
                f"{self.name}: density={self.density!r}; allowed: above 0, at most 1, such as 0.01"
            )
        # 1 and 1.0 are one configuration and have one text.
        object.__setattr__(self, "density", float(self.density))
        run = self.block
        if run is not None and not (
            isinstance(run, int) and MIN_RUN <= run <= MAX_RUN and run % 8 == 0
        ):
            raise ValueError(
                f"{self.name}: block={run!r}; allowed: multiples of 8 from {MIN_RUN} to {MAX_RUN}, "
                "or none: all that a payload holds of a parameter"
            )

    @property
    def id(self) -> str:
        """topk|INNER's id."""
        return f"{self.name}|{self.inner.id}"

    @property
    def sparse(self) -> Sparse:
        """What the format says about which elements travel."""
        rule: Literal["topk", "randk"] = "topk" if self.name == "topk" else "randk"
        return Sparse(rule, self.density, self.block or 0)

    @property
    def format(self) -> Format:
        """The inner format, of the values that travel."""
        return replace(self.inner.format, sparse=self.sparse)

    @property
    def unbiased(self) -> bool:
        """What does not travel is missing."""
        return False

    def gamma(self, numel: int | None = None) -> float:
        """``1 - density (1 - gamma of the inner codec)``, or that gamma where it is above 1.

        The largest k of m elements have at least k / m of their squares; k elements at random have
        that on average. What travels loses at most the inner codec's share of itself.
        """
        inner = self.inner.gamma(None)
        return max(1 - self.density * (1 - inner), inner)

    def __str__(self) -> str:
        options = [f":density={self.density!r}"] if self.density != 0.01 else []
        options += [f":block={self.block}"] if self.block is not None else []
        return f"{self.name}{''.join(options)}|{self.inner}"


@dataclass(frozen=True)
class TopK(_Chosen):
    """The largest magnitudes, exactly.

    Args:
        inner: codes the values, in the order of their positions; with blocks and scales of its own.
            bf16 or int8 are good; fp16 overflows above 65504, which large residuals may reach.
        density: elements that travel, as a fraction above 0, at most 1.
        block: elements that compete with one another, a multiple of 8 from 32 to 65536; None: all
            that a payload holds of a parameter.
    """

    name: ClassVar[str] = "topk"

    def rounded(self, default: Round) -> "TopK":
        """The inner codec's rounding."""
        return replace(self, inner=self.inner.rounded(default))


@dataclass(frozen=True)
class RandK(_Chosen):
    """A random choice that all ranks share: no positions travel, and the network may add.

    Args:
        inner: codes the values. With fp32, bf16 or fp16, ``@native`` adds them in the network.
        density: elements that travel, as a fraction above 0, at most 1.
        block: elements of a choice, as for topk; None: all that a payload holds of a parameter.
        scale: unbiased: values are sent times m / k, so that their mean over steps is v; none: as
            they are, which only error feedback makes good. By default unbiased for gradients
            without feedback, else none.
    """

    name: ClassVar[str] = "randk"

    scale: Literal["unbiased", "none"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in (None, "unbiased", "none"):
            raise ValueError(f"randk: scale={self.scale!r}; allowed: unbiased, none")

    @property
    def sum_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        """The inner codec's."""
        return self.inner.sum_dtype

    @property
    def sparse(self) -> Sparse:
        """What the format says about which elements travel."""
        return replace(super().sparse, scaled=self.scale == "unbiased")

    @property
    def unbiased(self) -> bool:
        """Where values are scaled; casts lose less than matters."""
        return self.scale == "unbiased" and (
            self.inner.unbiased or self.inner.sum_dtype is not None
        )

    def gamma(self, numel: int | None = None) -> float:
        """On average over choices, where values are scaled: with g the inner codec's gamma

        ``(1 + g) / density - 1``, and where that is biased, with ``s = 1 + sqrt(g)``,
        ``s^2 / density - 2 s + 1``: its error may point along the values.
        """
        if self.scale != "unbiased":
            return super().gamma(numel)
        g = self.inner.gamma(None)
        if self.unbiased:
            return (1 + g) / self.density - 1
        s = 1 + math.sqrt(g)
        return s * s / self.density - 2 * s + 1

    def rounded(self, default: Round) -> "RandK":
        """The inner codec's rounding; scaled where the default is an unbiased one."""
        scale = self.scale or ("unbiased" if default == "stochastic" else "none")
        return replace(self, inner=self.inner.rounded(default), scale=scale)

    def not_added(self, layout: Layout) -> tuple[slice, ...]:
        """Where a wire names its choices."""
        found = chosen(layout, self.format)
        return tuple(slice(c.piece.code, c.piece.code + 16) for c in found)

    def __str__(self) -> str:
        front, _, behind = super().__str__().partition("|")
        return f"{front}:scale={self.scale}|{behind}" if self.scale else f"{front}|{behind}"
