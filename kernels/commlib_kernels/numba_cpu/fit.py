"""Codes of a table of values +- alike by whole vectors, and the sums that its scale is made of.

Written in LLVM's terms, like `lookup`. A magnitude's code is not found by comparing it with every
threshold. A product guesses it: ``cell = min(trunc(a steps), top)``, with `steps` such that cell k
holds threshold k and no other (`steps_of`). One lookup gets that threshold, and one comparison
settles whether the code is k or k + 1. Thresholds are far from the edges of their cells, so how the
product rounds does not matter.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from commlib_kernels.numba_cpu.lookup import every, take
from commlib_kernels.numba_cpu.vectors import FLOATS, LANES, WORDS, address, splat

RUN = 4
"""Vectors of codes that are stored at once: as bytes they are one vector."""
CODES = ir.VectorType(ir.IntType(8), RUN * LANES)
_MAGNITUDE = 0x7FFFFFFF


def steps_of(thresholds: Sequence[float]) -> float:
    """Cells per unit such that threshold k lies in cell k; all above the last cell belong to it."""
    last = len(thresholds) - 1
    if last < 1:
        return 1.0  # there is one cell
    widest = min(t / k for k, t in enumerate(thresholds) if k)
    narrowest = max(t / (k + 1) for k, t in enumerate(thresholds[:last]))
    if not narrowest * 1.01 < widest:
        raise ValueError(f"thresholds {thresholds} are too uneven for cells of one width")
    return float(1 / (narrowest * widest) ** 0.5)


def _bytes(builder: Any, words: Sequence[Any]) -> Any:
    """Vectors of small words as one of bytes."""
    while len(words) > 1:
        lanes = list(range(2 * words[0].type.count))
        places = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        pairs = zip(words[::2], words[1::2], strict=True)
        words = [builder.shuffle_vector(low, high, places) for low, high in pairs]
    return builder.trunc(words[0], CODES)


@intrinsic
def fit_run(
    typing: Any, v: Any, o: Any, p: Any, inv: Any, guess: Any, t: Any, c: Any, half: Any, x: Any,
    y: Any, i: Any, q: Any,
) -> Any:  # fmt: skip
    """Codes of ``z = v inv`` at o and at p, 32 elements each, and what they add to a fit, at i.

    For thresholds t and magnitudes c (arrays of 8), a = |z| and m its nearest magnitude:
    x = m_o a_o + m_p a_p, y = m_o m_o + m_p m_p. guess: (steps, top). half: codes of one sign.
    """
    del typing

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        first, second, at, zero = args[1], args[2], args[10], ir.Constant(args[1].type, 0)
        factor, middle = splat(builder, args[3]), splat(builder, args[7], WORDS)
        steps, top = (splat(builder, builder.extract_value(args[4], k)) for k in range(2))
        thresholds = address(context, builder, sig.args[5], args[5], zero)
        magnitudes = address(context, builder, sig.args[6], args[6], zero)
        mirror = builder.sub(builder.add(middle, middle), every(1))

        def place(k: int, array: int, index: Any, vector: Any = FLOATS) -> Any:
            index = builder.add(index, ir.Constant(index.type, k * LANES))
            return address(context, builder, sig.args[array], args[array], index, vector)

        def one(k: int, index: Any) -> tuple[Any, Any, Any]:
            z = builder.fmul(builder.load(place(k, 0, index), align=4), factor)
            word = builder.bitcast(z, WORDS)
            a = builder.bitcast(builder.and_(word, every(_MAGNITUDE)), FLOATS)
            far = builder.fmul(a, steps)
            far = builder.select(builder.fcmp_ordered("<", far, top), far, top)
            cell = builder.fptosi(far, WORDS)
            above = builder.fcmp_ordered(">", a, take(context, builder, thresholds, cell))
            number = builder.sub(cell, builder.sext(above, WORDS))
            m = take(context, builder, magnitudes, number)
            positive = builder.icmp_signed(">", word, every(0))
            flip = builder.select(positive, every(0), mirror)
            code = builder.xor(builder.add(middle, number), flip)
            return builder.fmul(m, a), builder.fmul(m, m), code

        low, high = [], []
        for k in range(RUN):
            p_low, s_low, code = one(k, first)
            low.append(code)
            p_high, s_high, code = one(k, second)
            high.append(code)
            builder.store(builder.fadd(p_low, p_high), place(k, 8, at), align=4)
            builder.store(builder.fadd(s_low, s_high), place(k, 9, at), align=4)
        for words, index in ((low, first), (high, second)):
            builder.store(_bytes(builder, words), place(0, 11, index, CODES), align=1)
        return context.get_dummy_value()

    u = types.uintp
    two = types.UniTuple(types.float32, 2)
    kinds = (v, u, u, types.float32, two, t, c, types.int32, x, y, u, q)
    return types.void(*kinds), codegen


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
