"""``inner|entropy``: the inner codec's wire, losslessly in fewer bytes.

::

    int4|entropy    rotate|grid4|entropy    fp32|entropy, which loses nothing at all

Every payload is coded for itself by how often its symbols occur: codes, the exponents of scales
and of what travels raw. What that does not make smaller stays as it is, so a message has at most 16
bytes per payload more than the inner codec's, and all it decodes to are the same bits. Of bf16
weights ``fp32|entropy`` (raw: a tensor's own bytes) leaves about two thirds; codes of 4 bits of
normal data with a scale by the absolute maximum need 3.5.

The size of a message depends on its data: collectives exchange sizes first. How: kernels/README.md,
section 8. Sources: rANS, Duda 2013 (arXiv 1311.2540), interleaved as in Giesen 2014 (arXiv
1402.3392); exponents apart, as in DFloat11 (Zhang et al. 2025, arXiv 2504.11651).
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch

import commlib_kernels as kernels
from commlib.codecs.base import Codec, Round
from commlib_kernels import Format, Layout, Memory, Tag

NORMAL = 1 << 18
"""Elements of normal data by which sizes are foretold."""


@dataclass(frozen=True)
class Entropy(Codec):
    """`inner`, squeezed. Messages have fewer bytes than `nbytes` says, which is the most.

    Args:
        inner: any codec of fixed size.
    """

    inner: Codec
    fixed_size: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.inner.fixed_size:
            raise ValueError(f"{self.inner}|entropy: already squeezed; once is enough")
        if self.inner.format.sparse is not None:
            raise ValueError(
                f"{self.inner}|entropy: positions are coded close to their entropy already, and "
                "little else travels; write the sparse codec alone"
            )

    @property
    def id(self) -> str:
        """INNER's id|entropy."""
        return f"{self.inner.id}|entropy"

    @property
    def format(self) -> Format:
        """The inner codec's: that of the wire before it is squeezed."""
        return self.inner.format

    @property
    def unbiased(self) -> bool:
        """Where the inner codec is: nothing is lost."""
        return self.inner.unbiased

    def gamma(self, numel: int | None = None) -> float:
        """The inner codec's."""
        return self.inner.gamma(numel)

    @property
    def bits_per_element(self) -> float:
        """Bits on the wire per element of a long fp32 tensor of normal data, measured once."""
        return _share(self.inner, torch.float32) * self.inner.bits_per_element

    def rounded(self, default: Round) -> "Entropy":
        """The inner codec's rounding."""
        return replace(self, inner=self.inner.rounded(default))

    def nbytes(self, layout: Layout) -> int:
        """The most bytes that a message takes."""
        return kernels.squeezed_bound(layout, self.format)

    def expected(self, layout: Layout) -> int:
        """Bytes that a message takes if its data is normal, and long."""
        inner = self.inner.nbytes(layout) * _share(self.inner, layout.dtype)
        return min(self.nbytes(layout), int(inner) + 16 * len(layout.payloads))

    def sizes(self, wire: torch.Tensor, layout: Layout) -> tuple[int, ...]:
        """Bytes of each payload, as their headers say; RuntimeError where one cannot be."""
        return kernels.squeezed_sizes(wire, len(layout.payloads))

    def warmup(self, device: torch.device) -> None:
        """Compile what squeezes; ValueError where nothing does."""
        _on_cpu(self, device)
        compiles = getattr(kernels.backend_for(device, "squeeze"), "warmup_squeeze", None)
        if compiles is not None:
            compiles()

    def encode(
        self,
        x: torch.Tensor,
        wire: torch.Tensor,
        layout: Layout,
        tag: Tag,
        memory: Memory | None = None,
    ) -> int:
        """Code flat `x` into `wire`, payloads without gaps; returns the bytes used."""
        _on_cpu(self, x.device)
        fixed = torch.empty(self.inner.nbytes(layout), dtype=torch.uint8)
        self.inner.encode(x, fixed, layout, tag, memory)
        return kernels.squeeze(self.format, fixed, wire, layout)

    def decode(
        self,
        wire: torch.Tensor,
        out: torch.Tensor,
        layout: Layout,
        tag: Tag,
        *,
        add: bool = False,
    ) -> None:
        """Decode the payloads at the start of `wire`; RuntimeError where they are none."""
        _on_cpu(self, out.device)
        fixed = torch.empty(self.inner.nbytes(layout), dtype=torch.uint8)
        kernels.expand(self.format, wire, fixed, layout)
        self.inner.decode(fixed, out, layout, tag, add=add)

    def reduce(
        self,
        wires: torch.Tensor,
        out: torch.Tensor,
        layout: Layout,
        tag: Tag,
        *,
        factor: float = 1.0,
        memory: Memory | None = None,
    ) -> int:
        """As `Codec.reduce`; `wires` are payloads without gaps, and nothing behind them.

        Returns: bytes used of `out`, where that is a wire.

        Raises: RuntimeError: they are none of this layout, or not one for each of its ranks.
        """
        _on_cpu(self, out.device)
        count, size = len(kernels.squeezed_sizes(wires)), self.inner.nbytes(layout)
        if count != layout.ranks:  # before there is memory for them: who knows what came
            raise RuntimeError(
                f"{self}: {count} squeezed payloads arrived for a sum over {layout.ranks} ranks"
            )
        fixed = torch.empty(count * size, dtype=torch.uint8)
        if size:
            kernels.expand(self.format, wires, fixed, layout)
        if out.dtype != torch.uint8:
            self.inner.reduce(fixed, out, layout, tag, factor=factor, memory=memory)
            return out.nbytes
        total = torch.empty(size, dtype=torch.uint8)
        self.inner.reduce(fixed, total, layout, tag, factor=factor, memory=memory)
        return kernels.squeeze(self.format, total, out, layout)

    def __str__(self) -> str:
        return f"{self.inner}|entropy"


def _on_cpu(codec: Codec, device: torch.device) -> None:
    if device.type != "cpu":
        raise ValueError(
            f"{codec}: the tensor is on {device}, and entropy has kernels for the CPU only; use "
            f"{str(codec).removesuffix('|entropy')}"
        )


@lru_cache(maxsize=256)
def _share(inner: Codec, dtype: torch.dtype) -> float:
    """Bytes after squeezing by bytes before, of normal data."""
    c = Entropy(inner.rounded("nearest"))
    x = torch.randn(NORMAL, generator=torch.Generator().manual_seed(0)).to(dtype)
    layout = Layout((NORMAL,), dtype, align=c.align)
    wire = torch.empty(c.nbytes(layout), dtype=torch.uint8)
    # Ranks decide by it, whose libraries may differ in the last bits of a random number.
    return round(c.encode(x, wire, layout, Tag()) / c.inner.nbytes(layout), 3)
