"""The policy of a pipeline: one table for activations and for their gradients."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from commlib.boundary import told
from commlib.integrations.pipeline_edges import ROLES
from commlib.modes import Plain, Reuse
from commlib.policy import Policy, Role, Rule, Scheme, TensorInfo, check_mode
from commlib.stamp import WIRE_VERSION

PolicyLike = str | Scheme | Policy | dict[str, Any]

DEFAULT = "int8"


def parse(policy: PolicyLike | None, backward: PolicyLike | None) -> Policy:
    """One policy for both directions.

    policy: scheme text, `Scheme`, `Policy`, table or file; None: COMMLIB_POLICY, else "int8". Of a
    scheme alone: for activations, and for their gradients what `backward` says; None: the same
    codec, with the memory that gradients can have.

    Raises: ValueError: error feedback, a mode in the wrong direction, "auto".
    """
    named = os.environ.get("COMMLIB_POLICY")
    if policy is None and named:
        try:
            return parse(named, backward)
        except ValueError as error:
            raise ValueError(f"COMMLIB_POLICY={named!r}, and wrap got none: {error}") from error
    forward = _parsed(DEFAULT if policy is None else policy)
    if backward is None and not _is_scheme(forward):
        _refuse(forward, *ROLES.values())
        return forward
    _refuse(forward, Role.ACTIVATION)
    if backward is None:
        scheme = forward.rules[0].scheme
        back = scheme if isinstance(scheme.feedback, Plain | Reuse) else scheme.stateless()
        return _joined(forward, Policy.parse(back))
    back_policy = _parsed(backward)
    _refuse(back_policy, Role.ACTIVATION_GRADIENT)
    return _joined(forward, back_policy)


def told_policy(policy: Policy) -> Policy:
    """What all ranks must have alike: not where each keeps its references."""
    return Policy(tuple(replace(rule, scheme=told(rule.scheme)) for rule in policy.rules))


def why_exact(policy: Policy, info: TensorInfo) -> str | None:
    """Of a message below the size at which the policy begins to code; None: it codes none.

    Small parameters stay exact beside large ones without a word; a pipeline's messages have one
    size, and all of them may be below.
    """
    for rule in policy.rules:
        larger = info._replace(numel=rule.min_numel)
        if info.numel < rule.min_numel and not rule.scheme.lossless and rule.matches(larger):
            return (
                f"it has {info.numel} values, and the rule for {rule.scheme} begins at "
                f"{rule.min_numel}: make micro-batches larger, or give a policy whose rule has a "
                "smaller min_numel"
            )
    return None


def facts_of(stage: Any, policy: Policy, kind: str, seed: int) -> dict[str, Any]:
    """What all ranks of a pipeline must have alike."""
    rules = enumerate(told_policy(policy).rules, 1)
    return {
        "key": kind,
        "num_stages": stage.num_stages,
        "seed": seed,
        "wire": WIRE_VERSION,
        "COMMLIB_CHECK": os.environ.get("COMMLIB_CHECK", ""),
    } | {f"policy, rule {number}": str(rule.to_dict()) for number, rule in rules}


def _parsed(policy: PolicyLike) -> Policy:
    if policy == "auto":
        raise ValueError(
            "'auto' plans collectives, and a pipeline has none: name a scheme such as 'int8', or "
            "one per direction: wrap(schedule, 'int4', backward='int8')"
        )
    return Policy.parse(policy)


def _is_scheme(policy: Policy) -> bool:
    return bool(policy.rules) and policy == Policy.parse(policy.rules[0].scheme)


def _joined(forward: Policy, back: Policy) -> Policy:
    """The rules of each for its direction."""
    if forward == back:
        return forward
    rules = []
    for policy, role in ((forward, Role.ACTIVATION), (back, Role.ACTIVATION_GRADIENT)):
        for rule in policy.rules:
            if rule.role in (None, role):
                values = {"key": rule.key, "min_numel": rule.min_numel, "min_ndim": rule.min_ndim}
                rules.append(
                    Rule(
                        rule.scheme,
                        role=role,
                        from_step=rule.from_step,
                        dtype=rule.dtype,
                        **values,  # type: ignore[arg-type]
                    )
                )
    return Policy(tuple(rules))


def _refuse(policy: Policy, *roles: Role) -> None:
    """Refuse what these roles cannot have, before anything is agreed."""
    for rule in policy.rules:
        if rule.from_step:
            raise ValueError("a pipeline's policy has no from_step: its messages have no steps")
        for role in roles:
            if rule.role in (None, role):
                check_mode(rule.scheme, role)
