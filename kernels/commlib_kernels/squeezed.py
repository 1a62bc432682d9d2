"""Squeezed payloads: the fixed-size wire of any format, losslessly in fewer bytes.

The codes, the scales and the raw pieces of a payload are three *sections*. A section becomes
symbols of a byte each, which a coder codes by how often each occurs, and bytes that are kept plain;
where that does not pay, it is stored as it is::

    payload:  | header, 16 bytes | codes | scales | raw pieces |    each starts at a multiple of 16

Payloads follow one another without gaps; the header says where the next begins. What is done with
the symbols is the backends' (`Coder`); all about it is in kernels/README.md, section 8.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from commlib_kernels.formats import Format
from commlib_kernels.layout import SECTION, Layout, aligned, nbytes, pieces, stride

Bytes = npt.NDArray[np.uint8]
Split = Literal["bytes", "codes", "words"]

HEADER = struct.Struct("<QB7x")
"""Bytes of the payload, header included; bit k: section k is coded."""

LANES = 8
"""Coder states; symbol i belongs to state i mod 8."""
PROB_BITS = 12
"""Frequencies of symbols add up to 2^12."""
LOW = 1 << 16
"""States are in [2^16, 2^32): where coding begins, and decoding ends."""
SPARE = 2 * LANES
"""Bytes that a stream must leave of its room: a coder asks before every eight symbols."""
STATES_AT = 4 + 32
"""Of a stream: number of words (4 bytes), then which symbols occur (256 bits), frequencies, .."""

PROBLEMS = {
    -1: "it ends too early",
    -2: "a frequency is 0 or larger than 4095",
    -3: "its frequencies do not add up to 4096",
    -4: "it has a symbol that the format does not have",
    -5: "its words do not end where its symbols end",
}
"""What decoders say of a stream that no encoder wrote."""


class Section(NamedTuple):
    """A part of a payload that is coded together.

    split: "bytes": each is a symbol; "codes": each code is one, unpacked from its planes; "words":
    the highest byte is one after a rotation by a bit to the left, which puts the exponent there and
    the sign last; the others are plain.
    """

    split: Split
    width: int  # bits of a code, bytes of a word
    block: int
    runs: tuple[tuple[int, int], ...]  # (first byte in the payload, bytes)

    @property
    def nbytes(self) -> int:
        """As it is on the wire, without padding."""
        return sum(size for _, size in self.runs)

    @property
    def symbols(self) -> int:
        """How many there are."""
        if self.split == "codes":
            return self.nbytes * 8 // self.width
        return self.nbytes // (self.width if self.split == "words" else 1)

    @property
    def plain(self) -> int:
        """Bytes that are kept."""
        return self.symbols * (self.width - 1) if self.split == "words" else 0

    @property
    def alphabet(self) -> int:
        """Symbols are below this."""
        return 1 << self.width if self.split == "codes" else 256


class Coder(Protocol):
    """What a backend does with a section."""

    def split(self, section: Section, payload: Bytes) -> tuple[Bytes, Bytes]:
        """(symbols, plain bytes)"""

    def merge(self, section: Section, symbols: Bytes, plain: Bytes, payload: Bytes) -> None:
        """The inverse, into `payload`."""

    def encode(self, symbols: Bytes, out: Bytes) -> int:
        """Write the stream of `symbols`; its bytes, or 0 where `out` is too small for it."""

    def decode(self, data: Bytes, symbols: Bytes, alphabet: int) -> int:
        """Read as many symbols as there is room for; the bytes read, or one of `PROBLEMS`."""


@lru_cache(maxsize=4096)
def sections(layout: Layout, fmt: Format, index: int) -> tuple[Section, ...]:
    """The sections of the message's payload number `index`."""
    count, base = len(layout.sizes), index * stride(layout, fmt)
    mine = pieces(layout, fmt)[index * count : (index + 1) * count]
    coded = [p for p in mine if not p.exact and p.numel]
    codes = tuple((p.code - base, fmt.code_bytes(p.numel)) for p in coded)
    scales = sum(fmt.scale_bytes * fmt.scale_count(p.numel) for p in coded)
    itemsize = layout.dtype.itemsize
    raw = tuple((p.code - base, p.numel * itemsize) for p in mine if p.exact and p.numel)
    split: Split = "codes" if fmt.bits in (3, 5, 6, 7) else "bytes"
    if fmt.kind in ("fp16", "bf16"):
        split = "words"
    return (
        Section(split, 2 if split == "words" else fmt.bits, fmt.block, codes),
        Section(
            "words" if fmt.scale_bytes == 2 else "bytes",
            fmt.scale_bytes,
            1,
            ((coded[0].scale - base, scales),) if scales else (),
        ),
        Section("words", itemsize, 1, raw),
    )


