"""Pipeline Parallel Random Smoothing, and what it is measured against.

A pipeline of D stages needs 2 (m + D - 1) units of time for the gradient of m samples, and where m
is small, stages mostly wait. PPRS fills that time with K passes per sample under perturbed weights:
their mean is the gradient of a smoother function, on which acceleration works although f is not
smooth. With x_0 = y_0, lambda_0 = 0, per step t::

    X_k       ~ N(0, I)                                         k = 1 .. K
    G_t       = 1/(mK) sum_ik grad f_i(x_t + gamma X_k)
    y_{t+1}   = x_t - eta G_t
    lambda_{t+1} = (1 + sqrt(1 + 4 lambda_t^2)) / 2
    mu_t      = (lambda_{t+1} - 1) / lambda_{t+2}
    x_{t+1}   = (1 + mu_t) y_{t+1} - mu_t y_t

in 2 (mK + D - 1) units of time. A stage makes the perturbation of its own parameters from (seed,
step, k, stage); nothing of it is sent. K = 1 and gamma = 0 is Nesterov's method.

Source: Colin, dos Santos, Scaman, "Theoretical limits of pipeline parallel optimization and
application to distributed deep learning", NeurIPS 2019, arXiv 1910.05104. Theory has K ~ T/sqrt(d),
gamma ~ R d^(-1/4)/T, eta ~ R d^(-1/4)/(L T) for T steps, a start at distance R from the optimum and
Lipschitz constant L; in practice the three are tuned.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from commlib.optim.noise import normals
from commlib.optim.pipeline import Pipeline, Stage, Weights
from commlib.optim.ticks import check_count


class _Descent(ABC):
    """Steps by the mean gradient that a pipeline makes; the parameters hold x."""

    def __init__(self, pipeline: Pipeline, eta: float) -> None:
        check_number(f"{type(self).__name__}: eta", eta, positive=True)
        self.pipeline = pipeline
        self.eta = eta
        self.steps = 0  # so far

    def step(self, samples: Sequence[Any], targets: Sequence[Any] | None = None) -> float | None:
        """One step on `samples`; arguments, errors and what is returned: `Pipeline.run`.

        The loss is that before the step, under the perturbed weights where there are such.
        """
        loss = self._gradient(samples, targets)
        with torch.no_grad():
            self._descend()
        self.steps += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What a step changes, but for the parameters: saved beside the modules' own state.

        With both loaded, and the same arguments, further steps are bitwise those of a run that was
        not interrupted, under codecs that round at random too. On ranks, each saves its own.
        """
        return {"steps": self.steps, "hops": self.pipeline.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, on all ranks.

        One without "hops", of before they were saved, loads too: hops then stay as they are, so
        that those of a new pipeline round at random otherwise than in a run not interrupted.

        Raises: ValueError: of other stages, shapes or schemes, or of another optimizer; nothing
            has changed.
        """
        mine = self.state_dict()
        if {"hops", *state} != mine.keys():
            raise ValueError(
                f"{type(self).__name__}: the state has {sorted(state)}, allowed: {sorted(mine)}"
            )
        if "hops" in state:
            self.pipeline.load_state_dict(state["hops"])
        self.steps = int(state["steps"])

    def _gradient(self, samples: Sequence[Any], targets: Sequence[Any] | None) -> float | None:
        """Make every parameter's `grad`; the loss."""
        return self.pipeline.run(samples, targets)

    @abstractmethod
    def _descend(self) -> None:
        """Move the parameters by their `grad`."""


class GD(_Descent):
    """Pipelined (sub)gradient descent: x_{t+1} = x_t - eta_t G_t.

    decay: eta_t = eta / sqrt(t + 1), of the subgradient method; else eta_t = eta.

    Raises: ValueError: eta is not a positive number.
    """

    def __init__(self, pipeline: Pipeline, eta: float, *, decay: bool = False) -> None:
        super().__init__(pipeline, eta)
        self.decay = decay

    def _descend(self) -> None:
        rate = self.eta / math.sqrt(self.steps + 1) if self.decay else self.eta
        for stage in self.pipeline.stages:
            for parameter in stage.parameters:
                parameter.sub_(gradient_of(parameter), alpha=rate)


class Nesterov(_Descent):
    """Pipelined accelerated descent: PPRS's equations with the plain gradient as G_t.

    Raises: ValueError: eta is not a positive number.
    """

    momentum = True

    def __init__(self, pipeline: Pipeline, eta: float) -> None:
        super().__init__(pipeline, eta)
        self._lambda = 0.0
        self._y = {
            stage.number: [parameter.detach().clone() for parameter in stage.parameters]
            for stage in pipeline.stages
        }

    def state_dict(self) -> dict[str, Any]:
        y = {stage: [one.clone() for one in ones] for stage, ones in self._y.items()}
        return {**super().state_dict(), "lambda": self._lambda, "y": y}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        name = type(self).__name__
        found, mine = _shapes(state.get("y", {})), _shapes(self._y)
        if found != mine:
            raise ValueError(f"{name}: the state is of stages with shapes {found}, allowed: {mine}")
        super().load_state_dict(state)
        self._lambda = float(state["lambda"])
        for stage, ones in self._y.items():
            for one, saved in zip(ones, state["y"][stage], strict=True):
                one.copy_(saved)

    def _descend(self) -> None:
        following = grown(self._lambda)
        mu = (following - 1) / grown(following) if self.momentum else 0.0
        for stage in self.pipeline.stages:
            for parameter, y in zip(stage.parameters, self._y[stage.number], strict=True):
                moved = parameter - self.eta * gradient_of(parameter)
                parameter.copy_((1 + mu) * moved - mu * y)
                y.copy_(moved)
        self._lambda = following


class PPRS(Nesterov):
    """Pipeline Parallel Random Smoothing: see above. A stage holds K copies of its parameters.

    Args:
        K: passes per sample and step, each under a perturbation of its own.
        gamma: of the perturbations' standard deviation, in units of the parameters.
        eta: the step.
        seed: of the perturbations, alike on all ranks.
        momentum: False: mu_t = 0, smoothing without acceleration; a control.

    Raises: ValueError: K is not a whole number of at least 1, gamma is negative, eta not positive.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        K: int,
        gamma: float,
        eta: float,
        seed: int = 0,
        *,
        momentum: bool = True,
    ) -> None:
        check_count("PPRS: K", K)
        check_number("PPRS: gamma", gamma, positive=False)
        super().__init__(pipeline, eta)
        self.K = K
        self.gamma = gamma
        self.seed = seed
        self.momentum = momentum

    def _gradient(self, samples: Sequence[Any], targets: Sequence[Any] | None) -> float | None:
        weights = self._perturbed if self.gamma else None
        return self.pipeline.run(samples, targets, copies=self.K, weights=weights)

    def _perturbed(self, stage: Stage) -> list[Weights]:
        """x + gamma X_k for every k, of one stage."""
        sizes = [parameter.numel() for parameter in stage.parameters]
        if not sizes:
            return [[] for _ in range(self.K)]
        noise = normals(
            sum(sizes), range(self.K), seed=self.seed, step=self.steps, stage=stage.number
        )
        by_parameter = []
        for parameter, part in zip(stage.parameters, noise.split(sizes, dim=1), strict=True):
            scaled = part.to(parameter.device, parameter.dtype).mul(self.gamma)
            moved = parameter.detach() + scaled.view(self.K, *parameter.shape)
            by_parameter.append([moved[k].requires_grad_() for k in range(self.K)])
        return [list(ones) for ones in zip(*by_parameter, strict=True)]


def grown(previous: float) -> float:
    """lambda_{t+1} = (1 + sqrt(1 + 4 lambda_t^2)) / 2."""
    return (1 + math.sqrt(1 + 4 * previous * previous)) / 2


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient that the pipeline made."""
    assert parameter.grad is not None
    return parameter.grad


def check_number(name: str, value: float, *, positive: bool) -> None:
    """Refuse what is not finite, negative, or zero where that may not be (ValueError)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (positive and value == 0):
        bound = "above 0" if positive else "of at least 0"
        raise ValueError(f"{name} is {value!r}, allowed: a finite number {bound}")


def _shapes(y: dict[int, list[torch.Tensor]]) -> dict[int, list[tuple[int, ...]]]:
    return {stage: [tuple(one.shape) for one in ones] for stage, ones in y.items()}
