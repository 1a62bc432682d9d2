"""Pipeline: the stages of a model, executed by forward fill and backward drain.

All stages in one process, or one per rank of a transport: the same code, only the hop differs. A
pass is one sample under one set of weights; forwards of all passes fill the pipeline, then their
backwards drain it, and the gradient is the mean over passes.

Every stage has a clock. An operation takes the tick in which the stage is free and its input is
there, and what it makes is there from the next tick on; the tick travels with the tensor. So what a
stage logs is what happened, and whether it is what `Schedule` says can be checked.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from commlib.modes import Plain, Reuse
from commlib.optim.hops import End, Hop, Local, Receiver, Sender
from commlib.optim.ticks import Operation, Schedule, check_count, span
from commlib.scheme import Role, Scheme
from commlib.traffic import Transport

Loss = Callable[..., torch.Tensor]
Weights = list[torch.Tensor]


class Link(NamedTuple):
    """Both ways across one boundary, or this rank's ends of them."""

    activations: Hop
    gradients: Hop


class _Pass(NamedTuple):
    """What a backward needs of its forward."""

    taken: torch.Tensor | None  # None: a sample, which needs no gradient
    made: torch.Tensor
    weights: Weights


class Stage:
    """One stage: a module, its clock and its log, and the links to its neighbours.

    parameters: those that are trained, by `names`. clock: the tick from which it is free.
    log: its operations of the last step.
    """

    def __init__(self, module: nn.Module, number: int, loss: Loss | None) -> None:
        self.module = module
        self.number = number
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names = list(trained)
        self.parameters: list[torch.Tensor] = list(trained.values())
        self.clock = 0
        self.log: list[Operation] = []
        self.losses: list[torch.Tensor] = []
        self.before: Link | None = None
        self.behind: Link | None = None
        self._loss = loss
        self._sets: list[Weights] | None = None
        self._open: deque[_Pass] = deque()
        self._sum: list[torch.Tensor | None] = []

    def begin(self, sets: list[Weights] | None) -> None:
        """Start a step. sets: of weights to run under; None: the parameters alone."""
        self.log, self.losses = [], []
        self._sets, self._open = sets, deque()
        self._sum = [None] * len(self.parameters)
        for link in (self.before, self.behind):
            for hop in link or ():
                hop.begin()

    def forward(self, number: int, place: int, sample: Any, target: tuple[Any, ...]) -> None:
        """Pass `number`, under set `place` of the weights. target: what the loss takes more."""
        taken, ready = None, 0
        if self.before is not None:
            taken, ready = self.before.activations.take(place == 0)
        if self.behind is not None and isinstance(self.module, nn.Identity):
            made = sample if taken is None else taken  # what hands on needs no graph
            weights: Weights = []
        else:
            taken = None if taken is None else taken.detach().requires_grad_()
            weights = self.parameters if self._sets is None else self._sets[place]
            made = self._compute(sample if taken is None else taken, weights, target)
        self._open.append(_Pass(taken, made, weights))
        self._work("forward", number, ready)
        if self.behind is not None:
            self.behind.activations.put(made.detach(), self.clock, place == 0)

    def backward(self, number: int, place: int) -> None:
        """The oldest pass without one, which is `number`."""
        taken, made, weights = self._open.popleft()
        gradient, ready = None, 0
        if self.behind is not None:
            gradient, ready = self.behind.gradients.take(place == 0)
        if made is not taken or gradient is None:  # else it hands back what it got
            wanted = weights if taken is None else [taken, *weights]
            found: Sequence[torch.Tensor | None] = [None] * len(wanted)
            if wanted and made.requires_grad:
                found = torch.autograd.grad(made, wanted, gradient, allow_unused=True)
            self._add(found if taken is None else found[1:])
            if taken is not None:
                gradient = torch.zeros_like(taken) if found[0] is None else found[0]
        self._work("backward", number, ready)
        if self.before is not None:
            assert gradient is not None
            self.before.gradients.put(gradient, self.clock, place == 0)

    def finish(self, passes: int) -> None:
        """End a step: gradients are the mean over `passes`."""
        for link in (self.before, self.behind):
            for hop in link or ():
                hop.finish()
        for parameter, total in zip(self.parameters, self._sum, strict=True):
            parameter.grad = torch.zeros_like(parameter) if total is None else total.div_(passes)
        self._sets, self._sum = None, []

    def _compute(self, x: Any, weights: Weights, target: tuple[Any, ...]) -> torch.Tensor:
        with torch.enable_grad():
            if self._sets is None or not weights:
                made = self.module(x)
            else:
                made = functional_call(
                    self.module, dict(zip(self.names, weights, strict=True)), (x,)
                )
            if self.behind is None and self._loss is not None:
                made = self._loss(made, *target)
        if not isinstance(made, torch.Tensor):
            raise ValueError(
                f"Pipeline: stage {self.number} made {type(made).__name__}, allowed: one tensor"
            )
        if self.behind is None:
            if made.numel() != 1:
                raise ValueError(
                    f"Pipeline: the loss has shape {tuple(made.shape)}, allowed: one number; "
                    "give loss=, or a last stage that makes it"
                )
            self.losses.append(made.detach().reshape(()))
        return made

    def _work(self, kind: Literal["forward", "backward"], number: int, ready: int) -> None:
        tick = max(self.clock, ready)
        self.log.append(Operation(tick, kind, number))
        self.clock = tick + 1

    def _add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                total = self._sum[place]
                # a copy: autograd may have handed out the very tensor that goes on to the left
                self._sum[place] = gradient.clone() if total is None else total.add_(gradient)


