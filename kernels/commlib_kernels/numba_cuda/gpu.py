"""What kernels need of a GPU: memory at an address, exact arithmetic, and the other lanes.

`simulated.py` has the same names in plain Python. Memory is not seen as Numba's arrays, which move
one element at a time: a vector type in LLVM's terms moves 128 bits.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import cgutils, libdevice, types
from numba.extending import intrinsic

Function = Callable[..., Any]

u32, i32, i64, f32, f64 = np.uint32, np.int32, np.int64, np.float32, np.float64

THREADS = 128
"""Threads of a block: four warps."""
BLOCKS = 1 << 20
"""Blocks of a launch at most: far more than a GPU holds at once."""

GLOBAL = 1
"""LLVM's address space of global memory."""
WORD, HALF, DOUBLE = ir.IntType(32), ir.HalfType(), ir.DoubleType()
EVERY_LANE = 0xFFFFFFFF
MAGIC = f32(1.5 * 2**23)
"""Added to a small number, it leaves the integer part in the low bits of the pattern."""

device: Function = cuda.jit(device=True, forceinline=True)


def kernel(function: Function, signature: Any, resident: int) -> Any:
    """Compile, for the current device, what the host launches."""
    # Without link-time optimisation what runs is what bench/compile_matrix.py has looked at.
    return cuda.jit(signature, launch_bounds=(THREADS, resident), lto=False)(function)


# Inlined while Numba types a kernel, not by LLVM: an array must belong to the kernel itself.


@cuda.jit(device=True, inline="always")
def unit_of_floats():
    """An array of 32 fp32 values: registers, where all indices are constants."""
    return cuda.local.array(32, f32)


@cuda.jit(device=True, inline="always")
def unit_of_words():
    """An array of 32 patterns."""
    return cuda.local.array(32, u32)


@cuda.jit(device=True, inline="always")
def shared_floats():
    """32 fp32 values for each of up to 128 threads of a block, in memory that they share."""
    return cuda.shared.array(4096, f32)


# ---- memory: addresses are int64, patterns uint32 -----------------------------------------------


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind, GLOBAL))


def _load(kind: Any, result: Any) -> Any:
    """A function that reads one number; narrow integers are widened to 32 bits."""

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            size = context.get_abi_sizeof(kind)
            value = builder.load(_pointer(builder, args[0], kind), align=size)
            return builder.zext(value, WORD) if size < 4 else value

        return result(types.int64), codegen

    return load


