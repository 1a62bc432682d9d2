"""Engine: what a communicator is made of, and what it remembers between calls.

A call is checked, planned (once), agreed with the other ranks (once; `planning`), and handed to the
`Carrier`. After a failure `state_dict` refuses to hand out the residuals of a message that never
arrived.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch

from .carrier import Carrier
from .collectives import ALGORITHMS, Pool, Steps, all_gather, differences
from .compressors import Compressors, check_turns
from .copies import Copies
from .planner import Profile, Speed, exchange, measure, speed
from .planner import policy as measured_policy
from .planner.schemes import Cost, seconds
from .planning import Planning
from .plans import Message, Plan, parse_scheme
from .policy import Policy, TensorInfo
from .scheme import Role, Scheme
from .telemetry import Meter
from .topology import Ranks, Topology
from .traffic import Transport
from .transport import ProcessGroup, TorchTransport

DEFAULT_POLICY = "int8+ef"
# of the fp32 tensor whose exchanges `costs` times
LINK_BYTES = 16 << 20


class Engine(Planning):
    """What all collectives of a communicator share.

    Args:
        group: a c10d process group, a `Transport`, or None: the default group.
        policy: scheme text, `Scheme`, `Policy`, dict or policy file; "auto" measures the group now,
            on all ranks together; None: COMMLIB_POLICY, else "int8+ef".
        seed: of the random streams, the same on all ranks.
        timeout: seconds an exchange or an agreement may take; None: the group's own.
        device: of the tensors: "cpu", "cuda" (the current one) or "cuda:1"; None: the current CUDA
            device where the group has NCCL, else the CPU.
        meter: counts traffic; None makes one.

    Raises: ValueError for a bad policy, seed, timeout or environment.
    """

    def __init__(
        self,
        group: ProcessGroup | Transport | None = None,
        policy: str | Scheme | Policy | dict[str, Any] | None = None,
        *,
        seed: int = 0,
        timeout: float | None = None,
        device: torch.device | str | None = None,
        meter: Meter | None = None,
    ) -> None:
        check_settings(seed, timeout)
        given = os.environ.get("COMMLIB_POLICY") or DEFAULT_POLICY if policy is None else policy
        auto = isinstance(given, str) and given.strip() == "auto"
        self.policy = Policy.parse("fp32" if auto else given)
        self._auto = auto
        self.transport = _transport(group, timeout, device)
        self._own = self.transport if self.transport is not group else None
        self.timeout = self.transport.timeout if timeout is None else timeout
        self.seed = seed or 0
        self.meter = meter or Meter(rank=self.rank)
        self._carrier = Carrier(self.transport, self.timeout, self.meter)
        self._pool = Pool(self.transport.device, self._carrier.capturing)
        self._compressors = Compressors(self.transport.device, seed, self.rank)
        self._copies = Copies(self.rank, self.size)
        self._plans: dict[Any, Plan] = {}
        self._passing: deque[Any] = deque()  # those of tensors without a name, the oldest first
        self._steps: dict[str, int] = {}  # messages of a key, where the policy changes with them
        self._eras = any(rule.from_step for rule in self.policy.rules)
        self.nodes: tuple[Ranks, ...] = ()  # the ranks of each host, once a message needs them
        self._saved_nodes = ""  # those that loaded residuals are of
        self._told: set[tuple[str, Scheme]] = set()
        self.profile: Profile | None = None  # what "auto" has measured
        if auto and self.size > 1:
            with self._carrier.still():
                with self._carrier.in_turn("measuring the group"):
                    pass  # its messages take their turns themselves
                self.profile = measure(self._measured_run, self.transport)
            self.policy = measured_policy(self.profile)
            self.meter.reset()

    # What is remembered.

    def state_dict(self) -> dict[str, Any]:
        """Residuals, steps and random streams: tensors, numbers and strings, of this rank."""
        self._carrier.flush()
        if self._carrier.lost:
            raise RuntimeError(
                f"the residuals of {', '.join(self._carrier.lost)} are of a message that did not "
                f"arrive: load the last checkpoint into a new communicator. {self._carrier.aborted}"
            )
        return {
            "rank": self.rank,
            "world_size": self.size,
            "compressors": self._compressors.state_dict(),
            "steps": dict(self._steps),
            "copies": self._copies.state_dict(),
            "nodes": str(self.nodes) if self.nodes else self._saved_nodes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`: what follows is bitwise what would have followed.

        Raises: ValueError: the state is another rank's, or of another number of ranks: see
            `reshard.redistribute`. RuntimeError: a CUDA graph holds the residuals.
        """
        if not {"rank", "world_size", "compressors", "steps", "copies"} <= state.keys():
            raise ValueError(f"no state of a communicator: it has {', '.join(state) or 'nothing'}")
        here, there = (self.rank, self.size), (state["rank"], state["world_size"])
        if here != there:
            raise ValueError(
                f"residuals belong to one rank: these are of rank {there[0]} of {there[1]}, this "
                f"is rank {here[0]} of {here[1]}; reshard.redistribute makes those of other ranks"
            )
        if self._carrier.captures.any:
            raise RuntimeError(
                "a CUDA graph was captured with this communicator, and goes on with the residuals "
                "it was captured with: call load_state_dict before capturing"
            )
        with self._carrier.still():
            self._compressors.load_state_dict(state["compressors"])
            self._steps = dict(state["steps"])
            self._copies.load_state_dict(state["copies"])
            self._saved_nodes = state.get("nodes", "")
            self._check_nodes()
            self._carrier.captures.forget()
            if self._eras:  # residuals may be under the schemes of an earlier step
                self._plans.clear()

    def reset(self) -> None:
        """Forget all residuals."""
        with self._carrier.still():
            captured = self._carrier.captures.any
            self._copies.reset()
            self._compressors.reset(in_place=captured)
            if not captured:
                self._carrier.captures.forget()

    def forget_copies(self) -> None:
        """Begin `+delta` anew, after what is gathered came from elsewhere; on all ranks."""
        with self._carrier.still():
            self._copies.forget()

    def rescale(self, factor: float) -> None:
        """Multiply all residuals by `factor`. ValueError where it is not finite."""
        if not math.isfinite(factor):
            raise ValueError(f"rescale: factor is {factor}, it must be finite; reset() forgets")
        with self._carrier.still():
            self._compressors.rescale(factor)

    def set_policy(
        self,
        policy: str | Scheme | Policy | dict[str, Any],
        tensors: Mapping[str, TensorInfo],
        *,
        auto: bool = False,
    ) -> None:
        """Go on under another policy; all ranks call it between the same two calls.

        Residuals go along: what a tensor is owed is sent by its new scheme. Plans are made and
        agreed on anew.

        Args:
            tensors: what this communicator sends, by key, as policies see it.
            auto: it was made from what "auto" has measured, which is of messages: a call whose
                tensors all travel raw stays the library's own.

        Raises: ValueError: a residual cannot go on under the new scheme (another feedback, other
            blocks), and nothing has changed. RuntimeError: ranks come with other policies, or a
            CUDA graph holds residuals.
        """
        new = Policy.parse(policy)
        if self._carrier.captures.any:
            raise RuntimeError(
                "a CUDA graph was captured with this communicator, and goes on with the schemes "
                "and residuals it was captured with: set the policy before capturing"
            )
        text = {"op": "set_policy", "key": new.digest()}
        with self._carrier.still():
            refused: ValueError | None = None
            try:
                schemes = {}
                for name, info in tensors.items():
                    ahead = new.ahead(self._next(info))
                    check_turns(name, ahead, owners=False)
                    schemes[name] = next(iter(ahead.values()))
                moves = self._compressors.moves(schemes)
            except ValueError as error:  # the others hear of it before they go on
                refused, text["refused"] = error, str(error)
            self._carrier.agree(text)
            if refused is not None:
                raise refused
            self._compressors.move(moves)
            self.take_policy(new, auto=auto)

    def take_policy(self, policy: Policy, *, auto: bool = False) -> None:
        """Go on under another policy without residuals, or with those of a state loaded next.

        auto: as in `set_policy`. What follows is agreed on as ever: ranks with another policy are
        found before it is sent.
        """
        self.policy, self._auto = policy, auto
        self._eras = any(rule.from_step for rule in policy.rules)
        self._plans.clear()
        self._carrier.captures.forget()

    def costs(self, schemes: Sequence[str]) -> Cost:
        """Seconds that a tensor takes under each scheme by the link and the codecs as they are.

        Measured now; collective, with the same schemes (texts) on all ranks. ValueError for a group
        of one rank.
        """
        with self._carrier.still(), self._carrier.in_turn("measuring the link"):
            link = exchange(self.transport, LINK_BYTES)
        return seconds(Topology(self.size, link), self.speeds(schemes))

    def speeds(self, schemes: Sequence[str]) -> dict[str, Speed]:
        """How fast the lossy ones of `schemes` (texts) code, by text; collective as `costs`."""
        lossy = [text for text in schemes if not parse_scheme(text).lossless]
        with self._carrier.still():
            return {text: speed(self.transport, text) for text in lossy}

    def gather(self, mine: torch.Tensor, what: str) -> torch.Tensor:
        """The small tensors of all ranks, one row per rank, the same on all: to decide alike by.

        what: it is for; ranks that come with another, or with another size, raise.
        """
        flat = mine.detach().reshape(-1).to(self.transport.device)
        every = flat.new_empty(self.size, flat.numel())
        with self._carrier.still():
            self._carrier.agree({"op": "gather", "key": what, "numel": flat.numel()})
            try:
                with self._carrier.in_turn(f"gathering {what}"):
                    self.transport.all_gather(every.view(-1), flat).wait()
            except (RuntimeError, OSError) as error:
                raise self._carrier.fail(error, [], f"gathering {what}") from error
        return every

    def warmup(self, *schemes: str | Scheme) -> None:
        """Compile the kernels of the policy's schemes, and of `schemes`, before they are needed.

        Else each is compiled, or read from the cache, by the first call that uses it. Under "auto"
        the policy's are ready anyway: they were measured.
        """
        for scheme in (*(rule.scheme for rule in self.policy.rules), *map(parse_scheme, schemes)):
            self._compressors.warmup(scheme)

    def memory_bytes(self) -> int:
        """Bytes of residuals and other memory."""
        return self._compressors.nbytes() + self._copies.nbytes()

    def stats(self) -> str:
        """A table of what travelled."""
        return self.meter.table()

    def close(self) -> None:
        """Finish what is under way and take no more calls. The group stays."""
        self._carrier.flush()
        failed = self._carrier.aborted is not None
        self._carrier.close()
        # after a failure gloo would wait for an exchange that is pending
        if isinstance(self._own, TorchTransport) and not failed:
            self._own.close()
        self._pool.clear()
        self.meter.close()

    # From a plan to the steps of its messages.

    def _reducing(
        self,
        message: Message,
        transport: Transport,
        x: torch.Tensor,
        factor: float,
        hold: tuple[int, ...] = (),
    ) -> Steps:
        config = message.scheme.algorithm
        assert config is not None
        return ALGORITHMS[config.id].run(
            x,
            transport,
            self._compressors.of(message.scheme),
            message.key,
            message.layout,
            self._pool,
            factor=factor,
            hold=message.held(hold),
            **self._options(message),
        )

    def _gathering(
        self,
        message: Message,
        transport: Transport,
        rows: torch.Tensor,
        x: torch.Tensor,
        unchanged: bool = False,
    ) -> Steps:
        compressor = self._compressors.of(message.scheme)
        where = (compressor, message.key, message.layout, self._pool)
        if message.differences:
            return differences.all_gather(
                rows, x, transport, *where, self._copies, unchanged=unchanged
            )
        return all_gather(rows, x, transport, *where)

    def _measured_run(self, scheme: str, x: torch.Tensor) -> None:
        plan = self._plan("all_reduce", x, None, Role.GRADIENT, scheme)
        if plan.lossless and self._carrier.native(plan, x, 1.0) is not None:
            return
        flat = x.view(-1)
        self._carrier.start(plan, x, flat, lambda m, t: self._reducing(m, t, flat, 1.0), False)


def check_settings(seed: object, timeout: object) -> None:
    """Refuse seeds and times that cannot be (ValueError); None: what it was, or the group's."""
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if seed is not None and not (whole and seed >= 0):  # type: ignore[operator]
        raise ValueError(f"seed is {seed!r}, it must be a whole number >= 0")
    number = isinstance(timeout, Real) and not isinstance(timeout, bool)
    if timeout is not None and not (number and 0 < timeout < math.inf):  # type: ignore[operator]
        raise ValueError(f"timeout is {timeout!r}, it must be a number of seconds above 0")


def _transport(group: Any, timeout: float | None, device: torch.device | str | None) -> Transport:
    if group is None or not hasattr(group, "bytes_sent"):
        return TorchTransport(group, timeout, device)
    transport: Transport = group
    if device is not None and torch.device(device) != transport.device:
        raise ValueError(
            f"device={str(device)!r}, but the transport moves {transport.device} tensors; give the "
            "transport that device"
        )
    return transport
