"""Tables of up to 16 values, looked up by vectors of 8 codes; and the sum of a vector.

Written in LLVM's terms, as the loop vectoriser knows no lookup: of 16 values it makes 15 choices.
Where the processor has one (AVX2's vpermps) it takes an instruction for 8 values, two and a choice
for 16; elsewhere loads.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from commlib_kernels.numba_cpu.vectors import FLOATS, LANES, WORDS, address, has, splat

BYTES = ir.VectorType(ir.IntType(8), LANES)


def permutes(context: Any) -> bool:
    """Whether what is compiled for has vpermps."""
    return has(context, "avx2")


def every(word: int) -> Any:
    """A vector of one constant."""
    return ir.Constant(WORDS, [word] * LANES)


def take(context: Any, builder: Any, table: Any, number: Any) -> Any:
    """Element `number` mod 8 of the 8 floats at `table`, for each of 8 numbers."""
    if permutes(context):
        kind = ir.FunctionType(FLOATS, [FLOATS, WORDS])
        permute = builder.module.declare_intrinsic("llvm.x86.avx2.permps", (), kind)
        return builder.call(permute, [builder.load(table, align=4), number])
    first = builder.bitcast(table, ir.FloatType().as_pointer())
    found = ir.Constant(FLOATS, ir.Undefined)
    near = builder.and_(number, every(7))
    for lane in range(LANES):
        at = ir.IntType(32)(lane)
        place = builder.gep(first, [builder.extract_element(near, at)])
        found = builder.insert_element(found, builder.load(place), at)
    return found


def _make_look_up(*, add: bool) -> Any:
    def look_up(typing: Any, q: Any, table: Any, scale: Any, v: Any, o: Any) -> Any:
        del typing

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            codes, values, factor, out, first = args
            at = address(context, builder, sig.args[0], codes, first, BYTES)
            number = builder.zext(builder.load(at, align=1), WORDS)
            eight = ir.Constant(first.type, LANES)
            low = address(context, builder, sig.args[1], values, ir.Constant(first.type, 0))
            high = address(context, builder, sig.args[1], values, eight)
            # the choice is made by the sign, which is bit 3
            upper = builder.icmp_signed("<", builder.shl(number, every(28)), every(0))
            found = builder.select(
                upper, take(context, builder, high, number), take(context, builder, low, number)
            )
            found = builder.fmul(found, splat(builder, factor))
            place = address(context, builder, sig.args[3], out, first)
            if add:
                found = builder.fadd(builder.load(place, align=4), found)
            builder.store(found, place, align=4)
            return context.get_dummy_value()

        return types.void(q, table, types.float32, v, types.uintp), codegen

    return intrinsic(look_up)


look_up, look_up_and_add = _make_look_up(add=False), _make_look_up(add=True)
"""``(q, table, scale, v, o)``: ``v = table[q] scale``, or added to it, of 8 elements from o on."""


@intrinsic
def tree(typing: Any, x: Any) -> Any:
    """Sum of 8 elements: the upper half to the lower, until one is left."""
    del typing

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = ir.Constant(ir.IntType(64), 0)
        found = builder.load(address(context, builder, sig.args[0], args[0], zero), align=4)
        half = LANES // 2
        while half:
            lanes = [lane ^ half for lane in range(LANES)]
            other = builder.shuffle_vector(found, found, ir.Constant(WORDS, lanes))
            found = builder.fadd(found, other)
            half //= 2
        return builder.extract_element(found, ir.IntType(32)(0))

    return types.float32(x), codegen