class Pipeline:
    """A model cut into stages, each of which makes the next one's input.

    Args:
        stages: all of them, in order; with a transport this rank's alone, one per rank.
        loss: `loss(output)` of the last stage's output, or `loss(output, target)`: one number.
            None: the last stage makes it.
        transport: moves tensors between ranks; None: all stages are here.
        activations: the scheme of what stages hand on: a codec, or a codec with `+reuse`, which
            sends the passes of one sample as differences to its first pass's. None: raw.
        gradients: the codec of what they hand back; None: raw.

    What a message holds has one form for all samples. With a scheme, the next stage computes on
    what arrived, and the gradient at that goes back as if it were the gradient at what was sent.

    Raises: ValueError: no stages, more than one with a transport, a scheme that no hop takes.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        *,
        loss: Loss | None = None,
        transport: Transport | None = None,
        activations: Scheme | str | None = None,
        gradients: Scheme | str | None = None,
    ) -> None:
        check_count("Pipeline: the number of stages", len(stages))
        if transport is not None and len(stages) != 1:
            raise ValueError(
                f"Pipeline: got {len(stages)} stages, with a transport allowed: this rank's one"
            )
        self.depth = len(stages) if transport is None else transport.size
        there = _scheme("activations", activations, Role.ACTIVATION)
        back = _scheme("gradients", gradients, Role.ACTIVATION_GRADIENT)
        first = 0 if transport is None else transport.rank
        self.stages = tuple(Stage(module, first + n, loss) for n, module in enumerate(stages))
        for left, right in zip(self.stages, self.stages[1:], strict=False):
            names = _names(left.number)
            left.behind = right.before = Link(Local(names[0], there), Local(names[1], back))
        if transport is not None:
            (mine,), rank = self.stages, transport.rank
            if rank > 0:
                names = _names(rank - 1)
                mine.before = Link(
                    Receiver(names[0], there, transport, rank - 1),
                    Sender(names[1], back, transport, rank - 1),
                )
            if rank < self.depth - 1:
                names = _names(rank)
                mine.behind = Link(
                    Sender(names[0], there, transport, rank + 1),
                    Receiver(names[1], back, transport, rank + 1),
                )

    def run(
        self,
        samples: Sequence[Any],
        targets: Sequence[Any] | None = None,
        *,
        copies: int = 1,
        weights: Callable[[Stage], list[Weights] | None] | None = None,
    ) -> float | None:
        """Push `copies` passes of every sample through; pass i * copies + k is copy k of sample i.

        Every parameter's `grad` becomes the mean over passes of its gradient, for any optimizer to
        use. All ranks call this with as many samples; the first stage reads those, the last one
        the targets.

        Args:
            targets: of the samples, for the loss; None: it takes none.
            weights: tensors in place of a stage's parameters, one list for each copy; None: the
                parameters themselves.

        Returns: the mean loss over passes, where the last stage is; None elsewhere.

        Raises:
            ValueError: no samples, another number of targets, a loss that is not one number.
            RuntimeError: a message that is not the one expected. After an error on any rank the
                pipelines of all have to be made anew.
        """
        check_count("Pipeline: the number of samples", len(samples))
        check_count("Pipeline: copies", copies)
        if targets is not None and len(targets) != len(samples):
            raise ValueError(
                f"Pipeline: got {len(targets)} targets for {len(samples)} samples, allowed: one "
                "for each"
            )
        for stage in self.stages:
            stage.begin(None if weights is None else weights(stage))
        passes = [(i * copies + k, i, k) for i in range(len(samples)) for k in range(copies)]
        for number, i, k in passes:
            target = () if targets is None else (targets[i],)
            for stage in self.stages:
                stage.forward(number, k, samples[i], target)
        for number, _, k in passes:
            for stage in reversed(self.stages):
                stage.backward(number, k)
        for stage in self.stages:
            stage.finish(len(passes))
        losses = self.stages[-1].losses
        return math.fsum(torch.stack(losses).tolist()) / len(losses) if losses else None

    def state_dict(self) -> dict[str, Any]:
        """Where the coded hops that are here are in their streams of random numbers, by name.

        Between two steps. The modules' own state is saved beside it; on ranks, each saves its own.
        """
        return {key: ends[0].state_dict() for key, ends in self._coded().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, on all ranks.

        Raises: ValueError: of other hops or schemes; nothing has changed.
        """
        self.check_state(state)
        for key, ends in self._coded().items():
            for end in ends:
                end.load_state_dict(state[key])

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse what `load_state_dict` refuses (ValueError)."""
        mine = self._coded()
        if state.keys() != mine.keys():
            raise ValueError(
                f"Pipeline: the state is of the coded hops {sorted(state)}, allowed: "
                f"{sorted(mine)}: give the stages, activations= and gradients= that it was saved "
                "with"
            )
        for key, ends in mine.items():
            ends[0].check(state[key])

    def _coded(self) -> dict[str, list[End]]:
        """The ends here of every coded hop, by its name."""
        links = [link for stage in self.stages for link in (stage.before, stage.behind)]
        found: dict[str, list[End]] = {}
        for end in (end for link in links for hop in link or () for end in hop.ends):
            if end.scheme is not None:
                found.setdefault(end.key, []).append(end)
        return found

    def schedule(self, passes: int) -> Schedule:
        """What the stages' logs of a step of `passes` passes should be."""
        return Schedule(self.depth, passes)

    @property
    def ticks(self) -> int:
        """Units of time of the last step, counted from the logs of the stages that are here.

        The first stage begins it and ends it, so where that is here this is the whole step's.
        """
        return span(stage.log for stage in self.stages)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the activations that the stages here have handed on, all steps together."""
        links = [stage.behind for stage in self.stages if stage.behind is not None]
        return sum(link.activations.nbytes for link in links)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that the stages here have handed back, all steps together."""
        links = [stage.before for stage in self.stages if stage.before is not None]
        return sum(link.gradients.nbytes for link in links)


def _names(left: int) -> tuple[str, str]:
    """Of both ways across the boundary behind stage `left`."""
    return f"activations of stage {left}", f"gradients of stage {left + 1}"


def _scheme(name: str, scheme: Scheme | str | None, role: Role) -> Scheme | None:
    """The scheme of one way; None: raw."""
    if scheme is None:
        return None
    chosen = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    allowed = (Plain, Reuse) if role is Role.ACTIVATION else (Plain,)
    if not isinstance(chosen.feedback, allowed):
        also = ", or a codec with +reuse" if role is Role.ACTIVATION else ""
        raise ValueError(f"Pipeline: {name} is {str(chosen)!r}, allowed: a codec{also}")
    return None if chosen.lossless else chosen.resolve(role)
