"""Fixtures every floor may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from bench.forked import forked

if TYPE_CHECKING:
    import torch

    from tests.processes import Pool

# PyTorch's stores ask the name server for the name of every peer; where an answer gets lost, that
# costs a second and not five.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

# What ranks in processes of their own import and compile, whichever test forks the first of them.
forked(
    "bench.fault_server",
    "commlib.integrations.wrapping",
    "torch._dynamo",  # which the first optimizer imports
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
)


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
