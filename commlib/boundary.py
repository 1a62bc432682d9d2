"""Boundary: one tensor's way from one pipeline stage to the next, in one direction.

Both ends make one, of the same arguments, and tell it the same of every step: so both know the size
of a message before it is sent, and what they remember stays bitwise equal.

    sender     begin(step)   encode(x, wire)     per micro-batch     end()
    receiver   begin(step)   decode(wire, out)                       end()

    wire       | payload: codes, scales, first visits raw | stamp, 16 bytes |

By the scheme's memory (`modes`):

    none       Q(a)
    +delta     per sample: a on first visits, then Q(a - m), where m is what both ends hold of it
    +reuse     per micro-batch: a where the batch is fresh, then Q(a - m)
    +lep       Q(g + h), the residual h of the micro-batch before; only the sender holds it

With a reference the stage computes on m + Q(a - m). A block that is not finite arrives as NaN and
leaves the reference as it was.

Boundaries share nothing: threads may work on different ones at once, not on the same.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from commlib_kernels.layout import Layout, aligned

from . import stamp
from .copies import clean
from .feedback import Compressor, Key
from .modes import Delta, ErrorFeedback, Lep, Plain, Reuse
from .references import References
from .scheme import DTYPES, Scheme, check_fixed_size

CPU = torch.device("cpu")


class Boundary:
    """One end; see above.

    Args:
        key: the tensor's name, the same at both ends and no other tensor's.
        scheme: codec and memory; its algorithm is not used.
        shape: of one micro-batch's tensor. Dimension 0 counts samples.
        dtype: of the tensor: fp32, fp16 or bf16.
        seed: of the random streams of stochastic codecs.

    Raises: ValueError: error feedback, a dtype that codecs do not take, a tensor without samples,
        a cap that has no room for one, memory that diverges with the codec at this size.
    """

    def __init__(
        self,
        key: str,
        scheme: Scheme,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        device: torch.device = CPU,
        seed: int = 0,
    ) -> None:
        memory = scheme.feedback
        if isinstance(memory, ErrorFeedback):
            raise ValueError(
                f"boundary {key!r}: {scheme} would add the residual of one sample to the next; "
                "use +delta, +reuse, or +lep for gradients"
            )
        if dtype not in DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"boundary {key!r}: {dtype} tensors travel raw; coded are {allowed}")
        if not shape and isinstance(memory, Delta):
            raise ValueError(f"boundary {key!r}: a tensor without dimensions has no samples")
        self.key, self.scheme, self.dtype, self.device = key, scheme, dtype, device
        self.shape, self.numel = tuple(shape), math.prod(shape)
        self.samples = self.shape[0] if self.shape else 1
        residual = memory.residual if isinstance(memory, Lep) else Plain()
        check_fixed_size(scheme.codec, "a boundary between pipeline stages", "")
        self._compressor = Compressor(scheme.codec, residual, seed, device=device)
        self._scheme = told(scheme)
        self._digest = stamp.digest(f"{self._scheme} {key}")
        self._number = 0  # messages so far
        self._name: Key = key
        self._row = self.numel
        self._references: References | None = None
        if isinstance(memory, Delta):
            # segments of one name would round alike
            self._name = tuple(f"{key}/{place}" for place in range(self.samples))
            self._row = self.numel // max(1, self.samples)
            self._references = References(self._row, dtype, memory, device)
        if self._row:
            memory.check(scheme.codec, self._row)
        self._batches: dict[int, torch.Tensor] = {}  # +reuse: what both ends hold of micro-batches
        self._visits: tuple[tuple[int, ...], ...] = ()  # +delta: ids of each micro-batch
        self._layouts: tuple[Layout, ...] = ()  # +delta: first visits are exact
        self._whole_fresh: bool | None = None  # +reuse

    def begin(
        self, samples: Sequence[Sequence[int]] | None = None, fresh: bool | None = None
    ) -> None:
        """Start a step; both ends before its first message.

        Args:
            samples: with +delta, the ids of every micro-batch's samples.
            fresh: with +reuse, whether the batch is another one than in the step before.

        Raises: ValueError or TypeError, and nothing has changed: what the scheme needs is missing,
            a wrong number of ids, an id twice or no whole number, more samples than the cap has
            room for.
        """
        self.check_step(samples, fresh)
        if isinstance(self.scheme.feedback, Reuse):
            self._whole_fresh = bool(fresh)
            if fresh:
                self._batches.clear()
        if self._references is not None and samples is not None:
            visits = tuple(tuple(map(operator.index, ids)) for ids in samples)
            flags = self._references.visit([s for ids in visits for s in ids])
            n, sizes = self.samples, (self._row,) * self.samples
            self._layouts = tuple(
                Layout(sizes, self.dtype, exact=flags[i * n : (i + 1) * n])
                for i in range(len(visits))
            )
            self._visits = visits

    def check_step(
        self, samples: Sequence[Sequence[int]] | None = None, fresh: bool | None = None
    ) -> None:
        """Refuse what `begin` would refuse for being missing or of a wrong number (ValueError)."""
        if isinstance(self.scheme.feedback, Reuse):
            if fresh is None:
                raise ValueError(f"{self.scheme}: a step needs fresh=True or False (LazySampler)")
            if not fresh and not self._batches:
                raise ValueError(f"{self.scheme}: the first step's batch is fresh, got fresh=False")
        if self._references is not None:
            if samples is None:
                raise ValueError(f"{self.scheme}: a step needs the ids of its samples")
            for number, ids in enumerate(samples):
                if len(ids) != self.samples:
                    raise ValueError(
                        f"{self.scheme}: micro-batch {number} has {len(ids)} sample ids for "
                        f"{self.samples} samples"
                    )

    def nbytes(self, microbatch: int = 0) -> int:
        """Bytes of a micro-batch's message."""
        return aligned(self.scheme.codec.nbytes(self._layout(microbatch))) + stamp.BYTES

    def encode(self, x: torch.Tensor, wire: torch.Tensor, microbatch: int = 0) -> None:
        """Code `x` into flat uint8 `wire` of `nbytes`, and renew what is remembered.

        Raises: ValueError, and nothing has changed: no `begin`, or tensors of another size.
        """
        layout = self._layout(microbatch)
        body = self._body(wire, layout)
        self._check("x", x)
        flat = x.detach().reshape(-1)
        held = self._held(microbatch)
        self._number += 1
        self._compressor.advance(self._name)
        if held is None:
            self._compressor.compress(self._name, flat, body, layout)
        else:
            # x - 0.0 is x bit for bit, x - -0.0 is not
            less = held + 0.0 if any(layout.exact) else held
            self._compressor.compress(self._name, flat - less, body, layout)
            self._renew(body, held, held.clone(), layout, microbatch)
        stamp.seal(wire, self._digest, self._number)

    def decode(self, wire: torch.Tensor, out: torch.Tensor, microbatch: int = 0) -> None:
        """Decode `wire` into contiguous `out`, and renew what is remembered.

        Raises: RuntimeError: the message is not the one expected, or has changed on the way.
            ValueError: as `encode`. Nothing has changed.
        """
        layout = self._layout(microbatch)
        body = self._body(wire, layout)
        self._check("out", out)
        if not out.is_contiguous():
            raise ValueError(
                f"boundary {self.key!r}: out must be contiguous: it has "
                f"strides {out.stride()} for {tuple(out.shape)}"
            )
        number = self._number + 1
        stamp.check(wire, self._digest, number, f"message {number} of {self.key}")
        held = self._held(microbatch)
        self._number = number
        self._compressor.advance(self._name)
        flat = out.detach().view(-1)
        if held is None:
            self._compressor.decompress(self._name, body, flat, layout)
        else:
            self._renew(body, held, flat.copy_(held), layout, microbatch)

    def _layout(self, microbatch: int) -> Layout:
        """A segment per sample where samples travel apart, else one."""
        memory = self.scheme.feedback
        if isinstance(memory, Delta):
            if not 0 <= microbatch < len(self._layouts):
                raise ValueError(
                    f"{self.scheme}: micro-batch {microbatch} of a step of {len(self._layouts)}; "
                    "begin(samples) names the samples of all of them"
                )
            return self._layouts[microbatch]
        if isinstance(memory, Reuse):
            if self._whole_fresh is None:
                raise ValueError(f"{self.scheme}: begin(fresh=...) comes before a step's messages")
            if not self._whole_fresh and microbatch not in self._batches:
                raise ValueError(
                    f"{self.scheme}: micro-batch {microbatch} was not sent when the batch was "
                    f"fresh, only {sorted(self._batches)}; a batch that stays stays whole"
                )
            raw = memory.first == "raw" and self._whole_fresh
            return Layout((self.numel,), self.dtype, exact=(raw,))
        return Layout((self.numel,), self.dtype)

    def _body(self, wire: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The payload's part of a wire of the right size."""
        size = self.scheme.codec.nbytes(layout)
        if wire.dtype != torch.uint8 or wire.dim() != 1 or len(wire) != aligned(size) + stamp.BYTES:
            raise ValueError(
                f"boundary {self.key!r}: a wire of {aligned(size) + stamp.BYTES} bytes (uint8), "
                f"got shape {tuple(wire.shape)} of {wire.dtype}; nbytes(microbatch) says how many"
            )
        return wire[:size]

    def _check(self, name: str, x: torch.Tensor) -> None:
        if x.numel() != self.numel or x.dtype != self.dtype:
            raise ValueError(
                f"boundary {self.key!r}: {name} is {tuple(x.shape)} of {x.dtype}, this boundary's "
                f"tensor {self.shape} of {self.dtype}"
            )

    def _held(self, microbatch: int) -> torch.Tensor | None:
        """What both ends hold, flat; None without references.

        Where that is nothing it is -0.0: added to what arrives it changes no bit of it.
        """
        if self._references is not None:
            fresh, ids = self._layouts[microbatch].exact, self._visits[microbatch]
            shape = (self.samples, self._row)
            held = torch.empty(shape, dtype=self.dtype, device=self.device)
            known = [place for place, first in enumerate(fresh) if not first]
            if len(known) < len(ids):
                held.fill_(-0.0)
            if len(known) == len(ids):
                self._references.read(ids, held)
            elif known:
                rows = held.new_empty(len(known), self._row)
                self._references.read([ids[place] for place in known], rows)
                held[known] = rows
            return held.view(-1)
        if isinstance(self.scheme.feedback, Reuse):
            if self._whole_fresh:
                return torch.full((self.numel,), -0.0, dtype=self.dtype, device=self.device)
            return self._batches[microbatch]
        return None

    def _renew(
        self,
        body: torch.Tensor,
        held: torch.Tensor,
        arrived: torch.Tensor,
        layout: Layout,
        microbatch: int,
    ) -> None:
        """Add the message to `arrived`, a copy of what both ends hold, and keep that."""
        self._compressor.decompress(self._name, body, arrived, layout, add=True)
        kept = arrived
        if not clean(arrived):
            kept = torch.where(arrived.isfinite(), arrived, self._before(held, microbatch))
        if self._references is not None:
            rows = kept.view(self.samples, self._row)
            self._references.write(self._visits[microbatch], rows)
        else:
            self._batches[microbatch] = kept.clone()  # the receiver's `arrived` is its caller's

    def _before(self, held: torch.Tensor, microbatch: int) -> torch.Tensor:
        """`held`, and the references that there were of samples whose visit is raw."""
        references = self._references
        if references is None:
            return held
        fresh, ids = self._layouts[microbatch].exact, self._visits[microbatch]
        raw = [n for n, first in enumerate(fresh) if first and ids[n] in references]
        if not raw:
            return held
        rows = held.new_empty(len(raw), self._row)
        references.read([ids[n] for n in raw], rows)
        found = held.clone().view(self.samples, self._row)
        found[raw] = rows
        return found.view(-1)

    def follow(self, old: Boundary) -> None:
        """Go on in the streams of a boundary of this name whose tensors had another shape.

        So no random number is drawn twice. Nothing else of it is remembered.
        """
        if type(old.scheme.feedback) is type(self.scheme.feedback) is Plain:
            self._number = old._number
            self._compressor.load_state_dict(old._compressor.state_dict())

    def history(self) -> int:
        """A digest of what this end was told: visits, and how many messages there were."""
        visits = 0 if self._references is None else self._references.history()
        return zlib.crc32(f"{visits} {self._number} {sorted(self._batches)}".encode())

    def checksum(self) -> int:
        """A digest of the references, bitwise equal at both ends."""
        total = 0 if self._references is None else self._references.checksum()
        for microbatch in sorted(self._batches):
            data: Any = self._batches[microbatch].cpu().view(torch.uint8).numpy()
            total = zlib.crc32(data, total)
        return total

    def memory_bytes(self) -> int:
        """Bytes of references and residuals at this end."""
        stored = 0 if self._references is None else self._references.nbytes()
        batches = sum(batch.nbytes for batch in self._batches.values())
        return stored + batches + self._compressor.nbytes()

    def rescale(self, factor: float) -> None:
        """Multiply the residuals of `+lep`, which are in the units of the gradient, by `factor`."""
        self._compressor.rescale(factor)

    def reset(self) -> None:
        """Forget references and residuals, and count messages anew; both ends together.

        `begin` comes before the next message.
        """
        self._number = 0
        self._batches.clear()
        self.end()
        self._compressor.reset()
        if self._references is not None:
            self._references.reset()

    def end(self) -> None:
        """No step: what `begin` was told is over, and a mode that needs it takes no message."""
        self._visits, self._layouts, self._whole_fresh = (), (), None

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered between two steps: tensors, numbers and strings."""
        references = None if self._references is None else self._references.state_dict()
        batches = {str(m): batch.clone() for m, batch in self._batches.items()}
        return {
            "scheme": str(self._scheme),
            "number": self._number,
            "compressor": self._compressor.state_dict(),
            "references": references,
            "batches": batches,
            "checksum": self.checksum(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`: what follows is bitwise what would have followed.

        `begin` comes before the next message. References may be kept elsewhere than they were.

        Raises: ValueError: of another scheme or size. RuntimeError, and all is forgotten: it has
            changed since it was saved.
        """
        if state["scheme"] != str(self._scheme):
            raise ValueError(
                f"boundary {self.key!r} has scheme {self._scheme}, the state is of "
                f"{state['scheme']}; load it into the scheme that saved it"
            )
        for batch in state["batches"].values():
            self._check("a saved micro-batch", batch)
        if self._references is not None:
            self._references.load_state_dict(state["references"])
        self._batches = {
            int(m): batch.to(self.device, copy=True) for m, batch in state["batches"].items()
        }
        self._compressor.load_state_dict(state["compressor"])
        self._number = state["number"]
        self.end()
        if self.checksum() != state["checksum"]:
            self.reset()
            raise RuntimeError(
                f"boundary {self.key!r}: the saved references do not have their checksum: the file "
                "has changed since it was written. Load another checkpoint, or reset() both ends"
            )


def rescaled(state: dict[str, Any], factor: float) -> dict[str, Any]:
    """The `state_dict()` of a boundary that was rescaled by `factor` before."""
    memory: dict[str, Any] = state["compressor"]
    scales = {name: x.view(torch.bfloat16) * factor for name, x in memory["scales"].items()}
    memory = memory | {
        "residuals": {
            name: x if name in scales else x * factor for name, x in memory["residuals"].items()
        },
        "scales": {name: x.view(memory["scales"][name].dtype) for name, x in scales.items()},
    }
    return state | {"compressor": memory}


def told(scheme: Scheme) -> Scheme:
    """What both ends must have alike: not where each keeps its references."""
    memory = scheme.feedback
    if isinstance(memory, Delta):
        return replace(scheme, feedback=Delta(cap=memory.cap, raw=memory.raw))
    return scheme
