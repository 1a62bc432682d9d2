"""How commlib enters the suite: what its gates and its counter see. Needs nothing of the suite."""

from __future__ import annotations

import contextlib
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.conformance import gpus, spy
from tests.conformance.suite import GlooLike, events_of_the_reference

BACKEND = GlooLike("commlib")


def test_gates_of_gloo_are_open_to_it_and_no_others() -> None:
    assert BACKEND == "gloo"
    assert "gloo" == BACKEND  # noqa: SIM300 (the order is what is tested)
    assert not BACKEND != "gloo"  # noqa: SIM202
    assert BACKEND in {"gloo"}
    assert BACKEND in ["nccl", "gloo"]
    assert BACKEND != "nccl"
    assert BACKEND not in {"nccl", "mpi"}


def test_a_group_made_of_it_is_commlibs() -> None:
    assert BACKEND == "commlib"
    assert (BACKEND.lower(), BACKEND.upper(), f"{BACKEND}") == ("commlib", "COMMLIB", "commlib")
    assert str(dist.Backend(BACKEND)) == "commlib"


def test_events_of_gloo_are_found_under_its_name() -> None:
    recorded = [types.SimpleNamespace(name="gloo:send"), types.SimpleNamespace(name="gloo:recv")]
    find = events_of_the_reference(
        lambda name, profiler: [event for event in profiler if event.name == name], "commlib"
    )
    for _ in range(2):  # the profiler's own events keep their names
        assert [event.name for event in find("commlib:send", recorded)] == ["commlib:send"]
    assert find("commlib:reduce", recorded) == []


class Group:
    def allreduce(self) -> str:
        return "reduced"

    def gather(self) -> None:
        raise RuntimeError("no")

    allgather_coalesced = alltoall = scatter = allreduce

    def size(self) -> int:
        return 1


def test_calls_are_counted_over_ranks_even_of_a_rank_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("made_up")
    monkeypatch.setitem(sys.modules, "made_up", module)
    monkeypatch.setitem(spy.CLASSES, "made_up", ("made_up", "Group"))
    spy.prepare(tmp_path)
    for rank in range(2):  # each in a process of its own: its class is its own
        module.Group = type("Group", (Group,), dict(vars(Group)))
        with contextlib.suppress(RuntimeError), spy.counting(tmp_path, rank, "made_up"):
            group = module.Group()
            assert (group.allreduce(), group.size()) == ("reduced", 1)
            group.gather()
    assert spy.collect(tmp_path, "made_up") == 4
    assert spy.collect(tmp_path, "gloo") is None


def test_pretended_gpus_keep_tensors_on_the_cpu() -> None:
    with gpus.pretended(1):
        torch.cuda.set_device(1)
        x = torch.ones(2, device=1)
        model = torch.nn.Linear(2, 2).cuda(1).to("cuda:1")
        assert {x.device.type, x.to(1).device.type, model(x.cuda()).device.type} == {"cpu"}
        assert x.cuda() is not x
        assert x.to(torch.float64).dtype is torch.float64
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda:7")
