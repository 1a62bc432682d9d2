"""Random words for a strip: Philox4x32-10 by whole vectors, in LLVM's terms.

A vector holds a word of a counter in each 64-bit lane, of which multiplications read the low half:
what the high half holds never matters, and nothing is moved between lanes until the words are kept.
Even groups and odd ones take turns: each multiplies while the other waits for its product.

Drawing takes as long as reading what is coded. Both are done at once: see ahead.py.
"""

from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from commlib_kernels.numba_cpu.ahead import ask
from commlib_kernels.numba_cpu.jit import SCALARS, inlined, loop
from commlib_kernels.numba_cpu.vectors import address, splat
from commlib_kernels.philox import MULTIPLIERS, ROUNDS, WEYL

U = np.uintp
u32, u64 = np.uint32, np.uint64

philox = SCALARS.philox

WORD, PAIR = ir.IntType(32), ir.IntType(64)


def _product(builder: Any, word: Any, number: int) -> tuple[Any, Any]:
    """High and low word; what lies above the low one is not cleared."""
    kind = word.type
    factor, half, low = (
        ir.Constant(kind, n if kind == PAIR else [n] * kind.count) for n in (number, 32, 0xFFFFFFFF)
    )
    product = builder.mul(builder.and_(word, low), factor)
    return builder.lshr(product, half), product


def _xor(builder: Any, *words: Any) -> Any:
    """Of scalars and vectors; scalars by themselves, once for all lanes and rounds of a loop."""
    alike = [word for word in words if word.type == PAIR]
    others = [word for word in words if word.type != PAIR]
    total = reduce(builder.xor, alike)
    return reduce(builder.xor, others, splat(builder, total, others[0].type) if others else total)


def _philox(builder: Any, counter: list[Any], key: list[Any]) -> list[Any]:
    """The words of counters, in the low halves of lanes; what all have in common is a scalar."""
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        k0, k1 = (builder.zext(k, PAIR) for k in key)
        high0, low0 = _product(builder, c0, MULTIPLIERS[0])
        high1, low1 = _product(builder, c2, MULTIPLIERS[1])
        c0, c2 = _xor(builder, high1, c1, k0), _xor(builder, high0, c3, k1)
        c1, c3 = low1, low0
        key = [builder.add(k, WORD(w)) for k, w in zip(key, WEYL, strict=True)]
    return [c0, c1, c2, c3]


def _make(count: int) -> Any:
    lanes, words = ir.VectorType(PAIR, count), ir.VectorType(WORD, 2 * count)
    places = ir.Constant(lanes, [*range(0, count, 2), *range(1, count, 2)])
    turns = [half + 2 * i for i in range(count // 2) for half in (0, count)]
    order = ir.Constant(ir.VectorType(WORD, count), turns)

    def draw(
        typing: Any, r: Any, o: Any, apart: Any, group: Any, high: Any, step: Any, rank: Any,
        seed: Any, key: Any,
    ) -> Any:  # fmt: skip
        del typing

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            out, index, apart, *counter = args
            first, *alike = (builder.zext(word, PAIR) for word in counter[:4])
            groups = builder.add(splat(builder, first, lanes), places)
            for drawn in _philox(builder, [groups, *alike], counter[4:]):
                both = builder.bitcast(drawn, words)
                word = builder.shuffle_vector(both, both, order)
                place = address(context, builder, sig.args[0], out, index, word.type)
                builder.store(word, place, align=4)
                index = builder.add(index, apart)
            return context.get_dummy_value()

        u, w = types.uintp, types.uint32
        return types.void(r, u, u, w, w, w, w, w, w), codegen

    return intrinsic(draw)


draw4, draw8 = _make(4), _make(8)
"""``(r, o, apart, group, high, step, rank, seed, key)``: word w of 4 or 8 groups from `group` on to
r[o + w apart]; `high` is the counter's second word, which they have in common."""


@inlined
def draw1(r, o, apart, group, step, rank, seed, key):
    """The same of one group, of any number."""
    words = philox(u32(group), u32(group >> u64(32)), step, rank, seed, key)
    r[o] = words[0]
    r[o + apart] = words[1]
    r[o + U(2) * apart] = words[2]
    r[o + U(3) * apart] = words[3]


@loop
def random_words(r, nb, width, stream, ahead):
    """Word w of group i of a block to r[block / 2 + w width / 8 + i].

    Its low half serves lane w of the group, its high half lane w + 4.

    Args:
        stream: (first group, step, rank, seed, key); philox.py.
        ahead: the next strip; ahead.py.
    """
    group, step, rank, seed, key = stream
    apart, half = width // U(8), width // U(2)
    high = u32(u64(group) >> u64(32))
    alike = high == u32(u64(group + nb * apart) >> u64(32))
    eights = apart & ~U(7) if alike else U(0)
    fours = apart & ~U(3) if alike else U(0)
    for b in range(nb):
        o, first = b * half, group + b * apart
        for i in range(U(0), eights, U(8)):
            ask(ahead, b * width + U(8) * i, U(64))
            draw8(r, o + i, apart, u32(first + i), high, step, rank, seed, key)
        for i in range(eights, fours, U(4)):
            draw4(r, o + i, apart, u32(first + i), high, step, rank, seed, key)
        for i in range(fours, apart):
            draw1(r, o + i, apart, u64(first + i), step, rank, seed, key)
