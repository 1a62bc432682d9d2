"""Two ranks of NCCL on one GPU, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu.nccl import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    shared = Ranks()
    yield shared
    shared.close()
