"""send_recv: pairs of ranks, 0 to 1, 2 to 3 and so on, one way; the last of an odd number is idle.

LIB fp32    torch.distributed's own send and recv: every ratio's base
LIB bf16    cast to bf16, sent, cast back
noop        a barrier and nothing else
SCHEME      commlib.distributed's send and recv under that scheme; `auto` sends raw

A time ends when the receiver has the tensor and the sender has heard of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from commlib_kernels import backend_for

from .. import distributed
from ..integrations.routes import bytes_sent
from ..policy import Role, Scheme
from .contestants import Buffers, Contestant, library_of

DONE = 1  # tag of the answer


def pairs(buffers: Buffers) -> list[Contestant]:
    """The library's own and the floor; the first is the base."""
    library, must, peer = library_of(buffers), buffers.must_send(), buffers.rank ^ 1
    half = torch.empty(buffers.part, dtype=torch.bfloat16, device=buffers.input.device)

    def send_half() -> None:
        half.copy_(buffers.input)
        dist.send(half, peer)

    def recv_half() -> None:
        dist.recv(half, peer)
        buffers.output.copy_(half)

    plain = one_way(
        buffers, lambda: dist.send(buffers.input, peer), lambda: dist.recv(buffers.output, peer)
    )
    return [
        Contestant(f"{library} fp32", library, plain, lambda: must),
        Contestant(
            f"{library} bf16", library, one_way(buffers, send_half, recv_half), lambda: must // 2
        ),
        Contestant("noop", library, dist.barrier, lambda: 0, checked=False),
    ]


class Pairs:
    """commlib's send and recv under a scheme."""

    def __init__(self, scheme: str) -> None:
        self._scheme = "fp32" if scheme == "auto" else scheme

    def contestant(self, scheme: str, buffers: Buffers) -> Contestant:
        peer, named = buffers.rank ^ 1, self._scheme
        last = 0

        def send() -> None:
            nonlocal last
            before = bytes_sent()
            distributed.send(buffers.input, peer, scheme=named)
            last = bytes_sent() - before or buffers.must_send()

        def recv() -> None:
            distributed.recv(buffers.output, peer, scheme=named)

        resolved = str(Scheme.parse(named).resolve(Role.ACTIVATION))
        return Contestant(
            scheme,
            backend_for(buffers.input.device).name,
            one_way(buffers, send, recv),
            lambda: last,
            chosen=lambda: resolved if scheme == "auto" else None,
        )

    def reset(self) -> None:
        """Nothing is remembered."""

    def close(self) -> None:
        """Nothing is open: messages end with the group."""


def one_way(
    buffers: Buffers, send: Callable[[], object], recv: Callable[[], object]
) -> Callable[[], None]:
    """What this rank does of a message and the answer to it."""
    peer, answer = buffers.rank ^ 1, torch.zeros(1, device=buffers.input.device)

    def run() -> None:
        if buffers.gives != Buffers.NONE:
            send()
            dist.recv(answer, peer, tag=DONE)
        elif buffers.holds != Buffers.NONE:
            recv()
            dist.send(answer, peer, tag=DONE)

    return run
