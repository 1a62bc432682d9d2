"""EF21: biased codecs without a residual, by coding the difference to what was sent before.

With g_i of rank i, their mean g, both 0 before the first step, and a contractive C::

    v_i  = grad f_i(x)                       EF21
    v_i <- (1 - eta) v_i + eta grad f_i(x)   EF21-SGDM; the first time v_i = grad f_i(x)
    c_i  = C(v_i - g_i)                      what travels; the first time all of it, by choice
    g_i += c_i,   g += 1/W sum_i c_i         x -= lr g

As x comes to rest, v_i - g_i shrinks, and with it what C throws away: on exact gradients EF21
converges to a stationary point, at O(1/T), where classic error feedback stays at a distance that
the ranks' differences decide. The noise of mini-batches does not shrink: there plain EF21 stalls,
and SGDM averages it first.

C is the codec that the communicator's policy has for each parameter. The coded differences go by
all_gather: every rank decodes all of them, its own too, so that what a rank adds to its g_i is
what the others add for it, and nothing is coded twice. A rank sends W-1 payloads a step, where an
all-reduce that codes the sum again sends 2 (W-1)/W: it is for few ranks. From W = 2 x 32 / bits on
it sends more than an uncompressed all-reduce (64 ranks at one bit). With one rank there is nothing
to code, and EF21 is plain descent.

Sources: Richtarik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and
Practically Faster Error Feedback", NeurIPS 2021, arXiv 2106.05203, algorithm 2. Fatkhullin, Tyurin,
Richtarik, "Momentum Provably Improves Error Feedback!", NeurIPS 2023, arXiv 2305.15155, algorithm
1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch

from commlib.communicator import Communicator
from commlib.feedback import Plain
from commlib.optim.pprs import check_number
from commlib.optim.replicas import Replicas, gradient_of
from commlib.scheme import Role


class EF21(Replicas):
    """EF21 and EF21-SGDM: see above. Two more vectors as large as the parameters; SGDM three.

    Every rank has the gradient of its own batch in `grad` (see `replicas`). A step needs room for W
    decoded differences.

    Args:
        params: named, as `model.named_parameters()`, or groups of such; all float32 or all float64,
            which travels raw.
        communicator: of the ranks, under a policy of contractive codecs without feedback, such as
            "sign" or "int2"; used by nothing else.
        lr: the step. On L-smooth functions at most ``1 / (L + L' sqrt(b / t))``, with ``|C(x) -
            x|^2 <= a |x|^2``, ``t = 1 - sqrt(a)``, ``b = a / t`` and L' the root mean square of the
            ranks' own L (EF21, theorem 1).
        eta: how much of a new gradient joins the momentum: 1: EF21, below: EF21-SGDM.
        first: how the first difference, which is the gradient, travels: "raw" or "coded". Raw is
            ahead where gradients are exact or averaged (digits, top 1%, SGDM: loss .036, coded
            .053); the noise of a raw one stays in plain EF21 until it has been coded away (1.7,
            coded .25).
        compress: C itself, or the first part of it: a function of the flat difference of all
            parameters (n,), which returns a tensor like it, before the communicator's codec. Top-k,
            say; a communicator's codec may choose instead (`topk:density=0.05|fp32`).

    Raises: ValueError: what cannot be; a codec that does not contract, or has a memory of its own.
    """

    dtypes = (torch.float32, torch.float64)
    shared = ("mean",)

    def __init__(
        self,
        params: Iterable[Any],
        communicator: Communicator,
        lr: float,
        eta: float = 1.0,
        *,
        first: Literal["raw", "coded"] = "raw",
        compress: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        if first not in ("raw", "coded"):
            raise ValueError(f"EF21: first is {first!r}, allowed: raw, coded")
        self.first = first
        self.compress = compress
        super().__init__(params, communicator, {"lr": lr, "eta": eta})
        self._check_codecs()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of the same rank; g_i has no meaning on another.

        Raises: ValueError: another rank's or number of ranks, of other parameters, or no such
            state; nothing changed.
        """
        memory = state_dict.get("communicator", {})
        there = memory.get("rank"), memory.get("world_size")
        here = self.communicator.rank, self.communicator.size
        if memory and there != here:
            raise ValueError(
                f"EF21: the state is of rank {there[0]} of {there[1]}, allowed: rank {here[0]} of "
                f"{here[1]}; among other ranks begin anew, with a new EF21"
            )
        super().load_state_dict(state_dict)

    def _options(self) -> list[Any]:
        return [*super()._options(), self.first]

    def _update(self) -> None:
        values = [self._value(one.parameter, one.group["eta"]) for one in self._named()]
        held = [self._moment(one.parameter, "own") for one in self._named()]
        pairs = zip(values, held, strict=True)
        rows = self._gathered(torch.cat([(value - own).reshape(-1) for value, own in pairs]))
        mean = rows[0].clone()  # in rank order, so that all ranks get the same bits
        for row in rows[1:]:
            mean += row
        mean /= self.communicator.size
        self._check_finite(mean, "difference")
        mine = self._parts(rows[self.communicator.rank])
        for value, (one, part), (_, own) in zip(values, self._parts(mean), mine, strict=True):
            if one.group["eta"] < 1 or "momentum" in self.state[one.parameter]:
                self._moment(one.parameter, "momentum").copy_(value)
            self._moment(one.parameter, "own").add_(own)
            direction = self._moment(one.parameter, "mean").add_(part)
            one.parameter.sub_(direction, alpha=one.group["lr"])

    def _value(self, parameter: torch.Tensor, eta: float) -> torch.Tensor:
        """v_i: of the gradient, which it may be, or of the momentum with the gradient in it."""
        gradient = gradient_of(parameter)
        if eta == 1:
            return gradient
        if "momentum" not in self.state[parameter]:
            return gradient
        return self._moment(parameter, "momentum").lerp(gradient, eta)

    def _gathered(self, difference: torch.Tensor) -> torch.Tensor:
        """The coded differences of all ranks, (W, n), decoded."""
        communicator = self.communicator
        if self.steps == 0 and self.first == "raw":
            rows = difference.new_empty(communicator.size, difference.numel())
            communicator.all_gather(rows, difference, scheme="fp32").wait()
            return rows
        flat = self._compressed(difference)
        rows = flat.new_empty(communicator.size, flat.numel())
        communicator.all_gather_segments(
            rows, flat, self._names, self._sizes, self._ndims, self._sizes, role=Role.OTHER
        ).wait()
        return rows

    def _compressed(self, flat: torch.Tensor) -> torch.Tensor:
        if self.compress is None:
            return flat
        made = self.compress(flat)
        if made.shape != flat.shape or made.dtype != flat.dtype or made.device != flat.device:
            raise ValueError(
                f"EF21: compress made {made.dtype} of shape {tuple(made.shape)} on {made.device}, "
                f"allowed: {flat.dtype} of shape {tuple(flat.shape)} on {flat.device}, as it got"
            )
        return made.contiguous()

    def _check_options(self, group: dict[str, Any]) -> None:
        check_number("EF21: lr", group["lr"], positive=False)
        check_number("EF21: eta", group["eta"], positive=True)
        if group["eta"] > 1:
            raise ValueError(f"EF21: eta is {group['eta']}, allowed: above 0, at most 1")

    def _check_codecs(self) -> None:
        for rule in self.communicator.policy.rules:
            if rule.role not in (None, Role.OTHER):
                continue
            if rule.scheme.feedback != Plain():
                raise ValueError(
                    f"EF21: the policy has {str(rule.scheme)!r}, allowed: schemes without "
                    f"feedback, as EF21 is the memory; use {str(rule.scheme.stateless())!r}"
                )
            chosen = rule.scheme.resolve(Role.OTHER).codec
            gamma = chosen.gamma(max(self._sizes, default=1))
            if not gamma < 1:
                bound = "has none" if math.isinf(gamma) else f"has gamma = {gamma:.3g}"
                raise ValueError(
                    f"EF21: needs a codec that contracts, |C(x) - x|^2 <= gamma |x|^2 with gamma "
                    f"below 1, and {chosen} {bound}; use nearest rounding or a smaller block"
                )
