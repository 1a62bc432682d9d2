"""The names of `gpu.py` in Numba's CUDA simulator, where a lane is a Python thread.

The simulator has neither shuffles nor raw pointers. A block is one warp here, but where 64 or 128
threads share a tile, and blocks run one after the other: a list of values and a barrier are all
that threads need to meet.

Numba's own block asks every lane again and again whether it waits, and takes more time than they
do. Here it sleeps until they have ended.
"""

import ctypes
import math
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.simulator import kernel as simulator

Function = Callable[..., Any]

u32, i64, f32, f64 = np.uint32, np.int64, np.float32, np.float64

THREADS = 32
BLOCKS = 3
"""Few enough that kernels must go round their loop over tiles."""


def unit_of_floats() -> Any:
    """An array of 32 fp32 values."""
    return np.zeros(32, f32)


def unit_of_words() -> Any:
    """An array of 32 patterns."""
    return np.zeros(32, u32)


def device(function: Function) -> Function:
    """Nothing to compile."""
    return function


def kernel(function: Function, signature: Any, resident: int) -> Any:
    """What the host launches. Overflow and NaN are data: every thread has NumPy's own settings."""
    del signature, resident

    @wraps(function)
    def quiet(*args: Any) -> None:
        with np.errstate(all="ignore"):
            function(*args)

    return cuda.jit(quiet)


# ---- memory -------------------------------------------------------------------------------------


def load8(address: int) -> Any:
    """One byte."""
    return u32(ctypes.c_uint8.from_address(address).value)


def load16(address: int) -> Any:
    """Two bytes. Misaligned, a GPU would stop here."""
    assert address % 2 == 0
    return u32(ctypes.c_uint16.from_address(address).value)


def load32(address: int) -> Any:
    """Four bytes."""
    assert address % 4 == 0
    return u32(ctypes.c_uint32.from_address(address).value)


def load64(address: int) -> int:
    """A signed integer of eight bytes."""
    assert address % 8 == 0
    return ctypes.c_int64.from_address(address).value


def load_f64(address: int) -> Any:
    """An fp64 number."""
    return f64(ctypes.c_double.from_address(address).value)


def load32x2(address: int) -> tuple[Any, ...]:
    """Two words."""
    assert address % 8 == 0
    return tuple(u32(word) for word in (ctypes.c_uint32 * 2).from_address(address))


def load32x4(address: int) -> tuple[Any, ...]:
    """Four words."""
    assert address % 16 == 0
    return tuple(u32(word) for word in (ctypes.c_uint32 * 4).from_address(address))


def store8(address: int, value: Any) -> None:
    """The lowest byte."""
    ctypes.c_uint8.from_address(address).value = int(value)


def store16(address: int, value: Any) -> None:
    """The lower half."""
    assert address % 2 == 0
    ctypes.c_uint16.from_address(address).value = int(value)


def store32(address: int, value: Any) -> None:
    """A word."""
    assert address % 4 == 0
    ctypes.c_uint32.from_address(address).value = int(value)


def store_f64(address: int, value: Any) -> None:
    """An fp64 number."""
    ctypes.c_double.from_address(address).value = float(value)


def store32x2(address: int, *words: Any) -> None:
    """Two words."""
    assert address % 8 == 0
    (ctypes.c_uint32 * 2).from_address(address)[:] = [int(word) for word in words]


def store32x4(address: int, *words: Any) -> None:
    """Four words."""
    assert address % 16 == 0
    (ctypes.c_uint32 * 4).from_address(address)[:] = [int(word) for word in words]


# ---- numbers ------------------------------------------------------------------------------------


def bits(x: Any) -> Any:
    """The pattern of an fp32 value."""
    return f32(x).view(u32)


def floats(b: Any) -> Any:
    """The fp32 value of a pattern."""
    return u32(b).view(f32)


def fp16_value(pattern: Any) -> Any:
    """The value of fp16 bits."""
    return f32(np.uint16(pattern).view(np.float16))


def fp16_nearest(x: Any) -> Any:
    """fp16 bits, ties to even; one NaN."""
    return u32(np.float16(x).view(np.uint16)) if x == x else u32(0x7E00)


def mul(a: Any, b: Any) -> Any:
    """An fp32 product."""
    return f32(a) * f32(b)


def add(a: Any, b: Any) -> Any:
    """An fp32 sum."""
    return f32(a) + f32(b)


def square_f64(a: Any) -> Any:
    """A square in fp64."""
    return f64(a) * f64(a)


def add_f64(a: Any, b: Any) -> Any:
    """A sum in fp64."""
    return f64(a) + f64(b)


