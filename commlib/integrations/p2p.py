"""torch.distributed's point-to-point verbs, compressed; `commlib.distributed` has them.

What is compressed (`routes.py` decides) travels on the caller's own group, issued by the calling
thread, with tags of commlib's own; what is not is torch's own call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.overrides import has_torch_function

from commlib.collectives.p2p import FIRST_TAG, Receiving, Sending
from commlib.eager import eager
from commlib.feedback import Compressor
from commlib.integrations import groups
from commlib.integrations.batch import Batch, Later
from commlib.integrations.routes import Group, Named, Office, office_of, route_of
from commlib.integrations.works import Timeout, seconds
from commlib.traffic import Post, check_rank, check_tensor
from commlib.transport import GLOO, backends, group_device, plain


class P2PWork(dist.Work):
    """What a point-to-point call returns."""

    def __init__(self, *messages: Sending | Receiving | Raw) -> None:
        super().__init__()
        self._messages = messages

    @eager
    def wait(self, timeout: Timeout = None) -> bool:
        """Block until the tensor was sent, or has arrived; `timeout` in seconds.

        None or 0: the group's timeout. On CUDA the current stream waits, and not the host.
        """
        for message in self._messages:
            message.wait(seconds(timeout))
        return True

    def synchronize(self) -> None:
        self.wait()

    @eager
    def is_completed(self) -> bool:
        """Whether it is done. On gloo only `wait` finds that out, as for torch's own."""
        return all([message.is_completed() for message in self._messages])

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        return next((e for m in self._messages if (e := m.exception()) is not None), None)

    def result(self) -> list[torch.Tensor]:
        """The tensors, once done."""
        self.wait()
        return [message.tensor for message in self._messages]

    def source_rank(self) -> int:
        """The rank within the group that sent what a receive got."""
        source = self._messages[0].source
        if source is None:
            raise RuntimeError("the source of a receive is known once wait() has returned")
        return source

    _source_rank = source_rank


class Raw:
    """A message of torch's own in a batch with compressed ones."""

    def __init__(self, tensor: torch.Tensor, later: Later) -> None:
        self.tensor, self.source = tensor, later.source
        self._later = later

    def wait(self, timeout: float | None = None) -> None:
        self._later.wait(timeout)

    def is_completed(self) -> bool:
        return self._later.done()

    def exception(self) -> BaseException | None:
        return None


class P2POp(dist.P2POp):
    """torch's, for `batch_isend_irecv`; `op` is isend or irecv, commlib's or torch's.

    scheme: of this message instead of the policy's.
    """

    def __new__(
        cls,
        op: Callable[..., Any],
        tensor: torch.Tensor,
        peer: int | None = None,
        group: Group = None,
        tag: int = 0,
        group_peer: int | None = None,
        *,
        scheme: Named = None,
    ) -> Self:
        made: Self = super().__new__(cls, _torchs(op), tensor, peer, group, tag, group_peer)
        return made

    def __init__(
        self,
        op: Callable[..., Any],
        tensor: torch.Tensor,
        peer: int | None = None,
        group: Group = None,
        tag: int = 0,
        group_peer: int | None = None,
        *,
        scheme: Named = None,
    ) -> None:
        super().__init__(_torchs(op), tensor, peer, group, tag, group_peer)
        self.scheme = scheme


@eager
def isend(
    tensor: torch.Tensor,
    dst: int | None = None,
    group: Group = None,
    tag: int = 0,
    group_dst: int | None = None,
    *,
    scheme: Named = None,
) -> Any:
    """Send `tensor` to rank `dst` (of the world; `group_dst`: of the group).

    It is coded before this returns, and may change then; the work is done when it has left. On gloo
    a message and its tensor are kept until somebody waits for the work.
    """
    return _start("isend", tensor, dst, group, tag, group_dst, scheme)


@eager
def irecv(
    tensor: torch.Tensor,
    src: int | None = None,
    group: Group = None,
    tag: int = 0,
    group_src: int | None = None,
    *,
    scheme: Named = None,
) -> Any:
    """Receive into `tensor` from rank `src` (of the world; `group_src`: of the group; or any).

    It is decoded by the work's `wait`: before that, the tensor is what it was.
    """
    return _start("irecv", tensor, src, group, tag, group_src, scheme)


@eager
def send(
    tensor: torch.Tensor,
    dst: int | None = None,
    group: Group = None,
    tag: int = 0,
    group_dst: int | None = None,
    *,
    scheme: Named = None,
) -> None:
    """`isend`, until the tensor has left."""
    work = _start("send", tensor, dst, group, tag, group_dst, scheme)
    if work is not None:
        work.wait()


@eager
def recv(
    tensor: torch.Tensor,
    src: int | None = None,
    group: Group = None,
    tag: int = 0,
    group_src: int | None = None,
    *,
    scheme: Named = None,
) -> int:
    """`irecv`, until the tensor is there; the rank of the world it came from."""
    work = _start("recv", tensor, src, group, tag, group_src, scheme)
    if work is None:  # not a member
        return -1
    work.wait()
    if src is not None:
        return src
    if group_src is None:
        group_src = work._source_rank()
    return dist.get_global_rank(groups.member(group), group_src)


