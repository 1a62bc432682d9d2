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
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from commlib.communicator import Communicator
from commlib.integrations import calls, groups, inner, p2p
from commlib.integrations.backend import NAME, Options
from commlib.integrations.calls import ReduceOp, coalesced, is_sum, spelled
from commlib.plans import is_exact, why_raw
from commlib.policy import EXACT_BELOW_NUMEL, Policy, Role, Rule, Scheme, TensorInfo
from commlib.scheme import DTYPES
from commlib.transport import GLOO

c10d: Any = distributed_c10d  # its option classes are missing from the stubs
AllreduceOptions: Any = c10d.AllreduceOptions
Base: Any = dist.ProcessGroup  # its stubs have the names of one torch

# What a call carries; numbers, as the hash of a `Role` takes too long for every call.
GRADIENT, ACTIVATION, PARAMETER, MESSAGE = range(4)
ROLES = (Role.GRADIENT, Role.ACTIVATION, Role.PARAMETER)
PREMUL_SUM = ReduceOp.PREMUL_SUM
CODED = frozenset(DTYPES)
PLAIN = (torch.Tensor, nn.Parameter)  # others only look like tensors, while a program is traced
MAX_CHOICES = 4096


class ProcessGroup(Base):  # type: ignore[misc]
    """A group of the backend "commlib"; torch.distributed makes it.

    plain: the same ranks and connections, uncompressed. inner_backends: {"cpu": "gloo", ...}.
    """

    def __init__(self, facts: Any, given: Any = None) -> None:
        super().__init__(facts.group_rank, facts.group_size)
        options = options_of(given)
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
        self._size = self.size()  # this, too, c10d looks for in Python
        self._choices: dict[Any, bool] = {}
        groups.set_seed(self, options.seed)
        if options.policy is not None:
            groups.set_policy(self, options.policy)
        self.policy_changed()

    def policy_changed(self) -> None:
        """Look at the group's policy again."""
        policy = groups.policy(self)
        rules: tuple[Rule, ...] = ()  # of "auto", which names no role
        self._lossless = self._size == 1
        if isinstance(policy, Policy):
            rules = policy.rules
            self._lossless |= policy.lossless
        self._parameters = not self._lossless and any(r.role is Role.PARAMETER for r in rules)
        self._choices.clear()

    # Gradients.

    def allreduce(
        self, tensors: Any = None, opts: Any = None, timeout: Any = None, *, op: Any = None
    ) -> Any:
        if opts.__class__ is not AllreduceOptions:
            opts = spelled(AllreduceOptions, op if opts is None else opts, timeout)
            tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        if len(tensors) == 1 and (x := tensors[0]).is_floating_point():
            op = opts.reduceOp
            if self._takes(GRADIENT, x.numel(), x) and is_sum(op):
                return calls.all_reduce(self._route(x), x, op, opts.asyncOp)
            if op == PREMUL_SUM:
                tensors, opts = self._premultiplied(tensors, opts, in_place=True)
        return self._allreduce(tensors, opts)

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

    def reduce(self, tensors: Any, opts: Any, *others: Any, **named: Any) -> Any:
        if isinstance(opts, c10d.ReduceOptions):
            # elsewhere than at the root the tensor is lost anyway
            tensors, opts = self._premultiplied(tensors, opts, in_place=True)
        return self.plain.reduce(tensors, opts, *others, **named)

    def reduce_scatter(
        self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None, *, op: Any = None
    ) -> Any:
        opts = spelled(c10d.ReduceScatterOptions, op if opts is None else opts, timeout)
        if isinstance(outputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]
        out, parts, op = outputs[0], inputs[0], opts.reduceOp
        numel = out.numel() * len(parts)
        if self._parts(out, parts) and self._takes(GRADIENT, numel, out, *parts) and is_sum(op):
            return calls.reduce_scatter(self._route(out), out, parts, op, opts.asyncOp)
        if op == PREMUL_SUM and len(inputs) == 1:
            parts, opts = self._premultiplied(parts, opts)
            inputs = [parts]
        return self.plain.reduce_scatter(outputs, inputs, opts)

    def reduce_scatter_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        opts = spelled(c10d.ReduceScatterOptions, opts)
        if input.is_floating_point():
            op = opts.reduceOp
            if self._scatters(output, input) and is_sum(op):
                return calls.reduce_scatter(self._route(input), output, input, op, opts.asyncOp)
            if op == PREMUL_SUM:
                (input,), opts = self._premultiplied([input], opts)
        return self._reduce_scatter(output, input, opts)

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = spelled(c10d.ReduceScatterOptions, opts)
        op = opts.reduceOp
        return coalesced(
            outputs,
            inputs,
            lambda out, x: self._scatters(out, x) and is_sum(op),
            lambda out, x: calls.reduce_scatter(self._route(x), out, x, op, opts.asyncOp),
            lambda outs, rest: self._under(REDUCE_SCATTER_COALESCED)(
                outs, *self._premultiplied(rest, opts)
            ),
        )

    # Parameters.

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> Any:
        opts = spelled(c10d.AllgatherOptions, opts, timeout)
        if isinstance(inputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]
        parts, x = outputs[0], inputs[0]
        if (
            self._parameters
            and self._parts(x, parts)
            and self._takes(PARAMETER, x.numel(), x, *parts)
        ):
            return calls.all_gather(self._route(x), parts, x, opts.asyncOp)
        return self.plain.allgather(outputs, inputs, opts)

    def all_gather_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        opts = spelled(c10d.AllgatherOptions, opts)
        if self._gathers(output, input):
            return calls.all_gather(self._route(input), output, input, opts.asyncOp)
        return self._all_gather(output, input, opts)

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = spelled(c10d.AllgatherOptions, opts)
        return coalesced(
            outputs,
            inputs,
            self._gathers,
            lambda out, x: calls.all_gather(self._route(x), out, x, opts.asyncOp),
            lambda outs, rest: self._under(ALL_GATHER_COALESCED)(outs, rest, opts),
        )

    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None) -> Any:
        if isinstance(tensors, torch.Tensor):
            tensors, root = [tensors], opts
            opts = spelled(c10d.BroadcastOptions, None, timeout)
            opts.rootRank = root
        opts = spelled(c10d.BroadcastOptions, opts)
        if self._parameters and len(tensors) == 1:
            x = tensors[0]
            if self._takes(PARAMETER, x.numel(), x):
                return calls.broadcast(self._route(x), x, opts.rootRank, opts.asyncOp)
        return self.plain.broadcast(tensors, opts)

    # Activations.

    def all_to_all_single(
        self, output: Any, input: Any, output_rows: Any, input_rows: Any, opts: Any = None
    ) -> Any:
        opts = spelled(c10d.AllToAllOptions, opts)
        # of parts of any size, only each rank itself knows how many elements it sends
        numel = None if output_rows or input_rows else input.numel()
        if (
            output.is_contiguous()
            and input.is_contiguous()
            and self._takes(ACTIVATION, numel, input, output)
        ):
            route = self._route(input)
            return calls.all_to_all(route, output, input, output_rows, input_rows, opts.asyncOp)
        return self._under(ALL_TO_ALL)(output, input, output_rows, input_rows, opts)

    def send(self, tensors: Any, dst: int, tag: int = 0) -> Any:
        work = self._message("send", tensors, dst, tag)
        return self.plain.send(tensors, dst, tag) if work is None else work

    def recv(self, tensors: Any, src: int, tag: int = 0) -> Any:
        work = self._message("recv", tensors, src, tag)
        return self.plain.recv(tensors, src, tag) if work is None else work

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

    def barrier(self, *args: Any, **named: Any) -> Any:
        groups.flush(self)  # gloo's waits for what was called before it
        return self.plain.barrier(*args, **named)

    def shutdown(self) -> None:
        groups.stop(self)
        p2p.forget(self)
        super().shutdown()

    def getBackendName(self) -> str:
        return NAME

    def name(self) -> str:
        return NAME

    def get_group_store(self) -> Any:
        return self.plain.get_group_store()

    # Which calls are compressed.

    def _takes(self, what: int, numel: int | None, x: torch.Tensor, *others: torch.Tensor) -> bool:
        """Whether a call on `numel` elements like those of `x` is compressed; None: on any."""
        if self._lossless or x.dtype not in CODED:
            return False
        key = (what, numel, x.dtype, x.ndim, x.is_cuda)
        taken = self._choices.get(key)
        if taken is None:
            if is_exact():
                return False
            if len(self._choices) >= MAX_CHOICES:
                self._choices.clear()
            taken = self._choices[key] = self._choose(what, numel, x)
        return taken and not is_exact() and all(self._dense(t, x) for t in (x, *others))

    def _choose(self, what: int, numel: int | None, x: torch.Tensor) -> bool:
        if what == MESSAGE:
            return p2p.is_compressed(self, x)
        policy, role = groups.policy(self), ROLES[what]
        if isinstance(policy, str):  # "auto": what measuring finds, and it finds no role
            if numel is not None and numel < EXACT_BELOW_NUMEL:
                return False
            policy = self._route(x).policy
        if numel is None:
            lossy = [rule for rule in policy.rules if not rule.scheme.lossless]
            return any(rule.role in (None, role) for rule in lossy)
        ndim = x.ndim if x.ndim > 1 else None  # one dimension may be a flat buffer of anything
        infos = [
            TensorInfo(None, numel, x.dtype, role, ndim, step)
            for step in {0, *(rule.from_step for rule in policy.rules)}
        ]
        if what == PARAMETER:
            infos = [info for info in infos if getattr(policy.rule(info), "role", None) is role]
        if any(not policy.choose(info).lossless for info in infos):
            return True
        reason = next((why for info in infos if (why := why_raw(policy, info))), None)
        if reason is not None:
            groups.meter(self, x.device).not_compressed(None, reason)
        return False

    def _dense(self, x: torch.Tensor, like: torch.Tensor) -> bool:
        return (
            x.__class__ in PLAIN
            and x.layout is torch.strided
            and x.dtype is like.dtype
            and x.device == like.device
            and x.device.type in self.inner_backends
        )

    def _parts(self, x: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
        return len(parts) == self._size and all(part.numel() == x.numel() for part in parts)

    def _scatters(self, output: torch.Tensor, input: torch.Tensor) -> bool:
        if self._lossless:
            return False
        numel = input.numel()
        return numel == self._size * output.numel() and self._takes(GRADIENT, numel, input, output)

    def _gathers(self, output: torch.Tensor, input: torch.Tensor) -> bool:
        if not self._parameters:
            return False
        numel = input.numel()
        return output.numel() == self._size * numel and self._takes(PARAMETER, numel, input, output)

    # How they go on.

    def _route(self, x: torch.Tensor) -> Communicator:
        route = groups.communicator(self, x.device)
        groups.tell_anonymous(self, route.policy)
        return route

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
        """A PREMUL_SUM as gloo can do it, which has none: the sum of multiples."""
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


REDUCE_SCATTER = ("reduce_scatter_single", "_reduce_scatter_base")
REDUCE_SCATTER_COALESCED = ("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced")
ALL_GATHER = ("all_gather_single", "_allgather_base")
ALL_GATHER_COALESCED = ("all_gather_single_coalesced", "allgather_into_tensor_coalesced")
ALL_TO_ALL = ("all_to_all_single", "alltoall_base")


def options_of(given: Any) -> Options:
    """The options of a group from its `pg_options`: `Options`, or a policy alone.

    Raises: ValueError: neither.
    """
    if isinstance(given, Options):
        return given
    if given is None or isinstance(given, str | Scheme | Policy | dict):
        return Options(given)
    raise ValueError(
        f"pg_options of the backend {NAME!r} is a {type(given).__name__}; give commlib.Options("
        "policy=...), or a policy such as 'int8'"
    )
