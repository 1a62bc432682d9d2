"""Butterflies on vectors of 8 elements, written in LLVM's own terms.

What the loop vectoriser makes of a Hadamard transform spends its time on shuffling: pairs that are
less than a vector apart cost it three shuffles and permutations per vector and pass. Here vectors
that are far apart meet whole, and only the last three stages shuffle, once each:

    pairs 4 apart    x + swap(x) in lanes 0..3, swap(x) - x in lanes 4..7; 2 and 1 apart alike

A pass holds up to 16 vectors in registers and does their four stages (and the last three) between
one load and one store. LLVM's vectors are of any length: the code is the same for every processor.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from commlib_kernels.scalar import NAN

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


def has(context: Any, feature: str) -> bool:
    """Whether what is compiled for has an instruction set, such as avx2."""
    _, _, features = context.codegen().magic_tuple()
    return f"+{feature}" in features.split(",")


def splat(builder: Any, scalar: Any, vector: Any = FLOATS) -> Any:
    """A vector of one number."""
    none = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(none, scalar, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, none, lanes)


def low_bytes(builder: Any, words: Sequence[Any]) -> Any:
    """The low bytes of 2^k vectors of words, as one vector."""
    while len(words) > 1:
        lanes = list(range(2 * words[0].type.count))
        places = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        pairs = zip(words[::2], words[1::2], strict=True)
        words = [builder.shuffle_vector(low, high, places) for low, high in pairs]
    return builder.trunc(words[0], ir.VectorType(ir.IntType(8), words[0].type.count))


def _stages(builder: Any, x: list[Any], finish: Callable[[Any], Any]) -> Iterator[Any]:
    """All stages over whole vectors, the widest pairs first, then `finish` of each, in order.

    One half is done before the other is begun: processors with 16 registers keep one of them.
    """
    if len(x) == 1:
        yield finish(x[0])
        return
    half = len(x) // 2
    pairs = list(zip(x[:half], x[half:], strict=True))
    sums = [(builder.fadd(a, b), builder.fsub(a, b)) for a, b in pairs]
    for part in zip(*sums, strict=True):
        yield from _stages(builder, list(part), finish)


def within(context: Any, builder: Any, x: Any) -> Any:
    """The stages within a vector: pairs 4, 2 and 1 elements apart."""
    for half in (4, 2, 1):
        lanes = [lane ^ half for lane in range(LANES)]
        other = builder.shuffle_vector(x, x, ir.Constant(WORDS, lanes))
        if has(context, "fma"):  # times one is exact: it rounds as the sum does
            ones = ir.Constant(FLOATS, [-1.0 if lane & half else 1.0 for lane in range(LANES)])
            kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
            fma = builder.module.declare_intrinsic("llvm.fma.v8f32", (), kind)
            x = builder.call(fma, [x, ones, other])
        else:
            signs = ir.Constant(WORDS, [_MINUS if lane & half else 0 for lane in range(LANES)])
            turned = builder.xor(builder.bitcast(x, WORDS), signs)
            x = builder.fadd(other, builder.bitcast(turned, FLOATS))
    return x


def _flip(builder: Any, x: Any, factor: Any, signs: Any) -> Any:
    """``D x factor`` of a vector."""
    turned = builder.bitcast(builder.fmul(x, factor), WORDS)
    return builder.bitcast(builder.xor(turned, signs), FLOATS)


def _one_nan(builder: Any, x: Any) -> Any:
    """x with one NaN for all."""
    nan = builder.bitcast(ir.Constant(WORDS, [NAN] * LANES), FLOATS)
    return builder.select(builder.fcmp_unordered("uno", x, x), nan, x)


class _Lines:
    """Vectors of an array: at `first`, ``first + apart``, .."""

    def __init__(
        self, context: Any, builder: Any, kind: Any, array: Any, first: Any, apart: Any
    ) -> None:
        self.builder = builder
        self.place: Callable[[int], Any] = lambda i: address(
            context,
            builder,
            kind,
            array,
            builder.add(first, builder.mul(apart, ir.Constant(first.type, i))),
            FLOATS if kind.dtype == types.float32 else WORDS,
        )

    def load(self, i: int) -> Any:
        return self.builder.load(self.place(i), align=4)

    def store(self, i: int, value: Any) -> None:
        self.builder.store(value, self.place(i), align=4)


def _make(count: int, *, last: bool) -> Any:
    def pass_(typing: Any, x: Any, o: Any, step: Any) -> Any:
        del typing

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            lines = _Lines(context, builder, sig.args[0], *args)
            held = [lines.load(i) for i in range(count)]
            finish = partial(within, context, builder) if last else _same
            for i, value in enumerate(_stages(builder, held, finish)):
                lines.store(i, value)
            return context.get_dummy_value()

        return types.void(x, types.uintp, types.uintp), codegen

    return intrinsic(pass_)


def _same(x: Any) -> Any:
    return x


def _make_flipped(count: int, *, last: bool, first: bool) -> Any:
    def pass_(
        typing: Any, x: Any, factor: Any, signs: Any, at: Any, y: Any, o: Any, step: Any
    ) -> Any:
        del typing

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source, number, words, place, target, o, step = args
            factor = splat(builder, number)
            xs = _Lines(context, builder, sig.args[0], source, o, step)
            ys = _Lines(context, builder, sig.args[4], target, o, step)
            ds = _Lines(context, builder, sig.args[2], words, place, step)
            held = [xs.load(i) for i in range(count)]
            if first:
                held = [_flip(builder, x, factor, ds.load(i)) for i, x in enumerate(held)]
            finish = partial(within, context, builder) if last else _same
            for i, value in enumerate(_stages(builder, held, finish)):
                if not first:
                    value = _one_nan(builder, _flip(builder, value, factor, ds.load(i)))
                ys.store(i, value)
            return context.get_dummy_value()

        u = types.uintp
        return types.void(x, types.float32, signs, u, y, u, u), codegen

    return intrinsic(pass_)


@intrinsic
def prefetch(typing: Any, x: Any, o: Any) -> Any:
    """Ask for the cache line with element o of x, which may lie beyond its end.

    Into L2: L1 waits for a few lines at a time only, and what is read meanwhile waits behind them.
    """
    del typing

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        line, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        place = builder.bitcast(address(context, builder, sig.args[0], *args), line)
        kind = ir.FunctionType(ir.VoidType(), [line, word, word, word])
        call = builder.module.declare_intrinsic("llvm.prefetch", (line,), kind)
        builder.call(call, [place, word(0), word(2), word(1)])  # to read, to L2, data
        return context.get_dummy_value()

    return types.void(x, types.uintp), codegen


apart2, apart4, apart8, apart16 = (_make(count, last=False) for count in (2, 4, 8, 16))
"""``(x, o, step)``: all stages of 2 to 16 vectors of x, at o, o + step, ..; in place."""

last1, last2, last4, last8, last16 = (_make(count, last=True) for count in (1, 2, 4, 8, 16))
"""The same, and then the stages within them."""

flip2, flip4, flip8, flip16 = (
    _make_flipped(count, last=False, first=True) for count in (2, 4, 8, 16)
)
"""``(x, factor, signs, at, y, o, step)``: the same of ``D x factor`` to y; signs from `at` on."""

flip_last16 = _make_flipped(16, last=True, first=True)
"""The same, and then the stages within them."""

last16_flip = _make_flipped(16, last=True, first=False)
"""``(x, factor, signs, at, y, o, step)``: y = ``D H x factor`` of 16 vectors; one NaN for all."""