def clamp(y: Any, low: Any, high: Any) -> Any:
    """Between low and high; low if y is NaN, as on a GPU."""
    return min(max(y, low), high) if y == y else low


def rint_bits(y: Any) -> Any:
    """Two's complement of rint(y)."""
    return u32(int(np.rint(y)) & 0xFFFFFFFF)


def floor_bits(y: Any) -> Any:
    """Two's complement of floor(y)."""
    return u32(math.floor(y) & 0xFFFFFFFF)


def exponent(n: Any) -> int:
    """The largest power of two in n > 0 is two to this."""
    return int(n).bit_length() - 1


def bytes4(a: Any, b: Any, c: Any, d: Any) -> Any:
    """The lowest bytes of four words, as one word."""
    return u32(int.from_bytes([int(word) & 0xFF for word in (a, b, c, d)], "little"))


# ---- lanes --------------------------------------------------------------------------------------

MEET_SECONDS = 100.0
"""A lane that has not come by then never will: it took another branch than the others."""


class Block:
    """The lanes of a block while they run, in the place of Numba's BlockManager."""

    def __init__(
        self, function: Function, grid: tuple[int, ...], block: tuple[int, ...], debug: bool
    ) -> None:
        self.function, self.debug = function, debug
        self._grid_dim, self._block_dim = grid, block  # as Numba's threads spell them
        self.board: list[Any] = [None] * math.prod(block)
        self.barrier = threading.Barrier(len(self.board), timeout=MEET_SECONDS)
        self.shared = np.full(32 * len(self.board), np.nan, f32)  # nobody may count on zeros

    def run(self, place: tuple[int, ...], *args: Any) -> None:
        """Raise what a lane raised, when all have ended."""

        def lane() -> None:
            try:
                self.function(*args)
            except BaseException:
                self.barrier.abort()  # or the others would wait for this one
                raise

        lanes = [
            simulator.BlockThread(lane, self, place, point, self.debug)
            for point in np.ndindex(*self._block_dim)
        ]
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join()
        raised = [thread.exception for thread in lanes if thread.exception]
        # a broken barrier is what the others saw of it
        raised.sort(key=lambda found: isinstance(found[0], threading.BrokenBarrierError))
        for error, traceback in raised:
            raise error.with_traceback(traceback)


simulator.BlockManager = Block


def _all(value: Any) -> list[Any]:
    """What all lanes bring to this call."""
    thread: Any = threading.current_thread()
    block: Block = thread._manager
    block.board[thread.threadIdx.x] = value
    block.barrier.wait()
    values = list(block.board)
    block.barrier.wait()
    return values


def shared_floats() -> Any:
    """32 fp32 values for each thread of a block, which they share."""
    current: Any = threading.current_thread()
    return current._manager.shared


def thread() -> int:
    """Which of its block this thread is."""
    current: Any = threading.current_thread()
    return int(current.threadIdx.x)


def lane() -> int:
    """Which of the 32 of its warp this thread is."""
    return thread() & 31


def block() -> int:
    """Which block of the launch this is."""
    current: Any = threading.current_thread()
    return int(current.blockIdx.x)


def blocks() -> int:
    """Blocks of the launch."""
    current: Any = threading.current_thread()
    return int(current._manager._grid_dim[0])


warp, warps = block, blocks
"""Where a warp has a tile of its own, it is a block."""


def sync_block() -> None:
    """All threads of a block meet."""
    current: Any = threading.current_thread()
    current._manager.barrier.wait()


sync_warp = sync_block


def exchange(x: Any, other: Any, k: int) -> None:
    """other = the unit x of the lane whose number differs in bit k."""
    assert k < 32
    other[:] = _all(x.copy())[thread() ^ k]


def exchange4(*numbers: Any) -> tuple[Any, ...]:
    """The same of four numbers; k is the last argument."""
    assert numbers[4] < 32
    found: tuple[Any, ...] = _all(numbers[:4])[thread() ^ numbers[4]]
    return found


def warp_max(m: Any, lanes: int) -> Any:
    """Maximum over groups of `lanes` neighbours."""
    first = thread() // lanes * lanes
    return max(_all(m)[first : first + lanes])


def warp_sum(total: Any) -> Any:
    """fp64 sum over the warp, in the order of the byte contract."""
    first = thread() - lane()
    values = _all(total)[first : first + 32]
    for k in (16, 8, 4, 2, 1):
        values[:k] = [a + b for a, b in zip(values[:k], values[k : 2 * k], strict=True)]
    return values[0]
