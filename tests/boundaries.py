"""A boundary's two ends in one process, and steps to play through them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from commlib.boundary import Boundary
from commlib.scheme import Role, Scheme
from tests.contract import data


class Told(NamedTuple):
    """What both ends are told of a step, and its micro-batches' tensors."""

    samples: list[list[int]]
    fresh: bool
    tensors: list[torch.Tensor]


def ends(text: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Boundary]:
    scheme = Scheme.parse(text).resolve(Role.ACTIVATION)
    return [Boundary("blocks.3", scheme, shape, dtype, seed=5) for _ in range(2)]


def steps(
    count: int, shape: Sequence[int], dtype: torch.dtype, *, kind: str = "random"
) -> Iterator[Told]:
    """Two micro-batches a step; a sample comes back every third step, a batch stays for two."""
    samples = shape[0]
    numel = torch.Size(shape).numel()
    for step in range(count):
        first = step % 3 * 2 * samples
        ids = [[first + m * samples + s for s in range(samples)] for m in range(2)]
        tensors = [
            (10 * data(kind, numel, 2 * first + m) + 0.1 * data("random", numel, step))
            .to(dtype)
            .view(*shape)
            for m in range(2)
        ]
        yield Told(ids, step % 2 == 0, tensors)


def send(pair: Sequence[Boundary], x: torch.Tensor, microbatch: int) -> torch.Tensor:
    """One message: what arrives."""
    sender, receiver = pair
    wire = torch.full((sender.nbytes(microbatch),), 0xA5, dtype=torch.uint8)
    assert receiver.nbytes(microbatch) == len(wire)
    assert len(wire) % 16 == 0
    sender.encode(x, wire, microbatch)
    out = torch.full_like(x, 7.0)
    receiver.decode(wire, out, microbatch)
    arrived = out.clone()
    out.fill_(7.0)  # whose it is may do with it what they like
    wire.fill_(7)
    return arrived


def play(pair: Sequence[Boundary], told: Told) -> list[torch.Tensor]:
    """One step: what arrives of each micro-batch."""
    for end in pair:
        end.begin(told.samples, told.fresh)
    return [send(pair, x, m) for m, x in enumerate(told.tensors)]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


def agree(pair: Sequence[Boundary]) -> bool:
    return len({(end.history(), end.checksum()) for end in pair}) == 1


def saved(boundary: Boundary) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(boundary.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]
