"""Communicator: compressed collectives on one group.

    comm = Communicator(group, "int8+ef")
    comm.all_reduce(x, "layer1.weight", factor="avg")

Results go to the tensors given; every method returns a `Work`, done unless `async_op`. On CUDA done
means that the caller's stream will not go on before; the host does not wait (`streams`). All ranks
make the same calls in the same order. How calls are planned, agreed on and carried out: `engine`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from commlib_kernels.layout import Layout

from . import collectives
from .collectives import Steps
from .engine import Engine
from .feedback import Compressor
from .plans import Message, exact, explicit, is_exact, segmented
from .policy import TensorInfo, raw
from .scheme import DTYPES, Role, Scheme
from .traffic import Transport, check_all_to_all, check_rank, check_tensor
from .work import Work

__all__ = ["Communicator", "Work", "exact"]


class Communicator(Engine):
    """The collectives of one group; construction as in `Engine`."""

    def all_reduce(
        self,
        x: torch.Tensor,
        key: str | None = None,
        *,
        factor: float | str = 1.0,
        role: Role = Role.GRADIENT,
        scheme: str | Scheme | None = None,
        async_op: bool = False,
    ) -> Work:
        """Replace `x` by `factor` times the sum over ranks.

        Args:
            x: contiguous tensor of any shape, on the group's device.
            key: the tensor's name, under which residuals are kept; None: no memory.
            factor: a number, "sum" or "avg".
            scheme: instead of the policy's; a lossy one refuses tensors it cannot carry.

        Raises: ValueError before anything is sent; RuntimeError where ranks disagree or one fails.
        """
        times = self._factor(factor, x)
        plan = self._plan("all_reduce", x, key, role, scheme)
        if plan.lossless and not async_op:
            done = self._carrier.native(plan, x, times)
            if done is not None:
                return done
        flat = x.detach().view(-1)
        return self._carrier.start(
            plan, x, flat, lambda m, t: self._reducing(m, t, flat, times), async_op
        )

    def all_reduce_segments(
        self,
        x: torch.Tensor,
        keys: tuple[str, ...],
        sizes: tuple[int, ...],
        ndims: tuple[int, ...] | None = None,
        *,
        factor: float | str = 1.0,
        role: Role = Role.GRADIENT,
        async_op: bool = False,
        hold: Sequence[int] = (),
    ) -> Work:
        """`all_reduce` of flat `x` that holds one named tensor after the other (a DDP bucket).

        Args:
            keys, sizes, ndims: name, elements and dimensions of each segment; a policy chooses for
                each. ndims None: not known.
            hold: segments whose residual stays out of this message (unused parameters).
        """
        check_tensor("all_reduce_segments", x, self.transport.device)
        times = self._factor(factor, x)
        plain, era = is_exact(), self._era(keys)
        id_ = (keys, sizes, x.dtype, role, plain, era)
        plan = self._plans.get(id_)
        if plan is None:
            if len(keys) != len(sizes) or sum(sizes) != x.numel():
                raise ValueError(
                    f"all_reduce_segments: {len(keys)} keys, {len(sizes)} sizes adding up to "
                    f"{sum(sizes)}, a tensor of {x.numel()} elements; they must fit"
                )
            if len(set(keys)) != len(keys):
                raise ValueError(f"all_reduce_segments: a key names one tensor, got {keys}")
            # What was measured is messages, so under "auto" the size of the message decides.
            infos = [
                TensorInfo(k, x.numel() if self._auto else n, x.dtype, role, d, era)
                for k, n, d in zip(keys, sizes, ndims or (None,) * len(keys), strict=True)
            ]
            schemes = [raw() if plain else self._choose(info) for info in infos]
            native = self.policy.lossless or self._auto
            native = plain or (native and all(scheme.lossless for scheme in schemes))
            plan = segmented(
                keys, sizes, schemes, x.dtype, lossless=native, exactly=self._exactly()
            )
            self._adopt(id_, plan)
        flat, held = x.detach().view(-1), tuple(hold)
        return self._carrier.start(
            plan, x, flat, lambda m, t: self._reducing(m, t, flat, times, held), async_op
        )

    def reduce_scatter(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        key: str | None = None,
        *,
        factor: float | str = 1.0,
        role: Role = Role.GRADIENT,
        scheme: str | Scheme | None = None,
        async_op: bool = False,
    ) -> Work:
        """`out` becomes `factor` times the sum over ranks of their row `rank` of `x` (W rows)."""
        check_tensor("reduce_scatter", out, self.transport.device)
        if x.numel() != self.size * out.numel() or x.dtype != out.dtype:
            raise ValueError(
                f"reduce_scatter: x has {x.numel()} elements of {x.dtype}, out {out.numel()} of "
                f"{out.dtype}; x must hold {self.size} x out of the same dtype"
            )
        times = self._factor(factor, x)
        plan = self._plan("reduce_scatter", x, key, role, scheme)
        flat, row = x.detach().view(-1), out.detach().view(-1)

        def steps(m: Message, t: Transport) -> Steps:
            if m.scheme.lossless and x.dtype not in DTYPES:
                return collectives.raw_reduce_scatter(row, flat, t, times)
            layout = Layout((row.numel(),), x.dtype)
            compressor = self._compressors.of(m.scheme)
            return collectives.reduce_scatter(
                row, flat, t, compressor, m.key, layout, self._pool, factor=times
            )

        return self._carrier.start(plan, out, flat, steps, async_op)

    def all_gather(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        key: str | None = None,
        *,
        role: Role = Role.PARAMETER,
        scheme: str | Scheme | None = None,
        async_op: bool = False,
    ) -> Work:
        """`out` becomes the ranks' `x` in rank order, the same bits on all. `x` may lie in `out`.

        What is gathered is a value, not an increment: without an explicit scheme, no feedback.
        """
        check_tensor("all_gather", out, self.transport.device)
        if out.numel() != self.size * x.numel() or x.dtype != out.dtype:
            raise ValueError(
                f"all_gather: out has {out.numel()} elements of {out.dtype}, x {x.numel()} of "
                f"{x.dtype}; out must hold {self.size} x x of the same dtype"
            )
        plan = self._plan("all_gather", x, key, role, scheme)
        flat, rows = x.detach().view(-1), out.detach().view(-1)

        def steps(m: Message, t: Transport) -> Steps:
            if m.scheme.lossless:
                return collectives.raw(lambda: t.all_gather(rows, flat))
            compressor, layout = self._compressors.of(m.scheme), Layout((x.numel(),), x.dtype)
            return collectives.all_gather(rows, flat, t, compressor, m.key, layout, self._pool)

        return self._carrier.start(plan, out, flat, steps, async_op)

    def all_to_all(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        *,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
        role: Role = Role.OTHER,
        scheme: str | Scheme | None = None,
        async_op: bool = False,
    ) -> Work:
        """Part r of `x` goes to rank r, part r of `out` comes from it; splits in elements.

        Unequal parts are compressed each by its own size, which both of its ends know.
        """
        check_tensor("all_to_all", out, self.transport.device)
        check_all_to_all(out, x, out_splits, in_splits, self.size)
        even = out_splits is None or in_splits is None
        op = "all_to_all" if even else "all_to_all of parts"
        plan = self._plan(op, x, None, role, scheme)
        flat, into = x.detach().view(-1), out.detach().view(-1)

        plain = is_exact()  # now: the message may start when the stretch has ended

        def chosen(numel: int) -> Compressor | None:
            if scheme is not None:
                named = explicit(scheme, None, x.dtype, role)
                return self._compressors.of(self._flat(op, named))
            found = raw() if plain else self._choose(TensorInfo(None, numel, x.dtype, role))
            return None if found.lossless else self._compressors.of(self._flat(op, found))

        def steps(m: Message, t: Transport) -> Steps:
            if out_splits is not None and in_splits is not None:
                return collectives.all_to_all_split(
                    into, flat, out_splits, in_splits, t, chosen, self._pool
                )
            if m.scheme.lossless:
                return collectives.raw(lambda: t.all_to_all(into, flat))
            return collectives.all_to_all(
                into, flat, t, self._compressors.of(m.scheme), None, self._pool
            )

        return self._carrier.start(plan, out, flat, steps, async_op)

    def broadcast(
        self,
        x: torch.Tensor,
        src: int,
        *,
        role: Role = Role.OTHER,
        scheme: str | Scheme | None = None,
        async_op: bool = False,
    ) -> Work:
        """`x` becomes rank `src`'s x (a rank of this group), the same bits on all ranks."""
        check_rank("broadcast", src, self.size)
        plan = self._plan("broadcast", x, None, role, scheme, src)
        flat = x.detach().view(-1)

        def steps(m: Message, t: Transport) -> Steps:
            if m.scheme.lossless:
                return collectives.raw(lambda: t.broadcast(flat, src))
            return collectives.broadcast(
                flat, src, t, self._compressors.of(m.scheme), None, self._pool
            )

        return self._carrier.start(plan, x, flat, steps, async_op)
