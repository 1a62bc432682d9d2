"""Whether what was saved, or is asked for, is what a model here will use."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from commlib.algorithms import Hierarchical, TwoPhase, unknown
from commlib.communicator import Communicator
from commlib.compressors import apart, text_of
from commlib.feedback import OWNER
from commlib.policy import Policy, TensorInfo
from commlib.scheme import Role, Scheme

log = logging.getLogger("commlib")

SHOWN = 4  # names of parameters


def tell_unmatched(policy: Policy | str | None, names: Collection[str], *roles: Role) -> None:
    """Say which rules of a policy are for keys of no parameter here: a pattern with a slip.

    roles: of what is sent; rules for others are for other uses of the policy.
    """
    if not isinstance(policy, Policy):
        return
    rules = [rule for rule in policy.rules if rule.role in (None, *roles)]
    keys = [r.key for r in rules if not any(fnmatchcase(name, r.key) for name in names)]
    if keys and names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        log.warning(
            "the policy has rules for the keys %s, which no parameter matches: there are %s%s",
            ", ".join(map(repr, dict.fromkeys(keys))),
            ", ".join(sorted(names)[:SHOWN]),
            more,
        )


def check_fits(
    communicator: Communicator,
    tensors: Mapping[str, TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
    saved: Mapping[str, Any],
    planned: tuple[Policy, bool] | None = None,
) -> None:
    """Refuse residuals that would never be sent: of no tensor here, another size or scheme.

    Args:
        tensors: by name; empty where they are not known yet.
        shapes: of those that are reduce-scattered by dimension 0.
        saved: what `Communicator.state_dict` gave.
        planned: the policy that comes with it, and whether that is auto's; None: what is in force.

    Raises: ValueError naming the residual, what it is and what is expected.
    """
    policy, auto = planned or (communicator.policy, communicator._auto)
    for text, memory in saved["compressors"].items():
        # of its host's part of the sum, whose size the first message tells
        of_hosts = isinstance(Scheme.parse(text).algorithm, Hierarchical)
        for key, h in memory["residuals"].items():
            name = key.removesuffix(OWNER)
            if not h.any():  # owes nothing, such as one of a tensor that travels raw
                continue
            if tensors and name not in tensors:
                raise ValueError(f"saved residuals: {unknown('parameter', name, tensors)}")
            info = tensors.get(name)
            whole = name == key and h.dim() == 1 + (name in shapes) and not of_hosts
            if info is not None and whole:
                numel = info.numel
                if name in shapes:
                    first, size = shapes[name][0], communicator.size
                    numel = -(-first // size) * size * (numel // first)
                if h.numel() != numel:
                    raise ValueError(
                        f"the saved residual of {name!r} has {h.numel()} elements, that of the "
                        f"parameter here {numel}"
                    )
            # what "auto" chooses by is the size of a message, not that of a tensor
            expected = sorted(_texts(policy, None if auto else info))
            if text not in expected:
                raise ValueError(
                    f"the residual of {name!r} was saved under {text}, this policy sends it as "
                    f"{' or '.join(expected)}: load it under the policy that saved it, or start "
                    "from zero residuals"
                )


def _texts(policy: Policy, info: TensorInfo | None) -> set[str]:
    """The compressors that a tensor may ever meet; without `info`, that any may."""
    if info is None:
        schemes = [rule.scheme.resolve(Role.GRADIENT) for rule in policy.rules]
    else:
        steps = {0, *(rule.from_step for rule in policy.rules)}
        schemes = [policy.choose(info._replace(step=step)) for step in steps]
    return {text for scheme in schemes for text in _halves(scheme)} or {"fp32"}


def _halves(scheme: Scheme) -> set[str]:
    config = scheme.algorithm
    back = config.back if isinstance(config, TwoPhase) else None
    codecs = (scheme.codec, back or scheme.codec)
    return {text_of(codec, scheme.feedback, apart(scheme)) for codec in codecs}
