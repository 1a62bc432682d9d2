"""TorchTransport: the process groups that PyTorch already has, under `traffic.Transport`.

The only file below floor 5 that imports torch.distributed, so all traffic and all byte counts go
through here. `ThreadTransport` and `run_ranks` (tests, documentation) are re-exported.

On gloo an all-gather goes as an all-to-all: its own takes three times as long at 4 KiB.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .aside import ASIDE
from .asking import Asking
from .order import Order
from .pending import Exchange
from .threads import ThreadTransport, run_ranks
from .traffic import (
    Pending,
    Post,
    Receipt,
    Transport,
    all_gather_bytes,
    all_reduce_bytes,
    all_to_all_bytes,
    as_bytes,
    broadcast_bytes,
    check_all_gather,
    check_all_to_all,
    check_rank,
    check_tensor,
)

__all__ = ["Pending", "ProcessGroup", "ThreadTransport", "TorchTransport", "Transport", "run_ranks"]

ProcessGroup = dist.ProcessGroup

# all_to_all and all_gather of a group, before and since torch 2.13; groups written in Python may
# have either.
RENAMED = {
    False: ("alltoall_base", "_allgather_base"),
    True: ("all_to_all_single", "all_gather_single"),
}

# Gloo matches sends by tag and order alone; this keeps ours apart from the user's own.
FIRST_TAG = 0x636F6D
c10d: Any = distributed_c10d  # its option classes are missing from the stubs
# Store polls, seconds. A blocking wait would hold the store's lock against the other threads.
POLL_FIRST, POLL_LAST = 2e-4, 2e-2
GLOO = "gloo"


class TorchTransport:
    """The ranks of a c10d process group (None: the default group).

    timeout: seconds an exchange may take; None takes the group's own. device: of the tensors; see
    `group_device`.
    """

    _turns: ClassVar[weakref.WeakKeyDictionary[dist.ProcessGroup, int]] = (
        weakref.WeakKeyDictionary()
    )
    _orders: ClassVar[weakref.WeakKeyDictionary[dist.ProcessGroup, Order]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        timeout: float | None = None,
        device: torch.device | str | None = None,
        *,
        parent: TorchTransport | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised: call torch.distributed.init_process_group "
                "before making a communicator"
            )
        group = group or dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError("this process is not a member of the group it was given")
        # Weak: a group that outlives destroy_process_group aborts the process at its exit, when the
        # destructors of gloo's threads find them running ("terminate called ...").
        self._group = weakref.ref(group)
        self.rank = group.rank()
        self.size = group.size()
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.device = group_device(group, device)
        self.timeout = _group_timeout(group, self.device) if timeout is None else timeout
        self.bytes_sent = 0
        self._parent = parent  # counts what this one sends, too
        self._subs: dict[tuple[int, ...], TorchTransport] = {}
        self.tagged = self._gloo = backends(group)[self.device.type] == GLOO
        self.order = self._orders.setdefault(plain(group), Order())
        self._chain = not self._gloo
        self._posting: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._gloo:
            ASIDE.find()
            self._posting = ASIDE
        self._store = c10d._get_process_group_store(group)
        self._ask = Asking("the group's store")
        self._sum = self._options(c10d.AllreduceOptions())
        self._all_to_all, self._all_gather = RENAMED[hasattr(plain(group), "all_to_all_single")]

    @property
    def destroyed(self) -> bool:
        """Whether the process group is gone."""
        return self._group() is None

    @property
    def group(self) -> Any:
        """The process group; RuntimeError once it is destroyed."""
        group = self._group()
        if group is None:
            raise RuntimeError("the process group of this transport has been destroyed")
        return group

    @property
    def _plain(self) -> Any:
        return plain(self.group)

    def all_to_all(
        self,
        out: torch.Tensor,
        inp: torch.Tensor,
        *,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
    ) -> Pending:
        self._check("all_to_all", out, inp)
        check_all_to_all(out, inp, out_splits, in_splits, self.size)
        self._add(all_to_all_bytes(inp, in_splits, self.rank, self.size))
        size = inp.itemsize
        splits = [[n * size for n in part or ()] for part in (out_splits, in_splits)]
        out, inp = as_bytes(out), as_bytes(inp)
        options = self._options(c10d.AllToAllOptions())
        work = getattr(self._plain, self._all_to_all)(out, inp, *splits, options)
        return self._exchange(work, (out, inp))

    def all_gather(self, out: torch.Tensor, inp: torch.Tensor) -> Pending:
        self._check("all_gather", out, inp)
        check_all_gather(out, inp, self.size)
        self._add(all_gather_bytes(inp.nbytes, self.size))
        out, inp = as_bytes(out), as_bytes(inp)
        if self._gloo:
            copies = inp.view(1, -1).expand(self.size, -1).contiguous().view(-1)
            options = self._options(c10d.AllToAllOptions())
            work = getattr(self._plain, self._all_to_all)(out, copies, [], [], options)
            return self._exchange(work, (out, copies))
        options = self._options(c10d.AllgatherOptions())
        return self._exchange(getattr(self._plain, self._all_gather)(out, inp, options), (out, inp))

    def all_reduce(self, x: torch.Tensor) -> Pending:
        self._check("all_reduce", x)
        self._add(all_reduce_bytes(x.nbytes, self.size))
        return self._exchange(self._plain.allreduce([x], self._sum), x)

    def broadcast(self, x: torch.Tensor, src: int) -> Pending:
        self._check("broadcast", x)
        check_rank("broadcast", src, self.size)
        self._add(broadcast_bytes(x.nbytes, self.rank, src, self.size, chain=self._chain))
        options = self._options(c10d.BroadcastOptions())
        options.rootRank = src
        options.rootTensor = 0
        return self._exchange(self._plain.broadcast([as_bytes(x)], options), x)

    def send(self, x: torch.Tensor, dst: int, tag: int = 0) -> Pending:
        self._check("send", x)
        check_rank("send", dst, self.size)
        self._add(x.nbytes)
        with self._posting:
            work = self._plain.send([x], dst, FIRST_TAG + tag)
        return self._exchange(work, x, tellable=not self._gloo)

    def recv(self, x: torch.Tensor, src: int | None, tag: int = 0) -> Receipt:
        self._check("recv", x)
        tellable = not self._gloo
        if src is None:
            with self._posting:
                work = self._plain.recv_anysource([x], FIRST_TAG + tag)
            return Exchange(work, x, tellable=tellable, any_source=True)
        check_rank("recv", src, self.size)
        with self._posting:
            work = self._plain.recv([x], src, FIRST_TAG + tag)
        return self._exchange(work, x, tellable=tellable, source=src)

    def batch(self, posts: Sequence[Post]) -> list[Pending]:
        """Sends and receives handed over as one list: NCCL groups them, so that none blocks.

        One Pending per post; or fewer, where the library completes them together.
        """
        ops = []
        for post in posts:
            self._check("batch", post.x)
            check_rank("batch", post.peer, self.size)
            if post.is_send:
                self._add(post.x.nbytes)
            verb = dist.isend if post.is_send else dist.irecv
            op = dist.P2POp(verb, post.x, group=self.group, tag=post.tag, group_peer=post.peer)
            op.group = self._plain  # it has ranks of its own only, none of the world
            ops.append(op)
        with self._posting:
            works = dist.batch_isend_irecv(ops)
        if len(works) < len(posts):
            tensors = [post.x for post in posts]
            return [self._exchange(work, tensors, tellable=not self._gloo) for work in works]
        return [
            self._exchange(
                work, post.x, tellable=not self._gloo, source=None if post.is_send else post.peer
            )
            for work, post in zip(works, posts, strict=True)
        ]

    def posting(self) -> contextlib.AbstractContextManager[None]:
        return self._posting

    def barrier(self) -> None:
        options = self._options(c10d.BarrierOptions())
        if self.device.type == "cuda":
            options.device = self.device  # NCCL looks at the indices, and else guesses
            options.device_ids = [self.device.index]
        self._plain.barrier(options).wait()

    def turn(self) -> int:
        self._turns[self.group] = turn = self._turns.get(self.group, -1) + 1
        return turn

    def post(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set("commlib/" + key, value), self.timeout)

    def forget(self, key: str) -> None:
        def delete() -> None:
            with contextlib.suppress(RuntimeError):  # stores of files and of nothing cannot
                self._store.delete_key("commlib/" + key)

        self._ask(delete, self.timeout)

    def read(self, key: str, timeout: float) -> str:
        name = "commlib/" + key

        def poll() -> str | None:
            end, pause = time.monotonic() + timeout, POLL_FIRST
            while not self._store.check([name]):
                if time.monotonic() >= end:
                    return None
                time.sleep(pause)
                pause = min(2 * pause, POLL_LAST)
            return bytes(self._store.get(name)).decode()

        text: str | None = self._ask(poll, max(self.timeout, timeout + 2 * POLL_LAST))
        if text is None:
            raise TimeoutError(f"nobody posted {key!r} within {timeout} s")
        return text

    def sub(self, ranks: Sequence[int]) -> TorchTransport:
        for rank in ranks:
            check_rank("sub", rank, self.size)
        if self.rank not in ranks:
            raise ValueError(f"sub: rank {self.rank} is not one of {list(ranks)}")
        members = tuple(sorted(ranks))
        if members not in self._subs:
            kind = self.device.type
            group = open_group(
                self.group,
                members,
                f"{kind}:{backends(self.group)[kind]}",
                datetime.timedelta(seconds=self.timeout),
            )
            self._subs[members] = TorchTransport(group, self.timeout, self.device, parent=self)
        return self._subs[members]

    def close(self) -> None:
        """Destroy the groups that `sub` made; this transport's own stays."""
        for made in self._subs.values():
            made.close()
            if not made.destroyed:
                close_group(made.group)
        self._subs.clear()

    def _add(self, nbytes: int) -> None:
        self.bytes_sent += nbytes
        if self._parent is not None:
            self._parent._add(nbytes)

    def _exchange(
        self, work: Any, tensors: object, *, tellable: bool = True, source: int | None = None
    ) -> Exchange:
        # NCCL holds on to its tensors by itself; a CUDA graph must not have them held by us
        tensors = None if self.device.type == "cuda" else tensors
        return Exchange(work, tensors, tellable=tellable, source=source)

    def _check(self, verb: str, *tensors: torch.Tensor) -> None:
        for x in tensors:
            check_tensor(verb, x, self.device)

    def _options(self, options: Any) -> Any:
        # NCCL's watchdog would end the process after its timeout; there ours is Work.wait's alone.
        if self._gloo:
            options.timeout = datetime.timedelta(seconds=self.timeout)
        return options


