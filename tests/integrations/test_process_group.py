"""The backend commlib under everything of torch that takes a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.integrations import backend_cases as cases
from tests.processes import Pool

pytestmark = pytest.mark.processes


def under(options: Any, *functions: Callable[[], None]) -> None:
    """Run on this rank, all in one default group of the backend."""
    with cases.world(options):
        assert dist.get_backend() == "commlib"
        for function in functions:
            function()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_operations_and_dtypes(pool: Pool, ranks: int) -> None:
    pool.run(under, "int8", cases.operations_and_dtypes, ranks=ranks)


def test_fp32_is_bitwise_gloos(pool: Pool) -> None:
    pool.run(under, "fp32", cases.operations_and_dtypes, ranks=2)


def test_moves_under_int8(pool: Pool) -> None:
    pool.run(
        under,
        "int8",
        cases.parameters_travel_raw,
        cases.activations_are_compressed,
        cases.what_is_not_compressed_is_passed_on,
        cases.works_are_torchs,
        ranks=3,
    )


def test_parameters_by_a_rule_of_their_own(pool: Pool) -> None:
    pool.run(under, cases.PARAMETERS, cases.named_parameters_are_compressed, ranks=2)
