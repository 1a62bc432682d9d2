"""Which device a communicator serves, and what it is told about tensors of another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from commlib import Communicator, compressors, transport
from commlib.integrations.ddp_refusals import device_of
from commlib.traffic import check_tensor
from commlib.transport import ThreadTransport, group_device
from tests.communicators import only

GLOO = {"cpu": "gloo", "cuda": "gloo"}
MIXED = {"cpu": "gloo", "cuda": "nccl"}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("served", "wanted", "has_cuda", "expected"),
    [
        (GLOO, None, True, "cpu"),  # gloo says that it serves CUDA too
        ({"cpu": "gloo"}, None, False, "cpu"),  # no backend named, no device there
        ({"cpu": "mpi", "cuda": "mpi"}, None, True, "cpu"),
        ({"cuda": "nccl"}, None, True, "cuda:2"),
        (MIXED, None, True, "cuda:2"),
        (MIXED, "cpu", True, "cpu"),
        (MIXED, "cuda", True, "cuda:2"),
        (MIXED, torch.device("cuda", 1), True, "cuda:1"),
        (MIXED, "cpu:0", True, "cpu"),
        ({"cpu": "fake", "cuda": "fake"}, None, False, "cpu"),
    ],
)
def test_the_device_of_a_group(
    monkeypatch: pytest.MonkeyPatch, served: Any, wanted: Any, has_cuda: bool, expected: str
) -> None:
    monkeypatch.setattr(transport, "backends", lambda group: served)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    group: Any = None
    assert group_device(group, wanted) == torch.device(expected)


@pytest.mark.parametrize(
    ("served", "wanted"), [(GLOO, "cuda"), ({"cuda": "nccl"}, "cpu"), (MIXED, "meta")]
)
def test_a_device_that_a_group_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, served: Any, wanted: str
) -> None:
    monkeypatch.setattr(transport, "backends", lambda group: served)
    group: Any = None
    with pytest.raises(ValueError, match=f"does not move {wanted} tensors.*cpu:gloo,cuda:nccl"):
        group_device(group, wanted)


@pytest.mark.parametrize(
    ("device", "moves", "fits"),
    [
        ("cpu", "cpu", True),
        ("cuda:1", "cuda:1", True),
        ("cuda:0", "cuda:1", False),
        ("cuda:0", "cpu", False),
        ("cpu", "cuda:0", False),
    ],
)
def test_tensors_of_another_device_are_refused(device: str, moves: str, fits: bool) -> None:
    x: Any = SimpleNamespace(device=torch.device(device), is_contiguous=lambda: True)
    if fits:
        check_tensor("all_reduce", x, torch.device(moves))
        return
    with pytest.raises(ValueError, match=f"is on {device}, this group moves {moves}.*device="):
        check_tensor("all_reduce", x, torch.device(moves))


def test_a_transport_has_its_device_already() -> None:
    (alone,) = ThreadTransport.world(1)
    assert Communicator(alone, device="cpu").transport is alone
    with pytest.raises(ValueError, match="the transport moves cpu tensors"):
        Communicator(alone, device="cuda:0")


def test_a_model_on_one_device() -> None:
    def ddp(*devices: str) -> Any:
        layers = [nn.Linear(2, 2, bias=False, device=device) for device in devices]
        return SimpleNamespace(module=nn.Sequential(*layers), parameters_to_ignore={"2.weight"})

    assert device_of(ddp("cpu", "cpu", "meta")) == CPU  # what DDP leaves alone may lie anywhere
    with pytest.raises(ValueError, match=r"lie on cpu, meta.*one device per DDP model"):
        device_of(ddp("cpu", "meta"))


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_kernels_are_compiled_for_the_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Those of the policy and of the schemes named, whichever rounding they will get."""
    compiled = []

    def warmup(fmt: Any, where: torch.device) -> None:
        compiled.append((fmt.kind, fmt.bits, fmt.stochastic, str(where)))

    def backend_for(device: torch.device) -> Any:
        return SimpleNamespace(warmup=warmup)

    monkeypatch.setattr(compressors, "backend_for", backend_for)
    (alone,) = ThreadTransport.world(1)
    c = Communicator(alone, only("int4+ef"))
    c._compressors._device = torch.device(device)
    c.warmup("int8:round=nearest@two_phase:back=int2")
    assert set(compiled) == {
        ("uniform", 4, False, device),
        ("uniform", 4, True, device),
        ("uniform", 8, False, device),
        ("uniform", 2, False, device),
        ("uniform", 2, True, device),
    }
    assert c.state_dict()["compressors"] == {}  # nothing is remembered for it
