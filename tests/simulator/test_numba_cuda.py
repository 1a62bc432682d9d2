"""numba_cuda in Numba's CUDA simulator writes the bytes of the reference: no GPU is needed.

    NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/simulator -q

The variable decides when Numba is imported, so this is a run of its own. A simulated lane is a
Python thread, about a million times slower than a real one: messages are small, and each format
meets a choice of residuals and kinds of data, not all of them. On GPUs tests/kernels has them all.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
import torch

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    pytest.skip("runs with NUMBA_ENABLE_CUDASIM=1 only", allow_module_level=True)

from commlib.codecs import codec
from commlib_kernels import Format, Layout, nbytes, numba_cuda, reference
from commlib_kernels.launch import grouped
from commlib_kernels.numba_cuda import simulated
from tests.contract import (
    CODECS,
    DTYPES,
    KINDS,
    RESIDUALS,
    Case,
    Ground,
    check_backend,
    data,
    same,
    tag,
)

ROTATED = "rotate|eden3:block=128"
RATES = ((1.0, 1.0, 1.0), (0.2, 0.9, 1.0), (1.0, 1.0, 0.75))


def choice(format_index: int, dtype_index: int) -> tuple[str, str, tuple[float, ...], tuple[int]]:
    """Kind of data, residual, rates and held segment: neighbours get different ones."""
    i = 3 * format_index + dtype_index
    kind, residual = KINDS[i % 6], list(RESIDUALS)[(i + i // 12 + dtype_index) % 4]
    return kind, residual, RATES[(i + i // 3) % 3], (i % 2,)


def pairs() -> list[tuple[str, torch.dtype]]:
    """Formats and dtypes; one dtype each of tables and rotations, which take long."""
    found = []
    for index, text in enumerate(CODECS):
        fmt = codec(text).format
        slow = grouped(fmt) or fmt.table
        found += [(text, d) for i, d in enumerate(DTYPES) if not slow or i == index % 3]
    return found


@pytest.mark.parametrize(("text", "dtype"), pairs())
def test_every_format_and_dtype(text: str, dtype: torch.dtype) -> None:
    """Whole blocks, short ones, an empty segment and an exact one."""
    fmt = codec(text).format
    layout = Layout((fmt.block + 140, 33, 0, 7), dtype, exact=(False, False, False, True))
    if fmt.block > 1024:  # a second of the simulator for every thousand elements
        layout = Layout((fmt.block + 9,), dtype)
    kind, residual, rates, hold = choice(CODECS.index(text), DTYPES.index(dtype))
    check_backend(numba_cuda, reference, Case(fmt, layout, kind, residual, rates, hold))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(
    "text",
    ["int8", "sign", "natural", "ternary:block=tensor", "nf4", "eden2:block=64", ROTATED],
)
def test_every_residual(text: str, residual: str) -> None:
    """With data that has every kind of trouble."""
    layout = Layout((300, 9, 40), exact=(False, True, False))
    case = Case(codec(text).format, layout, "mixed", residual, RATES[1], (2,))
    check_backend(numba_cuda, reference, case)


def shapes(fmt: Format) -> dict[str, Layout]:
    """Messages of a few hundred elements, of every shape."""
    align = max(8, fmt.align)
    exact = (False, True, False)
    cut = Layout((420, 11, 70), torch.bfloat16, ranks=3, exact=exact, align=align)
    repeated = Layout((141,), ranks=2, stacked=True)
    found = {
        "offsets": Layout((129, 40, 70), offsets=(301, 1, 120)),
        "odd offsets in 16 bits": Layout((256, 64), torch.float16, offsets=(3, 261)),
        "three ranks": cut,
        "stacked": repeated,
        "stacked segments": Layout((140, 9), ranks=2, stacked=True, exact=(False, True)),
        "chunk": cut.only(1),
        "dense chunk": cut.only(1, dense=True),
        "chunk of a stack": repeated.only(1),
        "copied in the widest accesses": Layout((1100, 9), exact=(True, False)),
        "copied halves": Layout((1100, 9), torch.bfloat16, exact=(True, False)),
    }
    if grouped(fmt):  # they take longest; exact pieces are those of all formats
        few = "odd offsets in 16 bits", "three ranks", "dense chunk", "chunk of a stack"
        return {name: found[name] for name in few}
    if not fmt.per_segment:
        found["slice"] = cut.slice(1, 2)
        found["slice of a dense chunk"] = cut.only(0, dense=True).slice(1, 2)
    return found


@pytest.mark.parametrize("text", ["int4", "sign:block=40", "qsgd:levels=1:block=tensor", ROTATED])
def test_every_shape(text: str) -> None:
    fmt = codec(text).format
    for i, layout in enumerate(shapes(fmt).values()):
        residual = list(RESIDUALS)[i % 4]
        case = Case(fmt, layout, "mixed", residual, RATES[i % 3], (0,) if i % 2 else ())
        check_backend(numba_cuda, reference, case)


def test_runs_of_a_norm_are_summed_across_pieces() -> None:
    """A group of more than 4096 elements, in four chunks: the runs of its norm end inside them."""
    fmt = codec("qsgd:levels=1:block=tensor").format
    layout, ground = Layout((4600, 5), ranks=4, align=fmt.align), Ground()
    case = Case(fmt, layout)
    x = data("random", layout.extent)
    wires = []
    for backend in (reference, numba_cuda):
        wires.append(ground.wire(nbytes(layout, fmt)))
        backend.quantize(fmt, x, wires[-1], layout, tag(case, 0))
    assert same(*wires)


def test_a_step_on_the_device() -> None:
    """A step that a CUDA graph may change is read when the kernel runs."""
    fmt, layout = codec("int4:round=stochastic").format, Layout((200,))
    case, ground, x = Case(fmt, layout), Ground(), data("random", 200)
    step = torch.tensor([(1 << 33) + 5])
    known, read = (ground.wire(nbytes(layout, fmt)) for _ in range(2))
    numba_cuda.quantize(fmt, x, known, layout, tag(case, 5))
    numba_cuda.quantize(fmt, x, read, layout, tag(case, 0)._replace(step=step))
    assert same(known, read)


def test_warmup_and_ready() -> None:
    numba_cuda.ready()
    numba_cuda.warmup(codec("ternary:block=tensor").format)


class TestABlockOfLanes:
    """What runs the kernels here is ours: see simulated.py."""

    @staticmethod
    def launch(function: Callable[[], None]) -> None:
        simulated.kernel(function, None, 1)[2, simulated.THREADS]()

    def test_meets_and_sees_all_values(self) -> None:
        seen: list[list[int]] = []

        def meet() -> None:
            seen.append([simulated._all(turn * simulated.lane()) for turn in (1, 2)][1])

        self.launch(meet)
        assert seen == [[2 * lane for lane in range(32)]] * 64

    def test_that_fails_says_why_and_nobody_waits(self) -> None:
        def fail() -> None:
            if simulated.lane() == 31:
                raise LookupError("lane 31 is lost")
            simulated._all(0)

        with pytest.raises(LookupError, match="lane 31 is lost"):
            self.launch(fail)

    def test_that_does_not_meet_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a GPU a shuffle without all lanes is undefined."""
        monkeypatch.setattr(simulated, "MEET_SECONDS", 0.3)
        with pytest.raises(threading.BrokenBarrierError):
            self.launch(lambda: simulated.lane() and simulated._all(0))


def test_a_wrong_rounding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself can fail: floor instead of rint inside a kernel (T34)."""
    from commlib_kernels.numba_cuda import coders, host

    case = Case(codec("int8").format, Layout((64,)))
    check_backend(numba_cuda, reference, case)
    monkeypatch.setattr(coders, "rint_bits", coders.floor_bits)
    for cached in (host.kernels_of, host._simulated):
        monkeypatch.setattr(host, cached.__name__, host_cache(cached))
    with pytest.raises(pytest.fail.Exception, match="bytes of the wire of step 0"):
        check_backend(numba_cuda, reference, case)


def host_cache(function):  # type: ignore[no-untyped-def]
    """The function under a cache, without a cache."""
    return function.__wrapped__
