"""Gloo's threads stand aside while another thread posts, and only then."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from commlib import aside
from commlib.aside import ASIDE, Aside
from commlib.lane import Lane
from commlib.transport import ThreadTransport, TorchTransport

from .processes import Pool

pytestmark = pytest.mark.skipif(aside.POLITE is None, reason="no SCHED_BATCH on this system")


@pytest.fixture
def thread() -> Iterator[int]:
    """The number of a thread that waits, by gloo's name."""
    ready, end = threading.Event(), threading.Event()
    found = []

    def body() -> None:
        found.append(threading.get_native_id())
        Path(f"{aside.TASKS}/{found[0]}/comm").write_text(aside.NAME)
        ready.set()
        end.wait(60.0)

    waiting = threading.Thread(target=body)
    waiting.start()
    assert ready.wait(10.0)
    yield found[0]
    end.set()
    waiting.join()


def test_threads_stand_aside_within_the_outermost_block_only(thread: int) -> None:
    blocks = Aside()
    blocks.find()
    with blocks:
        with blocks:
            assert os.sched_getscheduler(thread) == os.SCHED_BATCH
        assert os.sched_getscheduler(thread) == os.SCHED_BATCH
        blocks.find()  # a group that is made meanwhile loses none
    assert os.sched_getscheduler(thread) == os.SCHED_OTHER
    assert os.sched_getscheduler(threading.get_native_id()) == os.SCHED_OTHER


def test_blocks_of_two_threads_overlap(thread: int) -> None:
    blocks = Aside()
    blocks.find()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with blocks:
            inside.set()
            leave.wait(10.0)

    worker = threading.Thread(target=other)
    with blocks:
        worker.start()
        assert inside.wait(10.0)
    assert os.sched_getscheduler(thread) == os.SCHED_BATCH
    leave.set()
    worker.join()
    assert os.sched_getscheduler(thread) == os.SCHED_OTHER


def test_ctrl_c_amid_a_block_leaves_them_as_they_were(
    thread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, put = Aside(), os.sched_setscheduler
    blocks.find()

    def interrupted(number: int, policy: int, how: os.sched_param) -> None:
        put(number, policy, how)
        if policy == os.SCHED_BATCH:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "sched_setscheduler", interrupted)
    with pytest.raises(KeyboardInterrupt), blocks:
        pass
    assert os.sched_getscheduler(thread) == os.SCHED_OTHER
    monkeypatch.undo()
    with blocks:
        assert os.sched_getscheduler(thread) == os.SCHED_BATCH
    assert os.sched_getscheduler(thread) == os.SCHED_OTHER


def test_a_policy_that_somebody_chose_later_stays(thread: int) -> None:
    blocks = Aside()
    blocks.find()
    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    with blocks:
        assert os.sched_getscheduler(thread) == os.SCHED_IDLE
    assert os.sched_getscheduler(thread) == os.SCHED_IDLE


def test_a_policy_that_somebody_chose_stays(thread: int) -> None:
    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    blocks = Aside()
    blocks.find()
    with blocks:
        assert os.sched_getscheduler(thread) == os.SCHED_IDLE
    assert os.sched_getscheduler(thread) == os.SCHED_IDLE


def test_no_other_processs_thread_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a thread that ended may come back as another process."""
    moved: list[int] = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda thread, *_: moved.append(thread))
    blocks = Aside()
    blocks._threads = [os.getppid()]
    with blocks:
        pass
    assert moved == []
    assert blocks._threads == []


def test_where_it_is_forbidden_nothing_changes(
    thread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError("not here")

    blocks = Aside()
    blocks.find()
    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    with blocks:
        assert os.sched_getscheduler(thread) == os.SCHED_OTHER
    with blocks:  # and is not tried again
        assert blocks._threads == []


def policies() -> tuple[list[int], list[int], list[int]]:
    """Of gloo's threads before a lane posts, meanwhile and afterwards."""
    transport = TorchTransport(timeout=20.0)
    found = [policies_now()]
    recv = transport.recv

    def looked(*args: object, **kwargs: object) -> object:
        found.append(policies_now())
        return recv(*args, **kwargs)  # type: ignore[arg-type]

    transport.recv = looked  # type: ignore[assignment, method-assign]
    x = torch.zeros(8)
    Lane(transport, 0, 0).all_to_all(torch.empty(8), x).wait(20.0)
    dist.barrier()
    return found[0], found[1], policies_now()


def policies_now() -> list[int]:
    return [os.sched_getscheduler(thread) for thread in aside._loops()]


def test_gloos_threads_are_found_by_name(pool: Pool) -> None:
    for before, meanwhile, after in pool.run(policies, ranks=2):
        assert before
        assert set(before) == set(after) == {os.SCHED_OTHER}
        assert set(meanwhile) == {os.SCHED_BATCH}


def test_ranks_in_threads_have_none() -> None:
    transport = ThreadTransport.world(2)[0]
    assert transport.posting() is not ASIDE
