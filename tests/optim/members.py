"""What the tests of members share: a worker of a small run, and threads as its members."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from commlib import Communicator
from commlib.optim import ElasticDiLoCo, Members
from commlib.transport import ThreadTransport
from tests.communicators import only
from tests.optim.diloco import adam
from tests.optim.replicas import backward, model

LONG = 30.0


class Rooms:
    """Where threads meet instead of in process groups, by the group's name."""

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self._lock = threading.Lock()
        self._worlds: dict[str, list[ThreadTransport]] = {}

    def place(self, name: str, size: int, rank: int, timeout: float) -> ThreadTransport:
        with self._lock:
            world = self._worlds.setdefault(name, ThreadTransport.world(size, timeout))
        return world[rank]


class Here(Members):
    """Members whose groups are threads."""

    def __init__(self, rooms: Rooms, policy: Any = None, **how: Any) -> None:
        self.rooms, self.groups = rooms, []  # type: ignore[var-annotated]
        super().__init__(rooms.store, policy or only("sigma8"), **{"timeout": LONG, **how})

    def _connect(self, name: str, ids: Sequence[str], seed: int) -> Communicator:
        self.groups.append(tuple(ids))
        transport = self.rooms.place(name, len(ids), ids.index(str(self.id)), self.timeout)
        return Communicator(transport, self.policy, seed=self.seed + seed, timeout=self.timeout)

    def _disconnect(self) -> None:
        pass


def together(*bodies: Callable[[], Any], timeout: float = 60.0) -> list[Any]:
    """What the bodies, each on a thread, return; the first error of any."""
    results: list[Any] = [None] * len(bodies)
    errors: list[BaseException] = []

    def run(place: int) -> None:
        try:
            results[place] = bodies[place]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(bodies))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + timeout
    while any(thread.is_alive() for thread in threads) and not errors:
        assert time.monotonic() < end, "a worker hangs"
        time.sleep(0.01)
    if errors:
        raise errors[0]
    return results


def worker(members: Members, **how: Any) -> tuple[Any, ElasticDiLoCo]:
    module = model()
    how = {"period": 2, **how}
    return module, ElasticDiLoCo(module.named_parameters(), adam(module), members, **how)


def train(module: Any, one: ElasticDiLoCo, until: int, seed: int) -> None:
    while one.steps < until:
        backward(module, seed, one.steps)
        one.step()
