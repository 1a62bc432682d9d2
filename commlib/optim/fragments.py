"""Fragments: the parameters that DiLoCo exchanges together, as one flat vector."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence

import torch

Pair = tuple[str, torch.nn.Parameter]


class Fragment:
    """Named parameters, in the order in which they travel."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.parameters = [parameter for _, parameter in pairs]
        self.names = tuple(name for name, _ in pairs)
        self.sizes = tuple(parameter.numel() for parameter in self.parameters)
        self.ndims = tuple(parameter.ndim for parameter in self.parameters)

    def flat(self) -> torch.Tensor:
        """A copy of the parameters, one after the other."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])

    def parts(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Every name, and its part of a flat vector in its shape."""
        pieces = zip(self.names, self.parameters, flat.split(self.sizes), strict=True)
        for name, parameter, part in pieces:
            yield name, part.view(parameter.shape)

    @torch.no_grad()
    def put(self, flat: torch.Tensor, mix: float) -> None:
        """Parameters become ``mix`` times themselves plus ``1 - mix`` times `flat`."""
        for parameter, (_, part) in zip(self.parameters, self.parts(flat), strict=True):
            if mix:
                parameter.lerp_(part, 1 - mix)
            else:
                parameter.copy_(part)

    def not_finite(self, flat: torch.Tensor) -> list[str]:
        """Names of the parts of `flat` that have an infinite element or a NaN."""
        if flat.isfinite().all():
            return []
        return [name for name, part in self.parts(flat) if not part.isfinite().all()]


def named(
    who: str,
    params: Iterable[Pair],
    inner: torch.optim.Optimizer | None,
    device: torch.device,
) -> list[Pair]:
    """The parameters, checked.

    Raises: ValueError: not named, two of a name, one under two, not float32, on another device,
        frozen; or not those that `inner` trains.
    """
    pairs: list[Pair] = []
    for one in params:
        if not isinstance(one, tuple) or len(one) != 2 or not isinstance(one[0], str):
            raise ValueError(
                f"{who}: parameters without names; give model.named_parameters(), as what travels "
                "goes by name"
            )
        pairs.append(one)
    if not pairs:
        raise ValueError(f"{who}: no parameters")
    names = [name for name, _ in pairs]
    first: dict[int, str] = {}
    for name, parameter in pairs:
        if names.count(name) > 1:
            raise ValueError(f"{who}: two parameters are named {name!r}; rename one")
        if first.setdefault(id(parameter), name) != name:
            raise ValueError(
                f"{who}: {name!r} is {first[id(parameter)]!r} once more: leave it out, as "
                "model.named_parameters() does"
            )
        check_plain(f"{who}: {name!r}", parameter)
        if parameter.dtype != torch.float32:
            raise ValueError(f"{who}: {name!r} is {parameter.dtype}, allowed: torch.float32")
        if parameter.device != device:
            raise ValueError(f"{who}: {name!r} is on {parameter.device}, the group on {device}")
        if not parameter.requires_grad:
            raise ValueError(f"{who}: {name!r} does not require a gradient: leave it out")
    if inner is not None:
        groups = inner.param_groups
        trained = {id(p) for group in groups for p in group["params"] if p.requires_grad}
        idle = [name for name, parameter in pairs if id(parameter) not in trained]
        if idle:
            raise ValueError(f"{who}: the inner optimizer does not train {', '.join(idle)}")
        if len(trained) > len(pairs):
            raise ValueError(
                f"{who}: the inner optimizer trains {len(trained) - len(pairs)} parameters that "
                "are not among those given: they would differ from rank to rank for good"
            )
    return pairs


def check_plain(what: str, tensor: torch.Tensor) -> None:
    """Refuse a DTensor (ValueError): of FSDP2 and tensor parallel, whose ranks hold parts."""
    if hasattr(tensor, "placements"):
        raise ValueError(
            f"{what} is a DTensor (fully_shard, tensor parallel), of which every rank holds a "
            "part; allowed: plain tensors, whole on every rank"
        )


def trained(inner: torch.optim.Optimizer) -> int:
    """How many parameters an optimizer has."""
    return sum(len(group["params"]) for group in inner.param_groups)


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of it has to be given one, as LBFGS's."""
    # the class's: schedulers put wrappers on the instance
    step = getattr(type(optimizer), "step", None)
    if step is None:
        return False
    _, *others = inspect.signature(step).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(one.default is one.empty and one.kind not in several for one in others)


def check_steps_alone(who: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose step needs a closure (ValueError)."""
    if needs_closure(optimizer):
        raise ValueError(
            f"{who}: the step of {type(optimizer).__name__} needs a closure, with which it goes "
            "over the model again, after the exchange; allowed: optimizers that step on the "
            "gradients there are, such as torch.optim.SGD and AdamW"
        )


def check_none_added(who: str, inner: torch.optim.Optimizer, before: int) -> None:
    """Refuse an optimizer that has got other parameters since `before` (RuntimeError)."""
    now = trained(inner)
    if now != before:
        raise RuntimeError(
            f"{who}: the inner optimizer trains {now} parameters, and trained {before} when this "
            f"{who} was made: nobody would exchange those that were added, and they would differ "
            f"from rank to rank for good. Make a new {who} of all of them"
        )


def cut(
    who: str, pairs: Sequence[Pair], fragments: int | Sequence[Sequence[str]], period: int
) -> list[Fragment]:
    """The fragments: parameter i in number ``i mod fragments``, or as `fragments` names them.

    Raises: ValueError: more fragments than steps of a period or parameters, an empty one, or names
        that are not each of the parameters once.
    """
    if isinstance(fragments, int):
        most = min(period, len(pairs))
        if isinstance(fragments, bool) or not 1 <= fragments <= most:
            raise ValueError(
                f"{who}: fragments is {fragments}, allowed: 1 to {most}, for {len(pairs)} "
                f"parameters and a period of {period}"
            )
        return [Fragment(pairs[k::fragments]) for k in range(fragments)]
    given = [[fragments] if isinstance(fragments, str) else list(names) for names in fragments]
    if not 1 <= len(given) <= period or not all(given):
        raise ValueError(
            f"{who}: fragments are {given}, allowed: 1 to {period} (the period), none of them empty"
        )
    listed = [name for names in given for name in names]
    known = dict(pairs)
    if sorted(listed) != sorted(known):
        wrong = sorted(set(listed) ^ set(known)) or sorted(
            {name for name in listed if listed.count(name) > 1}
        )
        raise ValueError(
            f"{who}: fragments must name each parameter once; {', '.join(wrong)} is not of the "
            "parameters, in no fragment, or in two"
        )
    return [Fragment([(name, known[name]) for name in names]) for names in given]
