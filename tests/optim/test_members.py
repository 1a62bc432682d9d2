"""Workers that come and go: agreed in a store, here mostly among threads.

Those that die: `test_members_deaths`; with real processes: `test_members_processes`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from commlib import Communicator
from commlib.optim import Members
from tests.communicators import only
from tests.optim.diloco import adam, shared
from tests.optim.members import LONG, Here, Rooms, together, train, worker
from tests.optim.models import same
from tests.optim.replicas import backward, model, weights


def test_workers_that_begin_together_share_one_model_and_one_group() -> None:
    rooms = Rooms()

    def body(seed: int) -> Callable[[], Any]:
        def run() -> Any:
            members = Here(rooms)
            module, one = worker(members)
            one.join(at_least=3)
            assert one.steps == 0
            train(module, one, 6, seed)
            ids = members.ids
            one.leave()
            return shared(one), weights(module), ids, members.groups, members.bytes_sent

        return run

    (first, own, ids, groups, sent), *others = together(*(body(seed) for seed in range(3)))
    assert ids == ("1", "2", "3")
    assert same(first, own)
    assert not same(first, weights(model()))
    # to hand the model over, to whoever queued in whatever order, and for all three exchanges
    assert [sorted(group) for group in groups] == [list(ids), list(ids)]
    assert sent > 0
    for other in others:
        assert same(first, other[0])
        assert other[2] == ids


def test_all_of_them_are_what_a_communicator_makes_of_as_many_ranks() -> None:
    from commlib.optim import DiLoCo
    from tests.communicators import on_ranks
    from tests.optim.diloco import train as on_rank

    rooms = Rooms()

    def body(seed: int) -> Callable[[], Any]:
        def run() -> Any:
            members = Here(rooms, only("e3m0"))
            module, one = worker(members)
            one.join(at_least=2)
            # who came first is decided by the store: data go by rank
            train(module, one, 4, int(str(members.id)) - 1)
            return shared(one)

        return run

    def ranks(c: Communicator) -> Any:
        module = model()
        one = DiLoCo(module.named_parameters(), adam(module), c, period=2)
        on_rank(module, one, 4, c.rank)
        return shared(one)

    assert same(together(body(0), body(1))[0], on_ranks(2, only("e3m0"), ranks)[0])


def test_one_alone_trains() -> None:
    module, one = worker(Here(Rooms()))
    one.join()
    train(module, one, 4, 0)
    assert one.members.ids == ("1",)
    assert not same(shared(one), weights(model()))
    assert one.members.bytes_sent == 0


def test_who_comes_late_gets_model_momentum_and_step() -> None:
    rooms, begun, joined = Rooms(), threading.Event(), threading.Event()

    def first() -> Any:
        module, one = worker(Here(rooms))
        one.join()
        one.lr, one.nesterov = 0.5, False
        train(module, one, 4, 0)
        begun.set()
        while not joined.is_set():  # the run goes on; the other is let in behind an exchange
            train(module, one, one.steps + 1, 0)
        reached = one.steps
        train(module, one, reached + 4, 0)
        return shared(one), one._buffers[0].clone(), reached, one.members.ids

    def second() -> Any:
        assert begun.wait(LONG)
        module, one = worker(Here(rooms))
        with torch.no_grad():
            module[0].weight.zero_()
        one.join()
        assert (one.lr, one.nesterov) == (0.5, False)  # or they would drift apart
        assert one.steps >= 6
        assert one.steps % 2 == 0
        assert same(weights(module), shared(one))
        start = one.steps
        joined.set()
        train(module, one, start + 2, 1)
        ids = one.members.ids
        one.leave()
        return start, ids

    (_, momentum, reached, after), (start, ids) = together(first, second)
    assert ids == ("1", "2")
    assert after == ("1",)  # the other has left, and nobody waited for it
    assert reached in (start, start + 1, start + 2)
    assert momentum.abs().sum() > 0


def test_who_stalls_is_left_out_and_comes_back() -> None:
    rooms = Rooms()
    left, back = threading.Event(), threading.Event()

    def steady() -> Any:
        module, one = worker(Here(rooms, timeout=1.0, grace=0.5))
        one.join(at_least=2)
        train(module, one, 2, 0)
        seen = [one.members.ids]
        train(module, one, 4, 0)  # waits for the other, in vain
        seen.append(one.members.ids)
        left.set()
        while not back.is_set():
            train(module, one, one.steps + 1, 0)
            time.sleep(0.01)
        train(module, one, one.steps + 4, 0)
        return seen, one.steps

    def stalling() -> Any:
        module, one = worker(Here(rooms, timeout=1.0, grace=0.5))
        one.join(at_least=2)
        train(module, one, 3, 1)
        assert left.wait(LONG)
        backward(module, 1, 3)
        one.step()  # too late for the exchange of step 4: let in again behind a later one
        assert one.steps > 4
        assert same(weights(module), shared(one))
        back.set()
        ids = []
        while len(ids) < 2:
            train(module, one, one.steps + 2, 1)
            ids.append(one.members.ids)
        one.leave()
        return ids

    # who is first is decided by the store; ids tell
    (seen, _), ids = together(steady, stalling)
    assert set(seen[0]) == {"1", "2"}
    assert len(seen[1]) == 1
    assert set(ids[0]) == {*seen[1], "3"}


def test_a_worker_that_went_astray_leaves_and_the_others_go_on() -> None:
    rooms, ahead, back = Rooms(), threading.Event(), threading.Event()

    def good() -> Any:
        module, one = worker(Here(rooms))
        one.join(at_least=2)
        train(module, one, 6, 0)
        alone = shared(one), one.members.ids
        ahead.set()
        while not back.is_set():
            train(module, one, one.steps + 1, 0)
        one.leave()
        return alone

    def bad() -> None:
        module, one = worker(Here(rooms))
        one.join(at_least=2)
        train(module, one, 3, 1)
        with torch.no_grad():
            module[0].bias[2] = float("nan")
        backward(module, 1, 3)
        with pytest.raises(RuntimeError, match=r"step 4: 0\.weight.* of this worker is not finite"):
            one.step()
        with pytest.raises(RuntimeError, match=r"call join\(\) first"):
            one.step()
        assert ahead.wait(LONG)
        one.join()
        back.set()
        assert one.steps >= 8
        assert all(tensor.isfinite().all() for tensor in weights(module))
        one.leave()  # the other may have begun its next exchange already, and waits for this one

    (theta, ids), _ = together(good, bad)
    assert len(ids) == 1
    assert all(tensor.isfinite().all() for tensor in theta)


def test_a_failed_exchange_is_repeated_from_the_same_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One member's collective fails after the other's has succeeded: neither takes the result."""

    def run(failing: bool) -> Any:
        rooms, failed = Rooms(), threading.Event()

        class Failing(Here):
            def _try(self, closed: Any, collective: Any) -> Exception | None:
                error = super()._try(closed, collective)
                if failing and self.id == "2" and closed.number == 2 and not failed.is_set():
                    failed.set()
                    return RuntimeError("lost on the way")
                return error

        def body() -> Any:
            members = Failing(rooms)  # coding a mean once more would change it
            module, one = worker(members)
            one.join(at_least=2)
            train(module, one, 6, int(str(members.id)))
            return shared(one), members.ids, members._next

        return together(body, body)

    (plain, _, rounds), _ = run(False)
    (again, ids, more), (other, _, _) = run(True)
    assert ids == ("1", "2")
    assert more == rounds + 1
    assert same(again, plain)
    assert same(again, other)


