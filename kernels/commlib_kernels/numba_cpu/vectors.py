"""Butterflies on vectors of 8 elements, written in LLVM's own terms.

What the loop vectoriser makes of a Hadamard transform spends its time on shuffling: pairs that are
less than a vector apart cost it three shuffles and permutations per vector and pass. Here vectors
that are far apart meet whole, and only the last three stages shuffle, once each:

    pairs 4 apart    x + swap(x) in lanes 0..3, swap(x) - x in lanes 4..7; 2 and 1 apart alike

A pass holds up to 16 vectors in registers and does their four stages (and the last three) between
one load and one store. LLVM's vectors are of any length: the code is the same for every processor.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 8
FLOATS = ir.VectorType(ir.FloatType(), LANES)
WORDS = ir.VectorType(ir.IntType(32), LANES)
_MINUS = 0x80000000


def address(
    context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any = FLOATS
) -> Any:
    """Where a vector lies that begins with element `index` of an array."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _stages(builder: Any, x: list[Any]) -> list[Any]:
    """All stages over whole vectors: the widest pairs first."""
    half = len(x) // 2
    while half:
        for first in range(0, len(x), 2 * half):
            for i in range(first, first + half):
                a, b = x[i], x[i + half]
                x[i], x[i + half] = builder.fadd(a, b), builder.fsub(a, b)
        half //= 2
    return x


def within(builder: Any, x: Any) -> Any:
    """The stages within a vector: pairs 4, 2 and 1 elements apart."""
    for half in (4, 2, 1):
        lanes = [lane ^ half for lane in range(LANES)]
        other = builder.shuffle_vector(x, x, ir.Constant(WORDS, lanes))
        signs = ir.Constant(WORDS, [_MINUS if lane & half else 0 for lane in range(LANES)])
        turned = builder.xor(builder.bitcast(x, WORDS), signs)
        x = builder.fadd(other, builder.bitcast(turned, FLOATS))
    return x


def _make(count: int, *, last: bool) -> Any:
    def pass_(typing: Any, x: Any, o: Any, step: Any) -> Any:
        del typing

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            array, first, apart = args
            places = []
            for i in range(count):
                index = builder.add(first, builder.mul(apart, ir.Constant(first.type, i)))
                places.append(address(context, builder, sig.args[0], array, index))
            held = _stages(builder, [builder.load(p, align=4) for p in places])
            for place, value in zip(places, held, strict=True):
                builder.store(within(builder, value) if last else value, place, align=4)
            return context.get_dummy_value()

        return types.void(x, types.uintp, types.uintp), codegen

    return intrinsic(pass_)


apart2, apart4, apart8, apart16 = (_make(count, last=False) for count in (2, 4, 8, 16))
"""``(x, o, step)``: all stages of 2 to 16 vectors of x, at o, o + step, ..; in place."""

last1, last2, last4, last8, last16 = (_make(count, last=True) for count in (1, 2, 4, 8, 16))
"""The same, and then the stages within them."""
