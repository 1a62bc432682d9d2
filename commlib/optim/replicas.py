"""What optimizers of replicas share: they exchange what they need, and keep the replicas alike.

Every rank has the whole model and the gradient of its own part of the batch in `p.grad`: a plain
module, or one under DDP inside `no_sync()`, whose own all-reduce would make the gradients alike
before there is anything to compress. What travels is one message a step: all parameters, back to
back, each under its name.
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from commlib.communicator import Communicator
from commlib.eager import eager
from commlib.optim.fragments import check_plain


def check_communicator(what: str, given: object) -> None:
    """Refuse what is no communicator, such as its policy alone (ValueError)."""
    if not isinstance(given, Communicator):
        raise ValueError(
            f"{what}: communicator is {given!r}, allowed: a commlib.Communicator, such as "
            "commlib.Communicator(None, 'int8') for the default group"
        )


class Named(NamedTuple):
    """A parameter, its name, and the options of its group."""

    name: str
    parameter: torch.Tensor
    group: dict[str, Any]


class Replicas(torch.optim.Optimizer):
    """An optimizer on every rank of `communicator`, for the same parameters.

    Options, such as lr, may change between steps, on all ranks alike: a scheduler that goes by a
    rank's own loss would let the replicas drift apart.

    Args:
        params: named, as `model.named_parameters()`, or groups of such.
        communicator: of the ranks; no other's, as its memory is part of this optimizer's state.
        defaults: options of groups.

    Raises: ValueError: parameters without names, of other dtypes or devices, or without gradients.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    shared: ClassVar[tuple[str, ...]] = ()
    """Names of the state that is alike on all ranks."""

    _step_supports_amp_scaling = True
    """A GradScaler then calls `step` in any case and says so; it would skip it on some ranks."""

    steps = 0  # so far
    _alike = False

    def __init__(
        self, params: Iterable[Any], communicator: Communicator, defaults: dict[str, Any]
    ) -> None:
        check_communicator(type(self).__name__, communicator)
        self.communicator = communicator
        self._told = tuple(defaults)  # torch adds to `defaults`
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in another group, before the first step.

        Raises: ValueError as the constructor; RuntimeError after the first step.
        """
        name = type(self).__name__
        if self.steps:
            raise RuntimeError(
                f"{name}: a group was added after step {self.steps}, and what is remembered of the "
                f"others it would lack: make a new {name} of all parameters"
            )
        super().add_param_group(param_group)
        try:
            self._check_options(self.param_groups[-1])
            self._check_group(self.param_groups[-1])
            names = [one.name for one in self._named()]
            if len(set(names)) < len(names):
                twice = next(one for one in names if names.count(one) > 1)
                raise ValueError(f"{name}: two parameters are named {twice!r}; rename one")
            first: dict[int, str] = {}
            for key, parameter, _ in self._named():
                if first.setdefault(id(parameter), key) != key:
                    raise ValueError(
                        f"{name}: {key!r} is {first[id(parameter)]!r} once more and would move "
                        "twice a step: leave it out, as model.named_parameters() does"
                    )
            dtypes = {str(one.parameter.dtype) for one in self._named()}
            if len(dtypes) > 1:
                raise ValueError(
                    f"{name}: parameters are {' and '.join(sorted(dtypes))}, allowed: all of one "
                    "dtype, as they travel in one message"
                )
        except ValueError:
            self.param_groups.pop()
            raise
        self._names = tuple(one.name for one in self._named())
        self._sizes = tuple(one.parameter.numel() for one in self._named())
        self._ndims = tuple(one.parameter.ndim for one in self._named())

    @torch.no_grad()
    @eager
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step, on all ranks together; what `closure`, called first, returned.

        A parameter whose `grad` is None has the gradient 0: the ranks must send the same.

        Raises: ValueError: a gradient is sparse. RuntimeError: a GradScaler calls it;
            ranks begin with other parameters or options, or have fallen out of step.
        """
        if hasattr(self, "found_inf"):  # set by a GradScaler for the time of its call
            for name in ("found_inf", "grad_scale"):
                vars(self).pop(name, None)
            raise RuntimeError(
                f"{type(self).__name__}: a GradScaler skips steps of each rank by itself, and "
                "ranks would fall out of step: use bfloat16 autocast, which needs none"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, parameter, _ in self._named():
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                raise ValueError(
                    f"{type(self).__name__}: the gradient of {name!r} is {parameter.grad.layout}, "
                    "allowed: dense ones"
                )
        self._check_alike()
        self._update()
        self.steps += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What torch's optimizers save, the number of steps, and the communicator's memory.

        Each rank saves its own. With it and the parameters loaded, further steps are bitwise those
        of a run that was not interrupted.
        """
        return {
            **super().state_dict(),
            "steps": self.steps,
            "communicator": self.communicator.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of the same rank.

        Raises: ValueError: another rank's, of other parameters, or no such state; nothing changed.
        """
        name = type(self).__name__
        missing = {"state", "param_groups", "steps", "communicator"} - state_dict.keys()
        if missing:
            raise ValueError(f"no state of {name}: it has no {', '.join(sorted(missing))}")
        found = [group.get("param_names") for group in state_dict["param_groups"]]
        mine = [group["param_names"] for group in self.param_groups]
        if found != mine:
            raise ValueError(f"{name}: the state is of parameters {found}, allowed: {mine}")
        for number, one in enumerate(self._named()):
            for what, saved in state_dict["state"].get(number, {}).items():
                if saved.shape != one.parameter.shape:
                    raise ValueError(
                        f"{name}: {what} of {one.name!r} has shape {tuple(saved.shape)}, allowed: "
                        f"{tuple(one.parameter.shape)}"
                    )
        self.communicator.load_state_dict(state_dict["communicator"])
        kept = {part: copy.deepcopy(state_dict[part]) for part in ("state", "param_groups")}
        super().load_state_dict(kept)
        self.steps = int(state_dict["steps"])
        self._alike = False

    def _update(self) -> None:
        """Exchange what is needed, and move the parameters."""
        raise NotImplementedError

    def _named(self) -> Iterator[Named]:
        """Every parameter, in the order in which they travel."""
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                yield Named(name, parameter, group)

    def _moment(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        """State `name` of a parameter, zeros at first."""
        held: dict[str, torch.Tensor] = self.state[parameter]
        if name not in held:
            held[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return held[name]

    def _parts(self, flat: torch.Tensor) -> Iterator[tuple[Named, torch.Tensor]]:
        """Every parameter, and its part of a flat message in its shape."""
        for one, part in zip(self._named(), flat.split(self._sizes), strict=True):
            yield one, part.view(one.parameter.shape)

    def _check_options(self, group: dict[str, Any]) -> None:
        """Refuse options of a group (ValueError)."""
        raise NotImplementedError

    def _check_finite(self, flat: torch.Tensor, what: str) -> None:
        """Refuse a mean that is not finite, before it is in a moment; all ranks see the same."""
        finite = flat.isfinite()
        if finite.all():
            return
        good = finite.split(self._sizes)
        names = [name for name, part in zip(self._names, good, strict=True) if not part.all()]
        raise RuntimeError(
            f"{type(self).__name__}: step {self.steps + 1}: the mean {what} of {', '.join(names)} "
            "is not finite: a rank's gradient is infinite or NaN, or the sum overflows. Parameters "
            "and moments are as before the step; residuals of error feedback are not, what they "
            "owed was in that mean: go on from a checkpoint, or without it"
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        name, device = type(self).__name__, self.communicator.transport.device
        if "param_names" not in group:
            raise ValueError(
                f"{name}: parameters without names; give model.named_parameters(), as what is "
                "remembered of them goes by name"
            )
        for key, parameter in zip(group["param_names"], group["params"], strict=True):
            check_plain(f"{name}: {key!r}", parameter)
            if parameter.dtype not in self.dtypes:
                allowed = " or ".join(str(dtype) for dtype in self.dtypes)
                raise ValueError(f"{name}: {key!r} is {parameter.dtype}, allowed: {allowed}")
            if parameter.device != device:
                raise ValueError(
                    f"{name}: {key!r} is on {parameter.device}, the communicator on {device}"
                )
            if not parameter.requires_grad:
                raise ValueError(f"{name}: {key!r} does not require a gradient: leave it out")

    def _options(self) -> list[Any]:
        """What decides about the steps, and is alike on all ranks."""
        return [{name: group[name] for name in self._told} for group in self.param_groups]

    def _check_alike(self) -> None:
        """Once, and after loading: refuse to go on with replicas that are none."""
        if self._alike:
            return
        options = self._options()
        tensors = [as_bytes(options)]
        for _, parameter, _ in self._named():
            held = self.state[parameter]
            tensors += [parameter, *(held[name] for name in self.shared if name in held)]
        others = strangers(self.communicator, self.steps, tensors)
        if others:
            raise RuntimeError(
                f"{type(self).__name__}: ranks {others} have other parameters, steps, moments or "
                "options than rank 0: begin with the same on all, from one seed, by broadcast or "
                f"from one checkpoint; options here are {options}"
            )
        self._alike = True


def strangers(communicator: Communicator, steps: int, tensors: Iterable[torch.Tensor]) -> list[int]:
    """The ranks whose steps or tensors are not bitwise those of rank 0; collective."""
    crc = zlib.crc32(str(steps).encode())
    for tensor in tensors:
        data: Any = tensor.detach().cpu().contiguous().numpy()
        crc = zlib.crc32(data, crc)
    mine = torch.tensor([crc], dtype=torch.int64, device=communicator.transport.device)
    all_ = mine.new_empty(communicator.size)
    communicator.all_gather(all_, mine, scheme="fp32").wait()
    return [rank for rank, one in enumerate(all_.tolist()) if one != all_[0]]


def as_bytes(value: object) -> torch.Tensor:
    """Options as text (a tuple is a list, NumPy's numbers are Python's), for `strangers`."""
    text = json.dumps(value, default=str)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient; zeros where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