def test_an_exchange_that_always_fails_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Here):
        def _try(self, closed: Any, collective: Any) -> Exception | None:
            return RuntimeError("no cable")

    module, one = worker(Failing(Rooms()))
    one.join()
    with pytest.raises(RuntimeError, match="failed 8 times, at last: no cable"):
        train(module, one, 2, 0)


def test_a_run_has_one_configuration() -> None:
    rooms = Rooms()
    worker(Here(rooms))[1].join()
    for how in ({"period": 3}, {"momentum": 0.0}):
        with pytest.raises(ValueError, match="the run has the settings"):
            worker(Here(rooms), **how)[1].join()
    with pytest.raises(ValueError, match="the run has the settings"):
        worker(Here(rooms, only("int8")))[1].join()


def test_nobody_waits_for_ever_to_be_let_in() -> None:
    rooms = Rooms()
    worker(Here(rooms))[1].join()  # and it does nothing more
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"nobody let this worker in within 0\.3 s"):
        worker(Here(rooms))[1].join(patience=0.3)
    assert time.monotonic() - begun < LONG


def test_who_is_not_waited_for_does_not_close_a_round_of_nobody() -> None:
    """A guest that the first member gave up, although it has got the model: it queues again."""
    rooms, seen = Rooms(), threading.Event()

    class GivesUp(Here):
        def welcome(self, tensors: Any, text: str) -> None:
            super().welcome(tensors, text)
            if self.ids and self.ids[0] == self.id and not seen.is_set() and self._next == 1:
                self._board.set("left/2", "1")
                seen.set()

        def _close(self, patience: float) -> Any:
            return super()._close(0.2 if self.id == "2" else patience)

    def body() -> Any:
        module, one = worker(GivesUp(rooms))
        one.join(at_least=2)
        first = one.members.id == "1"
        if first:
            time.sleep(0.6)  # the other is there before, and loses its patience
        while len(one.members.ids) < 2:
            train(module, one, one.steps + 1, int(first))
        if not first:
            assert one.members.id == "3"
        ids = one.members.ids
        one.leave()
        return ids

    assert together(body, body) == [("1", "3"), ("1", "3")]


