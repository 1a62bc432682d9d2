"""DiLoCo: every rank trains by itself; once in many steps they exchange how far they came.

With theta the model that all ranks share, W_i the parameters of rank i, which begin as theta and
move by the inner optimizer, and H the period, every H inner steps::

    D_i    = theta - W_i                        the pseudo-gradient of rank i
    D      = mean over ranks of D_i             under the communicator's policy: what travels
    b     <- momentum b + D                     the outer optimizer: SGD with Nesterov's momentum
    theta <- theta - lr (D + momentum b)
    W_i   <- theta

**Streaming DiLoCo.** The parameters are cut into F fragments, of which k is exchanged at steps
``k H / F + n H``: the same bytes in all, in smaller portions. With an overlap of tau the exchange
begins then, goes on beside the next tau inner steps, and is applied after them::

    W_i   <- mix W_i + (1 - mix) theta

**Which exchange.** An all-reduce sends 2 (W-1)/W payloads a rank and codes twice, a gather of all
D_i sends W-1 and codes once. At four ranks a gather sends twice as much, and the second coding is
what `bench/diloco.py` measures with `@two_phase:back=bf16`; so it is all_reduce.

Ranks must not drift apart by a bit, on whatever machines they run: theta is moved by products and
sums that round one by one, none of them fused.

Sources: Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models"
(arXiv 2311.08105); Douillard et al. 2025, "Streaming DiLoCo with overlapping communication" (arXiv
2501.18512); averaging alone: Stich 2019, "Local SGD Converges Fast and Communicates Little" (arXiv
1805.09767).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from commlib.communicator import Communicator
from commlib.optim.fragments import cut, named
from commlib.optim.pprs import check_number
from commlib.optim.replicas import strangers
from commlib.optim.ticks import check_count
from commlib.work import Work


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


class DiLoCo:
    """DiLoCo and Streaming DiLoCo around an inner optimizer: see above.

    ::

        outer = DiLoCo(model.named_parameters(), inner, communicator, period=40)
        for x, y in batches:
            inner.zero_grad()
            loss(model(x), y).backward()
            outer.step()                      # inner.step(), and what is due after it
        outer.finish()                        # the shared model, on all ranks

    Buffers (running means of batch norm) are each rank's own. Memory: two vectors as large as the
    parameters, and D while it travels. Feedback in the policy (`int4+ef`) is allowed; its residuals
    are saved with the communicator's memory.

    Args:
        params: named, as `model.named_parameters()`; float32; all that `inner` trains.
        inner: any torch optimizer of these parameters. Or None: then call `tick` after its step.
        communicator: of the ranks; its policy says how D travels (`e3m0:block=256`, `sigma8`).
            Without feedback codecs round at random by default; ":round=nearest" is better here.
            Used by nothing else.
        period: H, inner steps from one exchange of a parameter to its next. 30 to 500 in papers.
        lr, momentum: of the outer SGD. lr and momentum may be changed between steps, on all ranks.
        nesterov: False: plain momentum, theta <- theta - lr b.
        fragments: F, at most H: parameter i of the list belongs to fragment i mod F; or the names
            of each, as lists.
        overlap: tau, from 0 (training waits for the exchange) to below H.
        mix: how much of its own W a rank keeps when a result arrives; 0.5 with overlap, else 0.
        on_sync: called with a `Sync` after each exchange.

    Raises: ValueError: what cannot be, before anything is sent.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, torch.nn.Parameter]],
        inner: torch.optim.Optimizer | None,
        communicator: Communicator,
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
        self.communicator, self.inner, self.on_sync = communicator, inner, on_sync
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
        pairs = named(name, params, inner, self._device())
        self.fragments = cut(name, pairs, fragments, period)
        # new memory in any case: W moves away from theta
        self._theta = [fragment.flat() for fragment in self.fragments]
        self._buffers = [torch.zeros_like(theta) for theta in self._theta] if momentum else []
        self._flights: list[Flight] = []
        self._counted = self._sent()
        self._alike = False
        self.steps = 0
        """Inner steps so far."""
        self.last: Sync | None = None
        """The exchange that was applied last."""

    @property
    def theta(self) -> dict[str, torch.Tensor]:
        """The shared model, the same bits on all ranks, by name; do not change it."""
        return dict(self._named(self._theta))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """A step of the inner optimizer, and `tick`; what the former returned."""
        if self.inner is None:
            raise RuntimeError(
                f"{type(self).__name__}: there is no inner optimizer; call tick() after its step"
            )
        self._check_alike()
        loss = self.inner.step() if closure is None else self.inner.step(closure)
        self.tick()
        return loss

    @torch.no_grad()
    def tick(self) -> None:
        """Count an inner step; apply the exchanges that are due, begin those whose turn it is.

        Raises: RuntimeError: ranks began with other parameters; an exchange failed; the mean D is
            not finite, on all ranks alike. theta and W are as before it.
        """
        self._check_alike()
        self.steps += 1
        self._land(self.steps)
        for k in range(len(self.fragments)):
            if self.steps % self.period == k * self.period // len(self.fragments):
                self._flights.append(self._begin(k))
        self._land(self.steps)

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
        device = self._device()
        self._flights = [
            Flight(f["fragment"], f["begun"], f["due"], f["mean"].to(device, copy=True), None, 0.0)
            for f in state_dict["flights"]
        ]
        for option in OPTIONS:
            setattr(self, option, state_dict["options"][option])
        self.steps = int(state_dict["steps"])
        self._counted, self._alike = self._sent(), False

    # One exchange.

    def _begin(self, k: int) -> Flight:
        """Start the exchange of fragment k."""
        clock, difference = time.perf_counter(), self._theta[k] - self.fragments[k].flat()
        work = self._exchange(k, difference)
        return Flight(k, self.steps, self.steps + self.overlap, difference, work, clock)

    def _exchange(self, k: int, difference: torch.Tensor) -> Work | None:
        """Replace D_i by its mean over ranks, now or once the work is done."""
        fragment = self.fragments[k]
        return self.communicator.all_reduce_segments(
            difference,
            fragment.names,
            fragment.sizes,
            fragment.ndims,
            factor="avg",
            async_op=self.overlap > 0,
        )

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

    # What an elastic run does otherwise.

    def _device(self) -> torch.device:
        return self.communicator.transport.device

    def _sent(self) -> int:
        """Bytes that this rank has sent so far."""
        return self.communicator.transport.bytes_sent

    def _memory(self) -> dict[str, Any]:
        return {"communicator": self.communicator.state_dict()}

    def _load_memory(self, state_dict: Mapping[str, Any]) -> None:
        self.communicator.load_state_dict(state_dict["communicator"])

    def _check_alike(self) -> None:
        """Once, and after loading: refuse to go on with ranks that share no model."""
        if self._alike:
            return
        others = strangers(self.communicator, self.steps, [*self._theta, *self._buffers])
        if others:
            raise RuntimeError(
                f"{type(self).__name__}: ranks {others} have other shared parameters, steps or "
                "momentum than rank 0: begin with the same on all, from one seed, by broadcast or "
                "from one checkpoint"
            )
        self._alike = True


OPTIONS = ("lr", "momentum", "nesterov", "mix")
"""What may change on the way, and is part of the state."""


class LocalSGD(DiLoCo):
    """Averaging alone: W <- the mean of all W, every `period` steps.

    DiLoCo with lr 1 and no momentum. Args as there.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, torch.nn.Parameter]],
        inner: torch.optim.Optimizer | None,
        communicator: Communicator,
        *,
        period: int,
        fragments: int | Sequence[Sequence[str]] = 1,
        overlap: int = 0,
        mix: float | None = None,
        on_sync: Callable[[Sync], None] | None = None,
    ) -> None:
        super().__init__(
            params,
            inner,
            communicator,
            period=period,
            lr=1.0,
            momentum=0.0,
            fragments=fragments,
            overlap=overlap,
            mix=mix,
            on_sync=on_sync,
        )
