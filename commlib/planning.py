"""Planning: from a call to the plan on which all ranks agree.

A policy chooses a scheme for every tensor of a call; what suits neither the collective nor the
residuals there are is refused, before anything is sent. The plan is kept: the next call like it
finds it made and agreed.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .algorithms import AlgorithmConfig, Hierarchical, PowerSGD, Thc, TwoPhase, unknown
from .carrier import Carrier
from .collectives import hierarchical, power_sgd, thc
from .compressors import Compressors, check_turns
from .feedback import names_of
from .hosts import digest, identity
from .modes import OF_PIPELINES, Delta
from .plans import (
    PARTS,
    Message,
    Plan,
    explicit,
    is_exact,
    parse_scheme,
    segmented,
    single,
    why_raw,
)
from .policy import Policy, TensorInfo, raw
from .scheme import Role, Scheme
from .stamp import WIRE_VERSION
from .telemetry import Meter
from .topology import Ranks, columns_of, nodes_of
from .traffic import Transport, check_sum, check_tensor

logger = logging.getLogger("commlib")

# Characters of a policy, or of the ranks of all hosts, that plans are compared by; else a digest.
SHOWN = 80
# What else moves are values, not increments: yesterday's residual has no place there.
ALL_REDUCE = "all_reduce"
INCREMENTS = (ALL_REDUCE, "reduce_scatter")
# What the other collectives know nothing of.
KNOWS = {Hierarchical: "hosts", PowerSGD: "low rank", Thc: "sums of codes"}
# What may travel as the difference to what all ranks hold.
GATHER = "all_gather"


# Plans of tensors without a name that are kept, 6 kB each: every step may have a length of its own.
# Those that come again should be there: a call took 0.1 ms with its plan, 2 ms without.
ANONYMOUS_PLANS = 1 << 14


class Planning:
    """The part of an `Engine` that makes plans."""

    policy: Policy
    transport: Transport
    seed: int
    meter: Meter
    nodes: tuple[Ranks, ...]
    _saved_nodes: str
    _auto: bool
    _carrier: Carrier
    _compressors: Compressors
    _plans: dict[Any, Plan]
    _passing: deque[Any]
    _steps: dict[str, int]
    _eras: bool
    _told: set[tuple[str, Scheme]]

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return self.transport.rank

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return self.transport.size

    def _plan(
        self,
        op: str,
        x: torch.Tensor,
        key: str | None,
        role: Role,
        scheme: str | Scheme | None,
        detail: int | None = None,
        factor: float | None = None,
    ) -> Plan:
        """The plan of a call on one tensor, agreed.

        detail: what else tells calls apart. factor: of a sum.
        """
        check_tensor(op, x, self.transport.device)
        # unequal parts have sizes of their own on every rank, and are chosen for one by one
        by_part = op == PARTS and scheme is None and not is_exact()
        numel = 0 if op == PARTS else x.numel()
        era = self._era((key or op,))
        shape = tuple(x.shape) if op == ALL_REDUCE and self._goes_by_shape(scheme) else None
        how = (role, scheme, is_exact(), detail, self._kind(factor))
        id_ = (op, key, numel, x.dtype, max(1, x.ndim), shape, era, *how)
        plan = self._plans.get(id_)
        if plan is not None:
            return plan
        check_role(role)
        if key is not None and not isinstance(key, str):
            raise ValueError(f"{op}: a key is the tensor's name, such as 'w', got {key!r}")
        # one dimension may be a vector or any flat buffer
        ndim = x.ndim if x.ndim > 1 else None
        info = TensorInfo(key, numel, x.dtype, role, ndim, era, shape)
        if scheme is not None:
            chosen = explicit(scheme, key, x.dtype, role, shape)
        elif is_exact() or by_part:
            chosen = raw()
        else:
            chosen = _suited(op, self._choose(info))
        check_memory(op, chosen)
        if op in INCREMENTS and chosen.lossless:
            check_sum(op, x)
        if op != "all_reduce":
            chosen = self._flat(op, chosen)
        if scheme is None and not is_exact():
            self._bring_along(op, [info], [chosen])
        plan = single(op, chosen, key, numel, x.dtype, shape)
        plan.era = era
        if by_part:
            plan.messages[0].name = "by part"
        if detail is not None:
            plan.text["detail"] = detail
        self._adopt(id_, plan, factor)
        if key is None:
            self._passing.append(id_)
            if len(self._passing) > ANONYMOUS_PLANS:  # by the number agreed on, as on all ranks
                dropped = self._plans.pop(self._passing.popleft(), None)
                self._carrier.captures.drop(dropped)
        return plan

    def _segments(
        self,
        op: str,
        x: torch.Tensor,
        keys: tuple[str, ...],
        sizes: tuple[int, ...],
        ndims: tuple[int, ...] | None,
        numels: tuple[int, ...] | None,
        role: Role,
        rows: int = 0,
        shapes: tuple[tuple[int, ...], ...] | None = None,
        factor: float | None = None,
    ) -> Plan:
        """The plan of a call on named segments of `x`, agreed.

        rows: how often `x` has them, for reduce_scatter. shapes: of whole tensors. factor: of sums.
        """
        check_tensor(op, x, self.transport.device)
        keys, sizes = tuple(keys), tuple(sizes)
        ndims, numels = (None if n is None else tuple(n) for n in (ndims, numels))
        if not keys:
            raise ValueError(f"{op}_segments: needs at least one key, got none")
        plain, era = is_exact(), self._era(keys)
        shapes = tuple(map(tuple, shapes)) if shapes and self.policy.shaped else None
        facts_of = (keys, sizes, ndims, numels, shapes)
        id_ = (op, *facts_of, x.dtype, role, plain, era, self._kind(factor))
        plan = self._plans.get(id_)
        if plan is not None:
            return plan
        check_role(role)
        if len(keys) != len(sizes) or sum(sizes) * max(1, rows) != x.numel():
            each = f" in each of {rows} rows" if rows else ""
            raise ValueError(
                f"{op}_segments: {len(keys)} keys, {len(sizes)} sizes adding up to {sum(sizes)}"
                f"{each}, a tensor of {x.numel()} elements; they must fit"
            )
        if len(set(keys)) != len(keys):
            raise ValueError(f"{op}_segments: a key names one tensor, got {keys}")
        if shapes is not None and tuple(map(math.prod, shapes)) != sizes:
            raise ValueError(
                f"{op}_segments: shapes {shapes} are not those of tensors with {sizes} elements"
            )
        # What was measured is messages, so under "auto" the size of the message decides.
        numels = numels or tuple(n * max(1, rows) for n in sizes)
        no_facts = (None,) * len(keys)
        facts = zip(keys, numels, ndims or no_facts, shapes or no_facts, strict=True)
        infos = [
            TensorInfo(k, x.numel() if self._auto else n, x.dtype, role, d, era, shape)
            for k, n, d, shape in facts
        ]
        schemes = [raw() if plain else self._choose(info) for info in infos]
        schemes = [_suited(op, scheme) for scheme in schemes]
        for scheme in schemes:
            check_memory(op, scheme)
        if op != "all_reduce":
            schemes = [self._flat(op, scheme) for scheme in schemes]
        if not plain:
            self._bring_along(op, infos, schemes)
        # Under a policy that compresses, raw segments are added in rank order like the others.
        own = plain or self.policy.lossless or self._auto or op not in INCREMENTS
        own = own and all(scheme.lossless for scheme in schemes)
        exactly = self._exactly() if op == ALL_REDUCE else None
        plan = segmented(
            op, keys, sizes, schemes, x.dtype,
            lossless=own, exactly=exactly, rows=rows, shapes=shapes,
        )  # fmt: skip
        self._adopt(id_, plan, factor)
        return plan

    def _bring_along(self, op: str, infos: Sequence[TensorInfo], schemes: Sequence[Scheme]) -> None:
        """Where the policy changes with the number of calls, residuals go along.

        All ranks make this plan with the same call. Plans are kept by era, so a key that comes to
        another one is here.

        Raises: ValueError: they cannot, now or when it changes next.
        """
        if not self._eras or op not in INCREMENTS:
            return
        for info in infos:
            check_turns(info.key, self.policy.ahead(info), owners=op == ALL_REDUCE)
        keyed = {
            info.key: scheme
            for info, scheme in zip(infos, schemes, strict=True)
            if info.key is not None
        }
        with self._carrier.still():
            self._compressors.move(self._compressors.moves(keyed))

    def ahead(self, info: TensorInfo) -> dict[int, Scheme]:
        """The schemes of a tensor by step: of its next message, and of later ones that differ."""
        return self.policy.ahead(self._next(info))

    def check_ahead(self, infos: Iterable[TensorInfo], *, owners: bool) -> None:
        """Refuse a policy by which residuals of these tensors could not go on (ValueError).

        owners: they are summed by all_reduce, whose owners of chunks have residuals too.
        """
        for info in infos if self._eras else ():
            check_turns(info.key, self.ahead(info), owners=owners)

    def _next(self, info: TensorInfo) -> TensorInfo:
        return info._replace(step=self._steps.get(info.key or "", 0))

    def _adopt(self, id_: Any, plan: Plan, factor: float | None) -> None:
        """Agree on a new plan and keep it. ValueError where residuals would not fit it."""
        self._carrier.refuse(plan)
        policy = str(self.policy)
        if self._auto:
            policy = "auto"  # measured together, and measured with another one
        elif len(policy) > SHOWN:
            policy = self.policy.digest()
        text = {"op": plan.op, "key": plan.label, **plan.text}
        text |= {"policy": policy, "seed": self.seed, "wire": WIRE_VERSION}
        text["COMMLIB_CHECK"] = self._carrier.checking
        if factor is not None:
            text["factor"] = factor
        if any(message.hierarchical for message in plan.messages):
            nodes = self._find_nodes(text)
            text["nodes"] = nodes if len(nodes) <= SHOWN else digest(nodes)
        refused: ValueError | None = None
        for message in plan.messages:
            try:
                self._ready(message)
            except ValueError as error:
                if not message.hierarchical:  # there all ranks refuse alike
                    raise
                refused, text["refused"] = error, str(error)
        self._carrier.agree(text)
        if refused is not None:
            raise refused
        self._plans[id_] = plan

    def _find_nodes(self, text: dict[str, Any]) -> str:
        """Ask all ranks once which hosts they are on, with a first plan on which they agree."""
        if not self.nodes:
            nodes = nodes_of(self._carrier.tell(text, identity()))
            if 1 < len(nodes) < self.size:
                self._carrier.divide([*nodes, *columns_of(nodes)])
            logger.info("the %d ranks by host: %s", self.size, nodes)
            self.nodes = nodes
            self._check_nodes()
        return str(self.nodes)

    def _check_nodes(self) -> None:
        """Let go of residuals that were saved where the ranks were on hosts in another way.

        Each is of a part of the sum of a host; the part that this rank has now is another.
        """
        if not self.nodes:  # not asked for yet
            return
        saved, self._saved_nodes = self._saved_nodes, ""
        if saved not in ("", str(self.nodes)):
            dropped = self._compressors.reset_hosts()
            if dropped and self.rank == 0:
                logger.warning(
                    "the ranks by host are %s, and were %s where the residuals of @hierarchical "
                    "schemes were saved: these (%d bytes on rank 0) start from zero",
                    self.nodes, saved, dropped,
                )  # fmt: skip

    def _ready(self, message: Message) -> None:
        """Make the compressors of a message; ValueError where their residuals do not fit it."""
        compressor, share = self._compressors.of(message.scheme), message.layout
        self._options(message)
        if message.hierarchical:
            mine = hierarchical.owned(share, message.scheme, self.nodes, self.rank)
            if mine is None:
                self._check_hosts(message)
                return
            share = mine
        compressor.check(message.key, share)
        if isinstance(message.scheme.algorithm, PowerSGD) and self.size > 1:
            rank = message.scheme.algorithm.rank
            power_sgd.check(compressor, message.key, message.shapes, rank)

    def _check_hosts(self, message: Message) -> None:
        """Say where there is nothing between hosts to compress."""
        if len(self.nodes) == 1 < self.size and message.scheme.codec.id != "fp32":
            reason = f"under {message.name}, and all {self.size} ranks of the group are on one host"
            for name in names_of(message.key) or (None,):
                self.meter.not_compressed(name, reason)

    def _flat(self, op: str, scheme: Scheme) -> Scheme:
        """The scheme of a collective other than all_reduce: they know no hosts and no matrices."""
        flat = scheme.flat()
        if flat != scheme and (op, scheme) not in self._told:
            self._told.add((op, scheme))
            if self.rank == 0:
                by_hosts = isinstance(scheme.algorithm, Hierarchical)
                logger.warning(
                    "%s knows no %s: under %s it goes as %s%s",
                    op, KNOWS[type(scheme.algorithm)], scheme, flat,
                    ", between all ranks alike" if by_hosts else "",
                )  # fmt: skip
        return flat

    def _goes_by_shape(self, scheme: str | Scheme | None) -> bool:
        """Whether what is chosen depends on the shape of a tensor."""
        if scheme is None:
            return self.policy.shaped
        return isinstance(parse_scheme(scheme).algorithm, PowerSGD)

    def _choose(self, info: TensorInfo) -> Scheme:
        scheme = self.policy.choose(info)
        if scheme.lossless:
            reason = why_raw(self.policy, info)
            if reason is not None:
                self.meter.not_compressed(info.key, reason)
        return scheme

    def _exactly(self) -> AlgorithmConfig | None:
        """How values that stay exact are summed beside compressed ones: in one order, whichever
        those of their bucket are."""
        configs = [rule.scheme.algorithm for rule in self.policy.rules]
        return next((Hierarchical() for c in configs if isinstance(c, Hierarchical)), None)

    def _era(self, keys: tuple[str, ...]) -> int:
        """The policy's era for the next message of `keys`, which it counts."""
        if not self._eras:
            return 0
        if self._carrier.capturing():
            raise RuntimeError(
                "the policy changes with the number of calls (from_step), which a CUDA graph does "
                "not count; capture under a policy without"
            )
        step = max(self._steps.get(key, 0) for key in keys)
        for key in keys:
            self._steps[key] = step + 1
        return self.policy.era(step)

    def _factor(self, factor: float | str, x: torch.Tensor) -> float:
        if isinstance(factor, str):
            if factor not in ("sum", "avg"):
                raise ValueError(f"factor is {factor!r}; allowed: a number, 'sum' or 'avg'")
            factor = 1.0 if factor == "sum" else 1.0 / self.size
        if not math.isfinite(factor):
            raise ValueError(f"factor is {factor}, it must be finite")
        if factor != 1.0 and not (x.is_floating_point() or x.is_complex()):
            raise ValueError(f"factor {factor} needs a floating tensor, got {x.dtype}; use 'sum'")
        return float(factor)

    def _kind(self, factor: float | None) -> str | None:
        """What plans keep of a factor: sums and means are told apart, numbers may change by step.

        Owners multiply: ranks with other factors would each have chunks of one and of the other.
        """
        if factor is None:
            return None
        return "sum" if factor == 1.0 else "avg" if factor == 1.0 / self.size else "number"

    def _options(self, message: Message) -> dict[str, Any]:
        """What the algorithm of a message takes beyond what all take."""
        config = message.scheme.algorithm
        if isinstance(config, TwoPhase):
            return {"back": self._compressors.back(message.scheme), "slices": config.slices}
        if isinstance(config, Hierarchical):
            inner = hierarchical.inside(config.inner, message.layout.dtype)
            return {
                "nodes": self.nodes,
                "inner": self._compressors.plain(inner),
                "slices": config.slices,
            }
        if isinstance(config, PowerSGD):
            plain = self._compressors.plain(message.scheme.codec)
            return {"rank": config.rank, "shapes": message.shapes, "plain": plain}
        if isinstance(config, Thc):
            thc.sum_dtype(self.size, config.bits)  # refuses more ranks than their sums have room
            return {"bits": config.bits}
        return {}


def _suited(op: str, scheme: Scheme) -> Scheme:
    """What a policy chose, for what `op` moves: increments have residuals, values do not."""
    if op in INCREMENTS or (op == GATHER and isinstance(scheme.feedback, Delta)):
        return scheme
    return scheme.stateless()


def check_role(role: str) -> None:
    """Refuse a role that no rule could name (ValueError)."""
    if role not in tuple(Role):
        raise ValueError(unknown("role", str(role), Role))


def check_memory(op: str, scheme: Scheme) -> None:
    """Refuse memories that no message of `op` has (ValueError)."""
    memory = scheme.feedback
    if not isinstance(memory, OF_PIPELINES) or (op == GATHER and memory == Delta()):
        return
    if op == GATHER and isinstance(memory, Delta):
        raise ValueError(
            f"{scheme}: all ranks hold what was gathered, where the tensors are; the options of "
            "delta are for samples between pipeline stages: leave them out"
        )
    better = f"{scheme.codec}+ef" if op in INCREMENTS else scheme.codec
    raise ValueError(f"{scheme}: {op} has no memory such as {memory.id}; use {better}")
