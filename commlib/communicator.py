"""Communicator: compressed collectives on one group.

    comm = Communicator(group, "int8+ef")
    comm.all_reduce(x, "layer1.weight", factor="avg")

Results go to the tensors given; every method returns a `Work`, done unless `async_op`. On CUDA done
means that the caller's stream will not go on before; the host does not wait (`streams`). All ranks
make the same calls in the same order. How calls are planned, agreed on and carried out: `engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from commlib_kernels.layout import Layout

from . import collectives
from .algorithms import TwoPhase
from .collectives import Steps
from .eager import eager
from .engine import Engine
from .feedback import Compressor
from .plans import PARTS, Message, exact, explicit, is_exact, parse_scheme
from .policy import TensorInfo, raw
from .scheme import DTYPES, Role, Scheme, check_fixed_size
from .traffic import Transport, check_all_to_all, check_rank, check_tensor
from .work import Work

__all__ = ["Communicator", "Work", "exact"]

Own = Callable[[], object]
"""The library's own collective, which takes the place of one that compresses nothing."""


class Communicator(Engine):
    """The collectives of one group; construction as in `Engine`."""

    @eager
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
        plan = self._plan("all_reduce", x, key, role, scheme, factor=times)
        if plan.lossless and not async_op:
            done = self._carrier.native(plan, x, times)
            if done is not None:
                return done
        flat = x.detach().view(-1)
        return self._carrier.start(
            plan, x, flat, lambda m, t: self._reducing(m, t, flat, times), async_op
        )

    @eager
    def all_reduce_segments(
        self,
        x: torch.Tensor,
        keys: tuple[str, ...],
        sizes: tuple[int, ...],
        ndims: tuple[int, ...] | None = None,
        numels: tuple[int, ...] | None = None,
        *,
        shapes: tuple[tuple[int, ...], ...] | None = None,
        factor: float | str = 1.0,
        role: Role = Role.GRADIENT,
        async_op: bool = False,
        hold: Sequence[int] = (),
        own: Own | None = None,
    ) -> Work:
        """`all_reduce` of flat `x` that holds one named tensor after the other (a DDP bucket).

        Args:
            keys, sizes, ndims: name, elements and dimensions of each segment; a policy chooses for
                each. ndims None: not known.
            numels: elements of the tensors that the segments are shards of, as the policy counts
                them; None: `sizes`.
            shapes: of the tensors where the segments are whole, for schemes that go by matrices
                (power_sgd); None: such segments travel raw.
            hold: segments that this rank has no gradient of (unused parameters): its residual stays
                out of this message, and an owner's where the sum is zero.
            own: called instead where nothing is compressed: a collective of the library's own.
        """
        times, held = self._factor(factor, x), tuple(hold)
        plan = self._segments(
            "all_reduce", x, keys, sizes, ndims, numels, role, shapes=shapes, factor=times
        )
        if not all(0 <= segment < len(keys) for segment in held):
            raise ValueError(f"hold is {held}; allowed: segments 0 to {len(keys) - 1}")
        if plan.lossless and own is not None:
            return _done(own, x)
        flat = x.detach().view(-1)
        return self._carrier.start(
            plan, x, flat, lambda m, t: self._reducing(m, t, flat, times, held), async_op
        )

    @eager
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
        self._check_rows("reduce_scatter", x, out, wide="x")
        times = self._factor(factor, x)
        plan = self._plan("reduce_scatter", x, key, role, scheme, factor=times)
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

    @eager
    def reduce_scatter_segments(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        keys: tuple[str, ...],
        sizes: tuple[int, ...],
        ndims: tuple[int, ...] | None = None,
        numels: tuple[int, ...] | None = None,
        *,
        factor: float | str = 1.0,
        role: Role = Role.GRADIENT,
        async_op: bool = False,
        own: Own | None = None,
    ) -> Work:
        """`reduce_scatter` of rows that hold one named shard after the other (an FSDP2 group).

        Residuals are (W, size) by name; exact segments ride in the same message.

        Args:
            keys, sizes, ndims, own: as in `all_reduce_segments`; sizes of one row.
            numels: elements of the whole tensors, as the policy counts them; None: W x `sizes`.
        """
        self._check_rows("reduce_scatter_segments", x, out, wide="x")
        times = self._factor(factor, x)
        plan = self._segments(
            "reduce_scatter", x, keys, sizes, ndims, numels, role, self.size, factor=times
        )
        if plan.lossless and own is not None:
            return _done(own, out)
        flat, row = x.detach().view(-1), out.detach().view(-1)

        def steps(m: Message, t: Transport) -> Steps:
            if plan.lossless:
                return collectives.raw_reduce_scatter(row, flat, t, times)
            config = m.scheme.algorithm
            return collectives.reduce_scatter(
                row,
                flat,
                t,
                self._compressors.of(m.scheme),
                m.key,
                m.layout,
                self._pool,
                factor=times,
                slices=config.slices if isinstance(config, TwoPhase) else None,
            )

        return self._carrier.start(plan, out, flat, steps, async_op)

    @eager
    def all_gather_segments(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        keys: tuple[str, ...],
        sizes: tuple[int, ...],
        ndims: tuple[int, ...] | None = None,
        numels: tuple[int, ...] | None = None,
        *,
        role: Role = Role.PARAMETER,
        async_op: bool = False,
        unchanged: bool = False,
        own: Own | None = None,
    ) -> Work:
        """`all_gather` of `x` that holds one named shard after the other; `x` may lie in `out`.

        Args:
            keys, sizes, ndims, numels, own: as in `reduce_scatter_segments`.
            unchanged: no rank's `x` has changed since the last time: what goes by `+delta` is
                there and does not travel.
        """
        self._check_rows("all_gather_segments", x, out, wide="out")
        numels = numels or tuple(n * self.size for n in sizes)
        plan = self._segments("all_gather", x, keys, sizes, ndims, numels, role)
        if plan.lossless and own is not None:
            return _done(own, out)
        flat, rows = x.detach().view(-1), out.detach().view(-1)

        if is_exact():
            self._copies.forget()  # they are older than what is gathered now

        def steps(m: Message, t: Transport) -> Steps:
            if plan.lossless:
                return collectives.raw(lambda: t.all_gather(rows, flat))
            return self._gathering(m, t, rows, flat, unchanged)

        return self._carrier.start(plan, out, flat, steps, async_op)

    @eager
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

        What is gathered is a value, not an increment: it has no error feedback. With a key and
        `+delta` (`int4+delta`) ranks send the difference to what all of them hold since the last
        time, which takes the memory of `out`.
        """
        self._check_rows("all_gather", x, out, wide="out")
        plan = self._plan("all_gather", x, key, role, scheme)
        flat, rows = x.detach().view(-1), out.detach().view(-1)

        def steps(m: Message, t: Transport) -> Steps:
            if m.scheme.lossless:
                return collectives.raw(lambda: t.all_gather(rows, flat))
            return self._gathering(m, t, rows, flat)

        return self._carrier.start(plan, out, flat, steps, async_op)

    @eager
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
        op = "all_to_all" if even else PARTS
        if not even and not is_exact() and (scheme is not None or x.dtype in DTYPES):
            rules = [rule.scheme for rule in self.policy.rules if rule.role in (None, role)]
            for one in rules if scheme is None else [scheme]:
                check_fixed_size(parse_scheme(one).codec, op, "equal parts")
        plan = self._plan(op, x, None, role, scheme)
        flat, into = x.detach().view(-1), out.detach().view(-1)

        plain = is_exact()  # now: the message may start when the stretch has ended

        def chosen(numel: int) -> Compressor | None:
            if scheme is not None:
                named = explicit(scheme, None, x.dtype, role)
                return None if named.lossless else self._compressors.of(self._flat(op, named))
            info = TensorInfo(None, numel, x.dtype, role, step=plan.era)
            found = raw() if plain else self.policy.choose(info)
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

    @eager
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

    def _check_rows(self, op: str, x: torch.Tensor, out: torch.Tensor, *, wide: str) -> None:
        """Refuse tensors of which `wide` ("x" or "out") is not W rows like the other."""
        check_tensor(op, out, self.transport.device)
        rows, row = (x, out) if wide == "x" else (out, x)
        if rows.numel() != self.size * row.numel() or rows.dtype != row.dtype:
            other = "out" if wide == "x" else "x"
            raise ValueError(
                f"{op}: {wide} has {rows.numel()} elements of {rows.dtype}, {other} {row.numel()} "
                f"of {row.dtype}; {wide} must hold {self.size} x {other} of the same dtype"
            )


def _done(own: Own, result: torch.Tensor) -> Work:
    """A call that the library's own collective has carried out."""
    own()
    return Work(result, 0)