def _store(kind: Any, operand: Any) -> Any:
    """A function that writes one number; narrow integers are the low bits of what it is given."""

    @intrinsic
    def store(typing: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            size = context.get_abi_sizeof(kind)
            given = builder.trunc(args[1], kind) if size < 4 else args[1]
            builder.store(given, _pointer(builder, args[0], kind), align=size)
            return context.get_dummy_value()

        return types.void(types.int64, operand), codegen

    return store


def _load_vector(count: int) -> Any:
    """A function that reads `count` words in one access."""
    vector = ir.VectorType(WORD, count)

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = builder.load(_pointer(builder, args[0], vector), align=4 * count)
            words = [builder.extract_element(value, WORD(i)) for i in range(count)]
            return cgutils.pack_array(builder, words)

        return types.UniTuple(types.uint32, count)(types.int64), codegen

    return load


def _vector_store(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    vector = ir.VectorType(WORD, len(args) - 1)
    value = ir.Constant(vector, ir.Undefined)
    for i, word in enumerate(args[1:]):
        value = builder.insert_element(value, word, WORD(i))
    builder.store(value, _pointer(builder, args[0], vector), align=4 * (len(args) - 1))
    return context.get_dummy_value()


load8 = _load(ir.IntType(8), types.uint32)
load16 = _load(ir.IntType(16), types.uint32)
load32 = _load(WORD, types.uint32)
load64 = _load(ir.IntType(64), types.int64)
load_f64 = _load(DOUBLE, types.float64)
load32x2 = _load_vector(2)
load32x4 = _load_vector(4)

store8 = _store(ir.IntType(8), types.uint32)
store16 = _store(ir.IntType(16), types.uint32)
store32 = _store(WORD, types.uint32)
store_f64 = _store(DOUBLE, types.float64)


@intrinsic
def store32x2(typing: Any, address: Any, a: Any, b: Any) -> Any:
    """Write two words in one access."""
    return types.void(types.int64, *[types.uint32] * 2), _vector_store


@intrinsic
def store32x4(typing: Any, address: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Write four words in one access."""
    return types.void(types.int64, *[types.uint32] * 4), _vector_store


# ---- numbers ------------------------------------------------------------------------------------


def _convert(result: Any, operand: Any, make: Function) -> Any:
    """A function of one operand, given as LLVM instructions."""

    @intrinsic
    def convert(typing: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return make(builder, args[0])

        return result(operand), codegen

    return convert


def _widened(builder: Any, pattern: Any) -> Any:
    half = builder.bitcast(builder.trunc(pattern, ir.IntType(16)), HALF)
    return builder.fpext(half, ir.FloatType())


def _narrowed(builder: Any, value: Any) -> Any:
    half = builder.fptrunc(value, HALF)
    return builder.zext(builder.bitcast(half, ir.IntType(16)), WORD)


bits = _convert(types.uint32, types.float32, lambda builder, x: builder.bitcast(x, WORD))
floats = _convert(
    types.float32, types.uint32, lambda builder, b: builder.bitcast(b, ir.FloatType())
)
fp16_value = _convert(types.float32, types.uint32, _widened)
fp16_rounded = _convert(types.uint32, types.float32, _narrowed)


@device
def fp16_nearest(x):
    """fp16 bits, ties to even; one NaN."""
    return fp16_rounded(x) if x == x else u32(0x7E00)


@device
def mul(a, b):
    """A product that is rounded before anything is added to it."""
    return libdevice.fmul_rn(a, b)


@device
def add(a, b):
    """A sum that no product is fused into."""
    return libdevice.fadd_rn(a, b)


@device
def square_f64(a):
    """A square in fp64."""
    return libdevice.dmul_rn(a, a)


@device
def add_f64(a, b):
    """A sum in fp64."""
    return libdevice.dadd_rn(a, b)


@device
def clamp(y, low, high):
    """Between low and high; anything if y is NaN."""
    return libdevice.fminf(libdevice.fmaxf(y, low), high)


@device
def rint_bits(y):
    """Two's complement of rint(y) in the low 22 bits, rubbish above."""
    return bits(libdevice.fadd_rn(y, MAGIC))


@device
def floor_bits(y):
    """The same of floor(y)."""
    return bits(libdevice.fadd_rd(y, MAGIC))


@device
def exponent(n):
    """The largest power of two in n > 0 is two to this."""
    return i64(31) - i64(cuda.clz(i32(n)))


@device
def bytes4(a, b, c, d):
    """The lowest bytes of four words, as one word."""
    low = libdevice.byte_perm(i32(a), i32(b), i32(0x0040))
    high = libdevice.byte_perm(i32(c), i32(d), i32(0x0040))
    return u32(libdevice.byte_perm(low, high, i32(0x5410)))


# ---- lanes --------------------------------------------------------------------------------------


@device
def lane():
    """Which of the 32 of its warp this thread is."""
    return i64(cuda.threadIdx.x & 31)


@device
def thread():
    """Which of its block this thread is."""
    return i64(cuda.threadIdx.x)


@device
def block():
    """Which block of the launch this is."""
    return i64(cuda.blockIdx.x)


@device
def blocks():
    """Blocks of the launch."""
    return i64(cuda.gridDim.x)


@device
def warp():
    """Which warp of the launch this is."""
    return (i64(cuda.blockIdx.x) * i64(cuda.blockDim.x) + i64(cuda.threadIdx.x)) >> i64(5)


@device
def warps():
    """Warps of the launch."""
    return (i64(cuda.gridDim.x) * i64(cuda.blockDim.x)) >> i64(5)


@device
def warp_max(m, lanes):
    """Maximum (below 2^31) over groups of `lanes` neighbours; all 32 must call."""
    k = lanes >> 1
    while k > 0:
        m = max(m, u32(cuda.shfl_xor_sync(EVERY_LANE, i32(m), i32(k))))
        k = k >> 1
    return m


@device
def warp_sum(total):
    """fp64 sum over the warp, in the order of the byte contract; all 32 must call."""
    for k in (16, 8, 4, 2, 1):
        total = add_f64(total, cuda.shfl_down_sync(EVERY_LANE, total, i32(k)))
    return cuda.shfl_sync(EVERY_LANE, total, i32(0))


@device
def sync_warp():
    """What lanes wrote to shared memory before, all of the warp may read after."""
    cuda.syncwarp()


@device
def sync_block():
    """The same for all threads of a block."""
    cuda.syncthreads()


@device
def exchange(x, other, k):
    """other = the unit x of the lane whose number differs in bit k; all 32 must call."""
    for i in range(32):
        other[i] = cuda.shfl_xor_sync(EVERY_LANE, x[i], i32(k))


@device
def exchange4(a, b, c, d, k):
    """The same of four numbers."""
    return (
        cuda.shfl_xor_sync(EVERY_LANE, a, i32(k)),
        cuda.shfl_xor_sync(EVERY_LANE, b, i32(k)),
        cuda.shfl_xor_sync(EVERY_LANE, c, i32(k)),
        cuda.shfl_xor_sync(EVERY_LANE, d, i32(k)),
    )
