"""What a pipeline's ranks must have alike, checked before anything is sent."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from commlib.integrations.pipeline_edges import Edge, Shape
from commlib.integrations.pipeline_hooks import Samples

MOST = 1 << 63
"""Sample ids are below this."""
USERS = (NotImplementedError, RecursionError, torch.OutOfMemoryError)
"""Kinds of RuntimeError that a model raises and no exchange does."""


class Unfit(RuntimeError):
    """Stages do not fit together, found by all ranks before anything was sent."""


def check_fresh(is_fresh: bool | None) -> None:
    """Refuse a step that does not say whether its batch is fresh (ValueError)."""
    if not isinstance(is_fresh, bool):
        raise ValueError(
            f"a step under +reuse needs is_fresh=True or False on every stage, got {is_fresh}; "
            "commlib.LazySampler tells"
        )


def samples_of(sample_ids: Samples | None, microbatches: int) -> list[list[int]]:
    """The ids of each micro-batch's samples.

    Raises: ValueError: there are none, they are no whole numbers, one stands twice, or they do not
        make equal micro-batches.
    """
    if sample_ids is None:
        raise ValueError(
            "a step under +delta needs sample_ids=, one id per sample of the whole batch, on every "
            "stage: schedule.step(sample_ids=ids)"
        )
    given: Any = sample_ids  # torch's and NumPy's have tolist()
    try:
        ids = list(map(_id, given.tolist() if hasattr(given, "tolist") else given))
    except TypeError:  # whoever waits for this rank must hear of it as of other mistakes
        raise ValueError(
            f"sample_ids is a sequence of whole numbers of up to 64 bits, got {reprlib.repr(given)}"
        ) from None
    if len(ids) % microbatches or not ids:
        raise ValueError(f"{len(ids)} sample_ids do not make {microbatches} equal micro-batches")
    if len(set(ids)) != len(ids):
        seen: set[int] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise ValueError(
            f"sample id {twice} stands twice in one step; its reference would depend on which is "
            "coded first"
        )
    n = len(ids) // microbatches
    return [ids[start : start + n] for start in range(0, len(ids), n)]


def _id(value: Any) -> int:
    """A sample's id. TypeError where it is none."""
    number = operator.index(value)
    if isinstance(value, bool) or not -MOST <= number < MOST:
        raise TypeError
    return number


def compare_ends(said: Sequence[Any]) -> None:
    """Refuse boundaries whose two ends expect different things.

    said: by rank, a complaint or "", and rows of "sends" or "receives", the boundary's name, and
        what its end expects, None where it does not know.

    Raises: Unfit naming them.
    """
    complaints = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(said) if text]
    if complaints:
        raise Unfit("; ".join(complaints))
    found: dict[str, dict[str, str | None]] = {"sends": {}, "receives": {}}
    for _, rows in said:
        for end, key, text in rows:
            found[end][key] = text
    wrong = []
    for key in sorted({*found["sends"], *found["receives"]}):
        sent, received = (found[end].get(key, "nothing") for end in ("sends", "receives"))
        if None not in (sent, received) and sent != received:
            wrong.append(f"{key}: one end sends {sent}, the other expects {received}")
    if wrong:
        raise Unfit(
            f"the stages do not fit together: {'; '.join(wrong)}. Neighbouring stages need the "
            "same shapes and dtypes, and all ranks the same policy and checkpoint"
        )


def compare_sums(said: Sequence[Mapping[str, int]]) -> None:
    """Refuse boundaries whose two ends do not remember the same.

    said: by rank, checksums of its boundaries.

    Raises: RuntimeError naming them.
    """
    ends: dict[str, list[tuple[int, int]]] = {}
    for rank, sums in enumerate(said):
        for key, total in sums.items():
            ends.setdefault(key, []).append((rank, total))
    torn = [
        f"{key} (ranks {' and '.join(str(rank) for rank, _ in pair)})"
        for key, pair in sorted(ends.items())
        if len({total for _, total in pair}) > 1 or len(pair) != 2
    ]
    if torn:
        raise RuntimeError(
            f"the two ends do not remember the same of {', '.join(torn)}: load one checkpoint on "
            "all ranks, or call reset() on all ranks"
        )


def check_shape(edge: Edge, shape: Shape, known: Shape | None) -> None:
    """Refuse a tensor that is not what both ends agreed on (RuntimeError)."""
    if known is not None and shape != known:
        (sizes, dtype), (agreed, agreed_dtype) = shape, known
        raise RuntimeError(
            f"{edge.key}: a tensor of {list(sizes)} {dtype}, the next stage expects "
            f"{list(agreed)} {agreed_dtype}; all micro-batches need the shape of the first one"
        )


def root_of(error: Exception) -> BaseException:
    """What a stage raised, where a schedule says that it failed to run one."""
    found: BaseException = error
    while found.__cause__ is not None and "failed to run" in str(found).lower():
        found = found.__cause__
    return found
