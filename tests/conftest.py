"""Fixtures every floor may use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from tests.processes import Pool


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded random generator: `torch.randn(n, generator=generator)` is the same in every run."""
    import torch  # here, so that tests without tensors start at once

    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo ranks in processes of their own, shared by all tests: see tests/processes.py."""
    from tests.processes import Pool

    shared = Pool(4)
    yield shared
    shared.close()