@eager
def batch_isend_irecv(p2p_op_list: list[dist.P2POp]) -> list[Any]:
    """Issue a list of `P2POp`, commlib's or torch's, together: no order among them blocks.

    Works for all of them, as torch returns them: one each, or one for all where NCCL groups them.
    """
    if not isinstance(p2p_op_list, list) or not p2p_op_list:
        raise ValueError(f"batch_isend_irecv: pass a list of P2POp, not empty; got {p2p_op_list!r}")
    for op in p2p_op_list:
        if not isinstance(op, dist.P2POp):
            raise ValueError(
                f"batch_isend_irecv: every op must be a P2POp, got {type(op).__name__}"
            )
    group = groups.member(p2p_op_list[0].group)
    if any(groups.member(op.group) is not group for op in p2p_op_list):
        raise ValueError("batch_isend_irecv: all ops must be of one group")
    routes = []
    for op in p2p_op_list:  # before anything is sent
        verb = op.op.__name__
        _peer(verb, group, None, op.group_peer, op.tensor)
        scheme = getattr(op, "scheme", None)
        routes.append(
            None if _foreign(op.tensor) else route_of(verb, group, op.tensor, op.tag, scheme)
        )
    office = next((route[0] for route in routes if route is not None), None)
    if office is None:
        if plain(group) is group:
            return dist.batch_isend_irecv(p2p_op_list)
        # the backend commlib would decide again, by its policy and not by `scheme`
        office = office_of(group, group_device(group, p2p_op_list[0].tensor.device))
    if len({op.tensor.device for op in p2p_op_list}) > 1:
        raise ValueError(
            "batch_isend_irecv: the tensors are on different devices; make two batches"
        )
    for op, route in zip(p2p_op_list, routes, strict=True):  # a number given is a message expected
        verb = "send" if op.op is dist.isend else "recv"
        if route is None:
            check_tensor(verb, op.tensor, office.transport.device)
        else:
            route[0].mail.check(verb, op.tensor, op.group_peer, route[1])
    batch, messages = Batch(office.transport), []
    with office.mail.lock:
        for op, route in zip(p2p_op_list, routes, strict=True):
            messages.append(_post(op, route, batch))
        batch.launch()
    return [P2PWork(*messages)] if batch.grouped else [P2PWork(message) for message in messages]


def _start(
    verb: str,
    tensor: torch.Tensor,
    rank: int | None,
    group: Group,
    tag: int,
    group_rank: int | None,
    scheme: Named,
) -> Any:
    """Issue one message."""
    sends = verb.endswith("send")
    issue = dist.isend if sends else dist.irecv
    group = group or dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup) or _foreign(tensor):  # torch says what it thinks
        return issue(tensor, rank, group, tag, group_rank)
    peer = _peer(verb, group, rank, group_rank, tensor)
    route = route_of(verb, group, tensor, tag, scheme)
    if route is None:
        return issue(tensor, None, plain(group), tag, peer)
    return _issue(sends, tensor, peer, tag, *route)


def compressed(
    verb: str, group: dist.ProcessGroup, tensor: torch.Tensor, peer: int | None, tag: int
) -> P2PWork | None:
    """The message of a `ProcessGroup.send` or `recv`, by the policy; None: not compressed."""
    if not 0 <= tag < FIRST_TAG or not tensor.is_contiguous():
        return None  # torch says what it thinks
    route = route_of(verb, group, tensor, tag, None)
    return None if route is None else _issue(verb == "send", tensor, peer, tag, *route)


def _issue(
    sends: bool,
    tensor: torch.Tensor,
    peer: int | None,
    tag: int,
    office: Office,
    compressor: Compressor,
) -> P2PWork:
    if sends:
        assert peer is not None
        return P2PWork(office.mail.isend(tensor, peer, compressor, tag))
    return P2PWork(office.mail.irecv(tensor, peer, compressor, tag))


def _post(
    op: dist.P2POp, route: tuple[Office, Compressor] | None, batch: Batch
) -> Sending | Receiving | Raw:
    sends = op.op is dist.isend
    if route is None:
        return Raw(op.tensor, batch.add(Post(sends, op.tensor, op.group_peer, op.tag)))
    office, compressor = route
    verb = office.mail.isend if sends else office.mail.irecv
    return verb(op.tensor, op.group_peer, compressor, op.tag, batch)


def _torchs(op: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own verb for ours."""
    return dist.isend if op is isend else dist.irecv if op is irecv else op


def _foreign(tensor: torch.Tensor) -> bool:
    """Whether this is no tensor, or one that has its own idea of torch's functions."""
    return not isinstance(tensor, torch.Tensor) or has_torch_function((tensor,))


def _peer(
    verb: str,
    group: dist.ProcessGroup,
    rank: int | None,
    group_rank: int | None,
    tensor: torch.Tensor,
) -> int | None:
    """The other end's rank in the group. Gloo would end the process for one that is not there."""
    name = "dst" if verb.endswith("send") else "src"
    if rank is not None and group_rank is not None:
        raise ValueError(f"{verb}: give {name} or group_{name}, got {rank} and {group_rank}")
    if rank is not None:
        group_rank = dist.get_group_rank(group, rank)
    if group_rank is None:
        if name == "src":
            return None
        raise ValueError(f"{verb}: name the other rank, {name} or group_{name}")
    check_rank(verb, group_rank, group.size())
    blocks = verb in ("send", "recv") or backends(group).get(tensor.device.type) == GLOO
    if group_rank == group.rank() and blocks:
        raise ValueError(f"{verb}: rank {group_rank} of the group is this rank itself")
    return group_rank
