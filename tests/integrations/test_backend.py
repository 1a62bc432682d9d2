"""The name "commlib" among torch's backends: how it comes there, and what its options say."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commlib
from commlib.integrations import backend, groups, inner
from commlib.integrations.process_group import ProcessGroup, options_of
from commlib.policy import Policy

ROOT = Path(__file__).resolve().parents[2]
ONE_RANK = """
dist.init_process_group("commlib", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(3))
dist.destroy_process_group()
print(dist.is_initialized())
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import commlib\nimport torch, torch.distributed as dist",
        "import torch, torch.distributed as dist\nimport commlib",
        "import commlib.distributed\nimport torch, torch.distributed as dist",
        "import sys, commlib\nassert 'torch' not in sys.modules\nimport torch.distributed as dist\n"
        "import torch, commlib.distributed",
    ],
    ids=["before torch", "after torch", "its verbs", "both"],
)
def test_importing_commlib_registers(imports: str) -> None:
    program = f"{imports}\nassert 'commlib.integrations.process_group' not in sys.modules{ONE_RANK}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{program}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"


def test_registering_again_changes_nothing() -> None:
    before = dict(dist.Backend._plugins)
    backend.register()
    backend.register_with_torch()
    assert dist.Backend._plugins == before
    assert dist.Backend.backend_list.count("commlib") == 1
    assert dist.Backend.default_device_backend_map["cpu"] == "gloo"


def test_a_failure_does_not_break_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise TypeError("another torch")

    monkeypatch.setattr(dist.Backend, "_plugins", {})
    monkeypatch.setattr(dist.Backend, "register_backend", fail)
    backend.autoload()
    assert "another torch" in caplog.text


def test_options() -> None:
    options = commlib.Options("int8", seed=3, timeout=90)
    assert options._timeout == datetime.timedelta(seconds=90)
    assert commlib.Options(timeout=datetime.timedelta(minutes=2))._timeout is not None
    assert commlib.Options()._timeout is None
    assert options == commlib.Options("int8", seed=3, timeout=90)
    assert options_of(options) is options
    assert options_of("int8") == commlib.Options("int8")
    assert options_of(None) == commlib.Options()
    assert options_of(Policy.parse("int4")).policy == Policy.parse("int4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": "int9"}, "int8"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "whole number"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"timeout": "5"}, "timeout is '5'"),
        ({"timeout": datetime.timedelta(0)}, "must be positive"),
    ],
)
def test_bad_options(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        commlib.Options(**arguments)


def test_bad_pg_options() -> None:
    with pytest.raises(ValueError, match="object; give commlib"):
        options_of(object())


def test_inner_backends() -> None:
    assert inner.parse("auto") == {"cpu": "gloo", "cuda": "gloo"}  # there is no CUDA here
    assert inner.parse("cpu:gloo,cuda:nccl") == {"cpu": "gloo", "cuda": "nccl"}
    assert set(inner.parse("fake").values()) == {"fake"}
    for text in ("commlib", "cpu:commlib", "gooo"):
        with pytest.raises(ValueError, match=f"inner is '{text}'.*'gloo'"):
            inner.parse(text)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the default group, of one rank."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")

    def make(options: Any, size: int = 1, store: Any = None) -> ProcessGroup:
        store = store or dist.HashStore()
        how: dict[str, Any] = {"rank": 0, "world_size": size, "pg_options": options}
        dist.init_process_group("commlib", store=store, **how)
        group = dist.group.WORLD
        assert isinstance(group, ProcessGroup)
        return group

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def test_policy_of_a_group(one_rank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMLIB_POLICY", "int4")
    for given, expected in ((None, "int4"), ("int8", "int8"), (commlib.Options("auto"), "auto")):
        assert str(groups.policy(one_rank(given))) == expected
        dist.destroy_process_group()
    monkeypatch.setenv("COMMLIB_POLICY", "int9")
    with pytest.raises(ValueError, match="int9"):
        one_rank(None)


def test_timeout_of_a_group(one_rank: Any) -> None:
    group = one_rank(commlib.Options("int8", timeout=77))
    options = group._get_backend(torch.device("cpu")).options
    assert options._timeout == datetime.timedelta(seconds=77)


def test_what_c10d_knows_of_a_group(one_rank: Any) -> None:
    group = one_rank("int8")
    assert dist.get_backend() == group.name() == "commlib"
    assert dist.get_backend_config() == "cpu:commlib,cuda:commlib"
    assert group.inner_backends == {"cpu": "gloo", "cuda": "gloo"}
    assert group._get_sequence_number_for_group() == group.plain._get_sequence_number_for_group()
    assert group.get_group_store() is not None
    x = torch.arange(4096.0)
    dist.all_reduce(x)
    assert torch.equal(x, torch.arange(4096.0))  # one rank: nothing to compress


def test_fake_backend_inside(one_rank: Any) -> None:
    """As for benchmarks of what a call costs: no rank but this one exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    group = one_rank(commlib.Options("int8", inner="fake"), size=8, store=FakeStore())
    assert group.size() == 8
    dist.all_reduce(torch.arange(4096))
    dist.all_reduce(torch.ones(3))
    dist.barrier()