def plain(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group that moves tensors as they are: of the backend "commlib", what lies under it."""
    under: dist.ProcessGroup = getattr(group, "plain", group)
    return under


_opened: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], int]] = (
    weakref.WeakKeyDictionary()
)


def open_group(
    group: dist.ProcessGroup,
    ranks: Sequence[int],
    backend: str,
    timeout: datetime.timedelta,
    mark: str = "",
) -> dist.ProcessGroup:
    """A new process group of `ranks` of `group` (ascending), which call this alike; no others do.

    Not by `new_group`: that is called by the whole world, or (use_local_synchronization) names the
    group by how many groups a rank has seen, which ranks may disagree on; then it hangs. mark: part
    of the name, the same on all of them.
    """
    ranks = tuple(ranks)
    counts = _opened.setdefault(group, {})
    counts[ranks] = number = counts.get(ranks, 0) + 1  # by its ranks: those count alike
    part = "" if len(ranks) == group.size() else ",".join(map(str, ranks))
    name = "/".join(filter(None, (group.group_name, f"commlib{number}", part, mark)))
    everybody = dist.get_process_group_ranks(group)
    members = [everybody[r] for r in ranks]
    with _unbound(dist.group.WORLD):
        opened, _ = c10d._new_process_group_helper(
            len(ranks),
            ranks.index(group.rank()),
            members,
            dist.Backend(backend),
            _own_client(c10d._get_process_group_store(group)),
            name,
            timeout=timeout,
            group_desc="commlib",
        )
    c10d._world.pg_group_ranks[opened] = {rank: place for place, rank in enumerate(members)}
    result: dist.ProcessGroup = opened
    return result


def _own_client(store: Any) -> Any:
    """A store by a connection of its own: gloo's waits would keep this one from other threads."""
    try:
        return store.clone()
    except RuntimeError:  # one written in Python
        return store


def close_group(group: dist.ProcessGroup) -> None:
    """Destroy a group of `open_group`, unless torch.distributed has destroyed all."""
    if group in c10d._world.pg_map:
        dist.destroy_process_group(group)


_binding = threading.Lock()
_bound: list[Any] = []  # the device, once for every thread that is in `_unbound`


@contextlib.contextmanager
def _unbound(world: Any) -> Iterator[None]:
    """A block in which the world's device is not known.

    Where it is, NCCL would split the world's communicator: all its ranks have to take part in that.
    """
    with _binding:
        _bound.append(_bound[0] if _bound else world.bound_device_id)
        world.bound_device_id = None
    try:
        yield
    finally:
        with _binding:
            device = _bound.pop()
            if not _bound:
                world.bound_device_id = device


def backends(group: dist.ProcessGroup) -> dict[str, str]:
    """The backend that serves each type of device: {"cpu": "gloo", "cuda": "nccl"}.

    Of a group of the backend "commlib": those under it.
    """
    if hasattr(group, "inner_backends"):
        return dict(group.inner_backends)
    pairs = (pair.partition(":") for pair in dist.get_backend_config(group).split(","))
    return {device: backend for device, _, backend in pairs}


def group_device(
    group: dist.ProcessGroup, wanted: torch.device | str | None = None
) -> torch.device:
    """The device whose tensors `group` moves for commlib: `wanted`, where the group serves it.

    By default the current CUDA device where the group moves CUDA tensors by a backend of their own
    (NCCL), else the CPU. A CUDA device without a number is the current one.

    Raises: ValueError: the group does not serve `wanted`.
    """
    served = backends(group)
    on_host = served.get("cuda", GLOO) in (GLOO, "mpi")  # those two also say that they serve CUDA
    if wanted is None:
        wanted = "cpu" if on_host or ("cpu" in served and not torch.cuda.is_available()) else "cuda"
    device = torch.device(wanted)
    if device.type not in served or (device.type == "cuda" and on_host):
        text = ",".join(f"{kind}:{backend}" for kind, backend in served.items())
        raise ValueError(
            f"this group ({text}) does not move {device.type} tensors for commlib; make it with "
            'init_process_group or new_group and backend="cpu:gloo,cuda:nccl", or "nccl" for CUDA '
            'tensors alone, "gloo" for CPU tensors'
        )
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.device("cuda", index)
    return torch.device(device.type)


def _group_timeout(group: dist.ProcessGroup, device: torch.device) -> float:
    """The timeout the group was made with, in seconds."""
    try:
        timeout: datetime.timedelta = group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):  # a group written in Python, or a fake one
        timeout = c10d.default_pg_timeout
    return timeout.total_seconds()
