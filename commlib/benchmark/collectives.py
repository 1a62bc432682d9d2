"""Operations side by side on one link: the library's own, a no-op, the bare link, commlib's.

Every rank runs `run(bench)`. For each size the contestants take turns in one fixed order, round
after round (see timing.py). A time is the slowest rank's, counted from a barrier. The number of
rounds is decided by rank 0 from its clock and broadcast, so all ranks do the same.

Bandwidths follow nccl-tests: algbw = size / p50, busbw = algbw * the share of the size that a rank
must send in fp32, 2(W-1)/W for all_reduce, (W-1)/W for its halves and 1 for send_recv.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from statistics import median

import torch
import torch.distributed as dist
from tqdm import trange

from ..transport import TorchTransport
from .contestants import PAIRS, Buffers, Contestant, Measured, contestants
from .line import Line, of_job
from .pairs import Pairs, pairs
from .rows import Row
from .timing import paired_ratio, percentile, rounds_within
from .units import format_size

WARMUP = 2  # rounds: the first agrees, compiles and allocates, the second is a true one


@dataclass(frozen=True)
class Bench:
    """What to measure. Sizes are bytes of the whole fp32 tensor; `rate` is the line's bits/s."""

    op: str
    schemes: tuple[str, ...]
    sizes: tuple[int, ...]
    rate: float | None = None
    link: str = "loopback"
    iters: int | None = None  # rounds per size; None: as many as fit in `budget`
    budget: float = 20.0  # seconds per size
    timeout: float = 300.0  # seconds until a collective gives up
    seed: int = 0
    device: str = "cpu"  # "cuda": NCCL moves the tensors, gloo what ranks tell each other


def sizes_between(smallest: int, largest: int, factor: int) -> tuple[int, ...]:
    """`smallest`, times `factor`, ... up to `largest`, which is always among them."""
    if not 0 < smallest <= largest or factor < 2:
        raise ValueError(
            f"sizes from {smallest} to {largest} in steps of x{factor}: the smallest must be "
            "positive and at most the largest, the factor at least 2"
        )
    sizes = []
    size = smallest
    while size < largest:
        sizes.append(size)
        size *= factor
    return (*sizes, largest)


def run(
    bench: Bench,
    on_rows: Callable[[list[Row]], object] | None = None,
    *,
    progress: bool = False,
) -> list[Row]:
    """Measure on every rank of the default group; rows are complete on rank 0, empty elsewhere.

    `on_rows` gets the rows of a size as soon as they are known (rank 0 only); `progress` shows a
    bar of the rounds on a terminal.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    rows: list[Row] = []
    line = of_job(bench.device)
    with _measured(bench) as measured:
        for size in bench.sizes:
            buffers = Buffers(bench.op, size, rank, world, bench.seed, bench.device)
            players = [
                *(pairs(buffers) if bench.op == PAIRS else contestants(buffers)),
                *(one.contestant(scheme, buffers) for scheme, one in measured.items()),
            ]
            times, errors, left = _measure(bench, line, buffers, players, progress)
            sent = _worst([float(c.sent()) for c in players])
            for one in measured.values():
                one.reset()
            if rank == 0:
                found = _rows(bench, line, buffers, players, times, errors, sent, left)
                rows += found
                if on_rows is not None:
                    on_rows(found)
    return rows


@contextmanager
def process_group(timeout: float, device: str = "cpu") -> Iterator[None]:
    """The default group of RANK, WORLD_SIZE and MASTER_*; destroyed at the end, always."""
    if dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield
        dist.barrier()  # nobody tears the group down while another still reads from it
    finally:
        # gloo aborts the process at exit where a group is left, or a reference to it in a cycle
        dist.destroy_process_group()
        gc.collect()


@contextmanager
def _measured(bench: Bench) -> Iterator[dict[str, Measured | Pairs]]:
    """What moves the tensors under each scheme."""
    found: dict[str, Measured | Pairs] = {}
    for scheme in bench.schemes:
        found[scheme] = (
            Pairs(scheme)
            if bench.op == PAIRS
            else Measured(
                scheme,
                TorchTransport(timeout=bench.timeout, device=bench.device),
                seed=bench.seed,
            )
        )
    try:
        yield found
    finally:
        for one in found.values():
            one.close()


def _measure(
    bench: Bench, line: Line, buffers: Buffers, players: list[Contestant], progress: bool
) -> tuple[list[list[float]], list[float | None], list[int | None]]:
    """Per contestant: seconds of the slowest rank by round; relative error of the first message;
    bytes that the busiest host sent in a round, where ranks share hosts."""
    places, mine = buffers.sample()
    dist.all_reduce(mine)
    errors: list[float | None] = [None] * len(players)
    for turn in range(WARMUP):
        start = time.perf_counter()
        for i, contestant in enumerate(players):
            _turn(buffers, contestant, line)
            # of the first: later ones also pay back what error feedback kept from it
            if turn == 0 and contestant.checked:
                errors[i] = _relative_error(buffers, places, mine)
        seconds = time.perf_counter() - start
    rounds = bench.iters or _from_rank_0(rounds_within(bench.budget, seconds))
    bar = trange(
        rounds,
        desc=format_size(buffers.numel * 4),
        unit=" rounds",
        leave=False,
        disable=None if progress else True,  # None: only on a terminal
    )
    local = [_turn(buffers, c, line) for _ in bar for c in players]
    counts = [count for _, count in local] + [_count(line)]
    dist.barrier()  # what is told below is no contestant's
    flat, n = _worst([seconds for seconds, _ in local]), len(players)
    # from one barrier to the next: when this rank is done, others of its host may still send
    left = _worst([float(b - a) for a, b in pairwise(counts)])
    known = line.interface is not None
    medians = [int(median(left[i::n])) if known else None for i in range(n)]
    return [flat[i::n] for i in range(n)], errors, medians


def _turn(buffers: Buffers, contestant: Contestant, line: Line) -> tuple[float, int]:
    """Seconds of one run, and what had left this host before it."""
    buffers.reset()
    buffers.settle()
    before = _count(line)
    dist.barrier()  # no rank begins before all have counted
    start = time.perf_counter()
    contestant.run()
    buffers.settle()
    return time.perf_counter() - start, before


def _count(line: Line) -> int:
    """What has left this host now that all ranks are done; a barrier must come before they go on.

    Without that a rank late to leave this one's barrier would count what others of its host have
    begun to send.
    """
    if line.interface is None:  # on all ranks alike
        return 0
    dist.barrier()
    return line.sent()


def _relative_error(buffers: Buffers, places: torch.Tensor, exact: torch.Tensor) -> float:
    """|result - exact| / |exact| over the sampled places of all ranks, in fp64."""
    held, result = buffers.result_at(places)
    exact = exact[held]
    sums = torch.stack([((result - exact) ** 2).sum(), (exact**2).sum()])
    dist.all_reduce(sums)
    return float((sums[0] / sums[1]).sqrt()) if sums[1] > 0 else 0.0


def _worst(values: list[float]) -> list[float]:
    """The largest of each value over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(v) for v in tensor.tolist()]


