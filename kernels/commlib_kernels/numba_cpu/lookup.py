"""Tables of up to 16 values, looked up by vectors of 8 codes; and the codes and sums of a fit.

Written in LLVM's terms, as the loop vectoriser knows no lookup: of 16 values it makes 15 choices.
Where the processor has one (AVX2's vpermps) it takes an instruction for 8 values, two and a choice
for 16; elsewhere loads.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from commlib_kernels.numba_cpu.vectors import FLOATS, LANES, WORDS, address

BYTES = ir.VectorType(ir.IntType(8), LANES)
_MAGNITUDE, _MINUS = 0x7FFFFFFF, 0x80000000


def permutes(context: Any) -> bool:
    """Whether what is compiled for has vpermps."""
    _, _, features = context.codegen().magic_tuple()
    return "+avx2" in features.split(",")


def _splat(builder: Any, scalar: Any, vector: Any = FLOATS) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, ir.Constant(WORDS, [0] * LANES))


def _all(word: int) -> Any:
    return ir.Constant(WORDS, [word] * LANES)


def _take(context: Any, builder: Any, table: Any, number: Any) -> Any:
    """Element `number` mod 8 of the 8 floats at `table`, for each of 8 numbers."""
    if permutes(context):
        kind = ir.FunctionType(FLOATS, [FLOATS, WORDS])
        permute = builder.module.declare_intrinsic("llvm.x86.avx2.permps", (), kind)
        return builder.call(permute, [builder.load(table, align=4), number])
    first = builder.bitcast(table, ir.FloatType().as_pointer())
    found = ir.Constant(FLOATS, ir.Undefined)
    near = builder.and_(number, _all(7))
    for lane in range(LANES):
        at = ir.IntType(32)(lane)
        place = builder.gep(first, [builder.extract_element(near, at)])
        found = builder.insert_element(found, builder.load(place), at)
    return found


def _put_codes(builder: Any, codes: Any, place: Any) -> None:
    builder.store(builder.trunc(codes, BYTES), place, align=1)


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
            upper = builder.icmp_signed("<", builder.shl(number, _all(28)), _all(0))
            found = builder.select(
                upper, _take(context, builder, high, number), _take(context, builder, low, number)
            )
            found = builder.fmul(found, _splat(builder, factor))
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
def fit_pair(
    typing: Any, v: Any, o: Any, p: Any, inv: Any, t: Any, c: Any, half: Any, x: Any, y: Any,
    i: Any, q: Any,
) -> Any:  # fmt: skip
    """Codes of ``z = v inv`` at o and at p, 8 elements each, and what they add to a fit, at i.

    For thresholds t (7) and magnitudes c (an array of 8), a = |z| and m its nearest magnitude:
    x = m_o a_o + m_p a_p, y = m_o m_o + m_p m_p. half: codes of one sign.
    """
    del typing

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values, first, second, inverse, cuts, numbers, count, along, across, at, codes = args
        table = address(context, builder, sig.args[5], numbers, ir.Constant(first.type, 0))
        thresholds = [_splat(builder, builder.extract_value(cuts, k)) for k in range(7)]
        factor, middle = _splat(builder, inverse), _splat(builder, count, WORDS)
        products, squares = [], []
        for place in (first, second):
            raw = builder.load(address(context, builder, sig.args[0], values, place), align=4)
            z = builder.fmul(raw, factor)
            word = builder.bitcast(z, WORDS)
            a = builder.bitcast(builder.and_(word, _all(_MAGNITUDE)), FLOATS)
            number = _all(0)
            for cut in thresholds:
                above = builder.sext(builder.fcmp_ordered(">", a, cut), WORDS)
                number = builder.sub(number, above)
            m = _take(context, builder, table, number)
            products.append(builder.fmul(m, a))
            squares.append(builder.fmul(m, m))
            positive = builder.fcmp_ordered(">", z, ir.Constant(FLOATS, [0.0] * LANES))
            upper = builder.add(middle, number)
            lower = builder.sub(builder.sub(middle, _all(1)), number)
            code = builder.select(positive, upper, lower)
            _put_codes(builder, code, address(context, builder, sig.args[10], codes, place, BYTES))
        for kind, array, sums in ((sig.args[7], along, products), (sig.args[8], across, squares)):
            place = address(context, builder, kind, array, at)
            builder.store(builder.fadd(*sums), place, align=4)
        return context.get_dummy_value()

    u = types.uintp
    kinds = (v, u, u, types.float32, types.UniTuple(types.float32, 7), c, types.int32, x, y, u, q)
    return types.void(*kinds), codegen


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
