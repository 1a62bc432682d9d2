"""Who takes part in a benchmark of collectives, and the buffers they all work on.

LIB fp32    torch.distributed's own collective on the tensor as it is: every ratio's base
LIB bf16    cast to bf16, the library's collective, cast back: what a bf16 hook does
noop        a barrier and nothing else: the least any collective costs here
raw a2a     all_to_all_single of uint8 at the tensor's size: what the link carries
SCHEME      commlib's Communicator under that scheme, or under `auto`

LIB is gloo, or nccl on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from commlib_kernels import backend_for

from ..communicator import Communicator
from ..policy import Policy, Role, Rule, Scheme
from ..traffic import Transport

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")
PAIRS = "send_recv"  # 0 to 1, 2 to 3, ...; see pairs.py
OPS = (*COLLECTIVES, PAIRS)
SAMPLE = 1 << 18  # elements compared for rel_err: 2 MiB of fp64 cross the link once per size


@dataclass(frozen=True)
class Contestant:
    """Something to time: `run` from inputs that `prepare` made ready; `sent` bytes of one run."""

    scheme: str
    backend: str
    run: Callable[[], object]
    sent: Callable[[], int]  # bytes this rank sent in the last run
    checked: bool = True  # whether the buffers hold the collective's result afterwards
    chosen: Callable[[], str | None] = lambda: None  # the scheme of the last run, if not `scheme`


class Buffers:
    """Inputs and outputs of one operation at one size; `reset` puts the inputs back.

    The whole tensor is `regions` parts of `part` elements. `gives` and `holds` are what this rank
    adds to it and what it has of the result: a region, or ALL, or NONE. `numel`, what the size
    says, is the whole of a collective and a region of send_recv; rounded down so that parts are
    equal.
    """

    ALL, NONE = -1, -2

    def __init__(
        self, op: str, size_bytes: int, rank: int, world: int, seed: int, device: str = "cpu"
    ) -> None:
        if op not in OPS:
            raise ValueError(f"operation {op!r} is not one of {', '.join(OPS)}")
        self.op, self.rank, self.world = op, rank, world
        self.regions = world // 2 if op == PAIRS else world
        if not self.regions:
            raise RuntimeError(f"{PAIRS} takes pairs of ranks, and there is {world}")
        parts = 1 if op == PAIRS else world
        self.part = max(1, size_bytes // (4 * parts))
        self.numel = self.part * parts
        sends, paired = rank % 2 == 0, rank < 2 * self.regions
        self.gives, self.holds = {
            "all_reduce": (self.ALL, self.ALL),
            "reduce_scatter": (self.ALL, rank),
            "all_gather": (rank, self.ALL),
            PAIRS: (
                rank // 2 if sends and paired else self.NONE,
                rank // 2 if paired and not sends else self.NONE,
            ),
        }[op]
        generator = torch.Generator().manual_seed(seed * 1009 + rank)
        self.source = torch.randn(self._size(self.gives), generator=generator).to(device)
        self.input = self.source.clone()
        self.output = (
            self.input if op == "all_reduce" else torch.empty(self._size(self.holds), device=device)
        )

    def _size(self, region: int) -> int:
        return {self.ALL: self.part * self.regions, self.NONE: 0}.get(region, self.part)

    def reset(self) -> None:
        """The input as it was; the output is spoilt, so that an idle contestant shows."""
        self.input.copy_(self.source)
        if self.output is not self.input:
            self.output.fill_(float("nan"))

    def settle(self) -> None:
        """Wait until the device has done what was queued."""
        if self.input.is_cuda:
            torch.cuda.synchronize()

    def must_send(self) -> int:
        """Bytes a rank must send in fp32 by the best algorithm there is."""
        if self.op == PAIRS:
            return self.part * 4
        halves = 2 if self.op == "all_reduce" else 1
        return halves * (self.world - 1) * self.part * 4

    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in the whole tensor, strided, and this rank's fp64 contribution at each."""
        whole = self._size(self.ALL)
        stride = max(1, whole // SAMPLE) | 1  # odd: visits every place of a block
        places = torch.arange(0, whole, stride)
        values = torch.zeros(len(places), dtype=torch.float64)
        mine, inside = self._in(self.gives, places)
        values[mine] = _at(self.source, inside)
        return places, values

    def result_at(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of `places` this rank holds results of, and those results in fp64."""
        mine, inside = self._in(self.holds, places)
        return mine, _at(self.output, inside)

    def _in(self, region: int, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which places are in a region, and where in its tensor those are."""
        if region == self.ALL:
            return torch.ones(len(places), dtype=torch.bool), places
        mine = (places // self.part) == region
        return mine, places[mine] - region * self.part


def _at(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Elements of `x`, in fp64 on the CPU."""
    return x[places.to(x.device)].double().cpu()


class Measured:
    """A communicator with the transport whose bytes it moves."""

    def __init__(self, scheme: str, transport: Transport, *, seed: int) -> None:
        self.transport = transport
        # one rule for everything: Policy.parse would leave flat and tiny tensors alone
        policy = "auto" if scheme == "auto" else Policy((Rule(Scheme.parse(scheme)),))
        self.communicator = Communicator(self.transport, policy, seed=seed)
        self.last = 0

    def reset(self) -> None:
        """Forget the residuals of a size that does not come back."""
        self.communicator.reset()

    def close(self) -> None:
        self.communicator.close()

    def timed(self, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            before = self.transport.bytes_sent
            call()
            self.last = self.transport.bytes_sent - before

        return run

    def contestant(self, scheme: str, buffers: Buffers) -> Contestant:
        comm, key = self.communicator, f"bench{buffers.numel}"
        x, out = buffers.input.view(rows_of(buffers.numel), -1), buffers.output.view(1, -1)
        role = Role.PARAMETER if buffers.op == "all_gather" else Role.GRADIENT
        call: Callable[[], object] = {
            "all_reduce": lambda: comm.all_reduce(x, key).wait(),
            "reduce_scatter": lambda: comm.reduce_scatter(out, x, key).wait(),
            "all_gather": lambda: comm.all_gather(out, x, key, role=role).wait(),
        }[buffers.op]
        named = scheme if scheme == "auto" else str(Scheme.parse(scheme).resolve(role))

        def chosen() -> str | None:
            # from the meter: a collective knows less than a policy, which chooses for any
            rows = comm.meter.rows()
            ran = next((r["scheme"] for r in reversed(rows) if r["key"] == key), None)
            return None if ran == named else ran

        return Contestant(
            scheme,
            backend_for(x.device).name,
            self.timed(call),
            lambda: self.last,
            chosen=chosen,
        )


def rows_of(numel: int) -> int:
    """Rows of the matrix that `numel` elements go as: as square as powers of two divide them."""
    rows = 1
    while numel % (2 * rows) == 0 and 4 * rows * rows <= numel:
        rows *= 2
    return rows


def library_of(buffers: Buffers) -> str:
    """The backend that moves them by itself."""
    return "nccl" if buffers.input.is_cuda else str(dist.get_backend())


def contestants(buffers: Buffers) -> list[Contestant]:
    """The library's own, the floor and the link; the first is the base."""
    device, must = buffers.input.device, buffers.must_send()
    library = library_of(buffers)
    half_in = buffers.input.bfloat16()
    half_out = half_in if buffers.op == "all_reduce" else buffers.output.bfloat16()
    raw = buffers.numel * 4 // buffers.world * buffers.world
    raw_in = torch.zeros(raw, dtype=torch.uint8, device=device)
    raw_out = torch.empty_like(raw_in)
    raw_sent = raw // buffers.world * (buffers.world - 1)

    def bf16() -> None:
        half_in.copy_(buffers.input)
        _library(buffers.op, half_out, half_in)
        buffers.output.copy_(half_out)

    return [
        Contestant(
            f"{library} fp32",
            library,
            lambda: _library(buffers.op, buffers.output, buffers.input),
            lambda: must,
        ),
        Contestant(f"{library} bf16", library, bf16, lambda: must // 2),
        Contestant("noop", library, dist.barrier, lambda: 0, checked=False),
        Contestant(
            "raw a2a",
            library,
            lambda: dist.all_to_all_single(raw_out, raw_in),
            lambda: raw_sent,
            checked=False,
        ),
    ]


def _library(op: str, out: torch.Tensor, x: torch.Tensor) -> None:
    if op == "all_reduce":
        dist.all_reduce(x)
    elif op == "reduce_scatter":
        _named("reduce_scatter_single", "reduce_scatter_tensor")(out, x)
    else:
        _named("all_gather_single", "all_gather_into_tensor")(out, x)


def _named(new: str, old: str) -> Any:
    """A function of torch.distributed by its name since torch 2.13, else by its older one."""
    return getattr(dist, new, None) or getattr(dist, old)
