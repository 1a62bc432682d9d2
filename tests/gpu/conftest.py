"""Two ranks of NCCL on one GPU, shared by the tests of this folder; and shards of them."""

from __future__ import annotations

import os
import zlib
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

        def number(item: pytest.Item) -> int:
            parameters = getattr(item, "callspec", None)
            text = parameters.params.get("text", "") if parameters else item.nodeid
            return zlib.crc32(str(text).encode()) % int(shards)

        items[:] = [item for item in items if number(item) == int(shard)]
