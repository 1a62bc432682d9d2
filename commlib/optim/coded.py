"""Coded: tensors of one layout as numbered, stamped messages, in one direction of a link.

Both ends make one of the same arguments. What the receiver decodes is what the sender gets back
from `encode`, bit for bit: both apply that, and neither the value that was coded.

    wire    | payload: codes, scales | stamp, 16 bytes |

Elements that are not finite arrive as 0, at both ends alike: an update that is none moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from commlib import stamp
from commlib.algorithms import PowerSGD
from commlib.eager import eager
from commlib.feedback import Compressor, Plain
from commlib.modes import OF_PIPELINES
from commlib.scheme import DTYPES, Role, Scheme, check_fixed_size
from commlib_kernels.layout import Layout, aligned


class Coded:
    """One end of one direction.

    Args:
        name: of the direction, the same at both ends and no other's.
        scheme: codec and, at the sender, feedback; its algorithm, of collectives, is not used.
        sizes: elements of each tensor, coded back to back; blocks restart at each.
        dtype: of the tensors. All but fp32, fp16 and bf16 travel raw.
        sends: whether this is the sender's end.
        seed: of the random streams.

    Raises: ValueError: a codec whose messages have no fixed size; a feedback of pipelines; low
        rank, which is an algorithm.
    """

    def __init__(
        self,
        name: str,
        scheme: Scheme,
        sizes: Sequence[int],
        dtype: torch.dtype,
        *,
        sends: bool,
        seed: int = 0,
    ) -> None:
        check_fixed_size(scheme.codec, "a link to a centre", "")
        self.name, self.dtype, self.numel = name, dtype, sum(sizes)
        self.number = 0
        """Messages so far."""
        self._raw = scheme.lossless or dtype not in DTYPES
        self._key = tuple(f"{name}/{place}" for place in range(len(sizes)))
        self._layout = Layout(tuple(sizes), dtype)
        if isinstance(scheme.feedback, OF_PIPELINES):
            raise ValueError(
                f"{scheme}: {scheme.feedback.id} is a mode of pipeline stages; use "
                f"{scheme.codec}+ef for updates, {scheme.codec} for copies"
            )
        if isinstance(scheme.algorithm, PowerSGD):
            raise ValueError(
                f"{scheme}: a link to a centre knows no low rank; use a codec, as in int4+ef"
            )
        self._compressor = Compressor(scheme.codec, scheme.feedback if sends else Plain(), seed)
        body = self.numel * dtype.itemsize
        self._body = body if self._raw else scheme.codec.nbytes(self._layout)
        self.nbytes = aligned(self._body) + stamp.BYTES
        """Bytes of a message."""
        self._digest = stamp.digest(f"{scheme} {name}")

    @eager
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat `x` as the next message; what its receiver will decode."""
        wire = torch.zeros(self.nbytes, dtype=torch.uint8)
        self.number += 1
        self._compressor.advance(self._key)
        if self._raw:
            wire[: self._body] = x.detach().contiguous().view(torch.uint8)
        else:
            self._compressor.compress(self._key, x.detach(), wire[: self._body], self._layout)
        stamp.seal(wire, self._digest, self.number)
        return wire, self._decoded(wire)

    @eager
    def decode(self, wire: torch.Tensor) -> torch.Tensor:
        """What the next message holds, flat.

        Raises: RuntimeError: it is not the message expected, or has changed on the way; nothing
            has changed here.
        """
        if wire.numel() != self.nbytes:
            raise RuntimeError(
                f"message {self.number + 1} of {self.name} has {wire.numel()} bytes, expected "
                f"{self.nbytes}"
            )
        number = self.number + 1
        stamp.check(wire, self._digest, number, f"message {number} of {self.name}")
        self.number = number
        self._compressor.advance(self._key)
        return self._decoded(wire)

    def _decoded(self, wire: torch.Tensor) -> torch.Tensor:
        if self._raw:
            out = wire[: self._body].clone().view(self.dtype)
        else:
            out = torch.empty(self.numel, dtype=self.dtype)
            self._compressor.decompress(self._key, wire[: self._body], out, self._layout)
        return torch.nan_to_num_(out, nan=0.0, posinf=0.0, neginf=0.0)

    def residual(self) -> torch.Tensor | None:
        """What earlier tensors left to be sent, flat, a copy; None: there is no feedback.

        As stored: of an int8 residual the codes, zero where the residual is.
        """
        held = self._compressor.state_dict()["residuals"]
        return torch.cat([held[n] for n in self._key if n in held]) if held else None

    def drop(self, elements: torch.Tensor) -> None:
        """Set the residual to zero where flat bool `elements` says so."""
        state = self._compressor.state_dict()
        held, place = state["residuals"], 0
        for one in (held[name] for name in self._key if name in held):
            one[elements[place : place + one.numel()]] = 0
            place += one.numel()
        self._compressor.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """The number of messages, residuals and the place in the random streams."""
        return {"number": self.number, "compressor": self._compressor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._compressor.load_state_dict(state["compressor"])
        self.number = int(state["number"])


def resolved(text: str | Scheme, role: Role) -> Scheme:
    """A scheme for one direction, with its rounding chosen.

    Raises: ValueError: no such scheme.
    """
    return (text if isinstance(text, Scheme) else Scheme.parse(text)).resolve(role)
