"""The last 16 bytes of a point-to-point message: what it is, and whether it arrived whole.

    4 x uint32, little-endian:  | wire version | scheme digest | message number | crc32 |

The crc32 (zlib's) covers the bytes before the stamp. They stand at the end, so that a kernel may
code straight into the front of an aligned buffer.

On CUDA tensors the crc32 is 0 and nothing is checked, unless COMMLIB_CHECK=1: to read either, the
host would wait for the device. Both ends of a message have the same setting.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any

import torch

WIRE_VERSION = 1
STAMP = struct.Struct("<4I")
BYTES = STAMP.size
FIELDS = ("wire version", "scheme digest", "message number", "crc32")
WORD = 0xFFFFFFFF


def digest(text: str) -> int:
    """The scheme digest of a stamp: crc32 of the scheme's text."""
    return zlib.crc32(text.encode())


def crc(x: torch.Tensor) -> int:
    """crc32 of a tensor's bytes; of one on a device, the host waits for it."""
    flat = x.detach().contiguous().as_strided((x.numel(),), (1,))  # a lone value has any stride
    data: Any = flat.view(torch.uint8).cpu().numpy()
    return zlib.crc32(data)


def checking() -> bool:
    """Whether COMMLIB_CHECK=1. ValueError where it is neither 0 nor 1."""
    value = os.environ.get("COMMLIB_CHECK", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"COMMLIB_CHECK={value!r}; allowed: 0, 1")
    return value == "1"


def seal(wire: torch.Tensor, scheme_digest: int, number: int) -> None:
    """Write the stamp into the last 16 bytes of flat uint8 `wire`; `number` counts modulo 2^32."""
    body, end = wire[:-BYTES], wire[-BYTES:]
    total = 0 if _unread(wire) else crc(body)
    text = STAMP.pack(WIRE_VERSION, scheme_digest, number & WORD, total)
    # not blocking: else the host waits for the device; 16 bytes are staged before this returns
    end.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8), non_blocking=True)


def check(wire: torch.Tensor, scheme_digest: int, number: int | None, what: str) -> int:
    """Compare the stamp of a `wire` that arrived with what was expected; the number it bears.

    number: None accepts any. what: names the message in the error, such as "message 3 from rank 1".

    Raises: RuntimeError: another version, scheme or number, or bytes that changed on the way.
    """
    if _unread(wire):
        return number or 0
    got = STAMP.unpack(bytes(wire[-BYTES:].tolist()))
    wanted_number = got[2] if number is None else number & WORD
    expected = (WIRE_VERSION, scheme_digest, wanted_number, crc(wire[:-BYTES]))
    for name, found, wanted in zip(FIELDS, got, expected, strict=True):
        if found != wanted:
            raise RuntimeError(
                f"{what}: its {name} is {found:#x}, expected {wanted:#x} ({wire.nbytes} bytes)"
            )
    return int(got[2])


def _unread(wire: torch.Tensor) -> bool:
    return wire.is_cuda and not checking()
