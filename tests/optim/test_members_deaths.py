"""Members that die at an unlucky moment: nobody else is harmed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.optim.diloco import shared
from tests.optim.members import LONG, Here, Rooms, together, train, worker
from tests.optim.models import same
from tests.optim.replicas import weights


def test_who_queued_and_died_is_waited_for_no_longer_than_grace() -> None:
    rooms = Rooms()
    module, one = worker(Here(rooms, grace=0.2))
    one.join()
    dead = Here(rooms)
    dead._name()
    dead._queue_up()
    begun = time.monotonic()
    train(module, one, 6, 0)
    assert one.members.ids == ("1",)
    assert time.monotonic() - begun < LONG


def test_who_died_before_it_said_its_name_blocks_no_queue() -> None:
    """It had taken its place in the queue."""
    rooms, joined = Rooms(), threading.Event()
    Here(rooms)._board.count("queue", 1)

    def first() -> None:
        module, one = worker(Here(rooms, grace=0.5))
        one.join(at_least=2)
        while not joined.is_set():
            train(module, one, one.steps + 1, 0)
        one.leave()

    def second() -> None:
        _, one = worker(Here(rooms, grace=0.5))
        while not rooms.store.check(["commlib/members/run/founder"]):
            time.sleep(0.01)
        try:
            one.join(patience=10.0)
        finally:
            joined.set()
        one.leave()

    together(first, second)


def test_a_model_that_came_in_part_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state saved after that, or `leave`, would be of theta and momentum of two models."""
    module, one = worker(Here(Rooms()))
    before, state = weights(module), one.state_dict()

    def breaks(tensors: Sequence[torch.Tensor], patience: float) -> str:
        tensors[0].fill_(7.0)
        raise RuntimeError("nobody let this worker in")

    monkeypatch.setattr(one.members, "enter", lambda *_: False)
    monkeypatch.setattr(one.members, "receive", breaks)
    with pytest.raises(RuntimeError, match="nobody let this worker in"):
        one.join()
    assert same(list(state["theta"].values()), shared(one))
    one.leave()
    assert same(before, weights(module))


def test_a_guest_that_dies_at_the_door_costs_no_member_its_place() -> None:
    """The first hands the model to one that is gone; the other waits for it meanwhile."""
    rooms, knocked, done = Rooms(), threading.Event(), threading.Event()
    begun = threading.Barrier(3, timeout=LONG)

    def member() -> Any:
        members = Here(rooms, timeout=2.5, grace=2.0)
        module, one = worker(members)
        one.join(at_least=2)
        train(module, one, 3, 0)
        begun.wait()
        assert knocked.wait(LONG)
        train(module, one, 8, 0)
        done.set()
        return members.id, members.ids

    def guest() -> None:
        begun.wait()
        dying = Here(rooms)
        dying._name()
        dying._queue_up()
        knocked.set()
        while not done.is_set():  # it is let in, comes to the door, and is seen no more
            number = int(dying._board.get("latest") or 0)
            if (found := dying._closed(number)) is not None and dying.id in found.guests:
                dying._board.set(f"{number}/here/{dying.id}", "1")
                return
            time.sleep(0.01)

    assert sorted(together(member, member, guest)[:2]) == [("1", ("1", "2")), ("2", ("1", "2"))]