def bound(layout: Layout, fmt: Format) -> int:
    """The most bytes that a message takes: 16 more than its wire per payload."""
    return nbytes(layout, fmt) + HEADER.size * len(layout.payloads)


def sizes(squeezed: Bytes, count: int | None = None) -> tuple[int, ...]:
    """Bytes of each of `count` payloads, one after the other; None: of all.

    Raises: RuntimeError: a header is cut off, or no header.
    """
    found: list[int] = []
    start, end = 0, squeezed.size
    while start < end if count is None else len(found) < count:
        if end - start < HEADER.size:
            raise RuntimeError(f"squeezed payload {len(found)}: its header is cut off")
        used = int.from_bytes(squeezed[start : start + 8].tobytes(), "little")
        if used % SECTION or not HEADER.size <= used <= end - start:
            raise RuntimeError(
                f"squeezed payload {len(found)} says it has {used} bytes; there are "
                f"{end - start}, and sizes are multiples of {SECTION}: it is not what was sent"
            )
        found.append(used)
        start += used
    return tuple(found)


def squeeze(coder: Coder, fmt: Format, wire: Bytes, out: Bytes, layout: Layout) -> int:
    """Every payload of `wire` to `out`; the bytes used."""
    size, start = stride(layout, fmt), 0
    for index in range(len(layout.payloads)):
        payload = wire[index * size : (index + 1) * size]
        end, coded = start + HEADER.size, 0
        for number, section in enumerate(sections(layout, fmt, index)):
            stored = section.nbytes
            used = _coded(coder, section, payload, out[end : end + stored])
            coded |= (used < stored) << number
            if used == stored:
                at = end
                for first, length in section.runs:
                    out[at : at + length] = payload[first : first + length]
                    at += length
            out[end + used : end + aligned(used)] = 0
            end += aligned(used)
        out[start : start + HEADER.size] = np.frombuffer(HEADER.pack(end - start, coded), np.uint8)
        start = end
    return start


def _coded(coder: Coder, section: Section, payload: Bytes, out: Bytes) -> int:
    """Code a section into `out`; the bytes used, all of them where that does not pay."""
    room = out.size - section.plain - 1
    if room < STATES_AT + 4 * LANES + SPARE:
        return out.size
    symbols, plain = coder.split(section, payload)
    used = coder.encode(symbols, out[:room])
    if not used:
        return out.size
    out[used : used + plain.size] = plain
    return used + plain.size


def expand(coder: Coder, fmt: Format, squeezed: Bytes, wire: Bytes, layout: Layout) -> None:
    """Payloads of `squeezed` back to `wire`, as many as it holds.

    Raises: RuntimeError: they are not what `squeeze` wrote for this layout and format.
    """
    size, start = stride(layout, fmt), 0
    count = wire.size // size if size else len(layout.payloads)
    for number, used in enumerate(sizes(squeezed, count)):
        index = 0 if layout.chunk is not None else number
        data = squeezed[start : start + used]
        payload = wire[number * size : (number + 1) * size]
        try:
            _expand(coder, sections(layout, fmt, index), data, payload)
        except ValueError as error:
            raise RuntimeError(
                f"squeezed payload {number} of {count} is not what was sent, or of another "
                f"layout or codec: {error}"
            ) from error
        start += used


def _expand(coder: Coder, parts: Sequence[Section], data: Bytes, payload: Bytes) -> None:
    coded, end = int(data[8]), HEADER.size
    if coded >> len(parts) or data[9 : HEADER.size].any():
        raise ValueError("its header has bits that none has")
    for number, section in enumerate(parts):
        start = end
        if not coded >> number & 1:
            end += section.nbytes
            if end > data.size:
                raise ValueError(f"section {number} is cut off")
            for first, length in section.runs:
                payload[first : first + length] = data[start : start + length]
                start += length
        else:
            symbols = np.empty(section.symbols, np.uint8)
            used = coder.decode(data[start:], symbols, section.alphabet)
            if used < 0:
                raise ValueError(f"section {number}: {PROBLEMS[used]}")
            end += used + section.plain
            if end > data.size:
                raise ValueError(f"section {number} is cut off")
            coder.merge(section, symbols, data[start + used : end], payload)
        end = aligned(end)
    if end != data.size:
        raise ValueError(f"its sections have {end} bytes, it has {data.size}")
