"""Which point-to-point messages are compressed, how, and what carries them.

Both ends of a message decide alike, from facts that both have: the group's policy, `scheme=`, the
number of elements, dtype.
"""

from __future__ import annotations

import logging
import threading
import weakref

import torch
import torch.distributed as dist

from commlib.collectives.p2p import FIRST_TAG, Mail, wire_bytes
from commlib.compressors import Compressors
from commlib.feedback import Compressor, Plain
from commlib.integrations import groups
from commlib.plans import explicit, is_exact, parse_scheme, why_raw
from commlib.policy import EXACT_BELOW_NUMEL, Role, Scheme, TensorInfo
from commlib.scheme import DTYPES
from commlib.transport import TorchTransport, group_device

log = logging.getLogger("commlib")

Group = dist.ProcessGroup | None
Named = str | Scheme | None

_lock = threading.Lock()
_offices: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, Office]] = (
    weakref.WeakKeyDictionary()
)
_told: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


class Office:
    """The point-to-point traffic of a group on one device."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.transport = TorchTransport(group, device=device)
        self.compressors = Compressors(device, 0, self.transport.rank)
        place = weakref.ref(group)

        def record(codec: str, raw_bytes: int, sent: int, seconds: float) -> None:
            alive = place()
            if alive is not None:
                groups.meter(alive, device).record("send", None, codec, raw_bytes, sent, seconds)

        self.mail = Mail(self.transport, record)


def office_of(group: dist.ProcessGroup, device: torch.device) -> Office:
    """The one office of the group on that device."""
    with _lock:
        offices = _offices.setdefault(group, {})
        if device not in offices:
            offices[device] = Office(group, device)
        return offices[device]


def bytes_sent(group: Group = None) -> int:
    """Bytes that this rank has sent compressed, point to point, in `group`."""
    offices = _offices.get(groups.member(group), {})
    return sum(office.transport.bytes_sent for office in offices.values())


def forget(group: Group) -> None:
    """Let go of the messages of `group`; of all groups for None and for the default group."""
    with _lock:
        if group in (None, dist.group.WORLD):
            _offices.clear()
        else:
            _offices.pop(group, None)


def route_of(
    verb: str, group: dist.ProcessGroup, tensor: torch.Tensor, tag: int, scheme: Named
) -> tuple[Office, Compressor] | None:
    """Who carries a message, and how; None: torch, raw. Decided by what both ends know."""
    if not 0 <= tag < FIRST_TAG:
        raise ValueError(f"{verb}: tag is {tag}, allowed: 0 to {FIRST_TAG - 1}")
    chosen = _choose(verb, group, tensor, scheme)
    if chosen is None:
        return None
    if tensor.layout is not torch.strided:
        raise ValueError(f"{verb}: a compressed tensor must be dense, got {tensor.layout}")
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{verb}: a CUDA graph cannot repeat a compressed message, which is numbered; capture "
            "it inside commlib.exact()"
        )
    office = office_of(group, group_device(group, tensor.device))
    return office, office.compressors.of(chosen)


def is_compressed(group: dist.ProcessGroup, tensor: torch.Tensor) -> bool:
    """Whether the policy compresses a message like `tensor`."""
    return _choose("send", group, tensor, None) is not None


def _choose(
    verb: str, group: dist.ProcessGroup, tensor: torch.Tensor, scheme: Named
) -> Scheme | None:
    """The scheme of a message; None: raw. Its shape may differ between the ends."""
    numel, dtype = tensor.numel(), tensor.dtype
    if scheme is not None:
        named = parse_scheme(scheme)
        if named.feedback != Plain():
            raise ValueError(
                f"{verb}: scheme {str(named)!r} keeps residuals, and a message has no key: no key, "
                "no memory. Error feedback on activations harms the next sample; pipelines have "
                f"modes of their own for that. Use {str(named.stateless())!r}"
            )
        found = explicit(named, None, dtype, Role.ACTIVATION)
        return None if found.codec.id == "fp32" else found
    if is_exact() or not tensor.is_floating_point():
        return None
    policy = groups.policy(group)
    if isinstance(policy, str):
        if dtype in DTYPES and numel >= EXACT_BELOW_NUMEL:
            _tell_auto(group)
        return None
    info = TensorInfo(None, numel, dtype, Role.ACTIVATION)
    found = policy.choose(info)
    if found.codec.id != "fp32" and wire_bytes(numel, dtype, found.codec) < tensor.nbytes:
        return found
    reason = why_raw(policy, info)
    if reason is not None:
        groups.meter(group, tensor.device).not_compressed(None, reason)
    return None


def _tell_auto(group: dist.ProcessGroup) -> None:
    if group in _told:
        return
    _told.add(group)
    if group.rank() == 0:
        log.warning(
            "commlib.distributed: send and recv travel raw under policy 'auto', which measures "
            "collectives alone; name a policy or a scheme to compress them"
        )
