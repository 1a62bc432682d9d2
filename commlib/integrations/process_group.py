"""The process group behind the backend "commlib": torch's own, with some calls compressed.

It has an inner backend for each device (gloo for CPU tensors, NCCL for CUDA's) and hands every call
to it that the policy does not compress, as it came. Compressed are

    role         calls                        which
    gradient     all_reduce, reduce_scatter   SUM, AVG, PREMUL_SUM
    activation   all_to_all, send, recv       send and recv not under "auto"
    parameter    all_gather, broadcast        only by a rule that names role = "parameter"

of fp32, fp16 and bf16 tensors, flat, as lists, coalesced and functional. What DDP broadcasts when
it is made and what FSDP gathers are weights: a policy must say so to touch them. Tensors come
without names, so nothing is remembered of them: no error feedback.

Whether a call is compressed depends on the policy, dtype and numbers of elements, which all ranks
share. What is, goes through the group's communicator (`groups`), on CPU over connections of its
own. After a failure there, compressed calls raise and say why; the others go on.

On NCCL, torch 2.13 launches the ops of `batch_isend_irecv` together only for groups of its own
class, and one by one on this: sends and receives of large tensors may then block each other. Leave
the pipeline's dimension of a mesh to NCCL (`backend_override`), and wrap its schedule instead.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from commlib.eager import eager
from commlib.integrations import calls, groups, inner, p2p, routes
from commlib.integrations.backend import NAME, Options
from commlib.integrations.calls import ReduceOp, coalesced, is_sum, spelled
from commlib.integrations.choices import (
    ACTIVATION,
    ANY,
    GRADIENT,
    MESSAGE,
    PARAMETER,
    Choices,
)
from commlib.policy import Policy, Scheme
from commlib.transport import GLOO

c10d: Any = distributed_c10d  # its option classes are missing from the stubs
AllreduceOptions: Any = c10d.AllreduceOptions
Base: Any = dist.ProcessGroup  # its stubs have the names of one torch

PREMUL_SUM = ReduceOp.PREMUL_SUM
FREEING_SECONDS = 0.02  # gloo's threads need microseconds, once they have the GIL
# The names of calls since torch 2.13, and before.
REDUCE_SCATTER = ("reduce_scatter_single", "_reduce_scatter_base")
REDUCE_SCATTER_COALESCED = ("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced")
ALL_GATHER = ("all_gather_single", "_allgather_base")
ALL_GATHER_COALESCED = ("all_gather_single_coalesced", "allgather_into_tensor_coalesced")
ALL_TO_ALL = ("all_to_all_single", "alltoall_base")


class ProcessGroup(Base):  # type: ignore[misc]
    """A group of the backend "commlib"; torch.distributed makes it.

    plain: the same ranks and connections, uncompressed. inner_backends: {"cpu": "gloo", ...}.
    options: what it was made with. choices: which of its calls are compressed.
    """

    def __init__(self, facts: Any, given: Any = None) -> None:
        super().__init__(facts.group_rank, facts.group_size)
        self.options: Options = options_of(given)
        options = self.options
        self.inner_backends = inner.parse(options.inner)
        self.plain: Any = dist.ProcessGroup(facts.store, facts.group_rank, facts.group_size)
        made = inner.make(self.inner_backends, facts, options._timeout or facts.timeout)
        default = self.inner_backends.get("cuda") or self.inner_backends["cpu"]
        for group in (self, self.plain):
            group._set_default_backend(inner.backend_type(default))
            for device, backend in made.items():
                kind = inner.backend_type(self.inner_backends[device])
                group._register_backend(torch.device(device), kind, backend)
        self.plain._set_group_name(facts.group_id)
        # A call is passed on by `plain`, not by `super()`: there c10d looks for an override first,
        # and it takes 1.4 us to find that the call comes from one.
        self._allreduce = self.plain.allreduce
        self._reduce_scatter = self._under(REDUCE_SCATTER)
        self._all_gather = self._under(ALL_GATHER)
        self._all_to_all = self._under(ALL_TO_ALL)
        self._by_hand = GLOO in self.inner_backends.values()  # it has no PREMUL_SUM
        groups.set_seed(self, options.seed)
        if options.policy is not None:
            groups.set_policy(self, options.policy)
        self.choices = Choices(self)
        self._takes, self._route = self.choices.take, self.choices.route

    # Gradients.

    @eager
    def allreduce(
        self, tensors: Any = None, opts: Any = None, timeout: Any = None, *, op: Any = None
    ) -> Any:
        if opts.__class__ is not AllreduceOptions:
            opts = spelled(AllreduceOptions, op if opts is None else opts, timeout)
            tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        if len(tensors) == 1 and (x := tensors[0]).is_floating_point():
            if self._takes(GRADIENT, x.numel(), x) and is_sum(op := opts.reduceOp):
                return calls.all_reduce(self._route(x), x, op, opts.asyncOp)
            if self._by_hand and opts.reduceOp == PREMUL_SUM:
                tensors, opts = self._premultiplied(tensors, opts, in_place=True)
        return self._allreduce(tensors, opts)

    @eager
    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        opts = spelled(c10d.AllreduceCoalescedOptions, opts)
        op = opts.reduceOp
        return coalesced(
            tensors,
            tensors,
            lambda x, _: self._takes(GRADIENT, x.numel(), x) and is_sum(op),
            lambda x, _: calls.all_reduce(self._route(x), x, op, opts.asyncOp),
            lambda rest, _: self.plain.allreduce_coalesced(
                *self._premultiplied(rest, opts, in_place=True)
            ),
        )

    @eager
    def reduce(self, tensors: Any, opts: Any, *others: Any, **named: Any) -> Any:
        if isinstance(opts, c10d.ReduceOptions):
            # elsewhere than at the root the tensor is lost anyway
            tensors, opts = self._premultiplied(tensors, opts, in_place=True)
        return self.plain.reduce(tensors, opts, *others, **named)

    @eager
    def reduce_scatter(
        self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None, *, op: Any = None
    ) -> Any:
        opts = spelled(c10d.ReduceScatterOptions, op if opts is None else opts, timeout)
        if isinstance(outputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]
        out, parts, op = outputs[0], inputs[0], opts.reduceOp
        numel = out.numel() * len(parts)
        if self.choices.take_parts(GRADIENT, numel, out, parts) and is_sum(op):
            return calls.reduce_scatter(self._route(out), out, parts, op, opts.asyncOp)
        if op == PREMUL_SUM and len(inputs) == 1:
            parts, opts = self._premultiplied(parts, opts)
            inputs = [parts]
        return self.plain.reduce_scatter(outputs, inputs, opts)

    @eager
    def reduce_scatter_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        opts = spelled(c10d.ReduceScatterOptions, opts)
        if input.is_floating_point():
            if self.choices.scatters(output, input) and is_sum(op := opts.reduceOp):
                return calls.reduce_scatter(self._route(input), output, input, op, opts.asyncOp)
            if self._by_hand and opts.reduceOp == PREMUL_SUM:
                (input,), opts = self._premultiplied([input], opts)
        return self._reduce_scatter(output, input, opts)

    @eager
    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = spelled(c10d.ReduceScatterOptions, opts)
        op = opts.reduceOp
        return coalesced(
            outputs,
            inputs,
            lambda out, x: self.choices.scatters(out, x) and is_sum(op),
            lambda out, x: calls.reduce_scatter(self._route(x), out, x, op, opts.asyncOp),
            lambda outs, rest: self._under(REDUCE_SCATTER_COALESCED)(
                outs, *self._premultiplied(rest, opts)
            ),
        )

    # Parameters.

    @eager
    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> Any:
        opts = spelled(c10d.AllgatherOptions, opts, timeout)
        if isinstance(inputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]
        parts, x = outputs[0], inputs[0]
        known = self.choices.parameters
        if known and self.choices.take_parts(PARAMETER, x.numel(), x, parts):
            return calls.all_gather(self._route(x), parts, x, opts.asyncOp)
        return self.plain.allgather(outputs, inputs, opts)

    @eager
    def all_gather_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        opts = spelled(c10d.AllgatherOptions, opts)
        if self.choices.gathers(output, input):
            return calls.all_gather(self._route(input), output, input, opts.asyncOp)
        return self._all_gather(output, input, opts)

    @eager
    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = spelled(c10d.AllgatherOptions, opts)
        return coalesced(
            outputs,
            inputs,
            self.choices.gathers,
            lambda out, x: calls.all_gather(self._route(x), out, x, opts.asyncOp),
            lambda outs, rest: self._under(ALL_GATHER_COALESCED)(outs, rest, opts),
        )

    @eager
    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None) -> Any:
        if isinstance(tensors, torch.Tensor):
            tensors, root = [tensors], opts
            opts = spelled(c10d.BroadcastOptions, None, timeout)
            opts.rootRank = root
        opts = spelled(c10d.BroadcastOptions, opts)
        if self.choices.parameters and len(tensors) == 1:
            x = tensors[0]
            if self._takes(PARAMETER, x.numel(), x):
                return calls.broadcast(self._route(x), x, opts.rootRank, opts.asyncOp)
        return self.plain.broadcast(tensors, opts)

    # Activations.

    @eager
    def all_to_all_single(
        self, output: Any, input: Any, output_rows: Any, input_rows: Any, opts: Any = None
    ) -> Any:
        opts = spelled(c10d.AllToAllOptions, opts)
        rows = output_rows, input_rows
        if (
            self._takes(ACTIVATION, ANY if any(rows) else input.numel(), input, output)
            and output.is_contiguous()
            and input.is_contiguous()
        ):
            return calls.all_to_all(self._route(input), output, input, *rows, opts.asyncOp)
        return self._all_to_all(output, input, *rows, opts)

    @eager
    def send(self, tensors: Any, dst: int, tag: int = 0) -> Any:
        work = self._message("send", tensors, dst, tag)
        return self.plain.send(tensors, dst, tag) if work is None else work

    @eager
    def recv(self, tensors: Any, src: int, tag: int = 0) -> Any:
        work = self._message("recv", tensors, src, tag)
        return self.plain.recv(tensors, src, tag) if work is None else work

    @eager
    def recv_anysource(self, tensors: Any, tag: int = 0) -> Any:
        work = self._message("recv", tensors, None, tag)
        return self.plain.recv_anysource(tensors, tag) if work is None else work

    # torch's names until 2.12, by which it may still be asked

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    alltoall_base = all_to_all_single

    # What is not a call on tensors.

    @eager
    def barrier(self, *args: Any, **named: Any) -> Any:
        if self.choices.used:
            groups.flush(self)  # gloo's waits for what was called before it
        return self.plain.barrier(*args, **named)

    def _start_coalescing(self, device: torch.device) -> None:
        super()._start_coalescing(device)
        self.choices.held = True  # nothing is launched before the end, and ours would wait for it

    def _end_coalescing(self, device: torch.device) -> Any:
        self.choices.held = False
        return super()._end_coalescing(device)

    def shutdown(self) -> None:
        groups.stop(self)
        routes.forget(self)
        super().shutdown()
        if GLOO in self.inner_backends.values():
            # A DDP model that goes after this destroys gloo with the GIL held and waits for its
            # threads; one of them may still want the GIL, to free the last call. It gets it here.
            time.sleep(FREEING_SECONDS)

    def getBackendName(self) -> str:
        return NAME

    def name(self) -> str:
        return NAME

    def get_group_store(self) -> Any:
        return self.plain.get_group_store()

    # How they go on.

    def _message(self, verb: str, tensors: Any, peer: int | None, tag: int) -> Any:
        if len(tensors) != 1 or not self._takes(MESSAGE, (x := tensors[0]).numel(), x):
            return None
        return p2p.compressed(verb, self, x, peer, tag)

    def _under(self, names: tuple[str, str]) -> Any:
        """The uncompressed call, which has another name since torch 2.13."""
        return getattr(self.plain, names[0], None) or getattr(self.plain, names[1])

    def _premultiplied(
        self, tensors: Sequence[torch.Tensor], opts: Any, *, in_place: bool = False
    ) -> tuple[Sequence[torch.Tensor], Any]:
        """A PREMUL_SUM as gloo can do it: the sum of multiples."""
        op = opts.reduceOp
        if op != PREMUL_SUM or not all(
            self.inner_backends.get(x.device.type) == GLOO and x.is_floating_point()
            for x in tensors
        ):
            return tensors, opts
        with torch.no_grad():
            if in_place:
                for x in tensors:
                    x.mul_(op.factor)
            else:
                tensors = [x * op.factor for x in tensors]
        return tensors, calls.summing(opts)


def options_of(given: Any) -> Options:
    """The options of a group from its `pg_options`: `Options`, or a policy alone.

    None: those of the default group, if it is of this backend, but for the timeout: meshes make
    their groups without options, and a new group takes its backend from there too.

    Raises: ValueError: neither.
    """
    if given is None:
        world = dist.group.WORLD
        return (
            replace(world.options, timeout=None) if isinstance(world, ProcessGroup) else Options()
        )
    if isinstance(given, Options):
        return given
    if isinstance(given, str | Scheme | Policy | dict):
        return Options(given)
    raise ValueError(
        f"pg_options of the backend {NAME!r} is a {type(given).__name__}; give commlib.Options("
        "policy=...), or a policy such as 'int8'"
    )
