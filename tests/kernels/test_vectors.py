"""What is written in LLVM's terms, alone: lookups, codes and sums, also without an instruction."""

from typing import Any

import numba
import numpy as np
import pytest
import torch

from commlib_kernels import Format, numba_cpu, reference
from commlib_kernels.layout import Layout, stride
from commlib_kernels.numba_cpu import fit, gauss, lookup, nearest, rotation, vectors
from commlib_kernels.philox import SIGNS
from commlib_kernels.reference import elements
from commlib_kernels.tables import thresholds
from commlib_kernels.tag import Tag

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("permutes", [True, False])
@pytest.mark.parametrize("add", [False, True])
def test_a_lookup_is_the_table_times_the_scale(
    permutes: bool, add: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not permutes:
        monkeypatch.setattr(lookup, "permutes", lambda context: False)
    look_up: Any = lookup._make_look_up(add=add)

    @numba.njit
    def run(q: Any, table: Any, scale: Any, v: Any) -> None:
        look_up(q, table, scale, v, np.uintp(8))

    table = RANDOM.standard_normal(16).astype(np.float32)
    q = RANDOM.permutation(24).astype(np.uint8) % np.uint8(16)
    v = RANDOM.standard_normal(24).astype(np.float32)
    want = v.copy()
    want[8:16] = table[q[8:16]] * np.float32(0.7) + (want[8:16] if add else 0)
    run(q, table, np.float32(0.7), v)
    np.testing.assert_array_equal(v, want)


def test_the_tree_adds_the_upper_half_to_the_lower() -> None:
    x = (RANDOM.standard_normal(8) * 10.0 ** np.arange(8)).astype(np.float32)

    @numba.njit
    def run(x: Any) -> Any:
        return lookup.tree(x)

    y = x[:4] + x[4:]
    y = y[:2] + y[2:]
    assert run(x) == y[0] + y[1]


@pytest.mark.parametrize("fma", [True, False])
def test_a_pass_of_butterflies_is_hadamards_matrix(
    fma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fma:
        monkeypatch.setattr(vectors, "has", lambda context, feature: False)
    last16 = vectors._make(16, last=True)

    @numba.njit
    def run(x: Any) -> None:
        last16(x, np.uintp(0), np.uintp(8))

    whole = RANDOM.integers(-8, 9, (128,)).astype(np.float32)  # sums are exact
    x = whole.copy()
    run(x)
    np.testing.assert_array_equal(x, hadamard(128) @ whole)


def hadamard(n: int) -> Any:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@pytest.mark.parametrize("width", [128, 256, 512, 1024, 2048, 4096])
def test_flips_within_the_first_and_the_last_pass(width: int) -> None:
    """Of two blocks each, at a place in the segment where their signs go around."""
    blocks, place = 2, SIGNS - width
    signs = RANDOM.integers(0, 2, SIGNS).astype(np.uint32) << np.uint32(31)
    v = RANDOM.integers(-8, 9, (blocks, width)).astype(np.float32)
    y, back = np.empty_like(v), np.empty_like(v)
    turned = np.take(signs, np.arange(v.size) + place, mode="wrap").reshape(v.shape) > 0
    factor = 2.0 ** -(int(np.log2(width)) // 2)

    sizes = [np.uintp(n) for n in (blocks, width, place)]
    rotation.forward(v.ravel(), *sizes, signs, y.ravel())
    rotation.backward(y.ravel().copy(), *sizes, signs, back.ravel())
    flipped = np.where(turned, -v, v)
    np.testing.assert_array_equal(y, flipped @ hadamard(width) * np.float32(factor))
    np.testing.assert_array_equal(back, v)


@pytest.mark.parametrize("bits", [4, 8])
def test_nearest_rounds_ties_to_even(bits: int) -> None:
    @numba.njit
    def run(v: Any, wire: Any) -> None:
        o, p = np.uintp(0), np.uintp(32)
        if bits == 4:
            nearest.nibbles(v, o, p, np.float32(0.5), wire, o)
        else:
            nearest.octets(v, o, p, np.float32(0.5), wire, o)
            nearest.octets(v, p, p, np.float32(0.5), wire, p)

    top = 2 ** (bits - 1) - 1
    for _ in range(8):
        v = (RANDOM.integers(-4 * top, 4 * top + 1, 64) / 2).astype(np.float32)
        v[RANDOM.integers(0, 64, 16)] = np.nextafter(np.float32(1), np.float32([0, 2] * 8))
        codes = np.rint(v * np.float32(0.5)).astype(np.int8).view(np.uint8)
        wire = np.zeros(64, np.uint8)
        run(v, wire)
        if bits == 4:
            np.testing.assert_array_equal(wire[:32], codes[:32] & 15 | codes[32:] << 4)
        else:
            np.testing.assert_array_equal(wire, codes)


@pytest.mark.parametrize("levels", [7, 127])
def test_what_its_scale_is_made_of_rounds_to_the_largest_code(levels: int) -> None:
    """Every mantissa: where the scale is of the absolute maximum no code needs a clamp."""
    m = np.arange(0x3F800000, 0x40000000, dtype=np.uint32).view(np.float32)
    scale = elements.bf16_value(elements.bf16_up(m / np.float32(levels)))
    assert np.rint(m * (np.float32(1) / scale)).max() == levels


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("scale", ["l2", "e8m0", "e8m0_up"])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_clamped_where_values_may_exceed_them(
    bits: int, scale: Any, stochastic: bool
) -> None:
    top = 2 ** (bits - 1) - 1
    fmt = Format("uniform", bits=bits, levels=top, block=64, scale=scale, stochastic=stochastic)
    x = torch.tensor(RANDOM.uniform(-1.99, 1.99, 640).astype(np.float32))
    x[::64], x[1::64] = 1.999, -1.999  # 7.996 and 127.9 of the power of two below
    layout = Layout((640,), align=fmt.align)
    wires = [torch.zeros(stride(layout, fmt), dtype=torch.uint8) for _ in range(2)]
    for backend, wire in zip((numba_cpu, reference), wires, strict=True):
        backend.quantize(fmt, x, wire, layout, Tag())
    assert torch.equal(*wires)


def near(t: Any) -> Any:
    """Numbers at thresholds and next to them, in random order, both signs; 0 and large ones too."""
    sides = [np.nextafter(t, np.float32(to)) for to in (-np.inf, np.inf)]
    a = np.concatenate([t, *sides, np.float32([0, 1e-30, 64]), t * RANDOM.random(len(t))])
    a = np.resize(np.concatenate([a, -a]).astype(np.float32), 64)
    return RANDOM.permutation(a)


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_are_those_of_comparing_with_every_threshold(
    instructions: bool, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not instructions:
        monkeypatch.setattr(lookup, "permutes", lambda context: False)
        monkeypatch.setattr(fit, "has", lambda context, feature: False)
    table = gauss.numbers(f"gauss{bits}")
    half = 2 ** (bits - 1)
    first = max(2 * half - 8, 0)

    @numba.njit
    def run(v: Any, table: Any, guess: Any, x: Any, y: Any, q: Any, both: Any) -> None:
        o, p = np.uintp(0), np.uintp(16)
        cuts, c, half = table[16:], table[first:], np.int32(table[31])
        fit.fit_run(v, o, p, np.float32(1), guess, cuts, c, half, x, y, o, q, o)
        fit.fit_pairs(v, o, p, np.float32(1), guess, cuts, c, half, x, y, p, both, o)

    t = table[24 : 23 + half]
    for _ in range(8):
        v = near(t if bits > 1 else np.float32([0.5, 1]))[:32]
        a, q, both = np.abs(v), np.zeros(32, np.uint8), np.zeros(16, np.uint8)
        x, y = np.zeros(32, np.float32), np.zeros(32, np.float32)
        run(v, table, tuple(table[32:35]), x, y, q, both)
        number = (a[:, None] > t).sum(1)
        np.testing.assert_array_equal(q, np.where(v > 0, half + number, half - 1 - number))
        if bits == 4:
            np.testing.assert_array_equal(both, q[:16] | q[16:] << 4)
        m = table[half : 2 * half][number]
        np.testing.assert_array_equal(x, np.tile((m * a)[:16] + (m * a)[16:], 2))
        np.testing.assert_array_equal(y, np.tile((m * m)[:16] + (m * m)[16:], 2))


@pytest.mark.parametrize("threshold", [0.3, 0.98, 2.0])
def test_one_threshold_may_lie_anywhere(threshold: float) -> None:
    assert round(threshold * fit.steps_of([threshold])) == 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_cell_holds_one_threshold(bits: int) -> None:
    values = gauss.numbers(f"gauss{bits}")[: 2**bits]
    t = thresholds(tuple(values.tolist()))[2 ** (bits - 1) :]
    cells = np.rint(t * fit.steps_of(t.tolist()) * (1 + np.float64([[-0.02], [0.02]])))
    np.testing.assert_array_equal(np.minimum(cells, len(t)), [range(1, len(t) + 1)] * 2)


def test_thresholds_that_no_cells_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="too uneven"):
        fit.steps_of([0.1, 0.2, 1.0, 1.1])


@pytest.mark.parametrize("n", [2, 8, 32, 64, 128, 512, 2048])
def test_halves_adds_the_upper_half_to_the_lower(n: int) -> None:
    x = (RANDOM.standard_normal(n) * 10.0 ** RANDOM.integers(-4, 4, n)).astype(np.float32)
    want = x
    while len(want) > 1:
        want = want[: len(want) // 2] + want[len(want) // 2 :]
    assert gauss.halves(x.copy(), np.uintp(n)) == want[0]
