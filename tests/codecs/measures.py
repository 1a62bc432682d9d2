"""How good a codec is: errors, and the vectors they are measured on."""

from __future__ import annotations

import math

import numpy as np
import torch

from commlib.codecs import Codec, codec
from tests.contract import round_trip

D = 16384


def lognormal(seed: int, numel: int = D) -> torch.Tensor:
    """exp(N(0, 1)) with random signs."""
    g = np.random.default_rng(seed)
    x = np.exp(g.standard_normal(numel)) * g.choice([-1.0, 1.0], numel)
    return torch.from_numpy(x.astype(np.float32))


def student(seed: int, numel: int = D) -> torch.Tensor:
    """Student's t with 3 degrees of freedom."""
    x = np.random.default_rng(seed).standard_t(3, numel)
    return torch.from_numpy(x.astype(np.float32))


def nmse(c: Codec | str, x: torch.Tensor, step: int = 0) -> float:
    """``|Q(x) - x|^2 / |x|^2``."""
    error = round_trip(c, x, step).double() - x.double()
    return float(error @ error) / float(x.double() @ x.double())


def mean_nmse(text: str, vectors: object, seeds: int = 4) -> float:
    """Over several vectors: with one scale per tensor a single one says little."""
    assert callable(vectors)
    return sum(nmse(text, vectors(seed), seed) for seed in range(seeds)) / seeds


def mean_of_encodings(c: Codec, x: torch.Tensor, n: int) -> tuple[torch.Tensor, float]:
    """(mean of n codings of x, mean of their NMSE), where x is a whole number of blocks.

    The n copies are one tensor: every place draws random numbers of its own.
    """
    assert x.numel() % c.format.block == 0
    many = round_trip(c, x.repeat(n)).view(n, -1).double()
    errors = (many - x.double()).square().sum(dim=1) / x.double().square().sum()
    return many.mean(dim=0), float(errors.mean())


def check_unbiased(text: str, x: torch.Tensor, n: int = 400) -> None:
    """The mean of n codings has error NMSE / n; a bias would not average out (T26)."""
    c = codec(text)
    assert c.unbiased, text
    mean, one = mean_of_encodings(c, x, n)
    error = float((mean - x.double()).square().sum() / x.double().square().sum())
    spread = 4 * math.sqrt(2 / x.numel())  # the error is a sum of about numel squares
    assert error <= one / n * (1 + max(spread, 0.5)), (text, error, one / n)


def check_gamma(text: str, x: torch.Tensor, n: int = 1) -> float:
    """The error is at most gamma (on average, where rounding is random); returns their ratio."""
    c = codec(text)
    gamma = c.gamma(x.numel())
    if c.unbiased:
        mine = mean_of_encodings(c, x, n)[1]
        bound = gamma * (1 + 5 / math.sqrt(n))  # five standard deviations of such a mean, roughly
    else:
        mine, bound = nmse(c, x), gamma * (1 + 1e-5)  # y = x * inv is rounded
    assert mine <= bound, (text, mine, gamma)
    return mine / gamma
