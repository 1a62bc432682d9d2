"""Codes of a table of values +- alike by whole vectors, and the sums that its scale is made of.

Written in LLVM's terms, like `lookup`. A magnitude's code is not found by comparing it with every
threshold. ``cell = round(a steps)`` guesses it, with `steps` such that cell k + 1 holds threshold k
and no other (`steps_of`), and cell 0 none. One lookup gets the cell's threshold, and one comparison
settles whether the code is that of its lower or of its upper side. Thresholds are far from the
edges of their cells, so how the guess rounds does not matter.

Rounding is an addition: of 2^23, from where on floats are integers, and of the code of cell 0. So
the low bits of the sum are the code of a positive number, below the threshold; lookups see 3 bits.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from commlib_kernels.numba_cpu.lookup import every, take
from commlib_kernels.numba_cpu.vectors import FLOATS, LANES, WORDS, address, has, low_bytes, splat

RUN = 2
"""Vectors of codes that are stored at once."""
ROUND = 2.0**23
_CODES = ir.VectorType(ir.IntType(8), RUN * LANES)
_MAGNITUDE = 0x7FFFFFFF


def steps_of(thresholds: Sequence[float]) -> float:
    """Cells per unit such that threshold k lies in cell k + 1; the last has all that is above."""
    last = len(thresholds) - 1
    if last < 1:  # no other threshold is near
        return 1 / thresholds[0] if thresholds else 1.0
    least = max((k + 0.5) / t for k, t in enumerate(thresholds))
    most = min((k + 1.5) / t for k, t in enumerate(thresholds[:last]))
    if not least * 1.04 < most:
        raise ValueError(f"thresholds {thresholds} are too uneven for cells of one width")
    return float((least * most) ** 0.5)


def _guess(context: Any, builder: Any, a: Any, steps: Any, zero: Any) -> Any:
    """``zero + round(a steps)`` in the low bits, as words."""
    if has(context, "fma"):
        fma = ir.FunctionType(FLOATS, [FLOATS] * 3)
        call = builder.module.declare_intrinsic("llvm.fma.v8f32", (), fma)
        return builder.bitcast(builder.call(call, [a, steps, zero]), WORDS)
    return builder.bitcast(builder.fadd(builder.fmul(a, steps), zero), WORDS)


def _make(*, pairs: bool) -> Any:
    def fit_run(
        typing: Any, v: Any, o: Any, p: Any, inv: Any, guess: Any, t: Any, c: Any, half: Any,
        x: Any, y: Any, i: Any, q: Any, j: Any,
    ) -> Any:  # fmt: skip
        del typing

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first, second, at, to = args[1], args[2], args[10], args[12]
            factor = splat(builder, args[3])
            steps, top, zero = (splat(builder, builder.extract_value(args[4], n)) for n in range(3))
            start = ir.Constant(first.type, 0)
            thresholds = address(context, builder, sig.args[5], args[5], start)
            magnitudes = address(context, builder, sig.args[6], args[6], start)
            byte = builder.trunc(args[7], _CODES.element)
            mirror = splat(builder, builder.sub(builder.add(byte, byte), byte.type(1)), _CODES)

            def place(n: int, array: int, index: Any, vector: Any = FLOATS) -> Any:
                index = builder.add(index, ir.Constant(index.type, n * LANES))
                return address(context, builder, sig.args[array], args[array], index, vector)

            def one(n: int, index: Any) -> tuple[Any, Any, Any]:
                z = builder.fmul(builder.load(place(n, 0, index), align=4), factor)
                word = builder.bitcast(z, WORDS)
                a = builder.bitcast(builder.and_(word, every(_MAGNITUDE)), FLOATS)
                near = builder.select(builder.fcmp_ordered("<", a, top), a, top)
                cell = _guess(context, builder, near, steps, zero)
                above = builder.fcmp_ordered(">", a, take(context, builder, thresholds, cell))
                code = builder.sub(cell, builder.sext(above, WORDS))
                m = take(context, builder, magnitudes, code)
                positive = builder.sext(builder.icmp_signed(">", word, every(0)), WORDS)
                return builder.fmul(m, a), builder.fmul(m, m), builder.xor(code, positive)

            def put(codes: Any, index: Any) -> None:
                builder.store(codes, place(0, 11, index, _CODES), align=1)

            low, high = [], []
            for n in range(RUN):
                p_low, s_low, code = one(n, first)
                low.append(code)
                p_high, s_high, code = one(n, second)
                high.append(code)
                builder.store(builder.fadd(p_low, p_high), place(n, 8, at), align=4)
                builder.store(builder.fadd(s_low, s_high), place(n, 9, at), align=4)
            # the codes have all bits turned of positive numbers, instead of negative ones
            if pairs:
                both = [
                    builder.or_(builder.and_(a, every(15)), builder.shl(b, every(4)))
                    for a, b in zip(low, high, strict=True)
                ]
                put(builder.not_(low_bytes(builder, both)), to)
            else:
                for words, o in ((low, first), (high, second)):
                    codes = builder.xor(low_bytes(builder, words), mirror)
                    put(builder.and_(codes, mirror), builder.add(to, builder.sub(o, first)))
            return context.get_dummy_value()

        u = types.uintp
        three = types.UniTuple(types.float32, 3)
        kinds = (v, u, u, types.float32, three, t, c, types.int32, x, y, u, q, u)
        return types.void(*kinds), codegen

    return intrinsic(fit_run)


fit_run, fit_pairs = _make(pairs=False), _make(pairs=True)
"""``(v, o, p, inv, guess, t, c, half, x, y, i, q, j)``: codes of ``z = v inv`` at o and at p, 16
elements each, to j and ``j + p - o`` of q; what they add to a fit, at i.

With a = |z| and m its nearest magnitude: x = m_o a_o + m_p a_p, y = m_o m_o + m_p m_p. t, c:
thresholds and magnitudes by the low 3 bits of a positive number's code; of cell 0 a threshold below
all. guess: (steps, the largest number to guess of, 2^23 + the code of cell 0). half: codes of one
sign. `fit_pairs` puts two codes of 4 bits into a byte, that at o into its low half.
"""


@intrinsic
def fold(typing: Any, x: Any, o: Any, step: Any) -> Any:
    """x at o becomes the sum of the 8 vectors at o, o + step, ..: the upper half to the lower."""
    del typing

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, first, apart = args
        indices = [builder.add(first, builder.mul(apart, first.type(i))) for i in range(8)]
        places = [address(context, builder, sig.args[0], array, index) for index in indices]
        held = [builder.load(place, align=4) for place in places]
        while len(held) > 1:
            half = len(held) // 2
            pairs = zip(held[:half], held[half:], strict=True)
            held = [builder.fadd(low, high) for low, high in pairs]
        builder.store(held[0], places[0], align=4)
        return context.get_dummy_value()

    return types.void(x, types.uintp, types.uintp), codegen
