"""Every codec of the table through its own interface: each operation of `commlib bench codecs`.

`make bench ARGS="-k codecs"`. A new codec is here as soon as it is in the table.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commlib.benchmark.codecs import OPERATIONS, operations, roundings
from commlib.codecs import CODECS, codec

NUMEL = 1 << 20


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("text", CODECS)
def test_codec(benchmark: Any, generator: torch.Generator, text: str, operation: str) -> None:
    torch.set_num_threads(1)
    x = torch.randn(NUMEL, generator=generator)
    first, *others = roundings(codec(text))
    if operation == "stochastic":
        if not others:
            pytest.skip(f"{text} has one rounding only")
        call = operations(others[0], x)["encode"]
    else:
        found = operations(first, x)
        if operation not in found:
            pytest.skip(f"{text} takes no error feedback")
        call = found[operation]
    benchmark.group = f"codecs: {operation}"
    benchmark.pedantic(call, rounds=9, warmup_rounds=1)
    benchmark.extra_info["GBps"] = NUMEL * 4 / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["bits"] = codec(text).bits_per_element
