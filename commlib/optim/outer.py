"""The outer loop of DiLoCo: what is exchanged when, and what becomes of it (`diloco`).

How a mean over ranks comes about is left open: by a communicator, or among members that come and
go (`members`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from commlib.eager import eager
from commlib.optim.fragments import check_none_added, cut, named, needs_closure, trained
from commlib.optim.pprs import check_number
from commlib.optim.ticks import check_count
from commlib.work import Work

OPTIONS = ("lr", "momentum", "nesterov", "mix")
"""What may change on the way, and is part of the state."""


class Sync(NamedTuple):
    """One exchange that was applied; what one would like to log.

    step: inner steps before it began. fragment: which. numel: values that each rank sent.
    bytes_sent: by this rank for it (of several under way at once, whichever was applied first tells
    those of all). seconds: from its begin until it was applied. waited: of these, how long training
    stood still. norm: of the mean D.
    """

    step: int
    fragment: int
    numel: int
    bytes_sent: int
    seconds: float
    waited: float
    norm: float


class Flight(NamedTuple):
    """An exchange that has begun: its fragment, the steps at which it began and will be applied."""

    fragment: int
    begun: int
    due: int
    mean: torch.Tensor  # D_i at first; once the work is done, D
    work: Work | None  # None: done
    clock: float


class Outer(ABC):
    """An inner optimizer, the model that ranks share, and the outer optimizer: see `DiLoCo`."""

    def __init__(
        self,
        params: Iterable[tuple[str, torch.nn.Parameter]],
        inner: torch.optim.Optimizer | None,
        device: torch.device,
        *,
        period: int,
        lr: float = 0.7,
        momentum: float = 0.9,
        nesterov: bool = True,
        fragments: int | Sequence[Sequence[str]] = 1,
        overlap: int = 0,
        mix: float | None = None,
        on_sync: Callable[[Sync], None] | None = None,
    ) -> None:
        name = type(self).__name__
        self.inner, self.on_sync = inner, on_sync
        self.period, self.lr, self.momentum, self.nesterov = period, lr, momentum, nesterov
        check_count(f"{name}: period", period)
        check_number(f"{name}: lr", lr, positive=True)
        check_number(f"{name}: momentum", momentum, positive=False)
        if momentum >= 1:
            raise ValueError(f"{name}: momentum is {momentum}, allowed: 0 to below 1")
        if not isinstance(overlap, int) or not 0 <= overlap < period:
            raise ValueError(
                f"{name}: overlap is {overlap!r}, allowed: 0 to {period - 1} steps: a fragment's "
                f"exchange must have been applied before its next begins, {period} steps later"
            )
        self.overlap = overlap
        self.mix = (0.5 if overlap else 0.0) if mix is None else mix
        check_number(f"{name}: mix", self.mix, positive=False)
        if self.mix >= 1:
            raise ValueError(f"{name}: mix is {mix}, allowed: 0 to below 1; 1 would learn nothing")
        pairs = named(name, params, inner, device)
        self._trained = 0 if inner is None else trained(inner)
        self._needs_closure = inner is not None and needs_closure(inner)
        self.fragments = cut(name, pairs, fragments, period)
        # new memory in any case: W moves away from theta
        self._theta = [fragment.flat() for fragment in self.fragments]
        self._buffers = [torch.zeros_like(theta) for theta in self._theta] if momentum else []
        self._flights: list[Flight] = []
        self._counted = 0
        self.steps = 0
        """Inner steps so far."""
        self.last: Sync | None = None
        """The exchange that was applied last."""

    @property
    def theta(self) -> dict[str, torch.Tensor]:
        """The shared model, the same bits on all ranks, by name; do not change it."""
        return dict(self._named(self._theta))

    @eager
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """A step of the inner optimizer, and `tick`; what the former returned.

        Raises: RuntimeError as `tick`, or there is no inner optimizer. ValueError: there is no
            closure, and the inner optimizer needs one.
        """
        if self.inner is None:
            raise RuntimeError(
                f"{type(self).__name__}: there is no inner optimizer; call tick() after its step"
            )
        if closure is None and self._needs_closure:  # before anything is sent
            raise ValueError(
                f"{type(self).__name__}: the step of {type(self.inner).__name__} needs a closure, "
                "and got none: call step(closure), or step it yourself, and tick()"
            )
        self._ready()
        self._check_unchanged()
        loss = self.inner.step() if closure is None else self.inner.step(closure)
        self.tick()
        return loss

    @eager
    @torch.no_grad()
    def tick(self) -> None:
        """Count an inner step; apply the exchanges that are due, begin those whose turn it is.

        Raises: RuntimeError: ranks began with other parameters or options; the inner optimizer has
            got other parameters, or some were cast; an exchange failed; the mean D is not finite,
            on all ranks alike. theta and W are as before it.
        """
        self._ready()
        self._check_unchanged()
        self.steps += 1
        self._land(self.steps)
        for k in range(len(self.fragments)):
            if self.steps % self.period == k * self.period // len(self.fragments):
                self._flights.append(self._begin(k))
        self._land(self.steps)

    @eager
    @torch.no_grad()
    def finish(self) -> None:
        """Apply what is under way, then W <- theta: all ranks have the same model.

        Sends nothing new: what a rank has learned since the last exchange of a fragment is dropped.
        Call it after a step at which it was exchanged.
        """
        self._land(None)
        for fragment, theta in zip(self.fragments, self._theta, strict=True):
            fragment.put(theta, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Steps, theta, momentum, results that wait to be applied, the communicator's memory.

        Waits for what is under way, and does not apply it. Each rank saves its own, besides its
        parameters and its inner optimizer: with all of them loaded, further steps are bitwise those
        of a run that was not interrupted.
        """
        self._flights = [self._arrived(flight) for flight in self._flights]
        return {
            "steps": self.steps,
            "period": self.period,
            "overlap": self.overlap,
            "options": {name: getattr(self, name) for name in OPTIONS},
            "fragments": [list(fragment.names) for fragment in self.fragments],
            "theta": {name: part.clone() for name, part in self._named(self._theta)},
            "momentum": {name: part.clone() for name, part in self._named(self._buffers)},
            "flights": [
                {"fragment": f.fragment, "begun": f.begun, "due": f.due, "mean": f.mean.clone()}
                for f in self._flights
            ],
            **self._memory(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of the same rank; lr, momentum, mix become those of then.

        Raises: ValueError: another rank's or number of ranks, another period or overlap, other
            parameters, or no such state; nothing changed.
        """
        name = type(self).__name__
        mine = self.state_dict()
        missing = mine.keys() - state_dict.keys()
        missing |= set(OPTIONS) - state_dict.get("options", dict.fromkeys(OPTIONS)).keys()
        if missing:
            raise ValueError(f"no state of {name}: it has no {', '.join(sorted(missing))}")
        for what in ("period", "overlap", "fragments"):
            if state_dict[what] != mine[what]:
                raise ValueError(
                    f"{name}: the state has {what} {state_dict[what]}, allowed: {mine[what]}"
                )
        for what in ("theta", "momentum"):
            found = {key: tuple(value.shape) for key, value in state_dict[what].items()}
            want = {key: tuple(value.shape) for key, value in mine[what].items()}
            if found != want:
                raise ValueError(f"{name}: {what} of the state has {found}, allowed: {want}")
        self._load_memory(state_dict)
        for kept, what in ((self._theta, "theta"), (self._buffers, "momentum")):
            for key, part in self._named(kept):
                part.copy_(state_dict[what][key])
        device = self._theta[0].device
        self._flights = [
            Flight(f["fragment"], f["begun"], f["due"], f["mean"].to(device, copy=True), None, 0.0)
            for f in state_dict["flights"]
        ]
        for option in OPTIONS:
            setattr(self, option, state_dict["options"][option])
        self.steps = int(state_dict["steps"])
        self._counted = self._sent()

    # One exchange.

    def _begin(self, k: int) -> Flight:
        """Start the exchange of fragment k."""
        clock, difference = time.perf_counter(), self._theta[k] - self.fragments[k].flat()
        work = self._exchange(k, difference)
        return Flight(k, self.steps, self.steps + self.overlap, difference, work, clock)

    @abstractmethod
    def _exchange(self, k: int, difference: torch.Tensor) -> Work | None:
        """Replace D_i of fragment k by its mean over ranks, now or once the work is done."""

    def _land(self, until: int | None) -> None:
        """Apply, in the order in which they began, the exchanges due by step `until`; None: all."""
        while self._flights and (until is None or self._flights[0].due <= until):
            before = time.perf_counter()
            clock = self._flights[0].clock or before
            flight = self._arrived(self._flights[0])
            del self._flights[0]
            now = time.perf_counter()
            waited = now - (before if self.overlap else clock)
            self._apply(flight, now - clock, waited)

    def _arrived(self, flight: Flight) -> Flight:
        if flight.work is not None:
            flight.work.wait()
        return flight._replace(work=None)

    def _apply(self, flight: Flight, seconds: float, waited: float) -> None:
        k, mean = flight.fragment, flight.mean
        fragment = self.fragments[k]
        bad = fragment.not_finite(mean)
        if bad:
            raise RuntimeError(
                f"{type(self).__name__}: step {flight.begun}: the mean pseudo-gradient of "
                f"{', '.join(bad)} is not finite: a rank's parameters are infinite or NaN, or the "
                "sum overflows. The shared model and the parameters are as before"
            )
        update = mean
        if self._buffers:
            buffer = self._buffers[k].mul_(self.momentum).add_(mean)
            update = (buffer * self.momentum).add_(mean) if self.nesterov else buffer
        self._theta[k].sub_(update * self.lr)
        fragment.put(self._theta[k], self.mix)
        sent = self._sent()
        self.last = Sync(
            flight.begun,
            k,
            mean.numel(),
            sent - self._counted,
            seconds,
            waited,
            float(mean.norm()),
        )
        self._counted = sent
        if self.on_sync is not None:
            self.on_sync(self.last)

    def _named(self, kept: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of flat vectors (of all fragments, or none), by name."""
        for fragment, flat in zip(self.fragments, kept, strict=False):
            yield from fragment.parts(flat)

    def _check_unchanged(self) -> None:
        """Refuse what cannot change on the way (RuntimeError)."""
        if self.inner is not None:
            check_none_added(type(self).__name__, self.inner, self._trained)
        for fragment in self.fragments:
            for name, parameter in zip(fragment.names, fragment.parameters, strict=True):
                if parameter.dtype != torch.float32:
                    raise RuntimeError(
                        f"{type(self).__name__}: {name!r} has become {parameter.dtype}, allowed: "
                        "torch.float32, or what it rounds of the shared model counts as learned: "
                        "cast it back, and train under autocast"
                    )
        if self.momentum and not self._buffers:
            raise RuntimeError(
                f"{type(self).__name__}: momentum is {self.momentum}, and began as 0, so none was "
                f"kept: make a new {type(self).__name__} with it, or set it to 0"
            )

    # Who the others are.

    @abstractmethod
    def _ready(self) -> None:
        """Before a step: RuntimeError where there is no common model yet."""

    @abstractmethod
    def _sent(self) -> int:
        """Bytes that this rank has sent so far."""

    def _memory(self) -> dict[str, Any]:
        """What else is part of the state."""
        return {}

    def _load_memory(self, state_dict: Mapping[str, Any]) -> None:
        """Take it back; ValueError where it is another rank's."""
        del state_dict
