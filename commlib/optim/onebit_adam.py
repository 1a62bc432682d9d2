"""1-bit Adam: Adam until its second moment has settled, then momentum that travels in one bit.

For the first `warmup` steps it is plain Adam on the mean of the ranks' gradients g_i, uncompressed.
Then the second moment stays as it is, and what travels is the momentum, which is linear in the
gradients: what error feedback sends later is what was missing, while in Adam's own second moment it
would be one more variance. From t = warmup + 1 on::

    m_i = b1 m + (1 - b1) g_i
    m   = mean over ranks of m_i, under the communicator's policy     "sign+ef": double squeeze
    x  -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^warmup)) + eps)

Bias corrections are Adam's; v's is that of the last step at which v changed, m's goes on with t.

**The mask.** Adam's step is at most ``(1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2))`` lr (7.3 lr by
default), as v has seen every gradient that is in m. With v frozen that is over: where (almost) no
gradient came during warm-up, a gradient that comes later, or what the codec makes of a zero (sign:
plus or minus the mean of its block), is divided by eps. So where v is at most `threshold` times the
mean of its parameter, m is 0 from then on, and the coordinate stays where it is. A step of rounding
is thus about ``1 / sqrt(threshold)`` lr at most. The threshold is relative because Adam is: a loss
times 1000 changes neither. Without mask, or where it does not suffice, a step that would move a
coordinate by more than `REACH` lr raises instead.

Bytes a rank sends in a step: in warm-up a ring's 8 (W-1)/W a value, then two_phase's 2 (W-1)/W
payloads, of 1 bit a value and a scale a block: 28 times fewer, and 31 with `sign:block=tensor`.

Source: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's
Convergence Speed", ICML 2021, arXiv 2102.02888, algorithm 1; the mask: DeepSpeed's exp_avg_mask.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from commlib.communicator import Communicator
from commlib.optim.pprs import check_number
from commlib.optim.replicas import Named, Replicas, gradient_of
from commlib.optim.ticks import check_count

logger = logging.getLogger("commlib")

REACH = 1e4
"""Units of lr that a coordinate may move in one step. Adam's own are below 7.3; on digits healthy
runs had up to 35 (threshold 1e-4) and 4400 (1e-8), and what ended in NaN began at 1e4 and more."""


class OneBitAdam(Replicas):
    """1-bit Adam: see above. Every rank has the gradient of its own batch in `grad` (`replicas`).

    Memory: Adam's, and the communicator's residuals. A step is checked before it is made, for which
    the host waits. A GradScaler, under which ranks would skip steps each for itself, is refused:
    use bfloat16 autocast, which needs none.

    Args:
        params: named, as `model.named_parameters()`, or groups of such; float32.
        communicator: of the ranks; its policy says how the momentum of each parameter travels
            (under a bare text such as "sign+ef" vectors stay exact). Used by nothing else.
        lr, betas, eps, weight_decay: as in torch.optim.Adam, of each group.
        warmup: steps of plain Adam, at least 1; 15 to 25% of all in the paper.
        threshold: of the mask, 0 to 1, in units of the mean of v of a parameter; None: no mask.
        decoupled_weight_decay: as in torch.optim.Adam: AdamW's.

    Raises: ValueError: what cannot be.
    """

    dtypes = (torch.float32,)
    shared = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        communicator: Communicator,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup: int,
        threshold: float | None = 1e-4,
        decoupled_weight_decay: bool = False,
    ) -> None:
        check_count("OneBitAdam: warmup", warmup)
        if threshold is not None:
            check_number("OneBitAdam: threshold", threshold, positive=False)
            if threshold >= 1:
                raise ValueError(f"OneBitAdam: threshold is {threshold}, allowed: 0 to below 1")
        self.warmup = warmup
        self.threshold = threshold
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults["decoupled_weight_decay"] = decoupled_weight_decay
        super().__init__(params, communicator, defaults)

    @property
    def frozen(self) -> bool:
        """Whether the next step is one of compressed momentum."""
        return self.steps >= self.warmup

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "warmup": self.warmup}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of the same rank. Residuals are in ``["communicator"]``: among
        other ranks put there what `reshard.redistribute` makes of all.

        Raises: ValueError: another rank's, of other parameters or another warm-up, or no such
            state; nothing changed.
        """
        there = state_dict.get("warmup")
        if there != self.warmup:
            raise ValueError(f"OneBitAdam: the state has warmup {there}, allowed: {self.warmup}")
        super().load_state_dict(state_dict)

    def _options(self) -> list[Any]:
        return [*super()._options(), self.warmup, self.threshold]

    def _update(self) -> None:
        if self.frozen:
            self._compressed_step()
        else:
            self._adam_step()

    def _adam_step(self) -> None:
        flat = torch.cat([self._gradient(one).reshape(-1) for one in self._named()])
        self.communicator.all_reduce(flat, scheme="fp32", factor="avg").wait()
        self._check_finite(flat, "gradient")
        for one, gradient in self._parts(flat):
            m, v = self._moments(one)
            beta1, beta2 = one.group["betas"]
            m.lerp_(gradient, 1 - beta1)
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            self._move(one, m, self._denominator(one))

    def _compressed_step(self) -> None:
        masks = self._masks()
        mine = [self._momentum(one, mask) for one, mask in zip(self._named(), masks, strict=True)]
        flat = torch.cat([momentum.reshape(-1) for momentum in mine])
        self.communicator.all_reduce_segments(
            flat, self._names, self._sizes, self._ndims, factor="avg"
        ).wait()
        self._check_finite(flat, "momentum")
        steps = []
        for (one, momentum), mask in zip(self._parts(flat), masks, strict=True):
            if mask is not None:
                momentum.mul_(mask)
            steps.append((one, momentum, self._denominator(one)))
        self._check_reach(steps)
        if self.steps == self.warmup:
            self._freeze(masks)
        for one, momentum, denominator in steps:
            self._moments(one)[0].copy_(momentum)
            self._move(one, momentum, denominator)

    def _masks(self) -> list[torch.Tensor | None]:
        """Where m may be other than 0, by parameter; None: anywhere."""
        second = [self._moments(one)[1] for one in self._named()]
        if self.threshold is None:
            return [None] * len(second)
        if self.steps > self.warmup:
            return [v > 0 for v in second]
        cuts = torch.stack([v.mean() for v in second]).nan_to_num_().mul_(self.threshold)
        # a mean of the same numbers may differ by the threads that made it
        self.communicator.broadcast(cuts, 0, scheme="fp32").wait()
        return [v > cut for v, cut in zip(second, cuts, strict=True)]

    def _freeze(self, masks: list[torch.Tensor | None]) -> None:
        """Set v to 0 where the mask is: from here on v > 0 is the mask.

        Once the first step under it is known to succeed: one that is refused leaves v as it was.
        """
        masked = 0
        for one, mask in zip(self._named(), masks, strict=True):
            if mask is not None:
                self._moments(one)[1].mul_(mask)
                masked += int((~mask).sum())
        if masked and self.communicator.rank == 0:
            logger.warning(
                "1-bit Adam: v is frozen after %d steps; %d of %d coordinates had (almost) no "
                "gradient by then and stay where they are",
                self.warmup, masked, sum(self._sizes),
            )  # fmt: skip

    def _gradient(self, one: Named) -> torch.Tensor:
        """This rank's, with weight decay where it is part of the gradient."""
        gradient, decay = gradient_of(one.parameter), one.group["weight_decay"]
        if decay and not one.group["decoupled_weight_decay"]:
            gradient = gradient.add(one.parameter, alpha=decay)
        return gradient

    def _momentum(self, one: Named, mask: torch.Tensor | None) -> torch.Tensor:
        """m_i, 0 where the mask is."""
        m, _ = self._moments(one)
        momentum = m.lerp(self._gradient(one), 1 - one.group["betas"][0])
        return momentum if mask is None else momentum.mul_(mask)

    def _moments(self, one: Named) -> tuple[torch.Tensor, torch.Tensor]:
        return self._moment(one.parameter, "exp_avg"), self._moment(one.parameter, "exp_avg_sq")

    def _denominator(self, one: Named) -> torch.Tensor:
        correction = 1 - one.group["betas"][1] ** min(self.steps + 1, self.warmup)
        root = self._moments(one)[1].sqrt()
        root /= correction**0.5
        root += one.group["eps"]
        return root

    def _move(self, one: Named, m: torch.Tensor, denominator: torch.Tensor) -> None:
        lr, decay = one.group["lr"], one.group["weight_decay"]
        if decay and one.group["decoupled_weight_decay"]:
            one.parameter.mul_(1 - lr * decay)
        correction = 1 - one.group["betas"][0] ** (self.steps + 1)
        one.parameter.addcdiv_(m, denominator, value=-lr / correction)

    def _check_reach(self, steps: list[tuple[Named, torch.Tensor, torch.Tensor]]) -> None:
        """Refuse a step that v cannot be the measure of; all ranks see the same numbers."""
        far = [m.abs() > REACH * denominator for _, m, denominator in steps]
        if not torch.stack([one.any() for one in far]).any():
            return
        (name, _, group), m, denominator = next(
            step for step, one in zip(steps, far, strict=True) if one.any()
        )
        ratio = m.abs() / denominator
        raise RuntimeError(
            f"OneBitAdam: step {self.steps + 1} would move {int((ratio > REACH).sum())} of "
            f"{m.numel()} coordinates of {name!r} by up to {float(ratio.max()):.2g} lr (Adam: a "
            f"few lr, allowed: {REACH:g}), as v was frozen where (almost) no gradient had come: "
            f"set threshold (1e-4; it is {self.threshold}), a longer warmup (it is {self.warmup}) "
            f"or a larger eps (it is {group['eps']:g}). Parameters and moments are as before the "
            "step; residuals of error feedback are not, what they owed was in that momentum"
        )

    def _check_options(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            # a masked coordinate's step is 0 / eps
            check_number(f"OneBitAdam: {name}", group[name], positive=name == "eps")
        betas = group["betas"]
        if len(betas) != 2 or not all(isinstance(b, float | int) and 0 <= b < 1 for b in betas):
            raise ValueError(f"OneBitAdam: betas is {betas}, allowed: two numbers in [0, 1)")
