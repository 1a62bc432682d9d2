"""Compressed activations and their gradients between the stages of torch.distributed.pipelining.

    schedule = commlib.wrap(Schedule1F1B(stage, 8, loss_fn), "int4", backward="int8")
    schedule.step(x, target=y)                  # as before

    commlib.wrap(schedule, "int2+delta", backward="int4")
    schedule.step(x, sample_ids=ids)            # on the other stages: step(sample_ids=ids)

    commlib.wrap(schedule, "int4+reuse", backward="int4+reuse")
    schedule.step(x, is_fresh=fresh)            # on all stages, from a LazySampler

Of a schedule nothing changes but what lies in its messages (`pipeline_hooks`). Ranks agree, before
the first byte, on the pipeline, on the tensors between its stages and on their schemes; with
`+delta` and `+reuse` on every step. Evaluation (a step without backward) has no samples to
remember: there tensors under these modes travel raw, all others as in training.
"""

from __future__ import annotations

import math
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from commlib.agreement import Agreement, Disagreement, shorten
from commlib.boundary import Boundary, told
from commlib.collectives import Pool
from commlib.collectives.base import span
from commlib.eager import eager
from commlib.integrations.pipeline_checks import (
    USERS,
    Unfit,
    check_fresh,
    check_shape,
    compare_ends,
    root_of,
    samples_of,
)
from commlib.integrations.pipeline_edges import (
    ROLES,
    Edge,
    Shape,
    incoming,
    is_local,
    outgoing,
    own_memory,
)
from commlib.integrations.pipeline_hooks import Samples
from commlib.integrations.pipeline_memory import Memory
from commlib.integrations.pipeline_policy import why_exact
from commlib.integrations.pipeline_wires import Due, decode, sample, with_wire
from commlib.modes import Delta, Reuse
from commlib.plans import is_exact, why_raw
from commlib.policy import Policy, Scheme, TensorInfo
from commlib.telemetry import Meter
from commlib.transport import TorchTransport

START_AGAIN = (
    "The pipeline is aborted; wrap it again and go on from a checkpoint, on a new process group if "
    "a rank is gone."
)


