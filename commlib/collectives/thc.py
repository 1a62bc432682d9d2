"""THC: codes that a server adds without decoding them (Li et al., NSDI 2024, arXiv 2302.08545).

Pure functions, of which no scheme is made yet. All workers use one grid, so that the sum of their
codes is the code of their sum:

    y_r  = rotate(x_r)                               signs from a shared seed, then Hadamard
    s    = max_r |y_r| / sqrt(n)                     agreed: one number per worker
    k_r  = stochastic rounding of y_r, clamped to +-clip s, to the grid 0 .. 2^bits - 1
    K    = sum_r k_r                                 integers: W (2^bits - 1) at most
    mean = unrotate(s clip (2 K / (W L) - 1))        L = 2^bits - 1

Rotated values are close to Gaussian, whatever x was, so that few lie beyond `clip` standard
deviations: at 4 bits 2.2 of them make the least error, step^2 / 6 by rounding and
2 ((1 + c^2) (1 - Phi(c)) - c phi(c)) by clamping. That the second stays is for error feedback.
"""

from __future__ import annotations

import math

import torch

CLIP = 2.2  # standard deviations, for 4 bits
MAX_BITS = 8


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x times the Hadamard matrix over sqrt(n), which is its own inverse, along dimension -1.

    x: (..., n), n a power of two, floating. Raises ValueError for another n.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: the last dimension is {n}, it must be a power of two; pad it")
    half, y = 1, x
    while half < n:
        pairs = y.reshape(*x.shape[:-1], n // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2)
        half *= 2
    return y.reshape(x.shape) / math.sqrt(n)


def rotate(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Flat x, padded with zeros to a power of two, with random signs, through `hadamard`.

    seed: of the signs, below 2^32, the same on all workers. Norms stay.
    """
    size = 1 << max(0, x.numel() - 1).bit_length()
    padded = torch.nn.functional.pad(x, (0, size - x.numel()))
    return hadamard(padded * _signs(size, seed, x.device))


def unrotate(y: torch.Tensor, seed: int, numel: int) -> torch.Tensor:
    """The first `numel` elements of what `rotate` made y of."""
    return (hadamard(y) * _signs(y.numel(), seed, y.device))[:numel]


def scale(y: torch.Tensor) -> torch.Tensor:
    """Root mean square of y, of which the largest of all workers becomes their scale."""
    return y.square().mean().sqrt()


def encode(
    y: torch.Tensor,
    scale: float,
    generator: torch.Generator,
    *,
    bits: int = 4,
    clip: float = CLIP,
) -> torch.Tensor:
    """Codes 0 .. 2^bits - 1 (uint8) of y between -clip scale and clip scale, beyond them the ends.

    generator: of the rounding, another on every worker. The expected value of a code is the place
    of its clamped value. Raises ValueError for a bad grid.
    """
    levels = _levels(bits, scale, clip)
    place = ((y / (clip * scale)).clamp(-1, 1) + 1) * (levels / 2)
    dither = torch.rand(y.shape, generator=generator, dtype=y.dtype).to(y.device)
    return (place + dither).floor().clamp(0, levels).to(torch.uint8)


def units(codes: torch.Tensor, workers: int = 1, *, bits: int = 4) -> torch.Tensor:
    """What a sum of `workers` codes stands for, in units of clip scale / L: 2 K - W L, int64.

    Linear: the units of a sum are the sum of units, exactly.
    """
    return 2 * codes.to(torch.int64) - workers * _levels(bits)


def decode(
    codes: torch.Tensor, workers: int, scale: float, *, bits: int = 4, clip: float = CLIP
) -> torch.Tensor:
    """The mean (fp32) of the `workers` values whose codes add up to `codes`."""
    levels = _levels(bits, scale, clip)
    return units(codes, workers, bits=bits).to(torch.float32) * (clip * scale / (levels * workers))


def _signs(numel: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(2, (numel,), generator=generator) - 1).to(device)


def _levels(bits: int, scale: float = 1.0, clip: float = 1.0) -> int:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"thc: bits is {bits}, allowed: 1 to {MAX_BITS}")
    if not (math.isfinite(scale) and scale > 0 and math.isfinite(clip) and clip > 0):
        raise ValueError(f"thc: scale {scale} and clip {clip} must be finite and above 0")
    return (1 << bits) - 1
