"""Codes of int4 and int8, rounded stochastically: by whole vectors, as in nearest.py.

Drawing in the same loop, so that nothing is kept in between, was slower: 32 bytes go to the wire
at once here, and 8 there.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from commlib_kernels.numba_cpu.lookup import every
from commlib_kernels.numba_cpu.nearest import BYTES, RUN, pair
from commlib_kernels.numba_cpu.vectors import FLOATS, LANES, WORDS, address, low_bytes, splat

_FLOOR = ir.FunctionType(FLOATS, [FLOATS])


def _uniform(builder: Any, bits: Any) -> Any:
    """16 random bits to a number of [0, 1): `uniform` of scalar.py."""
    one_and = builder.or_(builder.shl(bits, every(7)), every(0x3F800040))
    return builder.fadd(builder.bitcast(one_and, FLOATS), ir.Constant(FLOATS, [-1.0] * LANES))


def _clamp(builder: Any, z: Any, low: Any, high: Any) -> Any:
    z = builder.select(builder.icmp_signed("<", z, high), z, high)
    return builder.select(builder.icmp_signed(">", z, low), z, low)


def _octets(builder: Any, codes: list[Any], levels: Any) -> Any:
    """Bytes within the levels. Packing saturates anyway: only bytes are left to be clamped."""
    packed = low_bytes(builder, [_clamp(builder, z, every(-128), every(127)) for z in codes])
    top = splat(builder, builder.trunc(levels, ir.IntType(8)), BYTES)
    return _clamp(builder, packed, builder.neg(top), top)


def _make(*, pairs: bool) -> Any:
    def drawn(
        typing: Any, v: Any, o: Any, half: Any, inv: Any, levels: Any, r: Any, w: Any, wire: Any,
        c: Any,
    ) -> Any:  # fmt: skip
        del typing

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            _, first, half, number, levels, _, word, _, at = args
            factor = splat(builder, number)
            floor = builder.module.declare_intrinsic("llvm.floor.v8f32", (), _FLOOR)

            def vector(array: int, index: Any, n: int, kind: Any) -> Any:
                index = builder.add(index, ir.Constant(index.type, n * LANES))
                place = address(context, builder, sig.args[array], args[array], index, kind)
                return builder.load(place, align=4)

            def code(index: Any, n: int, bits: Any) -> Any:
                y = builder.fmul(vector(0, index, n, FLOATS), factor)
                y = builder.fadd(y, _uniform(builder, bits))
                return builder.fptosi(builder.call(floor, [y]), WORDS)

            def store(codes: Any, index: Any) -> None:
                place = address(context, builder, sig.args[7], args[7], index, BYTES)
                builder.store(codes, place, align=1)

            lows, highs = [], []
            for n in range(RUN):
                bits = vector(5, word, n, WORDS)
                lows.append(code(first, n, builder.and_(bits, every(0xFFFF))))
                second = builder.add(first, half)
                highs.append(code(second, n, builder.lshr(bits, every(16))))
            if pairs:
                both = zip(lows, highs, strict=True)
                store(low_bytes(builder, [pair(builder, a, d) for a, d in both]), at)
            else:
                store(_octets(builder, lows, levels), at)
                store(_octets(builder, highs, levels), builder.add(at, half))
            return context.get_dummy_value()

        u = types.uintp
        return types.void(v, u, u, types.float32, types.int32, r, u, wire, u), codegen

    return intrinsic(drawn)


drawn_nibbles, drawn_octets = _make(pairs=True), _make(pairs=False)
"""``(v, o, half, inv, levels, r, w, wire, c)``: ``floor(v inv + u)`` of 32 elements at o, with the
low halves of the words at w, and of 32 at o + half, with the high ones.

Nibbles to 32 bytes at c; octets to 32 at c and 32 at c + half, clamped to the levels. Nibbles are
not clamped: where no |v inv| is above ``7 (1 + 2^-22)``, ``v inv + u`` is below 8 and, as u is at
least 2^-17, not below -7.
"""
