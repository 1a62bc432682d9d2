"""Kernels compiled once, here, and read from the cache by the ranks, which have 60 s for a case."""

from __future__ import annotations

import pytest
import torch

from commlib.codecs import codec
from commlib_kernels import backend_for


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    warmup = getattr(backend_for(torch.device("cpu")), "warmup", None)
    if warmup is not None:
        for text in ("fp32", "int8", "int4:round=nearest", "int4:round=stochastic"):
            warmup(codec(text).format)