def _from_rank_0(value: int) -> int:
    tensor = torch.tensor([value])
    dist.broadcast(tensor, src=0)
    return int(tensor.item())


def _rows(
    bench: Bench,
    line: Line,
    buffers: Buffers,
    players: list[Contestant],
    times: list[list[float]],
    errors: list[float | None],
    sent: list[float],
    left: list[int | None],
) -> list[Row]:
    size, must = buffers.numel * 4, buffers.must_send()
    base = times[0]
    found = []
    for i, contestant in enumerate(players):
        p50 = percentile(times[i], 50)
        ratio = paired_ratio(times[i], base) if i and contestant.checked else None
        algbw = size / p50 / 1e9 if contestant.checked else None
        wire = int(sent[i])
        # what one rank sends is not what its host does where others are on it
        on_line = left[i] if line.shared else wire
        # the bare link's bus bandwidth is what it carried; a collective's what fp32 would have
        busbw = (must if contestant.checked else wire) / p50 / 1e9
        found.append(
            Row(
                op=bench.op,
                scheme=contestant.scheme,
                backend=contestant.backend,
                ranks=buffers.world,
                size_bytes=size,
                wire_bytes=wire,
                ms_p50=p50 * 1e3,
                ms_p80=percentile(times[i], 80) * 1e3,
                algbw_GBps=algbw,
                busbw_GBps=busbw if contestant.scheme != "noop" else None,
                rel_err=_finite(errors[i]),
                speedup=percentile(base, 50) / p50 if contestant.checked else None,
                link=bench.link,
                ratio=ratio.median if ratio else None,
                ratio_ci_low=ratio.low if ratio else None,
                ratio_ci_high=ratio.high if ratio else None,
                wire_efficiency=on_line * 8 / bench.rate / p50
                if bench.rate and wire and on_line is not None
                else None,
                rate=bench.rate,
                hosts=line.hosts,
                host_bytes=left[i],
                wire_ratio=must / wire if wire and contestant.checked else None,
                iters=len(times[i]),
                threads=torch.get_num_threads(),
                chosen=contestant.chosen(),
            )
        )
    return found


def _finite(value: float | None) -> float | None:
    """JSON has no NaN: an error that is not a number is a broken contestant, and said so."""
    if value is not None and value != value:
        raise RuntimeError("a contestant left its output unwritten: the relative error is NaN")
    return value
