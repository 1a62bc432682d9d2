"""Where compression stops paying, as a table.

Per byte of fp32 a two-phase all_reduce saves `f (1 - ratio)` bytes of sending, f = 2 (W - 1) / W,
and costs `1/encode + 1/reduce + 1/decode` seconds of computing. The two are equal at the rate

    break-even = f (1 - ratio) / (1/encode + 1/reduce + 1/decode)

on a faster link the scheme is slower than plain. It is the bound for large messages with nothing
overlapped: slices in flight move it up, latency matters for small ones only.
"""

from __future__ import annotations

import torch
from tabulate import tabulate

from .auto import FP32_BYTES, RAW, Profile, choose, predict

# Link rates in bytes per second: office uplink, Ethernet in the usual steps.
RATES = {
    "100 Mbit/s": 12.5e6,
    "1 Gbit/s": 125e6,
    "10 Gbit/s": 1.25e9,
    "25 Gbit/s": 3.125e9,
    "100 Gbit/s": 12.5e9,
}


def breakeven(profile: Profile, scheme: str) -> float:
    """Link rate in bytes per second above which `scheme` is slower than plain, large messages."""
    speed = profile.speed(scheme)
    sent = 2 * (profile.size - 1) / profile.size
    return sent * (1 - speed.ratio) / speed.seconds_per_byte


def speedup(profile: Profile, scheme: str, rate: float) -> float:
    """Speed-up over a plain all_reduce that fills a link of `rate` bytes per second."""
    speed = profile.speed(scheme)
    sent = 2 * (profile.size - 1) / profile.size
    return (sent / rate) / (sent * speed.ratio / rate + speed.seconds_per_byte)


def breakeven_table(profile: Profile) -> str:
    """Speed-up of each scheme by link rate, its break-even rate, and what was measured here."""
    rows = []
    for scheme in profile.compressing:
        curve = profile.curve(scheme)
        here = profile.curve(RAW).at(curve.nbytes[-1]) / curve.seconds[-1]
        row: list[str] = [scheme, f"{breakeven(profile, scheme) * 8 / 1e9:.3g} Gbit/s"]
        row += [f"{speedup(profile, scheme, rate):.2f}x" for rate in RATES.values()]
        rows.append([*row, f"{here:.2f}x"])
    names = ["scheme", "slower above", *RATES, "measured here"]
    return tabulate(rows, headers=names, disable_numparse=True)


def choices_table(profile: Profile) -> str:
    """Measured milliseconds of each candidate by size, and what `auto` takes for fp32 tensors."""
    schemes = [curve.scheme for curve in profile.curves]
    rows = []
    for nbytes in profile.curve(RAW).nbytes:
        numel = nbytes // FP32_BYTES
        times = [1e3 * predict(profile, scheme, numel, profile.size) for scheme in schemes]
        taken = choose(profile, numel, torch.float32, profile.size)
        rows.append([f"{nbytes / 1024:g} KiB", *(f"{ms:.3g}" for ms in times), taken])
    names = ["size", *(f"{scheme} ms" for scheme in schemes), "auto"]
    return tabulate(rows, headers=names, disable_numparse=True)
