"""commlib.wrap on FSDP2: gradients by name, every way FSDP2 reduces them, residuals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import commlib
from tests.integrations.fsdp_cases import equal, relative, sharded, train
from tests.processes import Pool

pytestmark = pytest.mark.processes


def fp32_is_bitwise_unwrapped() -> None:
    plain = train(sharded(), 4)
    assert equal(train(commlib.wrap(sharded(), "fp32"), 4), plain)
    lossy = train(commlib.wrap(sharded(), "int8+ef"), 4)
    assert torch.distributed.get_world_size() == 1 or 0 < relative(lossy, plain) < 0.01


def one_after_the_other(*parts: Callable[[], None]) -> None:
    for part in parts:
        part()


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_gradients(pool: Pool, ranks: int) -> None:
    pool.run(one_after_the_other, fp32_is_bitwise_unwrapped, ranks=ranks)
