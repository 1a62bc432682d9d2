"""Where a pipeline of torch.distributed.pipelining lets its messages be exchanged for others.

A stage builds lists of P2POps, which its schedule issues and waits for. A subclass made here lets
the list be built, and puts wires in the place of tensors:

    get_fwd_send_ops, get_bwd_send_ops                   code, send the wire
    get_fwd_recv_ops, get_bwd_recv_ops                   receive a wire instead of the tensor
    _retrieve_recv_activations, _retrieve_recv_grads     decode it into the stage's own buffer

So the schedule stays as it is, with its batches of sends and receives (NCCL coalesces them), and so
does the group. Stages that are neighbours on one rank hand tensors over without any of this.

On gloo receives are issued when their list is built, and waited for when they are decoded. A batch
of 1F1B has its send first, and gloo announces a receive to the peer behind the data of that send:
so large messages that should cross would go one after the other (two hosts at 15 Mbit/s exchanged
128 KiB in 136 ms that way, in 72 ms with the receive first).

A schedule only gets two more arguments of `step`, and tells when a step begins and ends.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Ports(Protocol):
    """What a stage's messages are handed to."""

    def prepared(self) -> None:
        """The stage knows its neighbours' tensors (again)."""

    def send(self, stage: Any, direction: str, microbatch: int, ops: list[Any]) -> list[Any]:
        """The ops that send instead of `ops`."""

    def post(self, stage: Any, direction: str, microbatch: int, ops: list[Any]) -> list[Any]:
        """The ops that receive instead of `ops`."""

    def arrive(self, stage: Any, direction: str, microbatch: int) -> None:
        """What was posted has come: put it into the stage's own buffers."""


@functools.cache
def compressed(base: Hashable) -> type[Any]:
    """A subclass of a stage class whose messages go through its `commlib_ports`.

    One base: Python refuses to change an object's class to one with another layout.
    """

    class Compressed(base):  # type: ignore[valid-type, misc]
        commlib_base = base

        def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
            ops = super().get_fwd_send_ops(fwd_chunk_id)
            return self.commlib_ports.send(self, "forward", fwd_chunk_id, ops)  # type: ignore[no-any-return]

        def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
            ops = super().get_bwd_send_ops(bwd_chunk_id)
            return self.commlib_ports.send(self, "backward", bwd_chunk_id, ops)  # type: ignore[no-any-return]

        def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
            ops = super().get_fwd_recv_ops(fwd_chunk_id)
            return self.commlib_ports.post(self, "forward", fwd_chunk_id, ops)  # type: ignore[no-any-return]

        def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
            ops = super().get_bwd_recv_ops(bwd_chunk_id)
            return self.commlib_ports.post(self, "backward", bwd_chunk_id, ops)  # type: ignore[no-any-return]

        def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
            self.commlib_ports.arrive(self, "forward", fwd_chunk_id)
            return super()._retrieve_recv_activations(fwd_chunk_id)

        def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
            self.commlib_ports.arrive(self, "backward", bwd_chunk_id)
            return super()._retrieve_recv_grads(bwd_chunk_id)

        def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
            self.commlib_ports.prepared()
            return super()._prepare_forward_infra(*args, **kwargs)

        def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
            self.commlib_ports.prepared()
            return super()._prepare_backward_infra(*args, **kwargs)

    Compressed.__name__ = Compressed.__qualname__ = base.__name__  # type: ignore[attr-defined]
    return Compressed


Samples = Sequence[int] | torch.Tensor


class Steps(Protocol):
    """What hears of a schedule's steps."""

    def step(
        self, microbatches: int, training: bool, sample_ids: Samples | None, is_fresh: bool | None
    ) -> AbstractContextManager[None]:
        """Around a step."""


@functools.cache
def stepping(base: Hashable) -> type[Any]:
    """A subclass of a schedule class whose steps go through the pipeline of its stages."""

    class Stepping(base):  # type: ignore[valid-type, misc]
        commlib_base = base

        def step(
            self,
            *args: Any,
            sample_ids: Samples | None = None,
            is_fresh: bool | None = None,
            **kwargs: Any,
        ) -> Any:
            autograd = getattr(self, "_backward_requires_autograd", True)
            if self._has_backward and autograd and not torch.is_grad_enabled():
                return super().step(*args, **kwargs)  # refused there, before anything is sent
            # another schedule of the same stages may have been wrapped since
            stage: Any = self._stages[0] if hasattr(self, "_stages") else self._stage
            steps: Any = getattr(stage, "commlib_ports", self.commlib_pipeline)
            with steps.step(self._n_microbatches, self._has_backward, sample_ids, is_fresh):
                return super().step(*args, **kwargs)

    Stepping.__name__ = Stepping.__qualname__ = base.__name__  # type: ignore[attr-defined]
    return Stepping


def attach(stage: Any, ports: Ports) -> None:
    """Let the messages of `stage` go through `ports`."""
    detach(stage)
    stage.commlib_ports = ports
    base: Any = type(stage)
    stage.__class__ = compressed(base)


def detach(stage: Any) -> None:
    """Make `stage` what it was before `attach`."""
    _restore(stage, "commlib_ports")


def attach_schedule(schedule: Any, pipeline: Steps) -> None:
    """Let `pipeline` hear of the steps of `schedule`."""
    _restore(schedule, "commlib_pipeline")
    schedule.commlib_pipeline = pipeline
    base: Any = type(schedule)
    schedule.__class__ = stepping(base)


def _restore(thing: Any, name: str) -> None:
    base = getattr(type(thing), "commlib_base", None)
    if base is not None:
        thing.__class__ = base
        delattr(thing, name)
