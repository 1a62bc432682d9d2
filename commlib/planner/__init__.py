"""Measured numbers in, schemes out: what `policy="auto"` does, and the break-even table."""

from .auto import CANDIDATES, Curve, Profile, Speed, choose, policy, predict
from .breakeven import breakeven, breakeven_table, choices_table
from .measure import measure

__all__ = [
    "CANDIDATES",
    "Curve",
    "Profile",
    "Speed",
    "breakeven",
    "breakeven_table",
    "choices_table",
    "choose",
    "measure",
    "policy",
    "predict",
]
