"""Codec: a value that says how a tensor becomes bytes. No state, no network.

A codec is a frozen dataclass: equal configurations are equal objects, `repr` is the constructor
call, and `str` is the text that `codec()` reads back. The bytes themselves are made by
`commlib_kernels`; a codec only names their format and knows how good it is.
"""

from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields, replace
from typing import ClassVar, Literal, Self, TypeGuard

import torch

import commlib_kernels as kernels
from commlib_kernels import Format, Layout, Memory, Tag

Round = Literal["nearest", "stochastic"]
Block = int | Literal["tensor"]

MIN_BLOCK, MAX_BLOCK = 32, 4096


@dataclass(frozen=True)
class Codec(ABC):
    """How a tensor becomes bytes, and back."""

    fixed_size: ClassVar[bool] = True
    """Whether the layout alone says how long a message is."""
    sum_dtype: ClassVar[torch.dtype | None] = None
    """The network itself may add payloads viewed as this dtype; None: it may not."""

    name: ClassVar[str] = ""

    @property
    def id(self) -> str:
        """The name in scheme texts."""
        return self.name

    @property
    @abstractmethod
    def format(self) -> Format:
        """The wire format that the kernels write and read."""

    @property
    def unbiased(self) -> bool:
        """Whether ``E[Q(v)] = v``: with stochastic rounding."""
        return getattr(self, "round", None) == "stochastic"

    @abstractmethod
    def gamma(self, numel: int | None = None) -> float:
        """Worst case of ``|Q(v) - v|^2 / |v|^2`` (expected value where rounding is random).

        Args:
            numel: elements that share a scale where the block is the whole tensor.
        """

    @property
    def align(self) -> int:
        """A tensor may be cut at multiples of this many elements."""
        return self.format.align

    @property
    def sliceable(self) -> bool:
        """Whether a message may be cut into slices: not with a scale per tensor, nor if sparse."""
        return self.format.sliceable

    @property
    def bits_per_element(self) -> float:
        """Bits on the wire per element of a long fp32 tensor, scales included."""
        long = Layout((1 << 20,), align=self.align)
        return 8 * self.nbytes(long) / long.numel

    def rounded(self, default: Round) -> Self:
        """This codec with its rounding chosen: the user's, else `default`."""
        if getattr(self, "round", "nearest") is None:
            return replace(self, round=default)  # type: ignore[call-arg]
        return self

    def nbytes(self, layout: Layout) -> int:
        """Bytes of the wire for `layout`; the most it takes where not `fixed_size`."""
        return kernels.nbytes(layout, self.format)

    def expected(self, layout: Layout) -> int:
        """Bytes that a message probably takes: `nbytes`, but where sizes depend on the data."""
        return self.nbytes(layout)

    def sizes(self, wire: torch.Tensor, layout: Layout) -> tuple[int, ...]:
        """Bytes of each payload in `wire`, which lie one after the other."""
        count = len(layout.payloads)
        return (self.nbytes(layout) // count,) * count

    def not_added(self, layout: Layout) -> tuple[slice, ...]:
        """Bytes of a wire that a network which adds payloads must leave: alike on all ranks."""
        del layout
        return ()

    def encode(
        self,
        x: torch.Tensor,
        wire: torch.Tensor,
        layout: Layout,
        tag: Tag,
        memory: Memory | None = None,
    ) -> int:
        """Code flat `x` into `wire` (uint8); returns the bytes used.

        With `memory` the residual is added before coding and renewed after it, in one pass.
        """
        kernels.quantize(self.format, x, wire, layout, tag, memory)
        return wire.numel()

    def decode(
        self,
        wire: torch.Tensor,
        out: torch.Tensor,
        layout: Layout,
        tag: Tag,
        *,
        add: bool = False,
    ) -> None:
        """Decode `wire` into the elements of flat `out` that it covers, or add it to them."""
        del tag  # the formats so far decode without random numbers
        kernels.dequantize(self.format, wire, out, layout, add=add)

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
        """Sum all ranks' payloads of one chunk in rank order and fp32, times `factor`.

        Args:
            wires: payloads of rank 0 .. W-1 one after the other.
            out: a wire (coded again, with the owner's `memory`) or the dense chunk.
            layout: of the chunk, `Layout.only(rank)`.

        Returns: the bytes used of `out`.
        """
        kernels.reduce(self.format, wires, out, layout, tag, factor=factor, memory=memory)
        return out.nbytes

    def __str__(self) -> str:
        options = [
            f":{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in self._named and getattr(self, f.name) != f.default
        ]
        return self.id + "".join(options)

    @property
    def _named(self) -> tuple[str, ...]:
        """Fields that the id already says."""
        return ()


def check_block(codec: Codec, block: Block, *, tensor: bool) -> None:
    """Refuse a block size that no kernel serves."""
    if block == "tensor" and tensor:
        return
    good = is_whole(block) and MIN_BLOCK <= block <= MAX_BLOCK and block % 8 == 0
    if not good:
        also = ' or "tensor"' if tensor else ""
        raise ValueError(
            f"{codec.id}: block={block!r}; allowed: multiples of 8 from {MIN_BLOCK} to "
            f"{MAX_BLOCK}{also}"
        )


def is_whole(number: object) -> TypeGuard[int]:
    """Whether it is an int: True and 7.0 are equal to some, but have other texts."""
    return isinstance(number, int) and not isinstance(number, bool)


def check_round(codec: Codec, round: Round | None) -> None:
    """Refuse a rounding that does not exist."""
    if round not in (None, "nearest", "stochastic"):
        raise ValueError(f"{codec.id}: round={round!r}; allowed: nearest, stochastic")


def options(codec: type[Codec]) -> dict[str, object]:
    """Option names of a codec and their defaults."""
    return {f.name: None if f.default is MISSING else f.default for f in fields(codec)}
