"""Two ranks of NCCL on one GPU, shared by the tests of this folder; and shards of them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.gpu.nccl import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    shared = Ranks()
    yield shared
    shared.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """COMMLIB_SHARD=k/n keeps the tests of the k-th of n shares of the formats.

    Tests of one format stay together: its kernels are compiled once per process.
    """
    shard, _, shards = os.environ.get("COMMLIB_SHARD", "").partition("/")
    if shards:

        def text(item: pytest.Item) -> str:
            parameters = getattr(item, "callspec", None)
            return str(parameters.params.get("text", "")) if parameters else ""

        texts = sorted({text(item) for item in items})
        mine = set(texts[int(shard) :: int(shards)])
        items[:] = [item for item in items if text(item) in mine]
