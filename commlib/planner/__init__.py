"""Measured numbers in, schemes out: `policy="auto"`, the break-even table, a scheme per layer."""

from .auto import CANDIDATES, Curve, Profile, Speed, choose, policy, predict
from .breakeven import breakeven, breakeven_table, choices_table
from .errors import Errors
from .measure import exchange, measure, speed
from .messages import Prices, plan_messages
from .schemes import Layer, Plan, plan, uniform

__all__ = [
    "CANDIDATES",
    "Curve",
    "Errors",
    "Layer",
    "Plan",
    "Prices",
    "Profile",
    "Speed",
    "breakeven",
    "breakeven_table",
    "choices_table",
    "choose",
    "exchange",
    "measure",
    "plan",
    "plan_messages",
    "policy",
    "predict",
    "speed",
    "uniform",
]