class Pipeline(Memory):
    """What commlib knows of a pipeline on this rank; `commlib.of(schedule)`.

    Args:
        stages: of this rank.
        policy: of both directions, see `parse`.
        facts: what all ranks must have alike (`facts_of`).
        seed: of the random streams of stochastic codecs.
        timeout: seconds an agreement may take; None: the group's.

    Every rank of the stages' group makes one, at the same place of its program; stages go
    through it once it is attached to them.

    Raises: ValueError: stages of other devices or groups. RuntimeError: ranks disagree.
    """

    def __init__(
        self,
        stages: Sequence[Any],
        policy: Policy,
        facts: dict[str, Any],
        *,
        seed: int = 0,
        timeout: float | None = None,
    ) -> None:
        first = stages[0]
        if any(other.group is not first.group or other.device != first.device for other in stages):
            raise ValueError("the stages of a rank have one group and one device between them")
        device = torch.device(first.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        # Weak: a stage holds its group, and a group in a ring of references lives too long.
        self._stages = [weakref.ref(stage) for stage in stages]
        self.policy, self.seed = policy, seed
        self.transport = TorchTransport(first.group, timeout, device)
        self.meter = Meter(rank=self.transport.rank)
        self.aborted = ""  # why; its traceback would hold the group
        self._agreement = Agreement(self.transport, self.transport.timeout)
        self._pool = Pool(self.transport.device)
        self._boundaries: dict[str, Boundary] = {}
        self._saved: dict[str, Any] = {}  # loaded, of boundaries that are made later
        self._loaded = False  # since the last step
        self._stepping = False
        self._steady = self._trained = False  # the last steps were training: shapes stay
        self._sent: list[torch.Tensor] = []  # wires of this step
        self._due: dict[tuple[int, str, int], list[Due]] = {}
        self._unknown = True  # what travels between the stages
        self._number = 0  # of the step
        self._samples: list[list[int]] | None = None
        self._fresh: bool | None = None
        self._exact = is_exact()  # in the last step
        self._begun: set[str] = set()
        self._history = 0  # a digest of all samples so far
        self.confirm(facts)

    def confirm(self, facts: dict[str, Any]) -> None:
        """All ranks come with the same facts. RuntimeError says who does not, and in what."""
        self._agreement.agree({"op": "pipeline", **facts})

    @property
    def stages(self) -> list[Any]:
        """The stages of this rank that still exist."""
        return [stage for ref in self._stages if (stage := ref()) is not None]

    @property
    def needs_ids(self) -> bool:
        """Whether a training step needs the ids of its samples."""
        return any(isinstance(rule.scheme.feedback, Delta) for rule in self.policy.rules)

    @property
    def needs_fresh(self) -> bool:
        """Whether a training step must say if its batch is fresh."""
        return any(isinstance(rule.scheme.feedback, Reuse) for rule in self.policy.rules)

    # What users ask of it.

    def stats(self) -> str:
        """A table of what this rank sent: raw and wire bytes, seconds of coding, sampled error."""
        return self.meter.table()

    def set_timeout(self, seconds: float) -> None:
        """How long an agreement may take from now on."""
        self.transport.timeout = self._agreement.timeout = seconds

    # A step.

    @contextmanager
    def step(
        self, microbatches: int, training: bool, sample_ids: Samples | None, is_fresh: bool | None
    ) -> Iterator[None]:
        """Around a schedule's step: agree on it, and make its failure one that all ranks hear of.

        Raises: ValueError, before anything is sent: ids or flag missing, ids twice, not a multiple
            of the micro-batches. RuntimeError: ranks disagree; this rank or another one failed.
        """
        if self.aborted:
            raise RuntimeError(f"this pipeline takes no more steps. {self.aborted}")
        self._number += 1
        what = f"step {self._number} of the pipeline"
        self._steady, self._trained = self._trained and training, training
        if (exact := is_exact()) != self._exact:  # what travels is another thing: compare it again
            self._exact, self._unknown = exact, True
        if training and not is_exact() and (self.needs_ids or self.needs_fresh):
            self._agree(what, microbatches, sample_ids, is_fresh)
        self._stepping = True
        try:
            yield
            self._pool.give(*self._sent)
        except Unfit:  # on all ranks, before anything was sent
            self._unknown = True
            raise
        except Exception as error:
            if self._failed(what, error):
                raise
            raise RuntimeError(self.aborted) from error
        except BaseException:
            self.aborted = f"{what} was interrupted. {START_AGAIN}"
            raise
        finally:
            self._stepping = False
            self._sent.clear()
            self._end()

    def _agree(
        self, what: str, microbatches: int, sample_ids: Samples | None, is_fresh: bool | None
    ) -> None:
        wrong, ids = None, None
        try:
            if self.needs_fresh:
                check_fresh(is_fresh)
            if self.needs_ids:
                ids = samples_of(sample_ids, microbatches)
            for boundary in self._boundaries.values() if self._steady else ():
                boundary.check_step(ids, is_fresh)
        except ValueError as error:
            wrong = error  # the others must hear of it
        history = zlib.crc32(str(ids).encode(), self._history)
        text: dict[str, Any] = {"op": what, "key": "samples", "error": str(wrong or "")}
        text |= {"history": history, "is_fresh": is_fresh, "ids": zlib.crc32(str(ids).encode())}
        try:
            self._agreement.agree(text)
        except Disagreement:
            if wrong is None:
                raise
        except (RuntimeError, OSError) as error:
            self._failed(what, error)
            raise RuntimeError(self.aborted) from error
        if wrong is not None:
            try:
                raise wrong
            finally:
                wrong = None  # its traceback would hold itself, and with it the stages' group
        self._history = history
        if self._loaded:
            self._loaded = False
            self.verify()
        self._samples, self._fresh = ids, is_fresh

    def _begin(self, boundary: Boundary) -> None:
        """Tell a boundary of the step, once."""
        if boundary.key in self._begun or (self._samples is None and self._fresh is None):
            return
        self._begun.add(boundary.key)
        boundary.begin(self._samples, self._fresh)

    def _end(self) -> None:
        """A message outside of a step is of no sample that is known, and refused."""
        self._samples, self._fresh = None, None
        self._begun.clear()
        for boundary in self._boundaries.values():
            boundary.end()

    def _failed(self, what: str, error: Exception) -> bool:
        """Tell the other ranks, and abort. Whether the error is a user's own, which stays as it is.

        Returns nothing that refers to the error: a traceback in a ring would hold the group.
        """
        names = ", ".join(str(stage.stage_index) for stage in self.stages)
        rank, size = self.transport.rank, self.transport.size
        root = root_of(error)
        ours = isinstance(root, RuntimeError | OSError) and not isinstance(root, USERS)
        text = str(root) if ours else f"{type(root).__name__}: {shorten(root)}"
        others = self._agreement.roll_call(what, root if ours else RuntimeError(text))
        self.aborted = (
            f"{what} failed at stage {names} (rank {rank} of {size}): {text}. {others}. "
            f"{START_AGAIN}"
        )
        if not ours:
            error.add_note(self.aborted)
        return not ours

    # What the stages hand over.

    def prepared(self) -> None:
        self._unknown = True

    @eager
    def send(self, stage: Any, direction: str, microbatch: int, ops: list[Any]) -> list[Any]:
        self._meet()
        out = []
        with torch.no_grad():
            for op, (edge, known) in zip(ops, outgoing(stage, direction), strict=True):
                x = op.tensor
                shape = Shape(tuple(x.shape), x.dtype)
                check_shape(edge, shape, known)
                boundary = self._boundary(stage, edge, shape)
                if boundary is None:
                    self.transport.bytes_sent += x.nbytes
                    self.meter.record(direction, edge.key, "fp32", x.nbytes, x.nbytes, 0.0)
                    out.append(op)
                    continue
                out.append(with_wire(op, self._coded(boundary, direction, microbatch, x)))
        return out

    def _coded(
        self, boundary: Boundary, direction: str, microbatch: int, x: torch.Tensor
    ) -> torch.Tensor:
        if self.meter.due(boundary.key):
            sample(self.meter, boundary, x)
        start, nbytes = time.perf_counter(), boundary.nbytes(microbatch)
        if self._stepping:
            wire = self._pool.take(nbytes)
            self._sent.append(wire)
        else:  # nobody tells when it was sent
            wire = torch.empty(nbytes, dtype=torch.uint8, device=self.transport.device)
        with span("encode"):
            boundary.encode(x, wire, microbatch)
        self.transport.bytes_sent += wire.nbytes
        row = (direction, boundary.key, str(boundary.scheme), x.nbytes, wire.nbytes)
        self.meter.record(*row, time.perf_counter() - start)
        return wire

    @eager
    def post(self, stage: Any, direction: str, microbatch: int, ops: list[Any]) -> list[Any]:
        self._meet()
        out, due = [], []
        for op, (edge, _) in zip(ops, incoming(stage, direction), strict=True):
            x, work = op.tensor, None
            boundary = self._boundary(stage, edge, Shape(tuple(x.shape), x.dtype))
            if boundary is not None:
                x = own_memory(stage, direction, microbatch, x)
                op = with_wire(op, self._pool.take(boundary.nbytes(microbatch)))
            if self.transport.tagged:  # gloo: now, before the send that it is batched with
                work = op.op(op.tensor, group=op.group, tag=op.tag, group_src=op.group_peer)
            else:
                out.append(op)
            due.append(Due(boundary, op.tensor, x, work))
        if due:
            self._due[stage.stage_index, direction, microbatch] = due
        return out

    @eager
    def arrive(self, stage: Any, direction: str, microbatch: int) -> None:
        with torch.no_grad():
            for boundary, wire, x, work in self._due.pop(
                (stage.stage_index, direction, microbatch), ()
            ):
                if work is not None:
                    with span("wait"):
                        work.wait()
                if boundary is not None:
                    with span("decode"):
                        decode(boundary, wire, x, microbatch)
                    self._pool.give(wire)

    def _boundary(self, stage: Any, edge: Edge, shape: Shape) -> Boundary | None:
        """Who codes what travels on `edge`; None: raw."""
        if is_exact():
            return None
        scheme = self._scheme(edge, shape)
        if scheme.lossless:
            return None
        remembers = isinstance(scheme.feedback, Delta | Reuse)
        if remembers and not stage.has_backward:
            return None
        boundary = self._boundaries.get(edge.key)
        if boundary is None or (boundary.shape, boundary.dtype, boundary.scheme) != (
            *shape,
            scheme,
        ):
            old, device = boundary, self.transport.device
            boundary = Boundary(edge.key, scheme, *shape, device=device, seed=self.seed)
            if old is not None:
                boundary.follow(old)
            self._boundaries[edge.key] = boundary
            self._begun.discard(edge.key)
            if edge.key in self._saved:
                boundary.load_state_dict(self._saved.pop(edge.key))
        if remembers:
            self._begin(boundary)
        return boundary

    def _scheme(self, edge: Edge, shape: Shape) -> Scheme:
        numel, role = math.prod(shape.sizes), ROLES[edge.direction]
        info = TensorInfo(edge.key, numel, shape.dtype, role, len(shape.sizes))
        scheme = self.policy.choose(info)
        if scheme.lossless:
            reason = why_raw(self.policy, info) or why_exact(self.policy, info)
            if reason is not None:
                self.meter.not_compressed(edge.key, reason)
        return scheme

    def _meet(self) -> None:
        """After the stages learnt what travels between them: compare that among all ranks.

        Raises: Unfit on all ranks, naming what does not fit.
        """
        if not self._unknown:
            return
        self._unknown = False
        ends: list[list[str | None]] = []
        wrong = ""
        for stage in self.stages:
            for direction in ROLES:
                for end, edges in (("sends", outgoing), ("receives", incoming)):
                    for edge, shape in edges(stage, direction):
                        if is_local(stage, edge.target if end == "sends" else edge.source):
                            continue
                        try:
                            if shape is not None:
                                self._boundary(stage, edge, shape)
                        except (ValueError, RuntimeError) as error:
                            wrong = f"{edge.key}: {error}"
                        ends.append([end, edge.key, self._described(edge, shape)])
        compare_ends(self._agreement.gather("the tensors between stages", [wrong, ends]))
        self._agreement.look()  # a rank that gave up waiting for this one has left

    def _described(self, edge: Edge, shape: Shape | None) -> str | None:
        if shape is None:
            return None
        dtype = str(shape.dtype).removeprefix("torch.")
        boundary = self._boundaries.get(edge.key)
        memory = f", memory {boundary.history():08x}" if boundary is not None else ""
        scheme = "exact" if is_exact() else str(told(self._scheme(edge, shape)))
        return f"{dtype} {list(shape.sizes)} as {scheme}{memory}"
