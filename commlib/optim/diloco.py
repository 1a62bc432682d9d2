"""DiLoCo: every rank trains by itself; once in many steps they exchange how far they came.

With theta the model that all ranks share, W_i the parameters of rank i, which begin as theta and
move by the inner optimizer, and H the period, every H inner steps::

    D_i    = theta - W_i                        the pseudo-gradient of rank i
    D      = mean over ranks of D_i             under the communicator's policy: what travels
    b     <- momentum b + D                     the outer optimizer: SGD with Nesterov's momentum
    theta <- theta - lr (D + momentum b)
    W_i   <- theta

**Streaming DiLoCo.** The parameters are cut into F fragments, of which k is exchanged at steps
``k H / F + n H``: the same bytes in all, in smaller portions. With an overlap of tau the exchange
begins then, goes on beside the next tau inner steps, and is applied after them::

    W_i   <- mix W_i + (1 - mix) theta

**Which exchange.** An all-reduce sends 2 (W-1)/W payloads a rank and codes twice, a gather of all
D_i sends W-1 and codes once: twice as much at four ranks, as much at two. What the second coding
costs is the difference to `@two_phase:back=bf16`: in `bench/diloco.py` less than the seeds' own. So
it is an all-reduce.

Ranks must not drift apart by a bit, on whatever machines they run: theta is moved by products and
sums that round one by one, none of them fused.

Sources: Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models"
(arXiv 2311.08105); Douillard et al. 2025, "Streaming DiLoCo with overlapping communication" (arXiv
2501.18512); averaging alone: Stich 2019, "Local SGD Converges Fast and Communicates Little" (arXiv
1805.09767).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from commlib.communicator import Communicator
from commlib.optim.outer import Outer, Sync
from commlib.optim.replicas import as_bytes, check_communicator, strangers
from commlib.work import Work


class DiLoCo(Outer):
    """DiLoCo and Streaming DiLoCo around an inner optimizer: see above.

    ::

        outer = DiLoCo(model.named_parameters(), inner, communicator, period=40)
        for x, y in batches:
            inner.zero_grad()
            loss(model(x), y).backward()
            outer.step()                      # inner.step(), and what is due after it
        outer.finish()                        # the shared model, on all ranks

    Buffers (running means of batch norm) are each rank's own. Memory: two vectors as large as the
    parameters, and D while it travels. Feedback in the policy (`int4+ef`) is allowed; its residuals
    are saved with the communicator's memory.

    Args:
        params: named, as `model.named_parameters()`; float32; all that `inner` trains.
        inner: any torch optimizer of these parameters; for one whose step needs a closure (LBFGS)
            call `step` with that. Or None: then call `tick` after its step.
        communicator: of the ranks; its policy says how D travels (`e3m0:block=256`, `sigma8`).
            Without feedback codecs round at random by default; ":round=nearest" is better here.
            Used by nothing else; with an overlap its group is no other's either, as an exchange
            may be under way while the ranks meet there for something else (`dist.new_group()`).
        period: H, inner steps from one exchange of a parameter to its next. 30 to 500 in papers.
        lr, momentum: of the outer SGD. lr and momentum may be changed between steps, on all ranks.
        nesterov: False: plain momentum, theta <- theta - lr b.
        fragments: F, at most H: parameter i of the list belongs to fragment i mod F; or the names
            of each, as lists.
        overlap: tau, from 0 (training waits for the exchange) to below H.
        mix: how much of its own W a rank keeps when a result arrives; 0.5 with overlap, else 0.
        on_sync: called with a `Sync` after each exchange.

    Raises: ValueError: what cannot be, before anything is sent.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, torch.nn.Parameter]],
        inner: torch.optim.Optimizer | None,
        communicator: Communicator,
        *,
        period: int,
        lr: float = 0.7,
        momentum: float = 0.9,
        nesterov: bool = True,
        fragments: int | Sequence[Sequence[str]] = 1,
        overlap: int = 0,
        mix: float | None = None,
        on_sync: Callable[[Sync], None] | None = None,
    ) -> None:
        check_communicator(type(self).__name__, communicator)
        super().__init__(
            params,
            inner,
            communicator.transport.device,
            period=period,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            fragments=fragments,
            overlap=overlap,
            mix=mix,
            on_sync=on_sync,
        )
        self.communicator = communicator
        self._counted = self._sent()
        self._alike = False

    def _exchange(self, k: int, difference: torch.Tensor) -> Work | None:
        fragment = self.fragments[k]
        return self.communicator.all_reduce_segments(
            difference,
            fragment.names,
            fragment.sizes,
            fragment.ndims,
            factor="avg",
            async_op=self.overlap > 0,
        )

    def _sent(self) -> int:
        return self.communicator.transport.bytes_sent

    def _memory(self) -> dict[str, Any]:
        return {"communicator": self.communicator.state_dict()}

    def _load_memory(self, state_dict: Mapping[str, Any]) -> None:
        self.communicator.load_state_dict(state_dict["communicator"])
        self._alike = False

    def _ready(self) -> None:
        """Once, and after loading: refuse to go on with ranks that share no model."""
        if self._alike:
            return
        # whatever decides when there is an exchange, and what becomes of it; not mix, of W alone
        options = [self.period, self.overlap, self.lr, self.momentum, bool(self.nesterov)]
        tensors = [*self._theta, *self._buffers, as_bytes(options)]
        others = strangers(self.communicator, self.steps, tensors)
        if others:
            raise RuntimeError(
                f"{type(self).__name__}: ranks {others} have other shared parameters, steps, "
                "momentum or options than rank 0: begin with the same on all, from one seed, by "
                f"broadcast or from one checkpoint; here period, overlap, lr, momentum, nesterov "
                f"are {', '.join(map(str, options))}"
            )
        self._alike = True


class LocalSGD(DiLoCo):
    """Averaging alone: W <- the mean of all W, every `period` steps.

    DiLoCo with lr 1 and no momentum. Args as there.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, torch.nn.Parameter]],
        inner: torch.optim.Optimizer | None,
        communicator: Communicator,
        *,
        period: int,
        fragments: int | Sequence[Sequence[str]] = 1,
        overlap: int = 0,
        mix: float | None = None,
        on_sync: Callable[[Sync], None] | None = None,
    ) -> None:
        super().__init__(
            params,
            inner,
            communicator,
            period=period,
            lr=1.0,
            momentum=0.0,
            fragments=fragments,
            overlap=overlap,
            mix=mix,
            on_sync=on_sync,
        )