def test_the_first_may_go_on_from_a_checkpoint() -> None:
    rooms, other = Rooms(), Rooms()
    module, one = worker(Here(rooms))
    one.join()
    train(module, one, 5, 0)
    state = one.state_dict()
    one.finish()  # what a new process knows: the shared model, not the inner optimizer's

    def again() -> Any:
        members = Here(other)
        module, two = worker(members)
        if not other.store.check(["loaded"]):
            other.store.set("loaded", "1")
            two.load_state_dict(state)
            two.join(at_least=2)
        else:
            two.join()
        assert two.steps == 5
        assert same(shared(two), shared(one))
        assert same(two._buffers, one._buffers)
        assert same(weights(module), weights(one_module))
        train(module, two, 8, int(str(members.id)))
        return shared(two)

    one_module = module

    def late() -> Any:
        while not other.store.check(["commlib/members/run/founder"]):
            time.sleep(0.01)
        return again()

    first, second = together(again, late)
    assert same(first, second)


def test_a_process_with_a_group_of_its_own_is_refused_before_others_count_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone it could go on for hours, and would die when the second one comes."""
    rooms = Rooms()
    _, one = worker(Here(rooms))
    with monkeypatch.context() as patched:
        patched.setattr(dist, "is_initialized", lambda: True)
        with pytest.raises(ValueError, match="has a default process group already"):
            one.join()
    assert not rooms.store.check(["commlib/members/run/founder"])
    one.join()


def test_refusals() -> None:
    store = dist.HashStore()
    with pytest.raises(ValueError, match=r"'int4\+ef', allowed: schemes without feedback.*'int4'"):
        Members(store, "int4+ef")
    with pytest.raises(ValueError, match="timeout is 0, allowed: a finite number above 0"):
        Members(store, timeout=0)
    module, one = worker(Here(Rooms()))
    backward(module, 0, 0)
    with pytest.raises(RuntimeError, match=r"call join\(\) first"):
        one.step()
    one.join()
    with pytest.raises(RuntimeError, match="has joined already"):
        one.join()
    state = one.state_dict()
    with pytest.raises(RuntimeError, match=r"a member of a run, .*before join\(\)"):
        one.load_state_dict(state)
    one.leave()
    one.load_state_dict(state)
