"""Codes of int4 and int8 by whole vectors, in LLVM's terms: its loops pack eight at a time."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from commlib_kernels.numba_cpu.lookup import every
from commlib_kernels.numba_cpu.vectors import LANES, WORDS, address, low_bytes, splat

RUN = 4
"""Vectors of bytes that are stored at once."""
INTEGERS = 1.5 * 2**23
"""Here floats are integers: adding it rounds to nearest even, and the low bits are the code."""
BYTES = ir.VectorType(ir.IntType(8), RUN * LANES)


def pair(builder: Any, low: Any, high: Any) -> Any:
    """Two nibbles to a byte."""
    return builder.or_(builder.and_(low, every(15)), builder.shl(high, every(4)))


def _make(*, pairs: bool) -> Any:
    def nearest(typing: Any, v: Any, o: Any, p: Any, inv: Any, wire: Any, c: Any) -> Any:
        del typing

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            values, first, second, number, out, at = args
            factor = splat(builder, number)
            integers = splat(builder, ir.Constant(ir.FloatType(), INTEGERS))

            def code(index: Any, n: int) -> Any:
                index = builder.add(index, ir.Constant(index.type, n * LANES))
                place = address(context, builder, sig.args[0], values, index)
                y = builder.fmul(builder.load(place, align=4), factor)
                return builder.bitcast(builder.fadd(y, integers), WORDS)

            def both(n: int) -> Any:
                return pair(builder, code(first, n), code(second, n))

            words = [both(n) if pairs else code(first, n) for n in range(RUN)]
            place = address(context, builder, sig.args[4], out, at, BYTES)
            builder.store(low_bytes(builder, words), place, align=1)
            return context.get_dummy_value()

        u = types.uintp
        return types.void(v, u, u, types.float32, wire, u), codegen

    return intrinsic(nearest)


nibbles, octets = _make(pairs=True), _make(pairs=False)
"""``(v, o, p, inv, wire, c)``: ``v inv`` rounded to nearest even, not clamped, to 32 bytes at c.

Nibbles are of 32 elements at o (low halves) and 32 at p; octets of 32 at o.
"""
