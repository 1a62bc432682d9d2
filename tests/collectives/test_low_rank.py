"""Low rank's arithmetic: orthonormal to rounding, and the same bits wherever it runs."""

from __future__ import annotations

import pytest
import torch

from commlib.collectives.low_rank import approximated, orthonormal, product

EPS = 2.0**-24


def random(rank: int, numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rank, numel, generator=torch.Generator().manual_seed(seed))


def multiplied(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    out = torch.full((p.shape[1], q.shape[1]), 7.0)
    product(p, q, out, torch.full_like(out, float("nan")))
    return out


def gap(rows: torch.Tensor) -> float:
    """How far rows are from orthonormal ones."""
    wide = rows.double()
    return float((wide @ wide.T - torch.eye(len(rows))).abs().max())


@pytest.mark.parametrize("numel", [4, 5, 31, 128, 1000])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_rows_become_orthonormal_in_their_order(numel: int, scale: float) -> None:
    given = random(4, numel) * scale
    (rows,) = orthonormal([given])
    assert gap(rows) < 40 * EPS
    # row j is in the span of the first j + 1 given: coefficients are a lower triangle
    coefficients = given.double() / scale @ rows.double().T
    assert coefficients.triu(1).abs().max() < 1e-5
    assert (coefficients.diagonal() > 0).all()


def test_rows_that_depend_on_others_become_orthonormal_too() -> None:
    """What is left of them is rounding: a second pass makes it orthogonal as well."""
    given = random(3, 500)
    given[1] = 2 * given[0]
    given[2] = given[0] - 1e-6 * given[2]
    (rows,) = orthonormal([given])
    kept = rows[rows.norm(dim=1) > 0]
    assert gap(kept) < 40 * EPS


def test_rows_with_few_columns_count_no_direction_twice() -> None:
    """An embedding of which a batch had two tokens: what dependent rows leave is in their span."""
    for columns in (1, 2, 3, 5):
        given = torch.zeros(6, 64)
        given[:, 10 : 10 + columns] = random(6, columns)
        (rows,) = orthonormal([given])
        kept = rows[rows.norm(dim=1) > 0]
        assert len(kept) == columns
        assert gap(kept) < 40 * EPS
        exact = given.double()
        assert (exact - exact @ rows.double().T @ rows.double()).norm() < 1e-5 * exact.norm()


def test_rows_of_zeros_stay_and_nonfinite_ones_show() -> None:
    given = random(3, 40)
    given[1] = 0
    (rows,) = orthonormal([given])
    assert not rows[1].any()
    assert gap(rows[[0, 2]]) < 40 * EPS
    assert not orthonormal([torch.zeros(2, 9)])[0].any()
    for bad in (float("nan"), float("inf"), -float("inf")):
        given = random(3, 40)
        given[1, 7] = bad
        (rows,) = orthonormal([given])
        assert rows[0].isfinite().all()
        assert rows[1:].isnan().any(1).all()


def test_a_factor_does_not_depend_on_its_neighbours_nor_on_threads() -> None:
    factors = [random(4, n, n) for n in (60, 100_000, 64, 33, 100_000)]
    together = orthonormal(factors)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for factor, want in zip(factors, together, strict=True):
                (alone,) = orthonormal([factor])
                assert torch.equal(alone.view(torch.int32), want.view(torch.int32))
            outs = []
            for n in (count, threads):
                torch.set_num_threads(n)
                outs.append(multiplied(together[1], together[0]))
            assert torch.equal(*outs)
    finally:
        torch.set_num_threads(threads)


def test_a_product_is_the_product() -> None:
    p, q = random(5, 70), random(5, 33, 1)
    want = p.double().T @ q.double()
    assert (multiplied(p, q) - want).abs().max() < 5 * EPS * 5 * p.abs().max() * q.abs().max()


def test_what_has_the_rank_is_approximated_exactly_and_the_rest_nearly_at_best() -> None:
    low = random(3, 90).T @ random(3, 50, 1)
    assert (approximated(low, 3) - low).norm() < 1e-5 * low.norm()
    noise = random(90, 50, 2)
    best = torch.linalg.svdvals(noise)[4:].norm()
    assert best <= (approximated(noise, 4) - noise).norm() < 1.1 * best
