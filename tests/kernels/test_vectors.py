"""What is written in LLVM's terms, alone: lookups, also without the instruction, and sums."""

from typing import Any

import numba
import numpy as np
import pytest

from commlib_kernels.numba_cpu import lookup, vectors

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


def test_a_pass_of_butterflies_is_hadamards_matrix() -> None:
    @numba.njit
    def run(x: Any) -> None:
        vectors.last16(x, np.uintp(0), np.uintp(8))

    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < 128:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    whole = RANDOM.integers(-8, 9, (128,)).astype(np.float32)  # sums are exact
    x = whole.copy()
    run(x)
    np.testing.assert_array_equal(x, matrix @ whole)
